"""Copies that the gap ratio does not see, because the training set holds the picture twice.

A sample that copies an image with a near-duplicate (the same picture encoded, scaled or lit a little differently) lies
about as near to both, so that d1/d2 is near 1. Here such images count as one picture: d2 is the distance to the nearest
one that is none of its near-duplicates (data/near_duplicates.py says what these are). The rate by the measure's own
definition is left as it is; what this adds is told beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastambient.data.near_duplicates import MIN_RESOLUTION, near_duplicate_groups, perceptual_hash
from fastambient.evaluation.memorization import Neighbours, distinct, nearest_two

_ALIKE = 0.9  # correlation of two images' grey pixels, below which they are taken for different without a hash
_ROUNDS = 8  # near-duplicates of one picture that are passed over


@dataclass(frozen=True)
class Searched:
    """A search of the samples' neighbours.

    images : uint8 [M, C, H, W]
    neighbours : of `nearest_two`, positions among `images`
    among : positions int64 that were searched; None for all
    """

    images: np.ndarray
    neighbours: Neighbours
    among: np.ndarray | None = None


def near_duplicates(
    samples: np.ndarray,
    train: Searched,
    control: Searched | None = None,
    *,
    threshold: float = 1 / 3,
    flips: bool = False,
) -> dict[str, Any] | None:
    """memorization.near_duplicates of metrics.json: the copies that are hidden, and the copy rates with near-duplicates
    as one picture; None where none is hidden."""
    hidden = hidden_copies(samples, train, threshold=threshold, flips=flips)
    if not hidden.any():
        return None
    told: dict[str, Any] = {
        "hidden_copies": int(hidden.sum()),
        "rate": float((train.neighbours.copies(threshold) | hidden).mean()),
        "holdout_rate": None,
    }
    if control is not None:
        there = hidden_copies(samples, control, threshold=threshold, flips=flips)
        told["holdout_rate"] = float((control.neighbours.copies(threshold) | there).mean())
    return told


def hidden_note(found: dict[str, Any] | None) -> str:
    """A line about what `near_duplicates` found, "" where that is nothing."""
    if found is None:
        return ""
    control = "" if found["holdout_rate"] is None else f" (held-out control {100 * found['holdout_rate']:.1f} %)"
    return (
        f"{found['hidden_copies']:,} more samples copy a training image that has a near-duplicate in the set. They lie"
        " as near to the one as to the other, and so do not count as copies: with near-duplicates as one picture"
        f" {100 * found['rate']:.1f} % of the samples are copies{control}. prepare --dedup drop keeps one of each."
    )


def hidden_copies(
    samples: np.ndarray, searched: Searched, *, threshold: float = 1 / 3, flips: bool = False
) -> np.ndarray:
    """bool [N]: samples uint8 [N, C, H, W] that are no copies, and are if near-duplicates count as one picture.

    Looked at again are those whose two nearest images are near-duplicates of each other. Of pictures below 32 pixels,
    which are too small for the hash, there is none.
    """
    images, neighbours = searched.images, searched.neighbours
    copies = np.zeros(len(samples), bool)
    if min(images.shape[2:]) < MIN_RESOLUTION:
        return copies
    pictures = _Pictures(images)
    open_ = np.flatnonzero(~neighbours.copies(threshold))
    rows = open_[pictures.same(neighbours.index[open_, 0], neighbours.index[open_, 1])]
    own, members = neighbours.index[rows, 0], neighbours.index[rows]
    positions = np.arange(len(images)) if searched.among is None else searched.among
    left = np.zeros(len(images), bool)
    left[positions[distinct(images[positions], flips=flips)]] = len(rows) > 0
    for _ in range(_ROUNDS):
        # One of each group stays, so that what is left out for one sample is not missing for another.
        seen = np.unique(members)
        left[seen[pictures.first(seen) != seen]] = False
        kept = np.flatnonzero(left)
        if len(rows) == 0 or len(kept) < 2:
            break
        found = nearest_two(samples[rows], images[kept], flips=flips)
        place, distance = kept[found.index], found.distance
        twin = np.stack([pictures.same(own, place[:, k]) | (own == place[:, k]) for k in (0, 1)], 1)
        side = twin[:, 0].astype(np.int64)  # the nearer one that is another picture
        settled = ~twin[np.arange(len(rows)), side]
        d2 = distance[np.arange(len(rows)), side]
        copies[rows[settled]] = neighbours.distance[rows[settled], 0] < threshold * d2[settled]
        rows, own, members = rows[~settled], own[~settled], place[~settled]
    return copies


class _Pictures:
    """Which of some images are near-duplicates, asked pair by pair; each is hashed once."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = images
        self._hash: dict[int, int] = {}
        self._group: dict[int, int] = {}  # position: the first one of its group among those that were asked for

    def same(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool [n] of positions int64 [n] and [n]."""
        likely = np.flatnonzero((a != b) & (self._correlation(a, b) >= _ALIKE))
        out = np.zeros(len(a), bool)
        if len(likely):
            self._join(np.unique(np.concatenate([a[likely], b[likely]])))
            out[likely] = [self._group[i] == self._group[j] for i, j in zip(a[likely], b[likely], strict=True)]
        return out

    def first(self, a: np.ndarray) -> np.ndarray:
        """The first of each one's group, int64 [n]."""
        return np.array([self._group[int(i)] for i in a], np.int64)

    def _join(self, more: np.ndarray) -> None:
        for i in more.tolist():
            if i not in self._hash:
                self._hash[i] = perceptual_hash(self._images[i])
        known = np.array(sorted(self._hash), np.int64)
        hashes = np.array([self._hash[i] for i in known.tolist()], np.uint64)
        groups = known[near_duplicate_groups(hashes, self._images[known])]
        self._group = dict(zip(known.tolist(), groups.tolist(), strict=True))

    def _correlation(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = np.zeros(len(a))
        for start in range(0, len(a), 1024):
            part = slice(start, start + 1024)
            x, y = (self._images[side[part]].mean(1, dtype=np.float32) for side in (a, b))
            x, y = (grey.reshape(len(grey), -1) - grey.mean((1, 2))[:, None] for grey in (x, y))
            size = np.sqrt(np.square(x).mean(1) * np.square(y).mean(1))
            out[part] = np.where(size < 1.0, 1.0, (x * y).mean(1) / np.maximum(size, 1e-6))  # flat ones: hashed
        return out
