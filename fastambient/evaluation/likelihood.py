"""Do the samples explain the training set better than images that never trained? FLD's gap, and MiFID.

Feature Likelihood Divergence (Jiralerspong et al., "Feature Likelihood Divergence: Evaluating the Generalization of
Generative Models Using Samples", NeurIPS 2023, arXiv 2302.04440, section 3)
------------------------------------------------------------------------------------------------------------------
In features standardised by the training set, a density is laid over the m samples g_j, in d dimensions:

    p(x) = 1/m sum_j N(x; g_j, v_j I)

with the variances that explain the training images best, beside a base likelihood L that spares the samples from
having to explain all of them:

    v = argmax sum over training images x of log(p(x) + L(x)),    FLD(S) = -100/d mean over x in S of log p(x) - C

A sample that copies gets a tiny variance: it explains its original and nothing else. So FLD(held-out) - FLD(train), the
generalization gap, is near 0 where samples are as near to held-out images as to training images, and grows with
copying. C is the same for all S: -100/d log-likelihood of the held-out images under half of the training set, its
variances fitted to the other half, so that 0 is what fresh images would score.

As the authors' program does (github.com/marcojira/fld): L(x) = N(0.9 (x - mean); 0, v_0 I), v_0 fitted too; every
variance starts at the nearest training image, |x - g_j|^2 / d; at most 10,000 of each set. Other than there: the fit is
by expectation maximization, which needs no step size and always gives the same; variances end at `VARIANCE_BOUND`
instead of e^-40; the features are standardised by the training set, not by the held-out one (which moves both FLDs by
about as much); and the gap is positive where training images are explained better.

MiFID (Bai et al., "On Training Sample Memorization: Lessons from Benchmarking Generative Modeling with a Large-scale
Competition", KDD 2021, arXiv 2106.03062)
------------------------------------------------------------------------------------------------------------------
    MiFID = FD * 1/(s + epsilon) where s < tau, else FD;   s = mean over samples of min over training images (1 - |cos|)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastambient.errors import InputError

# Of standardised features. Images nearer than a hundredth of a deviation a dimension count as equal: re-encoding moves
# features by about as much, and without a bound an exact copy would have an infinite likelihood.
VARIANCE_BOUND = 1e-4
MIFID_THRESHOLD = 0.1  # tau of the competition, for Inception's features
_MIFID_EPSILON = 1e-6  # below it a cosine distance of float32 features is rounding
_MOST = 10_000  # vectors of a set
FEW = 100  # images in a control: gaps of fewer differ widely from split to split (docs/perf-log.md)
_CONTROL = 1000  # and of the control's, which is one more fit
_BASE_SHRINK = 0.9
_STEPS, _TOLERANCE = 100, 1e-6  # of expectation maximization; nats a dimension
_ROWS, _COLUMNS = 512, 8192  # of a block of distances


def feature_likelihood_divergence(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray,
    *,
    mirrored: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """FLD of the training and the held-out images under a density fitted around the samples, and the gap.

    Parameters
    ----------
    samples, train, holdout: features [N, D], [M, D], [K, D] of one embedder; N, K >= 1, M >= 2. Dimensions that do not
        vary in the training set are left out. Of more than 10,000 that many are taken by chance.
    mirrored: features [M, D] of the training images' mirror images, where those trained as well: FLD of the training
        set is then that of both.
    seed: of those choices and of the halves of C.

    Returns
    -------
    train, holdout: FLD, lower is better; gap: holdout - train; gap_ci95: its 95 % interval over training and held-out
    images, the samples and their fit held; baseline: C; at_bound: share of the samples whose variance ends at
    `VARIANCE_BOUND`, which is a copy to a hundredth of a deviation. All are finite.

    Without copying the gap is above 0, because the variances are fitted to the training images, and the more so the
    fewer samples and images there are: read it beside the same of held-out images in the samples' place
    (`likelihood_control`).

    Raises
    ------
    InputError
        Other shapes, too few vectors, NaN or infinity, or training features that do not vary at all.
    """
    arrays = {"samples": np.asarray(samples), "training": np.asarray(train), "held-out": np.asarray(holdout)}
    if mirrored is not None:
        arrays["mirrored training"] = np.asarray(mirrored)
    shapes = ", ".join(f"{list(x.shape)} {name}" for name, x in arrays.items())
    if any(x.ndim != 2 for x in arrays.values()) or len({x.shape[-1] for x in arrays.values()}) != 1:
        raise InputError(f"FLD of features {shapes}, expected [N, D] each; embed all sets with one embedder")
    if min(len(x) for x in arrays.values()) < 1 or len(arrays["training"]) < 2:
        raise InputError(f"FLD of features {shapes}, expected at least 1 sample, 2 training and 1 held-out image")
    if not all(np.isfinite(x).all() for x in arrays.values()):
        raise InputError("FLD of features that hold NaN or infinity, expected finite numbers; check the embedder")
    if mirrored is not None and len(mirrored) != len(train):
        raise InputError(f"FLD of features {shapes}, expected a mirror image of each training image")

    generator = np.random.default_rng(seed)
    chosen = [_at_most(len(arrays[name]), generator) for name in ("samples", "training", "held-out")]
    images = len(chosen[1])
    g, x, y = (arrays[name][rows].astype(np.float64) for name, rows in zip(arrays, chosen, strict=False))
    if mirrored is not None:  # an image and its mirror image are `images` rows apart
        x = np.concatenate([x, arrays["mirrored training"][chosen[1]]])
    mean, deviation = x.mean(0), x.std(0)
    # A constant column's deviation is its mean's rounding, if anything.
    varies = deviation > 1e-12 * np.abs(mean)
    if not varies.any():
        raise InputError("FLD of training features that are all equal, expected different images")
    g, x, y = ((a[:, varies] - mean[varies]) / deviation[varies] for a in (g, x, y))
    d = x.shape[1]

    order = generator.permutation(images)
    half, other = (
        x.reshape(-1, images, d)[:, part].reshape(-1, d) for part in (order[: images // 2], order[images // 2 :])
    )
    baseline = float(-100 / d * _log_likelihood(y, half, _fit(half, other)).mean())
    variances = _fit(g, x)
    on_train = -100 / d * _log_likelihood(x, g, variances).reshape(-1, images).mean(0) - baseline  # of each image
    on_holdout = -100 / d * _log_likelihood(y, g, variances) - baseline
    gap = float(on_holdout.mean() - on_train.mean())
    half_width = 1.96 * math.sqrt(sum(a.var() / max(len(a) - 1, 1) for a in (on_train, on_holdout)))
    return {
        "train": float(on_train.mean()),
        "holdout": float(on_holdout.mean()),
        "gap": gap,
        "gap_ci95": [gap - half_width, gap + half_width],
        "baseline": baseline,
        "at_bound": float((variances <= VARIANCE_BOUND).double().mean()),
    }


def likelihood_control(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray,
    *,
    mirrored: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """What FLD's gap is without copying: that of held-out images in the samples' place, against the other ones.

    Parameters and errors are those of `feature_likelihood_divergence`.

    Returns
    -------
    images: k, at most half of the held-out images and at most 1,000; gap: FLD's gap of k of the samples;
    holdout_gap: of k held-out images. None where fewer than four are held out, or there are fewer than two samples.
    """
    k = min(len(samples), len(holdout) // 2, _CONTROL)
    if k < 2:
        return None
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(holdout))
    some = np.sort(generator.choice(len(samples), k, replace=False))
    sides = (samples[some], holdout), (holdout[order[:k]], holdout[order[k:]])
    gap, chance = (feature_likelihood_divergence(a, train, b, mirrored=mirrored, seed=seed)["gap"] for a, b in sides)
    return {"images": k, "gap": gap, "holdout_gap": chance}


def _at_most(count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of all, or of 10,000 by chance."""
    return np.sort(generator.choice(count, _MOST, replace=False)) if count > _MOST else np.arange(count)


def _fit(centres: np.ndarray, x: np.ndarray) -> Tensor:
    """Variances float64 [m] around `centres` [m, d] that maximise sum log(p(x) + L(x)), a local maximum.

    Expectation maximization with weights and means held: with r_ij the share of centre j in p(x_i) + L(x_i),
    v_j = sum_i r_ij |x_i - g_j|^2 / (d sum_i r_ij), and the likelihood never falls.
    """
    d = x.shape[1]
    distances = _squared_distances(x, centres)
    from_mean = torch.from_numpy(np.square(_BASE_SHRINK * (x - x.mean(0))).sum(1))
    v = (distances.min(0).values.double() / d).clamp(min=VARIANCE_BOUND)
    v0 = torch.ones(1, dtype=torch.float64)
    last = -math.inf
    for _ in range(_STEPS):
        share, spread, share0, spread0, now = torch.zeros_like(v), torch.zeros_like(v), 0.0, 0.0, 0.0
        for block, base in zip(distances.split(_ROWS), from_mean.split(_ROWS), strict=True):
            block = block.double()
            of_centres = _log_normal(block, v, d) - math.log(len(v))
            of_base = _log_normal(base[:, None], v0, d)
            total = torch.logsumexp(torch.cat([of_centres, of_base], 1), 1, keepdim=True)
            r, r0 = (of_centres - total).exp_(), (of_base - total).exp_()[:, 0]
            share += r.sum(0)
            spread += (r * block).sum(0)
            share0 += float(r0.sum())
            spread0 += float(r0 @ base)
            now += float(total.sum())
        # A centre that explains nothing stays as it is.
        v = torch.where(share > 1e-200, spread / (d * share), v).clamp(min=VARIANCE_BOUND)
        if share0 > 1e-200:
            v0 = torch.full_like(v0, max(spread0 / (d * share0), VARIANCE_BOUND))
        if now - last < _TOLERANCE * d * len(x):
            break
        last = now
    return v


def _log_likelihood(x: np.ndarray, centres: np.ndarray, v: Tensor) -> np.ndarray:
    """log p(x) of each, float64 [n]."""
    found = []
    for block in np.array_split(x, max(1, len(x) // _ROWS)):
        log = _log_normal(_squared_distances(block, centres).double(), v, x.shape[1]) - math.log(len(v))
        found.append(torch.logsumexp(log, 1).numpy())
    return np.concatenate(found)


def _log_normal(squared: Tensor, v: Tensor, d: int) -> Tensor:
    return -squared / (2 * v) - d / 2 * torch.log(2 * math.pi * v)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Tensor:
    """float32 [n, m], made in float64: each has 7 digits, small ones too."""
    b_ = torch.from_numpy(b)
    out = torch.empty(len(a), len(b))
    for start in range(0, len(a), _ROWS):
        block = torch.from_numpy(a[start : start + _ROWS])
        out[start : start + _ROWS] = torch.cdist(block, b_).square_()
    return out


def mifid(
    fd: float,
    samples: np.ndarray,
    train: np.ndarray,
    *,
    mirrored: np.ndarray | None = None,
    threshold: float = MIFID_THRESHOLD,
) -> dict[str, float]:
    """Memorization-informed Frechet distance: `fd`, over the mean cosine distance to the training set where that is
    suspiciously small.

    The factor is 1 from `threshold` on and up to 10^6 for exact copies, by the smallest 1 - |cos| of each sample among
    all training images. The threshold was set for Inception's features; others lie closer or farther by nature, so
    compare MiFID within one embedder, and with that of held-out images.

    Parameters
    ----------
    fd: Frechet distance of the samples, of the same embedder.
    samples, train: features [N, D] and [M, D], N and M >= 1. A vector of zeros is at distance 1 of all.
    mirrored: features [M, D] of the training images' mirror images, where those trained as well.

    Returns
    -------
    value: MiFID; distance: s; threshold: tau.

    Raises
    ------
    InputError
        Other shapes, an empty set, NaN or infinity, or an `fd` below 0.
    """
    samples, train = np.asarray(samples), np.asarray(train)
    if samples.ndim != 2 or train.ndim != 2 or samples.shape[1] != train.shape[1] or not len(samples) or not len(train):
        raise InputError(
            f"MiFID of features {list(samples.shape)} against {list(train.shape)}, expected [N, D] and [M, D] with at"
            " least 1 vector each; embed both sets with one embedder"
        )
    if not (np.isfinite(samples).all() and np.isfinite(train).all() and math.isfinite(fd) and fd >= 0):
        raise InputError(f"MiFID of a Frechet distance {fd}, expected a number from 0 on and features without NaN")
    distance = cosine_distance(samples, *(x for x in (train, mirrored) if x is not None))
    value = fd / (distance + _MIFID_EPSILON) if distance < threshold else fd
    return {"value": value, "distance": distance, "threshold": threshold}


def cosine_distance(samples: np.ndarray, *sets: np.ndarray) -> float:
    """Mean over the samples [N, D] of the smallest 1 - |cos| to any vector of the sets [M, D], in float64 by blocks."""
    nearest = np.zeros(len(samples))
    for start in range(0, len(samples), _ROWS):
        a = _unit(samples[start : start + _ROWS])
        best = torch.zeros(len(a), dtype=torch.float64)
        for images in sets:
            for first in range(0, len(images), _COLUMNS):
                torch.maximum(best, (a @ _unit(images[first : first + _COLUMNS]).T).abs().amax(1), out=best)
        nearest[start : start + len(a)] = best.numpy()
    return float(np.clip(1 - nearest, 0, None).mean())


def _unit(x: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(x, np.float64)), dim=1)
