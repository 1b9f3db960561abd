"""What a run's audits say of it: where it is best, and how good it is where copying passes a share.

audits : rows of kimg, samples, excess (the held-out-controlled copy rate) and fd (Frechet distance), as they were made
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

_RESAMPLES = 500  # of the audits' counts

Scale: TypeAlias = Callable[[np.ndarray, int], np.ndarray]


def best_audit(audits: Sequence[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The one of the least distance among those whose controlled copy rate is at most `target`; None without any."""
    return min((a for a in audits if a["excess"] <= target), key=lambda a: a["fd"], default=None)


def passing(audits: Sequence[dict[str, Any]], target: float, *, scale: Scale | None = None) -> dict[str, Any] | None:
    """Where the controlled copy rate passes `target` for the first time: kimg and fd between the audit before and the
    one that is above it; what the distances are (samples, embedder ...) is theirs. None where no two audits that follow
    each other have it between them.

    The place between them is that of the log-odds of the rates, which grow about evenly while copying begins; by the
    rates themselves it would be too early, the more so the faster a model comes to copy.

    fd_sd : the standard deviation of that fd if only the counts of copies were drawn again (binomial, at the audits'
        rates): how well so many samples say where the place is. What the distances themselves vary by is not in it.
    scale : of rates, an array, and the number of samples; None for log-odds
    """
    if len(audits) < 2:
        return None
    scale = scale or log_odds
    rates, samples = np.array([a["excess"] for a in audits]), audits[-1]["samples"]
    values = {n: np.array([a[n] for a in audits], np.float64) for n in ("kimg", "fd")}
    (there,), (found,) = _first_pass(rates[None], target, values, samples, scale)
    if not there:
        return None
    k = int(found["place"])
    drawn = np.random.default_rng(0).binomial(samples, np.clip(rates, 0, 1), (_RESAMPLES, len(rates))) / samples
    again, places = _first_pass(drawn, target, values, samples, scale)
    spread = np.std(places["fd"][again], ddof=1) if again.sum() > 1 else 0.0
    return dict(audits[k + 1]) | {
        "kimg": float(found["kimg"]), "fd": float(found["fd"]), "excess": target, "fd_sd": float(spread)
    }  # fmt: skip


def _first_pass(
    rates: np.ndarray, target: float, values: dict[str, np.ndarray], samples: int, scale: Scale
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of rates [n, audits]: whether it passes `target`, bool [n], and a record [n] of the audit before
    (place) and of `values` [audits] where it does."""
    crosses = (rates[:, :-1] <= target) & (rates[:, 1:] > target)
    place = crosses.argmax(1)
    low, high = (scale(np.take_along_axis(rates, (place + k)[:, None], 1)[:, 0], samples) for k in (0, 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # of rows that do not pass it
        part = (scale(np.array(target), samples) - low) / (high - low)
    found = np.empty(len(rates), [("place", np.int64), *((n, np.float64) for n in values)])
    found["place"] = place
    for name, value in values.items():
        found[name] = value[place] + part * (value[place + 1] - value[place])
    return np.asarray(crosses.any(1)), found


def log_odds(rate: np.ndarray, samples: int) -> np.ndarray:
    """Of shares of so many samples, with half a sample added on either side: finite at none (Haldane, 1956)."""
    copies = np.maximum(rate, 0.0) * samples
    return np.log((copies + 0.5) / (samples - copies + 0.5))
