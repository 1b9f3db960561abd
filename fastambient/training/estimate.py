"""What a run will cost: parameters counted, memory and time measured on a few images and scaled up."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastambient import models
from fastambient.console import duration
from fastambient.counting import Counts, count
from fastambient.errors import InputError
from fastambient.models.blocks import recompute_levels
from fastambient.planning import STATE_BYTES, known_gpu, machine, memory
from fastambient.system import available_memory
from fastambient.training.clock import grids_to_come
from fastambient.training.config import PREVIEW_IMAGES, Settings, network_config
from fastambient.training.optimizer import working_network
from fastambient_kernels import seed_tensor

_PROBE_SECONDS = 1.0  # ever more images are measured until this is spent; the last measurement may take as long again
_SHORT_SECONDS = 0.1  # a measurement as short as this is taken twice: the first one pays for allocation
_SHARE_OF_MEMORY = 0.9  # of what there is that --batch auto plans with
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


class _Probe:
    """A network like the run's, and passes through it; the run's own state and the global generator are left as they
    are."""

    def __init__(self, settings: Settings, *, channels: int, num_classes: int) -> None:
        t = settings.training
        self.device, self.bf16 = torch.device(t.device), t.precision == "bf16"
        self.config = network_config(settings, channels=channels, num_classes=num_classes)
        with torch.random.fork_rng(devices=[]):
            network = models.build(self.config)
        if t.checkpoint_levels:
            recompute_levels(network, t.checkpoint_levels)
        self.masters = network.to(self.device).to(memory_format=torch.channels_last).train()
        self.network = working_network(self.masters, t, ranks=t.ranks)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.saved: dict[int, int] = {}  # address -> bytes of what the last pass kept

    def seconds(self, images: int) -> float:
        """Of forward and backward."""
        config, device, network = self.config, self.device, self.network
        shape = (images, config["img_channels"], config["img_resolution"], config["img_resolution"])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(images, config["label_dim"], device=device) if config["label_dim"] else None
        augment = torch.zeros(images, config["augment_dim"], device=device) if config["augment_dim"] else None
        key = (seed_tensor(0, device), torch.arange(images, device=device))
        network.zero_grad(set_to_none=True)
        self.saved.clear()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            with torch.autograd.graph.saved_tensors_hooks(self._note, lambda v: v):
                out = network(x, torch.zeros(images, device=device), labels, augment, dropout_key=key)
            out.float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def _note(self, tensor: Tensor) -> Tensor:
        self.saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def fit_micro_batch(settings: Settings, *, channels: int, num_classes: int, data_bytes: int) -> tuple[int, str]:
    """The most images that a rank can take at once, a divisor of its share of the batch, and a line that says so.

    A GPU tries, from the whole share down. On a CPU, which would swap or end the process instead of refusing, predicted
    bytes are held against the memory that is available now.

    data_bytes : of the training set, which lies on the rank's device as well

    Raises
    ------
    InputError : not even one image fits
    """
    t = settings.training
    share = t.batch // t.ranks
    sizes = [images for images in range(share, 0, -1) if share % images == 0]
    if t.device == "cuda":
        found, text = _fit_by_trying(settings, channels, num_classes, data_bytes, sizes)
    else:
        counts, bf16 = _counts(settings, channels, num_classes), t.precision == "bf16"
        predicted = {n: memory(counts, images=n, casts=bf16 and n < share, ranks=t.ranks) + data_bytes for n in sizes}
        limit = available_memory()
        most = math.inf if limit is None else _SHARE_OF_MEMORY * limit / t.ranks
        found = next((n for n in sizes if predicted[n] <= most), None)
        there = f"of {_gib(most)} a rank may take" if limit is not None else "predicted; how much there is is not known"
        text = f"{_gib(predicted[found or 1])} {there}"
    if found is None:
        raise InputError(
            f"--batch auto: not even one image at once fits in memory ({text}); choose a smaller --preset, or more"
            " --checkpoint-levels"
        )
    return found, f"--batch auto: {found} of a rank's {share} images at once ({text})"


def _fit_by_trying(
    settings: Settings, channels: int, num_classes: int, data_bytes: int, sizes: Sequence[int]
) -> tuple[int | None, str]:
    device = torch.device(settings.training.device)
    try:
        probe = _Probe(settings, channels=channels, num_classes=num_classes)
        # What a run holds beside the probe's weights and gradients, and a reserve for noise and augmentation.
        reserve = round((1 - _SHARE_OF_MEMORY) * torch.cuda.get_device_properties(device).total_memory)
        size = data_bytes + (STATE_BYTES - 8) * probe.parameters + reserve
        held = torch.empty(size, dtype=torch.uint8, device=device)
        found = largest_that_runs(sizes, probe.seconds)
        del held, probe
        return found, f"tried down from {sizes[0]}; {_gib(torch.cuda.max_memory_allocated(device))} at the most"
    except torch.OutOfMemoryError:
        return None, "the network itself does not"
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def largest_that_runs(sizes: Iterable[int], run: Callable[[int], object]) -> int | None:
    """The first of `sizes` (falling) that `run` takes without torch.OutOfMemoryError; None where none does."""
    for images in sizes:
        try:
            run(images)
            return images
        except torch.OutOfMemoryError:
            pass  # left outside of the handler, which holds on to the failed pass's memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def estimate_run(settings: Settings, *, channels: int, num_classes: int, nimg: int = 0) -> Estimate:
    """Measure forward and backward passes of a network like the run's, some three seconds long; the run's own state
    and the global generator are left as they are.

    nimg : images that the run has seen already
    """
    t = settings.training
    probe = _Probe(settings, channels=channels, num_classes=num_classes)
    parameters = probe.parameters
    micro = t.batch_gpu or t.batch // t.ranks

    def measure(images: int) -> float:
        seconds = probe.seconds(images)
        return min(seconds, probe.seconds(images)) if seconds < _SHORT_SECONDS else seconds

    if probe.device.type == "cuda":
        probe.seconds(min(2, micro))  # loads and compiles kernels, once in a run
    weights = {p.untyped_storage().data_ptr() for p in probe.network.parameters()}
    began = time.perf_counter()
    fewest = images = min(2, micro)  # a single image takes convolutions of another layout
    fewest_seconds = seconds = measure(images)
    if _SHORT_SECONDS <= seconds < 2 * _PROBE_SECONDS:  # the first pass of a process pays for more than allocation
        fewest_seconds = seconds = min(seconds, probe.seconds(images))
        began = time.perf_counter()
    while images < micro and time.perf_counter() - began < _PROBE_SECONDS:
        images = min(2 * images, micro)
        seconds = measure(images)
    # Weights and their gradients are paid for once, whatever the number of images: a large network on a few images is
    # mostly that, so only what grows with the images is scaled up.
    growth = max(seconds - fewest_seconds, 0.0) / (images - fewest) if images > fewest else seconds / images
    pass_seconds = seconds + growth * (micro - images)
    activations = sum(size for pointer, size in probe.saved.items() if pointer not in weights) / images
    size = parameters * STATE_BYTES + activations * micro
    left = max(t.kimg - nimg / 1000, 0.0)
    total = left * 1000 / micro * pass_seconds / t.ranks
    previews = grids_to_come(nimg, t.batch, round(t.kimg * 1000), t.sample_kimg or 0)
    # An evaluation is a forward pass, a third of a step's arithmetic; one rank makes the previews, the others wait.
    total += previews * PREVIEW_IMAGES * settings.sampling.evaluations * pass_seconds / micro / 3
    grids = f" with {previews} sample grid{'s' if previews > 1 else ''}" if previews else ""
    text = (
        f"{parameters:,} parameters; about {_gib(size)} a rank ({micro} images at once);"
        f" about {duration(total)} for {left:g} kimg on {t.ranks} rank(s){grids}, scaled from {images} images timed now"
    )
    return Estimate(parameters, size, total, text)
