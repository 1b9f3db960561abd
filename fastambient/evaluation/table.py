"""What `evaluate` and `audit` print: a table, what its figures mean, what was found, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from fastambient.console import shown_name
from fastambient.evaluation.quality import figure_name
from fastambient.evaluation.report import RunReport, fd_note
from fastambient.evaluation.sentences import summary

_NAMED = 3  # of the most copied training images


class Measured(Protocol):
    """What has a row in the table."""

    @property
    def metrics(self) -> dict[str, Any]: ...

    @property
    def report(self) -> RunReport: ...


class Written(Measured, Protocol):
    """What was written besides."""

    @property
    def file(self) -> Path: ...

    @property
    def page(self) -> Path: ...

    @property
    def pairs(self) -> Path: ...

    @property
    def pictures(self) -> tuple[Path, ...]: ...


def print_found(evaluated: Written) -> None:
    """The table of one evaluation, what was found, and where it was written."""
    print_table([evaluated])
    if copied := most_copied(evaluated.metrics):
        print(copied)
    print(sentence(evaluated.metrics))
    files = (evaluated.page, evaluated.file, evaluated.pairs, *evaluated.pictures)
    print(f"written: {', '.join(map(str, files))}")


def sentence(metrics: dict[str, Any]) -> str:
    """What was found, with its limits and what makes it doubtful, in plain characters."""
    found = summary(metrics)
    lead = found["lead"].replace("\N{NO-BREAK SPACE}", " ").replace("\N{EN DASH}", " - ")
    return f"{lead} {found['doubt']}".rstrip()


def most_copied(metrics: dict[str, Any]) -> str:
    """The training images with the most copies, by name where there is one; "" where nothing was copied."""
    found = metrics["memorization"]["copies_per_train_image"]
    top, images = found["top"][:_NAMED], found["images_copied"]
    if not top:
        return ""
    how = "most often" if top[0]["copies"] > 1 else "each once, among them" if images > len(top) else "each once:"
    names = (shown_name(row["name"]) if "name" in row else f"training image {row['train_index']}" for row in top)
    told = (f"{name} ({row['copies']} times)" if row["copies"] > 1 else name
            for name, row in zip(names, top, strict=True))  # fmt: skip
    rest = "; all of them are in the list of pairs" if images > len(top) else ""
    return f"copied: {images:,} training image{'s' if images > 1 else ''}, {how} {', '.join(told)}{rest}"


def print_table(evaluated: Sequence[Measured]) -> None:
    """One row a run, to stdout, within 80 columns, and what its figures mean."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", overflow="fold")
    named = {figure_name("FD", item.metrics["counts"]["samples"], "held-out") for item in evaluated}
    distance = named.pop().replace(" held", "\nheld") if len(named) == 1 else "FD vs\nheld-out"
    heads = ("sigma_tn", distance, "copy rate (95 %)", "held-out\ncontrol", "median L2 to\ntrain/held-out")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for item in evaluated:
        m = item.metrics["memorization"]
        gap, low, high = m["gap_ratio"], *(100 * side for side in m["gap_ratio"]["ci95"])
        nearest, fd = m["control"]["train_median"], item.metrics["frechet"]["pixel"]["value"]
        nearest = m["nearest_distance"]["median"] if nearest is None else nearest
        table.add_row(
            item.report.name, _or_dash(item.report.sigma_tn, "g"), _or_dash(fd, ".3f"),
            f"{100 * gap['rate']:.1f} % ({low:.1f} - {high:.1f})", _percent(gap["holdout_rate"]),
            f"{nearest:.2f} / {_or_dash(m['nearest_distance']['holdout_median'], '.2f')}",
        )  # fmt: skip
    out = Console(width=None if Console().is_terminal else 120, highlight=False)
    out.print(table)
    for line in _notes([item.metrics for item in evaluated], [item.report.name for item in evaluated]):
        out.print(line, soft_wrap=not out.is_terminal, markup=False)


def _notes(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """What the figures are, one line each; the runs share their data, so the first one's counts stand for all."""
    m = metrics[0]
    fd, searched, gap = m["frechet"]["pixel"], m["memorization"]["control"]["images"], m["memorization"]["gap_ratio"]
    images = m["counts"]["train_distinct"]
    copies = f"Copy rate: samples whose nearest of {images} training images is {1 / gap['threshold']:.3g} times nearer"
    copies += " than the second" + (", mirror images included" if m["settings"]["protocol"]["flips"] else "")
    if gap["holdout_rate"] is None:
        lines = [f"{copies}.", f"Median L2: distance of a sample to the nearest of {images} training images."]
    else:
        counts = ", ".join(dict.fromkeys(str(each["counts"]["samples"]) for each in metrics))
        lines = [
            f"FD: Frechet distance of {counts} samples to the {fd['reference']}, in pixel space; the"
            f" {m['counts']['train']} training images have {fd['train_vs_reference']:.3f}"
            f"{_at_equal_counts(metrics, names)}.",
            f"{copies}; the control searches {searched} held-out images.",
            f"Median L2: distance of a sample to the nearest of {searched} training and of {searched} held-out images:"
            " equally many, because the nearest of more images lies nearer.",
        ]
        if searched < images:
            rates = (f"{name} {100 * each['memorization']['control']['train_rate']:.1f} %"
                     for name, each in zip(names, metrics, strict=True))  # fmt: skip
            some = f"Against {searched} of the {images} training images, as many as the control's, which sees that part"
            lines.insert(2, f"{some} of the copies, the rate is: {', '.join(rates)}.")
    lines += _features(metrics, names)
    lines += dict.fromkeys(note for each in metrics if (note := fd_note(each)))
    lines += dict.fromkeys(note for each in metrics for note in each.get("notes") or ())
    return [*lines, "Lower FD and copy rates are better; less copying is no privacy guarantee."]


def _features(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Similarity, FD and the gap of FLD in an embedder, by run."""
    told: dict[str, list[str]] = {}
    for name, m in zip(names, metrics, strict=True):
        s = m.get("similarity")
        if not s:
            continue
        low, high = (100 * side for side in s["above_0.95_ci95"])
        control = "" if s["holdout_above_0.95"] is None else f", held-out {_percent(s['holdout_above_0.95'])}"
        what = f"Similarity ({s['embedder']}), samples with a cosine above 0.95 to a training image"
        told.setdefault(what, []).append(f"{name} {_percent(s['above_0.95'])} ({low:.1f} - {high:.1f}{control})")
        if s["embedder"] == "pixel":
            told["In pixels small pictures of one kind are that similar without being copies; what exceeds the held-out"
                 " share is copying"] = []  # fmt: skip
        for q in m["quality"]:
            if q["embedder"] == "pixel":
                continue  # the table has it
            figure, value = next(iter(q["figures"].items()))
            told.setdefault(f"{figure} ({q['embedder']})", []).append(f"{name} {_or_dash(value, '.4g')}")
        if m["fld"]:
            told.setdefault(
                f"FLD's gap ({m['fld']['embedder']}), how much better samples explain training than held-out images", []
            ).append(f"{name} {m['fld']['gap']:.3g}" + _chance(m["fld"].get("control")))
    return [f"{what}: {', '.join(each)}." if each else f"{what}." for what, each in told.items()]


def _at_equal_counts(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Where there are more samples than training images, or fewer: fewer have a larger distance."""
    equal = metrics[0]["frechet"]["pixel"].get("equal_counts")
    if equal is None or equal["images"] == metrics[0]["counts"]["samples"] == metrics[0]["counts"]["train"]:
        return ""
    values = (
        f"{name} {each['frechet']['pixel']['equal_counts']['value']:.3f}"
        for name, each in zip(names, metrics, strict=True)
    )
    return f" ({equal['images']} images each: {', '.join(values)}, training images {equal['train_vs_reference']:.3f})"


def _chance(control: dict[str, Any] | None) -> str:
    if control is None:
        return ""
    return f" ({control['images']} samples {control['gap']:.3g}, as many held-out images {control['holdout_gap']:.3g})"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
