"""The order of training images: permutations that are pure functions of (seed, epoch).

`torch.randperm` may change between library versions and devices; here a permutation is the stable argsort of
64-bit words of the counter-based generator, with the epoch in the id's place, so that a resumed run, another number
of ranks or another device see the same images in the same order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastambient_kernels.noise import Stream, random_words


def permutation(n: int, *, seed: int, epoch: int = 0) -> Tensor:
    """A permutation of 0 .. n - 1, uniform over `seed` and `epoch`.

    Parameters
    ----------
    n : number of items, >= 0
    seed : 64 bits
    epoch : which permutation of this seed, 64 bits

    Returns
    -------
    int64 [n] on the CPU: the items in ascending order of their unsigned 64-bit words; item i has elements 2i (low)
    and 2i + 1 (high) of `Stream.ORDER`.
    """
    words = random_words(torch.tensor([epoch]), 2 * n, seed=seed, stream=Stream.ORDER).view(n, 2)
    keys = words[:, 0] | (words[:, 1] - 2**31) << 32  # less 2^63: signed comparison of unsigned words
    return torch.argsort(keys, stable=True)


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return permutation(n, seed=seed, epoch=epoch)


def dataset_indices(positions: Tensor, n: int, *, seed: int) -> Tensor:
    """Which image stands at each position of an endless sequence of shuffled epochs.

    Parameters
    ----------
    positions : int64 [N] >= 0, images seen so far + index in the global batch
    n : number of images in the set, >= 1
    seed : run seed, 64 bits

    Returns
    -------
    int64 [N] on the CPU, in 0 .. n - 1: every image once in each epoch of n positions.
    """
    if n < 1:
        raise ValueError(f"an order needs at least one image, got {n}")
    positions = positions.cpu()
    epochs, within = positions // n, positions % n
    indices = torch.empty_like(positions)
    for epoch in torch.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _epoch_order(n, seed, epoch)[within[here]]
    return indices
