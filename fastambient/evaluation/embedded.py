"""What metrics.json says in an embedder's features: similarity to training images, FD and its company, MiFID, FLD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastambient.console import progress
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
    """The sections similarity, quality, mifid, fld and frechet (by embedder) of metrics.json, the samples' most similar
    training images and, where there is a held-out set, those among the control's.

    Parameters
    ----------
    samples, train, holdout: uint8 [N, C, H, W].
    cache: of features; None for none.
    chosen: int64, positions of the held-out images that the control searches.
    some: int64, positions of as many training images, or None where those are all.
    """
    from fastambient.evaluation.features import features

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
        "similarity": _similarity(found, control, equal, count, embedder, bootstrap=bootstrap, seed=seed),
        "quality": [], "mifid": None, "fld": None, "frechet": {},
    }  # fmt: skip
    if holdout is not None and z is not None:
        with progress(f"quality ({embedder.label})", 4, "figures") as advance:
            told |= _against(x, y, z, embedder, seed, advance)
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
        "preprocess": embedder.preprocess, "identity": embedder.identity, "dimensions": embedder.dimensions
    }  # fmt: skip


def _against(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray,
    embedder: Embedder,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """What needs held-out features."""
    from fastambient.evaluation.likelihood import feature_likelihood_divergence, mifid
    from fastambient.evaluation.quality import distance_of_features, quality

    told = quality(samples, holdout, embedder=embedder.name, seed=seed, device=embedder.device)
    advance(1)
    frechet = {
        "value": told["fd"],
        "reference": f"holdout ({len(holdout)} images)",
        "train_vs_reference": distance_of_features(train, holdout),
        "dimensions": samples.shape[1],
    }
    advance(1)
    informed = {"embedder": embedder.name, **mifid(told["fd"], samples, train)}
    advance(1)
    likelihood = {"embedder": embedder.name, **feature_likelihood_divergence(samples, train, holdout, seed=seed)}
    advance(1)
    return {"quality": [told], "frechet": {embedder.name: frechet}, "mifid": informed, "fld": likelihood}


def _mirrored(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[..., ::-1])


def _share(found: Similar, level: float) -> float:
    return float((found.cosine > level).mean())


def _mean(found: Similar) -> float:
    return float(found.cosine.mean(dtype=np.float64))
