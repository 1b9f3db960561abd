"""Evaluate a run folder: sample it, measure, and write metrics.json, pictures and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastambient.console import progress, warn
from fastambient.errors import InputError
from fastambient.evaluation.metrics import evaluate
from fastambient.evaluation.report import RunReport, gallery, nearest_pairs, write_report
from fastambient.files import write_json
from fastambient.pictures import grid, load_pictures, save_png
from fastambient.sampling import load, sample
from fastambient.training.run import RunFolder

_PAIRS = 48  # of the gallery: the samples nearest to a training image
_GRID = 64


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A run's metrics.json and what the report shows of it."""

    metrics: dict[str, Any]
    report: RunReport


def evaluate_run(
    path: Path,
    *,
    samples: Path | None = None,
    num: int | None = None,
    out: Path | None = None,
    device: str = "cpu",
    name: str | None = None,
) -> Evaluated:
    """Measure a run against its training and held-out images.

    Parameters
    ----------
    path : run folder
    samples : folder of PNGs or .npz to measure; None samples seeds 0 .. num-1 from the run's EMA weights
    num : samples to draw; None for the run's evaluation.num
    out : where the metrics go; None for metrics.json in the run
    name : of the run in its report; None for the folder's

    Writes metrics.json, evaluation.png, nearest.png and report.html into the run; with `out`, that file and, beside
    it, the others with its name in front (``m.json``, ``m-report.html``): figures of one evaluation stay together.

    Raises
    ------
    InputError : no such run, no weights, no held-out images, samples that do not fit
    """
    run = RunFolder.existing(path)
    settings = run.read_settings()
    store = run.open_store(verify=False)
    if len(store.holdout) < 2:
        raise InputError(f"{run.store_path} holds no held-out images, without which copying cannot be told from chance")
    target = out or run.metrics
    beside = (lambda part: target.with_name(f"{target.stem}-{part}")) if out else (lambda part: path / part)
    if target.is_dir() or not target.parent.is_dir():  # found now, not after the sampling
        what = "is a folder" if target.is_dir() else f"cannot be made: there is no folder {target.parent}"
        raise InputError(f"--out {target} {what}; name a file in a folder that exists")
    if num is not None and num < 2:
        raise InputError(f"--num must be 2 or more, got {num}")
    seeds, stats = None, run.read_stats()
    trained = stats[-1]["nimg"] / 1000 if stats else None  # in kimg
    if samples is not None:
        pictures = load_pictures(samples)
        if num is not None:
            if num > len(pictures):
                raise InputError(f"--num {num}: {samples} holds {len(pictures)} pictures")
            pictures = pictures[:num]
    else:
        count = settings.evaluation.num if num is None else num
        denoiser = load(run.weights if run.weights.is_file() else path, device=device)
        with progress("sampling", count) as advance:
            pictures = sample(denoiser, range(count), on_batch=advance).numpy()
        seeds, trained = f"0-{count - 1}", denoiser.metadata["nimg"] / 1000
    if trained is not None and trained < settings.training.kimg:
        warn(f"{path} is not finished: {trained:g} of {settings.training.kimg:g} kimg; longer training copies more")
    e, train = settings.evaluation, np.asarray(store.train.images[:])
    metrics, neighbours = evaluate(
        pictures, train, np.asarray(store.holdout.images[:]),
        threshold=e.threshold, bootstrap=e.bootstrap, seed=e.seed, flips=e.flips or settings.data.xflip,
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
    write_json(target, metrics)
    overview = grid(pictures[:_GRID])
    save_png(beside("evaluation.png"), overview)
    save_png(beside("nearest.png"), gallery(pictures, neighbours, train, _PAIRS))
    report = RunReport(
        name=name or path.resolve().name,
        sigma_tn=settings.noise.sigma_tn or 0.0,
        metrics=metrics,
        stats=stats,
        grid=overview,
        pairs=nearest_pairs(pictures, neighbours, train, _PAIRS),
        per_sigma=_per_sigma(run),
    )
    write_report(beside("report.html"), [report], title=f"fastambient: {report.name}")
    return Evaluated(metrics, report)


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


def print_table(evaluated: Sequence[Evaluated]) -> None:
    """One row a run, to stdout."""
    table = Table()
    table.add_column("model")
    heads = ("sigma_tn", "FD pixel", "copy rate", "95 % interval", "held-out control", "nearest (L2)", "held-out (L2)")
    for head in heads:
        table.add_column(head, justify="right")
    for item in evaluated:
        m = item.metrics
        gap, near = m["memorization"]["gap_ratio"], m["memorization"]["nearest_distance"]
        low, high = gap["ci95"]
        table.add_row(
            item.report.name, f"{item.report.sigma_tn:g}", f"{m['frechet']['pixel']['value']:.3f}",
            f"{gap['rate']:.1%}", f"{low:.1%} - {high:.1%}", f"{gap['holdout_rate']:.1%}",
            f"{near['median']:.3f}", f"{near['holdout_median']:.3f}",
        )  # fmt: skip
    out = Console(width=None if Console().is_terminal else 120)
    out.print(table)
    m = evaluated[0].metrics
    fd = m["frechet"]["pixel"]
    counts = ", ".join(dict.fromkeys(str(item.metrics["counts"]["samples"]) for item in evaluated))
    out.print(
        f"FD pixel: Frechet distance of {counts} samples to the {fd['reference']}, in pixel space; the"
        f" {m['counts']['train']} training images have {fd['train_vs_reference']:.3f}. Copy rate: samples whose nearest"
        f" training image is {1 / m['memorization']['gap_ratio']['threshold']:.3g} times nearer than the second; the"
        f" control searches {m['memorization']['control']['images']} held-out images. Lower is better; less copying is"
        " no privacy guarantee.",
        soft_wrap=True,
        highlight=False,
    )
