"""What `evaluate` and `audit` are asked for alike, checked before the work begins."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from fastambient.errors import InputError

ENOUGH_HELD_OUT = 30  # images, below which a control is called weak
_MOST_BYTES = 1 << 26  # of a metrics.json; the longest are a thousandth of it


def check_target(out: Path, *inputs: str | Path | None) -> None:
    """InputError where no file can be written at `out`, or where that would replace one of the `inputs`, or anything
    else than what an earlier evaluation wrote."""
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"cannot be made: there is no folder {out.parent}"
        raise InputError(f"--out {out} {what}; name a file in a folder that exists")
    if out.exists() and any(i is not None and Path(i).exists() and out.samefile(i) for i in inputs):
        raise InputError(f"--out {out} is what is to be read, and would be replaced; name another file")
    if out.exists() and not _replaceable(out):
        raise InputError(f"--out {out} exists and is no metrics of an earlier evaluation; name another file")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}; choose another folder") from None


def _replaceable(out: Path) -> bool:
    """An empty file, or a metrics.json."""
    if not out.is_file() or out.stat().st_size > _MOST_BYTES:
        return False
    try:
        text = out.read_text(encoding="utf-8")
        return not text or "memorization" in json.loads(text)
    except (OSError, ValueError, TypeError):
        return False


def check_num(num: int | None, *, of: int | None = None, samples: object = None) -> None:
    """InputError for fewer samples than an evaluation needs, or more than the `of` pictures of `samples` where these
    are known. None: all there are."""
    if num is not None and num < 2:
        raise InputError(f"--num must be 2 or more, got {num}")
    if num is not None and of is not None and num > of:
        raise InputError(f"--num {num}: {samples} holds {of} pictures")
