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
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from fastambient.errors import InputError

FEW = 1000  # pictures; below it a distance is always called biased


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
