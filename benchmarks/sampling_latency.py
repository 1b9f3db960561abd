"""Time of a batch of samples against the reference's sampler and against the floor of the same run.

    python benchmarks/sampling_latency.py [--preset P] [--batches 1,64,512] [--steps 18,40] [--sampler heun|dpmpp-2m]
                                          [--precision fp32|bf16] [--device cpu|cuda]
                                          [--competitors reference,strong] [--rounds N] [--json FILE] [--out DIR]

``ours`` is what `fastambient sample` runs for one batch. The competitors (`baselines.py`) run the same sampler with its
state in float64 on the same weights; EDM's own code has Heun's alone. In bf16, ours and strong run the network under
autocast and the reference stays in float32. Pictures are compared before a time is taken.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys

import protocol
import torch
from baselines import SAMPLERS, as_shipped, by_torch
from floor import measure
from step_time import RESOLUTION
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.models.presets import PRESETS
from fastambient.sampling import SamplingSettings, latents, sample
from fastambient.training.monitor import peak_memory


def differ(mine: torch.Tensor, theirs: torch.Tensor, precision: str) -> tuple[float, str | None]:
    """Largest difference of two sets of uint8 pictures over 255, and what is wrong with it, if anything.

    In fp32 a rounding difference may move a value over an edge, and twice. bf16 keeps 8 bits of the network's output,
    and some pixel of many is always far off: there the root mean square must stay within one grey level.
    """
    difference = (mine.int() - theirs.int()).abs().double()
    largest, rms = difference.max().item(), difference.square().mean().sqrt().item()
    value, limit, what = (largest, 2.5, "by up to") if precision == "fp32" else (rms, 1.0, "in the mean by")
    return largest / 255, f"pictures differ {what} {value:.1f} grey levels" if value > limit else None


def make_networks(preset: str, names: list[str], device: torch.device) -> tuple[nn.Module, dict[str, nn.Module]]:
    """(plain network with random weights, the competitors on the same weights)"""
    torch.manual_seed(0)
    config = PRESETS[preset]["model"] | {"img_resolution": shape_of(preset)[1], "img_channels": shape_of(preset)[0]}
    plain = models.build(config).eval().requires_grad_(False)
    for p in plain.parameters():  # a network that does something: trained ones are not zero
        if p.dim() > 1 and p.abs().max() < 1e-3:
            p.add_(0.02 * torch.randn_like(p))
    plain.to(device)
    networks: dict[str, nn.Module] = {}
    if "reference" in names:
        networks["reference"] = as_shipped(copy.deepcopy(plain))
    if "strong" in names:
        last = by_torch(copy.deepcopy(plain))
        networks["strong"] = torch.compile(last, dynamic=False)  # type: ignore[assignment]  # one for each batch size
    return plain, networks


def shape_of(preset: str) -> tuple[int, int, int]:
    size = RESOLUTION.get(preset, 64)
    return (1 if preset == "digits" else 3, size, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="network (default digits)")
    parser.add_argument(
        "--batches", default="1,64,512", help="pictures at once (default 1,64,512; what does not fit is said)"
    )
    parser.add_argument("--steps", default="18,40", help="noise levels (default 18,40)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="heun", help="of ours and all others (default heun)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network (default fp32)")
    protocol.arguments(parser, rounds=9)
    arguments = parser.parse_args()
    device, preset, precision = arguments.device, arguments.preset, arguments.precision
    shape = shape_of(preset)
    plain, networks = make_networks(preset, protocol.competitors_of(arguments), device)
    denoiser = EDMDenoiser(copy.deepcopy(plain).to(memory_format=torch.channels_last), sigma_data=0.5)  # as `load`

    # Rows of the default say neither sampler nor precision, as they never did.
    special = [name for name in (arguments.sampler, precision) if name not in ("heun", "fp32")]
    rate = protocol.copy_rate(device)
    print(f"{preset}, {arguments.sampler}, {precision}; copy {rate / 1e9:.1f} GB/s")
    rows: list[protocol.Row] = []
    for batch in map(int, arguments.batches.split(",")):
        seeds = range(batch)
        try:
            start = latents(seeds, shape, device=device)
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            floor = measure(plain, start, dtype=dtype, rate=rate, train=False)
        except torch.OutOfMemoryError:
            print(f"batch {batch} does not fit")
            continue
        for steps in map(int, arguments.steps.split(",")):
            settings = SamplingSettings(sampler=arguments.sampler, steps=steps, batch=batch)

            def ours(settings: SamplingSettings = settings, seeds: range = seeds) -> torch.Tensor:
                return sample(denoiser, seeds, shape=shape, settings=settings, precision=precision)

            @torch.no_grad()
            def theirs(name: str, steps: int = steps, seeds: range = seeds) -> torch.Tensor:
                bf16 = precision == "bf16" and name == "strong"
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    sampler = SAMPLERS[arguments.sampler]
                    x = sampler(networks[name], latents(seeds, shape, device=device), steps, sigma_data=0.5)
                return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu()

            found = {}
            works: dict[str, protocol.Work] = {"ours": ours}
            for name in networks:
                try:
                    found[name], wrong = differ(ours(), theirs(name), precision)
                except torch.OutOfMemoryError:
                    print(f"{name}: batch {batch} does not fit and is left out")
                    continue
                if wrong:
                    sys.exit(f"{name}: {wrong}; no time is reported")
                works[name] = lambda name=name: theirs(name)
            times = protocol.interleave(works, rounds=arguments.rounds, device=device, seconds=60)
            evaluations = settings.evaluations
            for name, seconds in times.items():
                middle = protocol.percentile(seconds, 0.5)
                used = floor.flops * evaluations / middle
                print(f"  batch {batch}, {steps} steps, {name}: {middle * 1e3:.1f} ms ({protocol.percentile(seconds, 0.2) * 1e3:.1f}"
                      f"-{protocol.percentile(seconds, 0.8) * 1e3:.1f}), {batch / middle:.2f} images/s, {middle / batch * 1e3:.1f} sec/kimg,"
                      f" {used / 1e12:.3f} TFLOP/s, MFU {used / floor.rate:.0%}")  # fmt: skip
            mine = protocol.rows_of(
                " ".join([f"sample {preset} {steps} {batch}", *special]), "ours", times,
                floor=floor.seconds * evaluations, agreement=found, size=f"{evaluations} evaluations",
            )  # fmt: skip
            mfu = floor.products * evaluations / statistics.median(times["ours"])
            rows += [dataclasses.replace(row, mfu=mfu) for row in mine]
    of = "the device" if device.type == "cuda" else "the process"
    print(f"peak memory {peak_memory(device) / 2**30:.2f} GiB of {of}, competitors included")
    protocol.write(rows, arguments, results="-".join([f"sampling_latency-{preset}", *special]))


if __name__ == "__main__":
    main()
