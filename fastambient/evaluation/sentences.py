"""What was found about runs, in sentences for people, and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastambient.evaluation.quality import BALLS

_NEAR_NOTHING = 0.1  # a precision, or a share of the coverage that real images have, below which samples look like none


def summary(metrics: dict[str, Any]) -> dict[str, str]:
    """What was found about one run: lead (one sentence with its limits), doubt (see `doubt`) and detail (how it was
    counted)."""
    gap, counts = metrics["memorization"]["gap_ratio"], metrics["counts"]
    samples, train, searched = counts["samples"], counts["train"], at(metrics, "memorization/control/images")
    lead = f"{percent(gap['rate'])} of samples are copies of a training image"
    apart = at(metrics, "memorization/near_duplicates/rate_without")
    lead += f" (95\N{NO-BREAK SPACE}% interval {interval(gap['ci95'])}"
    if apart is not None:
        lead += f"; {percent(apart)} if near-duplicates among these counted as different pictures"
    lead += ")"
    found = (
        f"{gap['copies']:,} of {samples:,} samples lie less than {number(gap['threshold'])} times as far from one of"
        f" the {train:,} training images as from any other."
    )
    control = gap.get("holdout_rate")
    if control is None:
        lead += "; there is no held-out set, so the control is missing."
        found += " Without images that never trained it cannot be told how much of this is chance."
        return {"lead": lead, "doubt": doubt(metrics), "detail": found}
    lead += f"; of held-out images {percent(control)}."
    if searched is not None:
        found += f" The control searches {searched:,} held-out images, which the model never saw"
        rate = at(metrics, "memorization/control/train_rate")
        if searched < counts.get("train_distinct", searched) and rate is not None:
            found += f"; against as many of the {train:,} training images the rate is {percent(rate)}"
        found += "."
    return {"lead": lead, "doubt": doubt(metrics), "detail": found}


def doubt(metrics: dict[str, Any]) -> str:
    """Why a low copy rate says nothing here: the samples look like no real image, or like few of them; else "".

    Noise copies nothing, either. Said where precision is below a tenth, or coverage below a tenth of what as many real
    images would reach: 1 - (M-1)...(M-k) / ((N+M-1)...(N+M-k)) in expectation (Naeem et al., 2020, eq. 10), which is
    little for few samples. From a copy rate of a half on there is no low one to doubt.
    """
    if metrics["memorization"]["gap_ratio"]["rate"] >= 0.5:
        return ""
    for q in metrics.get("quality") or ():
        precision, coverage = q.get("precision"), q.get("coverage")
        n, m = metrics["counts"]["samples"], metrics["counts"]["holdout"]
        alien = precision is not None and precision < _NEAR_NOTHING
        few = False
        if coverage is not None:  # there are more than k real images then
            missed = math.prod((m - i) / (n + m - i) for i in range(1, BALLS + 1))
            few = coverage < _NEAR_NOTHING * (1 - missed)
        if alien or few:
            both = {"precision": precision, "coverage": coverage}
            told = " and ".join(f"{name} is {value:.2f}" for name, value in both.items() if value is not None)
            what = "hardly a sample looks like a real image" if alien else "the samples look like few of the real ones"
            told = f"{told[:1].upper()}{told[1:]} ({space_name(q['embedder'])})"
            return f"{told}: {what}, so a low copy rate says nothing here."
    return ""


def compare(named: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """How the lowest and the highest copy rate differ; no claim where their intervals touch. "" for a single run."""
    if len(named) < 2:
        return ""
    ordered = sorted(named, key=lambda run: run[1]["memorization"]["gap_ratio"]["rate"])
    (first, a), (last, b) = ordered[0], ordered[-1]
    low, high = (m["memorization"]["gap_ratio"] for m in (a, b))
    if low["ci95"][1] >= high["ci95"][0]:
        text = f"No difference in copying is shown: the intervals of {first} and {last} overlap."
    else:
        text = (
            f"{first} copies less than {last}: {percent(low['rate'])} against {percent(high['rate'])} of the samples."
        )
    values = [at(m, "frechet/pixel/value") for m in (a, b)]
    if None in values:
        return text
    distances = " and ".join(number(v) for v in values)
    return f"{text} Their Frechet distances to the held-out images are {distances}, in this order (lower is better)."


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}\N{NO-BREAK SPACE}%"


def interval(ci95: Sequence[float]) -> str:
    """Both ends of an interval of shares: ``10.1-14.0 %``, with a dash."""
    return f"{100 * ci95[0]:.1f}\N{EN DASH}{100 * ci95[1]:.1f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def at(metrics: Any, path: str) -> Any:
    """What stands at a path of keys joined by "/", or None where a key is missing or what is on the way is None."""
    for key in path.split("/"):
        metrics = metrics.get(key) if isinstance(metrics, dict) else None
    return metrics


def space_name(embedder: str) -> str:
    """What an embedder measures in, for people."""
    return "pixels" if embedder == "pixel" else embedder
