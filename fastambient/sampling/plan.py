"""What a model is asked for: settings and guidance, once it is known that it can give them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import InputError, did_you_mean
from fastambient.sampling.settings import SamplingSettings, check_sampling

AUTOGUIDANCE_WEIGHT = 2.0  # default W with a guide of its own, about what Karras et al. (2024) use


def chosen_settings(
    denoiser: EDMDenoiser, settings: SamplingSettings | None = None, **changes: Any
) -> SamplingSettings:
    """`settings`, or else what the weights file says, with the `changes` that are not None; checked."""
    chosen = settings or SamplingSettings(**denoiser.metadata.get("sampling", {}))
    noise = denoiser.metadata.get("noise", {})
    if noise.get("regime") == "ambient" and (noise.get("sigma_tn") or 0.0) > chosen.sigma_min:
        # Never trained below: what the last step gives is the mean of the pictures behind x at sigma_tn.
        chosen = dataclasses.replace(chosen, sigma_min=noise["sigma_tn"])
    chosen = dataclasses.replace(chosen, **{name: value for name, value in changes.items() if value is not None})
    check_sampling(chosen, options=True)
    return chosen


def ambient_message(noise: dict[str, Any]) -> str:
    """What to expect of the samples of a model that learned the levels from sigma_tn on alone; "" for any other.

    The sampler's last step goes from sigma_tn to 0 and gives D(x, sigma_tn), the mean of what may lie behind x.
    """
    if noise.get("regime") != "ambient" or not noise.get("sigma_tn"):
        return ""
    return (
        f"trained from sigma_tn {noise['sigma_tn']:g} on alone: its samples stop at that level and are denoised once"
        " from there, so they are averages without the detail that the noise hides"
    )


def guidance_weight(
    denoiser: EDMDenoiser,
    guidance: float | None = None,
    guide: EDMDenoiser | None = None,
    interval: tuple[float, float] | None = None,
) -> float:
    """W, once it is known that these models can be guided so; arguments and defaults are those of `sample`.

    Raises
    ------
    InputError : W out of range; no guide, and an unconditional model or one trained without label dropout; a guide of
        other pictures or classes; an empty interval, or one with nothing to guide
    """
    weight = (1.0 if guide is None else AUTOGUIDANCE_WEIGHT) if guidance is None else guidance
    if not 0 <= weight < math.inf:
        raise InputError(f"--guidance must be 0 or more (1 is none), got {weight:g}")
    if guide is not None:
        theirs = _pictures(guide)
        for name, ours in _pictures(denoiser).items():
            if theirs.get(name, ours) != ours:
                raise InputError(
                    f"--autoguidance: the guide has {name} {theirs[name]}, the model {ours}; need the same"
                )
    elif weight != 1 and not denoiser.label_dim:
        raise InputError(
            f"--guidance {weight:g} needs a class-conditional model, and this one is unconditional; leave it out, or"
            " name a worse model with --autoguidance"
        )
    elif weight != 1 and getattr(denoiser.network, "label_dropout", None) == 0:
        raise InputError(
            f"--guidance {weight:g} needs a model that learned pictures without a class, too, and this one was trained"
            " with model.label_dropout 0; train with 0.1, or name a worse model with --autoguidance"
        )
    if interval is not None:
        if weight == 1:
            raise InputError("--guidance-interval: nothing is guided; give --guidance or --autoguidance, too")
        if not 0 <= interval[0] < interval[1]:
            low, high = interval
            raise InputError(f"--guidance-interval must be LOW,HIGH with 0 <= LOW < HIGH, got {low:g},{high:g}")
    return weight


def _pictures(denoiser: EDMDenoiser) -> dict[str, Any]:
    """What is known of the pictures and classes that a denoiser makes."""
    told = denoiser.metadata.get("network", {}) | {"class_names": denoiser.metadata.get("class_names")}
    names = ("img_channels", "img_resolution", "class_names")
    return {name: told[name] for name in names if name in told} | {"label_dim": denoiser.label_dim}


def class_number(denoiser: EDMDenoiser, given: int | str) -> int:
    """The number of a class that is given by its name or by its number, which `sample` checks.

    A name wins: of folders "1", "2", "10" the class 1 is that of the folder "1", whatever its place among them.

    Raises
    ------
    InputError : a text that is neither
    """
    names: list[str] = denoiser.metadata.get("class_names") or []
    text = str(given)
    if isinstance(given, str) and text in names:
        return names.index(text)
    try:
        return int(text)
    except ValueError:
        if names:
            raise InputError(f"--class: there is no class {text!r}{did_you_mean(text, names)}") from None
        what = f"a number in 0..{denoiser.label_dim - 1}" if denoiser.label_dim else "none"
        why = (
            "its classes have no names"
            if denoiser.label_dim
            else "the model is unconditional (train one with --set data.use_labels=true)"
        )
        raise InputError(f"--class: expected {what}, because {why}, got {text!r}") from None


def evaluations_message(settings: SamplingSettings, *, guided: bool) -> str:
    """Such as ``2 x 35 evaluations a picture``: guidance asks twice at every level."""
    return f"{'2 x ' if guided else ''}{settings.evaluations} evaluations a picture"
