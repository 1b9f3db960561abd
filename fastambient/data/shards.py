"""Sharded .npy arrays: written whole, read memory-mapped as one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fastambient.errors import InputError


def write_npy(path: Path, array: np.ndarray) -> None:
    """As `np.save`, but a full disk is an OSError that says so."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


class ShardedArray:
    """Memory-mapped .npy shards as one array: len, shape, and reading rows by a slice or by integers."""

    def __init__(self, paths: list[Path], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._shards = [_load(path, dtype) for path in paths]
        self._ends = [0]
        for path, shard in zip(paths, self._shards, strict=True):
            if shard.shape[1:] != shape[1:]:
                raise InputError(f"{path} holds {list(shard.shape)}, which does not fit the manifest's {list(shape)}")
            self._ends.append(self._ends[-1] + len(shard))
        if self._ends[-1] != shape[0]:
            where = paths[0].parent if paths else "the store"
            raise InputError(f"{where} holds {self._ends[-1]:,} rows where the manifest says {shape[0]:,}")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> np.ndarray:
        """A copy of the rows, [n, ...]; IndexError outside 0 .. len - 1 (negative numbers count from the end)."""
        index = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
            raise IndexError(f"rows are read by a slice or by integers [n], got {index.dtype} {list(index.shape)}")
        index = np.where(index < 0, index + len(self), index)
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}")
        which = np.searchsorted(self._ends, index, side="right") - 1
        for number in np.unique(which):
            here = which == number
            out[here] = self._shards[number][index[here] - self._ends[number]]
        return out


def _load(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); prepare the store again".replace("\n", " ")) from error
    if array.dtype != dtype:
        raise InputError(f"{path} is {array.dtype}, expected {dtype}; prepare the store again")
    return array
