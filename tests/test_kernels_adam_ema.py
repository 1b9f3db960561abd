"""AdamEMA against torch.optim.Adam and AdamW: numbers, state, clean-up, clipping, averages, and what it refuses."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastambient_kernels import _native
from fastambient_kernels.adam_ema import AdamEMA
from fastambient_kernels.adam_ema_table import Launch, Table, _cut

native = pytest.param("native", marks=pytest.mark.skipif(bool(_native.missing("adam_ema")), reason=str(_native.missing("adam_ema"))))  # fmt: skip
IMPLS = ["reference", native]
SHAPES = [(20000,), (3, 5, 3, 3), (1,), (), (511,), (513,), (7, 2)]
BETAS = (0.9, 0.2)  # of the averages: either branch of lerp
NEVER = 5  # this parameter never has a gradient
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


def by_us(kind, impl, steps, *, bf16=False, reload_at=None, **options):
    params = parameters(torch.float32)
    decoupled = kind is torch.optim.AdamW

    def make():
        return AdamEMA(groups_of(params), decoupled_weight_decay=decoupled, emas=2, impl=impl, **options)

    optimizer = make()
    for step in range(steps):
        if step == reload_at:
            old, optimizer = optimizer, make()
            optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
            optimizer.load_ema_state(old.ema_state())
        for i, p in enumerate(params):
            g = gradient(step, i, raw=True)
            if bf16:
                p.grad_dtype = None
            p.grad = g.bfloat16() if bf16 and g is not None else g
        optimizer.step(ema_betas=BETAS)
        if step % 50 == 7:
            assert optimizer.nonfinite == 3 * sum(p.grad is not None and p.grad.numel() > 3 for p in params)
        else:
            assert optimizer.nonfinite == 0
    return results(params, optimizer, optimizer.emas)


def error(got, true):
    """Relative to each entry or the typical one; (largest, root mean square)."""
    got, true = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (got, true))
    relative = (got - true).abs() / (true.abs() + true.abs().median())
    return relative.max(), relative.square().mean().sqrt()


def assert_gate(ours, low, high):
    """At most twice the error of torch's float32 optimizer, and a rounding of float32."""
    for name in ours:
        for what, mine, theirs in zip(("largest", "rms"), error(ours[name], high[name]), error(low[name], high[name]), strict=True):  # fmt: skip
            assert mine <= 2 * theirs + 2**-24, f"{name}: {what} error {mine:.2e}, torch's is {theirs:.2e}"


@pytest.fixture(scope="module")
def oracle():
    kept = {}

    def run(kind, steps, bf16=False):
        key = kind, steps, bf16
        if key not in kept:
            kept[key] = tuple(by_torch(kind, dtype, steps, bf16=bf16) for dtype in (torch.float32, torch.float64))
        return kept[key]

    return run


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("impl", IMPLS)
def test_200_steps(nan_filled, oracle, impl, kind):
    """Three groups, missing gradients, NaN and infinite entries, and an optimizer loaded on the way."""
    assert_gate(by_us(kind, impl, 200, reload_at=101), *oracle(kind, 200))


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_gradients(nan_filled, oracle, impl):
    assert_gate(by_us(torch.optim.Adam, impl, 200, bf16=True), *oracle(torch.optim.Adam, 200, True))


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
def test_the_gate_sees_a_fault(monkeypatch, oracle, impl, fault):
    plant(monkeypatch, fault)
    with pytest.raises(AssertionError, match="error"):
        assert_gate(by_us(torch.optim.Adam, impl, 200), *oracle(torch.optim.Adam, 200))


@pytest.mark.parametrize("impl", IMPLS)
def test_state_dict_goes_both_ways(impl):
    """Each optimizer continues what the other began, as one optimizer would."""

    def steps(optimizer, params, first, last):
        for step in range(first, last):
            for i, p in enumerate(params):
                p.grad = gradient(step, i, raw=False)
            optimizer.step()

    def torch_adam(params):
        return torch.optim.Adam(groups_of(params), fused=True)

    def ours(params):
        return AdamEMA(groups_of(params), impl=impl)

    finals = []
    for begin, end in ((torch_adam, torch_adam), (torch_adam, ours), (ours, torch_adam), (ours, ours)):
        params = parameters(torch.float32)
        first, second = begin(params), end(params)
        steps(first, params, 0, 5)
        state = copy.deepcopy(first.state_dict())
        second.load_state_dict(state)
        again = second.state_dict()
        assert again["state"].keys() == state["state"].keys()
        assert [g.keys() for g in again["param_groups"]] == [g.keys() for g in state["param_groups"]]
        for values in again["state"].values():
            assert list(values) == ["step", "exp_avg", "exp_avg_sq"]
            assert values["step"].dtype == torch.float32 and values["step"].shape == ()
        steps(second, params, 5, 10)
        finals.append(params)
    for params in finals[1:]:
        for p, q in zip(params, finals[0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_loads_what_an_unfused_or_older_optimizer_saved():
    params = parameters(torch.float32)
    old = torch.optim.AdamW(groups_of(params), foreach=True)
    for i, p in enumerate(params):
        p.grad = gradient(0, i, raw=False)
    old.step()
    state = copy.deepcopy(old.state_dict())
    for group in state["param_groups"]:
        del group["fused"], group["capturable"], group["differentiable"]
    state["state"][0]["step"] = 1.0  # before torch 1.12
    new = AdamEMA(groups_of(params))
    new.load_state_dict(state)
    new.step()
    assert new.state[params[0]]["step"] == 2 and new.state[params[0]]["step"].dtype == torch.float32
    assert new.param_groups[0]["decoupled_weight_decay"] is True, "torch.optim.Adam takes the loaded group's, too"
    assert new.param_groups[0]["fused"] is True
    state["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        new.load_state_dict(state)


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
def test_memory_that_moves(impl):
    """New gradients each step, parameters replaced through .data, state cleared: nothing stale is written."""
    ours, theirs = torch.nn.Parameter(torch.ones(600)), torch.nn.Parameter(torch.ones(600))
    optimizer, adam = AdamEMA([ours], impl=impl), torch.optim.Adam([theirs])
    kept = []
    for step in range(6):
        for p in (ours, theirs):
            if step == 2:
                kept.append(p.data)
                p.data = torch.full((600,), 3.0)
            p.grad = torch.full((600,), 1.0 + step)
            kept.append(p.grad)
        if step == 4:
            optimizer.state.clear()
            adam.state.clear()
        optimizer.step()
        adam.step()
        torch.testing.assert_close(ours, theirs)
    left_ours, left_theirs = kept[4], kept[6]
    torch.testing.assert_close(left_ours, left_theirs, msg="what left the optimizer changed")


def test_refuses_a_parameter_with_gaps():
    p = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2])
    p.grad = torch.ones(4, 4)
    if not _native.missing("adam_ema"):
        with pytest.raises(RuntimeError, match="gaps or overlaps"):
            AdamEMA([p], impl="native").step()
    AdamEMA([p], impl="reference").step()
    assert p.ne(0).all()


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


@pytest.mark.parametrize("impl", IMPLS)
def test_an_average_moves_towards_a_parameter_without_gradient(impl):
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = AdamEMA([p, q], impl=impl, emas=1)
    q.data.fill_(8.0)
    for _ in range(3):
        optimizer.step(ema_betas=(0.5,))  # not one gradient
    assert torch.equal(optimizer.emas[0][1], torch.full((3,), 7.0)) and torch.equal(q.detach(), torch.full((3,), 8.0))
    assert optimizer.grad_norm == 0 and optimizer.nonfinite == 0 and not optimizer.state
    p.grad = torch.ones(3)
    optimizer.step(ema_betas=(torch.tensor(0.5),))
    assert torch.equal(optimizer.emas[0][1], torch.full((3,), 7.5)) and list(optimizer.state) == [p]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_that_comes_later(impl):
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(5))
    optimizer = AdamEMA([p], impl=impl, emas=2)
    p.grad = torch.ones(3)
    optimizer.step(ema_betas=(0.5, 1))
    optimizer.add_param_group({"params": [q], "lr": 0.25})
    assert [len(copies) for copies in optimizer.emas] == [2, 2] and torch.equal(optimizer.emas[0][1], q.detach())
    q.grad = torch.ones(5)
    optimizer.step(ema_betas=(0, 1))
    torch.testing.assert_close(q.detach(), torch.full((5,), 0.75))
    assert torch.equal(optimizer.emas[0][1], q.detach()) and torch.equal(optimizer.emas[1][1], torch.ones(5))


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_notices_the_step(impl):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamEMA([p], impl=impl, emas=1)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step(ema_betas=(0,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert not optimizer.emas[0][0].requires_grad


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


def test_copies_and_pickles_hold_the_averages():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamEMA([p], emas=1, max_norm=2.0)
    p.grad = torch.ones(4)
    optimizer.step(ema_betas=(0.5,))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        assert torch.equal(other.emas[0][0], optimizer.emas[0][0]) and other.max_norm == 2.0
        assert other.emas[0][0].data_ptr() != optimizer.emas[0][0].data_ptr()
        (q,) = other.param_groups[0]["params"]
        q.grad = torch.ones(4)
        other.step(ema_betas=(0.5,))
        assert not torch.equal(q, p) and other.state[q]["step"] == 2 and optimizer.state[p]["step"] == 1


def test_ema_state_by_name():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamEMA([p], emas=2)
    assert list(optimizer.ema_state()) == ["0.0", "1.0"]
    assert "ema" not in str(optimizer.state_dict())
    optimizer.load_ema_state({"0.0": torch.zeros(4), "1.0": torch.full((4,), 2.0)})
    assert torch.equal(optimizer.emas[1][0], torch.full((4,), 2.0)) and torch.equal(p.detach(), torch.ones(4))
    for wrong in ({"0.0": torch.zeros(4)}, {"0.0": torch.zeros(4), "1.0": torch.zeros(5)}, {**optimizer.ema_state(), "2.0": torch.zeros(4)}):  # fmt: skip
        with pytest.raises(ValueError, match="averages that are missing"):
            optimizer.load_ema_state(wrong)


def test_works_with_what_surrounds_an_optimizer():
    """A closure, a scheduler, a gradient scaler that skips a step, torch.compile around the step."""
    layer = torch.nn.Linear(4, 2)
    optimizer = AdamEMA(layer.named_parameters(), emas=1, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(3, 4)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure, ema_betas=(0.5,)).requires_grad
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = layer.weight.detach().clone()
    for poison, moved in ((math.inf, False), (0.0, True)):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(3, 4)).square().sum()).backward()
        layer.bias.grad[0] += poison
        scaler.step(optimizer, ema_betas=(0.5,))
        scaler.update()
        assert torch.equal(before, layer.weight) is not moved

    @torch.compile(backend="aot_eager")
    def step():
        optimizer.step(ema_betas=(0.5,))

    steps = optimizer.state[layer.weight]["step"].item()
    step()
    assert optimizer.state[layer.weight]["step"] == steps + 1


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"amsgrad": True}, ValueError, "amsgrad=True"),
        ({"maximize": True}, ValueError, "maximize=True"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1"),
        ({"lr": math.nan}, ValueError, "lr must be at least 0"),
        ({"lr": torch.zeros(2)}, ValueError, "one element"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.9))}, ValueError, "betas must be two numbers"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive"),
        (
            {"params": [param(2, dtype=torch.complex64)]},
            TypeError,
            "real floating-point parameters, got torch.complex64",
        ),
        ({"params": [{"params": [param(2)], "amsgrad": True}]}, ValueError, "amsgrad"),
    ],
)
def test_refuses(options, error, text):
    with pytest.raises(error, match=text):
        AdamEMA(**({"params": [param(2)]} | options))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_refuses_at_a_step():
    p = param(3)
    with pytest.raises(ValueError, match="appears twice"):
        AdamEMA([p, p])
    optimizer = AdamEMA([p], emas=1)
    with pytest.raises(TypeError, match="complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1 and len(optimizer.emas[0]) == 1
    with pytest.raises(ValueError, match="needs 1 ema_betas, one for each average, got 0"):
        optimizer.step()
    with pytest.raises(ValueError, match="lie in"):
        optimizer.step(ema_betas=(1.5,))
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(ema_betas=(0.5,))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="impl must be one of"):
        AdamEMA([p], impl="fast").step()
    assert not optimizer.state
