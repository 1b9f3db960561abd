"""Evaluate a run folder: sample it, measure, and write metrics.json, pictures and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastambient.console import progress, warn
from fastambient.errors import InputError
from fastambient.evaluation.metrics import check_sets, evaluate
from fastambient.evaluation.report import RunReport, fd_note, gallery, nearest_pairs, write_report
from fastambient.files import write_json
from fastambient.pictures import grid, load_pictures, save_png
from fastambient.sampling import load, sample
from fastambient.training.run import RunFolder

_PAIRS = 24  # of the gallery: the samples nearest to a training image
_CONTROL_PAIRS = 6  # the same samples' nearest held-out images, for comparison
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
    if settings.data.stream:
        raise InputError(f"{path} streams its images: nothing was held out, and no store says what it trained on")
    store = run.open_store(verify=False)
    if store.train.images is None or store.holdout.images is None:
        raise InputError(
            f"{run.store_path} was handed out: it holds no clean training image to look for copies of; who made it can"
            " evaluate samples of this run"
        )
    if len(store.holdout) < 2:
        raise InputError(
            f"{run.store_path} holds {len(store.holdout) or 'no'} held-out images, expected at least 2: without them"
            " copying cannot be told from chance; prepare it with a larger --holdout"
        )
    e = settings.evaluation
    flips = e.flips or settings.data.xflip
    train, holdout = (images[:] for images in (store.train.images, store.holdout.images))
    check_sets(train, holdout, flips=flips)
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
    metrics, neighbours, control = evaluate(
        pictures, train, holdout,
        threshold=e.threshold, bootstrap=e.bootstrap, seed=e.seed, flips=flips,
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
        control_pairs=nearest_pairs(pictures, control, holdout, _CONTROL_PAIRS),
        ratios=neighbours.ratio,
        control_ratios=control.ratio,
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
    """One row a run, to stdout, within 80 columns, and what its figures mean."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", overflow="fold")
    heads = ("sigma_tn", "FD to\nheld-out", "copy rate (95 %)", "held-out\ncontrol", "median L2 to\ntrain/held-out")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for item in evaluated:
        m = item.metrics["memorization"]
        gap, low, high = m["gap_ratio"], *(100 * side for side in m["gap_ratio"]["ci95"])
        table.add_row(
            item.report.name, f"{item.report.sigma_tn:g}", f"{item.metrics['frechet']['pixel']['value']:.3f}",
            f"{100 * gap['rate']:.1f} % ({low:.1f} - {high:.1f})", f"{100 * gap['holdout_rate']:.1f} %",
            f"{m['control']['train_median']:.2f} / {m['nearest_distance']['holdout_median']:.2f}",
        )  # fmt: skip
    out = Console(width=None if Console().is_terminal else 120, highlight=False)
    out.print(table)
    for line in _notes([item.metrics for item in evaluated], [item.report.name for item in evaluated]):
        out.print(line, soft_wrap=not out.is_terminal, markup=False)


def _notes(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """What the figures are, one line each; the runs share their data, so the first one's counts stand for all."""
    m = metrics[0]
    fd, searched, gap = m["frechet"]["pixel"], m["memorization"]["control"]["images"], m["memorization"]["gap_ratio"]
    counts = ", ".join(dict.fromkeys(str(each["counts"]["samples"]) for each in metrics))
    lines = [
        f"FD: Frechet distance of {counts} samples to the {fd['reference']}, in pixel space; the"
        f" {m['counts']['train']} training images have {fd['train_vs_reference']:.3f}.",
        f"Copy rate: samples whose nearest of {m['counts']['train_distinct']} training images is"
        f" {1 / gap['threshold']:.3g} times nearer than the second; the control searches {searched} held-out images.",
        f"Median L2: distance of a sample to the nearest of {searched} training and of {searched} held-out images:"
        " equally many, because the nearest of more images lies nearer.",
    ]
    if searched < m["counts"]["train_distinct"]:
        rates = (f"{name} {100 * each['memorization']['control']['train_rate']:.1f} %"
                 for name, each in zip(names, metrics, strict=True))  # fmt: skip
        lines.insert(2, f"Against as many training images as the control's, the copy rate is: {', '.join(rates)}.")
    lines += dict.fromkeys(note for each in metrics if (note := fd_note(each)))
    return [*lines, "Lower FD and copy rates are better; less copying is no privacy guarantee."]
