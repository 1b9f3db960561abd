"""Frechet distance between two sets of vectors (pixels or features), exact at any shape.

Mathematics
-----------
Between the normal distributions with the means and covariances of the sets (Dowson and Landau, 1982; the FID of
Heusel et al., 2017, on Inception features):

    FD = |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)

With the centred sets scaled by 1/sqrt(n - 1), A [N, D] and B [M, D], the covariances are S_x = A'A and S_y = B'B, and
the non-zero eigenvalues of A'A B'B are those of (AB')(AB')'. So the trace of the root is the sum of the singular
values of the cross matrix AB' [N, M], its nuclear norm: no D x D root (12,288 square for 64x64 colour pictures), and no
squaring, which would cost half of the digits of the small eigenvalues.

Only A'A enters, so where both sets have more rows than columns each is first replaced by the triangle of its QR
factorization (R'R = A'A), and the cross matrix is [D, D]. Otherwise one side of [N, M] is at most D already, and the
direct product is the cheaper one, and never larger than the bigger set.

Where the sets are too many to be held, `Moments` takes them in blocks and keeps a mean and a D x D matrix, and
`frechet_of_moments` roots the covariances themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from fastambient.errors import InputError

FEW = 1000  # pictures; below it a distance is always called biased
_BLOCK = 1024  # rows that are float64 at a time in Moments


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance between two sample sets, with unbiased (n - 1) covariances, in float64.

    It shrinks as the sets grow (the covariance of few samples is far from the true one), so compare only values with
    equal counts.

    Parameters
    ----------
    x, y: [N, D] and [M, D], N and M >= 2; any real dtype.

    Returns
    -------
    The squared 2-Wasserstein distance of the two fitted normal distributions, >= 0, in squared units of the input.

    Raises
    ------
    InputError
        Fewer than two rows, different D, or a value that is NaN or infinite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(f"a Frechet distance between {list(x.shape)} and {list(y.shape)}, expected [N, D] and [M, D]")
    if min(len(x), len(y)) < 2:
        raise InputError(
            f"a Frechet distance between sets of {len(x)} and {len(y)}, expected at least 2 in each; take more"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("a Frechet distance of vectors that hold NaN or infinity, expected finite numbers")

    difference = x.mean(0) - y.mean(0)
    a, b = _centred(x), _centred(y)
    traces = np.vdot(a, a) + np.vdot(b, b)
    if min(len(a), len(b)) > a.shape[1]:
        (a,), (b,) = (scipy.linalg.qr(side, mode="r", overwrite_a=True, check_finite=False) for side in (a, b))
        a, b = a[: a.shape[1]], b[: b.shape[1]]
    root = scipy.linalg.svdvals(a @ b.T, overwrite_a=True, check_finite=False).sum()
    return max(float(difference @ difference + traces - 2.0 * root), 0.0)


class Moments:
    """Mean and covariance of vectors that come in blocks, in float64 and the memory of one [D, D] matrix.

    A block's mean and scatter matrix (the sum of (x - mean)(x - mean)') join those so far by the pairwise update of
    Chan, Golub and LeVeque (1979), which subtracts near numbers only: with d the difference of the two means,

        scatter = scatter_a + scatter_b + d d' n_a n_b / (n_a + n_b),    mean = mean_a + d n_b / (n_a + n_b)

    Parameters
    ----------
    device: where the matrix is; blocks are brought there.
    """

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.n = 0
        self._mean = torch.zeros(0, dtype=torch.float64, device=self.device)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64, device=self.device)

    @property
    def dimensions(self) -> int:
        """D of the vectors so far; 0 before the first."""
        return len(self._mean)

    def add(self, x: np.ndarray | Tensor) -> None:
        """Add a block [B, D] of any real dtype; B may be 0.

        Raises
        ------
        InputError
            Another shape, another D than before, or a value that is NaN or infinite; nothing is added then.
        """
        block = x.detach() if isinstance(x, Tensor) else np.asarray(x)
        if block.ndim != 2 or (self.n and block.shape[1] != self.dimensions):
            wanted = f"[B, {self.dimensions}]" if self.n else "[B, D]"
            raise InputError(
                f"moments of a block {list(block.shape)}, expected {wanted}; embed all sets with one embedder"
            )
        if not all(bool(part.isfinite().all()) for part in self._parts(block)):
            raise InputError("moments of vectors that hold NaN or infinity, expected finite numbers")
        for part in self._parts(block):
            mean = part.mean(0)
            self._join(len(part), mean, part - mean)

    def _parts(self, block: np.ndarray | Tensor) -> Iterator[Tensor]:
        for start in range(0, len(block), _BLOCK):
            part = block[start : start + _BLOCK]
            if not isinstance(part, Tensor):
                part = torch.from_numpy(part.astype(np.float64))
            yield part.to(self.device, torch.float64)

    def merge(self, other: Moments) -> None:
        """Add all vectors that `other` has seen, as if they had come here.

        Raises
        ------
        InputError
            Another D.
        """
        if self.n and other.n and self.dimensions != other.dimensions:
            raise InputError(
                f"moments of {self.dimensions} and of {other.dimensions} dimensions cannot be merged, expected one D"
            )
        if other.n:
            self._join(other.n, other._mean.to(self.device), None)
            self._scatter += other._scatter.to(self.device)

    def _join(self, n: int, mean: Tensor, centred: Tensor | None) -> None:
        if not self.n:
            self._mean = torch.zeros_like(mean)
            self._scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=self.device)
        total = self.n + n
        difference = mean - self._mean
        self._scatter.addr_(difference, difference, alpha=self.n * n / total)
        if centred is not None:
            self._scatter.addmm_(centred.T, centred)
        self._mean = self._mean + difference * (n / total)
        self.n = total

    def mean(self) -> np.ndarray:
        """float64 [D].

        Raises
        ------
        InputError
            Nothing was added.
        """
        self._need(1)
        return self._mean.cpu().numpy().copy()

    def covariance(self) -> np.ndarray:
        """float64 [D, D], unbiased (n - 1).

        Raises
        ------
        InputError
            Fewer than two vectors were added.
        """
        self._need(2)
        return self._scatter.cpu().numpy() / (self.n - 1)

    def _need(self, least: int) -> None:
        if self.n < least:
            raise InputError(f"moments of {self.n} vectors, expected at least {least}; add more")


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """The Frechet distance of two streams, in float64 on the first one's device.

    tr (S_a S_b)^(1/2) = tr (S_a^(1/2) S_b S_a^(1/2))^(1/2), the sum of the roots of a symmetric matrix's eigenvalues:
    real and never negative but for rounding, which is cut off at 0. (The root of the product S_a S_b itself is of a
    matrix that is not symmetric; there rounding makes complex eigenvalues.)

    Accuracy: an eigenvalue is known to about 1e-16 of the largest, so the root of one that is really 0 may come out as
    1e-8 of the largest deviation. With singular covariances (fewer vectors than dimensions) the distance is so off by
    at most about 1e-8 D of the largest variance; otherwise it has 10 digits or more. `frechet_distance` has no such
    loss and is the one to take where the vectors are at hand.

    Raises
    ------
    InputError
        Fewer than two vectors in a stream, or different D.
    """
    if min(a.n, b.n) < 2:
        raise InputError(f"a Frechet distance between sets of {a.n} and {b.n}, expected at least 2 in each; take more")
    if a.dimensions != b.dimensions:
        raise InputError(
            f"a Frechet distance between {a.dimensions} and {b.dimensions} dimensions, expected one embedder for both"
        )
    difference = a._mean - b._mean.to(a.device)
    s, t = a._scatter / (a.n - 1), b._scatter.to(a.device) / (b.n - 1)
    traces = s.trace() + t.trace()
    values, vectors = torch.linalg.eigh(s)
    del s
    half = vectors * values.clamp(min=0).sqrt()  # S_a = half half'; half' S_b half has the same eigenvalues
    del vectors
    root = torch.linalg.eigvalsh(half.T @ t @ half).clamp(min=0).sqrt().sum()
    return max(float(difference @ difference + traces - 2.0 * root), 0.0)


def bias_note(samples: int, reference: int, dimensions: int) -> str:
    """One line where the sets are so small that their distance says more of their sizes than of the pictures, else "".

    Below as many pictures as dimensions a covariance is singular; FID's estimate is known to be biased well above that
    (Chong and Forsyth, 2020), so a thousand is asked for in any case.

    Parameters
    ----------
    samples, reference: pictures in each set.
    dimensions: numbers a picture.
    """
    enough = max(FEW, dimensions)
    if min(samples, reference) >= enough:
        return ""
    return (
        f"The Frechet distance of {samples:,} samples to {reference:,} held-out images is biased (mostly too large),"
        f" because {enough:,} of each are needed for {dimensions:,} numbers a picture: compare it at equal counts only."
    )


def _centred(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.sqrt(len(x) - 1)
