"""Curves as files: what matplotlib has drawn, as PNG and SVG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastambient.files import write_bytes


def save_figure(path: Path, figure: Any) -> None:
    """`path` with .png and with .svg, each whole or absent; the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            write_bytes(path.with_name(f"{path.name}.{kind}"), buffer.getvalue())
