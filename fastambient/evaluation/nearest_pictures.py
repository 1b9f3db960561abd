"""Nearest neighbours in a set that holds pictures twice, nearly: near-duplicates count as one picture.

A sample that copies an image with a near-duplicate (the same picture encoded, scaled or lit a little differently) lies
about as near to both, so that d1/d2 is near 1 and the copy is hidden; and what stands in a set twice is copied first.
So d2 is the distance to the nearest image that is no near-duplicate of the nearest one (data/near_duplicates.py says
what these are), as exact duplicates count once. What this cannot tell from a copy is a new picture that is itself a
near-duplicate of training images, such as one more shot of a scene; so the rate without it stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fastambient.data.near_duplicates import MIN_RESOLUTION, are_near_duplicates, near_duplicates_of
from fastambient.evaluation.memorization import Neighbours, nearest_two


def nearest_pictures(
    samples: np.ndarray,
    images: np.ndarray,
    *,
    flips: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Neighbours:
    """`nearest_two`, with the second one the nearest that is no near-duplicate of the first.

    Searched again are samples whose two nearest images are near-duplicates of each other. Of pictures below 32 pixels,
    which are too small for the hash, there is none. Parameters and errors as there.
    """
    neighbours = nearest_two(samples, images, flips=flips, on_block=on_block)
    if min(images.shape[2:]) < MIN_RESOLUTION:
        return neighbours
    pairs, asked = np.unique(neighbours.index, axis=0, return_inverse=True)  # many samples may copy one image
    rows = np.flatnonzero(are_near_duplicates(images[pairs[:, 0]], images[pairs[:, 1]])[asked.ravel()])
    if len(rows) == 0:
        return neighbours
    own, which = np.unique(neighbours.index[rows, 0], return_inverse=True)
    place, twin = near_duplicates_of(own, images)
    place, twin = (side[twin != own[place]] for side in (place, twin))  # the nearest itself stays
    of_own = [twin[place == k] for k in range(len(own))]
    counts = np.array([len(twins) for twins in of_own], np.int64)[which]
    without = np.arange(len(rows)).repeat(counts), np.concatenate([of_own[k] for k in which])
    found = nearest_two(samples[rows], images, flips=flips, without=without)
    other = np.isfinite(found.distance[:, 1])  # False: there is nothing but near-duplicates
    rows = rows[other]
    index, distance, passed = neighbours.index.copy(), neighbours.distance.copy(), np.full(len(samples), np.nan)
    passed[rows] = distance[rows, 1]
    index[rows, 1], distance[rows, 1] = found.index[other, 1], found.distance[other, 1]
    return replace(neighbours, index=index, distance=distance, passed=passed)


def near_duplicates(neighbours: Neighbours, threshold: float = 1 / 3) -> dict[str, Any] | None:
    """memorization.near_duplicates of metrics.json: copies that are none if near-duplicates count as different
    pictures, and the copy rate then; None where there is none."""
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
        f"{found['copies']:,} of the copies are near to training images that have a near-duplicate in the set; these"
        " count as one picture. If they counted as different ones, nothing that is near to two of them would be a"
        f" copy, and the copy rate would be {100 * found['rate_without']:.1f} %. Where a set holds many shots of one"
        " subject, a new shot of it may count as a copy, too, and the control, of other subjects, does not show it:"
        " look at the pairs. prepare --dedup drop keeps one of each."
    )
