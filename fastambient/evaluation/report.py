"""report.html: one file, no network, that says what was measured, with counts and limits, and shows the pictures."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from fastambient.errors import InputError
from fastambient.evaluation import report_figures as figures
from fastambient.evaluation import report_plots as plots
from fastambient.evaluation import sentences
from fastambient.evaluation.frechet import bias_note
from fastambient.evaluation.metrics import Evaluation
from fastambient.evaluation.quality import distance_name, spaces
from fastambient.evaluation.report_gallery import gallery_data, is_copy, most_copied, nearest_pairs, reduced
from fastambient.files import write_bytes
from fastambient.pictures import grid, png_bytes

__all__ = ["RunReport", "SweepReport", "fd_note", "nearest_pairs", "write_report"]

_GRID = 64  # unselected samples of a run
_CONTROL_PAIRS = 6  # samples beside their nearest held-out images


@dataclass(frozen=True)
class RunReport:
    """One run as the report shows it.

    sigma_tn: None for pictures from elsewhere.
    evaluation: as `evaluate` returns it.
    stats: the objects of stats.jsonl (``nimg``, ``loss``).
    per_sigma: objects with ``sigma`` and ``loss``, ascending sigma; empty where it was not measured.
    timeline: the rows of audits.jsonl (``kimg``, ``rate``, ``ci95``, ``holdout_rate``, ``fd``), ascending kimg.
    """

    name: str
    sigma_tn: float | None
    evaluation: Evaluation
    stats: Sequence[dict[str, Any]] = ()
    per_sigma: Sequence[dict[str, Any]] = ()
    timeline: Sequence[dict[str, Any]] = ()

    @property
    def title(self) -> str:
        return self.name if self.sigma_tn is None else f"{self.name} (sigma_tn {sentences.number(self.sigma_tn)})"

    @property
    def metrics(self) -> dict[str, Any]:
        return self.evaluation.metrics


@dataclass(frozen=True)
class SweepReport:
    """What a sweep found, above its runs: the chosen sigma_tn, why and by what rule, a table, and the curves
    as PNG: quality against copying and, where runs were audited while they trained, both over images seen."""

    chosen: str
    reason: str
    rule: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    curve: bytes
    training: bytes | None = None


def write_report(path: Path, runs: Sequence[RunReport], *, title: str, sweep: SweepReport | None = None) -> None:
    """Write one self-contained HTML file about one or more runs, or a sweep of them. All text is escaped.

    Raises
    ------
    InputError
        No run.
    """
    if not runs:
        raise InputError("a report of 0 runs, expected at least 1")
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=sentences.percent, number=sentences.number, keep=_keep, png=_png)
    look, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    numbers, pictures = zip(*(gallery_data(run.evaluation) for run in runs), strict=True)
    data = [{"name": run.name, **numbers[i]} for i, run in enumerate(runs)]
    metrics = [run.metrics for run in runs]
    html = environment.get_template("report.html").render(
        title=title,
        style=Markup(look),
        script=Markup(script),
        # Nothing but this one script can run, whatever a name or a path holds.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=runs,
        summary=[sentences.summary(m) for m in metrics],
        sweep=sweep,
        curve=None if sweep is None else _data_uri(sweep.curve),
        over=None if sweep is None or sweep.training is None else _data_uri(sweep.training),
        # Of a sweep's runs the lowest and the highest say less than its own choice.
        comparison="" if sweep else sentences.compare([(run.title, run.metrics) for run in runs]),
        notes=list(dict.fromkeys(note for m in metrics for note in [*figures.notes(m), fd_note(m)] if note)),
        table=figures.table(metrics),
        styles=[plots.style(i) for i in range(len(runs))],
        histograms=_histograms(runs),
        timeline=_timeline(runs),
        training=_training(runs),
        arrows={"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"},
        grids=[grid(reduced(run.evaluation.samples[:_GRID])) for run in runs],
        shown=_GRID,
        copied=[most_copied(run.evaluation) for run in runs],
        controls=[_control(run.evaluation) for run in runs],
        data=data,
        sheets=[(f"{i}-{name}-{j}", text) for i, of in enumerate(pictures) for name, s in of.items()
                for j, text in enumerate(s.files)],
        settings=_settings([m.get("settings") or {} for m in metrics]),
    )  # fmt: skip
    write_bytes(Path(path), html.encode(errors="replace"))  # a path may hold bytes that are no UTF-8


def fd_note(metrics: dict[str, Any]) -> str:
    """`bias_note` on the Frechet distance of a metrics.json; "" where there is none."""
    counts, pixel = metrics["counts"], sentences.at(metrics, "frechet/pixel") or {}
    if pixel.get("value") is None or not counts.get("holdout"):
        return ""
    return bias_note(counts["samples"], counts["holdout"], pixel["dimensions"])


def _histograms(runs: Sequence[RunReport]) -> list[list[dict[str, Any]]]:
    """For each measure a plot a run that has it, on the same axes."""
    groups = []
    for key in dict.fromkeys(s.key for run in runs for s in run.evaluation.scores):
        having = [(i, s) for i, run in enumerate(runs) for s in run.evaluation.scores if s.key == key]
        limits = plots.span([s for _, s in having])
        highest = max(plots.shares(v, limits).max() for _, s in having for v in (s.values, s.control))
        group = []
        for i, s in having:
            rate, control = (is_copy(v, s).mean() if len(v) else None for v in (s.values, s.control))
            svg = plots.histogram(s, limits, float(highest), i)
            group.append({"run": runs[i], "score": s, "rate": rate, "control": control, "svg": svg})
        groups.append(group)
    return groups


def _timeline(runs: Sequence[RunReport]) -> dict[str, Markup | None]:
    """Copy rate with its interval, and Frechet distance, over the images seen, where audits were made on the way."""
    bands = []
    for run in runs:
        rows = [r for r in run.timeline if plots.finite(r.get("kimg")) and r.get("ci95")]
        bands.append(([r["kimg"] for r in rows], [r["ci95"][0] for r in rows], [r["ci95"][1] for r in rows]))
    kimg = "images seen (kimg)"
    rate, control, fd = (
        [plots.points(run.timeline, "kimg", y) for run in runs] for y in ("rate", "holdout_rate", "fd")
    )
    measured = [row for run in runs for row in run.timeline if plots.finite(row.get("fd"))]
    return {
        "rate": plots.curves(rate, kimg, "copies (%)", marks=True, bands=bands, dotted=control, percent=True),
        "fd": plots.curves(fd, kimg, f"{distance_name(measured, 'pixel')}, {spaces(measured)}", marks=True),
    }


def _training(runs: Sequence[RunReport]) -> dict[str, Markup | None]:
    sigma = "noise level sigma"
    per_sigma = [plots.points(run.per_sigma, "sigma", "loss") for run in runs]
    levels = [run.metrics.get("denoising_gap") or () for run in runs]
    gaps = [plots.points(rows, "sigma", "gap") for rows in levels]
    known = [[row for row in rows if row.get("gap_ci95")] for rows in levels]
    bands = [
        ([r["sigma"] for r in rows], [r["gap_ci95"][0] for r in rows], [r["gap_ci95"][1] for r in rows])
        for rows in known
    ]
    return {
        "loss": plots.curves([plots.binned(run.stats) for run in runs], "images seen (kimg)", "loss", log_y=True),
        "sigma": plots.curves(per_sigma, sigma, "loss", log_x=True, log_y=True, marks=True),
        "gap": plots.curves(
            gaps, sigma, "held-out error / training error", log_x=True, marks=True, level=1.0, bands=bands
        ),
    }


def _control(evaluation: Evaluation) -> dict[str, Any] | None:
    """The samples that are most alike to held-out images, by the first measure: what chance looks like."""
    pairs = nearest_pairs(evaluation, _CONTROL_PAIRS, control=True)
    if not len(pairs.value):
        return None
    score = evaluation.scores[0]
    shown = [reduced(images) for images in (pairs.samples, pairs.nearest)]
    return {"pairs": pairs, "shown": shown, "score": score, "beyond": is_copy(pairs.value, score)}


def _settings(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows {name, values, differs} over the runs' settings, nested ones as section.name."""
    flat = [_flat(s) for s in settings]
    names = list(dict.fromkeys(name for f in flat for name in f))
    rows = [(name, ["-" if f.get(name) is None else str(f[name]) for f in flat]) for name in names]
    return [{"name": name, "values": values, "differs": len(set(values)) > 1} for name, values in rows]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _keep(text: str) -> Markup:
    """The text, escaped; no interval or "held-out" is broken at its dash."""
    return Markup(re.sub(r"held-out|[\d.]+\u2013[\d.]+\xa0%", r'<span class="keep">\g<0></span>', str(escape(text))))


def _png(image: np.ndarray) -> str:
    return _data_uri(png_bytes(image))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
