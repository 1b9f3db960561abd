"""audits.png and audits.svg: copying and quality against images seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastambient.plots import save_figure

COPIES, QUALITY, CONTROL = "#d9652b", "#2f7ed8", "#555555"


def plot_audits(path: Path, rows: Sequence[dict[str, Any]], *, rate: float | None = None) -> None:
    """Above the copy rate with its 95 % interval and the held-out control, below the Frechet distance.

    Parameters
    ----------
    path : without suffix
    rows : of audits.jsonl, ascending nimg; at least one
    rate : of the stop rule, if it is on
    """
    from matplotlib.figure import Figure

    from fastambient.evaluation.quality import distance_name, spaces

    kimg = [row["kimg"] for row in rows]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    low, high = ([100 * row["ci95"][side] for row in rows] for side in (0, 1))
    above.fill_between(kimg, low, high, color=COPIES, alpha=0.2, linewidth=0, label="95 % interval")
    above.plot(kimg, [100 * row["rate"] for row in rows], color=COPIES, marker="o", markersize=3, label="copies")
    control = [100 * row["holdout_rate"] for row in rows]
    above.plot(kimg, control, color=CONTROL, linestyle="--", marker="s", markersize=3, label="held-out control")
    if rate is not None:
        limit = [each + 100 * rate for each in control]
        above.plot(kimg, limit, color=CONTROL, linestyle=":", label=f"control + {100 * rate:g} %: stop above")
    above.set_ylabel("samples (%)")
    above.set_ylim(bottom=0)
    above.legend(frameon=False, fontsize="small")
    below.plot(kimg, [row["fd"] for row in rows], color=QUALITY, marker="o", markersize=3)
    below.set_title(distance_name(rows, "pixel"), fontsize="small", loc="left")  # what it warns of is long
    below.set_ylabel(f"FD ({spaces(rows)}),\nlower is better")
    below.set_xlabel("images seen (kimg)")
    for axes in (above, below):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
