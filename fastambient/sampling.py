"""From seeds to pictures: load exported weights, sample, write files.

The latent of a sample seed is stream 5 of Philox at that seed, so that its picture does not depend on the batch size,
the device or the number of ranks, to float rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastambient import models
from fastambient.console import progress
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.samplers import heun
from fastambient.errors import FastambientError, InputError
from fastambient.files import check_parent, new_folder, write_bytes
from fastambient.pictures import GRID_NAME, grid, save_png, to_uint8
from fastambient_kernels import Stream, normal
from fastambient_kernels.noise import random_words

FORMAT = "fastambient-1"
MAX_STEPS = 10_000  # noise levels; the schedule is one tensor, made before the first picture
_GRID_LIMIT = 100  # pictures in the overview


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


def export(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write model.safetensors: EMA weights and buffers, and what is needed to load them (never the noise seed).

    metadata : JSON values; ``network`` (arguments of `fastambient.models.build`) and ``sigma_data`` are required
    """
    header = {"format": FORMAT} | {k: json.dumps(v) for k, v in metadata.items()}
    try:
        write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in state.items()}, header))
    except OSError as error:
        raise FastambientError(f"cannot write {path}: {error}") from None


def weights_file(path: Path) -> Path:
    """The weights of a run folder or of a checkpoint inside it, or the file itself."""
    if path.suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        raise InputError(
            f"{path}: pickled weights are never loaded, because loading them can run code; use .safetensors"
        )
    if (path / "state.safetensors").is_file():
        return path / "state.safetensors"
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise InputError(
                f"{path.parent} holds no model.safetensors; train it first, or wait for its first checkpoint"
            )
    if not path.is_file():
        raise InputError(f"there is no run or weights file {path}")
    return path


def load(path: str | Path, *, device: str | torch.device = "cpu") -> EDMDenoiser:
    """The denoiser of a run folder, a checkpoint folder or a model.safetensors, in evaluation mode.

    Its weights are the run's EMA; its ``metadata`` says how it was made.

    Raises
    ------
    InputError : no such file, a pickle, a damaged file, a header that does not describe the tensors
    """
    file = weights_file(Path(path))
    try:
        with safe_open(file, "pt") as opened:
            names = {k: k for k in opened.keys()}  # noqa: SIM118
            if file.name == "state.safetensors":  # a checkpoint: EMA weights, and the buffers, which have no EMA
                metadata = json.loads((file.parent / "state.json").read_text())["weights_metadata"]
                ema = {k.removeprefix("ema."): k for k in names if k.startswith("ema.")}
                names = {k.removeprefix("model."): k for k in names if k.startswith("model.")} | ema
            else:
                header = opened.metadata() or {}
                if header.get("format") != FORMAT:
                    told = header.get("format")
                    raise InputError(f"{file} was not written by fastambient (format {told!r}, need {FORMAT!r})")
                metadata = {k: json.loads(v) for k, v in header.items() if k != "format"}
            shapes = {k: list(opened.get_slice(name).get_shape()) for k, name in names.items()}
            network = _empty_network(file, metadata, shapes)
            state = {k: opened.get_tensor(name) for k, name in names.items()}
            check_sampling(SamplingSettings(**metadata.get("sampling", {})))
            if lie := next((k for k, v in state.items() if not v.is_floating_point()), None):
                raise InputError(f"{file}: {lie} is {state[lie].dtype}, weights are floating-point numbers")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged or no safetensors file: {error}") from None
    network.load_state_dict(state, assign=True)
    denoiser = EDMDenoiser(network, sigma_data=metadata["sigma_data"], label_dim=metadata["network"]["label_dim"])
    denoiser.metadata = metadata
    # Channels-last, as in training: the layout in which convolutions and norms are fastest.
    return denoiser.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)


def _empty_network(file: Path, metadata: dict[str, Any], shapes: dict[str, list[int]]) -> nn.Module:
    """The network that the header describes, without memory, once its tensors are known to be the file's."""
    config, sigma_data = metadata.get("network"), metadata.get("sigma_data")
    if not isinstance(config, dict) or not isinstance(sigma_data, float) or not 0 < sigma_data < math.inf:
        raise InputError(f"{file}: the header lacks a usable network or sigma_data")
    try:
        if config["num_blocks"] > 64 or len(config["channel_mult"]) > 16:  # a lie that would build for hours
            raise ValueError("more blocks than any real network has")
        with torch.device("meta"):
            network = models.build(config)
    except (InputError, ValueError, TypeError, KeyError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{file}: the header describes no network that can be built ({error})") from None
    expected = {k: list(v.shape) for k, v in network.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            told, found = expected.get(name, "no such tensor"), shapes.get(name, "nothing")
            raise InputError(
                f"{file}: the header does not fit the tensors: {name} should be {told}, the file holds {found}"
            )
    return network


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


def write_samples(
    path: str | Path, seeds: Sequence[int], out: Path, *, class_index: int | None = None, steps: int | None = None,
    batch: int | None = None, device: str | torch.device = "cpu", force: bool = False,
) -> Path:  # fmt: skip
    """Sample a run or weights file into a folder of PNGs with an overview grid, or into one .npz.

    Raises
    ------
    InputError : `out` exists, or anything `load` and `sample` refuse; nothing is left behind then
    """
    denoiser = load(path, device=device)
    with progress("sampling", len(seeds)) as advance:
        if out.suffix == ".npz":
            if out.exists() and not force:
                raise InputError(f"{out} exists; choose another name or pass --force to replace it")
            check_parent(out)  # found now, not after the sampling
            pictures = sample(denoiser, seeds, steps=steps, class_index=class_index, batch=batch, on_batch=advance)
            out.parent.mkdir(parents=True, exist_ok=True)
            _write_npz(out, pictures.numpy(), seeds)
            return out
        with new_folder(out, force=force, marker=GRID_NAME) as folder:
            pictures = sample(denoiser, seeds, steps=steps, class_index=class_index, batch=batch, on_batch=advance)
            for seed, picture in zip(seeds, pictures, strict=True):
                save_png(folder / f"seed{seed:09d}.png", picture)
            save_png(folder / GRID_NAME, grid(pictures[:_GRID_LIMIT]))
    return out


def _write_npz(path: Path, pictures: np.ndarray, seeds: Sequence[int]) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npz")
    try:
        np.savez_compressed(temporary, images=pictures, seeds=np.asarray(seeds, dtype=np.int64))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
