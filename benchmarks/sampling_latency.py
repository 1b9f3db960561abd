"""Time of a batch of samples against the reference's sampler and against the floor of the same run.

    python benchmarks/sampling_latency.py [--preset P] [--batches 1,64,512] [--steps 18,40] [--device cpu|cuda]
                                          [--competitors reference,strong] [--rounds N] [--json FILE]

``ours`` is what `fastambient sample` runs for one batch. The competitors (`baselines.py`) run EDM's sampler with its
state in float64 on the same weights. Pictures are compared before a time is taken.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import protocol
import torch
from baselines import as_shipped, heun_float64
from floor import measure
from step_time import RESOLUTION, memory
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.models.presets import PRESETS
from fastambient.sampling import SamplingSettings, latents, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="network (default digits)")
    parser.add_argument(
        "--batches", default="1,64,512", help="pictures at once (default 1,64,512; what does not fit is said)"
    )
    parser.add_argument("--steps", default="18,40", help="noise levels (default 18,40)")
    parser.add_argument(
        "--device", default="cuda" if cuda else "cpu", help="cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--competitors", help="of reference,strong (default: both on a GPU, reference on a CPU)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="timed rounds, at least 5 (default 9, at most a minute a row)"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    names = (arguments.competitors or ("reference" if device.type == "cpu" else "reference,strong")).split(",")
    if wrong := set(names) - {"reference", "strong"}:
        parser.error(f"--competitors: {', '.join(sorted(wrong))}: not one of reference, strong")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as the reference has it

    size = RESOLUTION.get(arguments.preset, 64)
    shape = (1 if arguments.preset == "digits" else 3, size, size)
    torch.manual_seed(0)
    config = PRESETS[arguments.preset]["model"] | {"img_resolution": shape[1], "img_channels": shape[0]}
    plain = models.build(config).eval().requires_grad_(False)
    for p in plain.parameters():  # a network that does something: trained ones are not zero
        if p.dim() > 1 and p.abs().max() < 1e-3:
            p.add_(0.02 * torch.randn_like(p))
    plain.to(device)
    denoiser = EDMDenoiser(copy.deepcopy(plain).to(memory_format=torch.channels_last), sigma_data=0.5)  # as `load`
    networks: dict[str, nn.Module] = {}
    if "reference" in names:
        networks["reference"] = as_shipped(copy.deepcopy(plain))
    if "strong" in names:
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        networks["strong"] = torch.compile(last)  # type: ignore[assignment]

    rate = protocol.copy_rate(device)
    print(f"{arguments.preset}; copy {rate / 1e9:.1f} GB/s")
    rows: list[protocol.Row] = []
    for batch in map(int, arguments.batches.split(",")):
        seeds = range(batch)
        try:
            start = latents(seeds, shape, device=device)
            floor = measure(plain, start, dtype=torch.float32, rate=rate, train=False)
        except torch.OutOfMemoryError:
            print(f"batch {batch} does not fit")
            continue
        for steps in map(int, arguments.steps.split(",")):
            evaluations = 2 * steps - 1

            def ours(steps: int = steps, seeds: range = seeds) -> torch.Tensor:
                return sample(
                    denoiser, seeds, steps=steps, batch=len(seeds), shape=shape, settings=SamplingSettings(steps=steps)
                )

            @torch.no_grad()
            def theirs(network: nn.Module, steps: int = steps, seeds: range = seeds) -> torch.Tensor:
                x = heun_float64(network, latents(seeds, shape, device=device), steps, sigma_data=0.5)
                return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu()

            found = {}
            for name, network in networks.items():
                # In grey levels; a rounding difference may move a value over an edge, and twice.
                found[name] = (ours().int() - theirs(network).int()).abs().max().item() / 255
                if found[name] > 2.5 / 255:
                    sys.exit(f"{name}: pictures differ by {found[name] * 255:.0f} grey levels; no time is reported")
            works: dict[str, protocol.Work] = {"ours": ours}
            for name, network in networks.items():
                works[name] = lambda network=network: theirs(network)
            times = protocol.interleave(works, rounds=max(5, arguments.rounds), device=device, seconds=60)
            for name, seconds in times.items():
                middle = protocol.percentile(seconds, 0.5)
                used = floor.flops * evaluations / middle
                print(f"  batch {batch}, {steps} steps, {name}: {middle * 1e3:.1f} ms ({protocol.percentile(seconds, 0.2) * 1e3:.1f}"
                      f"-{protocol.percentile(seconds, 0.8) * 1e3:.1f}), {batch / middle:.2f} images/s, {middle / batch * 1e3:.1f} sec/kimg,"
                      f" {used / 1e12:.3f} TFLOP/s, MFU {used / floor.rate:.0%}")  # fmt: skip
            rows += protocol.rows_of(
                f"sample {arguments.preset} {steps} {batch}", "ours", times, floor=floor.seconds * evaluations,
                agreement=found, size=f"{evaluations} evaluations",
            )  # fmt: skip
    print(f"peak memory {memory(device)}")
    protocol.write(rows, device, json_file=arguments.json, results=f"sampling_latency-{arguments.preset}")


if __name__ == "__main__":
    main()
