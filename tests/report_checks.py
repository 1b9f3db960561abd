"""Measurements with a planted number of copies, made without measuring: what the report's tests show."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastambient.evaluation.metrics import Evaluation, Score
from fastambient.evaluation.report import RunReport


def pictures(n: int, seed: int, *, channels: int = 1, size: int = 8) -> np.ndarray:
    """uint8 [n, channels, size, size]: smooth noise, so that sheets shrink about as those of photographs do."""
    coarse = np.random.default_rng(seed).integers(2, 254, (n, channels, 4, 4)).astype(np.float32)
    at = np.linspace(0, 3, size)
    low = np.minimum(at.astype(int), 2)
    weights = np.zeros((size, 4), np.float32)
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] += at - low
    fine = weights @ coarse @ weights.T
    grain = np.random.default_rng(seed + 1).integers(-1, 2, fine.shape)
    return np.clip(np.rint(fine) + grain, 0, 255).astype(np.uint8)


def evaluation(
    copies: int,
    *,
    samples: int = 100,
    train: int = 50,
    holdout: int = 80,
    similarity: bool = True,
    channels: int = 1,
    size: int = 8,
    seed: int = 3,
    settings: dict[str, Any] | None = None,
    named: bool = False,
) -> Evaluation:
    """The first `copies` samples are training images (every third mirrored), one grey level brighter.

    holdout : images of the control; 0 for none
    named : pictures have names, which would break out of HTML if they could
    """
    g = np.random.default_rng(seed)
    images, kept = pictures(train, 1, channels=channels, size=size), pictures(holdout, 20, channels=channels, size=size)
    drawn = pictures(samples, seed + 40, channels=channels, size=size)
    index, mirrored = g.integers(0, train, samples), np.zeros(samples, bool)
    index[:copies] = np.arange(copies) % train
    mirrored[:copies:3] = True
    near = images[index[:copies]]
    near[mirrored[:copies]] = near[mirrored[:copies]][..., ::-1]
    drawn[:copies] = np.minimum(near, 254) + 1
    ratio, cosine = g.uniform(0.36, 1, samples), g.uniform(0.5, 0.949, samples)
    ratio[:copies], cosine[:copies] = g.uniform(0, 0.33, copies), g.uniform(0.951, 1, copies)
    ratio[-1], cosine[-1] = 0.38, 0.915  # at a stop of the slider: a copy is beyond it, not at it
    control = g.uniform(0.4, 1, samples), g.uniform(0.5, 0.93, samples)
    control_index = g.integers(0, max(holdout, 1), samples)
    if not holdout:
        control, control_index = (np.zeros(0), np.zeros(0)), np.zeros(0, np.int64)
    scores = [
        Score("gap_ratio", "gap ratio d1/d2 (pixels)", "low", 1 / 3, ratio, index, mirrored, control[0], control_index),
        Score("similarity", "cosine similarity (EfficientNet-Lite0)", "high", 0.95, cosine, index[::-1].copy(), mirrored,
              control[1], control_index),
    ]  # fmt: skip
    metrics = _metrics(scores, copies, samples, train, holdout, similarity, settings or {"sigma_tn": 0.2})
    names: tuple[list[str] | None, list[str] | None] = (None, None)
    if named:
        names = [f"seed {i}" for i in range(samples)], [f"cats & dogs/</script>{i:03d}.png" for i in range(train)]
        for row in metrics["copies_per_train_image"]["top"]:
            row["name"] = names[1][row["train_index"]]
    kept_or_none, measures = kept if holdout else None, tuple(scores if similarity else scores[:1])
    return Evaluation(metrics, drawn, images, kept_or_none, measures, *names)


def _metrics(
    scores: list[Score], copies: int, n: int, train: int, holdout: int, similarity: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """In the keys of metrics.json; the intervals are those of a normal distribution."""

    def ci(rate: float) -> list[float]:
        half = 1.96 * (rate * (1 - rate) / n) ** 0.5 or 0.037
        return [max(rate - half, 0.0), min(rate + half, 1.0)]

    both = bool(holdout)
    count = min(train, holdout)
    index = scores[0].index[scores[0].values < 1 / 3]
    position, times = np.unique(index, return_counts=True)
    order = np.argsort(-times, kind="stable")[:10]
    per_image = {
        "images_copied": len(position),
        "histogram": {},
        "top": [{"train_index": int(position[i]), "copies": int(times[i])} for i in order],
    }
    rate = copies / n
    above = {level: float((scores[1].values > level).mean()) for level in (0.9, 0.95)}
    beyond = {level: float((scores[1].control > level).mean()) if both else None for level in (0.9, 0.95)}
    metrics: dict[str, Any] = {
        "counts": {"train": train, "holdout": holdout, "samples": n, "train_distinct": train, "holdout_distinct": holdout},
        "frechet": {"pixel": {"value": 1.234 if both else None, "reference": f"holdout ({holdout} images)",
                              "train_vs_reference": 0.987 if both else None, "dimensions": 64,
                              "equal_counts": {"images": 60, "value": 1.5, "train_vs_reference": 1.4} if both else None}},
        "memorization": {
            "gap_ratio": {"threshold": 1 / 3, "copies": copies, "rate": rate, "ci95": ci(rate),
                          "holdout_rate": float((scores[0].control < 1 / 3).mean()) if both else None},
            "nearest_distance": {"median": 3.21, "holdout_median": 4.56 if both else None},
            "control": {"images": count, "train_rate": rate, "train_median": 3.33} if both else None,
            "copies_per_train_image": per_image,
        },
        "copies_per_train_image": per_image,
        "settings": {**settings, "protocol": {"bootstrap": 1000}},
    }  # fmt: skip
    if not both:
        metrics["notes"] = ["There is no held-out set: figures that need one are missing."]
    if similarity:
        metrics["similarity"] = {
            "embedder": "efficientnet-lite0", "mean": float(scores[1].values.mean()),
            "holdout_mean": float(scores[1].control.mean()) if both else None,
            "preprocess": "bilinear to 224x224, ImageNet mean and standard deviation", "dimensions": 1280,
            **{f"above_{v}": above[v] for v in above}, **{f"above_{v}_ci95": ci(above[v]) for v in above},
            **{f"holdout_above_{v}": beyond[v] for v in beyond},
            **{f"excess_{v}": above[v] - beyond[v] if both else None for v in above},
            **{f"excess_{v}_ci95": [above[v] - beyond[v] - 0.05, above[v] - beyond[v] + 0.05] if both else None for v in above},
        }  # fmt: skip
        metrics["quality"] = [] if not both else [{
            "embedder": "efficientnet-lite0", "samples": n, "reference": f"held-out ({holdout} images)", "kid_std": 0.0012,
            "figures": {f"FD-{n} vs held-out (fewer samples than dimensions)": 12.34, f"KID-{n} vs held-out": 0.0123,
                        f"precision-{n} vs held-out": 0.81, f"recall-{n} vs held-out": 0.34,
                        f"density-{n} vs held-out": 0.97, f"coverage-{n} vs held-out": None},
            "notes": ["density, coverage: need at least 6 held-out images, here 5"],
        }]  # fmt: skip
        metrics["mifid"] = {
            "value": 13.1, "distance": 0.21, "threshold": 0.1,
            "control": {"images": 60, "distance": 0.22, "holdout_distance": 0.23},
        } if both else None  # fmt: skip
        metrics["fld"] = {
            "train": 5.5, "holdout": 9.75, "gap": 4.25, "gap_ci95": [1.0, 7.5],
            "control": {"images": 40, "gap": 6.0, "holdout_gap": 3.5},
        } if both else None  # fmt: skip
        sigmas = (0.02, 0.1, 0.5, 2.0, 10.0)
        metrics["denoising_gap"] = [
            {"sigma": s, "train": 1 / s, "holdout": 1.4 / s, "gap": 1 + 0.4 / s**0.1, "gap_ci95": [1.0, 1 + 0.8 / s**0.1]}
            for s in sigmas
        ] if both else None  # fmt: skip
    return metrics


def run(name: str, sigma_tn: float | None, copies: int, *, logs: bool = True, **of: Any) -> RunReport:
    """A run with everything that a report can show, or (logs=False) with pictures alone."""
    measured = evaluation(copies, settings={"sigma_tn": sigma_tn, "note": "<i>note</i>"}, **of)
    if not logs:
        return RunReport(name, sigma_tn, measured)
    steps = [{"nimg": 64 * (i + 1), "loss": 60 / (i + 1) + 10} for i in range(500)] + [{"nimg": 32064, "loss": None}]
    levels = [{"sigma": s, "loss": 1 + 1 / s} for s in (0.01, 0.1, 1.0, 10.0)]
    rate = copies / len(measured.samples)
    audits = [
        {"kimg": k, "samples": 100, "rate": rate * k / 32, "ci95": [rate * k / 40, rate * k / 26 + 0.02],
         "holdout_rate": 0.0, "fd": 3 - 1.5 * k / 32}
        for k in (4, 8, 16, 24, 32)
    ]  # fmt: skip
    return RunReport(name, sigma_tn, measured, steps, levels, audits)
