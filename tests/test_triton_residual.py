"""The Triton kernels of residual, interpreted on the CPU, against float64 and the native library."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: see `make test`", allow_module_level=True)
pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_residual import DTYPES, SCALE, assert_right, call, inputs, native, results

import fastambient_kernels.residual_triton as launcher

SHAPES = [(2, 24, 8, 8), (3, 64, 5, 7), (1, 160, 9, 9), (2, 16, 1, 1), (2, 5, 33, 31)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(nan_filled, dtype, last, shape):
    made = inputs(shape, last=last, dtype=dtype)
    found = results(call("triton"), *made)
    assert found[0].stride() == made[0].stride()
    assert_right(found, made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_with_and_without_bias_and_scale(nan_filled, dtype, scale, bias, last):
    made = inputs((2, 48, 6, 5), bias=bias, last=last, dtype=dtype)
    assert_right(results(call("triton", scale), *made), made, scale)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.integers(1, 40), height=st.integers(1, 30), width=st.integers(1, 40),
    last=st.booleans(), bias=st.booleans(), processors=st.sampled_from([1, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(n, channels, height, width, last, bias, processors, seed):
    made = inputs((n, channels, height, width), bias=bias, last=last, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_processors", lambda device: processors)
        found = results(call("triton"), *made)
    assert_right(found, made)


@native
@pytest.mark.parametrize("last", [True, False])
def test_agrees_with_the_native_library(last):
    made = inputs((2, 48, 10, 12), last=last)
    pairs = zip(results(call("triton"), *made), results(call("native"), *made), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_opcheck(bias, scale):
    y, x, b, dy = inputs((2, 24, 3, 5), last=True, bias=bias)
    torch.library.opcheck(torch.ops.fastambient.residual_triton.default, (y, x, b, scale))
    if bias or scale != 1:
        torch.library.opcheck(torch.ops.fastambient.residual_backward_triton.default, (dy, scale, bias))


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 200), channels=st.integers(1, 1600), height=st.integers(1, 70), width=st.integers(1, 70),
    last=st.booleans(), bias=st.booleans(), processors=st.integers(1, 200),
)  # fmt: skip
def test_a_cut_covers_everything_once(n, channels, height, width, last, bias, processors):
    memory_format = torch.channels_last if last else torch.contiguous_format
    like = torch.empty(n, channels, height, width, device="meta", memory_format=memory_format)
    found = launcher._Call(like, by_channel=bias, processors=processors)
    width, pixels, tiles, chunk = found.cut
    samples = found.rows // tiles
    assert samples * width * pixels == like.numel() and width == (channels if bias else 1)
    assert (tiles - 1) * chunk < pixels <= tiles * chunk and chunk % found.blocks["BLOCK_P"] == 0
    assert found.blocks["BLOCK_C"] * found.blocks["BLOCK_P"] <= launcher._TILE // 4
    assert found.programs == found.rows * -(-width // found.blocks["BLOCK_C"])


FAULTS = {  # what is wrong: the kernel, and what its launch is changed into
    "channels as if contiguous": ("forward", lambda a, k: (a, k | {"CHANNELS_LAST": False})),
    "the same backward": ("backward", lambda a, k: (a, k | {"CHANNELS_LAST": False})),
    "the last pixels of a chunk are left out": ("backward", lambda a, k: ((*a[:7], a[7] - 32), k)),
    "channels without a sum": ("sum_rows", lambda a, k: (a, k | {"BLOCK_C": 8})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_sees_a_wrong_kernel(nan_filled, monkeypatch, fault):
    name, change = FAULTS[fault]
    kernel = getattr(launcher, name)

    class Broken:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                arguments, constants = change(arguments, constants)
                kernel[grid](*arguments, **constants)

            return launch

    made = inputs((2, 40, 12, 10), last=True)
    assert_right(results(call("triton"), *made), made)
    monkeypatch.setattr(launcher, name, Broken())
    with pytest.raises(AssertionError):
        assert_right(results(call("triton"), *made), made)
