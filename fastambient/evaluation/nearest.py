"""The two nearest images of each sample, exactly, at a small part of a brute-force search's cost.

Mathematics
-----------
Let P hold k orthonormal directions (rows), m be any point, and z = (P (x - m), r) with r = |x - m - P'P (x - m)|, what
the directions leave of x. By the triangle inequality on the remainders, |z - z'| <= |x - x'|: distances of the short
vectors are lower bounds. With the principal directions of some images as P they are so tight for pictures that only
about a hundred of 50,000 images have to be compared pixel by pixel: those whose bound lies below the second nearest.

Exactness
---------
Bounds are float32 matrix products, made smaller by more than what rounding can add. With u = 2^-24 and n numbers a
vector, a product a.b in float32 is off by at most (n + 6) u (|a|^2 + |b|^2) / 2, in any order of summation, so that

    |a|^2 (1 - e) + |b|^2 (1 - e) - 2 a.b   with e = 4 (n + 8) u

never exceeds |a - b|^2; the projections themselves are made in float64. The pixels of the remaining pairs are compared
in integers: a partial sum of 256 squares is at most 256 * 255^2 < 2^24, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

DIRECTIONS = 192  # k; 32x32 in colour: 6 % of the products, and 1 pair in 500 is left (CIFAR-10)
_WORTH = 10**10  # products of pixels; below it the directions cost more than they save
_MOST_LEFT = 0.04  # a larger share of pairs is cheaper sorted out by bounds from all pixels than one by one
_FEW_LEFT = 4  # pairs a sample: more are compared in two rounds, the most promising first
_FIT_IMAGES = 512
_PIECE = 1024  # images projected, or pairs compared, at once
_EXACT_COLUMNS = 256


class _Pixels:
    """Bounds from all pixels: an image is its own vector, so the bound is the distance but for rounding."""

    def __init__(self, images: np.ndarray) -> None:
        self._images, self._shift = images, np.rint(images[:_FIT_IMAGES].mean(0)).astype(np.float32)
        self.numbers = images.shape[1]

    def vectors(self, images: np.ndarray) -> np.ndarray:
        return images.astype(np.float32) - self._shift

    def block(self, rows: slice) -> np.ndarray:
        return self.vectors(self._images[rows])


class _Directions:
    """Bounds from a few principal directions; the images' vectors are made once."""

    def __init__(self, images: np.ndarray) -> None:
        chosen = np.linspace(0, len(images) - 1, min(len(images), _FIT_IMAGES)).astype(np.int64)
        some = torch.from_numpy(images[chosen]).double()
        self._mean = some.mean(0).numpy()
        some -= some.mean(0)
        # Directions of the images from the eigenvectors of their products: [512, 512] instead of [D, D].
        _, across = torch.linalg.eigh(some @ some.T)
        self._basis = torch.linalg.qr(some.T @ across[:, -DIRECTIONS:])[0]  # float64 [D, k], orthonormal to 1e-14
        self.numbers = DIRECTIONS + 1
        self._vectors = self.vectors(images)

    def vectors(self, images: np.ndarray) -> np.ndarray:
        vectors = np.empty((len(images), self.numbers), np.float32)
        for start in range(0, len(images), _PIECE):
            rows = slice(start, start + _PIECE)
            x = images[rows] - self._mean
            z = (torch.from_numpy(x) @ self._basis).numpy()
            left = np.einsum("ij,ij->i", x, x) - np.einsum("ij,ij->i", z, z)
            vectors[rows, :-1], vectors[rows, -1] = z, np.sqrt(np.maximum(left, 0.0))
        return vectors

    def block(self, rows: slice) -> np.ndarray:
        return self._vectors[rows]


class Search:
    """Searches the same images for block after block of samples.

    Parameters
    ----------
    images: uint8 [M, C, H, W], M >= 2, distinct.
    samples: how many there will be, which decides what preparation is worth its time.
    flips: an image is as near as the nearer of itself and its mirror image.
    """

    def __init__(self, images: np.ndarray, samples: int, *, flips: bool = False) -> None:
        self._images = images.reshape(len(images), -1)
        self._flips = flips
        pixels = self._images.shape[1]
        self._levels: list[_Pixels | _Directions] = [_Pixels(self._images)]
        work = samples * len(images) * pixels
        if pixels >= 4 * DIRECTIONS and len(images) >= _FIT_IMAGES and work >= _WORTH:
            self._levels.insert(0, _Directions(self._images))

    def nearest_two(
        self,
        samples: np.ndarray,
        block: int,
        on_block: Callable[[int], None] | None = None,
        without: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances float64 [n, 2] in grey levels, ascending, and places int64 [n, 2] among the images; of
        images at the same distance the earlier one.

        Parameters
        ----------
        samples: uint8 [n, C, H, W].
        block: images at once; on_block is called after each with the number of pairs.
        without: pairs (of samples int64 [p], of places int64 [p]) that are passed over. Where fewer than two images are
            left to a sample, what is missing has place -1 and distance infinity.
        """
        sides = [samples, samples[..., ::-1]] if self._flips else [samples]  # |s - mirrored t| = |mirrored s - t|
        found = _Best([side.reshape(len(samples), -1) for side in sides], self._images)
        levels = [_Level(level, found) for level in self._levels]
        for start in range(0, len(self._images), block):
            rows = slice(start, min(start + block, len(self._images)))
            left: np.ndarray | None = None
            if without is not None:
                left = np.ones((len(samples), rows.stop - rows.start), bool)
                here = (without[1] >= rows.start) & (without[1] < rows.stop)
                left[without[0][here], without[1][here] - rows.start] = False
            for level in levels:
                left = level.left(rows, left)
                if np.count_nonzero(left) <= _MOST_LEFT * left.size:
                    break
            assert left is not None
            i, j = np.nonzero(left)
            found.compare(i, j + start)
            if on_block is not None:
                on_block(left.size)
        return found.squared, found.place


class _Level:
    """One kind of bound for one block of samples."""

    def __init__(self, kind: _Pixels | _Directions, found: _Best) -> None:
        self._kind, self._found = kind, found
        self._shrink = 1.0 - 4.0 * (kind.numbers + 8) * 2.0**-24
        self._samples = []  # per side: vectors with a 1 behind them, float32 [n, numbers + 1]
        for side in found.sides:
            vectors = kind.vectors(side)
            self._samples.append(torch.from_numpy(np.pad(vectors, ((0, 0), (0, 1)), constant_values=1.0)))
        # A mirror image's vector has another length; the shorter one gives a bound for both.
        self._norms = self._shrink * np.min([_squares(s.numpy()[:, :-1]) for s in self._samples], axis=0)

    def left(self, rows: slice, among: np.ndarray | None) -> np.ndarray:
        """bool [n, w]: pairs of the samples and images `rows` (of those `among` them) that may be one of a sample's two
        nearest and are not compared yet. Where many may be, the most promising two a sample are compared first."""
        vectors = self._kind.block(rows)
        images = np.empty((len(vectors), self._kind.numbers + 1), np.float32)
        images[:, :-1] = vectors
        images[:, -1] = -0.5 * self._shrink * _squares(vectors)
        # a.b - |b|^2 / 2: the larger, the nearer
        score = (self._samples[0] @ torch.from_numpy(images).T).numpy()
        for side in self._samples[1:]:
            np.maximum(score, (side @ torch.from_numpy(images).T).numpy(), out=score)
        if among is not None:
            score[~among] = -np.inf
        left = score >= self._bar()[:, None]
        if np.count_nonzero(left) > _FEW_LEFT * len(left):
            row = np.arange(len(score))
            for _ in range(min(2, score.shape[1])):
                best = score.argmax(1)
                near = np.flatnonzero(score[row, best] >= self._bar())
                self._found.compare(near, best[near] + rows.start)
                score[near, best[near]] = -np.inf
            np.greater_equal(score, self._bar()[:, None], out=left)
        return left

    def _bar(self) -> np.ndarray:
        """float32 [n], finite: below it an image is farther than a sample's second nearest so far."""
        bar = (0.5 * (self._norms - self._found.squared[:, 1])).astype(np.float32)
        return np.maximum(np.nextafter(bar, np.float32(-np.inf)), np.finfo(np.float32).min)


class _Best:
    """The two nearest of each sample among the pairs compared so far."""

    def __init__(self, sides: list[np.ndarray], images: np.ndarray) -> None:
        self.sides = [np.ascontiguousarray(side) for side in sides]
        self._images = images
        self.squared = np.full((len(self.sides[0]), 2), np.inf)
        self.place = np.full((len(self.sides[0]), 2), -1, np.int64)

    def compare(self, i: np.ndarray, j: np.ndarray) -> None:
        """Compare samples i with images j, int64 [p] each; no pair may come twice."""
        if len(i) == 0:
            return
        squared = np.empty(len(i))
        for start in range(0, len(i), _PIECE):
            piece = slice(start, start + _PIECE)
            images = self._images[j[piece]]
            squared[piece] = np.min([squared_distances(side[i[piece]], images) for side in self.sides], axis=0)
        rows = np.unique(i)
        i = np.concatenate([rows.repeat(2), i])
        squared = np.concatenate([self.squared[rows].ravel(), squared])
        place = np.concatenate([self.place[rows].ravel(), j])
        order = np.lexsort((place, squared, i))
        first = np.flatnonzero(np.diff(i[order], prepend=-1))
        for k in range(2):
            self.squared[rows, k], self.place[rows, k] = squared[order[first + k]], place[order[first + k]]


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 [p]: exact squared distances of paired rows uint8 [p, D], in grey levels."""
    difference = np.subtract(a, b, dtype=np.int16).astype(np.float32)
    total = np.zeros(len(a))
    for c in range(0, a.shape[1], _EXACT_COLUMNS):
        part = difference[:, c : c + _EXACT_COLUMNS]
        total += np.einsum("ij,ij->i", part, part)
    return total


def _squares(vectors: np.ndarray) -> np.ndarray:
    """float64 [n]: squared lengths of float32 [n, k]."""
    return np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
