"""Pictures as uint8 [N, C, H, W]: from samples in [-1, 1], to PNG files and grids, and back from a folder or .npz."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastambient.errors import FastambientError, InputError, nearest_beside
from fastambient.files import write_bytes

GRID_NAME = "grid.png"  # the overview that may lie among the samples of a folder; never read as a sample
_TILE = 64  # a picture in a grid is enlarged until its longer side has at least this many pixels
_GAP = 2  # pixels between the pictures of a grid
GAP_VALUE = 112  # a grey that neither black nor white pictures run into


def to_uint8(x: Tensor) -> Tensor:
    """Pictures in [-1, 1], any float dtype and shape, to uint8: rounded to the nearest of the 256 levels, clamped.

    Raises
    ------
    FastambientError
        A value is NaN (no colour stands for it).
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if bool(torch.isnan(x).any()):
        raise FastambientError(
            "the pictures hold NaN, expected numbers in [-1, 1]; the model has diverged: lower training.lr"
        )
    return ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_pictures(images: Any, what: str = "images") -> np.ndarray:
    """An array or tensor as a uint8 array [N, C, H, W] with C of 1 or 3, without a copy where it is one already.

    Raises
    ------
    InputError
        Another dtype or shape; `what` names the argument in the message.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asanyarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape[2:]:
        raise InputError(
            f"{what} is {array.dtype} {list(array.shape)}, expected uint8 [N, C, H, W] with 1 or 3 channels;"
            " transpose it, or pass floats through to_uint8 first"
        )
    return array


def png_bytes(image: Any) -> bytes:
    """One picture uint8 [C, H, W] (C of 1 or 3; array or tensor) as the bytes of a PNG file."""
    picture = as_pictures(image[None], "the picture")[0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0))).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def save_png(path: Path, image: Any) -> None:
    """Write one picture uint8 [C, H, W] (C of 1 or 3; array or tensor), replacing `path` in one step."""
    write_bytes(Path(path), png_bytes(image))


def enlarge(images: np.ndarray, scale: int | None = None) -> np.ndarray:
    """Repeat pixels (nearest) of [N, C, H, W] by an integer factor; by default until an 8x8 digit can be looked at."""
    if scale is None:
        scale = max(1, -(-_TILE // max(images.shape[2:])))
    if scale < 1:
        raise InputError(f"scale is {scale}, expected a whole number of at least 1")
    return images.repeat(scale, axis=2).repeat(scale, axis=3)


def grid(images: Any, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """One picture of all, row by row, with thin gaps.

    Parameters
    ----------
    images: uint8 [N, C, H, W], array or tensor, N >= 1.
    columns: pictures a row; by default so many that the whole is about square.
    scale: integer enlargement (nearest); by default small pictures grow to at least 64 pixels a side.

    Returns
    -------
    uint8 [C, H', W']

    Raises
    ------
    InputError
        No picture, another dtype or shape, `columns` or `scale` below 1.
    """
    tiles = enlarge(as_pictures(images), scale)
    n, c, h, w = tiles.shape
    if n == 0:
        raise InputError("a grid of 0 pictures, expected at least 1")
    if columns is None:
        columns = min(n, math.ceil(math.sqrt(n * h / w)))
    if columns < 1:
        raise InputError(f"columns is {columns}, expected a whole number of at least 1")
    rows = -(-n // columns)
    canvas = np.full((c, rows * (h + _GAP) - _GAP, columns * (w + _GAP) - _GAP), GAP_VALUE, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (h + _GAP), i % columns * (w + _GAP)
        canvas[:, y : y + h, x : x + w] = tile
    return canvas


def load_pictures(path: Path) -> np.ndarray:
    """Samples written before: a folder of PNG files (in the order of their names), or an .npz with the key ``images``.

    Returns
    -------
    uint8 [N, C, H, W], N >= 1, C of 1 or 3

    Raises
    ------
    InputError
        Nothing there, an unreadable file, a mode other than 8-bit grey or RGB, mixed sizes or channels, or an .npz
        without a uint8 array [N, C, H, W] under ``images``.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a folder of PNG files or an .npz file{nearest_beside(path)}")
    if path.suffix.lower() != ".npz":
        raise InputError(f"{path} is neither a folder of PNG files nor an .npz file")
    return _load_npz(path)


def picture_names(path: Path) -> list[str] | None:
    """What the pictures of `load_pictures` are called: the files' names, in their order; None for an .npz."""
    return [file.name for file in _png_files(Path(path))] if Path(path).is_dir() else None


def _png_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() == ".png" and p.name != GRID_NAME and p.is_file())


def _load_folder(folder: Path) -> np.ndarray:
    files = _png_files(folder)
    if not files:
        raise InputError(f"the folder {folder} holds no PNG file; expected the samples that `fastambient sample` wrote")
    pictures: np.ndarray | None = None
    for i, file in enumerate(files):
        picture = _load_png(file)
        if pictures is None:
            pictures = np.empty((len(files), *picture.shape), np.uint8)
        if picture.shape != pictures.shape[1:]:
            raise InputError(
                f"{file} is {_size(picture.shape)} but {files[0].name} is {_size(pictures.shape[1:])};"
                " expected pictures of one size and one number of channels"
            )
        pictures[i] = picture
    assert pictures is not None
    return pictures


def _load_png(file: Path) -> np.ndarray:
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            if opened.mode not in ("L", "RGB"):
                raise InputError(f"{file} has the mode {opened.mode}, expected 8-bit grey or RGB; convert it first")
            picture = np.asarray(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{file} cannot be read as a PNG picture ({_one_line(error)}); remove it or write it again"
        ) from error
    return picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)


def _load_npz(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile) or "images" not in arrays.files:
                raise InputError(f"{path} has no array `images`, expected one of uint8 [N, C, H, W]")
            pictures = arrays["images"]
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an .npz file ({_one_line(error)}); write it again") from error
    pictures = as_pictures(pictures, f"`images` in {path}")
    if len(pictures) == 0:
        raise InputError(f"`images` in {path} holds 0 pictures, expected at least 1")
    return pictures


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
