"""AdamEMA against torch.optim.Adam and AdamW: numbers, state, clean-up, clipping, averages, and what it refuses."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastambient_kernels import AdamEMA, _native
from fastambient_kernels.adam_ema_table import Launch, Table, _cut

native = pytest.param("native", marks=pytest.mark.skipif(bool(_native.missing("adam_ema")), reason=str(_native.missing("adam_ema"))))  # fmt: skip
IMPLS = ["reference", native]
SHAPES = [(20000,), (3, 5, 3, 3), (1,), (), (511,), (513,), (7, 2)]
BETAS = (0.9, 0.2)  # of the averages: either branch of lerp
NEVER = 5  # this parameter never has a gradient
LEAFED = (0, 2, 4, 6)  # these have bfloat16 leaves, where there are any
GROUPS = [  # settings, and which parameters; betas take either branch of lerp
    ({"lr": 1e-2, "weight_decay": 0.1}, [0, 1]),
    ({"lr": 3e-3, "betas": (0.5, 0.99), "eps": 1e-6}, [2, 3, 4]),
    ({"betas": (0.3, 0.9), "weight_decay": 0.01}, [5, 6]),
]


def groups_of(params):
    return [settings | {"params": [params[i] for i in members]} for settings, members in GROUPS]


def gradient(step, i, *, raw):
    """What parameter i gets; raw: with what the clean-up has to replace."""
    if i == NEVER or (i in (1, 4) and (step + i) % 5 == 0):
        return None
    g = torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(1000 * step + i))
    if step % 50 == 7 and g.numel() > 3:
        bad = (math.nan, math.inf, -math.inf) if raw else (0.0, 1e5, -1e5)
        g.flatten()[:3] = torch.tensor(bad)
    return g


def parameters(dtype):
    make = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape in SHAPES]


def results(params, optimizer, emas):
    state = [optimizer.state[p] for p in params if optimizer.state.get(p)]
    return {
        "p": params, "exp_avg": [s["exp_avg"] for s in state], "exp_avg_sq": [s["exp_avg_sq"] for s in state],
        "step": [s["step"] for s in state], "ema 0": emas[0], "ema 1": emas[1],
    }  # fmt: skip


def by_torch(kind, dtype, steps, *, bf16=False):
    """torch's optimizer (fused in float32, plain in float64), clean gradients, torch's lerp."""
    params = parameters(dtype)
    emas = [[p.detach().clone() for p in params] for _ in BETAS]
    optimizer = kind(groups_of(params), weight_decay=0, fused=dtype is torch.float32)
    for step in range(steps):
        for i, p in enumerate(params):
            g = gradient(step, i, raw=True)
            g = g.bfloat16() if bf16 and g is not None else g  # before the clean-up: it has no 1e5
            p.grad = None if g is None else torch.nan_to_num(g.to(dtype), nan=0.0, posinf=1e5, neginf=-1e5)
        optimizer.step()
        for copies, beta in zip(emas, BETAS, strict=True):
            torch._foreach_lerp_(copies, [p.detach() for p in params], 1 - beta)
    return results(params, optimizer, emas)


def by_us(kind, impl, steps, *, bf16=False, leafed=(), reload_at=None, device="cpu", **options):
    """leafed: parameters whose gradient comes through a leaf, which must be the rounded parameter after each step"""
    params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters(torch.float32)]
    decoupled = kind is torch.optim.AdamW
    leaves = {params[i]: torch.nn.Parameter(params[i].detach().bfloat16()) for i in leafed}

    def make():
        return AdamEMA(groups_of(params), decoupled_weight_decay=decoupled, emas=2, impl=impl, leaves=leaves, **options)

    optimizer = make()
    for step in range(steps):
        if step == reload_at:
            old, optimizer = optimizer, make()
            optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
            optimizer.load_ema_state(old.ema_state())
        for i, p in enumerate(params):
            g = gradient(step, i, raw=True)
            p = leaves.get(p, p)
            if bf16:
                p.grad_dtype = None
            p.grad = None if g is None else (g.bfloat16() if bf16 else g).to(device)
        optimizer.step(ema_betas=BETAS)
        if step % 50 == 7:
            grads = [leaves.get(p, p).grad for p in params]
            assert optimizer.nonfinite == 3 * sum(g is not None and g.numel() > 3 for g in grads)
        else:
            assert optimizer.nonfinite == 0
        assert all(torch.equal(leaf, p.bfloat16()) for p, leaf in leaves.items())
    return results(params, optimizer, optimizer.emas)


def error(got, true):
    """Relative to each entry or the typical one; (largest, root mean square)."""
    got, true = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (got, true))
    relative = (got - true).abs() / (true.abs() + true.abs().median())
    return relative.max(), relative.square().mean().sqrt()


def assert_gate(ours, low, high):
    """At most twice the error of torch's float32 optimizer, and a rounding of float32."""
    for name in ours:
        for what, mine, theirs in zip(("largest", "rms"), error(ours[name], high[name]), error(low[name], high[name]), strict=True):  # fmt: skip
            assert mine <= 2 * theirs + 2**-24, f"{name}: {what} error {mine:.2e}, torch's is {theirs:.2e}"


@cache
def oracle(kind, steps, bf16=False):
    """(float32, float64)"""
    return tuple(by_torch(kind, dtype, steps, bf16=bf16) for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("impl", IMPLS)
def test_200_steps(nan_filled, impl, kind):
    """Three groups, missing gradients, NaN and infinite entries, and an optimizer loaded on the way."""
    assert_gate(by_us(kind, impl, 200, reload_at=101), *oracle(kind, 200))


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_gradients(nan_filled, impl):
    assert_gate(by_us(torch.optim.Adam, impl, 200, bf16=True), *oracle(torch.optim.Adam, 200, True))


@pytest.mark.parametrize("impl", IMPLS)
def test_leaves(nan_filled, impl):
    """Masters of bfloat16 leaves beside parameters that have none."""
    found = by_us(torch.optim.AdamW, impl, 200, bf16=True, leafed=LEAFED, reload_at=101)
    assert_gate(found, *oracle(torch.optim.AdamW, 200, True))


def plant(monkeypatch, fault):
    """Make the fast implementations wrong in one place."""
    set_numbers, columns_of = Table.set_numbers, Table._columns_of

    def wrong_numbers(self, groups, betas):
        set_numbers(self, groups, betas)
        self._known_numbers = [None] * len(self._numbers)
        self._numbers[{"beta1": 1, "decay": 4, "average": -2}[fault]] *= 1 + 1e-4

    def wrong_columns(self, tensors):
        columns = columns_of(self, tensors)
        columns[5][0] -= 1  # the last element of the first parameter
        return columns

    if fault == "tail":
        monkeypatch.setattr(Table, "_columns_of", wrong_columns)
    else:
        monkeypatch.setattr(Table, "set_numbers", wrong_numbers)


@pytest.mark.parametrize("fault", ["beta1", "decay", "average", "tail"])
@pytest.mark.parametrize("impl", [native])
def test_the_gate_sees_a_fault(monkeypatch, impl, fault):
    plant(monkeypatch, fault)
    with pytest.raises(AssertionError, match="error"):
        assert_gate(by_us(torch.optim.Adam, impl, 200), *oracle(torch.optim.Adam, 200))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clips_as_torch_does(nan_filled, impl, max_norm):
    theirs, ours = parameters(torch.float32), parameters(torch.float32)
    adam = torch.optim.Adam(theirs, eps=0.1, fused=True)  # a small step size hides no scale
    optimizer = AdamEMA(ours, eps=0.1, max_norm=max_norm, impl=impl)
    for step in range(3):
        for i, (p, q) in enumerate(zip(theirs, ours, strict=True)):
            p.grad, q.grad = gradient(step, i, raw=False), gradient(step, i, raw=True)
        kept = [q.grad.clone() for q in ours if q.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        adam.step()
        optimizer.step()
        assert optimizer.grad_norm.dtype == torch.float64 and optimizer.grad_norm.shape == ()
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
        for p, q in zip(theirs, ours, strict=True):
            torch.testing.assert_close(p, q)
        assert all(torch.equal(a, q.grad) for a, q in zip(kept, (q for q in ours if q.grad is not None), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_norm_does_not_overflow(impl):
    p = torch.nn.Parameter(torch.zeros(100))
    p.grad = torch.full((100,), 1e30)
    optimizer = AdamEMA([p], impl=impl, max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(1e31, rel=1e-6) and optimizer.nonfinite == 0
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((100,), 0.01))


@pytest.mark.parametrize("impl", [native])
@given(sizes=st.lists(st.sampled_from([0, 1, 7, 8, 511, 512, 513, 16383, 16384, 16385, 40001]), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_any_sizes_and_any_number_of_threads(impl, sizes):
    """Bit for bit the same on 1 to 3 threads, and, but for the norm, however the elements are cut into parameters."""

    def run(values, threads):
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter(v.clone()) for v in values]
        optimizer = AdamEMA(params, impl=impl, emas=1, weight_decay=0.1)
        for seed in range(3):
            whole = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
            for p, g in zip(params, whole.split([len(v) for v in values]), strict=True):
                p.grad = g.clone()
            optimizer.step(ema_betas=(0.9,))
        assert optimizer.grad_norm.item() == pytest.approx(whole.double().norm().item(), rel=1e-12)
        return [torch.cat([p.detach() for p in params]), torch.cat(optimizer.emas[0])], optimizer.grad_norm

    whole = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(9))
    tensors, norm = run(whole.split(sizes), 1)
    for threads in (2, 3):
        other, other_norm = run(whole.split(sizes), threads)
        assert torch.equal(norm, other_norm) and all(map(torch.equal, tensors, other))
    assert all(map(torch.equal, tensors, run([whole], 1)[0]))
    torch.set_num_threads(1)


@given(
    numel=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    kinds=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6),
)
@settings(deadline=None)
def test_chunks_cover_every_element_once(numel, kinds):
    bf16, aligned = (torch.tensor([int(kind[j]) for kind in kinds[: len(numel)]]) for j in (0, 1))
    chunks, launches = _cut(torch.tensor(numel), bf16, aligned, chunk=16)
    seen, position = [], 0
    for launch in launches:
        assert isinstance(launch, Launch) and launch.first == position
        position += launch.chunks
        for row, begin in chunks[launch.first : position].tolist():
            assert launch.bf16 == bool(bf16[row]) and (not launch.full or aligned[row])
            assert begin % 16 == 0 and (begin + 16 <= numel[row] if launch.full else begin < numel[row])
            seen += [(row, i) for i in range(begin, min(begin + 16, numel[row]))]
    assert position == len(chunks) and sorted(seen) == [(row, i) for row, n in enumerate(numel) for i in range(n)]


LAYOUTS = {
    "expanded": lambda g: g[:1, :1, :1, :1].expand(g.shape),
    "contiguous": lambda g: g.contiguous(),
    "channels last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "not aligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("last", [True, False])
def test_gradients_and_state_in_any_layout(nan_filled, impl, layout, last):
    memory_format = torch.channels_last if last else torch.contiguous_format
    start = torch.randn(6, 5, 3, 3).contiguous(memory_format=memory_format)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, adam, average = AdamEMA([ours], impl=impl, emas=1), torch.optim.Adam([theirs]), start
    for step in range(4):
        g = torch.randn(6, 5, 3, 3)
        ours.grad, theirs.grad = LAYOUTS[layout](g), LAYOUTS[layout](g).contiguous()
        optimizer.step(ema_betas=(0.5,))
        adam.step()
        average = torch.lerp(average, theirs.detach(), 0.5)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.emas[0][0], average, rtol=1e-6, atol=1e-6)
        if step == 1:  # state comes back from a file, contiguous; the averages as they are
            state = copy.deepcopy(optimizer.state_dict())
            for name in ("exp_avg", "exp_avg_sq"):
                state["state"][0][name] = state["state"][0][name].contiguous()
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("impl", IMPLS)
def test_capturable_tensors_give_the_numbers_of_floats(impl):
    p, q = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    lr, beta = torch.tensor(1.0), torch.tensor([0.0])
    by_tensors = AdamEMA([p], lr=lr, weight_decay=0.1, decoupled_weight_decay=True, capturable=True, emas=1, impl=impl)
    by_numbers = AdamEMA([q], lr=1.0, weight_decay=0.1, decoupled_weight_decay=True, emas=1, impl=impl)
    for step in range(3):
        p.grad = q.grad = torch.arange(9.0) - step
        lr.fill_(2.0**-step)
        beta.fill_(step / 4)
        by_numbers.param_groups[0]["lr"] = 2.0**-step
        by_tensors.step(ema_betas=(beta,))
        by_numbers.step(ema_betas=(step / 4,))
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
        torch.testing.assert_close(by_tensors.emas[0][0], by_numbers.emas[0][0], rtol=1e-6, atol=0)


def test_other_types_run_the_reference():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        p, q = (torch.nn.Parameter(torch.ones(50, dtype=dtype)) for _ in range(2))
        optimizer, adam = AdamEMA([p], emas=1), torch.optim.Adam([q], fused=True)
        for _ in range(3):
            p.grad = q.grad = torch.randn(50).to(dtype)
            optimizer.step(ema_betas=(0.5,))
            adam.step()
        torch.testing.assert_close(p, q, **({"rtol": 1e-14, "atol": 1e-15} if dtype is torch.float64 else {}))
        assert optimizer.emas[0][0].dtype == torch.promote_types(dtype, torch.float32)
        with pytest.raises(RuntimeError, match="float32 parameters"):
            AdamEMA([p], impl="native").step()
