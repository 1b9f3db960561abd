"""report.html: one file, no network, that says what was measured, with counts and limits, and shows the pictures."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fastambient.evaluation.frechet import bias_note
from fastambient.evaluation.memorization import Neighbours
from fastambient.files import write_bytes
from fastambient.pictures import GAP_VALUE, as_pictures, enlarge, grid, png_bytes

_BINS = 24  # of the gap ratios, over [0, 1]: the usual threshold of 1/3 is an edge
_POINTS = 120  # at most so many points a loss curve: one mean a bin
_COLORS = ("#2f7ed8", "#d9652b", "#3c9d5d", "#a35cc0", "#b8860b", "#c2476f")  # contrast >= 3 on white and on #16181c
_DASHES = ("", "7 3", "2 2", "9 3 2 3", "12 4", "4 2 1 2")  # SVG dash arrays: curves differ by more than colour
_MARGIN = 4  # pixels around a pair of the gallery picture; one remains on each side of the seam
_LINE = 1.8  # points, the width of a curve
_TEXT = "#010203"  # stands for the page's own text colour in a figure


@dataclass(frozen=True)
class Pairs:
    """Samples beside their nearest images (mirrored where the mirror image is the nearer one).

    samples, nearest: uint8 [K, C, H, W]; ratio, distance: float64 [K] (gap ratio d1/d2 and d1), ascending ratio;
    index: int64 [K], positions of the nearest in the set that was searched.
    """

    samples: np.ndarray
    nearest: np.ndarray
    ratio: np.ndarray
    distance: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class RunReport:
    """One run as the report shows it.

    metrics: as `evaluate` returns them.
    stats: the objects of stats.jsonl (``nimg``, ``loss``).
    grid: uint8 [C, H, W], unselected samples (``pictures.grid(samples)``).
    pairs: of `nearest_pairs` among the training images.
    control_pairs: of `nearest_pairs` among the control's held-out images.
    ratios, control_ratios: float64 [N], the gap ratios of all samples among the training and the held-out images.
    per_sigma: objects with ``sigma`` and ``loss``, ascending sigma; empty where it was not measured.
    """

    name: str
    sigma_tn: float
    metrics: dict[str, Any]
    stats: Sequence[dict[str, Any]]
    grid: np.ndarray
    pairs: Pairs
    control_pairs: Pairs
    ratios: np.ndarray
    control_ratios: np.ndarray
    per_sigma: Sequence[dict[str, Any]] = field(default_factory=tuple)


def nearest_pairs(samples: Any, neighbours: Neighbours, images: Any, count: int) -> Pairs:
    """The `count` samples (or all, if there are fewer) with the lowest gap ratio, lowest first.

    Parameters
    ----------
    samples, images: uint8 [N, C, H, W] and [M, C, H, W]; the places of `neighbours` are those in `images`.
    """
    samples, images = as_pictures(samples, "samples"), as_pictures(images, "images")
    order = np.argsort(neighbours.ratio, kind="stable")[:count]
    index = neighbours.index[order, 0]
    nearest = images[index]
    mirrored = neighbours.flipped[order]
    nearest[mirrored] = nearest[mirrored][..., ::-1]
    return Pairs(samples[order], nearest, neighbours.ratio[order], neighbours.distance[order, 0], index)


def gallery(samples: Any, neighbours: Neighbours, train: Any, count: int) -> np.ndarray:
    """One picture uint8 [C, H, W] of `nearest_pairs`: sample left, its nearest training image right."""
    pairs = nearest_pairs(samples, neighbours, train, count)
    margin = ((0, 0), (0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    left, right = (np.pad(enlarge(side), margin, constant_values=GAP_VALUE) for side in (pairs.samples, pairs.nearest))
    return grid(np.concatenate([left[..., : -_MARGIN + 1], right[..., _MARGIN - 1 :]], axis=3), scale=1)


def write_report(path: Path, runs: Sequence[RunReport], *, title: str) -> None:
    """Write one self-contained HTML file about one or more runs. `title` and the runs' names are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, number=_number, png=_png)
    loss = [_binned([s for s in run.stats if _finite(s.get("loss"))]) for run in runs]
    per_sigma = [([p["sigma"] for p in run.per_sigma], [p["loss"] for p in run.per_sigma]) for run in runs]
    shares = [(_shares(run.ratios), _shares(run.control_ratios)) for run in runs]
    highest = max(float(each.max()) for pair in shares for each in pair)
    html = environment.get_template("report.html").render(
        title=title,
        runs=runs,
        summary=[_sentence(run) for run in runs],
        comparison=_compare(runs),
        notes=list(dict.fromkeys(note for run in runs if (note := fd_note(run.metrics)))),
        histograms=[
            _histogram(*shares[i], run.metrics["memorization"]["gap_ratio"]["threshold"], highest, i)
            for i, run in enumerate(runs)
        ],
        styles=[_style(i) for i in range(len(runs))],
        loss_plot=_plot(loss, "images seen (kimg)", "loss", log_x=False),
        sigma_plot=_plot(per_sigma, "noise level sigma", "loss", log_x=True),
        settings=_settings([run.metrics["settings"] for run in runs]),
    )
    write_bytes(Path(path), html.encode())


def fd_note(metrics: dict[str, Any]) -> str:
    """`bias_note` on the Frechet distance of a metrics.json."""
    counts = metrics["counts"]
    return bias_note(counts["samples"], counts["holdout"], metrics["frechet"]["pixel"]["dimensions"])


def _sentence(run: RunReport) -> dict[str, str]:
    """What was found about one run, in plain words."""
    m, counts = run.metrics["memorization"], run.metrics["counts"]
    gap, control = m["gap_ratio"], m["control"]
    low, high = gap["ci95"]
    rate = _percent(gap["rate"])
    found = (
        f"{gap['copies']:,} of {counts['samples']:,} samples ({rate}) are copies: their distance to one"
        f" of the {counts['train']:,} training images is less than {_number(gap['threshold'])} times that to any other."
    )
    found += f" The 95 % interval over samples is {_percent(low)} to {_percent(high)}."
    against = f"Against {control['images']:,} held-out images, which the model never saw,"
    against += f" the rate is {_percent(gap['holdout_rate'])}"
    if control["images"] < counts["train_distinct"]:
        against += f" (against as many training images: {_percent(control['train_rate'])})"
    return {"found": found, "control": against + "."}


def _compare(runs: Sequence[RunReport]) -> str:
    """How the lowest and the highest copy rate differ; no claim where their intervals touch."""
    if len(runs) < 2:
        return ""
    ordered = sorted(runs, key=lambda run: run.metrics["memorization"]["gap_ratio"]["rate"])
    low, high = (run.metrics["memorization"]["gap_ratio"] for run in (ordered[0], ordered[-1]))
    first, last = (f"{run.name} (sigma_tn {_number(run.sigma_tn)})" for run in (ordered[0], ordered[-1]))
    distances = " and ".join(_number(run.metrics["frechet"]["pixel"]["value"]) for run in (ordered[0], ordered[-1]))
    if low["ci95"][1] >= high["ci95"][0]:
        text = f"No difference in copying is shown: the intervals of {first} and {last} overlap."
    else:
        text = (
            f"{first} copies less than {last}: {_percent(low['rate'])} against {_percent(high['rate'])} of the samples."
        )
    return f"{text} Their Frechet distances to the held-out images are {distances}, in this order (lower is better)."


def _binned(stats: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Loss over kimg, as means of consecutive steps: single steps scatter too much to be read."""
    bins = np.array_split(np.arange(len(stats)), min(_POINTS, len(stats))) if stats else []
    kimg = [stats[b[-1]]["nimg"] / 1000 for b in bins]
    return kimg, [float(np.mean([stats[i]["loss"] for i in b])) for b in bins]


def _style(i: int) -> tuple[str, str]:
    """Colour and dash array of the i-th run; their pairs repeat after 36."""
    return _COLORS[i % len(_COLORS)], _DASHES[(i + i // len(_COLORS)) % len(_DASHES)]


def _shares(ratios: np.ndarray) -> np.ndarray:
    """Per cent of the samples in each bin of the gap ratio, float64 [_BINS]."""
    return np.histogram(ratios, _BINS, (0.0, 1.0))[0] * (100 / len(ratios))


def _histogram(train: np.ndarray, control: np.ndarray, threshold: float, highest: float, i: int) -> Markup:
    """Gap ratios of the i-th run: filled among the training images, outlined among the held-out ones."""

    def draw(axes: Any) -> None:
        edges = np.linspace(0.0, 1.0, _BINS + 1)
        axes.stairs(train, edges, fill=True, color=_style(i)[0], alpha=0.6, linewidth=0)
        axes.stairs(control, edges, color=_TEXT, linewidth=_LINE)
        axes.axvline(threshold, color=_TEXT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(threshold - 0.02, 1.06 * highest, "copies", color=_TEXT, ha="right")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.2 * highest)  # of all runs: their heights can be compared

    return _svg(draw, "gap ratio d1/d2", "samples (%)", salt=f"ratios {i}")


def _plot(
    curves: Sequence[tuple[list[float], list[float]]], x_label: str, y_label: str, *, log_x: bool
) -> Markup | None:
    """Curves without a legend: the template holds it, where names are escaped. None where there is no point."""
    if not any(x for x, _ in curves):
        return None

    def draw(axes: Any) -> None:
        for i, (x, y) in enumerate(curves):
            color, dash = _style(i)
            lengths = [float(v) / _LINE for v in dash.split()]  # matplotlib counts in line widths
            style: dict[str, Any] = {"color": color, "linewidth": _LINE, "linestyle": (0, lengths) if lengths else "-"}
            axes.plot(x, y, **style, marker="o" if log_x else "", markersize=4)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda v, _: _number(v))
        axes.yaxis.set_minor_formatter(lambda v, _: _number(v) if _leading_digit(v) in (2, 5) else "")
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda v, _: _number(v))

    return _svg(draw, x_label, y_label, salt=x_label)


def _svg(draw: Callable[[Any], None], x_label: str, y_label: str, *, salt: str) -> Markup:
    """What `draw` does to matplotlib's axes, as inline SVG in the page's own text colour.

    salt : differs from figure to figure of a page, as the names that one refers to inside of it must
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.2, color=_TEXT)
        for spine in axes.spines.values():
            spine.set_color(_TEXT)
        axes.xaxis.label.set_color(_TEXT)
        axes.yaxis.label.set_color(_TEXT)
        axes.tick_params(which="both", colors=_TEXT)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = re.sub(r'<g id="[^"]*"', "<g", buffer.getvalue())  # the names of groups stand in every figure
    return Markup(svg[svg.index("<svg") :].replace(_TEXT, "currentColor"))


def _settings(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows {name, values, differs} over the runs' settings, nested ones as section.name."""
    flat = [_flat(s) for s in settings]
    names = list(dict.fromkeys(name for f in flat for name in f))
    rows = [(name, [str(f.get(name, "-")) for f in flat]) for name in names]
    return [{"name": name, "values": values, "differs": len(set(values)) > 1} for name, values in rows]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _png(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}\N{NO-BREAK SPACE}%"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _leading_digit(value: float) -> int:
    return int(f"{value:e}"[0])
