"""Sharded .npy arrays: written whole, read memory-mapped as one."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastambient.errors import InputError

MAPS = 16_384  # shards of an array that stay mapped, 4 TiB of them; Linux allows a process 65,530 maps


@dataclass(frozen=True)
class Written:
    """A file that was written: what a manifest says of it."""

    bytes: int
    sha256: str


def write_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype | type, pieces: Iterable[np.ndarray]) -> Written:
    """An array of `shape` from `pieces` along its first axis: never more than a piece in memory, the checksum on the
    way. A full disk is an OSError that says so. The file has its name when it is whole."""
    dtype = np.dtype(dtype)
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    digest, size, rows = hashlib.sha256(), 0, 0
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        for piece in itertools.chain([None], pieces):
            if piece is None:
                data = np.frombuffer(header.getvalue(), np.uint8)
            else:
                data = np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8)
                rows += len(piece)
            file.write(data)  # type: ignore[arg-type]  # an array is a buffer
            digest.update(data)  # type: ignore[arg-type]
            size += len(data)
    if rows != shape[0]:
        raise ValueError(f"{path}: {rows} rows written, {shape[0]} announced")
    os.replace(temporary, path)
    return Written(size, digest.hexdigest())


class ShardedArray:
    """Memory-mapped .npy shards as one array: len, shape, and reading rows by a slice or by integers.

    maps : how many shards stay mapped, those that were read last. Pages that were read count as the process's memory
        while they are; 0 maps a shard for each read.
    """

    def __init__(self, paths: list[Path], shape: tuple[int, ...], dtype: np.dtype, *, maps: int = MAPS) -> None:
        self.shape, self.dtype, self._paths, self._most = shape, dtype, paths, maps
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()
        self._ends = [0]
        for number, path in enumerate(paths):
            shard = _load(path, dtype)
            if shard.shape[1:] != shape[1:]:
                raise InputError(f"{path} holds {list(shard.shape)}, which does not fit the manifest's {list(shape)}")
            self._ends.append(self._ends[-1] + len(shard))
            if number < maps:
                self._maps[number] = shard
        if self._ends[-1] != shape[0]:
            where = paths[0].parent if paths else "the store"
            raise InputError(f"{where} holds {self._ends[-1]:,} rows where the manifest says {shape[0]:,}")

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds names, and the maps are made anew from them."""
        return ShardedArray, (self._paths, self.shape, self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> np.ndarray:
        """A copy of the rows, [n, ...].

        Raises
        ------
        IndexError : outside 0 .. len - 1 (negative numbers count from the end)
        InputError : a file was cut short or removed since it was opened
        """
        index = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
            raise IndexError(f"rows are read by a slice or by integers [n], got {index.dtype} {list(index.shape)}")
        index = np.where(index < 0, index + len(self), index)
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}")
        which = np.searchsorted(self._ends, index, side="right") - 1
        numbers = np.unique(which)
        for number in numbers:
            shard = np.asarray(self._shard(int(number)))
            if len(numbers) == 1:  # straight to its place; "clip", which nothing needs, because "raise" buffers
                np.take(shard, index - self._ends[number], axis=0, out=out, mode="clip")
            else:
                here = which == number
                out[here] = shard[index[here] - self._ends[number]]
        return out

    def _shard(self, number: int) -> np.memmap:
        """A shard whose file is whole: what a map shows beyond the end of its file is no error that can be caught, it
        ends the process."""
        path, shard = self._paths[number], self._maps.get(number)
        if shard is None:
            return self._map(number)
        if self._most < len(self._paths):
            with suppress(KeyError):  # another thread has let go of it
                self._maps.move_to_end(number)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise InputError(
                f"{path} cannot be read any more ({error.strerror}); restore it, or prepare the store again"
            ) from error
        if size < shard.offset + shard.nbytes:
            raise InputError(
                f"{path} was cut short since it was opened: {size:,} bytes of {shard.offset + shard.nbytes:,}; restore"
                " it, or prepare the store again"
            )
        return shard

    def _map(self, number: int) -> np.memmap:
        """A shard that is not mapped; of those that are, the one read longest ago goes where they would be too many."""
        path, rows = self._paths[number], self._ends[number + 1] - self._ends[number]
        shard = _load(path, self.dtype)
        if shard.shape != (rows, *self.shape[1:]):
            raise InputError(
                f"{path} is another one since the store was opened: {list(shard.shape)} where it held {rows:,} rows;"
                " restore it, or prepare the store again"
            )
        if self._most:
            while len(self._maps) >= self._most:
                with suppress(KeyError):
                    self._maps.popitem(last=False)
            self._maps[number] = shard
        return shard


def _load(path: Path, dtype: np.dtype) -> np.memmap:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); prepare the store again".replace("\n", " ")) from error
    if array.dtype != dtype:
        raise InputError(f"{path} is {array.dtype}, expected {dtype}; prepare the store again")
    return array
