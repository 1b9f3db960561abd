"""group_norm_silu against a float64 form written from the mathematics, and its contracts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from fastambient_kernels import GroupNormSiLU, _native, group_norm_silu

MISSING = _native.missing("group_norm_silu")
native = pytest.mark.skipif(MISSING is not None, reason=f"no native library: {MISSING}")
IMPLEMENTATIONS = ["reference", pytest.param("native", marks=native)]
NAMES = ("x", "weight", "bias", "scale", "shift", "add")


def inputs(shape, *, optional=("scale", "shift", "add"), last=False, seed=0, offset=0.0):
    """Leaves in float64 by name; absent ones are None."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    n, c = shape[:2]
    made = {"x": draw(*shape) + offset, "weight": 1 + 0.2 * draw(c), "bias": 0.3 * draw(c)}
    made |= {name: 0.5 * draw(n, c) if name in optional else None for name in ("scale", "shift", "add")}
    if last:
        made["x"] = made["x"].contiguous(memory_format=torch.channels_last)
    return made


def formula(x, weight, bias, groups, eps, scale, shift, add, silu):
    """The module's mathematics, one line each."""
    spread = lambda v: v.view(*v.shape, *[1] * (x.dim() - 2))  # noqa: E731
    u = x if add is None else x + spread(add)
    grouped = u.reshape(len(x), groups, -1)
    mean = grouped.mean(2, keepdim=True)
    z = ((grouped - mean) / ((grouped - mean).square().mean(2, keepdim=True) + eps).sqrt()).view_as(u)
    w = z * spread(weight[None]) + spread(bias[None])
    w = w * (1 + (0 if scale is None else spread(scale))) + (0 if shift is None else spread(shift))
    return w * torch.sigmoid(w) if silu else w


def run(f, made, dtype, dy, device="cpu"):
    """(y, gradients by name), on the CPU, with x in `dtype` and everything else in float32 (float64 for float64)."""
    other = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        k: None
        if v is None
        else v.to(device, dtype if k == "x" else other)
        .detach()
        .clone(memory_format=torch.preserve_format)
        .requires_grad_()
        for k, v in made.items()
    }
    y = f(**leaves)
    y.backward(dy.to(y))
    return y.detach().cpu(), {k: v.grad.cpu() for k, v in leaves.items() if v is not None}


def errors(impl, made, groups, dtype, *, eps=1e-5, silu=True, dy=None, device="cpu"):
    """(error of impl, error of torch's own pieces in the same dtype, scale) of y and each gradient, as largest
    differences to float64 on the inputs as `dtype` holds them."""
    held = {k: None if v is None else v.to(dtype if k == "x" else torch.float32).double() for k, v in made.items()}
    dy = (
        torch.randn(made["x"].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        if dy is None
        else dy
    )
    dy = dy.to(dtype).double()
    exact = run(lambda **k: formula(groups=groups, eps=eps, silu=silu, **k), held, torch.float64, dy)
    ours = run(lambda **k: group_norm_silu(groups=groups, eps=eps, silu=silu, impl=impl, **k), made, dtype, dy, device)
    # An independent computation in the same dtype: the formula itself, in torch's float32 or bfloat16 operations.
    plain = run(
        lambda **k: formula(groups=groups, eps=eps, silu=silu, **{n: None if v is None else v.to(dtype) for n, v in k.items()}),
        made, dtype, dy,
    )  # fmt: skip
    out = {}
    for name in ("y", *exact[1]):
        e, o, p = (r[0] if name == "y" else r[1][name] for r in (exact, ours, plain))
        scale = e.abs().max().item()
        out[name] = ((o.double() - e).abs().max().item(), (p.double() - e).abs().max().item(), scale)
    assert ours[0].dtype == dtype and ours[0].stride() == made["x"].stride()
    return out


def assert_within(found, dtype):
    """At most twice the error of torch's own low-precision computation, plus a rounding band of the output."""
    for name, (ours, plain, scale) in found.items():
        rounding = scale * (2.0**-8 if dtype == torch.bfloat16 and name in ("y", "x") else 4 * 2.0**-23)
        assert ours <= 2 * plain + rounding, (name, ours, plain, scale)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((2, 24, 8, 8), 6), ((3, 64, 5, 7), 16), ((2, 256, 4, 4), 32), ((1, 1536, 3, 3), 32), ((2, 16, 1, 1), 4), ((2, 48, 33, 31), 12)])  # fmt: skip
def test_against_float64(nan_filled, impl, dtype, last, shape, groups):
    assert_within(errors(impl, inputs(shape, last=last), groups, dtype), dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("optional", [(), ("scale",), ("shift",), ("add",), ("scale", "shift"), ("add", "shift")])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_optional_inputs(nan_filled, impl, optional, silu, last):
    found = errors(impl, inputs((2, 32, 6, 5), optional=optional, last=last), 8, torch.float32, silu=silu, eps=1e-6)
    assert set(found) == {"y", "x", "weight", "bias", *optional}
    assert_within(found, torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("last", [True, False])
def test_a_large_mean_does_not_cancel(impl, last):
    """E[x^2] - E[x]^2 in float32 would lose everything at a mean of 10^4."""
    found = errors(impl, inputs((2, 32, 16, 16), optional=(), last=last, offset=1e4), 8, torch.float32)
    assert found["y"][0] < 5e-3 and found["x"][0] < 5e-3 * found["x"][2]  # x itself is held to 5e-4 there


@native
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 4), per_group=st.integers(1, 9), groups=st.integers(1, 9), height=st.integers(1, 19),
    width=st.integers(1, 40), last=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(n, per_group, groups, height, width, last, seed):
    shape = (n, per_group * groups, height, width)
    if per_group * height * width == 1:
        return  # a group of one value: its variance is 0 and nothing is left to compare
    made = inputs(shape, last=last, seed=seed)
    exact = formula(
        made["x"], made["weight"], made["bias"], groups, 1e-2, made["scale"], made["shift"], made["add"], True
    )
    ours = group_norm_silu(**{k: v.float() for k, v in made.items()}, groups=groups, eps=1e-2, impl="native")
    assert (ours.double() - exact).abs().max() < 2e-5 * max(1, exact.abs().max().item())


@native
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("samples", [1, 4, 6])  # on three threads: pieces of samples, and whole ones
def test_independent_of_threads_and_batch(last, samples):
    made = {k: v.float() for k, v in inputs((samples, 64, 40, 40), last=last).items()}

    def call(m):
        dy = torch.ones(len(m["x"]), 64, 40, 40)
        return run(lambda **k: group_norm_silu(groups=16 if last else 2, impl="native", **k), m, torch.float32, dy)

    y, grads = call(made)
    try:
        torch.set_num_threads(3)
        y3, grads3 = call(made)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(y, y3) and all(torch.equal(grads[k], grads3[k]) for k in grads)
    part, part_grads = call({k: v[-1:] if k in ("x", "scale", "shift", "add") else v for k, v in made.items()})
    assert torch.equal(part[0], y[-1]) and torch.equal(part_grads["x"][0], grads["x"][-1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_awkward_gradients_and_strides(impl):
    made = {k: v.float() for k, v in inputs((3, 32, 4, 4), last=True).items()}
    affine = torch.randn(3, 64)
    scale, shift = affine.chunk(2, dim=1)  # views of a wider row, as an affine layer gives them
    x = made["x"].requires_grad_()
    y = group_norm_silu(x, made["weight"], made["bias"], groups=8, scale=scale, shift=shift, impl=impl)
    y.sum().backward()  # an expanded gradient
    expanded = x.grad.clone()
    x.grad = None
    y = group_norm_silu(
        x, made["weight"], made["bias"], groups=8, scale=scale.contiguous(), shift=shift.contiguous(), impl=impl
    )
    y.backward(torch.ones(3, 32, 4, 4))  # contiguous, while y is channels-last
    torch.testing.assert_close(x.grad, expanded, rtol=0, atol=1e-6)
    expected = formula(x, made["weight"], made["bias"], 8, 1e-5, scale, shift, None, True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_reference():
    made = {k: v.requires_grad_() for k, v in inputs((2, 8, 3, 2)).items()}
    assert torch.autograd.gradcheck(
        lambda *a: group_norm_silu(*a[:3], groups=2, scale=a[3], shift=a[4], add=a[5]), tuple(made.values())
    )


@native
@pytest.mark.parametrize("optional", [(), ("scale", "shift", "add"), ("add",)])
@pytest.mark.parametrize("last", [True, False])
def test_opcheck(optional, last):
    made = {k: None if v is None else v.float() for k, v in inputs((2, 24, 3, 5), optional=optional, last=last).items()}
    extra = (made["scale"], made["shift"], made["add"])
    forward = (made["x"], made["weight"], made["bias"], *extra, 6, 1e-5, True)
    torch.library.opcheck(torch.ops.fastambient.group_norm_silu_native.default, forward)
    _, mean, rstd = torch.ops.fastambient.group_norm_silu_native(*forward)
    backward = (torch.randn_like(made["x"]), made["x"], mean, rstd, made["weight"], made["bias"], *extra, 6, True)
    torch.library.opcheck(torch.ops.fastambient.group_norm_silu_backward_native.default, backward)


@native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    module = GroupNormSiLU(6, 24, impl="native")
    counter, first = CompileCounterWithBackend("aot_eager"), 0
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
    for n, size in ((2, 4), (3, 4), (2, 5)) if dynamic else ((2, 4),):
        x = torch.randn(n, 24, size, size)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = module(one), compiled(two)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)
        first = first or counter.frame_count  # 2 where torch starts over: it has made a float a constant
    assert counter.frame_count == first, "a graph for each size is not dynamic"


def test_a_second_derivative_is_the_references_alone():
    """Refused also where the incoming gradient needs none: a penalty must not become a constant."""
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.ones(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda v: group_norm_silu(v, weight, bias, groups=6), (x,))
    if MISSING is None:
        x = torch.randn(2, 24, 3, 3, requires_grad=True)
        y = group_norm_silu(x, torch.ones(24), torch.zeros(24), groups=6, impl="native")
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (y.sum() + g.square().sum()).backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("last", [True, False])
def test_constant_groups(impl, last):
    """Zero variance: y is silu(bias), up to the mean's own rounding times rstd = 1/sqrt(eps); the gradient is finite."""
    bias = torch.linspace(-2, 2, 24)
    for value in (0.0, 1.0, -100.0, 1e4):
        x = torch.full((2, 24, 9, 9), value)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        y = group_norm_silu(x, torch.ones(24), bias, groups=6, impl=impl)
        y.square().sum().backward()
        band = abs(value) * 2.0**-23 / 1e-5**0.5 + 1e-6
        expected = F.silu(bias).view(1, 24, 1, 1)
        assert (y - expected).abs().max() <= 1.1 * band and x.grad.isfinite().all()


def test_module_replaces_group_norm_and_silu():
    theirs, ours = torch.nn.GroupNorm(6, 24), GroupNormSiLU(6, 24)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 24, 5, 5)
    torch.testing.assert_close(ours(x), F.silu(theirs(x)), rtol=1e-5, atol=1e-5)
    flat = torch.randn(2, 24)
    torch.testing.assert_close(ours(flat), F.silu(theirs(flat)), rtol=1e-5, atol=1e-5)


def test_from_torch_shares_parameters():
    norm = torch.nn.GroupNorm(6, 24, eps=1e-3)
    torch.nn.init.normal_(norm.bias)
    fused = torch.nn.Sequential(GroupNormSiLU.from_torch(norm), torch.nn.Identity())
    x = torch.randn(2, 24, 5, 5)
    torch.testing.assert_close(fused(x), F.silu(norm(x)), rtol=1e-5, atol=1e-5)
    assert fused[0].weight is norm.weight
    assert fused.state_dict().keys() == torch.nn.Sequential(norm, torch.nn.SiLU()).state_dict().keys()
    with pytest.raises(ValueError, match="affine"):
        GroupNormSiLU.from_torch(torch.nn.GroupNorm(6, 24, affine=False))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 9), (2, 24, 3, 4, 5)])
def test_any_number_of_spatial_dimensions(impl, shape):
    made = inputs(shape)
    if len(shape) == 5:
        made["x"] = made["x"].contiguous(memory_format=torch.channels_last_3d)
    assert_within(errors(impl, made, 6, torch.float32), torch.float32)


@pytest.mark.parametrize("setting", ["auto", "native", "triton"])
def test_float64_takes_the_reference_unless_another_is_named(monkeypatch, setting):
    monkeypatch.setenv("FASTAMBIENT_IMPL", setting)
    made = inputs((2, 24, 3, 3))
    assert group_norm_silu(**made, groups=6).dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        group_norm_silu(**made, groups=6, impl="native")


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
def test_extreme_values(dtype, last):
    """Far from 0 silu is 0 or the identity; a NaN stays in its group."""
    made = {k: v.float() for k, v in inputs((1, 32, 9, 9), optional=(), last=last).items() if v is not None}
    made["x"] = made["x"].to(dtype)
    for bias, expected in ((-1e4, 0.0), (-200.0, 0.0), (1e4, 1e4), (200.0, 200.0)):
        x = made["x"].clone().requires_grad_()
        far = torch.full((32,), bias)
        y = group_norm_silu(x, made["weight"] * 0, far, groups=8, impl="native")
        y.sum().backward()
        torch.testing.assert_close(y, torch.full_like(y, expected), rtol=2**-8, atol=1e-30)
        assert x.grad.isfinite().all()
    made["x"][0, 5, 3, 3] = float("nan")
    y = group_norm_silu(**made, groups=8, impl="native")
    assert y[0, 4:8].isnan().all() and not y[0, :4].isnan().any() and not y[0, 8:].isnan().any()


@native
@pytest.mark.parametrize("last", [True, False])
def test_rounds_to_nearest_even(last):
    """Without weight y is the bias, so that its bits can be chosen: ties among them."""
    bits = torch.arange(32, dtype=torch.int32) * 0x30000 + 0x3F800000
    bias = (bits + torch.tensor([0x8000, 0x7FFF, 0x8001, 0x18000], dtype=torch.int32).repeat_interleave(8)).view(
        torch.float32
    )
    x = torch.randn(2, 32, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = group_norm_silu(x, torch.zeros(32), bias, groups=8, silu=False, impl="native")
    assert torch.equal(y, bias.bfloat16().view(1, 32, 1, 1).expand_as(y))


@native
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set(isa):
    """FASTAMBIENT_ISA lowers the choice; the other tests run what this machine has best."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_kernels_group_norm_silu as t
for shape in ((2, 20, 7, 9), (2, 160, 5, 5)):
    for last in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            t.assert_within(t.errors("native", t.inputs(shape, last=last), 5, dtype), dtype)
"""
    environment = os.environ | {"FASTAMBIENT_ISA": isa}
    subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], check=True, env=environment)


@native
@pytest.mark.slow
def test_inductor():
    module = GroupNormSiLU(6, 24, impl="native")
    x = torch.randn(2, 24, 4, 4)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


@native
def test_the_gate_can_fail(monkeypatch):
    """A wrong eps, a shifted group and a missing term of dx are all seen."""
    operator = import_module("fastambient_kernels.group_norm_silu")  # the name of its function, too
    made = inputs((2, 32, 6, 5))
    true_forward, true_backward = operator._forward_ops["native"], operator._backward_ops["native"]
    faults = [
        ("_forward_ops", lambda *a: true_forward(*a[:-2], 1e-3, a[-1])),
        ("_forward_ops", lambda *a: true_forward(*a[:6], 4, *a[7:])),
        ("_backward_ops", lambda *a: tuple(g * 1.001 if i == 0 else g for i, g in enumerate(true_backward(*a)))),
    ]
    for name, fault in faults:
        with monkeypatch.context() as patch:
            patch.setitem(getattr(operator, name), "native", fault)
            with pytest.raises((AssertionError, RuntimeError)):
                assert_within(errors("native", made, 8, torch.float32), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "5 groups cannot share 32 channels"),
        ({"groups": 0}, "0 groups"),
        ({"weight": torch.ones(31)}, r"weight must be \[32\]"),
        ({"scale": torch.ones(2, 31)}, r"scale must be \[2, 32\]"),
        ({"x": torch.ones(2, 32, 4, 4, dtype=torch.int64)}, "x must be float"),
        ({"shift": torch.ones(2, 32, dtype=torch.int64)}, "shift must be float, got torch.int64"),
        ({"add": torch.ones(2, 32, device="meta")}, "add must be on x's device, cpu, not on meta"),
        ({"eps": -1e-5}, "eps must be at least 0"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_errors_name_the_value(change, message):
    arguments = {"x": torch.ones(2, 32, 4, 4), "weight": torch.ones(32), "bias": torch.ones(32), "groups": 8} | change
    with pytest.raises((TypeError, ValueError), match=message):
        group_norm_silu(**arguments)
