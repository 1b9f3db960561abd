"""The C++ operators of noise and loss against the float64 reference and their own contracts."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastambient_kernels.ambient as ambient
from fastambient_kernels import _native, ambient_loss, ambient_noise, normal

pytestmark = pytest.mark.skipif(
    _native.missing("ambient_noise") is not None, reason=f"no native library: {_native.missing('ambient_noise')}"
)
SEEDS = {"noise_seed": 2**64 - 3, "run_seed": 11}
KEYS = {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS}


def batch(n=8, channels=3, height=6, width=6, *, dtype=torch.uint8, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, height, width), generator=g, dtype=torch.uint8)
    if dtype != torch.uint8:
        images = images.to(dtype) / 127.5 - 1
    sigma = torch.exp(torch.randn(n, generator=g) * 1.5 - 0.8)
    sigma[0] = torch.tensor(0.4)  # the boundary
    return (
        images,
        torch.randint(-(2**62), 2**62, (n,), generator=g),
        torch.arange(n) % 3 == 0,
        torch.arange(n) + 2**40,
        sigma,
    )


def worst(got, expected):
    """Largest difference over the largest value, per sample."""
    got, expected = got.double().flatten(1), expected.double().flatten(1)
    return ((got - expected).abs().amax(1) / expected.abs().amax(1)).max().item()


def compare(data, keywords, *, F_dtype=torch.float32, layout=torch.contiguous_format, weighting="paper", x_n=None):
    """(noise error, loss error, dF error) of native against the reference in float64."""
    wide = (data[0] if data[0].dtype == torch.uint8 else data[0].double(), *data[1:4], data[4].double())
    exact = {
        k: torch.tensor(v).item() if k.startswith("sigma") else v for k, v in keywords.items()
    }  # as float32 holds it
    noise = {"out_dtype": F_dtype, "memory_format": layout, "x_n": x_n}
    native = ambient_noise(*data, impl="native", **keywords, **noise)
    reference = ambient_noise(*wide, impl="reference", x_n=x_n, **exact)
    assert native.net_input.dtype == F_dtype and native.net_input.is_contiguous(memory_format=layout)
    for name, a, b in zip(native.coefficients._fields, native.coefficients, reference.coefficients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-7, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    F = (
        normal(data[3], data[0][0].numel(), seed=5, stream=9)
        .view(data[0].shape)
        .to(F_dtype)
        .contiguous(memory_format=layout)
    )
    F, F64 = F.requires_grad_(), F.detach().double().requires_grad_()
    loss = ambient_loss(F, *data, impl="native", weighting=weighting, x_n=x_n, **keywords)
    exact_loss = ambient_loss(F64, *wide, impl="reference", weighting=weighting, x_n=x_n, **exact)
    scale = torch.linspace(0.5, 2, len(loss))
    (loss * scale).sum().backward()
    (exact_loss * scale).sum().backward()
    assert loss.dtype == torch.float32 and F.grad.stride() == F.stride()
    relative = (loss.double() - exact_loss).abs() / (exact_loss.abs() + 1e-9)
    scale_of_F = F64.grad.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (
        worst(native.net_input, reference.net_input),
        relative.max().item(),
        ((F.grad - F64.grad).abs() / scale_of_F).max().item(),
    )


@pytest.mark.parametrize("weighting", ["paper", "unit"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("image", [torch.uint8, torch.float32])
@pytest.mark.parametrize("F_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma_tn", [0.0, 0.4, math.inf])
def test_against_the_float64_reference(nan_filled, sigma_tn, F_dtype, image, layout, weighting):
    noise, loss, dF = compare(
        batch(dtype=image), KEYS | {"sigma_tn": sigma_tn}, F_dtype=F_dtype, layout=layout, weighting=weighting
    )
    rounding = 2.0**-8 if F_dtype == torch.bfloat16 else 0.0
    # dF is rounded when it is written and once more when backward scales it
    assert noise < 1e-6 + rounding and loss < 3e-6 and dF < 2e-6 + 2 * rounding


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.integers(1, 4), height=st.integers(1, 41), width=st.integers(1, 67),
    last=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_size(n, channels, height, width, last, seed):
    layout = torch.channels_last if last else torch.contiguous_format
    noise, loss, dF = compare(batch(n, channels, height, width, seed=seed), KEYS, layout=layout)
    # A single pixel has no larger neighbour to be measured against, so its cancellation shows.
    few = channels * height * width < 32
    assert noise < (1e-4 if few else 1e-6) and loss < (1e-3 if few else 5e-6) and dF < (1e-4 if few else 3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_precomputed_copy(nan_filled, dtype):
    data = batch()
    x_n = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    noise, loss, dF = compare(data, KEYS, x_n=x_n)
    assert noise < 1e-6 and loss < 3e-6 and dF < 2e-6


def test_results_depend_on_neither_batch_nor_threads():
    data = batch(9, 3, 40, 33)
    F = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1))
    whole, losses = ambient_noise(*data, impl="native", **KEYS).net_input, ambient_loss(F, *data, impl="native", **KEYS)
    try:
        torch.set_num_threads(3)
        assert torch.equal(ambient_noise(*data, impl="native", **KEYS).net_input, whole)
        assert torch.equal(ambient_loss(F, *data, impl="native", **KEYS), losses)
    finally:
        torch.set_num_threads(1)
    part = slice(4, 7)
    assert torch.equal(ambient_noise(*(v[part] for v in data), impl="native", **KEYS).net_input, whole[part])
    assert torch.equal(ambient_loss(F[part], *(v[part] for v in data), impl="native", **KEYS), losses[part])
    last = F.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ambient_loss(last, *data, impl="native", **KEYS), losses)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 5), (2, 0, 4, 4), (2, 3, 4, 0)])
def test_nothing_to_do(impl, shape):
    n = shape[0]
    data = (torch.zeros(shape, dtype=torch.uint8), torch.arange(n), None, torch.arange(n), torch.ones(n))
    F = torch.zeros(shape, requires_grad=True)
    loss = ambient_loss(F, *data, impl=impl, **KEYS)
    loss.sum().backward()
    assert ambient_noise(*data, impl=impl, **KEYS).net_input.shape == shape
    assert torch.equal(loss, torch.zeros(n)) and F.grad.shape == shape


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_the_incoming_gradient_is_not_rounded(impl):
    """1/96 in bfloat16 is 0.2 % off: a gradient scaled by it would be biased, and not only rounded."""
    data = batch(2, 3, 32, 32)
    F = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    ambient_loss(F, *data, impl=impl, **KEYS).sum().backward()
    dF, F.grad = F.grad.double(), None
    (ambient_loss(F, *data, impl=impl, **KEYS).sum() / 96).backward()
    assert abs((F.grad.double().abs().sum() * 96 / dF.abs().sum()).item() - 1) < 3e-4


def test_noise_agrees_with_the_reference_to_1e_6():
    """With x0 = 0, c_in undone and sigma = sigma_tn, the input is the fixed noise itself."""
    n, keywords = 16, KEYS | {"sigma_tn": 1.0}
    images, ids = torch.zeros(n, 3, 32, 32), torch.arange(n) * 2**50 + 17
    native = ambient_noise(images, ids, None, ids, torch.ones(n), impl="native", **keywords)
    z = native.net_input / native.coefficients.c_in.view(-1, 1, 1, 1)
    exact = normal(ids, 3072, seed=SEEDS["noise_seed"], stream=0, dtype=torch.float64).view_as(z)
    assert (z - exact).abs().max() < 1e-6 * exact.abs().max()


def arguments(*, flips=True, x_n=False):
    data = batch(3, 2, 4, 5)
    stored = torch.randn(data[0].shape) if x_n else None
    return ambient._fixed_form(data[0], data[1], data[2] if flips else None, *data[3:], stored, 1, 2, 0.4, 0.5)


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("x_n", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_opcheck(flips, x_n, last):
    data = arguments(flips=flips, x_n=x_n)
    torch.library.opcheck(torch.ops.fastambient.ambient_noise_native.default, (*data, torch.bfloat16, last))
    F = torch.randn(3, 2, 4, 5).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch.library.opcheck(torch.ops.fastambient.ambient_loss_native.default, (F, *data, True, last))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def step(F, images, ids, positions, sigma):
        x = ambient_noise(images, ids, None, positions, sigma, impl="native", **KEYS).net_input
        return ambient_loss(F * x, images, ids, None, positions, sigma, impl="native", **KEYS).mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (4, 6) if dynamic else (4,):
        images, ids, _, positions, sigma = batch(n)
        F = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        one, two = F.clone().requires_grad_(), F.clone().requires_grad_()
        a, b = step(one, images, ids, positions, sigma), compiled(two, images, ids, positions, sigma)
        a.backward()
        b.backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)


def test_every_instruction_set_agrees():
    """FASTAMBIENT_ISA lowers the choice; the baseline must give the same numbers to rounding."""
    script = (
        "import torch, sys; sys.path.insert(0, 'tests'); import test_kernels_ambient_native as t\n"
        "print(t.compare(t.batch(4, 3, 20, 20), t.KEYS))"
    )
    for isa in ("base", "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env=os.environ | {"FASTAMBIENT_ISA": isa, "FASTAMBIENT_QUIET": "1"},
        )  # fmt: skip
        noise, loss, dF = (float(v) for v in done.stdout.strip("()\n").split(","))
        assert noise < 1e-6 and loss < 3e-6 and dF < 2e-6, isa


def test_the_gate_can_fail(monkeypatch):
    """A wrong stream, a wrong coefficient and a forgotten flip are all seen."""
    data = batch()
    native = torch.ops.fastambient.ambient_loss_native.default

    def planted(change):
        monkeypatch.setitem(ambient._loss_ops, "native", lambda F, *rest: native(F, *change(list(rest))))
        _, loss, dF = compare(data, KEYS)
        return loss, dF

    swapped = planted(lambda r: [*r[:6], r[7], r[6], *r[8:]])  # the two seeds
    coefficient = planted(lambda r: [*r[:8], 0.4001, *r[9:]])  # sigma_tn
    unflipped = planted(lambda r: [*r[:2], None, *r[3:]])
    for loss, dF in (swapped, coefficient, unflipped):
        assert loss > 3e-6 or dF > 2e-6


def test_named_implementations_are_never_replaced(monkeypatch):
    data = batch()
    with pytest.raises(RuntimeError, match="not available: fast paths compute in float32 and bfloat16, not float64"):
        ambient_noise(*data[:4], data[4].double(), impl="native", **KEYS)
    monkeypatch.setenv("FASTAMBIENT_IMPL", "nonsense")
    with pytest.raises(ValueError, match="FASTAMBIENT_IMPL must be one of"):
        ambient_noise(*data, **KEYS)
    monkeypatch.setenv("FASTAMBIENT_IMPL", "reference")
    reference = ambient_noise(*data, **KEYS).net_input
    assert torch.equal(reference, ambient_noise(*data, impl="reference", **KEYS).net_input)
    monkeypatch.setattr(_native, "missing", lambda operator: "taken away")
    with pytest.raises(RuntimeError, match="taken away"):
        ambient_noise(*data, impl="native", **KEYS)
