"""Rows: what a loader draws from, and in which order. A loader knows no files, rows know no device.

An object of rows is picklable, so that a process of its own can read: files are opened again by name.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastambient.data.order import dataset_indices
from fastambient.data.store import Split
from fastambient.errors import InputError


class Rows(Protocol):
    """Training samples by number, and which number stands at each position of the endless shuffled sequence."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every image."""
        ...

    def index(self, positions: Tensor) -> Tensor:
        """Which row stands at each of `positions` (int64 [N]): int64 [N] on the CPU, a pure function of (seed,
        positions)."""
        ...

    def fetch(self, index: np.ndarray) -> dict[str, Any]:
        """The rows `index` (int64 [n]), arrays of the caller's own.

        "images" : uint8 [n, C, H, W], or in their place "jpeg": n encoded pictures, a list of bytes
        "ids"    : int64 [n], image ids of the noise contract
        "labels" : int64 [n], in a labelled set
        "x_n"    : float16 or float32 [n, C, H, W], where there are noised images
        """
        ...


class SizedRows(Rows, Protocol):
    """Rows of a known number, which may be held in memory as a whole."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as `fetch` gives them."""
        ...


class StoreRows:
    """The training side of a store, from its memory-mapped shards.

    Parameters
    ----------
    split : the training side
    seed : run seed, 64 bits: the order
    use_noisy : whether the precomputed noised images are read, too

    Raises
    ------
    InputError : `use_noisy`, and the store holds no noised images
    """

    memory_mapped = True  # `fetch` copies and computes nothing: a thread reads as fast as a process

    def __init__(self, split: Split, *, seed: int, use_noisy: bool) -> None:
        if use_noisy and split.noisy is None:
            raise InputError(
                "the store holds no noised images; prepare it with --sigma-tn S --noisy float16 or float32"
            )
        if split.images is None:
            raise InputError("the store was handed out: it holds no clean image")
        self.split, self.seed, self.images = split, seed, split.images
        self.noisy = split.noisy if use_noisy else None
        _, channels, height, width = split.images.shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def nbytes(self) -> int:
        arrays = (self.split.images, self.split.ids, self.split.labels, self.noisy)
        return sum(array.nbytes for array in arrays if array is not None)

    def index(self, positions: Tensor) -> Tensor:
        return dataset_indices(positions, len(self.split), seed=self.seed)

    def fetch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        found = {"images": self.images[index], "ids": self.split.ids[index]}
        if self.split.labels is not None:
            found["labels"] = self.split.labels[index]
        if self.noisy is not None:
            found["x_n"] = self.noisy[index]
        return found


def fetch_decoded(rows: Rows, index: np.ndarray) -> dict[str, np.ndarray]:
    """`rows.fetch`, with "images" also where the rows hold JPEG files, decoded by Pillow."""
    found = rows.fetch(index)
    if "jpeg" in found:
        encoded = found.pop("jpeg")
        found["images"] = np.stack([_decoded(data, rows.shape) for data in encoded])
    return found


def _decoded(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            image = np.asarray(picture.convert("L" if shape[0] == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"a JPEG image of {len(data):,} bytes cannot be decoded ({error})") from error
    image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
    if image.shape != shape:
        raise InputError(f"a JPEG image decodes to {list(image.shape)}, expected {list(shape)}")
    return image


def as_tensors(fields: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in fields.items()}
