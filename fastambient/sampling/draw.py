"""From seeds to pictures.

The latent of a sample seed is stream 5 of Philox at that seed, so that its picture does not depend on the batch size,
the device or the number of ranks, to float rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastambient.allocator import keep_freed_memory
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.guidance import ClassDenoiser, GuidedDenoiser
from fastambient.diffusion.samplers import dpmpp_2m, heun
from fastambient.errors import InputError
from fastambient.models.blocks import keep_joined, with_bf16_weights
from fastambient.pictures import to_uint8
from fastambient.sampling.graph import GraphedDenoiser
from fastambient.sampling.plan import chosen_settings, guidance_weight
from fastambient.sampling.settings import SamplingSettings
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
    class_index: int | None = None,
    shape: tuple[int, int, int] | None = None,
    settings: SamplingSettings | None = None,
    guidance: float | None = None,
    guide: EDMDenoiser | None = None,
    guidance_interval: tuple[float, float] | None = None,
    precision: str | None = None,
    graph: bool | None = None,
    on_batch: Callable[[int], None] | None = None,
    **changes: Any,
) -> Tensor:
    """Sample one picture a seed.

    Parameters
    ----------
    denoiser : from `load`, or any `EDMDenoiser`
    seeds : integers in [0, 2^63); the picture of a seed is the same in every batch
    class_index : class of all pictures; default one drawn from each seed (conditional models only)
    shape : (C, H, W); default what the weights file says, needed for any other denoiser
    settings : the sampler and its numbers; default what the weights file says, else `SamplingSettings`'
    guidance : W of D_guide + W*(D - D_guide), see `GuidedDenoiser`; 1 is none. Default 1, and 2 with a `guide`
    guide : worse model of the same images and classes; default the denoiser without a class
    guidance_interval : (low, high), the sigmas that are guided; default all
    precision : "fp32", or "bf16" for a network under bfloat16 autocast; the sampler's state is float32 in both.
        Default fp32, and on a GPU what the weights file says the network was trained in
    graph : replay the network from a CUDA graph; default on a GPU
    on_batch : called with the number of pictures after each batch
    changes : single `SamplingSettings` by name, such as ``steps=40, sampler="dpmpp-2m"``; None changes nothing

    Returns
    -------
    uint8 [N, C, H, W] on the CPU

    Raises
    ------
    InputError : a class for an unconditional model or out of range, a setting out of range, guidance that the models
        cannot give, no shape
    """
    told = denoiser.metadata
    s = chosen_settings(denoiser, settings, **changes)
    classes = denoiser.label_dim
    if class_index is not None and not 0 <= class_index < classes:
        what = f"a class in 0..{classes - 1}" if classes else "no class: the model is unconditional"
        raise InputError(f"--class: expected {what}, got {class_index}")
    if shape is None:
        if "network" not in told:
            raise InputError("sample() needs shape=(C, H, W) for a denoiser that no weights file describes")
        config = told["network"]
        shape = (config["img_channels"], config["img_resolution"], config["img_resolution"])
    weight = guidance_weight(denoiser, guidance, guide, guidance_interval)
    like = next(denoiser.parameters())
    if like.device.type == "cpu":
        keep_freed_memory()
    if precision is None:
        precision = told.get("precision", "fp32") if like.is_cuda else "fp32"
    if precision not in ("fp32", "bf16"):
        raise InputError(f"--precision must be fp32 or bf16, got {precision}")

    def ready(model: EDMDenoiser) -> ClassDenoiser:
        """The model in its precision, and from a graph: of one batch, and of the two halves of a guided one."""

        if precision == "bf16":
            model = with_bf16_weights(model)  # type: ignore[assignment]
            keep_joined(model)  # of the copy

        def D(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
            with torch.autocast(like.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return model(x, sigma, class_labels)

        size = min(s.batch, len(seeds))
        return GraphedDenoiser(D, (size, 2 * size)) if (like.is_cuda if graph is None else graph) else D

    guided = GuidedDenoiser(
        ready(denoiser), weight, guide=None if guide is None else ready(guide), interval=guidance_interval
    )
    schedule: dict[str, Any] = {"sigma_min": s.sigma_min, "sigma_max": s.sigma_max, "rho": s.rho}
    pictures = []
    for start in range(0, len(seeds), s.batch):
        part = list(seeds[start : start + s.batch])
        labels = None
        if classes:
            index = draw_classes(part, classes) if class_index is None else torch.full((len(part),), class_index)
            labels = nn.functional.one_hot(index, classes).to(like.device, like.dtype)

        def call(x: Tensor, sigma: Tensor, labels: Tensor | None = labels) -> Tensor:
            return guided(x, sigma, labels)

        def churn(i: int, part: list[int] = part) -> Tensor:
            ids = torch.tensor(part, dtype=torch.int64)
            return normal(ids, math.prod(shape), seed=i + 2, stream=Stream.LATENT).view(-1, *shape).to(like.device)

        z = latents(part, shape, device=like.device)
        with torch.no_grad():
            if s.sampler == "heun":
                x = heun(
                    call, z, s.steps, **schedule, S_churn=s.S_churn, S_min=s.S_min,
                    S_max=math.inf if s.S_max is None else s.S_max, S_noise=s.S_noise, randn=churn,
                )  # fmt: skip
            else:
                x = dpmpp_2m(call, z, s.steps, **schedule)
        pictures.append(to_uint8(x).cpu())
        if on_batch is not None:
            on_batch(len(part))
    return torch.cat(pictures) if pictures else torch.empty(0, *shape, dtype=torch.uint8)
