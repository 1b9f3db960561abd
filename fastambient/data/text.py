"""Names and sidecar text of a store's images: a JSON value a line, and where each line begins."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from fastambient.data.shards import Written
from fastambient.errors import InputError


def write_lines(path: Path, values: Iterable[Any]) -> Written:
    """One line of JSON an image, as it comes."""
    digest, size = hashlib.sha256(), 0
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        for value in values:
            line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            file.write(line)
            digest.update(line)
            size += len(line)
    os.replace(temporary, path)
    return Written(size, digest.hexdigest())


def line_offsets(path: Path) -> np.ndarray:
    """int64 [N + 1]: where each line begins, and the size of the file."""
    ends, place = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(16 << 20):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + place + 1)
            place += len(block)
    return np.concatenate(ends).astype(np.int64)


class _Lines:
    """Values of the images of one side of a store, read when they are asked for."""

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self.path, self._offsets = path, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _value(self, row: int, kind: type) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}, got {row}")
        start, end = (int(place) for place in self._offsets[row : row + 2])
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            value = json.loads(line)
            if not isinstance(value, kind):
                raise ValueError(f"no {kind.__name__}")
            return value
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: line {row + 1} is damaged ({error}); prepare the store again") from error


class Texts(_Lines):
    """Sidecar text: ``texts[row]`` is {kind: text}."""

    def __getitem__(self, row: int) -> dict[str, str]:
        return dict(self._value(row, dict))


class LazyNames(Sequence[str], ABC):
    """Names of images that are made when they are asked for. What is derived from it gives `name` and `__len__`."""

    @abstractmethod
    def name(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        return [self.name(i) for i in range(*row.indices(len(self)))] if isinstance(row, slice) else self.name(row)


class Names(_Lines, LazyNames):
    """What each image is called in the source: ``names[row]``, such as "cats/17.png"."""

    def name(self, row: int) -> str:
        return str(self._value(row, str))
