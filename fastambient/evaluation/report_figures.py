"""The table of figures of report.html, with what each one means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastambient.evaluation.quality import figure_name
from fastambient.evaluation.sentences import at, interval, number, percent, space_name

COPYING, QUALITY = "Copying", "Quality"
_QUALITY = {  # by the first word of a figure's name, as `quality.figure_name` writes it: which end is better, meaning
    "fd": ("lower", "Frechet distance of the samples to images that never trained."),
    "fid": ("lower", "Frechet distance in Inception features to images that never trained."),
    "kid": ("lower", "Kernel distance to images that never trained, unbiased also for few pictures."),
    "precision": ("higher", "Share of samples that lie among images that never trained: do they look right?"),
    "recall": ("higher", "Share of images that never trained that lie among the samples: are they varied?"),
    "density": ("higher", "How densely images that never trained surround a sample; may exceed 1."),
    "coverage": ("higher", "Share of images that never trained that have a sample near by."),
}


@dataclass(frozen=True)
class Figure:
    """One number of one run: where it stands in the table, what it is, what it means, and what is said beside it.

    value: text; "" where it was not or could not be measured.
    better: "lower", "higher" or "".
    """

    section: str
    name: str
    space: str
    meaning: str
    value: str
    detail: str = ""
    better: str = ""


def figures(metrics: dict[str, Any]) -> list[Figure]:
    """Every figure of a metrics.json, in the order of the table. A figure that was not asked for is left out."""
    return [*_copying(metrics), *_similarity(metrics), *_likeness(metrics), *_quality(metrics)]


def _copying(metrics: dict[str, Any]) -> list[Figure]:
    m, counts = metrics["memorization"], metrics["counts"]
    gap, control = m["gap_ratio"], m.get("control") or {}
    images = control.get("images")
    beside = f"among {images:,} images" if images else "no held-out images"
    ends = gap.get("holdout_ci95")
    space = f"pixels, ratio below {number(gap['threshold'])}"
    rows = [
        Figure(
            COPYING, "Copy rate", space,
            "Share of samples that lie much nearer to one training image than to any other.",
            percent(gap["rate"]), interval(gap["ci95"]), "lower",
        ),
        Figure(
            COPYING, "Copy rate, held-out control", space,
            "The same among images that never trained. What stands here is chance, not copying.",
            _share(gap.get("holdout_rate")), f"{interval(ends)}, {beside}" if ends else beside,
        ),
    ]  # fmt: skip
    apart = at(m, "near_duplicates/rate_without")
    if apart is not None:
        rows.append(
            Figure(
                COPYING, "Copy rate, near-duplicates apart", space,
                "The same if near-duplicates among the training images counted as different pictures: what is near to"
                " two of them is then no copy.",
                percent(apart), "", "lower",
            )
        )  # fmt: skip
    if images and images < counts.get("train_distinct", images) and control.get("train_rate") is not None:
        rows.append(
            Figure(
                COPYING, "Copy rate, equal counts", space,
                "The same among as many training images as the control searches.",
                percent(control["train_rate"]), f"among {images:,} images", "lower",
            )
        )  # fmt: skip
    per_image = metrics.get("copies_per_train_image") or m.get("copies_per_train_image")
    if per_image:
        most = per_image["top"][0]["copies"] if per_image.get("top") else 0
        rows.append(
            Figure(
                COPYING, "Training images copied", space,
                "How many different training images turn up as copies.",
                f"{per_image['images_copied']:,}",
                f"of {counts.get('train_distinct', counts['train']):,}" + (f", at most {most:,} each" if most else ""),
                "lower",
            )
        )  # fmt: skip
    train, holdout = control.get("train_median"), at(m, "nearest_distance/holdout_median")
    if train is None:
        train = at(m, "nearest_distance/median")
    for name, value in (("training", train), ("held-out", holdout)):
        rows.append(
            Figure(
                COPYING, f"Nearest {name} image", "pixels, median L2 distance",
                "Much nearer to training than to held-out images means copying." if name == "training"
                else "Of equally many images: the nearest of many lies nearer than that of few.",
                _number(value), beside if name == "held-out" or images else "",
            )
        )  # fmt: skip
    return rows


def _similarity(metrics: dict[str, Any]) -> list[Figure]:
    s = metrics.get("similarity")
    if not s:
        return []
    space, rows = f"{space_name(s['embedder'])}, cosine", []
    alike = " Small pictures of one kind reach it in pixels without being copies." if s["embedder"] == "pixel" else ""
    noisy = "" if s["embedder"] == "pixel" else " A copy under slight noise may lie below; the copy rate counts it."
    some, whole = at(s, "control/images"), at(metrics, "counts/train_distinct")
    fewer = bool(some) and some != whole
    at_equal = {level: at(s, f"control/train_above_{level}") for level in ("0.9", "0.95") if fewer}
    what = "The same less its share among equally many held-out images: what chance does not explain."
    if fewer and whole:
        what = (
            f"Of {some:,} training images, chosen by chance, less that of {some:,} held-out ones: of more images the"
            f" most similar one is more similar. It sees {some:,} of {whole:,} training images, and that part of"
            " the copies."
        )
    for level in ("0.9", "0.95"):
        ci, control, excess = s.get(f"above_{level}_ci95"), s.get(f"holdout_above_{level}"), s.get(f"excess_{level}")
        rows += [
            Figure(
                COPYING, f"Similarity above {level}", space,
                f"Share of samples whose most similar training image has a cosine above {level}.{alike}{noisy}",
                _share(s.get(f"above_{level}")), interval(ci) if ci else "", "lower",
            ),
            Figure(
                COPYING, f"Excess above {level}", space, what,
                _share(excess), _beside(s.get(f"excess_{level}_ci95"), control, at_equal.get(level)), "lower",
            ),
        ]  # fmt: skip
    control, equal = s.get("holdout_mean"), at(s, "control/train_mean")
    beside = "no held-out images" if control is None else f"held-out {number(control)}"
    if equal is not None and fewer:
        beside = f"{number(equal)} at equal counts, {beside}"
    rows.append(
        Figure(
            COPYING, "Mean highest similarity", space,
            "To the most similar training image, averaged over the samples.",
            _number(s.get("mean")), beside,
        )
    )  # fmt: skip
    return rows


def _beside(ci95: Sequence[float] | None, control: float | None, equal: float | None) -> str:
    """An excess's interval, the control's share, and that among as many training images where those are not all."""
    if control is None:
        return "no held-out images"
    # It may begin below 0, where a dash between the ends would be read twice.
    ends = "" if ci95 is None else " to ".join(number(round(100 * side, 1)) for side in ci95) + "\N{NO-BREAK SPACE}%, "
    least = "" if equal is None else f"{percent(equal)} at equal counts, "
    return f"{ends}{least}held-out {percent(control)}"


def _likeness(metrics: dict[str, Any]) -> list[Figure]:
    rows = []
    if "mifid" in metrics:
        m = metrics["mifid"] or {}
        distance, equal, fresh = m.get("distance"), at(m, "control/distance"), at(m, "control/holdout_distance")
        held = "" if fresh is None else f", to held-out {number(fresh)}"
        if equal is not None and equal != distance:
            held = f"; at equal counts {number(equal)}{held}"
        rows.append(
            Figure(
                COPYING, "MiFID", space_name(m.get("embedder", "")),
                "Frechet distance, divided by the mean cosine distance to the nearest training image where that is"
                f" below {number(m.get('threshold', 0.1))}.",
                _number(m.get("value")), "" if distance is None else f"mean cosine distance {number(distance)}{held}",
                "lower",
            )
        )  # fmt: skip
    if "fld" in metrics:
        f = metrics["fld"] or {}
        told, chance, sides = [], f.get("control"), f.get("gap_ci95")
        if sides:
            told.append(" to ".join(map(number, sides)))
        if chance and chance["images"] < metrics["counts"]["samples"]:
            told.append(f"of {chance['images']:,} samples {number(chance['gap'])}")
        if chance:
            told.append(f"of {chance['images']:,} held-out images {number(chance['holdout_gap'])}")
        rows.append(
            Figure(
                COPYING, "FLD gap", space_name(f.get("embedder", "")),
                "How much better the samples explain training than held-out images. Of few pictures it is above 0"
                " without copying: beside it what held-out images reach in their place.",
                _number(f.get("gap")), ", ".join(told), "lower",
            )
        )  # fmt: skip
    return rows


def _quality(metrics: dict[str, Any]) -> list[Figure]:
    rows = []
    for q in metrics.get("quality") or ():
        for name, value in (q.get("figures") or {}).items():
            if q["embedder"] == "pixel" and name.startswith("FD"):
                continue  # the same number as the distance in pixels below, which has the training set's beside it
            deviation = q.get("kid_std") if name.startswith("KID") else None
            better, meaning = _QUALITY.get(name.split("-")[0].lower(), ("", ""))
            beside = "" if deviation is None else f"\N{PLUS-MINUS SIGN} {number(deviation)}"
            if name.startswith(("FD", "FID")) and (own := (metrics.get("frechet") or {}).get(q["embedder"])):
                beside = _own(own, metrics["counts"])
            rows.append(
                Figure(
                    QUALITY, name[:1].upper() + name[1:], space_name(q["embedder"]),
                    meaning, _number(value), beside, better,
                )
            )  # fmt: skip
    counts = metrics["counts"]
    for space, f in (metrics.get("frechet") or {}).items():
        if space != "pixel" and any(q["embedder"] == space for q in metrics.get("quality") or ()):
            continue
        if not f or f.get("value") is None:  # no held-out set: a note says so
            continue
        held = counts["holdout"]
        name = figure_name("FD", counts["samples"], "held-out", dimensions=f["dimensions"], references=held)
        rows.append(
            Figure(
                QUALITY, name, space_name(space),
                "Frechet distance to all held-out images. Beside it what the training images themselves reach, at equal"
                " counts, since few images lie farther: copies reach it, too.",
                _number(f["value"]), _own(f, counts), "lower",
            )
        )  # fmt: skip
    return rows


def _own(frechet: dict[str, Any], counts: dict[str, int]) -> str:
    """The training images' own distance, and that of as many samples."""
    own, equal = frechet.get("train_vs_reference"), frechet.get("equal_counts")
    if own is None:
        return ""
    if not equal or equal["images"] == counts["samples"] == counts["train"]:
        return f"training set {number(own)}"
    both = number(equal["value"]), number(equal["train_vs_reference"])
    return f"at {equal['images']:,} images each {both[0]}, training set {both[1]}"


def table(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sections of rows {name, space, meaning, cells}, one cell {value, detail} a run; a row is what any run has."""
    columns = [{(f.section, f.name, f.space): f for f in figures(m)} for m in runs]
    sections: dict[str, list[dict[str, Any]]] = {COPYING: [], QUALITY: []}
    for key in dict.fromkeys(k for column in columns for k in column):
        found = [column.get(key) for column in columns]
        first = next(f for f in found if f)
        cells = [{"value": f.value if f else "", "detail": f.detail if f else ""} for f in found]
        row = {
            "name": first.name,
            "space": first.space,
            "meaning": first.meaning,
            "better": first.better,
            "cells": cells,
        }
        sections[first.section].append(row)
    return [(name, rows) for name, rows in sections.items() if rows]


def notes(metrics: dict[str, Any]) -> list[str]:
    """What the figures leave out, as the measurement itself says it."""
    found = list(metrics.get("notes") or ())
    for q in metrics.get("quality") or ():
        found += [f"{q['embedder']}: {note}" for note in q.get("notes") or ()]
    return found


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _number(value: Any) -> str:
    """Text of a number; what is no finite number ("inf" and "nan" are text in metrics.json) is shown as it is."""
    return "" if value is None else number(value) if isinstance(value, (int, float)) else str(value)
