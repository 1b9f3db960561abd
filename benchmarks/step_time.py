"""The trainer's whole step against two competitors and against the floor of the same run.

    python benchmarks/step_time.py [--preset P] [--batch B] [--device cpu|cuda] [--precision fp32|bf16]
                                   [--competitors reference,strong] [--rounds N] [--profile FILE] [--compile]
                                   [--json FILE] [--out DIR]

``ours`` is what `fastambient train` runs: batch, noise, network, loss, backward, optimizer, average and log values.
The competitors (`baselines.py`) get their images for nothing. Before a time is taken, losses and gradients of all are
compared on the same noise; the benchmark ends where they differ. Peak memory is that of ours, measured before a
competitor is made, beside what `fastambient.planning` predicts. MFU is against the rate of this network's own
convolutions and products, measured in this run (`floor.py`). With ``--compile`` ours has `training.compile` on; its rows
say "compiled" and lie in a file of their own.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import protocol
import step_profile
import torch
from baselines import BaselineStep
from floor import Floor, measure
from torch import Tensor, nn

from fastambient.data import Batch
from fastambient.diffusion.edm import draw_sigma
from fastambient.models.blocks import UNetBlock, compile_blocks
from fastambient.models.layers import Dropout
from fastambient.models.presets import PRESETS
from fastambient.planning import PIXELS as RESOLUTION
from fastambient.planning import counts_of
from fastambient.planning import memory as predicted_memory
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.monitor import peak_memory
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run
from fastambient_kernels import Stream, normal

_CPU_BATCH = {"digits": 64, "small16": 32, "small32": 8, "small64": 4, "cifar10-ddpmpp": 4, "cifar10-ncsnpp": 4}
_NOISE_SEED = 12345


def make_trainer(
    folder: Path,
    preset: str,
    batch: int,
    device: torch.device,
    precision: str,
    *,
    seed: int = 0,
    compiled: bool = False,
) -> Trainer:
    """The trainer of a run on random pictures (of `digits` on the digits), as the command line would make it."""
    folder.mkdir(exist_ok=True)
    source = "digits"
    if preset != "digits":
        size = RESOLUTION.get(preset, 64)
        source = str(folder / "pictures.npy")
        np.save(source, np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8))
    model = {"use_labels": False, "holdout": None if preset == "digits" else 1}
    training = {"batch": batch, "device": device.type, "precision": precision, "augment": 0.0, "seed": seed}
    training["compile"] = "on" if compiled else "off"
    request = TrainRequest(
        data=source, preset=preset, options={"data": model, "training": training}, noise_seed=_NOISE_SEED
    )
    run = create_run(plan(request), folder / "run")
    return Trainer(RunFolder(run), World(device=device))


def eager_copy(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    compile_blocks(network, False)
    return network


def competitor(kind: str, trainer: Trainer, weights: dict[str, Tensor]) -> BaselineStep:
    network = eager_copy(trainer.network)
    network.load_state_dict(weights)
    s = trainer.settings
    assert s.noise.sigma_tn is not None and s.noise.sigma_data is not None
    return BaselineStep(
        kind, network, sigma_tn=s.noise.sigma_tn, sigma_data=s.noise.sigma_data, lr=s.training.lr, beta=0.999,
        bf16=s.training.precision == "bf16",
    )  # fmt: skip


def usual_batch(preset: str, device: torch.device) -> int:
    """Images a step where none are named."""
    return _CPU_BATCH.get(preset, 2) if device.type == "cpu" else 64


def usual_precision(device: torch.device) -> str:
    """bf16 where the device computes in it."""
    has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"


def filled(network: nn.Module) -> dict[str, Tensor]:
    """Its weights, with noise in the zero-initialised layers, which would hide most of the gradient."""
    generator = torch.Generator().manual_seed(0)
    return {
        k: v if v.dim() < 2 or v.abs().max() > 1e-3 else v + 0.02 * torch.randn(v.shape, generator=generator).to(v)
        for k, v in network.state_dict().items()
    }


def load(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    """Into the float32 weights, and what a step computes with."""
    trainer.network.load_state_dict(weights)
    trainer.optimizer.refresh()


class without_dropout:
    """Masks are drawn in different ways: results are compared without them."""

    def __init__(self, *networks: nn.Module) -> None:
        self.layers = [m for network in networks for m in network.modules() if isinstance(m, Dropout)]

    def __enter__(self) -> None:
        self.p = [layer.p for layer in self.layers]
        for layer in self.layers:
            layer.p = 0.0

    def __exit__(self, *_: object) -> None:
        for layer, p in zip(self.layers, self.p, strict=True):
            layer.p = p


def draws(trainer: Trainer, positions: Tensor) -> tuple[Batch, Tensor, tuple[Tensor, Tensor]]:
    """(batch, sigma [N], (fixed, fresh) noise as flipped) that the trainer's step takes at `positions`."""
    s = trainer.settings
    batch = trainer.step.loader.at(positions)
    shape, numel = batch.images.shape, batch.images[0].numel()
    fixed, fresh = (
        torch.where(batch.flips[:, None, None, None], z.flip(3), z)
        for z in (
            normal(batch.ids, numel, seed=_NOISE_SEED, stream=Stream.FIXED).view(shape),
            normal(positions, numel, seed=s.training.seed, stream=Stream.FRESH).view(shape),
        )
    )
    sigma = draw_sigma(positions, seed=s.training.seed, P_mean=s.noise.P_mean, P_std=s.noise.P_std)
    return batch, sigma, (fixed, fresh)


def agreement(trainer: Trainer, other: BaselineStep) -> tuple[float, float]:
    """(difference, allowed): losses, and the gradient of the whole network, on the same noise.

    The difference is the largest relative one. In bfloat16 as much is allowed as the rule of docs/numerics.md gives:
    twice what the reference's arrangement itself differs by when it runs under autocast, and one rounding.
    """
    positions = torch.arange(trainer.step.share, device=trainer.world.device)
    batch, sigma, noises = draws(trainer, positions)

    def theirs(low: bool) -> Tensor:
        return other.loss(batch.images, batch.flips, sigma, noises, bf16=low)

    network = trainer.step.network
    with without_dropout(network, other.network):
        wide = results(other.network, lambda: theirs(False))
        apart = difference(results(network, lambda: trainer.step.forward(batch)[1]), wide)
        if trainer.settings.training.precision == "fp32":
            return apart, 2e-4
        return apart, 2 * difference(results(other.network, lambda: theirs(True)), wide) + 2**-8


def results(network: nn.Module, loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """(loss [N], the whole gradient)."""
    network.zero_grad(set_to_none=True)  # what a step before left
    loss = loss_of()
    loss.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad(set_to_none=True)
    return loss.detach(), gradient


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """The largest relative one, of a sample's loss or of the gradient's norm."""
    loss = ((ours[0] - theirs[0]).abs() / theirs[0]).max().item()
    return max(loss, ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item())


def report(times: dict[str, list[float]], floor: Floor, batch: int) -> None:
    print(f"{'':<12}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'images/s':>10}{'sec/kimg':>10}{'TFLOP/s':>9}{'MFU':>7}")
    for name, seconds in times.items():
        low, middle, high = (protocol.percentile(seconds, share) for share in (0.2, 0.5, 0.8))
        rate = floor.flops / middle
        print(f"{name:<12}{low * 1e3:>10.1f}{middle * 1e3:>10.1f}{high * 1e3:>10.1f}{batch / middle:>10.2f}"
              f"{middle / batch * 1e3:>10.1f}{rate / 1e12:>9.3f}{rate / floor.rate:>7.0%}")  # fmt: skip
    print(f"floor {floor.seconds * 1e3:.1f} ms = products {floor.products * 1e3:.1f} (at {floor.rate / 1e12:.3f} TFLOP/s,"
          f" {floor.flops / 1e9:.1f} GFLOP) + bytes {floor.bytes * 1e3:.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="network and settings (default digits)")
    parser.add_argument("--batch", type=int, help="images a step (default: 64 on a GPU, 2 to 64 on a CPU, by preset)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device computes in it")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write which operators a step of ours spends on")
    parser.add_argument("--compile", action="store_true", help="ours with training.compile on")
    protocol.arguments(parser, rounds=15)
    arguments = parser.parse_args()
    device, preset = arguments.device, arguments.preset
    on_cpu = device.type == "cpu"
    usual = usual_batch(preset, device)
    batch = arguments.batch or usual
    precision = arguments.precision or usual_precision(device)
    names = protocol.competitors_of(arguments)
    work, size = f"train {preset} {precision}{' compiled' if arguments.compile else ''}", f"batch {batch}"

    with tempfile.TemporaryDirectory() as folder:
        before = peak_memory(device)
        trainer = make_trainer(Path(folder), preset, batch, device, precision, compiled=arguments.compile)
        nimg = 0

        def ours() -> None:
            nonlocal nimg
            trainer.step(nimg)
            nimg += batch

        try:
            for _ in range(2):
                ours()
        except torch.OutOfMemoryError:
            sys.exit(f"ours: {size} does not fit")
        blocks = (m for m in trainer.step.network.modules() if isinstance(m, UNetBlock))
        if arguments.compile and not all(block.compiled for block in blocks):
            sys.exit("ours: compiling failed; no time is reported")
        used = {
            "predicted": predicted_memory(counts_of(trainer.settings), images=batch, casts=False, ranks=1),
            "measured": max(0.0, float(peak_memory(device) - before)),  # a CPU's counters are some pages off
        }

        weights = filled(trainer.network)
        load(trainer, weights)
        others, found = {}, {}
        for name in names:
            try:
                other = competitor(name, trainer, weights)
                found[name], allowed = agreement(trainer, other)
            except torch.OutOfMemoryError:
                print(f"{name}: {size} does not fit and is left out")
                continue
            if not found[name] <= allowed:
                sys.exit(
                    f"{name}: loss or gradient differs by {found[name]:.1e}, allowed {allowed:.1e}; no time is reported"
                )
            others[name] = other
        if not others:
            sys.exit(f"{size} fits no competitor; no time is reported")

        positions = torch.arange(batch, device=device)
        pictures = trainer.step.loader.at(positions)
        works: dict[str, protocol.Work] = {"ours": ours}
        for name, other in others.items():
            works[name] = lambda other=other: other(pictures.images, pictures.flips)
        rate = protocol.copy_rate(device)
        times = protocol.interleave(works, rounds=arguments.rounds, device=device, seconds=180)
        work_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = eager_copy(trainer.network)
        with without_dropout(network):
            floor = measure(network, pictures.images.float(), dtype=work_dtype, rate=rate)
        middle = statistics.median(times["ours"])
        profiled = step_profile.operator_times(ours, device) if arguments.profile else None

    print(f"{preset}, {size}, {precision}, sigma_tn {trainer.settings.noise.sigma_tn:g}; copy {rate / 1e9:.1f} GB/s")
    report(times, floor, batch)
    of = "the device" if not on_cpu else "the process, over what libraries took before"
    print(f"peak memory of ours {used['measured'] / 2**30:.2f} GiB of {of}; {used['predicted'] / 2**30:.2f} predicted")
    if gpu := times.gpu("ours"):
        print(f"ours: {gpu}" + (f", {gpu['joules'] / batch:.3g} J an image" if "joules" in gpu else ""))
    if profiled is not None:
        step_profile.write(arguments.profile, device, work, size, step_profile.shares(profiled, middle))
    rows = protocol.rows_of(work, "ours", times, floor=floor.seconds, agreement=found, size=size)
    rows = [dataclasses.replace(row, mfu=floor.products / middle, memory=used) for row in rows]
    unusual = ("" if batch == usual else f"-{batch}") + ("-compiled" if arguments.compile else "")
    protocol.write(rows, arguments, results=f"step_time-{preset}-{precision}{unusual}")


if __name__ == "__main__":
    main()
