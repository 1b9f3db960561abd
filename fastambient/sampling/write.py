"""Samples as files: a folder of PNGs with an overview, or one .npz."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastambient.console import progress, say
from fastambient.errors import InputError
from fastambient.files import check_parent, keep_out_of_git, new_folder
from fastambient.pictures import GRID_NAME, grid, save_png
from fastambient.sampling.draw import sample
from fastambient.sampling.plan import (
    ambient_message,
    chosen_settings,
    class_number,
    evaluations_message,
    guidance_weight,
)
from fastambient.sampling.weights import load

_GRID_LIMIT = 100  # pictures in the overview


def parse_seeds(text: str) -> list[int]:
    """``"0-63,100"`` -> [0, ..., 63, 100]."""
    seeds: list[int] = []
    for item in text.split(","):
        low, dash, high = item.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise InputError(f"--seeds: expected numbers and ranges such as 0-63,100, got {text!r}")
        first, last = int(low), int(high) if dash else int(low)
        if last < first or last >= 2**63 or last - first >= 10**8:
            raise InputError(f"--seeds: the range {item.strip()} is empty or too large")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds: {text!r} names a seed twice")
    return seeds


def parse_interval(text: str) -> tuple[float, float]:
    """``"0.2,5"`` -> (0.2, 5.0)."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--guidance-interval must be LOW,HIGH such as 0.2,5, got {text!r}") from None
    return low, high


def write_samples(
    path: str | Path, seeds: Sequence[int], out: Path, *, autoguidance: str | Path | None = None,
    guidance: float | None = None, guidance_interval: tuple[float, float] | None = None,
    class_index: int | str | None = None, precision: str | None = None, device: str | torch.device = "cpu",
    force: bool = False, **changes: Any,
) -> Path:  # fmt: skip
    """Sample a run or weights file into a folder of PNGs with an overview grid, or into one .npz.

    autoguidance : run or weights file of the guide
    class_index : a class by its number, or by its name where the weights file has one
    Every other argument is `sample`'s.

    Raises
    ------
    InputError : `out` exists, or anything `load` and `sample` refuse; nothing is left behind then
    """
    denoiser = load(path, device=device)
    guide = None if autoguidance is None else load(autoguidance, device=device)
    settings = chosen_settings(denoiser, **changes)
    weight = guidance_weight(denoiser, guidance, guide, guidance_interval)
    number = None if class_index is None else class_number(denoiser, class_index)
    plan = evaluations_message(settings, guided=weight != 1)
    if told := ambient_message(denoiser.metadata.get("noise", {})):
        say(told)
    if weight != 1:
        say(f"guidance {weight:g} asks twice at every noise level{' it guides' if guidance_interval else ''}: {plan}")
    with progress(f"sampling, {plan}", len(seeds)) as advance:

        def pictures() -> Tensor:
            return sample(
                denoiser, seeds, class_index=number, settings=settings, guidance=weight, guide=guide,
                guidance_interval=guidance_interval, precision=precision, on_batch=advance,
            )  # fmt: skip

        if out.suffix == ".npz":
            if out.exists() and not force:
                raise InputError(f"{out} exists; choose another name or pass --force to replace it")
            check_parent(out)  # found now, not after the sampling
            drawn = pictures()
            out.parent.mkdir(parents=True, exist_ok=True)
            _write_npz(out, drawn.numpy(), seeds)
            return out
        with new_folder(out, force=force, marker=GRID_NAME) as folder:
            drawn = pictures()
            for seed, picture in zip(seeds, drawn, strict=True):
                save_png(folder / f"seed{seed:09d}.png", picture)
            save_png(folder / GRID_NAME, grid(drawn[:_GRID_LIMIT]))
            keep_out_of_git(folder)
    return out


def _write_npz(path: Path, pictures: np.ndarray, seeds: Sequence[int]) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npz")
    try:
        np.savez_compressed(temporary, images=pictures, seeds=np.asarray(seeds, dtype=np.int64))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
