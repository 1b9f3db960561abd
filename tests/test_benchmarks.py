"""The competitors compute what they are compared with, and the floor counts what a network does."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.samplers import dpmpp_2m, heun
from fastambient.models import blocks, layers
from fastambient.nvml import Reading

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import audit_time
import baselines
import data_loading
import floor
import gpu_suite
import loss_curve
import parts
import protocol
import sampling_latency
import step_profile
import step_time
import tables

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


@pytest.mark.parametrize("rearranged", [baselines.as_shipped, baselines.by_torch])
@pytest.mark.parametrize("name", NETWORKS)
def test_competitors_are_the_same_network(name, rearranged, monkeypatch):
    """From torch's operators alone: none of ours is called."""
    ours = made(name).to(memory_format=torch.channels_last)
    theirs = rearranged(copy.deepcopy(ours))
    x, c_noise = torch.randn(3, 2, 8, 8), torch.randn(3)
    for network in (ours, theirs):
        network.out = network(x, c_noise)
        network.out.square().sum().backward()
        for module in (blocks, layers):
            for operator in ("conv2d", "group_norm_silu", "residual", "resample"):
                monkeypatch.setattr(module, operator, None, raising=False)
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


def test_the_floor_of_bf16_is_counted_in_bf16(monkeypatch):
    """The same products, and what fits in memory as a bf16 step must not be run in float32 to be counted."""
    seen = []
    network = made("ddpmpp")
    network.dec["8x8_block1"].register_forward_hook(lambda module, arguments, out: seen.append(out.dtype))
    monkeypatch.setattr(floor, "_seconds", lambda *_: 1.0)
    x = torch.randn(2, 2, 8, 8)
    half, full = (floor.measure(network, x, dtype=dtype, rate=1e9) for dtype in (torch.bfloat16, torch.float32))
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert half.products == full.products and half.flops == full.flops


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
        ("fastambient_native::convolution", True),
        ("fastambient_native::conv_weight", True),
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


def test_the_audit_benchmark_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_time, "read", None)
    monkeypatch.setattr(
        sys, "argv", ["audit_time.py", "--device", "cpu", "--quick", "--rounds", "5", "--out", str(tmp_path)]
    )
    audit_time.main()
    rows = json.loads((tmp_path / "audit_time-quick-cpu.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["nearest 20 500", "nearest 100 500", "nearest 100 500 flips", "audit 30"]
    assert rows[0]["competitor"] == "torch.cdist" and rows[0]["ratio"] > 0 and 0 <= rows[0]["agreement"] < 1e-3
    assert rows[1]["headroom"] == pytest.approx(60e3 / rows[1]["ms"]) and "headroom" not in rows[2]
    told = [{"device": "x, 2 cores, 1 threads", "date": "d"} | row | {"work": w} for row, w in zip(rows, (
        "nearest 1000 50000", "nearest 10000 50000", "nearest 10000 50000 flips", "audit 300"), strict=True)]  # fmt: skip
    page = tables.table("audits", told)
    assert page.count("60 s reached") == 2 and "| torch.cdist |" in page and page.count("| - | - | - |") == 1
    told[3]["headroom"] = 0.9
    assert tables.table("audits", told).count("60 s missed") == 1
    images = audit_time.pictures(40, 1)
    assert images.std() > 20 and len({image.tobytes() for image in images}) == 40
    samples = audit_time.samples_of(images, 20)
    ours, theirs = audit_time.nearest_two(samples, images), audit_time.by_cdist(samples, images)
    assert (ours.index[:, 0] == theirs[0][:, 0]).mean() > 0.9, "a blend lies as near to either side"


def test_each_part_is_taken_out_alone(tmp_path, monkeypatch):
    """The same results without it, within rounding; a part that were wrong would end the benchmark before any time."""
    argv = ["parts.py", "--device", "cpu", "--batch", "2", "--precision", "fp32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    parts.main()
    rows = json.loads((tmp_path / "parts-digits-fp32-cpu.json").read_text())["rows"]
    assert [row["competitor"] for row in rows] == [f"without {name}" for name in parts.PARTS if name != "bf16 leaves"]
    assert {row["work"] for row in rows} == {"part digits fp32"} and all(row["floor_fraction"] is None for row in rows)
    # Masks and optimizers are not in what is compared, and convolutions bring pictures into their layout themselves; all
    # else takes another way to the same numbers.
    same = {f"without {name}" for name in ("dropout", "AdamEMA", "channels-last")}
    assert all(row["agreement"] > 0 or row["competitor"] in same for row in rows)

    plain = parts.PARTS["group_norm_silu"]

    def scaled(trainer):
        plain(trainer)
        with torch.no_grad():
            next(m for m in trainer.network.modules() if hasattr(m, "groups")).weight.mul_(1.01)

    monkeypatch.setitem(parts.PARTS, "group_norm_silu", scaled)
    monkeypatch.setattr(sys, "argv", [*argv, "--parts", "group_norm_silu"])
    with pytest.raises(
        SystemExit, match=r"without group_norm_silu: loss or gradient differs by .*; no time is reported"
    ):
        parts.main()
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [*argv, "--parts", "luck"])
        parts.main()


def test_parts_of_a_step_in_bf16(tmp_path, monkeypatch):
    """Without leaves autocast makes the same numbers of float32 weights; the other parts round elsewhere."""
    names = ["bf16 leaves", "AdamEMA", "residual", "channels-last"]
    options = ["--device", "cpu", "--batch", "2", "--precision", "bf16", "--out", str(tmp_path), "--rounds", "5"]
    monkeypatch.setattr(sys, "argv", ["parts.py", *options, "--parts", ",".join(names)])
    parts.main()
    rows = json.loads((tmp_path / "parts-digits-bf16-cpu.json").read_text())["rows"]
    assert [row["competitor"] for row in rows] == [f"without {name}" for name in names]
    assert [row["agreement"] == 0 for row in rows] == [True, True, False, False]


def test_compiled_steps_have_rows_of_their_own(tmp_path, monkeypatch):
    """Ours alone is compiled: what it is compared with runs as it is. No time is taken where compiling failed."""
    monkeypatch.setattr(protocol, "copy_rate", lambda device: 1e10)
    inside = [0]

    def begin(block, x, emb):
        inside[0] += 1
        return blocks.UNetBlock._begin(block, x, emb)

    def fails(block, x, emb):
        raise RuntimeError("no compiler")

    options = ["--device", "cpu", "--batch", "4", "--precision", "fp32", "--out", str(tmp_path), "--rounds", "5"]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *options, "--compile"])
    monkeypatch.setattr(blocks, "_compiled_parts", lambda: (fails, blocks.UNetBlock._finish))
    with pytest.raises(SystemExit, match="compiling failed; no time is reported"):
        step_time.main()
    monkeypatch.setattr(blocks, "_compiled_parts", lambda: (begin, blocks.UNetBlock._finish))
    calls = []
    monkeypatch.setattr(
        step_time, "measure", lambda network, *_, **__: calls.append(network) or floor.Floor(1e9, 1e-3, 1e-3)
    )
    monkeypatch.setattr(step_time, "report", lambda *_: None)
    step_time.main()
    (row,) = json.loads((tmp_path / "step_time-digits-fp32-4-compiled-cpu.json").read_text())["rows"]
    assert row["work"] == "train digits fp32 compiled" and 0 < row["agreement"] < 2e-4 and inside[0] > 0
    assert not any(m.compiled for m in calls[0].modules() if isinstance(m, blocks.UNetBlock))


def test_the_page_agrees_with_the_rows():
    """`make tables` changes nothing, and no measurement stands outside of a table."""
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.render(page, tables.read_rows(protocol.RESULTS)) == page, "run `make tables`"
    assert all(f"<!-- {name}: begin -->" in page for name in tables.TABLES)
    typed = re.sub(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    assert not re.search(r"\d\s?(x|ms|s|GB/s|TFLOP/s|images/s)\b", typed)


def step_row(**changes):
    row = {
        "work": "train ffhq64-ncsnpp bf16", "size": "batch 64", "competitor": "reference", "ratio": 4.99, "ms": 100.0,
        "ms_competitor": 499.0, "spread": 0.01, "floor_fraction": 0.8, "agreement": 1e-3, "mfu": 0.5,
        "memory": {"predicted": 2.0**31, "measured": 2.0**30},
    }  # fmt: skip
    return row | changes


def test_tables_take_up_new_rows_with_their_targets(tmp_path):
    """Also from subfolders; each row beside the target of its own device, work, size and competitor."""
    rows = [step_row(), step_row(competitor="strong", ratio=1.25), step_row(size="batch 256"),
            step_row(work="train cifar10-ddpmpp bf16", competitor="strong", mfu=0.4)]  # fmt: skip
    document = {"device": "NVIDIA H100 80GB HBM3", "date": "2030-01-02", "rows": rows}
    (tmp_path / "a.json").write_text(
        json.dumps({"device": "a CPU", "date": "2030-01-01", "rows": [{"kimg": 1}, step_row()]})
    )
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.json").write_text(json.dumps(document))
    profile = {
        "work": "train ffhq64-ncsnpp bf16",
        "size": "batch 64",
        "convolution_share": 0.71,
        "step_ms": 100.0,
        "busy_ms": 90.0,
    }
    (tmp_path / "deeper" / "c.json").write_text(json.dumps(document | profile | {"rows": []}))
    found = tables.read_rows(tmp_path)
    text = tables.render("before <!-- step: begin -->\nold\n<!-- step: end --> after", found)
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    cpu, gpu = text.split("NVIDIA H100 80GB HBM3, 2030-01-02:")
    assert "| 4.99x | - |" in cpu, "the targets are an H100's"
    lines = gpu.strip().splitlines()[2:]
    assert "| reference | 4.99x | 5x missed | 100 | 499 | 1% | 80% | 50% | 1.00 / 2.00 | 1.0e-03 |" in lines[0]
    assert "| 1.25x | 1.25x reached |" in lines[1] and "| 4.99x | - |" in lines[2]
    assert "| 1.5x reached, MFU 45% missed |" in lines[3]
    profiled = tables.table("profile", found)
    assert "| `all convolutions` | 71.0% | share 70% reached | 71 |" in profiled
    assert tables.table("loss", found) == "Nothing is measured yet."
    with pytest.raises(ValueError, match=r"<!-- step: end --> is missing"):
        tables.render("<!-- step: begin -->", found)
    with pytest.raises(ValueError, match="speed: not one of step, parts"):
        tables.render("<!-- speed: begin --><!-- speed: end -->", found)


def test_no_time_is_taken_of_a_loader_that_gives_other_bytes(tmp_path, monkeypatch):
    store, cpu = data_loading.make_store(tmp_path, 8, 32), torch.device("cpu")
    data_loading.make_zip(store, tmp_path / "set.zip", 16)
    data_loading.check(store, tmp_path, ["resident"], 8, cpu, 16)
    samples = data_loading.ReferenceSet(tmp_path / "set.zip", store.train.labels)
    (image, noise, mask, label), again = samples[3], samples[3]
    assert np.array_equal(noise, again[1]) and 0.8 < noise.std() < 1.2 and label == store.train.labels[3]
    assert image.dtype == np.uint8 and mask.shape == (1, 1, 1)
    rows = data_loading.StoreRows(store.train, seed=1, use_noisy=True)
    other = data_loading.make_loader("resident", rows, data_loading.Share(8), seed=1, device=cpu, xflip=True)
    monkeypatch.setattr(data_loading, "opened", lambda *_: other)
    with pytest.raises(SystemExit, match="resident: images differ"):
        data_loading.check(store, tmp_path, ["resident"], 8, cpu, 16)
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    data_loading.make_zip(data_loading.make_store(other_folder, 8, 20), tmp_path / "set.zip", 16)
    with pytest.raises(SystemExit, match="reference-loader: picture 0 differs"):
        data_loading.check(store, tmp_path, [], 8, cpu, 16)


@pytest.mark.slow
def test_loading_is_measured(tmp_path, monkeypatch, capsys):
    options = [
        "--device",
        "cpu",
        "--pixels",
        "8",
        "--images",
        "64",
        "--batch",
        "16",
        "--seconds",
        "0.05",
        "--wait-preset",
        "digits",
    ]
    monkeypatch.setattr(sys, "argv", ["data_loading.py", *options, "--out", str(tmp_path)])
    data_loading.main()
    rows = json.loads((tmp_path / "data_loading-cpu.json").read_text())["rows"]
    kinds = [kind for kind in data_loading.LOADERS if f"load 8 {kind}" in {row["work"] for row in rows}]
    assert {"resident", "workers"} <= set(kinds)
    assert [row["work"] for row in rows] == [
        *(f"load 8 {k}" for k in kinds),
        "gather 8",
        *(f"wait digits {k}" for k in kinds),
    ]
    for row in rows[: len(kinds)]:
        assert row["rates"]["images_per_second"] > 0 and row["rates"]["reference_cpu_us"] > 0
    assert all(0 <= row["share"] < 1 and row["share"] + row["working"] == 1 for row in rows[-len(kinds) :])
    assert "| load 8 resident |" in tables.table("loading", tables.read_rows(tmp_path))
    assert "| wait digits workers |" in tables.table("waiting", tables.read_rows(tmp_path))


def test_a_suite_goes_on_after_a_failure(tmp_path, capsys):
    quick = 'print("reference: batch 4 does not fit and is left out")'
    parts = [
        gpu_suite.Part("broken", ["-c", "print('so far'); raise SystemExit('no kernel')"], 30),
        gpu_suite.Part("endless", ["-c", "import time; print('begun', flush=True); time.sleep(60)"], 0.5),
        gpu_suite.Part("fine", ["-c", quick], 30),
    ]
    log = io.StringIO()
    broken, endless, fine = gpu_suite.run_parts(parts, seconds=60, log=log)
    assert (broken.state, endless.state, fine.state) == ("failed", "failed", "done")
    assert broken.notes == ["exit code 1: no kernel"] and endless.notes == ["it took longer than 0 s"]
    assert fine.notes == ["reference: batch 4 does not fit and is left out"] and endless.seconds < 30
    assert "== broken\nso far" in log.getvalue() and "begun" in log.getvalue()
    (late,) = gpu_suite.run_parts(parts[2:], seconds=10, log=log)
    assert late.state == "did not fit" and late.seconds == 0
    said = capsys.readouterr().err
    assert "[3/3] fine: at most" in said and "left for all" in said and "[1/1] fine: did not fit" in said
    protocol.write_json(tmp_path / "x.json", torch.device("cpu"), [step_row()])
    page = gpu_suite.summary([broken, endless, fine, late], tmp_path, torch.device("cpu"))
    assert "| broken | failed | " in page and "exit code 1: no kernel" in page and "train ffhq64-ncsnpp bf16" in page
    assert f"torch {torch.__version__}" in page


def test_a_part_ends_when_it_ends():
    """Not when a process does that it left behind with its output open, as torch.compile leaves workers."""
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '20']); print(p.pid)"
    log = io.StringIO()
    outcome = gpu_suite.run_part(gpu_suite.Part("parent", ["-c", child], 10), 10, log)
    os.kill(int(log.getvalue().split()[-1]), signal.SIGKILL)
    assert outcome.state == "done" and outcome.seconds < 10


def test_the_suite_counts_tests(tmp_path):
    (tmp_path / "test_x.py").write_text("import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n")
    part = gpu_suite.Part("tests", ["-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)], 60)
    assert gpu_suite.run_part(part, 60, io.StringIO()).notes[0].startswith("1 passed, 1 skipped")


@pytest.mark.parametrize(("scale", "device"), [("full", "cuda"), ("tiny", "cpu")])
def test_parts_of_a_suite(scale, device, tmp_path):
    """Every part's options are ones that its benchmark takes, and no two parts write one file."""
    parts = gpu_suite.parts_of(scale, device, tmp_path)
    scripts = {Path(part.command[0]).name for part in parts}
    assert scripts == {"-m", "kernels.py", "step_time.py", "sampling_latency.py"}
    targets = [
        (p.command[0], p.command[2:6], "--compile" in p.command, p.command[p.command.index("--out") + 1])
        for p in parts
        if "--out" in p.command
    ]
    assert all(targets.count(target) == 1 for target in targets)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names) and sum("--profile" in part.command for part in parts) == 3
    if scale == "full":
        for preset in ("cifar10-ddpmpp", "ffhq64-ncsnpp", "imagenet64-adm"):
            assert f"step {preset} 64" in names and f"step {preset} 256" in names
        assert {"sample cifar10-ddpmpp 1,64", "sample cifar10-ddpmpp 512", "sample ffhq64-ncsnpp 512"} <= set(names)


def test_a_suite_keeps_what_it_did_not_write(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text('{"rows": []}')
    monkeypatch.setattr(gpu_suite, "parts_of", lambda *_: [gpu_suite.Part("bad", ["-c", "raise SystemExit(3)"], 30)])
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "cpu", "--scale", "tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    assert ended.value.code == 1 and (tmp_path / "mine.json").is_file()
    assert "| bad | failed |" in (tmp_path / "summary.md").read_text()


def test_the_band_of_a_loss_curve():
    reference = [10.0] * 8
    other = [12.0] * 4 + [8.0] * 4
    found = loss_curve.compare([10.0] * 6 + [11.0, 11.0], reference, other, window=1)
    assert found["deviation"] == pytest.approx(0.1) and found["band"] == pytest.approx(0.2)
    assert found["deviation_over_band"] == pytest.approx(0.5) and found["inside"] and found["steps_within_1e-3"] == 6
    assert not loss_curve.compare([13.0] * 8, reference, other, window=1)["inside"]
    assert loss_curve.compare(reference, reference, other, window=1)["steps_within_1e-3"] == 8
    np.testing.assert_allclose(loss_curve.smooth([1, 2, 3, 6], 2), [1.5, 2.5, 4.5])


def test_the_first_steps_of_both_trainers_are_the_same(tmp_path, monkeypatch):
    """The whole step, optimizer included: five losses of ours and of the reference, and not those of another seed."""
    options = ["--steps", "5", "--out", str(tmp_path), "--plot", str(tmp_path / "curve.svg")]
    monkeypatch.setattr(sys, "argv", ["loss_curve.py", *options])
    monkeypatch.setattr(loss_curve, "BATCH", 8)
    loss_curve.main()
    document = json.loads((tmp_path / "loss_curve-digits-cpu.json").read_text())
    (row,) = document["rows"]
    assert (
        row["work"] == "loss digits 5" and row["steps_within_1e-3"] == 5 and 0 < row["deviation"] < 1e-4 < row["band"]
    )
    assert row["inside"] and len(document["curves"]["ours"]) == len(document["steps"]) == 4
    assert (tmp_path / "curve.svg").read_text().count("<path") > 3
