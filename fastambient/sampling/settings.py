"""The sampler's settings, and their ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastambient.errors import InputError

MAX_STEPS = 10_000  # noise levels; the schedule is one tensor, made before the first picture


@dataclass(frozen=True)
class SamplingSettings:
    """EDM's sampler; see `fastambient.diffusion.samplers.heun`. A weights file carries its own."""

    steps: int = 18  # noise levels; 2*steps - 1 evaluations of the network
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float | None = None  # None: no upper limit
    S_noise: float = 1.0
    batch: int = 64  # images at once


def check_sampling(s: SamplingSettings) -> None:
    """Ranges that types cannot say. Raises InputError naming the setting, its value and what was expected."""
    limits = (
        ("steps", 2 <= s.steps <= MAX_STEPS, f"2 to {MAX_STEPS:,} (one step is no sampler)"),
        ("sigma_max", 0 < s.sigma_max < math.inf, "above 0"),
        ("sigma_min", 0 < s.sigma_min < s.sigma_max, f"between 0 and sigma_max = {s.sigma_max:g}"),
        ("rho", 0 < s.rho < math.inf, "above 0"),
        ("S_churn", 0 <= s.S_churn < math.inf, "0 or more"),
        ("S_min", 0 <= s.S_min < math.inf, "0 or more"),
        ("S_max", s.S_max is None or s.S_max >= 0, "0 or more, or null for no limit"),
        ("S_noise", 0 <= s.S_noise < math.inf, "0 or more"),
        ("batch", s.batch >= 1, "1 or more"),
    )
    for name, fits, expected in limits:
        if not fits:
            raise InputError(f"sampling.{name} must be {expected}, got {getattr(s, name)}")
