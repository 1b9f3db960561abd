"""Everything that metrics.json says about one run: quality and memorization, each against held-out images."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastambient.console import progress
from fastambient.errors import InputError
from fastambient.evaluation.embedded import embedded_metrics
from fastambient.evaluation.inputs import ENOUGH_HELD_OUT
from fastambient.evaluation.memorization import (
    NamesOfCopies,
    Neighbours,
    bootstrap_interval,
    copies_per_image,
    distinct,
    excess_interval,
    fingerprints,
)
from fastambient.evaluation.nearest_pictures import near_duplicates, near_duplicates_note, nearest_pictures
from fastambient.evaluation.results import Evaluation, Score
from fastambient.evaluation.similarity import LEVELS, Similar
from fastambient.pictures import as_pictures

if TYPE_CHECKING:
    from fastambient.evaluation.embedders import Embedder

__all__ = ["Evaluation", "Score", "check_sets", "evaluate", "to_json"]

_TOP = 10  # the most copied training images that are named
_HELD = 2**26  # numbers of a set, above which they stay float32: those of small sets keep every digit
_NO_HOLDOUT = (
    "There is no held-out set: Frechet distances, KID, precision, recall, density, coverage, MiFID, FLD and all"
    " controls need images that never trained. How much of the copying is chance cannot be told."
)


def evaluate(
    samples: Any,
    train: Any,
    holdout: Any = None,
    *,
    embedder: Embedder | None = None,
    cache: Path | None = None,
    threshold: float = 1 / 3,
    bootstrap: int = 1000,
    seed: int = 0,
    flips: bool = False,
    denoising_gap: list[dict[str, Any]] | None = None,
    sample_names: Sequence[str] | None = None,
    train_names: Sequence[str] | None = None,
    settings: dict[str, Any],
) -> Evaluation:
    """Measure samples against the training images and against held-out images that never trained.

    The copy rate searches all training images, of which near-duplicates count as one picture (nearest_pictures.py). A
    nearest neighbour lies the nearer, the more images are searched, so the held-out control searches as many distinct
    images as there are on the training side; where fewer are held out, ``memorization.control`` (and
    ``similarity.control``) hold the training side at that smaller count, too; ``excess_ci95`` there is of the copies of
    all training images less those of the control, ``similarity.excess_...`` that of the smaller count.

    Parameters
    ----------
    samples, train, holdout: uint8 [N, C, H, W], arrays or tensors, of one picture size; at least two of each. Without
        `holdout` what needs it is None, and ``notes`` says so.
    embedder: of the similarity and of the figures of quality; None leaves them out.
    cache: folder of features that were made before; None for none.
    threshold: gap ratio d1/d2 below which a sample is a copy, in (0, 1].
    bootstrap: resamples of the 95 % interval.
    seed: of the intervals and of the choice of the control's images.
    flips: also search mirrored training and held-out images.
    denoising_gap: rows of `denoising_gap`, where the network was at hand: they go on record with the rest.
    sample_names, train_names: what they are called, one a picture, such as file names.
    settings: what else belongs on record (resolution, sigma_tn, sampler steps, ...).

    Returns
    -------
    metrics.json (JSON types only; distances are L2 over pixels in [-1, 1]), the pictures, and the scores of each
    sample: the gap ratio and, with an embedder, the similarity.

    Raises
    ------
    InputError
        Too few pictures, different sizes, a bad threshold or count, or a held-out image that is a training image
        (with `flips`: or the mirror image of one, which trained, too).
    """
    samples, train = as_pictures(samples, "samples"), as_pictures(train, "train")
    holdout = None if holdout is None else as_pictures(holdout, "holdout")
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
    for what, names, images in (("sample", sample_names, samples), ("training image", train_names, train)):
        if names is not None and len(names) != len(images):
            raise InputError(f"{len(names):,} {what} names for {len(images):,} pictures, expected one a picture")
    train_distinct, holdout_distinct = check_sets(train, holdout, flips=flips)
    if train_names is not None:
        train_names = NamesOfCopies(train_names, train, flips=flips)

    count = min(len(train_distinct), len(holdout_distinct))
    chosen, some = (None, None) if holdout is None else equal_counts(train_distinct, holdout_distinct, seed=seed)
    near = _nearest(samples, train, holdout, chosen, some, len(train_distinct), flips)
    scores = [_gap_ratio(*near[:2], threshold)]
    copying = _copying(*near, count, threshold, train_names, bootstrap=bootstrap, seed=seed)
    copying["near_duplicates"] = twins = near_duplicates(near[0], threshold)
    reference = f"holdout ({len(holdout)} images)" if holdout is not None else None
    metrics: dict[str, Any] = {
        "counts": {
            "train": len(train),
            "holdout": 0 if holdout is None else len(holdout),
            "samples": len(samples),
            "train_distinct": len(train_distinct),
            "holdout_distinct": len(holdout_distinct),
        },
        "frechet": {"pixel": {"reference": reference} | _pixel_distances(samples, train, holdout, seed)},
        "memorization": copying,
        "copies_per_train_image": copying["copies_per_train_image"],
        "similarity": None, "quality": [], "mifid": None, "fld": None,
        "denoising_gap": denoising_gap,
        "notes": [n for n in (_NO_HOLDOUT if holdout is None else few_held_out(count, len(train_distinct)),
            near_duplicates_note(twins), _swapped(copying)) if n],
        "settings": {
            **settings,
            "protocol": {"space": "pixels in [-1, 1]", "flips": flips, "bootstrap": bootstrap, "seed": seed},
        },
    }  # fmt: skip
    if embedder is not None:
        told, found, control = embedded_metrics(
            samples, train, holdout, embedder=embedder, cache=cache, chosen=chosen, some=some, flips=flips,
            bootstrap=bootstrap, seed=seed,
        )  # fmt: skip
        metrics |= told | {
            n: told[n] | metrics[n] if n == "frechet" else metrics[n] + told[n] for n in ("frechet", "notes")
        }
        scores.append(_similarity(found, control, embedder.label))
    return Evaluation(to_json(metrics), samples, train, holdout, tuple(scores), sample_names, train_names)


def _nearest(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray | None,
    chosen: np.ndarray | None,
    some: np.ndarray | None,
    distinct_images: int,
    flips: bool,
) -> tuple[Neighbours, Neighbours | None, Neighbours]:
    """Neighbours of the samples among all training images, among the held-out images `chosen` (with their positions in
    all), and among the training images `some` (by default all)."""
    searched = distinct_images + sum(len(x) for x in (chosen, some) if x is not None)
    with progress("nearest neighbours", len(samples) * searched, "pairs") as advance:
        neighbours = nearest_pictures(samples, train, flips=flips, on_block=advance)
        control, equal = None, neighbours
        if holdout is not None and chosen is not None:
            control = nearest_pictures(samples, holdout[chosen], flips=flips, on_block=advance)
            control = dataclasses.replace(control, index=chosen[control.index])
            if some is not None:
                equal = nearest_pictures(samples, train[some], flips=flips, on_block=advance)
    return neighbours, control, equal


def _copying(
    neighbours: Neighbours,
    control: Neighbours | None,
    equal: Neighbours,
    count: int,
    threshold: float,
    names: Sequence[str] | None,
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """The section memorization. `equal`: among as many training images as the control searches, `count`."""
    copies = neighbours.copies(threshold)
    per_image = copies_per_image(neighbours, threshold)
    times, images_with = np.unique(list(per_image.values()), return_counts=True)
    return {
        "gap_ratio": {
            "threshold": threshold,
            "copies": int(copies.sum()),
            "rate": float(copies.mean()),
            "ci95": list(bootstrap_interval(copies, resamples=bootstrap, seed=seed)),
            "holdout_rate": None if control is None else float(control.copies(threshold).mean()),
            "holdout_ci95": None
            if control is None
            else list(bootstrap_interval(control.copies(threshold), resamples=bootstrap, seed=seed)),
        },
        "nearest_distance": {
            "median": float(np.median(neighbours.distance[:, 0])),
            "holdout_median": None if control is None else float(np.median(control.distance[:, 0])),
        },
        "control": {
            "images": count,
            "train_rate": None if control is None else float(equal.copies(threshold).mean()),
            "train_median": None if control is None else float(np.median(equal.distance[:, 0])),
            "excess_ci95": None
            if control is None
            else list(excess_interval(copies, control.copies(threshold), resamples=bootstrap, seed=seed)),
        },
        "copies_per_train_image": {
            "images_copied": len(per_image),
            "histogram": {str(t): int(n) for t, n in zip(times, images_with, strict=True)},
            "top": [
                {"train_index": i, "copies": n} | ({} if names is None else {"name": names[i]})
                for i, n in list(per_image.items())[:_TOP]
            ],
        },
    }


def _pixel_distances(samples: np.ndarray, train: np.ndarray, holdout: np.ndarray | None, seed: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "value": None, "train_vs_reference": None, "equal_counts": None, "dimensions": math.prod(samples.shape[1:])
    }  # fmt: skip
    if holdout is None:
        return told
    from fastambient.evaluation.quality import distance_of_features, own_distances

    x, y, reference = map(_pixels, (samples, train, holdout))
    with progress("Frechet distance", 2, "sets") as advance:
        told["value"] = distance_of_features(x, reference)
        advance(1)
        told |= own_distances(x, y, reference, value=told["value"], seed=seed)
        advance(1)
    return told


def _gap_ratio(neighbours: Neighbours, control: Neighbours | None, threshold: float) -> Score:
    return Score(
        "gap_ratio", "gap ratio d1/d2 (pixels)", "low", threshold,
        neighbours.ratio, neighbours.index[:, 0], neighbours.flipped,
        np.zeros(0) if control is None else control.ratio,
        np.zeros(0, np.int64) if control is None else control.index[:, 0],
    )  # fmt: skip


def _similarity(found: Similar, control: Similar | None, label: str) -> Score:
    return Score(
        "similarity", f"cosine similarity ({label})", "high", LEVELS[-1],
        found.cosine.astype(np.float64), found.index, found.mirrored,
        np.zeros(0) if control is None else control.cosine.astype(np.float64),
        np.zeros(0, np.int64) if control is None else control.index,
    )  # fmt: skip


def check_sets(train: np.ndarray, holdout: np.ndarray | None, *, flips: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`distinct` positions of the training and of the held-out images (none without), which must be able to serve as
    each other's control.

    Raises
    ------
    InputError
        Fewer than two distinct images on a side, different sizes, or a held-out image that trained.
    """
    if holdout is not None and holdout.shape[1:] != train.shape[1:]:
        raise InputError(
            f"held-out images of {list(holdout.shape[1:])}, expected the training images' {list(train.shape[1:])}"
            " (C, H, W); evaluate with the data the model was trained on"
        )
    sides = {"training": train} if holdout is None else {"training": train, "held-out": holdout}
    positions = [distinct(images, flips=flips) for images in sides.values()]
    for (name, images), found in zip(sides.items(), positions, strict=True):
        if len(found) < 2:
            what = "" if len(found) == len(images) else f" that are one picture{' or its mirror image' * flips}"
            raise InputError(f"an evaluation with {len(images)} {name} images{what}, expected at least 2; take more")
    if holdout is None:
        return positions[0], np.zeros(0, np.int64)
    shared = len(set(fingerprints(train, flips=flips)) & set(fingerprints(holdout, flips=flips)))
    if shared:
        same = set(fingerprints(train)) & set(fingerprints(holdout))
        mirrored, remedy = "", "leave these out of one side"
        if flips and not same:
            mirrored, remedy = "the mirror images of ", f"{remedy}, or audit with --no-flips"
        elif flips:
            mirrored = "or mirror "
        raise InputError(
            f"{shared} held-out images are {mirrored}training images, expected none: a control must not have trained;"
            f" {remedy}"
        )
    return positions[0], positions[1]


def few_held_out(count: int, trained: int) -> str:
    """A line where so few held-out images are searched that the control tells nothing, else "".

    The images are themselves a sample: of a few, one that happens to lie apart from the others decides the rate.

    count, trained : distinct images that the control searches, and that trained
    """
    if count >= ENOUGH_HELD_OUT:
        return ""
    enough = f"{ENOUGH_HELD_OUT} or more"
    why = f"no more than train; {enough} would do" if trained <= count else f"hold back {enough}"
    return (
        f"The control searches {count} held-out images only: it says little, and so does the copy rate less it; {why}."
    )


def _swapped(copying: dict[str, Any]) -> str:
    """A line where samples copy held-out images clearly more than training images."""
    interval = copying["control"]["excess_ci95"]
    if interval is None or interval[1] >= 0:
        return ""
    return (
        "More samples are copies of held-out images than of training images: either the held-out ones trained, or the"
        " two sets are interchanged."
    )


def equal_counts(
    train_distinct: np.ndarray, holdout_distinct: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions of equally many images of each side, chosen by `seed`: (of the held-out ones, of the training images or
    None where those are all). Ascending: a set sorted by class must not give one class."""
    count = min(len(train_distinct), len(holdout_distinct))
    generator = np.random.default_rng(seed)
    control = np.sort(generator.choice(holdout_distinct, count, replace=False))
    if count == len(train_distinct):
        return control, None
    return control, np.sort(generator.choice(train_distinct, count, replace=False))


def _pixels(images: np.ndarray) -> np.ndarray:
    """[N, D] in [-1, 1]."""
    flat = images.reshape(len(images), -1)
    return flat / 127.5 - 1.0 if flat.size <= _HELD else flat / np.float32(127.5) - np.float32(1)


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
