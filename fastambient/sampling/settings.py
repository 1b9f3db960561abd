"""The sampler's settings, and their ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastambient.errors import InputError

MAX_STEPS = 10_000  # noise levels; the schedule is one tensor, made before the first picture
_SAMPLERS = ("heun", "dpmpp-2m")


@dataclass(frozen=True)
class SamplingSettings:
    """A sampler of `fastambient.diffusion.samplers` and its numbers. A weights file carries its own."""

    sampler: Literal["heun", "dpmpp-2m"] = "heun"
    steps: int = 18  # noise levels
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0  # heun only, as the next three
    S_min: float = 0.0
    S_max: float | None = None  # None: no upper limit
    S_noise: float = 1.0
    batch: int = 64  # images at once

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser for one picture."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


def check_sampling(s: SamplingSettings, *, options: bool = False) -> None:
    """Ranges that types cannot say. Raises InputError naming the setting, its value and what was expected.

    options : name a setting as the command line does, ``--S-churn``, and not as a file does, ``sampling.S_churn``
    """
    limits = (
        ("sampler", s.sampler in _SAMPLERS, f"one of {', '.join(_SAMPLERS)}"),
        ("steps", 2 <= s.steps <= MAX_STEPS, f"2 to {MAX_STEPS:,} (one step is no sampler)"),
        ("sigma_max", 0 < s.sigma_max < math.inf, "above 0"),
        ("sigma_min", 0 < s.sigma_min < s.sigma_max, f"between 0 and sigma_max = {s.sigma_max:g}"),
        ("rho", 0 < s.rho < math.inf, "above 0"),
        ("S_churn", 0 <= s.S_churn < math.inf, "0 or more"),
        ("S_churn", s.S_churn == 0 or s.sampler == "heun", f"0 with {s.sampler}, which is deterministic"),
        ("S_min", 0 <= s.S_min < math.inf, "0 or more"),
        ("S_max", s.S_max is None or s.S_max >= 0, "0 or more, or null for no limit"),
        ("S_noise", 0 <= s.S_noise < math.inf, "0 or more"),
        ("batch", s.batch >= 1, "1 or more"),
    )
    for name, fits, expected in limits:
        if not fits:
            told = f"--{name.replace('_', '-')}" if options else f"sampling.{name}"
            raise InputError(f"{told} must be {expected}, got {getattr(s, name)}")
