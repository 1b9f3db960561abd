"""From seeds to pictures.

The latent of a sample seed is stream 5 of Philox at that seed, so that its picture does not depend on the batch size,
the device or the number of ranks, to float rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.samplers import heun
from fastambient.errors import InputError
from fastambient.pictures import to_uint8
from fastambient.sampling.settings import MAX_STEPS, SamplingSettings
from fastambient_kernels import Stream, normal
from fastambient_kernels.noise import random_words


def latents(seeds: Sequence[int], shape: tuple[int, int, int], *, device: torch.device | str = "cpu") -> Tensor:
    """Unit-variance latents [N, C, H, W] in float32, one seed each."""
    ids = torch.tensor(list(seeds), dtype=torch.int64)
    return normal(ids, math.prod(shape), seed=0, stream=Stream.LATENT).view(-1, *shape).to(device)


def draw_classes(seeds: Sequence[int], num_classes: int) -> Tensor:
    """A class for each sample seed, uniformly, as a function of the seed: int64 [N]."""
    ids = torch.tensor(list(seeds), dtype=torch.int64)
    return random_words(ids, 1, seed=1, stream=Stream.LATENT)[:, 0] * num_classes >> 32


def sample(
    denoiser: EDMDenoiser,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    class_index: int | None = None,
    batch: int | None = None,
    shape: tuple[int, int, int] | None = None,
    settings: SamplingSettings | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample one picture a seed with EDM's sampler.

    Parameters
    ----------
    denoiser : from `load`, or any `EDMDenoiser`
    seeds : integers in [0, 2^63); the picture of a seed is the same in every batch
    steps : noise levels, at least 2; default what the weights file says, else 18
    class_index : class of all pictures; default one drawn from each seed (conditional models only)
    batch : pictures at once; default what the weights file says, else 64
    shape : (C, H, W); default what the weights file says, needed for any other denoiser
    settings : the sampler's other parameters; default what the weights file says
    on_batch : called with the number of pictures after each batch

    Returns
    -------
    uint8 [N, C, H, W] on the CPU

    Raises
    ------
    InputError : a class for an unconditional model or out of range, fewer than 2 steps, no shape
    """
    told = denoiser.metadata
    chosen = settings or SamplingSettings(**told.get("sampling", {}))
    steps = chosen.steps if steps is None else steps
    batch = chosen.batch if batch is None else batch
    if not 2 <= steps <= MAX_STEPS:
        raise InputError(f"--steps must be 2 to {MAX_STEPS:,} (one step is no sampler), got {steps}")
    if batch < 1:
        raise InputError(f"--batch must be 1 or more, got {batch}")
    classes = denoiser.label_dim
    if class_index is not None and not 0 <= class_index < classes:
        what = f"a class in 0..{classes - 1}" if classes else "no class: the model is unconditional"
        raise InputError(f"--class: expected {what}, got {class_index}")
    if shape is None:
        if "network" not in told:
            raise InputError("sample() needs shape=(C, H, W) for a denoiser that no weights file describes")
        config = told["network"]
        shape = (config["img_channels"], config["img_resolution"], config["img_resolution"])
    weight = next(denoiser.parameters())
    pictures = []
    for start in range(0, len(seeds), batch):
        part = list(seeds[start : start + batch])
        labels = None
        if classes:
            index = draw_classes(part, classes) if class_index is None else torch.full((len(part),), class_index)
            labels = nn.functional.one_hot(index, classes).to(weight.device, weight.dtype)

        def call(x: Tensor, sigma: Tensor, labels: Tensor | None = labels) -> Tensor:
            return denoiser(x, sigma, labels)

        def churn(i: int, part: list[int] = part) -> Tensor:
            ids = torch.tensor(part, dtype=torch.int64)
            return normal(ids, math.prod(shape), seed=i + 2, stream=Stream.LATENT).view(-1, *shape).to(weight.device)

        with torch.no_grad():
            x = heun(
                call, latents(part, shape, device=weight.device), steps,
                sigma_min=chosen.sigma_min, sigma_max=chosen.sigma_max, rho=chosen.rho, S_churn=chosen.S_churn,
                S_min=chosen.S_min, S_max=math.inf if chosen.S_max is None else chosen.S_max, S_noise=chosen.S_noise,
                randn=churn,
            )  # fmt: skip
        pictures.append(to_uint8(x).cpu())
        if on_batch is not None:
            on_batch(len(part))
    return torch.cat(pictures) if pictures else torch.empty(0, *shape, dtype=torch.uint8)
