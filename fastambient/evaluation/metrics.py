"""Everything that metrics.json says about one run: quality and memorization, each against held-out images."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastambient.console import progress
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


@dataclass(frozen=True)
class Score:
    """One measure of how near each sample lies to the training set, and to held-out images.

    key: "gap_ratio" or "similarity"; label: for people, such as "cosine similarity (EfficientNet-Lite0)".
    closer: which end is a copy, "low" or "high".
    threshold: below (low) or above (high) it a sample counts as a copy.
    values: float64 [N], one a sample.
    index: int64 [N], each sample's nearest training image by this measure.
    mirrored: bool [N], the mirror image is the nearer one.
    control, control_index: float64 and int64 [N], the same among held-out images; [0] where there are none.
    """

    key: str
    label: str
    closer: str
    threshold: float
    values: np.ndarray
    index: np.ndarray
    mirrored: np.ndarray
    control: np.ndarray
    control_index: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and the pictures that a report shows.

    metrics: the content of metrics.json (JSON types only).
    samples, train: uint8 [N, C, H, W] and [M, C, H, W]; holdout: the same, or None where nothing is held out.
    scores: the gap ratio first; the cosine similarity where an embedder was given.
    """

    metrics: dict[str, Any]
    samples: np.ndarray
    train: np.ndarray
    holdout: np.ndarray | None
    scores: tuple[Score, ...]


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
) -> tuple[dict[str, Any], Neighbours, Neighbours]:
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
    The content of metrics.json (JSON types only; distances are L2 over pixels in [-1, 1]), the neighbours of the
    samples among all training images, and those among the control's held-out images, for galleries.

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
    if len(samples) < 2:
        raise InputError(f"an evaluation with {len(samples)} samples, expected at least 2; take more")
    if samples.shape[1:] != train.shape[1:]:
        raise InputError(
            f"samples of {list(samples.shape[1:])}, expected the training images' {list(train.shape[1:])} (C, H, W);"
            " evaluate with the data the model was trained on"
        )
    train_distinct, holdout_distinct = check_sets(train, holdout, flips=flips)

    count = min(len(train_distinct), len(holdout_distinct))
    matched = count == len(train_distinct)
    generator = np.random.default_rng(seed)
    pairs = len(samples) * (len(train_distinct) + count * (1 if matched else 2))
    with progress("nearest neighbours", pairs, "pairs") as advance:
        neighbours = nearest_two(samples, train, flips=flips, on_block=advance)
        chosen = _choose(holdout_distinct, count, generator)
        control = nearest_two(samples, holdout[chosen], flips=flips, on_block=advance)
        control = dataclasses.replace(control, index=chosen[control.index])
        same_count = neighbours
        if not matched:
            some = _choose(train_distinct, count, generator)
            same_count = nearest_two(samples, train[some], flips=flips, on_block=advance)

    copies = neighbours.copies(threshold)
    per_image = copies_per_image(neighbours, threshold)
    times, images_with = np.unique(list(per_image.values()), return_counts=True)
    reference = _pixels(holdout)
    distances = []
    with progress("Frechet distance", 2, "sets") as advance:
        for images in (samples, train):
            distances.append(frechet_distance(_pixels(images), reference))
            advance(1)
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
                "value": distances[0],
                "reference": f"holdout ({len(holdout)} images)",
                "train_vs_reference": distances[1],
                "dimensions": reference.shape[1],
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
    return to_json(metrics), neighbours, control


def check_sets(train: np.ndarray, holdout: np.ndarray, *, flips: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`distinct` positions of the training and of the held-out images, which must be able to serve as each other's
    control.

    Raises
    ------
    InputError
        Fewer than two distinct images on a side, different sizes, or a held-out image that trained.
    """
    if holdout.shape[1:] != train.shape[1:]:
        raise InputError(
            f"held-out images of {list(holdout.shape[1:])}, expected the training images' {list(train.shape[1:])}"
            " (C, H, W); evaluate with the data the model was trained on"
        )
    positions = distinct(train, flips=flips), distinct(holdout, flips=flips)
    for name, images, found in zip(("training", "held-out"), (train, holdout), positions, strict=True):
        if len(found) < 2:
            what = "" if len(found) == len(images) else f" that are one picture{' or its mirror image' * flips}"
            raise InputError(f"an evaluation with {len(images)} {name} images{what}, expected at least 2; take more")
    shared = len(set(fingerprints(train, flips=flips)) & set(fingerprints(holdout, flips=flips)))
    if shared:
        mirrored, remedy = (" or their mirror images", "leave mirrored copies out") if flips else ("", "split again")
        raise InputError(
            f"{shared} held-out images are training images{mirrored}, expected none: a control must not have trained;"
            f" {remedy}"
        )
    return positions


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
