"""Counted work against known numbers, the plan written out by hand, and its errors against measured rows."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastambient import cli, counting, models, planning
from fastambient.counting import Counts, Pass, count
from fastambient.errors import InputError
from fastambient.planning import Machine, Rate, check, compare, counts_of, make_plan, preset_settings
from fastambient_kernels import _native, _registration

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
TINY = {"model_type": "SongUNet", "img_channels": 2, "img_resolution": 8, "model_channels": 8, "num_blocks": 1,
        "channel_mult": [1, 2], "attn_resolutions": [], "dropout": 0.1}  # fmt: skip
COUNTS = Counts(
    parameters=1000, forward=Pass(3e9, 1e9, 2e6, 0, 50), step=Pass(9e9, 3e9, 5e6, 1e5, 120), activations=7e5, joined=100,
    convolution_shape=((4, 8, 8), (4, 4, 3, 3)),
)  # fmt: skip
MACHINE = Machine(
    "m", convolution=Rate(1e12, ""), product=Rate(2e12, ""), copy=Rate(1e11, ""), power=Rate(500, ""), node=2,
    link=Rate(8e9, ""), network=Rate(1e9, ""),
)  # fmt: skip


def counted(preset, **training):
    return counts_of(preset_settings(preset, options={"training": {"augment": 0.0} | training}))


@pytest.mark.parametrize(
    ("preset", "gflop", "parameters"),
    [
        # Of the published networks as shipped: they resample after 1x1 convolutions, and convolve before they halve.
        ("cifar10-ddpmpp", 42.4, 55.7e6),
        ("imagenet64-adm", 219.3, 295.9e6),
        ("cifar10-ncsnpp", 42.8, 56.4e6),
        ("ffhq64-ddpmpp", 83.7, 61.8e6),
        ("ffhq64-ncsnpp", 84.9, 62.8e6),
    ],
)
def test_published_networks(preset, gflop, parameters):
    found = counted(preset)
    assert 0.98 * gflop < found.forward.flops / 1e9 < 1.002 * gflop
    assert 2.95 < found.step.flops / found.forward.flops < 3.05
    assert found.parameters == pytest.approx(parameters, rel=2e-3)
    assert found.convolution_shape[1][2:] == (3, 3)


def test_a_plan_is_of_the_fast_paths_whatever_is_here(monkeypatch):
    """It answers for other machines: not for the triton or the FASTAMBIENT_IMPL of this one."""
    found = count(TINY)
    monkeypatch.setenv("FASTAMBIENT_IMPL", "reference")
    monkeypatch.setattr(_registration, "_TRITON_MISSING", "the package triton is not installed")
    assert count(TINY) == found


@pytest.mark.skipif("group_norm_silu" not in _native.OPERATORS, reason="the real pass keeps more without native code")
def test_flops_and_activations_are_those_of_a_real_pass(monkeypatch):
    monkeypatch.delenv("FASTAMBIENT_IMPL", raising=False)
    network = models.build(TINY).to(memory_format=torch.channels_last)
    found, images = count(TINY), 3
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(images, 2, 8, 8).to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        out = network(x, torch.zeros(images))
        out.backward(torch.ones_like(out))
    flops = counter.get_flop_counts()["Global"]
    aten, ours = torch.ops.aten, torch.ops.fastambient  # a native forward pass and data gradient are one operator
    kinds = (aten.convolution, aten.convolution_backward, ours.convolution_native, ours.conv_weight_native)
    assert images * found.step.convolution == sum(flops.get(kind, 0) for kind in kinds)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.zeros(images))
    flops = counter.get_flop_counts()["Global"]
    assert images * found.forward.convolution == sum(flops.get(kind, 0) for kind in kinds)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    joined = network.block_embeddings.join()[0]
    kept -= joined.nbytes  # weights, too: paid once, however many images
    assert found.joined == joined.numel() > 0
    assert images * found.activations == pytest.approx(kept, rel=0.05)
    half = count(TINY, bf16=True)
    assert half.forward.flops == found.forward.flops
    assert half.activations == pytest.approx(found.activations / 2, rel=0.05)
    assert half.step.bytes == pytest.approx(found.step.bytes / 2, rel=0.1)


def test_attention_is_one_operator(monkeypatch):
    with_it = count(TINY | {"attn_resolutions": [8]})
    none = count(TINY)
    tokens, channels, blocks = 64, 8, 2
    # scores and their product with the values, and 1x1 convolutions to queries, keys, values and back
    assert with_it.forward.flops - none.forward.flops >= blocks * (4 * tokens**2 * channels + 8 * tokens * channels**2)
    monkeypatch.setattr(counting, "_OneAttention", nullcontext)
    written_out = count(TINY | {"attn_resolutions": [8]})
    assert written_out.forward.flops == with_it.forward.flops
    assert written_out.forward.calls > with_it.forward.calls and written_out.activations > with_it.activations


def test_the_plan_written_out():
    p = make_plan(COUNTS, MACHINE, ranks=4, batch=64, kimg=3, bf16=True, batch_gpu=4)
    rounds, share = 4, 16
    assert p.memory == 1000 * (20 + 2 + 4) + 100 * 4 + 4 * 7e5
    assert p.checkpoint == 16 * 1000 and p.sent == 2 * 3 / 4 * 4 * 1000
    assert p.traffic == share * 5e6 + rounds * 1e5 + rounds * 12 * 1000 + 36 * 1000
    assert p.convolution == share * 9e9 / 1e12 and p.product == share * 3e9 / 2e12 and p.bytes == p.traffic / 1e11
    assert p.communication == p.sent / 1e9, "four ranks do not fit a node of two"
    assert p.exposed == 0 and p.step == pytest.approx(p.convolution + p.product + p.bytes)
    assert p.rate == 64 / p.step and p.seconds == pytest.approx(3000 / p.rate)
    assert p.joules == pytest.approx(500 * 4 * p.seconds)
    alone = make_plan(COUNTS, MACHINE, ranks=1, batch=16, kimg=3, bf16=False)
    assert alone.memory == 20 * 1000 + 4 * 100 + 16 * 7e5 and alone.sent == alone.communication == 0
    assert make_plan(COUNTS, MACHINE, ranks=2, batch=16, kimg=3, bf16=False).communication == 4000 / 8e9

    slow = replace(MACHINE, network=Rate(1.0, ""))  # 6,000 s of all-reduce, of which backward hides its own length
    p = make_plan(COUNTS, slow, ranks=4, batch=64, kimg=3, bf16=False)
    assert 0 < p.communication - p.exposed < p.convolution + p.product
    calls = replace(MACHINE, call=Rate(1e-2, ""))
    p = make_plan(COUNTS, calls, ranks=1, batch=16, kimg=3, bf16=False)
    assert p.step == p.calls == 1.2, "preparing operators takes longer than their work"
    p = make_plan(COUNTS, replace(calls, overlaps=False), ranks=1, batch=16, kimg=3, bf16=False)
    assert p.step == pytest.approx(1.2 + p.convolution + p.product + p.bytes)


@pytest.mark.parametrize("device", ["h100", "h200", "a100"])
def test_more_ranks_are_faster_and_never_more_efficient(device):
    found = counted("cifar10-ddpmpp", precision="bf16")
    there = planning.machine(device, found, precision="bf16", images=64)
    plans = [make_plan(found, there, ranks=2**k, batch=64 * 2**k, kimg=1, bf16=True) for k in range(11)]
    assert plans[-1].ranks == 1024
    for one, two in pairwise(plans):
        assert one.rate < two.rate <= 2 * one.rate * (1 + 1e-12) and two.seconds < one.seconds
        assert one.sent < two.sent and one.memory <= two.memory and one.joules <= two.joules * (1 + 1e-12)
    fixed = [make_plan(found, there, ranks=2**k, batch=1024, kimg=1, bf16=True) for k in range(11)]
    assert all(two.memory < one.memory + 5 * found.parameters for one, two in pairwise(fixed))
    assert all(two.convolution == one.convolution / 2 for one, two in pairwise(fixed))


def test_every_rate_says_where_it_comes_from():
    for name in ("h100", "h200", "a100"):
        for precision in ("fp32", "bf16"):
            there = planning.machine(name, COUNTS, precision=precision, images=1)
            rates = [v for v in vars(there).values() if isinstance(v, Rate)]
            assert len(rates) == 7 and all(r.source.startswith(("measured (", "NVIDIA's figure for")) for r in rates)
    text = planning.describe(preset_settings("digits"), device="h100", ranks=1)
    for words in (
        "422,353",
        "of 74.5 GiB a rank",
        "images/s",
        "kWh",
        "3.02e+12 byte/s: measured",
        "assumed: ",
        "calls: unknown",
    ):
        assert words in text
    huge = preset_settings("imagenet64-adm", options={"training": {"batch": 4096}})
    assert "does not fit: lower training.batch_gpu" in planning.describe(huge, device="a100", ranks=1)


def test_a_cpu_is_measured_now(monkeypatch):
    monkeypatch.setattr(planning, "_seconds", lambda work: (work(), 0.5)[1])
    there = planning.machine("cpu", COUNTS, precision="fp32", images=64)
    assert there.convolution.value == 6 * 64 * 64 * (4 * 4 * 9) / 0.5 and there.product.value == 4 * 512**3
    assert there.copy.value == 2 * 2**26 / 0.5 and there.call.value == 0.5 / 120
    assert there.power is None and not there.overlaps and "measured now" in there.copy.source
    assert planning.machine("cpu", COUNTS, precision="bf16", images=64).convolution.value > 0


def test_requests_that_cannot_be_planned():
    for arguments, message in (
        ({"ranks": 0}, "between 1 and 1024, got 0"),
        ({"ranks": 1025}, "between 1 and 1024, got 1025"),
        ({"ranks": 3}, "--batch 16 does not divide among 3 ranks"),
    ):
        with pytest.raises(InputError, match=message):
            make_plan(COUNTS, MACHINE, **({"batch": 16, "kimg": 1, "bf16": False} | arguments))
    with pytest.raises(InputError, match=r"--gpus 2: no rate .* cpu"):
        make_plan(COUNTS, replace(MACHINE, name="cpu", link=None), ranks=2, batch=16, kimg=1, bf16=False)
    with pytest.raises(InputError, match="--device h10: no rates are known; nearest: h100"):
        planning.describe(preset_settings("digits"), device="h10", ranks=1)
    with pytest.raises(InputError, match="--preset digit: there is none; nearest: digits"):
        preset_settings("digit")
    with pytest.raises(InputError, match="there is no such folder"):
        check(Path("nowhere"))


def test_plans_are_held_against_measured_rows(tmp_path, monkeypatch):
    row = {"work": "train digits bf16", "size": "batch 64", "ms": 1.0, "competitor": "reference"}
    document = {"device": "NVIDIA H100 80GB HBM3", "rows": [row, row | {"competitor": "strong"}, {"kimg": 64}]}
    (tmp_path / "step.json").write_text(json.dumps(document))
    (tmp_path / "other.json").write_text(json.dumps({"device": "another", "rows": [row]}))
    (tmp_path / "kernels.json").write_text(json.dumps({"device": "another", "rows": [row | {"work": "adam_ema"}]}))
    (found,), without = compare(tmp_path, here="this CPU")
    expected = make_plan(
        counted("digits", precision="bf16"), planning.machine("h100", COUNTS, precision="bf16", images=64),
        ranks=1, batch=64, kimg=1, bf16=True,
    )  # fmt: skip
    assert found.measured == 1e-3 and found.planned == pytest.approx(expected.step)
    assert found.error == pytest.approx(expected.step / 1e-3 - 1) and without == ["other.json: another"]
    sampled = row | {"work": "sample small32 18 64", "size": "35 evaluations"}
    few = row | {"work": "sample small32 18 64 dpmpp-2m bf16", "size": "18 evaluations"}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rows.json").write_text(json.dumps(document | {"rows": [sampled, few]}))
    heun, dpmpp = compare(tmp_path / "more", here="")[0]
    assert dpmpp.planned < 0.5 * 18 / 35 * heun.planned, "fewer evaluations, and in bf16"
    lines = check(tmp_path).splitlines()
    assert f"{found.error:+.0%}" in lines[1] and "train digits bf16 batch 64" in lines[1] and "other.json" in lines[2]


def test_the_repositorys_rows_can_be_planned(monkeypatch):
    """Every step and sampling row there is has a line with its error, whatever machine this is."""
    monkeypatch.setattr(planning, "_seconds", lambda work: 0.5)
    documents = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    rows = {
        (d["device"], f"{r['work']} {r['size']}") for d in documents for r in d["rows"] if str(r.get("work")).startswith(("train ", "sample "))
    }  # fmt: skip
    found = set()
    for device in {device for device, _ in rows}:
        here = "" if any(name in device.lower() for name in ("h100", "h200", "a100")) else device
        found |= {(c.device, c.work) for c in compare(RESULTS, here=here or "no CPU")[0]}
    assert rows and {key for key in rows if "digits" in key[1]} <= found


def test_the_command(capsys):
    options = [
        "--preset",
        "digits",
        "--gpus",
        "16",
        "--batch",
        "256",
        "--kimg",
        "5",
        "--precision",
        "bf16",
        "--device",
        "h100",
    ]
    cli.app(["plan", *options, "--set", "training.batch_gpu=8"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert out.startswith("digits on 16 x h100, batch 256 (8 images at once), bf16") and not err
    assert "run         5 kimg in" in out
