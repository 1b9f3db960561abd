"""The competitors compute what they are compared with, and the floor counts what a network does."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.samplers import dpmpp_2m, heun
from fastambient.nvml import Reading

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import baselines
import floor
import protocol
import sampling_latency
import step_profile
import step_time

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


@pytest.mark.parametrize(("name", "sampler"), [("heun", heun), ("dpmpp-2m", dpmpp_2m)])
def test_the_references_samplers(name, sampler):
    network, latents = made("ddpmpp").eval().requires_grad_(False), torch.randn(2, 2, 8, 8)
    x = baselines.SAMPLERS[name](network, latents, 5, sigma_data=0.5)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, sampler(EDMDenoiser(network), latents.double(), 5), rtol=1e-5, atol=1e-5)


def test_a_competitor_can_be_given_its_draws():
    images, flips = torch.randint(0, 256, (2, 2, 8, 8), dtype=torch.uint8), torch.tensor([True, False])
    sigma, noises = torch.tensor([0.05, 3.0]), [torch.randn(2, 2, 8, 8) for _ in range(2)]
    step = baselines.BaselineStep("reference", made("ddpmpp"), sigma_tn=0.2, sigma_data=0.5, lr=0.0, beta=0.9)
    expected = step.loss(images, flips, sigma, noises).sum().item() / 2
    assert step(images, flips, sigma, noises) == pytest.approx(expected, rel=1e-6)
    assert step(images, flips) != step(images, flips), "draws of its own"


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


def test_every_benchmark_takes_the_same_options(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    protocol.arguments(parser, rounds=7)
    given = parser.parse_args(["--device", "cpu", "--out", str(tmp_path), "--json", str(tmp_path / "mine.json")])
    assert given.device == torch.device("cpu") and given.rounds == 7
    assert protocol.competitors_of(given) == ["reference"], "compiling takes minutes on a CPU"
    assert parser.parse_args([]).out == protocol.RESULTS
    assert parser.parse_args(["--competitors", "strong,reference"]).competitors == ["strong", "reference"]
    for wrong, message in (
        (["--competitors", "strong,week"], "week: not one of reference, strong"),
        (["--device", "tpu"], "tpu: not one of cpu, cuda"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch finds no GPU here")]),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert message in capsys.readouterr().err
    row = protocol.Row("w", "reference", 1.5, 2.0, 3.0, 0.1, 0.5, 1e-6, "s", mfu=0.6)
    protocol.write([row], given, results="some")
    (found,) = json.loads((tmp_path / "some-cpu.json").read_text())["rows"]
    assert found["mfu"] == 0.6 and "memory" not in found and "gpu" not in found
    assert (tmp_path / "mine.json").read_text() == (tmp_path / "some-cpu.json").read_text()


def test_at_least_five_rounds(monkeypatch):
    calls = []
    times = protocol.interleave({"w": lambda: calls.append(0)}, rounds=2, device=torch.device("cpu"), seconds=0)
    assert len(times["w"]) == 5 and len(calls) == 6


def test_pictures_that_differ():
    mine = torch.full((1, 1, 10, 10), 100, dtype=torch.uint8)
    one_off, all_off = mine.clone(), mine + 2
    one_off[0, 0, 0, 0] += 3
    assert sampling_latency.differ(mine, mine, "fp32") == (0.0, None)
    assert sampling_latency.differ(mine, one_off, "fp32")[1] == "pictures differ by up to 3.0 grey levels"
    assert sampling_latency.differ(mine, one_off, "bf16") == (3 / 255, None)
    assert sampling_latency.differ(mine, all_off, "fp32") == (2 / 255, None)
    assert sampling_latency.differ(mine, all_off, "bf16")[1] == "pictures differ in the mean by 2.0 grey levels"


def test_the_profile_of_a_step(tmp_path):
    x, w = torch.randn(4, 8, 16, 16), torch.randn(8, 8, 3, 3, requires_grad=True)
    times = step_profile.operator_times(lambda: torch.conv2d(x, w).sum().backward(), torch.device("cpu"))
    assert times["aten::convolution_backward"][1] == 1 and times["aten::convolution_backward"][0] > 0
    times = {"aten::cudnn_convolution": (0.2, 3), "aten::mm": (0.1, 5), "aten::convolution_backward": (0.3, 3)}
    found = step_profile.shares(times, 1.0)
    assert found["convolution_share"] == pytest.approx(0.5) and found["busy_ms"] == pytest.approx(600)
    assert found["operators"][0]["operator"] == "aten::convolution_backward"
    assert step_profile.shares(times, 0.3)["convolution_share"] == pytest.approx(5 / 6), "the profiler slows it down"
    step_profile.write(tmp_path / "profile.json", torch.device("cpu"), "train w fp32", "batch 4", found)
    document = json.loads((tmp_path / "profile.json").read_text())
    assert document["rows"][0] == {
        "work": "profile train w fp32", "size": "batch 4", "operator": "aten::convolution_backward", "share": 0.3,
        "ms": 300.0, "calls": 3,
    } and document["convolution_share"] == pytest.approx(0.5)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "convolution"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", True),
        ("cutlass_tensorop_bf16_s16816dgrad_optimized_bf16", True),
        ("aten::_conv_depthwise2d", True),
        ("ConvolutionBackward0", True),
        ("aten::convert_element_type", False),
        ("nvjet_tst_128x64_64x7_1x2_h_bz_coopA_NNT", False),
    ],
)
def test_what_counts_as_a_convolution(kernel, convolution):
    assert (step_profile.shares({kernel: (1.0, 1)}, 1.0)["convolution_share"] == 1) is convolution


def test_the_step_benchmark_end_to_end(tmp_path, monkeypatch, capsys):
    """Agreement with the trainer, timing, floor, memory and profile, on the digits."""
    monkeypatch.setattr(protocol, "copy_rate", lambda device: 1e10)
    options = ["--device", "cpu", "--batch", "4", "--precision", "fp32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *options, "--profile", str(tmp_path / "profile.json")])
    step_time.main()
    (row,) = json.loads((tmp_path / "step_time-digits-fp32-4-cpu.json").read_text())["rows"]
    assert row["work"] == "train digits fp32" and row["size"] == "batch 4" and row["competitor"] == "reference"
    assert 0 < row["agreement"] < 2e-4 and 0 < row["mfu"] < row["floor_fraction"]
    assert row["memory"]["predicted"] > 20 * 422_353 and row["memory"]["measured"] >= 0
    assert 0 < json.loads((tmp_path / "profile.json").read_text())["convolution_share"] < 1
    assert "peak memory of ours" in capsys.readouterr().out
