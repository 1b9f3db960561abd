"""The Triton kernels of group_norm_silu, interpreted on the CPU: both ways of launching them, against float64."""

from __future__ import annotations

import dataclasses
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: see `make test`", allow_module_level=True)
pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_group_norm_silu import assert_within, errors, formula, inputs, native, run

import fastambient_kernels.group_norm_silu_triton as launcher
from fastambient_kernels import GroupNormSiLU, group_norm_silu

WAYS = ["resident", "split"]


def take(monkeypatch, way):
    """Make every launch go one way; split: with several chunks of pixels, as on a GPU with many multiprocessors."""
    limit = {False: 0, True: 0} if way == "split" else {False: 2**20, True: 2**20}
    monkeypatch.setattr(launcher, "_RESIDENT", limit)
    monkeypatch.setattr(launcher, "_processors", lambda device: 4 if way == "split" else 1)
    plans = []
    true_plan = launcher.plan

    def recorded(*args, **kwargs):
        plans.append(true_plan(*args, **kwargs))
        assert plans[-1].resident == (way == "resident")
        return plans[-1]

    monkeypatch.setattr(launcher, "plan", recorded)
    return plans


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((2, 24, 8, 8), 6), ((1, 64, 5, 7), 16), ((1, 96, 4, 4), 32), ((2, 16, 1, 1), 4)])  # fmt: skip
def test_against_float64(nan_filled, monkeypatch, way, dtype, last, shape, groups):
    take(monkeypatch, way)
    assert_within(errors("triton", inputs(shape, last=last), groups, dtype), dtype)


@pytest.mark.parametrize("last", [True, False])
def test_several_chunks_of_pixels_and_blocks_of_channels(nan_filled, monkeypatch, last):
    plans = take(monkeypatch, "split")
    shape = (1, 144, 33, 31) if last else (1, 12, 40, 41)
    assert_within(errors("triton", inputs(shape, last=last), 12, torch.float32), torch.float32)
    assert all(p.tiles > 1 for p in plans) and any(p.block_c < shape[1] for p in plans)


@pytest.mark.parametrize("way", WAYS)
def test_the_widest_layer(nan_filled, monkeypatch, way):
    take(monkeypatch, way)
    assert_within(errors("triton", inputs((1, 1536, 2, 2), last=True), 32, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optional", [(), ("scale",), ("shift",), ("add",), ("add", "shift")])
@pytest.mark.parametrize("silu", [True, False])
def test_optional_inputs(nan_filled, monkeypatch, way, optional, silu):
    take(monkeypatch, way)
    found = errors("triton", inputs((2, 32, 3, 5), optional=optional, last=True), 8, torch.float32, silu=silu, eps=1e-6)
    assert set(found) == {"y", "x", "weight", "bias", *optional}
    assert_within(found, torch.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("last", [True, False])
def test_a_large_mean_does_not_cancel(monkeypatch, way, last):
    take(monkeypatch, way)
    found = errors("triton", inputs((1, 32, 16, 16), optional=(), last=last, offset=1e4), 8, torch.float32)
    assert found["y"][0] < 5e-3 and found["x"][0] < 5e-3 * found["x"][2]  # x itself is held to 5e-4 there


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 3), per_group=st.integers(1, 9), groups=st.integers(1, 9), height=st.integers(1, 9),
    width=st.integers(1, 20), last=st.booleans(), way=st.sampled_from(WAYS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(n, per_group, groups, height, width, last, way, seed):
    if per_group * height * width == 1:
        return  # a group of one value: its variance is 0 and nothing is left to compare
    made = inputs((n, per_group * groups, height, width), last=last, seed=seed)
    exact = formula(
        made["x"], made["weight"], made["bias"], groups, 1e-2, made["scale"], made["shift"], made["add"], True
    )
    with pytest.MonkeyPatch.context() as patch:
        take(patch, way)
        ours = group_norm_silu(**{k: v.float() for k, v in made.items()}, groups=groups, eps=1e-2, impl="triton")
    assert (ours.double() - exact).abs().max() < 2e-5 * max(1, exact.abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_independent_of_batch_and_strides(monkeypatch, way):
    take(monkeypatch, way)
    made = {k: v.float() for k, v in inputs((3, 24, 4, 5), last=True).items()}
    affine = torch.cat([made["scale"], made["shift"]], dim=1)  # scale and shift as views of a wider row
    views = made | dict(zip(("scale", "shift"), affine.chunk(2, dim=1), strict=True))
    call = lambda m: group_norm_silu(**m, groups=6, impl="triton")  # noqa: E731
    y = call(made)
    assert torch.equal(y, call(views))
    part = {k: v[1:2] if k in ("x", "scale", "shift", "add") else v for k, v in views.items()}
    assert torch.equal(call(part)[0], y[1])


@native
@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_the_native_library(monkeypatch, way):
    take(monkeypatch, way)
    made, dy = inputs((2, 48, 4, 4), last=True), torch.randn(2, 48, 4, 4)
    (y, grads), (y2, grads2) = (
        run(lambda impl=impl, **k: group_norm_silu(groups=12, impl=impl, **k), made, torch.float32, dy)
        for impl in ("triton", "native")
    )
    for a, b in [(y, y2), *((grads[k], grads2[k]) for k in grads)]:
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


@pytest.mark.parametrize("optional", [(), ("scale", "shift", "add")])
def test_opcheck(optional):
    made = {k: None if v is None else v.float() for k, v in inputs((2, 24, 3, 5), optional=optional, last=True).items()}
    extra = (made["scale"], made["shift"], made["add"])
    forward = (made["x"], made["weight"], made["bias"], *extra, 6, 1e-5, True)
    torch.library.opcheck(torch.ops.fastambient.group_norm_silu_triton.default, forward)
    _, mean, rstd = torch.ops.fastambient.group_norm_silu_triton(*forward)
    backward = (torch.randn_like(made["x"]), made["x"], mean, rstd, made["weight"], made["bias"], *extra, 6, True)
    torch.library.opcheck(torch.ops.fastambient.group_norm_silu_backward_triton.default, backward)


def test_compiles_as_one_graph():
    module = GroupNormSiLU(6, 24, impl="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, 24, 4, 4)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = module(one), compiled(two)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)


@settings(max_examples=300, deadline=None)
@given(
    samples=st.integers(1, 200), per_group=st.integers(1, 48), groups=st.integers(1, 32), pixels=st.integers(1, 20000),
    last=st.booleans(), itemsize=st.sampled_from([2, 4]), backward=st.booleans(), processors=st.integers(1, 200),
)  # fmt: skip
def test_a_plan_covers_everything_once(samples, per_group, groups, pixels, last, itemsize, backward, processors):
    channels = per_group * groups
    p = launcher.plan(
        samples, channels, pixels, groups, channels_last=last, itemsize=itemsize, backward=backward,
        processors=processors,
    )  # fmt: skip
    assert all(v & (v - 1) == 0 for v in (p.block_g, p.block_c, p.block_p, p.warps)) and p.size == per_group
    if p.resident:
        assert p.block_p >= pixels and p.block_c >= min(p.block_g, groups) * per_group
        assert p.block_c * p.block_p <= launcher._RESIDENT[backward]
        row = p.block_g * per_group * itemsize
        assert not last or p.block_g >= groups or (row % 16 == 0 and row >= 32)
    else:
        assert (p.tiles - 1) * p.chunk < pixels <= p.tiles * p.chunk and p.chunk % p.block_p == 0
        assert p.block_c * p.block_p <= 4096


PLAN_FAULTS = {  # what is wrong, and the way that shows it; none of them touches memory outside of the tensors
    "pixels are left out": ("resident", lambda p: dataclasses.replace(p, block_p=p.block_p // 2)),
    "channels are left out": ("resident", lambda p: dataclasses.replace(p, block_c=p.block_c // 2)),
    "a chunk is left out": ("split", lambda p: dataclasses.replace(p, tiles=p.tiles - 1)),
}
KERNEL_FAULTS = [  # a constant of one kernel
    ("resident", "forward_resident", {"CHANNELS_LAST": False}),
    ("resident", "backward_resident", {"SILU": False}),
    ("split", "partial_moments", {"CHANNELS_LAST": False}),
    ("split", "combine_moments", {"BLOCK_S": 2}),
    ("split", "partial_sums", {"SILU": False}),
    ("split", "combine_sums", {"BLOCK_S": 2}),
    ("split", "backward_split", {"CHANNELS_LAST": False}),
]


def picture(way):
    return inputs((1, 32, *((70, 60) if way == "split" else (12, 10))), last=True)


@pytest.mark.parametrize("fault", PLAN_FAULTS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_gate_sees_a_wrong_plan(nan_filled, monkeypatch, fault, backward):
    way, change = PLAN_FAULTS[fault]
    take(monkeypatch, way)
    sound, made = launcher.plan, picture(way)
    assert_within(errors("triton", made, 8, torch.float32), torch.float32)
    broken = lambda *a, **k: change(sound(*a, **k)) if k["backward"] == backward else sound(*a, **k)  # noqa: E731
    monkeypatch.setattr(launcher, "plan", broken)
    with pytest.raises(AssertionError):
        assert_within(errors("triton", made, 8, torch.float32), torch.float32)


@pytest.mark.parametrize(("way", "name", "constants"), KERNEL_FAULTS)
def test_the_gate_sees_a_wrong_kernel(nan_filled, monkeypatch, way, name, constants):
    class Broken:
        kernel = getattr(launcher.kernels, name)

        def __getitem__(self, grid):
            return lambda *a, **k: self.kernel[grid](*a, **k | constants)

    take(monkeypatch, way)
    monkeypatch.setattr(launcher.kernels, name, Broken())
    with pytest.raises(AssertionError):
        assert_within(errors("triton", picture(way), 8, torch.float32), torch.float32)
