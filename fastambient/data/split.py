"""Which pictures train and which are held out: a function of the pictures, the counts and the split seed."""

from __future__ import annotations

import numpy as np

from fastambient.data.items import Source
from fastambient.data.order import permutation
from fastambient.errors import InputError, data_option

MIN_SIDE = 2  # different images on either side that an evaluation needs: a nearest and a second nearest
_MAX_HOLDOUT = 10_000


def split(
    pictures: np.ndarray, source: Source, train: int | None, holdout: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of both sides, ascending. Copies of one picture never straddle."""
    n = len(pictures)
    asked = {"train": train, "holdout": holdout}
    if holdout is None:
        least = MIN_SIDE if n >= 2 * MIN_SIDE else 0
        holdout = min(max(n // 10, least), _MAX_HOLDOUT, n - min(train or 1, n))
        if source.default_train is not None:
            holdout = n - min(train or source.default_train, n)
    if train is None:
        train = n - holdout if source.default_train is None else min(source.default_train, n - holdout)
    if train < 1 or train + holdout > n:
        given = " and ".join(data_option(name, value) for name, value in asked.items() if value is not None)
        raise InputError(
            f"{source.name} has {n:,} images, too few for {given}: at least one image must train, and none does both"
        )
    _, group, sizes = np.unique(pictures, return_inverse=True, return_counts=True)
    side = np.zeros(len(sizes), np.int8)  # 0: unused
    takes_rest = train + holdout == n
    free = permutation(len(sizes), seed=seed).numpy()
    for number, name, wanted in ((1, "train", train), (2, "holdout", holdout)):
        taken = free if number == 2 and takes_rest else _first_fit(free, sizes, wanted)
        side[taken] = number
        free = free[side[free] == 0]
        count = int(sizes[taken].sum())
        if asked[name] not in (None, count) or (name == "train" and not count):
            raise InputError(
                f"{name} {wanted} would put copies or mirror images of one picture on both sides: {source.name} holds "
                f"{n:,} images of {len(sizes):,} distinct pictures; pass {data_option(name, count or n)} instead"
            )
    sides = side[group]
    return np.flatnonzero(sides == 1), np.flatnonzero(sides == 2)


def _first_fit(groups: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """The first of `groups` that fill `wanted` images; one too large for what is left is passed over."""
    ends = np.cumsum(sizes[groups])
    whole = int(np.searchsorted(ends, wanted, side="right"))
    left = wanted - (int(ends[whole - 1]) if whole else 0)
    more: list[int] = []
    for group in groups[whole:]:
        if left == 0:
            break
        if sizes[group] <= left:
            more.append(int(group))
            left -= int(sizes[group])
    return np.concatenate([groups[:whole], np.array(more, np.int64)])
