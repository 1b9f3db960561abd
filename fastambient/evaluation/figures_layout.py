"""Pictures in rows and columns with labels around them, as one PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastambient.files import write_bytes
from fastambient.pictures import enlarge, grid

_DPI = 100
_NAME = 20  # characters a line of a row's label
_TITLE = 8  # pixels a character of a title, of which it is broken into lines
_COPY = "#b3261e"  # of the caption of a copy, which also says so in words


@dataclass(frozen=True)
class Block:
    """One picture of tiles of equal size, with labels around it.

    tiles : uint8 [rows, columns, C, H, W]
    rows, columns : labels; "" for none
    alarmed : columns whose label is drawn in another colour
    """

    title: str
    tiles: np.ndarray
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    alarmed: frozenset[int] = frozenset()


def wrapped(text: str) -> str:
    """A row's label in lines that end between words or folders, not at the hyphens in their names."""
    lines = textwrap.wrap(text.replace("/", "/ "), _NAME, break_on_hyphens=False)
    return "\n".join(line.replace("/ ", "/") for line in lines)


def draw(path: Path, blocks: Sequence[Block], *, enlarged: bool = True) -> None:
    """Write blocks below each other as a PNG, one pixel of a tile's enlargement a pixel of the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvases = []
    for block in blocks:
        rows, columns = block.tiles.shape[:2]
        tiles = block.tiles.reshape(-1, *block.tiles.shape[2:])
        canvases.append(grid(enlarge(tiles) if enlarged else tiles, columns, scale=1))
    labels = [[wrapped(text) for text in block.rows] for block in blocks]
    longest = max((len(line) for rows in labels for text in rows for line in text.split("\n")), default=0)
    left, right, gap = 12 + 7 * longest + (8 if longest else 0), 12, 10
    inner = max(max(canvas.shape[2] for canvas in canvases), 320)
    titles = [textwrap.wrap(block.title, inner // _TITLE, break_on_hyphens=False) for block in blocks]
    heads = [
        (4 + 18 * len(title) if title else 0) + (20 if block.columns else 0) + gap
        for block, title in zip(blocks, titles, strict=True)
    ]
    width = left + inner + right
    height = sum(heads) + sum(canvas.shape[1] for canvas in canvases) + gap
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    top = height
    for block, canvas, head, names, title in zip(blocks, canvases, heads, labels, titles, strict=True):
        _, h, w = canvas.shape
        for k, line in enumerate(title):
            y = (top - gap - 18 * k) / height
            figure.text(left / width, y, line, va="top", fontsize=10, weight="bold", parse_math=False)
        top -= head
        figure.figimage(
            np.broadcast_to(canvas, (3, h, w)).transpose(1, 2, 0),  # a colour map would round grey levels
            left,
            top - h,
            origin="upper",
        )
        rows, columns = block.tiles.shape[:2]
        for k, text in enumerate(block.columns):
            color = _COPY if k in block.alarmed else "black"
            x = left + (k + 0.5) * w / columns
            figure.text(
                x / width, (top + 4) / height, text, ha="center", va="bottom", fontsize=8, color=color, parse_math=False
            )
        for k, text in enumerate(names):
            y = top - (k + 0.5) * h / rows
            figure.text((left - 8) / width, y / height, text, ha="right", va="center", fontsize=8, parse_math=False)
        top -= h
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
