"""The figures of a sweep: quality against copying (Fig. 1 of Shah et al., 2025) and both against images seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastambient.evaluation.quality import distance_name, spaces
from fastambient.plots import save_figure
from fastambient.sweep.results import KINDS, STOPPED

_STYLE = {  # colour and marker: curves differ by more than colour
    "edm": ("#2f7ed8", "o"), "ambient": ("#2f7ed8", "o"), "fresh-noise": ("#d9652b", "^"),
    "weight-decay": ("#3c9d5d", "s"), "early-stop": ("#a35cc0", "D"),
    "ambient-stop": ("#17a2a2", "v"),
}  # fmt: skip


def plot_pareto(path: Path, summary: dict[str, Any]) -> None:
    """Copy rate (controlled) rightwards, Frechet distance upwards: the lower left is better.

    Means over seeds with their intervals, every seed as a small point; EDM and the ambient models are one line in the
    order of sigma_tn, the baselines other markers.

    Parameters
    ----------
    path : without suffix
    summary : of `summarize`
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    rows = summary["configurations"]
    line = [c for c in rows if c["kind"] in ("edm", "ambient")]
    axes.plot(
        [100 * c["excess"]["mean"] for c in line], [c["fd"]["mean"] for c in line], color=_STYLE["ambient"][0],
        linewidth=1.2, zorder=1,
    )  # fmt: skip
    named: set[str] = set()
    for c in rows:
        color, marker = _STYLE[c["kind"]]
        group = "over sigma_tn (0: EDM)" if c["kind"] in ("edm", "ambient") else KINDS[c["kind"]]
        x, y = 100 * c["excess"]["mean"], c["fd"]["mean"]
        axes.errorbar(
            x, y, xerr=_error(c["excess"], 100), yerr=_error(c["fd"], 1), color=color, marker=marker, markersize=7,
            capsize=2, elinewidth=0.8, linestyle="", label=None if group in named else group, zorder=3,
        )  # fmt: skip
        named.add(group)
        if c["kind"] in ("edm", "ambient", "fresh-noise", "ambient-stop"):
            axes.annotate(f"{c['sigma_tn']:g}", (x, y), xytext=(6, 5), textcoords="offset points", color=color)
    for cell in summary["cells"]:
        color, marker = _STYLE[cell["kind"]]
        axes.plot(100 * cell["excess"], cell["fd"], color=color, marker=marker, markersize=3, alpha=0.45, zorder=2)
    axes.axvline(100 * summary["chosen"]["target"], color="#777777", linewidth=0.9, linestyle=":")
    space = summary["cells"][0]["fd_space"]
    axes.set_xlabel("copies less those of the held-out control (% of samples)")
    label = _distance(summary["cells"], space)
    axes.set_ylabel(label, fontsize="small" if "\n" in label else None)
    seeds = max(len(c["seeds"]) for c in rows)
    bars = "bars: 95 % over seeds" if seeds > 1 else "one seed"
    axes.set_title(f"lower left is better; {bars}; dotted: target", fontsize="small")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def plot_training(path: Path, summary: dict[str, Any]) -> bool:
    """Copies (controlled) and Frechet distance over images seen, and the distance over copies, of the audits that every
    run made while it trained: a curve a configuration, the mean over its seeds, in a band from the lowest to the
    highest seed. What the rule stopped is EDM or ambient up to its end and has none.

    Returns
    -------
    Whether there were audits to draw: nothing is written without.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs = [c for c in summary["cells"] if c["kind"] not in STOPPED and len(c.get("audits") or ()) > 1]
    if not runs:
        return False
    figure = Figure(figsize=(10.0, 8.4), layout="constrained")
    panels = list(figure.subplot_mosaic([["copies", "distance"], ["both", "both"]]).values())
    levels = sorted({c["sigma_tn"] for c in runs if c["sigma_tn"]})
    copying: list[float] = []
    for kind, level in dict.fromkeys((c["kind"], c["sigma_tn"]) for c in runs):
        each = [c["audits"] for c in runs if (c["kind"], c["sigma_tn"]) == (kind, level)]
        at = sorted(set.intersection(*({a["kimg"] for a in audits} for audits in each)))
        shade = 0.45 + 0.5 * (levels.index(level) + 1) / len(levels) if level else 0.0
        map_name, dashes = {"ambient": ("Blues", "-"), "fresh-noise": ("Oranges", "--")}.get(kind, ("", ""))
        color = colormaps[map_name](shade) if map_name else _STYLE["weight-decay"][0] if kind != "edm" else "#222222"
        label = KINDS[kind] + (f" {level:g}" if level else "")
        style: dict[str, Any] = {
            "color": color, "linestyle": dashes or "-.", "marker": _STYLE[kind][1], "markersize": 3, "label": label,
        }  # fmt: skip
        means = {}
        for axes, key, scale in zip(panels, ("excess", "fd"), (100, 1), strict=False):
            seeds = [[scale * a[key] for a in audits if a["kimg"] in at] for audits in each]
            means[key] = mean = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
            axes.plot(at, mean, **style)
            if len(each) > 1:
                low, high = ([edge(values) for values in zip(*seeds, strict=True)] for edge in (min, max))
                axes.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
        panels[2].plot(means["excess"], means["fd"], **style)
        copying += [fd for rate, fd in zip(means["excess"], means["fd"], strict=True) if rate > 0]
    rows = [a for c in runs for a in c["audits"]]
    seen, copies, distance = (
        "images seen (kimg)",
        "copies less those of the control (% of samples)",
        _distance(rows, spaces(rows)),
    )
    panels[2].axvline(100 * summary["chosen"]["target"], color="#777777", linewidth=0.9, linestyle=":")
    for axes, (x, y) in zip(panels, ((seen, copies), (seen, distance), (copies, distance)), strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y, fontsize="small" if "\n" in y else None)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    if copying:  # what was there before any copies is above: the curves lie close where they matter
        bottom = panels[2].get_ylim()[0]
        panels[2].set_ylim(top=max(copying) + 0.1 * (max(copying) - bottom))
    panels[0].set_ylim(top=max(panels[0].get_ylim()[1], 1.0))
    panels[0].legend(frameon=False, fontsize="small")
    save_figure(path, figure)
    return True


def _distance(rows: Sequence[dict[str, Any]], space: str) -> str:
    """The distance's name and the embedder's; what it warns of, which is long, on a line below."""
    name, _, warning = distance_name(rows, space).partition(" (")
    return f"{name} ({space})" + (f"\n({warning}" if warning else "")


def _error(found: dict[str, Any], scale: float) -> list[list[float]] | None:
    if found["interval"] is None:
        return None
    low, high = found["interval"]
    return [[scale * (found["mean"] - low)], [scale * (high - found["mean"])]]
