"""Is a sample a copy of a training image? Exact nearest neighbours in pixel space, and the gap-ratio copy rate.

A sample counts as a copy when it lies much nearer to one training image than to every other:
d1/d2 < 1/3, with d1, d2 its distances to the nearest and second nearest training image (Yoon et al., 2023; used by
Shah et al., 2025, arXiv 2502.21278).

The search is exact: distances are square roots of integers (see nearest.py for how it is fast).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from fastambient.data.text import LazyNames
from fastambient.errors import InputError
from fastambient.evaluation.nearest import Search, squared_distances
from fastambient.pictures import as_pictures

FEW_HITS = 10  # below as many hits, or misses, an interval is the exact one
_SAMPLE_BLOCK, _IMAGE_BLOCK = 1024, 2048  # rows a matrix product: at most 200 MiB at 64x64 in colour


@dataclass(frozen=True)
class Neighbours:
    """The two nearest images of each sample, among distinct images.

    index: int64 [N, 2], positions in the searched array (of the first one where an image stands there repeatedly).
    distance: float64 [N, 2], L2 over pixels in [-1, 1], ascending.
    flipped: bool [N], the nearest is the mirrored image (only in a search over flips).
    passed: float64 [N], distance to the second nearest image where that is a near-duplicate of the nearest, which was
        passed over (see nearest_pictures.py), else NaN; None: nowhere.
    """

    index: np.ndarray
    distance: np.ndarray
    flipped: np.ndarray
    passed: np.ndarray | None = None

    @property
    def ratio(self) -> np.ndarray:
        """d1/d2, float64 [N] in [0, 1]; d2 > 0, because the images are distinct."""
        return self.distance[:, 0] / self.distance[:, 1]

    def copies(self, threshold: float = 1 / 3) -> np.ndarray:
        """bool [N]: the gap ratio lies below `threshold`."""
        return self.ratio < threshold


def distinct(images: np.ndarray, *, flips: bool = False) -> np.ndarray:
    """Positions int64 of the first of each group of equal images; with `flips`, a mirrored image is an equal one.

    A second, equal image would make d2 = d1 and so hide every copy of it.
    """
    first: dict[bytes, int] = {}
    for i, key in enumerate(fingerprints(images, flips=flips)):
        first.setdefault(key, i)
    return np.fromiter(first.values(), np.int64, len(first))


def fingerprints(images: np.ndarray, *, flips: bool = False) -> Iterator[bytes]:
    """A hash per image, equal for equal pixels (and for mirrored ones with `flips`)."""
    for image in images:
        pixels = image.tobytes()
        if flips:
            pixels = min(pixels, image[..., ::-1].tobytes())
        yield hashlib.sha256(pixels).digest()


class NamesOfCopies(LazyNames):
    """Names of images in which exact copies know of each other: "a.png (also b.png)". A search finds one of them, and
    whoever looks for the other has to find it, too.

    names : one an image, read when they are asked for
    images : uint8 [N, C, H, W]
    flips : mirror images are copies, too
    """

    def __init__(self, names: Sequence[str], images: np.ndarray, *, flips: bool = False) -> None:
        self._names = names
        groups: dict[bytes, list[int]] = {}
        for i, key in enumerate(fingerprints(images, flips=flips)):
            groups.setdefault(key, []).append(i)
        self._others = {i: [j for j in group if j != i] for group in groups.values() if len(group) > 1 for i in group}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        others = self._others.get(row)
        return f"{self._names[row]} (also {', '.join(self._names[j] for j in others)})" if others else self._names[row]


def nearest_two(
    samples: np.ndarray,
    images: np.ndarray,
    *,
    flips: bool = False,
    on_block: Callable[[int], None] | None = None,
    without: tuple[np.ndarray, np.ndarray] | None = None,
) -> Neighbours:
    """The exact nearest and second nearest distinct image of each sample.

    Parameters
    ----------
    samples, images: uint8 [N, C, H, W] and [M, C, H, W].
    flips: an image is as near as the nearer of itself and its mirror image (for models trained with x-flips).
    on_block: called after each block with the number of pairs (a sample, a distinct image) that it compared.
    without: pairs of a sample and an image, int64 [p] each, that are passed over; of equal images the first one counts.
        A sample that is left fewer than two images has infinite distances, and any index, in place of what is missing.

    Raises
    ------
    InputError
        Another dtype, different picture sizes, no sample, or fewer than two distinct images.
    """
    samples, images = as_pictures(samples, "samples"), as_pictures(images, "images")
    if samples.shape[1:] != images.shape[1:]:
        raise InputError(
            f"samples of {list(samples.shape[1:])} against images of {list(images.shape[1:])} (C, H, W),"
            " expected equal sizes; evaluate with the data the model was trained on"
        )
    positions = distinct(images, flips=flips)
    if len(samples) == 0 or len(positions) < 2:
        raise InputError(
            f"nearest neighbours of {len(samples)} samples among {len(positions)} distinct images,"
            " expected at least 1 sample and 2 images"
        )
    search = Search(images if len(positions) == len(images) else images[positions], len(samples), flips=flips)
    squared = np.empty((len(samples), 2))
    index = np.empty((len(samples), 2), np.int64)
    flipped = np.zeros(len(samples), bool)
    for start in range(0, len(samples), _SAMPLE_BLOCK):
        rows = slice(start, start + _SAMPLE_BLOCK)
        squared[rows], nearest = search.nearest_two(
            samples[rows], _IMAGE_BLOCK, on_block, _in(rows, without, positions)
        )
        index[rows] = positions[nearest]
        if flips:
            a, b = _flat(samples[rows]), _flat(images[index[rows, 0]])
            mirrored = _flat(samples[rows][..., ::-1])
            flipped[rows] = squared_distances(mirrored, b) < squared_distances(a, b)
    return Neighbours(index, np.sqrt(squared) / 127.5, flipped)


def _in(
    rows: slice, without: tuple[np.ndarray, np.ndarray] | None, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """The pairs of samples in `rows`, with the samples' places among these and the images' among `positions`."""
    if without is None:
        return None
    samples, images = without
    here = (samples >= rows.start) & (samples < rows.stop) & np.isin(images, positions)
    return samples[here] - rows.start, np.searchsorted(positions, images[here])


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def bootstrap_interval(hits: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of a rate over samples.

    Of n samples drawn with replacement, the number of hits is binomial(n, rate): the resampled rates are drawn from
    that distribution itself, without resampling indices. Resamples of few hits miss the rates above: 1 hit in 100 would
    end at 3.0 %, where even none allows 3.6 %, and cover the true rate in 85 % of cases only. So below `FEW_HITS` hits
    (or misses) the exact binomial interval (Clopper and Pearson, 1934) stands in, of no hit 0 to about 3.7/n. Then, of
    20 to 1,000 samples, the interval holds the true rate in at least 90 % of cases, whatever the rate.

    Parameters
    ----------
    hits: bool [N], N >= 1.
    """
    count = int(np.count_nonzero(hits))
    if min(count, len(hits) - count) < FEW_HITS:
        exact = binomtest(count, len(hits)).proportion_ci(0.95, method="exact")
        return float(exact.low), float(exact.high)
    generator = np.random.default_rng(seed)
    rates = generator.binomial(len(hits), hits.mean(), size=resamples) / len(hits)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def excess_interval(
    hits: np.ndarray, control: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the share of hits less that of the control, over the same samples.

    Both are resampled together, sample by sample, so only those that are a hit on one side alone matter; their two
    numbers are multinomial. Where there are fewer than `FEW_HITS` of them, or of the others, the ends are those of both
    numbers' exact binomial intervals at 97.5 %, which together hold in at least 95 % of cases.

    Parameters
    ----------
    hits, control: bool [N], N >= 1: is each sample a hit among the training images, and among the control's?
    """
    n, up, down = len(hits), int((hits & ~control).sum()), int((control & ~hits).sum())
    if min(up + down, n - up - down) < FEW_HITS:
        a, b = (binomtest(count, n).proportion_ci(0.975, method="exact") for count in (up, down))
        return float(a.low - b.high), float(a.high - b.low)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(n, [up / n, down / n, (n - up - down) / n], size=resamples)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    return float(low), float(high)


def copies_per_image(neighbours: Neighbours, threshold: float = 1 / 3) -> dict[int, int]:
    """How often each image is the nearest neighbour of a copy: {position: copies}, most copied first, without zeros."""
    position, count = np.unique(neighbours.index[neighbours.copies(threshold), 0], return_counts=True)
    order = np.argsort(-count, kind="stable")
    return {int(position[i]): int(count[i]) for i in order}
