"""Evaluate a run folder: sample it, measure, and write metrics.json, pictures and report.html."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fastambient.console import progress, warn
from fastambient.data.store import Store
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import InputError
from fastambient.evaluation.denoising_gap import classes_of, denoising_gap
from fastambient.evaluation.embedders import Embedder, load_embedder
from fastambient.evaluation.features import default_cache
from fastambient.evaluation.inputs import check_num, check_target
from fastambient.evaluation.metrics import check_sets, evaluate
from fastambient.evaluation.overviews import draw_nearest, draw_samples, write_nearest
from fastambient.evaluation.report import RunReport, write_report
from fastambient.files import write_json
from fastambient.pictures import load_pictures, picture_names
from fastambient.sampling import load, sample
from fastambient.training import checkpoint
from fastambient.training.config import EvaluationSettings
from fastambient.training.run import RunFolder

_GAP_LEVELS = np.geomspace(0.05, 10.0, 6)  # of the denoising gap, times sigma_data
_GAP_IMAGES = 200  # of each side


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The content of a metrics.json and what the report shows of it.

    file, page, pairs : where they were written; pairs: the list of samples and their nearest training images
    pictures : overviews beside them
    """

    metrics: dict[str, Any]
    report: RunReport
    file: Path
    page: Path
    pairs: Path
    pictures: tuple[Path, ...] = ()


def evaluate_run(
    path: Path,
    *,
    data: Path | None = None,
    samples: Path | None = None,
    num: int | None = None,
    out: Path | None = None,
    device: str = "cpu",
    name: str | None = None,
    features: str | None = None,
    weights: Path | None = None,
    preprocess: str | None = None,
    cache: Path | None = None,
) -> Evaluated:
    """Measure a run against its training and held-out images.

    Parameters
    ----------
    path : run folder
    data : where its store lies now; None for where it was
    samples : folder of PNGs or .npz to measure; None samples seeds 0 .. num-1 from the run's EMA weights
    num : samples to draw; None for the run's evaluation.num
    out : where the metrics go; None for metrics.json in the run
    name : of the run in its report; None for the folder's
    features, weights, preprocess : the embedder, see `load_embedder`; "none" for no embedder. None for the run's
        settings evaluation.features, .weights, .preprocess
    cache : folder of features; None for `default_cache`

    Writes metrics.json, evaluation.png, nearest.png, nearest.csv and report.html into the run; with `out`, that file
    and, beside it, the others with its name in front (``m.json``, ``m-report.html``): figures of one evaluation stay
    together.

    Raises
    ------
    InputError : no such run, no weights, no held-out images, samples that do not fit
    """
    run = RunFolder.existing(path)
    settings = run.read_settings()
    if settings.data.stream:
        raise InputError(f"{path} streams its images: nothing was held out, and no store says what it trained on")
    store = run.open_store(verify=False, at=data)
    if store.train.images is None or store.holdout.images is None:
        raise InputError(
            f"{store.path} was handed out: it holds no clean training image to look for copies of; who made it can"
            " evaluate samples of this run"
        )
    if len(store.holdout) < 2:
        raise InputError(
            f"{store.path} holds {len(store.holdout) or 'no'} held-out images, expected at least 2: without them"
            " copying cannot be told from chance; prepare it with a larger --holdout"
        )
    e = settings.evaluation
    flips = e.flips or settings.data.xflip
    train, holdout = (images[:] for images in (store.train.images, store.holdout.images))
    check_sets(train, holdout, flips=flips)
    target = out or run.metrics
    beside = (lambda part: target.with_name(f"{target.stem}-{part}")) if out else (lambda part: path / part)
    check_target(target, samples, features, weights)
    if samples is not None and samples.is_dir() and target.parent.samefile(samples):
        raise InputError(f"--out {target} lies among the samples, as its pictures would; choose another folder")
    check_num(num)
    embedder = open_embedder(*embedder_settings(e, features, weights, preprocess), device=device)
    seeds, gap, stats = None, None, run.read_stats()
    trained = stats[-1]["nimg"] / 1000 if stats else None  # in kimg
    if samples is not None:
        pictures, names = load_pictures(samples), picture_names(samples)
        if num is not None:
            check_num(num, of=len(pictures), samples=samples)
            # The first ones, not any: of what `sample` wrote these are the seeds that would be drawn here.
            pictures, names = pictures[:num], None if names is None else names[:num]
    else:
        count = settings.evaluation.num if num is None else num
        denoiser = load(run.weights if run.weights.is_file() else path, device=device)
        with progress("sampling", count) as advance:
            pictures = sample(denoiser, range(count), on_batch=advance).numpy()
        names = [f"seed {i}" for i in range(count)]
        seeds, trained = f"0-{count - 1}", denoiser.metadata["nimg"] / 1000
        gap = _denoising_gap(denoiser, store, train, holdout, seed=e.seed)
    stopped = (checkpoint.last_state(run.checkpoints) or {}).get("ended")  # by its own rule: it is finished
    if trained is not None and trained < settings.training.kimg and not stopped:
        warn(f"{path} is not finished: {trained:g} of {settings.training.kimg:g} kimg; longer training copies more")
    evaluation = evaluate(
        pictures, train, holdout, embedder=embedder, cache=cache or default_cache(), denoising_gap=gap,
        threshold=e.threshold, bootstrap=e.bootstrap, seed=e.seed, flips=flips, sample_names=names,
        train_names=store.train.names,
        settings={
            "sigma_tn": settings.noise.sigma_tn,
            "resolution": store.resolution,
            "preset": settings.model.preset,
            "kimg": trained,
            "kimg_planned": settings.training.kimg,
            "training_seed": settings.training.seed,
            "sample_seeds": seeds,
            "samples": str(samples) if samples is not None else None,
            "sampling": settings.tree()["sampling"],
        },
    )  # fmt: skip
    write_json(target, evaluation.metrics)
    name = name or path.resolve().name
    page, pairs, drawn, nearest = map(beside, ("report.html", "nearest.csv", "evaluation.png", "nearest.png"))
    draw_samples(drawn, name, pictures, seeded=samples is None)
    draw_nearest(nearest, name, evaluation)
    write_nearest(pairs, evaluation)
    report = RunReport(
        name=name,
        sigma_tn=settings.noise.sigma_tn or 0.0,
        evaluation=evaluation,
        stats=stats,
        per_sigma=_per_sigma(run),
        timeline=run.read_audits(),
    )
    write_report(page, [report], title=f"fastambient: {report.name}")
    return Evaluated(evaluation.metrics, report, target, page, pairs, (drawn, nearest))


def open_embedder(features: str, weights: Path | None, preprocess: str, *, device: str = "cpu") -> Embedder | None:
    """`load_embedder`, or None for "none"."""
    if preprocess not in ("standard", "paper"):
        raise InputError(f"--preprocess must be standard or paper, got {preprocess!r}")
    if features != "none":
        return load_embedder(features, weights=weights, preprocess=preprocess, device=device)  # type: ignore[arg-type]
    if weights is not None:
        raise InputError(f"--weights {weights} with --features none; leave one of them out")
    if preprocess != "standard":
        raise InputError(f"--preprocess {preprocess} with --features none; leave one of them out")
    return None


def embedder_settings(
    e: EvaluationSettings, features: str | None, weights: Path | None, preprocess: str | None
) -> tuple[str, Path | None, str]:
    """What was asked for, else the run's settings; those belong together, so another network takes none of them."""
    if features is not None and features != e.features:
        return features, weights, preprocess or "standard"
    kept = None if e.weights is None else Path(e.weights)
    return e.features, weights or kept, preprocess or e.preprocess


def _denoising_gap(
    denoiser: EDMDenoiser, store: Store, train: np.ndarray, holdout: np.ndarray, *, seed: int
) -> list[dict[str, Any]]:
    total = 2 * len(_GAP_LEVELS) * min(len(train), len(holdout), _GAP_IMAGES)
    with progress("denoising gap", total) as advance:
        return denoising_gap(
            denoiser, train, holdout, sigmas=[float(s) for s in _GAP_LEVELS * denoiser.sigma_data], seed=seed,
            most=_GAP_IMAGES, on_batch=advance, **classes_of(denoiser, store),
        )  # fmt: skip


def _per_sigma(run: RunFolder) -> list[dict[str, float]]:
    """The last row of the per-sigma table, each bin at its geometric middle."""
    rows = run.read_sigma_loss()
    if not rows:
        return []
    points = []
    for b in rows[-1]["bins"]:
        if b["draws"]:
            low, high = b["sigma_from"] or b["sigma_to"] / 2, b["sigma_to"] or b["sigma_from"] * 2
            points.append({"sigma": (low * high) ** 0.5, "loss": b["loss"]})
    return points
