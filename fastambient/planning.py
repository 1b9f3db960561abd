"""What a run will cost, before it runs: memory, time, energy and traffic from counted work and known rates.

`counting` gives the work of the real network. A step on one of N ranks then takes

    device = convolutions / rate + products / rate + (bytes + 36 bytes a parameter) / copy rate
    step   = max(device, operator calls * cost of a call) + what all-reduce does not hide behind the backward pass

(a CPU prepares its calls and does its work one after the other: there it is their sum). All-reduce moves
2 (N-1)/N * 4 bytes a parameter over the slowest link of a ring. Where a rate is a vendor's peak, the time is a bound
that no kernel reaches; `compare` holds the model against measured rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastambient.console import duration
from fastambient.counting import Counts, Pass, count
from fastambient.errors import InputError, did_you_mean
from fastambient.models.presets import PRESETS
from fastambient.system import processor
from fastambient.training.config import Settings, network_config, resolve
from fastambient_kernels import conv2d

STATE_BYTES = 20  # a parameter: float32 weight, gradient, two moments, EMA
STEP_BYTES = 36  # a parameter: what `AdamEMA` reads and writes
CHECKPOINT_BYTES = 16  # a parameter: weight, two moments, EMA
CAST_BYTES = (
    12  # a parameter and micro-batch where autocast casts: weight read and written in bf16, gradient the same way back
)
MAX_RANKS = 1024
PIXELS = {"digits": 8, "small16": 16, "small32": 32, "cifar10-ddpmpp": 32, "cifar10-ncsnpp": 32}  # others: 64


@dataclass(frozen=True)
class Rate:
    value: float  # FLOP/s, byte/s, bytes, watts or seconds
    source: str


@dataclass(frozen=True)
class Machine:
    """One device of a kind, and what joins it to others. None: not known, and left out of the sum."""

    name: str
    convolution: Rate  # FLOP/s, forward and backward
    product: Rate  # FLOP/s of matrix products and attention
    copy: Rate  # byte/s, read + written
    call: Rate | None = None  # seconds to prepare one operator
    memory: Rate | None = None  # bytes
    power: Rate | None = None  # watts
    node: int = 1  # devices that `link` joins
    link: Rate | None = None  # byte/s a direction, within a node
    network: Rate | None = None  # byte/s a direction and device, between nodes
    overlaps: bool = True  # prepares calls while it works


_MEASURED = "measured (H100 80GB HBM3, torch 2.11.0+cu130, cuDNN 9.19, 2026-11-24)"
_SXM, _A100 = "NVIDIA's figure for {} SXM", "NVIDIA's figure for A100 80GB SXM"


def _hopper(name: str, precision: str) -> Machine:
    vendor = _SXM.format(name.upper())
    fp32 = Rate(67e12, f"{vendor}, peak without tensor cores (TF32 off)")
    convolution = product = fp32
    copy, memory = Rate(4.8e12, f"{vendor}, peak"), Rate(141e9, vendor)
    if precision == "bf16":
        convolution = product = Rate(989e12, f"{vendor}, dense peak")
    if name == "h100":
        copy, memory = Rate(3.02e12, _MEASURED), Rate(80e9, vendor)
        if precision == "bf16":
            convolution = Rate(520e12, f"{_MEASURED}, 3x3, 256 channels, forward")
            product = Rate(792e12, f"{_MEASURED}, 8192^3")
    return Machine(
        name, convolution, product, copy, memory=memory, power=Rate(700, f"{vendor}, the most it takes"), node=8,
        link=Rate(450e9, f"{vendor}, NVLink"), network=Rate(50e9, "NVIDIA's figure for a DGX, 400 Gbit/s a GPU"),
    )  # fmt: skip


def _a100(precision: str) -> Machine:
    peak = Rate(312e12 if precision == "bf16" else 19.5e12, f"{_A100}, dense peak")
    return Machine(
        "a100", peak, peak, Rate(2.039e12, f"{_A100}, peak"), memory=Rate(80e9, _A100),
        power=Rate(400, f"{_A100}, the most it takes"), node=8, link=Rate(300e9, f"{_A100}, NVLink"),
        network=Rate(25e9, "NVIDIA's figure for a DGX, 200 Gbit/s a GPU"),
    )  # fmt: skip


_GPUS: dict[str, Callable[[str], Machine]] = {
    "h100": lambda precision: _hopper("h100", precision),
    "h200": lambda precision: _hopper("h200", precision),
    "a100": _a100,
}
DEVICES = (*_GPUS, "cpu")


def known_gpu(name: str) -> str | None:
    """The device whose rates are known of the GPU that calls itself `name`, or None."""
    return next((device for device in _GPUS if device in name.lower()), None)


def machine(name: str, counts: Counts, *, precision: str, images: int) -> Machine:
    """The machine of this name; `cpu` is measured here and now, in about a second, on the network's own convolution.

    Raises
    ------
    InputError : no such device; names those that there are
    """
    if name in _GPUS:
        return _GPUS[name](precision)
    if name != "cpu":
        raise InputError(f"--device {name}: no rates are known{did_you_mean(name, DEVICES)}")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    source = f"measured now, {torch.get_num_threads()} threads"
    picture, weight = counts.convolution_shape
    images = max(1, min(images, int(2e10 / (6 * math.prod(picture[1:]) * math.prod(weight)))))
    x = torch.randn(images, *picture, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(weight, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(conv2d(x, w))
    a, b = torch.randn(512, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
    source_of_copy = torch.ones(2**24)
    target = torch.empty_like(source_of_copy)
    small, kernel = torch.randn(1, 8, 2, 2, requires_grad=True), torch.zeros(8, 8, 3, 3, requires_grad=True)

    def chain() -> None:  # of what networks are made of: a convolution costs ten times the call of a sum
        y = small
        for _ in range(20):
            y = small + F.silu(conv2d(y, kernel))
        y.sum().backward()

    backward = lambda: torch.autograd.grad(conv2d(x, w), (x, w), dy)  # noqa: E731
    convolution = 6 * math.prod(dy.shape[2:]) * images * math.prod(weight) / _seconds(backward)
    product = 2 * 512**3 / _seconds(lambda: a @ b)
    copy = 2 * source_of_copy.nbytes / _seconds(lambda: target.copy_(source_of_copy))
    conv_rate, product_rate, rate, call = (Rate(v, source) for v in (convolution, product, copy, _seconds(chain) / 120))
    return Machine("cpu", conv_rate, product_rate, rate, call, overlaps=False)


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of some runs after a warm-up: other processes only ever slow one down."""
    work()
    times: list[float] = []
    while len(times) < 7 or (sum(times) < 0.25 and len(times) < 200):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Plan:
    """Costs of a run. Seconds are of one step, bytes of one rank."""

    machine: Machine
    ranks: int
    batch: int
    kimg: float
    micro: int  # images a rank takes at once
    flops: float  # of all ranks' step
    memory: float  # weights, gradients, optimizer, averages, activations, all-reduce buckets
    convolution: float
    product: float
    bytes: float  # seconds of all that is no convolution or product, optimizer included
    calls: float  # seconds of preparing operators; 0 where unknown
    communication: float  # seconds of all-reduce
    exposed: float  # of these, what backward does not hide
    traffic: float  # bytes read and written
    sent: float  # bytes of all-reduce
    checkpoint: float  # bytes on disk

    @property
    def step(self) -> float:
        """Seconds."""
        device = self.convolution + self.product + self.bytes
        return (max(device, self.calls) if self.machine.overlaps else device + self.calls) + self.exposed

    @property
    def rate(self) -> float:
        """Images a second of all ranks."""
        return self.batch / self.step

    @property
    def seconds(self) -> float:
        return self.kimg * 1000 / self.rate

    @property
    def joules(self) -> float | None:
        return None if self.machine.power is None else self.machine.power.value * self.ranks * self.seconds


def make_plan(
    counts: Counts, machine: Machine, *, ranks: int, batch: int, kimg: float, bf16: bool, batch_gpu: int | None = None
) -> Plan:
    """The costs of `kimg` thousand images in steps of `batch` on `ranks` of these machines.

    Raises
    ------
    InputError : ranks out of range, a batch that does not divide, or ranks that nothing joins
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise InputError(f"--gpus must be between 1 and {MAX_RANKS}, got {ranks}")
    if ranks > 1 and machine.link is None:
        raise InputError(f"--gpus {ranks}: no rate between two devices is known for {machine.name}, plan for 1")
    if batch % ranks:
        raise InputError(f"--batch {batch} does not divide among {ranks} ranks; use a multiple of {ranks}")
    share = batch // ranks
    micro = min(batch_gpu or share, share)
    rounds, work, parameters = math.ceil(share / micro), counts.step, counts.parameters
    casts = bf16 and rounds > 1  # else weights are bf16 and masters float32: the same 20 and 36 bytes a parameter
    cast_bytes = CAST_BYTES * parameters * rounds if casts else 0
    traffic = share * work.bytes + rounds * work.fixed_bytes + cast_bytes
    backward = share * ((work.flops - counts.forward.flops) / work.flops) * _products(work, machine)
    sent = 2 * (ranks - 1) / ranks * 4 * parameters
    joint = machine.link if ranks <= machine.node else machine.network
    communication = sent / joint.value if ranks > 1 and joint is not None else 0.0
    return Plan(
        machine, ranks, batch, kimg, micro, batch * work.flops,
        memory=memory(counts, images=micro, casts=casts, ranks=ranks),
        convolution=share * work.convolution / machine.convolution.value,
        product=share * work.product / machine.product.value,
        bytes=(traffic + STEP_BYTES * parameters) / machine.copy.value,
        calls=rounds * work.calls * (machine.call.value if machine.call else 0.0),
        communication=communication, exposed=max(0.0, communication - backward / rounds),
        traffic=traffic + STEP_BYTES * parameters, sent=sent, checkpoint=CHECKPOINT_BYTES * parameters,
    )  # fmt: skip


def memory(counts: Counts, *, images: int, casts: bool, ranks: int) -> float:
    """Bytes of a rank that takes `images` at once: state, autocast's casts, all-reduce buckets, joined weights (as of
    float32; bfloat16 ones take half), activations.

    casts : of weights, in bf16 with several micro-batches
    """
    state = counts.parameters * (STATE_BYTES + 2 * casts + 4 * (ranks > 1))
    return state + 4 * counts.joined + images * counts.activations


def _products(work: Pass, machine: Machine) -> float:
    """Seconds an image."""
    return work.convolution / machine.convolution.value + work.product / machine.product.value


def sampling_seconds(counts: Counts, machine: Machine, *, images: int, evaluations: int) -> float:
    """Of one batch of samples, from forward passes alone."""
    work = counts.forward
    device = images * _products(work, machine) + (images * work.bytes + work.fixed_bytes) / machine.copy.value
    calls = work.calls * (machine.call.value if machine.call else 0.0)
    return evaluations * (max(device, calls) if machine.overlaps else device + calls)


def preset_settings(
    preset: str,
    resolution: int | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    assignments: Sequence[str] = (),
) -> Settings:
    """Settings of a preset at its own resolution (or another one) without data."""
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: there is none{did_you_mean(preset, PRESETS)}")
    pixels = resolution or PIXELS.get(preset, 64)
    layers = [("command line", options or {})]
    return resolve(resolution=pixels, preset=preset, layers=layers, assignments=assignments)


def counts_of(settings: Settings) -> Counts:
    """Of a preset's network for pictures as published: grey digits, colour elsewhere, ImageNet's 1000 classes."""
    channels = 1 if settings.model.preset == "digits" else 3
    config = network_config(settings, channels=channels, num_classes=1000)
    return count(config, bf16=settings.training.precision == "bf16")


def describe(settings: Settings, *, device: str, ranks: int) -> str:
    """The plan in words, with every rate's source and what is assumed."""
    t, counts = settings.training, counts_of(settings)
    bf16 = t.precision == "bf16"
    found = machine(device, counts, precision=t.precision, images=t.batch_gpu or max(1, t.batch // max(ranks, 1)))
    p = make_plan(counts, found, ranks=ranks, batch=t.batch, kimg=t.kimg, bf16=bf16, batch_gpu=t.batch_gpu)
    over = found.memory is not None and p.memory > found.memory.value
    limit = f" of {found.memory.value / 2**30:.1f}" if found.memory else ""
    calls = f"{p.calls * 1e3:.4g}" if found.call else "unknown"
    energy = f", at most {p.joules / 3.6e6:,.4g} kWh of the devices" if p.joules is not None else ""
    lines = [
        f"{settings.model.preset} on {ranks} x {device}, batch {t.batch} ({p.micro} images at once), {t.precision}",
        f"parameters  {counts.parameters:,}; {counts.forward.flops / 1e9:.3g} GFLOP an image forward,"
        f" {counts.step.flops / 1e9:.3g} with backward; {counts.step.calls} operator calls a micro-batch",
        f"memory      {p.memory / 2**30:.2f}{limit} GiB a rank"
        + (" - does not fit: lower training.batch_gpu" if over else ""),
        f"step        {p.step * 1e3:.4g} ms = convolutions {p.convolution * 1e3:.4g} + products {p.product * 1e3:.4g}"
        f" + bytes {p.bytes * 1e3:.4g} + exposed communication {p.exposed * 1e3:.4g}"
        f" ({'at least' if found.overlaps else '+'} calls: {calls});"
        f" {p.flops / p.step / ranks / 1e12:.4g} TFLOP/s a rank",
        f"throughput  {p.rate:,.1f} images/s, {1000 / p.rate:.3g} sec/kimg",
        f"run         {t.kimg:g} kimg in {duration(p.seconds)} ({p.seconds / 86400:.3g} days){energy}",
        f"bytes       {p.traffic / 1e9:.4g} GB read and written by a rank's step; all-reduce {p.sent / 1e9:.4g} GB"
        f" in {p.communication * 1e3:.4g} ms; a checkpoint holds {p.checkpoint / 1e9:.4g} GB",
        "rates",
    ]
    for name in ("convolution", "product", "copy", "call", "memory", "power", "link", "network"):
        rate: Rate | None = getattr(found, name)
        if rate is not None:
            lines.append(f"  {name:<12}{rate.value:.4g} {_UNITS[name]}: {rate.source}")
    lines.append(
        "assumed: backward runs at the forward's rates; every operator but products is a pass over memory at the copy"
        " rate; attention is one operator; all-reduce overlaps with the last micro-batch's backward pass and has no"
        " latency; loading, logging, checkpoints and the allocator cost nothing"
    )
    return "\n".join(lines)


_UNITS = {
    "convolution": "FLOP/s", "product": "FLOP/s", "copy": "byte/s", "call": "s", "memory": "bytes", "power": "W",
    "link": "byte/s", "network": "byte/s",
}  # fmt: skip


def check(folder: Path) -> str:
    """`compare` in words, a line for each row."""
    if not folder.is_dir():
        raise InputError(f"--check {folder}: there is no such folder")
    found, without = compare(folder, here=processor())
    lines = [f"{'measured row':<36}{'ms':>10}{'planned':>10}{'error':>8}  device"]
    lines += [
        f"{c.work:<36}{c.measured * 1e3:>10.4g}{c.planned * 1e3:>10.4g}{c.error:>+8.0%}  {c.device}" for c in found
    ]
    lines += [f"no rates of its device: {text}" for text in without]
    if any(c.device.startswith(processor()) for c in found):
        lines.append("a CPU's rates are those of this moment: errors mean nothing while other work runs")
    return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    work: str
    device: str
    measured: float  # seconds
    planned: float

    @property
    def error(self) -> float:
        """Relative to the measurement; negative: the plan is too fast."""
        return self.planned / self.measured - 1


def compare(folder: Path, *, here: str) -> tuple[list[Comparison], list[str]]:
    """(each measured step and sampling row in `folder` beside its plan, files of machines without rates)

    Rows are those that `benchmarks/step_time.py` and `sampling_latency.py` write. A CPU's rates are known only on that
    CPU: `here` is the name of this one.
    """
    found, without = [], []
    for file in sorted(folder.glob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        rows = {(r["work"], r.get("size", "")): r for r in document["rows"] if str(r.get("work")).split()[0] in _MODELS}
        name = str(document.get("device", ""))
        device = "cpu" if here and name.startswith(here) else known_gpu(name)
        if rows and device is None:
            without.append(f"{file.name}: {name}")
            continue
        for (work, size), row in rows.items():
            kind, preset, *rest = work.split()
            if preset in PRESETS:
                assert device is not None
                found.append(
                    Comparison(f"{work} {size}", name, row["ms"] / 1e3, _MODELS[kind](device, preset, rest, size))
                )
    return found, without


def _settings_of_row(preset: str, precision: str) -> Settings:
    """As the benchmarks build it: no classes, no augmentation."""
    off: dict[str, dict[str, Any]] = {
        "data": {"use_labels": False},
        "training": {"augment": 0.0, "precision": precision},
    }
    return preset_settings(preset, options=off)


def _train_row(device: str, preset: str, rest: list[str], size: str) -> float:
    batch = int(size.removeprefix("batch "))
    settings = _settings_of_row(preset, rest[0])
    counts = counts_of(settings)
    rates = machine(device, counts, precision=rest[0], images=batch)
    return make_plan(counts, rates, ranks=1, batch=batch, kimg=1, bf16=rest[0] == "bf16").step


def _sample_row(device: str, preset: str, rest: list[str], size: str) -> float:
    images, precision = int(rest[1]), "bf16" if "bf16" in rest else "fp32"
    counts = counts_of(_settings_of_row(preset, precision))
    rates = machine(device, counts, precision=precision, images=images)
    return sampling_seconds(counts, rates, images=images, evaluations=int(size.split()[0]))


_MODELS = {"train": _train_row, "sample": _sample_row}
