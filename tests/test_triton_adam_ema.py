"""The Triton kernels of AdamEMA, interpreted on the CPU, against torch's optimizers and the reference."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: see `make test`", allow_module_level=True)
pytest.importorskip("triton")

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels_adam_ema import LAYOUTS, LEAFED, assert_gate, by_us, gradient, oracle, parameters, plant

from fastambient_kernels import AdamEMA, adam_ema_table, adam_ema_triton


def test_60_steps(nan_filled):
    """Three groups, missing gradients, NaN and infinite entries, and an optimizer loaded on the way."""
    assert_gate(by_us(torch.optim.Adam, "triton", 60, reload_at=31), *oracle(torch.optim.Adam, 60))


@pytest.mark.parametrize(("kind", "bf16"), [(torch.optim.AdamW, False), (torch.optim.Adam, True)])
def test_20_steps(nan_filled, kind, bf16):
    assert_gate(by_us(kind, "triton", 20, bf16=bf16), *oracle(kind, 20, bf16))


def test_leaves(nan_filled):
    found = by_us(torch.optim.Adam, "triton", 20, bf16=True, leafed=LEAFED, reload_at=11)
    assert_gate(found, *oracle(torch.optim.Adam, 20, True))


def test_a_leaf_that_is_not_aligned_uses_masks():
    p = torch.nn.Parameter(torch.randn(adam_ema_triton.CHUNK))
    leaf = torch.zeros(1 + len(p), dtype=torch.bfloat16)[1:]
    optimizer = AdamEMA([p], leaves={p: leaf}, impl="triton")
    leaf.grad = torch.randn(len(p)).bfloat16()
    optimizer.step()
    assert [launch.full for launch in optimizer._table.launches] == [False] and torch.equal(leaf, p.bfloat16())


@pytest.mark.parametrize("fault", ["beta1", "decay", "average", "tail"])
def test_the_gate_sees_a_fault(monkeypatch, fault):
    plant(monkeypatch, fault)
    with pytest.raises(AssertionError, match="error"):
        assert_gate(by_us(torch.optim.Adam, "triton", 20), *oracle(torch.optim.Adam, 20))


@pytest.mark.parametrize("dropped", ["tails", "full chunks", "bfloat16"])
def test_the_gate_sees_a_launch_that_is_left_out(monkeypatch, dropped):
    cut = adam_ema_table._cut

    def fewer(*args, **kwargs):
        chunks, launches = cut(*args, **kwargs)
        missing = {"tails": lambda x: not x.full, "full chunks": lambda x: x.full, "bfloat16": lambda x: x.bf16}[
            dropped
        ]
        assert any(map(missing, launches))
        return chunks, [launch for launch in launches if not missing(launch)]

    monkeypatch.setattr(adam_ema_table, "_cut", fewer)
    bf16 = dropped == "bfloat16"
    monkeypatch.setattr(AdamEMA, "nonfinite", property(lambda self: 0, lambda self, value: None), raising=False)
    with pytest.raises(AssertionError, match="error"):
        assert_gate(by_us(torch.optim.Adam, "triton", 5, bf16=bf16), *oracle(torch.optim.Adam, 5, bf16))


def both(steps, values, *, make=lambda g, step: g, beta=0.7, **options):
    """Final parameters, state and averages by the reference and by Triton, on one sequence of gradients."""
    ended = []
    for impl in ("reference", "triton"):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        optimizer = AdamEMA(params, impl=impl, **options)
        norms = []
        for step in range(steps):
            for i, p in enumerate(params):
                p.grad_dtype = None
                p.grad = make(torch.randn(p.shape, generator=torch.Generator().manual_seed(99 * step + i)), step)
            optimizer.step(ema_betas=[beta] * len(optimizer.emas))
            norms += [optimizer.grad_norm, optimizer.nonfinite]
        state = [t for p in params for t in optimizer.state[p].values()]
        ended.append([*(p.detach() for p in params), *state, *(e for copies in optimizer.emas for e in copies), *norms])
    return ended


def assert_same(ended):
    for reference, triton in zip(*ended, strict=True):
        torch.testing.assert_close(triton, reference, rtol=2e-6, atol=1e-7)


@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 1000, 16383, 16384, 16385, 40000]), min_size=1, max_size=4),
    emas=st.integers(0, 3),
    max_norm=st.sampled_from([None, 0.3, 1e9]),
    beta=st.sampled_from([0.0, 0.3, 0.9999, 1.0]),
    bf16=st.booleans(),
)
@example(sizes=[0, 0, 0, 40000], emas=0, max_norm=None, beta=0.0, bf16=False)  # g + 0.1 p = 1.5e-9 at one element
@settings(max_examples=12, deadline=None)
def test_any_sizes(sizes, emas, max_norm, beta, bf16):
    values = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    ended = both(
        2, values, make=lambda g, step: g.bfloat16() if bf16 else g, beta=beta, emas=emas, max_norm=max_norm,
        weight_decay=0.1, decoupled_weight_decay=bf16, eps=1e-3,
    )  # fmt: skip
    # eps is large: where g and its decay cancel to rounding, 1e-8 would make an update of it, of either sign.
    assert_same(ended)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(nan_filled, layout):
    value = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    assert_same(both(2, [value], make=lambda g, step: LAYOUTS[layout](g), emas=1))


def test_gradients_that_are_not_aligned_use_masks():
    value = torch.randn(2 * adam_ema_triton.CHUNK)
    params = [torch.nn.Parameter(value.clone())]
    optimizer = AdamEMA(params, impl="triton")
    for shift, full in ((0, True), (1, False), (4, True)):
        params[0].grad = torch.zeros(shift + len(value))[shift:]
        optimizer.step()
        assert [launch.full for launch in optimizer._table.launches] == [full]


def test_types_of_gradients_in_one_step():
    values = [torch.randn(n) for n in (20000, 100, 50)]
    types = iter([torch.float32, torch.bfloat16, torch.float16] * 4)
    assert_same(both(2, values, make=lambda g, step: g.to(next(types)), emas=1))


def test_capturable_tensors():
    p, q = (torch.nn.Parameter(torch.ones(9)) for _ in range(2))
    lr, beta = torch.tensor(1.0), torch.tensor(0.0)
    by_tensors = AdamEMA([p], lr=lr, capturable=True, emas=1, impl="triton")
    by_numbers = AdamEMA([q], lr=1.0, emas=1, impl="reference")
    for step in range(3):
        p.grad = q.grad = torch.arange(9.0) - step
        lr.fill_(2.0**-step)
        beta.fill_(step / 4)
        by_numbers.param_groups[0]["lr"] = 2.0**-step
        by_tensors.step(ema_betas=(beta,))
        by_numbers.step(ema_betas=(step / 4,))
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_tensors.emas[0][0], by_numbers.emas[0][0], rtol=1e-6, atol=1e-6)


def test_beta_zero_and_a_learning_rate_of_zero():
    value = torch.randn(100)
    assert_same(both(2, [value], betas=(0.0, 0.0)))
    reference, triton = both(2, [value], lr=0.0)
    assert torch.equal(reference[0], value) and torch.equal(triton[0], value)


def test_clips_as_torch_does(nan_filled):
    theirs, ours = parameters(torch.float32), parameters(torch.float32)
    adam, optimizer = torch.optim.Adam(theirs, eps=0.1), AdamEMA(ours, eps=0.1, max_norm=0.5, impl="triton")
    for step in range(2):
        for i, (p, q) in enumerate(zip(theirs, ours, strict=True)):
            p.grad, q.grad = gradient(step, i, raw=False), gradient(step, i, raw=True)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        adam.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
        for p, q in zip(theirs, ours, strict=True):
            torch.testing.assert_close(p, q)
