"""How alike is each sample to its most alike training image, in an embedding? Maximum cosine, exactly.

The shares of samples above 0.9 and 0.95, as in Shah et al. (2025, arXiv 2502.21278) with DINOv2's features. How high
they are without any copying depends on the embedder, the pictures and how many are searched: read them beside
the same shares among equally many held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastambient.errors import InputError

LEVELS = (0.9, 0.95)  # cosines above which a sample counts
FAISS_FROM = 1_000_000  # images; from here on faiss searches, where it is installed
_SAMPLE_BLOCK, _IMAGE_BLOCK = 1024, 8192  # vectors a matrix product: 32 MiB of cosines


@dataclass(frozen=True)
class Similar:
    """The most similar image of each sample.

    index: int64 [N], of equally similar ones the first; cosine: float32 [N] in [-1, 1]; mirrored: bool [N], its mirror
    image is the more similar one (False without mirror images).
    """

    index: np.ndarray
    cosine: np.ndarray
    mirrored: np.ndarray


def most_similar(
    samples: np.ndarray,
    images: np.ndarray,
    mirrored: np.ndarray | None = None,
    *,
    on_block: Callable[[int], None] | None = None,
) -> Similar:
    """Search all images for each sample, by float32 matrix products in blocks.

    Parameters
    ----------
    samples, images: float32 features [N, D] and [M, D] of one embedder, N and M >= 1; a vector of zeros has cosine 0.
    mirrored: features [M, D] of the images' mirror images, where flips count.
    on_block: called after each block with its number of (sample, image) pairs; there are N * M, twice with `mirrored`.

    Raises
    ------
    InputError
        Other shapes, an empty set, or features that hold NaN or infinity.
    """
    sets = {"samples": np.asarray(samples), "images": np.asarray(images)}
    if mirrored is not None:
        sets["mirror images"] = np.asarray(mirrored)
    shapes = ", ".join(f"{list(x.shape)} of the {name}" for name, x in sets.items())
    if any(x.ndim != 2 or len(x) == 0 for x in sets.values()) or len({x.shape[1:] for x in sets.values()}) != 1:
        raise InputError(f"cosines of features {shapes}, expected [N, D] and [M, D]; embed all sets with one embedder")
    if mirrored is not None and len(mirrored) != len(images):
        raise InputError(f"cosines of features {shapes}, expected a mirror image of each image")
    if not all(np.isfinite(x).all() for x in sets.values()):
        raise InputError("cosines of features that hold NaN or infinity, expected finite numbers")

    index, cosine = _search(sets["samples"], sets["images"], on_block)
    flipped = np.zeros(len(index), bool)
    if mirrored is not None:
        other, higher = _search(sets["samples"], sets["mirror images"], on_block)
        flipped = higher > cosine
        index, cosine = np.where(flipped, other, index), np.where(flipped, higher, cosine)
    return Similar(index, np.clip(cosine, -1.0, 1.0), flipped)


def _search(
    samples: np.ndarray, images: np.ndarray, on_block: Callable[[int], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(index int64 [N], cosine float32 [N])."""
    faiss = _faiss() if len(images) >= FAISS_FROM else None
    if faiss is not None:
        found = faiss.IndexFlatIP(images.shape[1])  # exact, too: it multiplies all pairs
        for start in range(0, len(images), _IMAGE_BLOCK):
            found.add(_unit(images[start : start + _IMAGE_BLOCK]))
    index, cosine = np.zeros(len(samples), np.int64), np.full(len(samples), -np.inf, np.float32)
    for first in range(0, len(samples), _SAMPLE_BLOCK):
        rows = slice(first, first + _SAMPLE_BLOCK)
        a = _unit(samples[rows])
        if faiss is not None:
            values, places = found.search(a, 1)
            cosine[rows], index[rows] = values[:, 0], places[:, 0]
            if on_block is not None:
                on_block(len(a) * len(images))
            continue
        row = np.arange(len(a))
        for start in range(0, len(images), _IMAGE_BLOCK):
            b = _unit(images[start : start + _IMAGE_BLOCK])
            products = (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()
            place = products.argmax(1)
            value = products[row, place]
            nearer = np.flatnonzero(value > cosine[rows])
            cosine[first + nearer], index[first + nearer] = value[nearer], start + place[nearer]
            if on_block is not None:
                on_block(products.size)
    return index, cosine


def _unit(x: np.ndarray) -> np.ndarray:
    """float32 rows of length 1; of zeros, zeros."""
    x = np.ascontiguousarray(x, np.float32)
    length = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return (x / np.where(length > 0, length, 1.0)).astype(np.float32)


def _faiss() -> Any:
    """The optional faiss, or None."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
