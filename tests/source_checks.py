"""Pictures and files for the tests of sources, and what must be true of every source."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from fastambient.data import open_source
from fastambient.errors import InputError


def picture(seed: int, size=(8, 8), mode="RGB") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0]) if mode == "L" else Image.frombytes(mode, size, values.tobytes())


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_folder(path, files: dict[str, bytes]):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_zip(path, files: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read_all(source):
    items = [(item.name, item.image, item.label) for item in source.read()]
    for _, image, _ in items:
        assert image.dtype == np.uint8 and image.shape == (source.channels, source.resolution, source.resolution)
    return items


def error_of(*args, read=False, **options) -> str:
    with pytest.raises(InputError) as caught:
        source = open_source(*args, **options)
        if read:
            list(source.read())
    message = str(caught.value)
    assert "\n" not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def same(items, others) -> bool:
    """Whether two lists of items are equal, pixels included."""
    plain = [(item.row, item.name, item.label, item.text, item.image.shape, item.image.tobytes()) for item in items]
    return plain == [(o.row, o.name, o.label, o.text, o.image.shape, o.image.tobytes()) for o in others]


def check_rows(source):
    """Any span of rows is that span of the whole, here and in a source that was pickled; the items of the whole."""
    whole = list(source.read())
    assert all(0 <= item.row < source.length for item in whole)
    assert [item.row for item in whole] == sorted({item.row for item in whole})
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    n = source.length
    for start, stop in ((0, 1), (1, n), (n // 2, n // 2 + 1), (n - 1, n), (n, n), (n // 3, 2 * n // 3)):
        expected = [item for item in whole if start <= item.row < stop]
        for other in (source, copy):
            assert same(other.read(start, stop), expected), (start, stop)
    for start, stop in ((-1, 1), (0, n + 1), (2, 1)):
        with pytest.raises(IndexError):
            next(source.read(start, stop))
    assert source.fingerprint(0, n) == copy.fingerprint(0, n) != source.fingerprint(0, n - 1)
    int(source.fingerprint(0, n), 16)
    return whole


def touch(path) -> None:
    """Change nothing but the time of change."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
