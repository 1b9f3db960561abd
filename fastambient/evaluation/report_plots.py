"""The plots of report.html: inline SVG by matplotlib, in the page's own text colour, without names of users in it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fastambient.evaluation.metrics import Score

BINS = 24  # of a histogram; of gap ratios over [0, 1]: the usual threshold of 1/3 is an edge
_POINTS = 120  # at most so many points a loss curve: one mean a bin
_COLORS = ("#2f7ed8", "#d9652b", "#3c9d5d", "#a35cc0", "#b8860b", "#c2476f")  # contrast >= 3 on white and on #16181c
_DASHES = ("", "7 3", "2 2", "9 3 2 3", "12 4", "4 2 1 2")  # SVG dash arrays: curves differ by more than colour
_LINE = 1.8  # points, the width of a curve
_TEXT = "#010203"  # stands for the page's own text colour in a figure

Curve = tuple[Sequence[float], Sequence[float]]


def style(i: int) -> tuple[str, str]:
    """Colour and dash array of the i-th run; their pairs repeat after 36."""
    return _COLORS[i % len(_COLORS)], _DASHES[(i + i // len(_COLORS)) % len(_DASHES)]


def span(scores: Sequence[Score]) -> tuple[float, float]:
    """The axis of the values of one measure over several runs: [0, 1], or for similarities what is found, in 0.05."""
    if scores[0].closer == "low":
        return 0.0, 1.0
    lowest = min(float(each.min()) for s in scores for each in (s.values, s.control) if len(each))
    return max(-1.0, math.floor(min(lowest, scores[0].threshold) * 20) / 20), 1.0


def shares(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Per cent of the values in each bin, float64 [BINS]; values beyond the limits are in the outer bins."""
    inside = np.clip(values, *limits)
    return np.histogram(inside, BINS, limits)[0] * (100 / max(len(values), 1))


def histogram(score: Score, limits: tuple[float, float], highest: float, i: int) -> Markup:
    """Values of the i-th run: filled among the training images, outlined among the held-out ones.

    limits, highest : of the axes, of all runs, so that they can be compared
    """
    train, control = (shares(each, limits) for each in (score.values, score.control))
    low = score.closer == "low"

    def draw(axes: Any) -> None:
        edges = np.linspace(*limits, BINS + 1)
        axes.stairs(train, edges, fill=True, color=style(i)[0], alpha=0.6, linewidth=0)
        if len(score.control):
            axes.stairs(control, edges, color=_TEXT, linewidth=_LINE)
        axes.axvline(score.threshold, color=_TEXT, linewidth=1.2, linestyle=(0, (4, 3)))
        room = (limits[1] - limits[0]) * 0.02
        # A word that would run out of the axes stands on the other side of the line.
        left = low or limits[1] - score.threshold < 9 * room
        place = score.threshold + (-room if left else room)
        axes.text(place, 1.06 * highest, "copies" if low or not left else "copies \N{RIGHTWARDS ARROW}", color=_TEXT,
                  ha="right" if left else "left")  # fmt: skip
        axes.set_xlim(*limits)
        axes.set_ylim(0, 1.2 * highest)

    return _svg(draw, "gap ratio d1/d2" if low else "cosine similarity", "samples (%)", salt=f"{score.key} {i}")


def binned(stats: Sequence[dict[str, Any]]) -> Curve:
    """Loss over kimg, as means of consecutive steps: single steps scatter too much to be read."""
    rows = [s for s in stats if finite(s.get("loss"))]
    bins = np.array_split(np.arange(len(rows)), min(_POINTS, len(rows))) if rows else []
    return [rows[b[-1]]["nimg"] / 1000 for b in bins], [float(np.mean([rows[i]["loss"] for i in b])) for b in bins]


def points(rows: Sequence[dict[str, Any]], x: str, y: str) -> Curve:
    """A curve of the rows that have both numbers; ([], []) where none has."""
    some = [(float(row[x]), float(row[y])) for row in rows if finite(row.get(x)) and finite(row.get(y))]
    return [a for a, _ in some], [b for _, b in some]


def curves(
    given: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: bool = False,
    bands: Sequence[tuple[Sequence[float], Sequence[float], Sequence[float]]] = (),
    dotted: Sequence[Curve] = (),
    level: float | None = None,
    percent: bool = False,
) -> Markup | None:
    """Curves, one a run, without a legend: the template holds it, where names are escaped. None without any point.

    bands : (x, low, high), one a run, drawn behind its curve
    dotted : thin curves in the text's colour, such as controls
    level : a dashed horizontal line, such as "no gap"
    percent : y is a share and starts at 0
    """
    if not any(len(x) for x, _ in given):
        return None

    def draw(axes: Any) -> None:
        for i, (x, low, high) in enumerate(bands):
            axes.fill_between(x, low, high, color=style(i)[0], alpha=0.18, linewidth=0)
        for i, (x, y) in enumerate(given):
            color, dash = style(i)
            lengths = [float(v) / _LINE for v in dash.split()]  # matplotlib counts in line widths
            look: dict[str, Any] = {"color": color, "linewidth": _LINE, "linestyle": (0, lengths) if lengths else "-"}
            axes.plot(x, y, **look, marker="o" if marks else "", markersize=4)
        for x, y in dotted:
            axes.plot(x, y, color=_TEXT, linewidth=1.2, linestyle=(0, (1, 2)))
        if level is not None:
            axes.axhline(level, color=_TEXT, linewidth=1.2, linestyle=(0, (4, 3)))
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
            axes.yaxis.set_minor_formatter(lambda v, _: f"{v:.3g}" if _leading_digit(v) in (2, 5) else "")
        if percent:
            axes.set_ylim(0, max(axes.get_ylim()[1], 0.01))
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g}")

    return _svg(draw, x_label, y_label, salt=f"{x_label} {y_label}")


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


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _leading_digit(value: float) -> int:
    return int(f"{value:e}"[0])
