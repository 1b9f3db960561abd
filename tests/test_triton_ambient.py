"""The Triton kernels of noise and loss, interpreted on a CPU, against the float64 reference and their own contracts."""

from __future__ import annotations

import math
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import torch
from ambient_checks import (
    ANY_SIZE,
    FEW_VALUES,
    KEYS,
    NOISE,
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

import fastambient_kernels.ambient as ambient
from fastambient_kernels import ambient_loss, ambient_noise, normal

triton_common = pytest.importorskip("fastambient_kernels.triton_common")
from fastambient_kernels import ambient_triton  # noqa: E402


def test_triton_is_what_runs(monkeypatch):
    """The comparisons below must not compare the reference with itself."""
    calls = []
    for name in ("noise", "loss"):
        run = getattr(ambient_triton, name)
        monkeypatch.setattr(ambient_triton, name, lambda *a, run=run, name=name: (calls.append(name), run(*a))[1])
    compare("triton", batch(), KEYS)
    assert calls == ["noise", "loss"] and triton_common.INTERPRETED


@pytest.mark.parametrize("weighting", ["paper", "unit"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("image", [torch.uint8, torch.float32])
@pytest.mark.parametrize("F_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma_tn", [0.0, 0.4, math.inf])
def test_against_the_float64_reference(nan_filled, sigma_tn, F_dtype, image, layout, weighting):
    data, keywords = batch(4, 3, 6, 8, dtype=image), KEYS | {"sigma_tn": sigma_tn}
    errors = compare("triton", data, keywords, F_dtype=F_dtype, layout=layout, weighting=weighting)
    assert_within(errors, F_dtype=F_dtype)


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 3), channels=st.integers(1, 4), height=st.integers(1, 17), width=st.integers(1, 19),
    last=st.booleans(), narrow=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_size(n, channels, height, width, last, narrow, seed):
    layout = torch.channels_last if last else torch.contiguous_format
    data, dtype = batch(n, channels, height, width, seed=seed), torch.bfloat16 if narrow else torch.float32
    errors = compare("triton", data, KEYS, layout=layout, F_dtype=dtype)
    assert_within(errors, FEW_VALUES if channels * height * width < 32 else ANY_SIZE, F_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_precomputed_copy(nan_filled, dtype):
    data = batch()
    x_n = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_within(compare("triton", data, KEYS, x_n=x_n))


@pytest.mark.parametrize("F_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [16])
def test_results_depend_on_neither_blocks_nor_batch(monkeypatch, rows, F_dtype):
    """Several programs a sample, the last one partly empty: the same elements, and sums to rounding."""
    data = batch(3, 3, 9, 11)
    F = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1)).to(F_dtype)
    run = lambda d, f: (  # noqa: E731
        ambient_noise(*d, impl="triton", out_dtype=F_dtype, **KEYS).net_input,
        ambient_loss(f, *d, impl="triton", **KEYS),
    )
    whole, losses = run(data, F)
    monkeypatch.setattr(
        ambient_triton, "configuration", lambda numel, itemsize: {"VECTOR": 16 // itemsize, "ROWS": rows}
    )
    split, split_losses = run(data, F)
    assert torch.equal(split, whole)
    torch.testing.assert_close(split_losses, losses, rtol=1e-6, atol=0)
    part = slice(1, 3)
    x, part_losses = run(tuple(v[part] for v in data), F[part])
    assert torch.equal(x, whole[part]) and torch.equal(part_losses, split_losses[part])
    last = F.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(data, last)[1], split_losses)


def test_noise_agrees_with_the_contract():
    """With x0 = 0, c_in undone and sigma = sigma_tn, the input is the fixed noise itself."""
    n, keywords = 4, KEYS | {"sigma_tn": 1.0}
    images, ids = torch.zeros(n, 3, 16, 16), torch.arange(n) * 2**50 + 17
    got = ambient_noise(images, ids, None, ids, torch.ones(n), impl="triton", **keywords)
    z = got.net_input / got.coefficients.c_in.view(-1, 1, 1, 1)
    exact = normal(ids, 768, seed=SEEDS["noise_seed"], stream=0, dtype=torch.float64).view_as(z)
    assert (z - exact).abs().max() < 1e-6 * exact.abs().max()


def test_rare_words_and_ties():
    assert_uniforms_of_zero("triton")
    assert_rounds_to_nearest_even("triton")


def test_rounding_to_bfloat16_is_to_nearest_even():
    """The interpreter's own cast truncates."""
    import triton
    import triton.language as tl

    @triton.jit
    def cast(out, x, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(out + i, triton_common.cast_rne(tl.load(x + i), out.dtype.element_ty))

    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    bits[:8] = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F800000, -0x800000, 0x7F7FFFFF, 0])
    x = bits.to(torch.int32).view(torch.float32)
    out = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](out, x, SIZE=4096)
    expected = x.bfloat16()
    known = ~x.isnan()
    assert torch.equal(out[known].view(torch.int16), expected[known].view(torch.int16)) and out[~known].isnan().all()


def arguments(*, flips=True, x_n=False):
    data = batch(3, 2, 4, 5)
    stored = torch.randn(data[0].shape) if x_n else None
    return ambient._fixed_form(data[0], data[1], data[2] if flips else None, *data[3:], stored, 1, 2, 0.4, 0.5)


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("x_n", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_opcheck(flips, x_n, last):
    data = arguments(flips=flips, x_n=x_n)
    torch.library.opcheck(torch.ops.fastambient.ambient_noise_triton.default, (*data, torch.bfloat16, last))
    F = torch.randn(3, 2, 4, 5).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch.library.opcheck(torch.ops.fastambient.ambient_loss_triton.default, (F, *data, True, last))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def step(F, images, ids, positions, sigma):
        x = ambient_noise(images, ids, None, positions, sigma, impl="triton", **KEYS).net_input
        return ambient_loss(F * x, images, ids, None, positions, sigma, impl="triton", **KEYS).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3) if dynamic else (2,):
        images, ids, _, positions, sigma = batch(n)
        F = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        one, two = F.clone().requires_grad_(), F.clone().requires_grad_()
        a, b = step(one, images, ids, positions, sigma), compiled(two, images, ids, positions, sigma)
        a.backward()  # the loss's gradient arrives expanded
        b.backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)


def test_the_gate_can_fail(monkeypatch):
    """Swapped seeds, a wrong coefficient, a forgotten flip and mistaken addresses are all seen."""
    data = batch()
    loss_op, noise_op = (ops["triton"] for ops in (ambient._loss_ops, ambient._noise_ops))

    def planted(change):
        with monkeypatch.context() as m:
            m.setitem(ambient._loss_ops, "triton", lambda F, *rest: loss_op(F, *change(list(rest))))
            return compare("triton", data, KEYS)

    for change in (
        lambda r: [*r[:6], r[7], r[6], *r[8:]],
        lambda r: [*r[:8], 0.4001, *r[9:]],  # sigma_tn
        lambda r: [*r[:2], None, *r[3:]],  # flips
    ):
        errors = planted(change)
        assert errors[0] < NOISE
        assert_seen(errors)
    with monkeypatch.context() as m:  # channels last written as if contiguous
        m.setitem(ambient._noise_ops, "triton", lambda *a: noise_op(*a[:-1], False))
        with pytest.raises(AssertionError):
            compare("triton", data, KEYS, layout=torch.channels_last)
    with monkeypatch.context() as m:  # neighbours that do not share a row are taken to
        prepare = ambient_triton._prepare

        def wrong(*a):
            tiles, keywords = prepare(*a)
            return tiles, keywords | {"ALIGNED": True}

        m.setattr(ambient_triton, "_prepare", wrong)
        images, ids, _, positions, sigma = batch(4, 3, 6, 7)
        flips = torch.tensor([False, True, True, False])  # not the first: its faulty addresses start before the tensor
        errors = compare("triton", (images, ids, flips, positions, sigma), KEYS)
        assert errors[0] > NOISE
        assert_seen(errors)
