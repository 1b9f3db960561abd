"""The Triton kernel of resample, interpreted on a CPU, against the definition in float64 and the native library."""

from __future__ import annotations

import dataclasses
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_resample import FAULTS, MODES, TAPS, compare, native, operator, picture, run

import fastambient_kernels.resample_triton as launcher
from fastambient_kernels import resample


def small_blocks(monkeypatch, most=32):
    """Several programs for a picture, as on a GPU."""
    sound = launcher.plan

    def cut(*arguments):
        p = sound(*arguments)
        units = min(p.units, most // 2)
        return dataclasses.replace(p, rows=min(p.rows, 2), units=units)

    monkeypatch.setattr(launcher, "plan", cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_against_the_definition(nan_filled, mode, last, dtype):
    shape = (2, 24, 8, 6) if last else (1, 3, 8, 6)  # a contiguous one is a program or more for each channel
    compare("triton", shape, (1, 3, 3, 1), mode, 1, dtype=dtype, last=last)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taps", TAPS[1:])
def test_other_taps_and_paddings(nan_filled, mode, taps):
    compare("triton", (1, 3, 5, 7), taps, mode, len(taps) - 1)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_several_programs(nan_filled, monkeypatch, mode, last):
    small_blocks(monkeypatch)
    compare("triton", (1, 24 if last else 2, 9, 6), (1, 3, 3, 1), mode, 1, last=last)


@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 3), channels=st.integers(1, 9), height=st.integers(4, 9), width=st.integers(4, 9),
    mode=st.sampled_from(MODES), pad=st.integers(0, 3), last=st.booleans(), half=st.booleans(),
)  # fmt: skip
def test_any_size(n, channels, height, width, mode, pad, last, half):
    dtype = torch.bfloat16 if half else torch.float32
    compare("triton", (n, channels, height, width), (1, 2, 4, 3), mode, pad, dtype=dtype, last=last, least=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_independent_of_batch_and_blocks(monkeypatch, mode):
    x = picture(3, 8, 6, 6)
    y = run(x, (1, 3, 3, 1), mode, 1, impl="triton")[0]
    assert torch.equal(run(x[1:2], (1, 3, 3, 1), mode, 1, impl="triton")[0], y[1:2])
    small_blocks(monkeypatch, 16)
    assert torch.equal(run(x, (1, 3, 3, 1), mode, 1, impl="triton")[0], y)


@native
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_native_library(mode):
    x = picture(2, 16, 6, 8)
    dy = torch.randn_like(resample(x, (1, 3, 3, 1), mode=mode, impl="native"))
    for a, b in zip(*(run(x, (1, 3, 3, 1), mode, 1, dy, impl) for impl in ("triton", "native")), strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_opcheck():
    x = picture(1, 8, 6, 4)
    for mode, height, width in (("down", 3, 2), ("up", 12, 8)):
        arguments = (x, *operator.geometry((1.0, 3.0, 3.0, 1.0), mode, 1, 1.0), height, width)
        torch.library.opcheck(torch.ops.fastambient.resample_triton.default, arguments)


def test_compiles_as_one_graph():
    def step(x):
        return resample(resample(x, (1, 3, 3, 1), mode="down", impl="triton"), (1, 1), mode="up", impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 8, 4, 4), (1, 8, 6, 4)):
        one, two = (picture(*shape).requires_grad_() for _ in range(2))
        a, b = step(one), compiled(two)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)


@settings(max_examples=300, deadline=None)
@given(
    channels=st.integers(1, 1536), height=st.integers(1, 300), width=st.integers(1, 300),
    itemsize=st.sampled_from([2, 4]), most=st.sampled_from([256, 8192]),
)  # fmt: skip
def test_a_plan_covers_everything(channels, height, width, itemsize, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "INTERPRETED", most == 8192)
        p = launcher.plan(channels, height, width, itemsize)
    assert p.vector * p.groups == channels and p.vector * itemsize <= 16
    assert channels * itemsize % 16 or p.vector * itemsize == 16
    assert all(v & (v - 1) == 0 for v in (p.vector, p.rows, p.units, p.warps))
    assert p.rows * p.units <= most and p.warps == max(1, p.rows * p.units // 32)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_gate_sees_a_wrong_sum(monkeypatch, mode, fault):
    sound = operator.geometry
    monkeypatch.setattr(operator, "geometry", lambda *a: FAULTS[fault](sound(*a)))
    with pytest.raises(AssertionError):
        compare("triton", (1, 8, 6, 6), (1, 2, 4, 1), mode, 1)


@pytest.mark.parametrize("name", ["rows", "units"])
def test_the_gate_sees_a_block_that_is_left_out(nan_filled, monkeypatch, name):
    """The kernel is launched with a smaller block than its grid was made for."""

    class Broken:
        kernel = launcher.resample_kernel

        def __getitem__(self, grid):
            return lambda *a, **k: self.kernel[grid](*a, **k | {name.upper(): k[name.upper()] // 2})

    monkeypatch.setattr(launcher, "resample_kernel", Broken())
    with pytest.raises(AssertionError):
        compare("triton", (1, 8, 6, 6), (1, 3, 3, 1), "up", 1)
