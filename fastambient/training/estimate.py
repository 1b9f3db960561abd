"""What a run will cost: parameters counted, memory and time measured on a few images and scaled up."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastambient import models
from fastambient.console import duration
from fastambient.counting import Counts, count
from fastambient.models.layers import recompute_levels
from fastambient.planning import STATE_BYTES, known_gpu, machine
from fastambient.training.config import PREVIEW_IMAGES, Settings, network_config

_PROBE_SECONDS = 1.0  # ever more images are measured until this is spent; the last measurement may take as long again
_SHORT_SECONDS = 0.1  # a measurement as short as this is taken twice: the first one pays for allocation
_LONG_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Estimate:
    """Of a whole run on this machine, or of what is left of it."""

    parameters: int
    memory: float  # bytes a rank
    seconds: float
    text: str  # all of it in one line

    @property
    def is_long(self) -> bool:
        """Over a day: to be said as a warning."""
        return self.seconds > _LONG_SECONDS


@dataclass(frozen=True)
class Work:
    """The counted work of a step, to be held against the time it took. What checkpointing computes anew is no work."""

    flops: float  # a rank
    floor: float | None  # seconds that a rank's convolutions and products take at known rates; None: not known

    def rates(self, seconds: float) -> dict[str, float]:
        """``tflops`` (10^12 FLOP/s a rank) and, where rates are known, ``mfu`` (0 to 1) of a step of `seconds`."""
        found = {"tflops": self.flops / seconds / 1e12}
        return found if self.floor is None else found | {"mfu": self.floor / seconds}


@functools.lru_cache(maxsize=8)
def _counts(settings: Settings, channels: int, num_classes: int) -> Counts:
    t = settings.training
    config = network_config(settings, channels=channels, num_classes=num_classes)
    return count(config, bf16=t.precision == "bf16", checkpoint_levels=t.checkpoint_levels)


def work_of(settings: Settings, *, channels: int, num_classes: int, ranks: int, gpu: str | None) -> Work:
    """gpu : what a rank's GPU calls itself; None on a CPU. Its rates are those of `planning`."""
    t = settings.training
    counts = _counts(settings, channels, num_classes)
    images = t.batch // ranks
    name = None if gpu is None else known_gpu(gpu)
    floor = None
    if name is not None:
        rates = machine(name, counts, precision=t.precision, images=images)
        step = counts.step
        floor = images * (step.convolution / rates.convolution.value + step.product / rates.product.value)
    return Work(images * counts.step.flops, floor)


def estimate_run(settings: Settings, *, channels: int, num_classes: int, nimg: int = 0) -> Estimate:
    """Measure forward and backward passes of a network like the run's, about two seconds long; the run's own state and
    the global generator are left as they are.

    nimg : images that the run has seen already
    """
    t = settings.training
    device = torch.device(t.device)
    config = network_config(settings, channels=channels, num_classes=num_classes)
    with torch.random.fork_rng(devices=[]):
        network = models.build(config).to(device).to(memory_format=torch.channels_last).train()
    if t.checkpoint_levels:
        recompute_levels(network, t.checkpoint_levels)
    parameters = sum(p.numel() for p in network.parameters())
    micro = t.batch_gpu or t.batch // t.ranks
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def probe(images: int) -> float:
        """Seconds of forward and backward."""
        shape = (images, channels, config["img_resolution"], config["img_resolution"])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(images, config["label_dim"], device=device) if config["label_dim"] else None
        augment = torch.zeros(images, config["augment_dim"], device=device) if config["augment_dim"] else None
        key = (0, torch.arange(images, device=device))
        network.zero_grad(set_to_none=True)
        saved.clear()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=t.precision == "bf16"):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
                out = network(x, torch.zeros(images, device=device), labels, augment, dropout_key=key)
            out.float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def measure(images: int) -> float:
        seconds = probe(images)
        return min(seconds, probe(images)) if seconds < _SHORT_SECONDS else seconds

    if device.type == "cuda":
        probe(min(2, micro))  # loads and compiles kernels, once in a run
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    began = time.perf_counter()
    fewest = images = min(2, micro)  # a single image takes convolutions of another layout
    fewest_seconds = seconds = measure(images)
    while images < micro and time.perf_counter() - began < _PROBE_SECONDS:
        images = min(2 * images, micro)
        seconds = measure(images)
    # Weights and their gradients are paid for once, whatever the number of images: a large network on a few images is
    # mostly that, so only what grows with the images is scaled up.
    growth = max(seconds - fewest_seconds, 0.0) / (images - fewest) if images > fewest else seconds / images
    pass_seconds = seconds + growth * (micro - images)
    activations = sum(size for pointer, size in saved.items() if pointer not in weights) / images
    memory = parameters * STATE_BYTES + activations * micro
    left = max(t.kimg - nimg / 1000, 0.0)
    total = left * 1000 / micro * pass_seconds / t.ranks
    previews = math.ceil(left / t.sample_kimg) if t.sample_kimg else 0
    # An evaluation is a forward pass, a third of a step's arithmetic; one rank makes the previews, the others wait.
    total += previews * PREVIEW_IMAGES * settings.sampling.evaluations * pass_seconds / micro / 3
    text = (
        f"{parameters:,} parameters; about {memory / 2**30:.2f} GiB a rank ({micro} images at once);"
        f" about {duration(total)} for {left:g} kimg on {t.ranks} rank(s)"
        f"{f' with {previews} sample grids' if previews else ''}, scaled from {images} images timed now"
    )
    return Estimate(parameters, memory, total, text)
