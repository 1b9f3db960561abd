"""From an image file to uint8 [C, H, W]: every format and mode, by one stated rule each (see sources.py).

Files come from anywhere: sizes are checked in the header before anything is decoded, only four formats are tried,
and whatever a decoder raises becomes a `BadEntry` with a reason.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps

from fastambient.errors import InputError

MAX_PIXELS = 64_000_000

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_T = TypeVar("_T")


class BadEntry(Exception):
    """Why one picture, or another entry of an archive, cannot be used."""


def use_image(open_file: Callable[[], BinaryIO], use: Callable[[Image.Image], _T], *, whole: bool) -> _T:
    """``use(image)`` of a file, with every failure as a `BadEntry`. `whole` reads all bytes (a zip checks its CRC)."""
    try:
        with warnings.catch_warnings(), open_file() as stream:
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF and palettes
            with Image.open(io.BytesIO(stream.read()) if whole else stream, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadEntry(f"is {image.width} x {image.height}, above the limit of {MAX_PIXELS:,} pixels")
                return use(image)
    except (BadEntry, InputError):
        raise
    except Image.DecompressionBombError as error:
        raise BadEntry(f"is above the limit of {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadEntry("is no PNG, JPEG, WebP or BMP image, or broken from its start on") from error
    except Exception as error:  # decoders meet broken bytes with OSError, SyntaxError, struct.error, zlib.error, ...
        raise BadEntry(f"cannot be read: {str(error) or type(error).__name__}") from error


def is_grey(image: Image.Image) -> bool:
    """Whether it is stored as grey, whatever its depth; a palette is colour."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """A picture of any mode as "L" or "RGB" of 8 bits: EXIF orientation, 16-bit grey by 1/257, alpha over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32).clip(0, 65535)  # 64 megapixels are 256 MB
        values += 128
        values //= 257
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """The largest centred square, resized to resolution x resolution; a picture of that size as it is."""
    if image.size == (resolution, resolution):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize(box=...) would look beyond the square
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=3.0)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W] of an "L" or "RGB" picture."""
    array = np.array(image)  # a copy: Pillow's own buffer is read-only
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
