"""The competitors compute what they are compared with, and the floor counts what a network does."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.samplers import heun
from fastambient.nvml import Reading

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import baselines
import floor
import protocol

SONG = {"model_type": "SongUNet", "img_channels": 2, "model_channels": 8, "num_blocks": 1, "dropout": 0.0}
NETWORKS = {
    "ddpmpp": SONG | {"img_resolution": 8, "channel_mult": [1, 2], "attn_resolutions": [4]},
    "ncsnpp": SONG | {"img_resolution": 8, "channel_mult": [1, 2], "attn_resolutions": [4], "embedding_type": "fourier",
                      "encoder_type": "residual", "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2},
    "adm": {"model_type": "DhariwalUNet", "img_channels": 2, "img_resolution": 8, "model_channels": 64, "num_blocks": 1,
            "channel_mult": [1, 2], "attn_resolutions": [4], "dropout": 0.0},
}  # fmt: skip


def made(name) -> nn.Module:
    """No layer is zero, so that every one matters."""
    torch.manual_seed(0)
    network = models.build(NETWORKS[name])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_is_the_same_network(name):
    ours = made(name).to(memory_format=torch.channels_last)
    theirs = baselines.as_shipped(copy.deepcopy(ours))
    assert type(theirs.enc["4x4_down"]).__name__ == "_PlainBlock" and type(ours.enc["4x4_down"]).__name__ == "UNetBlock"
    x, c_noise = torch.randn(3, 2, 8, 8), torch.randn(3)
    for network in (ours, theirs):
        network.out = network(x, c_noise)
        network.out.square().sum().backward()
    torch.testing.assert_close(theirs.out, ours.out, rtol=1e-4, atol=1e-4 * ours.out.abs().max().item())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item() + 1e-6)


def test_the_references_sampler_is_heun():
    network, latents = made("ddpmpp").eval().requires_grad_(False), torch.randn(2, 2, 8, 8)
    x = baselines.heun_float64(network, latents, 5, sigma_data=0.5)
    torch.testing.assert_close(x, heun(EDMDenoiser(network), latents.double(), 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_the_floor_counts_every_product(monkeypatch, train):
    timed = []
    monkeypatch.setattr(floor, "_seconds", lambda call, *_: timed.append(call) or 1.0)
    network, x = made("ddpmpp"), torch.randn(4, 2, 8, 8)
    found = floor.measure(network, x, dtype=torch.float32, rate=1e9, train=train)
    norms, convolutions = [m for m in network.modules() if isinstance(m, baselines.GroupNorm)], 0
    for module in network.modules():
        if isinstance(module, baselines.Conv2d) and module.kernel:
            convolutions += 1
    attentions = sum(1 for m in network.modules() if isinstance(m, baselines.UNetBlock) and m.heads)
    # qkv and proj of an attention are matrix products, and it is one call itself
    assert found.products == convolutions + attentions and len(norms) > 0
    assert {call.kind for call in timed} == {"conv2d", "linear", "attention"}
    parameters = sum(p.numel() for p in network.parameters())
    assert found.bytes * 1e9 > 36 * parameters if train else found.bytes * 1e9 < 36 * parameters
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(4))
    assert found.flops == counter.get_total_flops() if not train else found.flops > 2.5 * counter.get_total_flops()


def test_rows_say_what_the_gpu_did(monkeypatch):
    """Ours alone, its energy a call; on a CPU a row has no such field."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: float(next(ticks)))  # each call takes a second
    counters = {"ours": 6.0, "theirs": 100.0, "before": 0.0}
    running = ["before"]

    class Gpu:
        def read(self):
            joules, running[0] = counters[running[0]], "before"
            return Reading(90.0, 2e9, 400.0, 1500.0, 2000.0, 0x4 if joules == 6 else 0x20, joules)

        def describe(self):
            return {"driver": "1"}

    works = {name: lambda name=name: running.__setitem__(0, name) for name in ("ours", "theirs")}
    cpu = torch.device("cpu")

    def row():
        times = protocol.interleave(works, rounds=5, device=cpu)
        (found,) = protocol.rows_of("w", "ours", times, floor=0.5, agreement={}, size="")
        return protocol._plain(found)

    assert "gpu" not in row() and "gpu" not in protocol.environment(cpu)
    monkeypatch.setattr(protocol, "open_gpu", lambda device: Gpu())
    found = row()["gpu"]
    assert found["joules"] == 6 and found["gpu_throttle"] == ["power cap"] and found["gpu_clock_mhz"] == 1500
    assert protocol.environment(cpu)["gpu"] == {"driver": "1"}
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: next(ticks) * 1e-3)
    assert "joules" not in row()["gpu"], "less than the energy counter resolves"
