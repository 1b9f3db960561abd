"""Everything that metrics.json says about one run: quality and memorization, each against held-out images."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from fastambient.errors import InputError
from fastambient.evaluation.frechet import frechet_distance
from fastambient.evaluation.memorization import (
    Neighbours,
    bootstrap_interval,
    copies_per_image,
    distinct,
    fingerprints,
    nearest_two,
)
from fastambient.pictures import as_pictures

_TOP = 10  # the most copied training images that are named


def evaluate(
    samples: Any,
    train: Any,
    holdout: Any,
    *,
    threshold: float = 1 / 3,
    bootstrap: int = 1000,
    seed: int = 0,
    flips: bool = False,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], Neighbours]:
    """Measure samples against the training images and against held-out images that never trained.

    The copy rate searches all training images. A nearest neighbour lies the nearer, the more images are searched, so
    the held-out control searches as many distinct images as there are on the training side; where fewer are held out,
    ``memorization.control`` holds the training side at that smaller count, too.

    Parameters
    ----------
    samples, train, holdout: uint8 [N, C, H, W], arrays or tensors, of one picture size; at least two of each.
    threshold: gap ratio d1/d2 below which a sample is a copy, in (0, 1].
    bootstrap: resamples of the 95 % interval.
    seed: of the interval and of the choice of the control's images.
    flips: also search mirrored training and held-out images.
    settings: what else belongs on record (resolution, sigma_tn, sampler steps, ...).

    Returns
    -------
    The content of metrics.json (JSON types only; distances are L2 over pixels in [-1, 1]), and the neighbours of the
    samples among the training images, for galleries.

    Raises
    ------
    InputError
        Too few pictures, different sizes, a bad threshold or count, or a held-out image that is a training image
        (with `flips`: or the mirror image of one, which trained, too).
    """
    samples, train, holdout = (
        as_pictures(samples, "samples"),
        as_pictures(train, "train"),
        as_pictures(holdout, "holdout"),
    )
    if not 0 < threshold <= 1:
        raise InputError(f"threshold is {threshold}, expected a gap ratio in (0, 1]; the usual one is 1/3")
    if bootstrap < 1:
        raise InputError(f"bootstrap is {bootstrap}, expected at least 1 resample")
    for name, images in (("samples", samples), ("training images", train), ("held-out images", holdout)):
        if len(images) < 2:
            raise InputError(f"an evaluation with {len(images)} {name}, expected at least 2; take more")
        if images.shape[1:] != train.shape[1:]:
            raise InputError(
                f"{name} of {list(images.shape[1:])}, expected the training images' {list(train.shape[1:])} (C, H, W);"
                " evaluate with the data the model was trained on"
            )
    shared = len(set(fingerprints(train, flips=flips)) & set(fingerprints(holdout, flips=flips)))
    if shared:
        mirrored, remedy = (" or their mirror images", "leave mirrored copies out") if flips else ("", "split again")
        raise InputError(
            f"{shared} held-out images are training images{mirrored}, expected none: a control must not have trained;"
            f" {remedy}"
        )

    train_distinct, holdout_distinct = distinct(train, flips=flips), distinct(holdout, flips=flips)
    count = min(len(train_distinct), len(holdout_distinct))
    generator = np.random.default_rng(seed)
    neighbours = nearest_two(samples, train, flips=flips)
    control = nearest_two(samples, holdout[_choose(holdout_distinct, count, generator)], flips=flips)
    if count == len(train_distinct):
        same_count = neighbours
    else:
        same_count = nearest_two(samples, train[_choose(train_distinct, count, generator)], flips=flips)

    copies = neighbours.copies(threshold)
    per_image = copies_per_image(neighbours, threshold)
    times, images_with = np.unique(list(per_image.values()), return_counts=True)
    reference = _pixels(holdout)
    metrics = {
        "counts": {
            "train": len(train),
            "holdout": len(holdout),
            "samples": len(samples),
            "train_distinct": len(train_distinct),
            "holdout_distinct": len(holdout_distinct),
        },
        "frechet": {
            "pixel": {
                "value": frechet_distance(_pixels(samples), reference),
                "reference": f"holdout ({len(holdout)} images)",
                "train_vs_reference": frechet_distance(_pixels(train), reference),
            }
        },
        "memorization": {
            "gap_ratio": {
                "threshold": threshold,
                "copies": int(copies.sum()),
                "rate": float(copies.mean()),
                "ci95": list(bootstrap_interval(copies, resamples=bootstrap, seed=seed)),
                "holdout_rate": float(control.copies(threshold).mean()),
            },
            "nearest_distance": {
                "median": float(np.median(neighbours.distance[:, 0])),
                "holdout_median": float(np.median(control.distance[:, 0])),
            },
            "control": {
                "images": count,
                "train_rate": float(same_count.copies(threshold).mean()),
                "train_median": float(np.median(same_count.distance[:, 0])),
            },
            "copies_per_train_image": {
                "images_copied": len(per_image),
                "histogram": {str(t): int(n) for t, n in zip(times, images_with, strict=True)},
                "top": [{"train_index": i, "copies": n} for i, n in list(per_image.items())[:_TOP]],
            },
        },
        "settings": {
            **settings,
            "protocol": {"space": "pixels in [-1, 1]", "flips": flips, "bootstrap": bootstrap, "seed": seed},
        },
    }
    return to_json(metrics), neighbours


def _choose(positions: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of the positions by chance, in their order: a set sorted by class must not give one class."""
    return np.sort(generator.choice(positions, count, replace=False))


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1.0


def to_json(value: Any) -> Any:
    """The value in JSON's types: NumPy numbers unwrapped, infinities, NaN and paths as text."""
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [to_json(v) for v in value]
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, os.PathLike) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
