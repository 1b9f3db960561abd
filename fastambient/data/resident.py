"""The resident loader: the whole training set in device memory, gathered on the device.

A batch is a function of (run seed, positions) and the set alone: micro-batches, ranks and resumed runs that ask for
the same positions get the same images, flips and order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastambient.data.order import dataset_indices
from fastambient.data.shards import ShardedArray
from fastambient.data.store import Split
from fastambient.errors import FastambientError, InputError
from fastambient_kernels import seed_tensor
from fastambient_kernels.noise import Stream, uniform

_CHUNK_BYTES = 64 << 20  # copied to the device in pieces: the host never holds the whole set


@dataclass(frozen=True)
class Batch:
    """Training samples, all tensors on the loader's device. Images and x_n are unflipped: the noise operator flips
    the finished picture, so that the fixed noise moves with it."""

    images: Tensor  # uint8 [N, C, H, W]
    ids: Tensor  # int64 [N], image ids of the noise contract
    flips: Tensor  # bool [N], true mirrors the width
    labels: Tensor | None  # int64 [N], class labels
    positions: Tensor  # int64 [N], images seen so far + index in the global batch
    x_n: Tensor | None  # float16 or float32 [N, C, H, W], the precomputed noised images


class ResidentLoader:
    """Holds a split on a device.

    Parameters
    ----------
    split : the training side of a store
    seed : run seed, 64 bits: order and flips
    device : where the set lives, and where batches are made
    xflip : whether half of the samples are mirrored
    use_noisy : whether the precomputed noised images are loaded, too

    Raises
    ------
    InputError : `use_noisy`, and the store holds no noised images
    FastambientError : the device's memory does not suffice
    """

    def __init__(self, split: Split, *, seed: int, device: torch.device | str, xflip: bool, use_noisy: bool) -> None:
        if use_noisy and split.noisy is None:
            raise InputError(
                "the store holds no noised images; prepare it with --sigma-tn S --noisy float16 or float32"
            )
        self.seed, self.device, self.xflip = seed, torch.device(device), xflip
        self._seed = seed_tensor(seed, self.device)
        try:
            self.images = _to_device(split.images, self.device)
            self.noisy = _to_device(split.noisy, self.device) if use_noisy and split.noisy is not None else None
            self.ids = torch.from_numpy(split.ids).to(self.device)
            self.labels = None if split.labels is None else torch.from_numpy(split.labels).to(self.device)
        except torch.OutOfMemoryError as error:
            size = split.images.nbytes + (split.noisy.nbytes if use_noisy and split.noisy is not None else 0)
            raise FastambientError(
                f"the training set of {size / 2**30:.1f} GiB does not fit on {self.device}"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        held = (self.images, self.noisy, self.ids, self.labels)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def index(self, positions: Tensor) -> Tensor:
        """Which image of the set stands at each of `positions` (int64 [N]): int64 [N] on the CPU, the host's work."""
        return dataset_indices(positions, len(self.images), seed=self.seed)

    def batch(self, positions: Tensor, index: Tensor | None = None) -> Batch:
        """The samples at `positions` (int64 [N]) of the endless shuffled sequence.

        index : what `index` gave for them, on the loader's device: then all of the work is the device's; None asks here
        """
        if index is None:
            index = self.index(positions).to(self.device, non_blocking=True)
        positions = positions.to(self.device, non_blocking=True)
        if self.xflip:
            flips = uniform(positions, 1, seed=self._seed, stream=Stream.AUGMENT)[:, 0] < 0.5
        else:
            flips = torch.zeros_like(positions, dtype=torch.bool)
        return Batch(
            images=self.images.index_select(0, index),
            ids=self.ids.index_select(0, index),
            flips=flips,
            labels=None if self.labels is None else self.labels.index_select(0, index),
            positions=positions,
            x_n=None if self.noisy is None else self.noisy.index_select(0, index),
        )


def _to_device(array: ShardedArray, device: torch.device) -> Tensor:
    first = torch.from_numpy(array[:1])
    tensor = torch.empty(array.shape, dtype=first.dtype, device=device)
    rows = max(1, _CHUNK_BYTES // first.nbytes)
    for start in range(0, len(array), rows):
        tensor[start : start + rows].copy_(torch.from_numpy(array[start : start + rows]))
    return tensor
