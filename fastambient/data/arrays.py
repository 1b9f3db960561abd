"""Pictures that come as one uint8 array: the built-in digits, and .npy and .npz files. Rows are read by offset."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from fastambient.console import progress
from fastambient.data.archives import ZIP_ERRORS, open_entry, open_zip
from fastambient.data.decode import fit, to_array
from fastambient.data.items import Item, Source, check_labels, check_size, file_stamp, unreadable
from fastambient.errors import InputError

_CHUNK_BYTES = 1 << 20


class _Rows(Protocol):
    """A uint8 array [N, ...] that is read row by row."""

    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]: ...

    def stamps(self) -> Iterable[tuple[str, int, int]]: ...


class Arrays(Source):
    """Pictures that come as uint8 [H, W], [H, W, C] or [C, H, W] arrays, one after the other."""

    def __init__(self, name: str, where: str, rows: _Rows, labels: np.ndarray | None, resolution: int | None) -> None:
        shape = rows.shape
        self._channels_last = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
        full = (*shape, 1) if len(shape) == 3 else shape
        if len(full) != 4 or full[3 if self._channels_last else 1] not in (1, 3):
            raise InputError(
                f"{where} has the shape {list(shape)}; expected [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3"
            )
        if 0 in full:
            raise InputError(f"no image in {where}: its shape is {list(shape)}")
        length, *rest = full
        height, width = rest[:2] if self._channels_last else rest[1:]
        if resolution is None:
            check_size((width, height), (width, height), f"every image of {where}")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (length,)):
            raise InputError(f"{where}: labels must be {length:,} integers, got {labels.dtype} {list(labels.shape)}")
        channels = rest[2 if self._channels_last else 0]
        super().__init__(name, length=length, channels=channels, resolution=resolution or width)
        self.num_classes = 0 if labels is None else check_labels(labels, where)
        self._rows, self._labels = rows, labels
        self.looked_at, self.enlarged = length, length if min(height, width) < self.resolution else 0

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        start, stop = self._span(start, stop)
        for i, row in enumerate(self._rows.read(start, stop), start):
            picture = row if self._channels_last else row.transpose(1, 2, 0)
            image = Image.fromarray(picture.reshape(picture.shape[:2]) if self.channels == 1 else picture)
            label = -1 if self._labels is None else int(self._labels[i])
            yield Item(i, f"{self.name}: row {i}", to_array(fit(image, self.resolution)), label, {})

    def _stamps(self, start: int, stop: int) -> Iterable[tuple[str, int, int]]:
        return self._rows.stamps()


class _Memory:
    def __init__(self, array: np.ndarray) -> None:
        self.shape, self._array = array.shape, array

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        return iter(self._array[start:stop])

    def stamps(self) -> Iterable[tuple[str, int, int]]:
        return ()


class _File:
    """An .npy file, or the array `key` of an .npz. A compressed one has no offsets: it is read from its start."""

    def __init__(self, path: Path, key: str | None = None) -> None:
        self._path, self._key = path, key
        self.where = str(path) if key is None else f"{path}: {key}"
        with _opened(path, key) as (stream, size, entry_at):
            self.shape, dtype = _read_header(stream, self.where, size)
            if dtype != np.uint8:
                raise InputError(
                    f"{self.where} is {dtype}; images must be uint8 in 0..255: convert them and save again"
                )
            self._stored, self._data_at = entry_at is not None, (entry_at or 0) + stream.tell()
            if key is not None:  # reading to the end checks the zip's CRC, which reading by offset cannot
                with progress(f"checking {path.name}", size, "bytes") as advance:
                    while chunk := stream.read(_CHUNK_BYTES):
                        advance(len(chunk))

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        bytes_a_row = math.prod(self.shape[1:])
        try:
            with _opened(self._path, None if self._stored else self._key) as (stream, *_):
                stream.seek(self._data_at + start * bytes_a_row)
                for _ in range(start, stop):
                    yield np.frombuffer(stream.read(bytes_a_row), np.uint8).reshape(self.shape[1:])
        except OSError as error:
            unreadable(self._path, error)
        except ZIP_ERRORS as error:  # a ValueError is a row cut short
            raise InputError(f"{self.where} is damaged ({error}); save it again") from error

    def stamps(self) -> Iterable[tuple[str, int, int]]:
        return [file_stamp(self._path, self._path.name)]


@contextmanager
def _opened(path: Path, key: str | None) -> Iterator[tuple[BinaryIO, int, int | None]]:
    """(stream, bytes, where in the file it begins or None where it is compressed) of an .npy file or .npz entry."""
    with open(path, "rb") as file:
        if key is None:
            yield file, path.stat().st_size, 0
            return
        with open_zip(path) as archive:
            info = archive.getinfo(f"{key}.npy")
            entry_at = None
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)  # of the local header, whose last fields are two lengths
                entry_at = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            with open_entry(archive, info.filename, info.file_size) as stream:
                yield stream, info.file_size, entry_at


def open_digits(resolution: int | None) -> Source:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    source = Arrays("digits", "digits", _Memory(images), data.target, resolution)
    source.class_names, source.default_train = [str(i) for i in range(10)], 100
    return source


def open_array(path: Path, resolution: int | None) -> Source:
    """The images of an .npy or .npz file."""
    if path.suffix.lower() == ".npy":
        return Arrays(path.name, str(path), _File(path), None, resolution)
    labels: np.ndarray | None = None
    try:
        with open_zip(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
            keys = sorted(sizes.keys() - {"labels"})
            if "images" not in keys and len(keys) != 1:
                there = ", ".join(keys) or "none"
                raise InputError(f"{path} must hold an array images, or a single one; it holds {there}")
            if "labels" in sizes:
                with open_entry(archive, "labels.npy") as file:
                    shape, dtype = _read_header(file, f"{path}: labels", sizes["labels"])
                    labels = np.frombuffer(file.read(), dtype).reshape(shape)
        rows = _File(path, "images" if "images" in keys else keys[0])
    except (*ZIP_ERRORS, KeyError) as error:
        raise InputError(f"{path} is damaged, or no .npz of arrays ({error}); save it again") from error
    return Arrays(path.name, rows.where, rows, labels, resolution)


def _read_header(stream: BinaryIO, where: str, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy stream of `size` bytes that stands at its start; leaves it at the first item."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except ValueError as error:
        raise InputError(f"{where} is no readable .npy array ({error})".replace("\n", " ")) from error
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, which are pickles and never loaded; save numbers")
    if fortran_order and len(shape) > 1:
        raise InputError(f"{where} is in Fortran order; save np.ascontiguousarray(array)")
    expected, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if there != expected:
        raise InputError(f"{where} is truncated or damaged: {expected:,} bytes of data expected, {there:,} there")
    return shape, dtype
