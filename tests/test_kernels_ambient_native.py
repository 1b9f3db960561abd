"""The C++ operators of noise and loss against the float64 reference and their own contracts."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from ambient_checks import (
    ANY_SIZE,
    FEW_VALUES,
    KEYS,
    SEEDS,
    assert_rounds_to_nearest_even,
    assert_seen,
    assert_uniforms_of_zero,
    assert_within,
    batch,
    compare,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fastambient_kernels.ambient as ambient
from fastambient_kernels import _native, _registration, ambient_loss, ambient_noise, normal

pytestmark = pytest.mark.skipif(
    _native.missing("ambient_noise") is not None, reason=f"no native library: {_native.missing('ambient_noise')}"
)


@pytest.mark.parametrize("weighting", ["paper", "unit"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("image", [torch.uint8, torch.float32])
@pytest.mark.parametrize("F_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma_tn", [0.0, 0.4, math.inf])
def test_against_the_float64_reference(nan_filled, sigma_tn, F_dtype, image, layout, weighting):
    keywords = KEYS | {"sigma_tn": sigma_tn}
    errors = compare("native", batch(dtype=image), keywords, F_dtype=F_dtype, layout=layout, weighting=weighting)
    assert_within(errors, F_dtype=F_dtype)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.integers(1, 4), height=st.integers(1, 41), width=st.integers(1, 67),
    last=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_size(n, channels, height, width, last, seed):
    layout = torch.channels_last if last else torch.contiguous_format
    errors = compare("native", batch(n, channels, height, width, seed=seed), KEYS, layout=layout)
    assert_within(errors, FEW_VALUES if channels * height * width < 32 else ANY_SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_precomputed_copy(nan_filled, dtype):
    data = batch()
    x_n = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_within(compare("native", data, KEYS, x_n=x_n))


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


def test_rare_words_and_ties():
    assert_uniforms_of_zero("native")
    assert_rounds_to_nearest_even("native")


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

    counter, first = CompileCounterWithBackend("aot_eager"), 0
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic)
    for n, size in ((4, 6), (6, 6), (3, 10)) if dynamic else ((4, 6),):
        images, ids, _, positions, sigma = batch(n, 3, size, size)
        F = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        one, two = F.clone().requires_grad_(), F.clone().requires_grad_()
        a, b = step(one, images, ids, positions, sigma), compiled(two, images, ids, positions, sigma)
        a.backward()
        b.backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)
        first = first or counter.frame_count  # 2 where torch starts over: it has made a float a constant
    assert counter.frame_count == first, "a graph for each size is not dynamic"


def test_every_instruction_set_agrees():
    """FASTAMBIENT_ISA lowers the choice; the baseline must give the same numbers to rounding."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ambient_checks import *\n"
        "assert_within(compare('native', batch(4, 3, 20, 20), KEYS))"
    )
    for isa in ("base", "avx2"):
        environment = os.environ | {"FASTAMBIENT_ISA": isa, "FASTAMBIENT_QUIET": "1"}
        subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], check=True, env=environment)


def test_the_gate_can_fail(monkeypatch):
    """A wrong stream, a wrong coefficient and a forgotten flip are all seen."""
    data = batch()
    native = torch.ops.fastambient.ambient_loss_native.default

    def planted(change):
        monkeypatch.setitem(ambient._loss_ops, "native", lambda F, *rest: native(F, *change(list(rest))))
        assert_seen(compare("native", data, KEYS))

    planted(lambda r: [*r[:6], r[7], r[6], *r[8:]])  # the two seeds
    planted(lambda r: [*r[:8], 0.4001, *r[9:]])  # sigma_tn
    planted(lambda r: [*r[:2], None, *r[3:]])  # flips


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
    monkeypatch.setattr(_native, "missing", lambda operator, device="cpu": "taken away")
    monkeypatch.setattr(_registration, "_chosen", {})  # where it was missing from the start
    with pytest.raises(RuntimeError, match="taken away"):
        ambient_noise(*data, impl="native", **KEYS)
