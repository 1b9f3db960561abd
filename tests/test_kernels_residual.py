"""residual against a float64 form written from the mathematics, and its contracts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastambient_kernels import _native, residual

operator = importlib.import_module("fastambient_kernels.residual")  # the package names its function so, too
MISSING = _native.missing("residual")
native = pytest.mark.skipif(MISSING is not None, reason=f"no native library: {MISSING}")
IMPLEMENTATIONS = ["reference", pytest.param("native", marks=native)]
DTYPES = [torch.float32, torch.bfloat16]
SCALE = 0.5**0.5
SHAPES = [(2, 24, 8, 8), (3, 64, 5, 7), (2, 256, 4, 4), (1, 1536, 3, 3), (2, 16, 1, 1), (2, 5, 33, 31), (70, 3, 2, 2),
          (1, 2, 100, 100), (3, 40, 30, 30)]  # fmt: skip


def in_format(x, last):
    return x.contiguous(memory_format=torch.channels_last if last and x.dim() == 4 else torch.contiguous_format)


def inputs(shape, *, bias=True, last=False, seed=0, dtype=torch.float32):
    """(y, x, bias, dy) as `dtype` holds them; the bias is float32."""
    g = torch.Generator().manual_seed(seed)
    y, x, dy = (in_format(torch.randn(shape, generator=g), last).to(dtype) for _ in range(3))
    return y, x, torch.randn(shape[1], generator=g) if bias else None, dy


def results(run, y, x, bias, dy):
    """(output, gradients of y, x and the bias)"""
    leaves = [v.detach().clone().requires_grad_() for v in (y, x, bias) if v is not None]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dy)


def exact(y, x, bias, dy, scale):
    """In float64, without automatic differentiation."""
    y, x, dy = y.double(), x.double(), dy.double()
    b = 0 if bias is None else bias.double().view(-1, *[1] * (y.dim() - 2))
    d = dy * scale
    return (y + x + b) * scale, d, d, *([] if bias is None else [d.transpose(0, 1).flatten(1).sum(1)])


def assert_right(found, made, scale=SCALE, *, d_bias=2e-6):
    """Roundings of three operations in float32, of the scale and to the dtype. The gradient of the bias is held to
    the sizes that it adds up: see docs/numerics.md."""
    right, (largest, _, _, *sizes) = (
        exact(*values, factor)
        for values, factor in ((made, scale), ([v if v is None else v.abs() for v in made], abs(scale)))
    )
    dtype = made[0].dtype
    assert len(found) == len(right)
    for value, expected, size in zip(found[:3], right[:3], (largest, 0, 0), strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        rounding = (2.0**-8 if dtype == torch.bfloat16 else 0) + 2 * 2.0**-24
        assert ((value.double() - expected).abs() <= rounding * expected.abs() + 3 * 2.0**-24 * size).all()
    for value, expected, size in zip(found[3:], right[3:], sizes, strict=True):
        assert value.dtype == torch.float32
        assert ((value.double() - expected).abs() <= d_bias * size).all()


def call(impl, scale=SCALE):
    return lambda *leaves: residual(*leaves, scale=scale, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(nan_filled, impl, dtype, last, shape):
    made = inputs(shape, last=last, dtype=dtype)
    found = results(call(impl), *made)
    assert found[0].stride() == made[0].stride()
    assert_right(found, made)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, SCALE, -3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(2, 48, 6, 5), (1, 20, 60, 50)])
def test_with_and_without_bias_and_scale(nan_filled, impl, dtype, scale, bias, last, shape):
    made = inputs(shape, bias=bias, last=last, dtype=dtype)
    assert_right(results(call(impl, scale), *made), made, scale)


@native
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.integers(1, 40), height=st.integers(1, 41), width=st.integers(1, 67),
    last=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(n, channels, height, width, last, bias, seed):
    made = inputs((n, channels, height, width), bias=bias, last=last, seed=seed)
    assert_right(results(call("native"), *made), made)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 9), (2, 24, 3, 4, 5)])
def test_any_number_of_spatial_dimensions(impl, shape):
    made = list(inputs(shape))
    if len(shape) == 5:
        made[0] = made[0].contiguous(memory_format=torch.channels_last_3d)
    assert_right(results(call(impl), *made), made)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("last", [True, False])
def test_formats_that_differ_give_the_same(impl, last):
    y, x, bias, dy = inputs((3, 24, 6, 5), last=last)
    right = results(call(impl), y, x, bias, dy)
    other = results(call(impl), y, in_format(x, not last), bias, in_format(dy, not last))
    assert other[0].stride() == y.stride() and all(map(torch.equal, other[: 4 if impl == "native" else 3], right))
    wide = torch.cat([x, x], 1)[:, ::2]  # channels two apart
    assert_right(results(call(impl), y, wide, bias, dy), (y, wide, bias, dy))
    expanded = torch.ones(()).expand(y.shape)  # what sum() hands back
    assert_right(results(call(impl), y, x, bias, expanded), (y, x, bias, expanded))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_dtypes_become_the_wider_one(impl):
    y, x, bias, dy = inputs((2, 24, 4, 4), last=True)
    low, half = y.bfloat16(), bias.bfloat16()
    found = results(call(impl), low, x, half, dy)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[3].dtype == torch.bfloat16
    assert torch.equal(found[0], residual(low.float(), x, half.float(), SCALE, impl=impl))


@native
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 40, 40), (7, 24, 33, 9), (300, 40, 4, 4)])
def test_threads_change_no_bit(last, shape):
    made = inputs(shape, last=last)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(call("native"), *made))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@native
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sum_keeps_its_digits(last, dtype):
    """A million values of one sign: one running float32 sum would be off by 1e-4."""
    y, x, bias, dy = inputs((16, 4, 256, 256), last=last, dtype=dtype)
    dy = dy.abs() + 1
    found = results(call("native"), y, x, bias, dy)[3].double()
    right = exact(y, x, bias, dy, SCALE)[3]
    assert ((found - right).abs() / right).max() < 1e-6


@native
def test_only_what_is_wanted_is_computed(monkeypatch):
    """At scale 1 the gradient is what came in; the bias is summed where it wants a gradient."""
    y, x, bias, dy = inputs((2, 24, 4, 4), last=True)
    calls, run = [], operator._backward_ops["native"]
    monkeypatch.setitem(operator._backward_ops, "native", lambda *a: calls.append(a[1:]) or run(*a))
    dx = results(call("native", 1.0), y, x, None, dy)[2]
    assert calls == [] and torch.equal(dx, dy)
    leaf = x.clone().requires_grad_()
    residual(y, leaf, bias, 1.0, impl="native").backward(dy)
    assert calls == [] and torch.equal(leaf.grad, dy)
    results(call("native", 1.0), y, x, bias, dy)
    results(call("native", 0.5), y, x, None, dy)
    assert calls == [(1.0, True), (0.5, False)]
    d, d_bias = run(dy, 1.0, True)
    assert d.numel() == 0 and d_bias.shape == (24,)


def test_gradcheck():
    y, x, bias, _ = (v.double().requires_grad_() for v in inputs((2, 3, 2, 2)))
    assert torch.autograd.gradcheck(lambda *a: residual(*a, scale=0.6), (y, x, bias))


@native
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_opcheck(last, bias, scale):
    y, x, b, dy = inputs((2, 24, 3, 5), last=last, bias=bias)
    torch.library.opcheck(torch.ops.fastambient.residual_native.default, (y, x, b, scale))
    if bias or scale != 1:
        torch.library.opcheck(torch.ops.fastambient.residual_backward_native.default, (dy, scale, bias))


@native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    compiled = torch.compile(call("native"), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3) if dynamic else (2,):
        made = inputs((n, 24, 4, 4), last=True)
        for a, b in zip(results(compiled, *made), results(call("native"), *made), strict=True):
            assert torch.equal(a, b)


@native
@pytest.mark.slow
def test_inductor():
    made = inputs((2, 24, 4, 4), last=True)
    compiled = torch.compile(call("native"), fullgraph=True)
    torch.testing.assert_close(results(compiled, *made), results(call("native"), *made))


@native
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set(isa):
    """FASTAMBIENT_ISA lowers the choice; the other tests run what this machine has best."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_kernels_residual as t
for shape in t.SHAPES:
    for last in (False, True):
        for dtype in t.DTYPES:
            made = t.inputs(shape, last=last, dtype=dtype)
            t.assert_right(t.results(t.call("native"), *made), made)
"""
    environment = os.environ | {"FASTAMBIENT_ISA": isa, "FASTAMBIENT_QUIET": "1"}
    subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], check=True, env=environment)


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is(dtype):
    y, x, bias, dy = inputs((2, 24, 4, 4), last=True, dtype=dtype)
    y[1, 3, 2, 1], dy[0, 5, 0, 0] = torch.nan, torch.inf
    out, d, _, d_bias = results(call("native"), y, x, bias, dy)
    assert out.isnan().nonzero().tolist() == [[1, 3, 2, 1]] and out.isfinite().sum() == out.numel() - 1
    assert d.isinf().nonzero().tolist() == [[0, 5, 0, 0]] and d_bias.isinf().nonzero().tolist() == [[5]]


@native
def test_a_fault_would_show(monkeypatch):
    """A bias that is shifted, a scale forgotten, a pixel or a sample that the sum leaves out."""
    made = inputs((2, 24, 6, 5), last=True)
    forward, backward = operator._ops["native"], operator._backward_ops["native"]

    def without(dy, part):
        dy = dy.clone()
        dy[part] = 0
        return dy

    faults = [
        ("_ops", lambda y, x, b, s: forward(y, x, b.roll(1), s)),
        ("_ops", lambda y, x, b, s: forward(y, x, b, 1.0)),
        ("_ops", lambda y, x, b, s: forward(y, x, None, s)),
        ("_backward_ops", lambda dy, s, b: (backward(dy, s, b)[0] * 1.0001, backward(dy, s, b)[1])),
        ("_backward_ops", lambda dy, s, b: (backward(dy, s, b)[0], backward(without(dy, (0, 0, 5, 4)), s, b)[1])),
        ("_backward_ops", lambda dy, s, b: (backward(dy, s, b)[0], backward(without(dy, 1), s, b)[1])),
    ]
    for name, fault in faults:
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setitem(getattr(operator, name), "native", fault)
            assert_right(results(call("native"), *made), made)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 5), (2, 0, 4, 4)])
def test_nothing_to_do(impl, shape):
    y, x, bias, dy = inputs(shape)
    found = results(call(impl), y, x, bias, dy)
    assert found[0].shape == shape and torch.equal(found[3], torch.zeros(shape[1]))


@pytest.mark.parametrize("setting", ["auto", "native", "triton"])
def test_float64_takes_the_reference_unless_another_is_named(monkeypatch, setting):
    monkeypatch.setenv("FASTAMBIENT_IMPL", setting)
    y, x, bias, _ = inputs((2, 24, 3, 3))
    assert residual(y.double(), x, bias).dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        residual(y.double(), x, bias, impl="native")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), r"x must be \[2, 3, 4\] as y is, got \[2, 3, 5\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)), r"bias must be \[3\], got \[2\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3)), r"bias must be \[3\], got \[1, 3\]"),
        ((torch.zeros(3), torch.zeros(3)), "y and x must be float"),
        ((torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3)), "y and x must be float"),
    ],
)
def test_errors_name_the_value(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        residual(*arguments)


@native
def test_the_operator_checks_what_it_is_given():
    y, x, bias, _ = inputs((2, 24, 4, 4), last=True)
    run, back = torch.ops.fastambient_native.residual, torch.ops.fastambient_native.residual_backward
    for bad, message in (
        ((y, x.contiguous(), bias, 1.0, y), "x must have the dtype, shape and memory format"),
        ((y, x, bias[:3], 1.0, y), "bias must be contiguous float32 with 24 elements"),
        ((y, x, bias, 1.0, y.bfloat16()), "the output must have"),
        ((y[:, :, ::2], x[:, :, ::2], bias, 1.0, y[:, :, ::2]), "contiguous or channels-last"),
        ((y.double(), x.double(), bias, 1.0, y), "float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*bad)
    with pytest.raises(RuntimeError, match="nothing to compute"):
        back(y, 1.0, None, None)
