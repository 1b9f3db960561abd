"""The trainer's whole step against two competitors and against the floor of the same run.

    python benchmarks/step_time.py [--preset P] [--batch B] [--device cpu|cuda] [--precision fp32|bf16]
                                   [--competitors reference,strong] [--rounds N] [--json FILE]

``ours`` is what `fastambient train` runs: batch, noise, network, loss, backward, optimizer, average and log values.
The competitors (`baselines.py`) get their images for nothing. Before a time is taken, losses and gradients of all are
compared on the same noise; the benchmark ends where they differ. MFU is against the rate of this network's own
convolutions and products, measured in this run (`floor.py`).
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import protocol
import torch
from baselines import BaselineStep
from floor import Floor, measure
from torch import Tensor, nn

from fastambient.models.layers import Dropout
from fastambient.models.presets import PRESETS
from fastambient.planning import PIXELS as RESOLUTION
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.run import RunFolder
from fastambient.training.start import TrainRequest, create_run, plan
from fastambient_kernels import Stream, normal

_CPU_BATCH = {"digits": 64, "small16": 32, "small32": 8, "small64": 4, "cifar10-ddpmpp": 4, "cifar10-ncsnpp": 4}
_NOISE_SEED = 12345


def make_trainer(folder: Path, preset: str, batch: int, device: torch.device, precision: str) -> Trainer:
    """The trainer of a run on random pictures (of `digits` on the digits), as the command line would make it."""
    source = "digits"
    if preset != "digits":
        size = RESOLUTION.get(preset, 64)
        source = str(folder / "pictures.npy")
        np.save(source, np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8))
    model = {"use_labels": False, "holdout": None if preset == "digits" else 1}
    training = {"batch": batch, "device": device.type, "precision": precision, "augment": 0.0}
    request = TrainRequest(
        data=source, preset=preset, options={"data": model, "training": training}, noise_seed=_NOISE_SEED
    )
    run = create_run(plan(request), folder / "run")
    return Trainer(RunFolder(run), World(device=device))


def competitor(kind: str, trainer: Trainer, weights: dict[str, Tensor]) -> BaselineStep:
    network = copy.deepcopy(trainer.network)
    network.load_state_dict(weights)
    s = trainer.settings
    assert s.noise.sigma_tn is not None and s.noise.sigma_data is not None
    return BaselineStep(
        kind, network, sigma_tn=s.noise.sigma_tn, sigma_data=s.noise.sigma_data, lr=s.training.lr, beta=0.999,
        bf16=s.training.precision == "bf16",
    )  # fmt: skip


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


def agreement(trainer: Trainer, other: BaselineStep) -> float:
    """Largest relative difference of losses, and of the gradient of the whole network, on the same noise."""
    positions = torch.arange(trainer.step.share, device=trainer.world.device)
    batch = trainer.step.loader.batch(positions)
    shape, numel = batch.images.shape, batch.images[0].numel()
    fixed, fresh = (
        torch.where(batch.flips[:, None, None, None], z.flip(3), z)
        for z in (
            normal(batch.ids, numel, seed=_NOISE_SEED, stream=Stream.FIXED).view(shape),
            normal(positions, numel, seed=trainer.settings.training.seed, stream=Stream.FRESH).view(shape),
        )
    )
    gradients = []
    with without_dropout(trainer.network, other.network):
        sigma, ours = trainer.step.forward(positions)
        theirs = other.loss(batch.images, batch.flips, sigma, (fixed, fresh))
        for loss, network in ((ours, trainer.network), (theirs, other.network)):
            loss.sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
            network.zero_grad(set_to_none=True)
    loss_difference = ((ours - theirs).abs() / theirs).max().item()
    gradient_difference = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    return max(loss_difference, gradient_difference)


def memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process, competitors included"


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
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="network and settings (default digits)")
    parser.add_argument("--batch", type=int, help="images a step (default: 64 on a GPU, 2 to 64 on a CPU, by preset)")
    parser.add_argument(
        "--device", default="cuda" if cuda else "cpu", help="cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device computes in it")
    parser.add_argument(
        "--competitors",
        help="of reference,strong (default: both on a GPU, reference on a CPU, where compiling takes minutes)",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed rounds, at least 5 (default 15, at most 3 minutes)"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    batch = arguments.batch or (_CPU_BATCH.get(arguments.preset, 2) if on_cpu else 64)
    has_bf16 = not on_cpu or "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    precision = arguments.precision or ("bf16" if has_bf16 else "fp32")
    names = (arguments.competitors or ("reference" if on_cpu else "reference,strong")).split(",")
    if wrong := set(names) - {"reference", "strong"}:
        parser.error(f"--competitors: {', '.join(sorted(wrong))}: not one of reference, strong")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as the reference has it

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), arguments.preset, batch, device, precision)
        generator = torch.Generator().manual_seed(0)
        # The trained network is no special case: the zero-initialised layers would hide most of the gradient.
        weights = {
            k: v if v.dim() < 2 or v.abs().max() > 1e-3 else v + 0.02 * torch.randn(v.shape, generator=generator).to(v)
            for k, v in trainer.network.state_dict().items()
        }
        trainer.network.load_state_dict(weights)
        others = {name: competitor(name, trainer, weights) for name in names}
        found = {}
        for name, other in others.items():
            tolerance = 2e-2 if precision == "bf16" else 2e-4
            found[name] = agreement(trainer, other)
            if not found[name] <= tolerance:
                sys.exit(
                    f"{name}: loss or gradient differs by {found[name]:.1e}, allowed {tolerance:.0e}; no time is reported"
                )

        positions = torch.arange(batch, device=device)
        pictures = trainer.step.loader.batch(positions)
        nimg = 0

        def ours() -> None:
            nonlocal nimg
            trainer.step(nimg)
            nimg += batch

        works: dict[str, protocol.Work] = {"ours": ours}
        for name, other in others.items():
            works[name] = lambda other=other: other(pictures.images, pictures.flips)
        rate = protocol.copy_rate(device)
        times = protocol.interleave(works, rounds=max(5, arguments.rounds), device=device, seconds=180)
        work_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = copy.deepcopy(trainer.network)
        with without_dropout(network):
            floor = measure(network, pictures.images.float(), dtype=work_dtype, rate=rate)

    print(
        f"{arguments.preset}, batch {batch}, {precision}, sigma_tn {trainer.settings.noise.sigma_tn:g}; copy {rate / 1e9:.1f} GB/s"
    )
    report(times, floor, batch)
    print(f"peak memory {memory(device)}")
    if gpu := times.gpu("ours"):
        print(f"ours: {gpu}" + (f", {gpu['joules'] / batch:.3g} J an image" if "joules" in gpu else ""))
    rows = protocol.rows_of(
        f"train {arguments.preset} {precision}", "ours", times, floor=floor.seconds, agreement=found,
        size=f"batch {batch}",
    )  # fmt: skip
    protocol.write(rows, device, json_file=arguments.json, results=f"step_time-{arguments.preset}-{precision}")


if __name__ == "__main__":
    main()
