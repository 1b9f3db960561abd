"""What a sweep says: each cell's numbers, means over seeds, and the sigma_tn that a stated rule chooses.

The rule: the smallest sigma_tn whose mean controlled copy rate is at most TARGET, among those whose mean Frechet
distance is at most (1 + WITHIN) times the best mean of all sigma_tn, plain EDM included. Controlled: the rate among the
training images less that among held-out images, equally many where there are as many. The smallest, because noise
that is not needed costs detail, and too much of it turns back into EDM. TARGET 0.05: with 1,000 samples a rate of 5 %
has a 95 % interval of +- 1.4 %, so that it can be told from 0, and at most one sample in twenty is a copy; WITHIN
0.10: about what the distance differs between seeds in small sets. Where plain EDM meets it, 0 is chosen: it does not
copy at this length. Where none meets it, none is chosen, and the summary says what was missed. Models whose samples
look like no real image copy nothing either, and are never chosen.

Where every run was audited while it trained, a second question is answered: how good is each at the audit of the least
distance among those that copy at most TARGET, and how good where copying passes TARGET. That is early stopping for all,
and the latter at the same copying.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from scipy.stats import t as student

from fastambient.evaluation.memorization import bootstrap_interval
from fastambient.evaluation.quality import distance_name, spaces
from fastambient.evaluation.sentences import doubt
from fastambient.sweep.audited import best_audit, passing
from fastambient.training import checkpoint
from fastambient.training.audits import excess
from fastambient.training.ending import seconds_taken_over
from fastambient.training.run import RunFolder

SAMPLES, MEASURED = "samples.npz", "measured.json"  # of a cell's run folder
TARGET, WITHIN = 0.05, 0.10
STOPPED = ("early-stop", "ambient-stop")  # EDM and ambient again, up to where the stop rule ended them
_OF_AN_AUDIT = ("kimg", "samples", "fd", "embedder", "dimensions", "references")
_NORMAL = 1.96  # standard deviations on either side of 95 %
_FAR = 2.0  # times the training images' own distance: from there on no model has learnt the set yet
KINDS = {
    "edm": "EDM", "ambient": "ambient", "fresh-noise": "fresh noise", "weight-decay": "weight decay",
    "early-stop": "early stop", "ambient-stop": "ambient, stopped",
}  # fmt: skip


def marker(num: int, features: str) -> dict[str, Any]:
    """How samples.npz was measured: measured.json, beside what came of it (``metrics``)."""
    return {"num": num, "features": features}


def result_of_cell(kind: str, sigma_tn: float, seed: int, path: Path, features: str | None) -> dict[str, Any]:
    """A row of sweep.json from a run's measured.json and weights.

    seconds : that this run trained, without the beginning that it took over from a stopped one
    precision : "fp32" or "bf16", of its training
    fd : of `features` where metrics.json has it, else in pixel space; `fd_space` says which
    kimg : images that the weights have seen; below `kimg_trained` where the stop rule went back
    train_fd : of the training images themselves; equal_counts : of as many samples and training images
    doubt : why a low copy rate says nothing here, "" where it does
    audits : kimg, samples, excess and fd (in the features of `embedder`) of each audit while it trained
    """
    metrics = json.loads((path / MEASURED).read_text())["metrics"]
    m, distances = metrics["memorization"], metrics["frechet"]
    space = features if features in distances else "pixel"
    with safe_open(path / "model.safetensors", "pt") as weights:
        nimg = json.loads(weights.metadata()["nimg"])
    state = checkpoint.last_state(RunFolder(path).checkpoints) or {}
    seconds = state.get("seconds", 0.0) - seconds_taken_over(RunFolder(path))
    return {
        "name": path.name, "kind": kind, "sigma_tn": sigma_tn, "seed": seed,
        "kimg": nimg / 1000, "kimg_trained": state.get("nimg", nimg) / 1000,
        "stopped_when_copying": state.get("ended") == "copying", "seconds": round(seconds, 1),
        "precision": RunFolder(path).read_settings().training.precision,
        "samples": metrics["counts"]["samples"], "rate": m["gap_ratio"]["rate"], "ci95": m["gap_ratio"]["ci95"],
        "train_rate": m["control"]["train_rate"], "holdout_rate": m["gap_ratio"]["holdout_rate"],
        "excess": m["gap_ratio"]["rate"] - m["gap_ratio"]["holdout_rate"], "excess_ci95": m["control"]["excess_ci95"],
        "fd": distances[space]["value"], "fd_space": space, "dimensions": distances[space]["dimensions"],
        "references": metrics["counts"]["holdout"], "train_images": metrics["counts"]["train"],
        "train_fd": distances[space]["train_vs_reference"], "equal_counts": distances[space]["equal_counts"],
        "doubt": doubt(metrics), "audits": [
            {n: row.get(n) for n in _OF_AN_AUDIT} | {"excess": excess(row)}
            for row in RunFolder(path).read_audits()
        ],
    }  # fmt: skip


def cell_line(row: dict[str, Any]) -> str:
    """A cell for people."""
    early = f", weights of {row['kimg']:g} kimg" if row["stopped_when_copying"] else ""
    return (
        f"{row['name']}: {100 * row['rate']:.1f} % copies, control {100 * row['holdout_rate']:.1f} %,"
        f" {distance_name([row], row['fd_space'])} {row['fd']:.4g}{early}"
    )


def over_seeds(values: Sequence[float], known: Sequence[float] | None = None) -> dict[str, Any]:
    """{"mean", "interval"}: Student's 95 % interval of the mean over seeds, None for a single one.

    known : standard deviations that each value has by its measurement alone. Few seeds may agree by luck, closer than
        they can be measured: the interval is then that of these deviations, the wider one.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "interval": None}
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    if known is not None:
        half = max(half, float(_NORMAL * math.sqrt(np.square(known).sum()) / n))
    return {"mean": mean, "interval": [mean - half, mean + half]}


def summarize(cells: Sequence[dict[str, Any]], *, target: float, within: float) -> dict[str, Any]:
    """The content of sweep.json without its settings: configurations (kind and sigma_tn) with means and intervals over
    seeds, the chosen sigma_tn and why, and every cell. Where all seeds have the same rate, its interval is that of all
    their samples together, and there is none of the controlled rate."""
    configurations = []
    cells = [
        c | {"best": best_audit(audits, target), "passing": passing(audits, target)}
        for c in cells
        for audits in (c.get("audits") or (),)
    ]
    for kind, sigma_tn in dict.fromkeys((c["kind"], c["sigma_tn"]) for c in cells):
        rows = [c for c in cells if (c["kind"], c["sigma_tn"]) == (kind, sigma_tn)]
        found: dict[str, Any] = {"kind": kind, "sigma_tn": sigma_tn, "seeds": [c["seed"] for c in rows]}
        for key in ("rate", "excess", "holdout_rate", "fd", "kimg"):
            found[key] = over_seeds([c[key] for c in rows])
        for key in ("rate", "holdout_rate"):  # a share; and one seed has the interval over its samples
            if found[key]["interval"]:
                found[key]["interval"] = [min(max(side, 0.0), 1.0) for side in found[key]["interval"]]
        if len(rows) == 1:
            found["rate"]["interval"] = rows[0]["ci95"]
            found["excess"]["interval"] = rows[0].get("excess_ci95")
        elif len({c["rate"] for c in rows}) == 1:  # mostly no copy at all: seeds that agree are no certainty
            samples = sum(c["samples"] for c in rows)
            hits = np.arange(samples) < round(rows[0]["rate"] * samples)
            found["rate"]["interval"] = list(bootstrap_interval(hits))
        if len(rows) > 1 and len({c["excess"] for c in rows}) == 1:
            found["excess"]["interval"] = None
        # At equal counts where they are known: few images have a larger distance than many of the same kind.
        both = [(e["value"], e["train_vs_reference"]) for c in rows if (e := c.get("equal_counts"))]
        both = both or [(c["fd"], c["train_fd"]) for c in rows if c.get("train_fd") is not None]
        found["times_train_fd"] = float(np.mean([fd / max(own, 1e-12) for fd, own in both])) if both else None
        found["doubt"] = next((c["doubt"] for c in rows if c.get("doubt")), "")
        best = [c["best"] for c in rows]
        found["best"] = _means(best) if all(best) else None
        pass_it = [c["passing"] for c in rows if c["passing"]]
        found["passing"] = {"seeds": len(pass_it), **(_means(pass_it) if pass_it else {})}
        if pass_it:
            found["passing"]["fd"] = over_seeds([c["fd"] for c in pass_it], [c["fd_sd"] for c in pass_it])
        configurations.append(found)
    order = list(KINDS)
    configurations.sort(key=lambda c: (order.index(c["kind"]), c["sigma_tn"]))
    return {"chosen": choose(configurations, target=target, within=within), "configurations": configurations,
            "cells": cells}  # fmt: skip


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: over_seeds([row[name] for row in rows]) for name in ("kimg", "excess", "fd")}


def choose(configurations: Sequence[dict[str, Any]], *, target: float, within: float) -> dict[str, Any]:
    """{"sigma_tn", "reason", "rule", "target", "within"} by this file's rule; sigma_tn None where none meets it."""
    rule = (
        f"the smallest sigma_tn whose mean copy rate, less the held-out control's, is at most {100 * target:g} %, and"
        f" whose mean FD is within {100 * within:g} % of the best"
    )
    swept = sorted((c for c in configurations if c["kind"] in ("edm", "ambient")), key=lambda c: c["sigma_tn"])
    best = min((c["fd"]["mean"] for c in swept), default=math.nan)
    limit = best * (1 + within)
    few = [c for c in swept if c["excess"]["mean"] <= target and not c["doubt"]]
    doubtful = [c for c in swept if c["doubt"]]
    meets = [c for c in few if c["fd"]["mean"] <= limit]
    if meets:
        chosen: float | None = meets[0]["sigma_tn"]
        reason = f"{100 * meets[0]['excess']['mean']:.1f} % copies at FD {meets[0]['fd']['mean']:.4g}, best {best:.4g}"
        if chosen == 0:
            reason += "; plain EDM does not copy more than that at this length"
    else:
        chosen = None
        if few:
            closest = min(few, key=lambda c: c["fd"]["mean"])
            reason = f"none: those that copy so little have an FD of {closest['fd']['mean']:.4g} (sigma_tn"
            reason += f" {closest['sigma_tn']:g}) or more, above {limit:.4g}"
        elif doubtful:
            levels, first = ", ".join(f"{c['sigma_tn']:g}" for c in doubtful), doubtful[0]
            reason = f"none: the samples of sigma_tn {levels} are in doubt, those of {first['sigma_tn']:g} because"
            reason += f" {first['doubt'][:1].lower()}{first['doubt'][1:].removesuffix('.')}; train longer"
        elif swept:
            closest = min(swept, key=lambda c: c["excess"]["mean"])
            reason = f"none: the fewest copies are {100 * closest['excess']['mean']:.1f} % (sigma_tn"
            reason += f" {closest['sigma_tn']:g}); train shorter, or try other levels"
        else:
            reason = "none: there is no cell"
    far = min((c["times_train_fd"] for c in swept if c["times_train_fd"] is not None), default=0.0)
    if chosen is not None and far > _FAR:
        reason += (
            f"; all have {far:.3g} times the training images' own FD or more: longer training may change the choice"
        )
    return {"sigma_tn": chosen, "reason": reason, "rule": rule, "target": target, "within": within}


def percent(found: dict[str, Any]) -> str:
    interval = found["interval"]
    text = f"{100 * found['mean']:.1f} %"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def number(found: dict[str, Any]) -> str:
    interval = found["interval"]
    text = f"{found['mean']:.4g}"
    return text if interval is None else f"{text} ({interval[0]:.4g} to {interval[1]:.4g})"


def columns(summary: dict[str, Any]) -> tuple[str, ...]:
    """The heads of the table."""
    cells = summary["cells"]
    distance = distance_name(cells, cells[0]["fd_space"]).replace("|", "or")
    return ("model", "sigma_tn", "seeds", "copies", "less the control", "held-out control", distance, "kimg")


def rows_for_people(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of `columns` a configuration."""
    return [
        (
            KINDS[c["kind"]], f"{c['sigma_tn']:g}", str(len(c["seeds"])), percent(c["rate"]), percent(c["excess"]),
            f"{100 * c['holdout_rate']['mean']:.1f} %", number(c["fd"]), f"{c['kimg']['mean']:g}",
        )
        for c in summary["configurations"]
    ]  # fmt: skip


def _passing_columns(c: dict[str, Any]) -> str:
    """Of a row of the table of audits."""
    at, seeds = c["passing"], len(c["seeds"])
    if not at["seeds"]:
        return " never | - |"
    some = "" if at["seeds"] == seeds else f" ({at['seeds']} of {seeds})"
    return f" {at['kimg']['mean']:.3g}{some} | {number(at['fd'])} |"


def choice(summary: dict[str, Any]) -> str:
    """The chosen sigma_tn, or none."""
    level = summary["chosen"]["sigma_tn"]
    return "none" if level is None else format(level, "g")


def table(summary: dict[str, Any]) -> str:
    """Markdown: a row a configuration, what the numbers are, and the choice."""
    cells = summary["cells"]
    samples = cells[0]["samples"]
    heads = columns(summary)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row)} |" for row in rows_for_people(summary)]
    counts = {len(c["seeds"]) for c in summary["configurations"]}
    alone = "95 % intervals over samples (bootstrap; of few copies exact binomial)"
    over = (
        "Student's 95 % intervals of the mean over seeds (where these agree, of all their samples)"
        + (f", and of a single seed {alone}" if 1 in counts else "")
        if max(counts) > 1
        else alone
    )
    chosen = summary["chosen"]
    ends = [c["train_fd"] for c in cells if c["train_fd"] is not None]  # differ where seeds have sets of their own
    train_fd = " to ".join(dict.fromkeys(f"{end(ends):.4g}" for end in (min, max) if ends))
    audited = [c for c in summary["configurations"] if c.get("best") and c["kind"] not in STOPPED]
    images, equal = cells[0].get("train_images"), cells[0].get("equal_counts")
    own = f"; the training images themselves have {train_fd}" if train_fd else ""
    if own and images and images != samples:
        own += f", but are {images:,}, and fewer images have a larger distance"
        if equal:
            own += (
                f": of {equal['images']:,} each {KINDS[cells[0]['kind']]} (seed {cells[0]['seed']}) has"
                f" {equal['value']:.4g}, the training images {equal['train_vs_reference']:.4g}"
            )
    lines += [
        "",
        f"{samples:,} samples a run; copies: gap ratio below the threshold, pixel space; in parentheses {over}. FD:"
        f" Frechet distance, {cells[0]['fd_space']} space{own}. Lower is better in both. Less"
        " copying is no privacy guarantee.",
        "",
        f"Chosen sigma_tn: **{choice(summary)}** ({chosen['reason'].removeprefix('none: ')}). Rule: {chosen['rule']}.",
        "",
    ]
    if failed := summary.get("failed"):
        lines += [f"Failed, and so missing here: {', '.join(failed)}.", ""]
    ended = {k: [c["stopped_when_copying"] for c in cells if c["kind"] == k] for k in STOPPED}
    if told := [f"{KINDS[k]} in {sum(runs)} of {len(runs)} runs" for k, runs in ended.items() if runs]:
        whole = any(not all(runs) for runs in ended.values())
        same = "; a run that it did not stop is the same as the one without it" if whole else ""
        lines += [f"The stop rule ended {', '.join(told)}{same}.", ""]
    if audited:
        best = [c["best"] for c in cells if c["best"]]
        samples, limit = best[0]["samples"], f"{100 * chosen['target']:g} %"
        short = distance_name(best[:1], "pixel").partition(" vs")[0]
        lines += [
            f"Each stopped at its best: the audit of the least FD among those with at most {limit} copies above the"
            f" control ({samples:,} samples, {spaces(best)} space; the FD that is shown is the one that was chosen"
            " by, which flatters all, and those most that have the most such audits). The last two columns: where"
            f" copying passes {limit}, between the audits before and after by the log-odds of their rates: FD at the"
            " same copying, of the runs that come to copy so much; its interval is at least as wide as the counts of"
            " copies alone make it, if they were drawn again.",
            "",
            "| model | sigma_tn | seeds | kimg | less the control |"
            f" {distance_name(best, 'pixel').replace('|', 'or')} | {limit} at kimg | {short} there |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {KINDS[c['kind']]} | {c['sigma_tn']:g} | {len(c['seeds'])} | {c['best']['kimg']['mean']:.3g} |"
            f" {100 * c['best']['excess']['mean']:.1f} % | {number(c['best']['fd'])} |" + _passing_columns(c)
            for c in audited
        ]
        lines.append("")
    return "\n".join(lines)
