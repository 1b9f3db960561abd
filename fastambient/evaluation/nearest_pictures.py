"""Nearest neighbours in a set that holds pictures twice, nearly: near-duplicates count as one picture.

A sample that copies an image with a near-duplicate (the same picture encoded, scaled or lit a little differently) lies
about as near to both, so that d1/d2 is near 1 and the copy is hidden; and what stands in a set twice is copied first.
So d2 is the distance to the nearest image that is no near-duplicate of the nearest one (data/near_duplicates.py says
what these are), as exact duplicates count once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fastambient.data.near_duplicates import MIN_RESOLUTION, near_duplicate_groups, perceptual_hash
from fastambient.evaluation.memorization import Neighbours, distinct, nearest_two

_ALIKE = 0.9  # correlation of two images' grey pixels, below which they are taken for different without a hash
_ROUNDS = 8  # near-duplicates of one picture that are passed over


def nearest_pictures(
    samples: np.ndarray,
    images: np.ndarray,
    *,
    flips: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Neighbours:
    """`nearest_two`, with the second one the nearest that is another picture than the first (or its near-duplicate).

    Looked at again are samples whose two nearest images are near-duplicates of each other. Of pictures below 32 pixels,
    which are too small for the hash, there is none. Parameters and errors as there.
    """
    neighbours = nearest_two(samples, images, flips=flips, on_block=on_block)
    if min(images.shape[2:]) < MIN_RESOLUTION:
        return neighbours
    pictures = _Pictures(images)
    rows = np.flatnonzero(pictures.same(*neighbours.index.T))
    if len(rows) == 0:
        return neighbours
    index, distance, passed = neighbours.index.copy(), neighbours.distance.copy(), np.full(len(samples), np.nan)
    passed[rows] = distance[rows, 1]
    own, members = index[rows, 0], index[rows]
    left = np.zeros(len(images), bool)
    left[distinct(images, flips=flips)] = True
    for _ in range(_ROUNDS):
        # One of each group stays, so that what is left out for one sample is not missing for another.
        seen = np.unique(members)
        left[seen[pictures.first(seen) != seen]] = False
        kept = np.flatnonzero(left)
        if len(rows) == 0 or len(kept) < 2:
            break
        found = nearest_two(samples[rows], images[kept], flips=flips)
        place = kept[found.index]
        twin = np.stack([pictures.same(own, place[:, k]) | (own == place[:, k]) for k in (0, 1)], 1)
        side = twin[:, 0].astype(np.int64)  # the nearer one that is another picture
        each = np.arange(len(rows))
        settled = ~twin[each, side]
        index[rows[settled], 1] = place[each, side][settled]
        distance[rows[settled], 1] = found.distance[each, side][settled]
        rows, own, members = rows[~settled], own[~settled], place[~settled]
    passed[rows] = np.nan  # nothing but near-duplicates was found
    return replace(neighbours, index=index, distance=distance, passed=passed)


def near_duplicates(neighbours: Neighbours, threshold: float = 1 / 3) -> dict[str, Any] | None:
    """memorization.near_duplicates of metrics.json: copies that would be hidden if near-duplicates were pictures of
    their own, and the copy rate then; None where there is none."""
    if neighbours.passed is None:
        return None
    copies, hidden = neighbours.copies(threshold), neighbours.distance[:, 0] >= threshold * neighbours.passed
    if not (copies & hidden).any():
        return None
    return {"copies": int((copies & hidden).sum()), "rate_without": float((copies & ~hidden).mean())}


def near_duplicates_note(found: dict[str, Any] | None) -> str:
    """A line about what `near_duplicates` found, "" where that is nothing."""
    if found is None:
        return ""
    return (
        f"{found['copies']:,} of the copies are of training images that have a near-duplicate in the set; these count"
        " as one picture. As pictures of their own they would hide these copies: the copy rate would be"
        f" {100 * found['rate_without']:.1f} %. What stands in a set twice is copied first: prepare --dedup drop keeps"
        " one of each."
    )


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
