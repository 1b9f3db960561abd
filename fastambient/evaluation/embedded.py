"""What metrics.json says in an embedder's features: similarity to training images, FD and its company, MiFID, FLD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastambient.console import progress
from fastambient.errors import InputError
from fastambient.evaluation.memorization import bootstrap_interval, excess_interval
from fastambient.evaluation.similarity import LEVELS, Similar, most_similar

if TYPE_CHECKING:
    from fastambient.evaluation.embedders import Embedder


def embedded_metrics(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray | None,
    *,
    embedder: Embedder,
    cache: Path | None,
    chosen: np.ndarray | None,
    some: np.ndarray | None,
    flips: bool,
    bootstrap: int,
    seed: int,
) -> tuple[dict[str, Any], Similar, Similar | None]:
    """The sections similarity, quality, mifid, fld, frechet (by embedder) and notes of metrics.json, the samples' most
    similar training images and, where there is a held-out set, those among the control's.

    Parameters
    ----------
    samples, train, holdout: uint8 [N, C, H, W].
    cache: of features; None for none.
    chosen: int64, positions of the held-out images that the control searches.
    some: int64, positions of as many training images, or None where those are all.
    """
    from fastambient.evaluation.features import features
    from fastambient.evaluation.likelihood import cosine_distance

    searched = None if holdout is None else holdout[chosen]
    sets = [samples, train, *([] if holdout is None else [holdout])]
    mirrors = [x for x in (train, searched) if x is not None] if flips else []
    with progress(f"features ({embedder.label})", sum(map(len, [*sets, *mirrors]))) as advance:

        def embed(images: np.ndarray) -> np.ndarray:
            return features(images, embedder, cache=cache, on_batch=advance)

        x, y = embed(samples), embed(train)
        z = None if holdout is None else embed(holdout)
        y_mirrored = embed(_mirrored(train)) if flips else None
        z_mirrored = embed(_mirrored(searched)) if flips and searched is not None else None

    count = 0 if chosen is None else len(chosen)
    sides = (2 if flips else 1) * (len(train) + count + (0 if some is None else len(some)))
    with progress("cosine similarity", len(samples) * sides, "pairs") as advance:
        found = most_similar(x, y, y_mirrored, on_block=advance)
        control, equal = None, found
        if z is not None:
            control = most_similar(x, z[chosen], z_mirrored, on_block=advance)
            if some is not None:
                mirrors_of_some = None if y_mirrored is None else y_mirrored[some]
                equal = most_similar(x, y[some], mirrors_of_some, on_block=advance)
    told: dict[str, Any] = {
        "similarity": _similarity(
            found, control, equal, count, embedder, x.shape[1], bootstrap=bootstrap, seed=seed
        ),
        "quality": [], "mifid": None, "fld": None, "frechet": {}, "notes": [],
    }  # fmt: skip
    if holdout is not None and z is not None:
        with progress(f"quality ({embedder.label})", 4, "figures") as advance:
            told |= _against(x, y, z, y_mirrored, embedder, seed, advance)
        if told["mifid"] is not None:  # at equal counts: the nearest of more images is the nearer one
            rows = slice(None) if some is None else some
            told["mifid"]["control"] = {
                "images": count,
                "distance": cosine_distance(x, *(a[rows] for a in (y, y_mirrored) if a is not None)),
                "holdout_distance": cosine_distance(x, *(a for a in (z[chosen], z_mirrored) if a is not None)),
            }
    if control is not None:
        assert chosen is not None
        control = Similar(chosen[control.index], control.cosine, control.mirrored)
    return told, found, control


def _similarity(
    found: Similar,
    control: Similar | None,
    equal: Similar,
    count: int,
    embedder: Embedder,
    dimensions: int,
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    told: dict[str, Any] = {"embedder": embedder.name}
    for level in LEVELS:
        hits = found.cosine > level
        told[f"above_{level}"] = float(hits.mean())
        told[f"above_{level}_ci95"] = list(bootstrap_interval(hits, resamples=bootstrap, seed=seed))
    told |= {"mean": _mean(found), "holdout_mean": None if control is None else _mean(control)}
    for level in LEVELS:
        told[f"holdout_above_{level}"] = None if control is None else _share(control, level)
    for level in LEVELS:  # at equal counts: the most similar of more images is the more similar one
        told[f"excess_{level}"] = None if control is None else _share(equal, level) - _share(control, level)
        told[f"excess_{level}_ci95"] = None if control is None else list(
            excess_interval(equal.cosine > level, control.cosine > level, resamples=bootstrap, seed=seed)
        )  # fmt: skip
    told["control"] = {
        "images": count,
        "train_mean": None if control is None else _mean(equal),
        **{f"train_above_{level}": None if control is None else _share(equal, level) for level in LEVELS},
    }
    return told | {
        "preprocess": embedder.preprocess, "identity": embedder.identity, "dimensions": dimensions
    }  # fmt: skip


def _against(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray,
    mirrored: np.ndarray | None,
    embedder: Embedder,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """What needs held-out features. `mirrored`: of the training images' mirror images, or None."""
    from fastambient.evaluation.likelihood import FEW, feature_likelihood_divergence, likelihood_control, mifid
    from fastambient.evaluation.quality import own_distances, quality

    told = quality(samples, holdout, embedder=embedder.name, seed=seed, device=embedder.device)
    advance(1)
    frechet = {
        "value": told["fd"],
        "reference": f"holdout ({len(holdout)} images)",
        **own_distances(samples, train, holdout, value=told["fd"], seed=seed, device=embedder.device),
        "dimensions": samples.shape[1],
    }
    advance(1)
    informed = {"embedder": embedder.name, **mifid(told["fd"], samples, train, mirrored=mirrored)}
    advance(1)
    fit: dict[str, Any] = {"mirrored": mirrored, "seed": seed}
    notes = []
    likelihood: dict[str, Any] | None = None
    try:
        likelihood = {"embedder": embedder.name, **feature_likelihood_divergence(samples, train, holdout, **fit)}
        likelihood["control"] = control = likelihood_control(samples, train, holdout, **fit)
        if control is not None and control["images"] < FEW:
            notes.append(
                f"FLD's gap ({embedder.name}) beside {control['images']} fresh images: of fewer than {FEW} it differs"
                " widely from split to split; take more samples and hold more back before it is read."
            )
    except InputError as error:  # features that tell no training images apart: all else stands
        notes.append(f"FLD ({embedder.name}) could not be measured: {error}")
    advance(1)
    return {
        "quality": [told], "frechet": {embedder.name: frechet}, "mifid": informed, "fld": likelihood, "notes": notes
    }  # fmt: skip


def _mirrored(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[..., ::-1])


def _share(found: Similar, level: float) -> float:
    return float((found.cosine > level).mean())


def _mean(found: Similar) -> float:
    return float(found.cosine.mean(dtype=np.float64))
