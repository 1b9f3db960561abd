"""AdamEMA as an optimizer: its state, what surrounds it, what it refuses; and on a GPU, where there is one."""

from __future__ import annotations

import copy
import inspect
import io
import math

import pytest
import torch
from test_kernels_adam_ema import IMPLS, LEAFED, assert_gate, by_us, gradient, groups_of, oracle, parameters

from fastambient_kernels import AdamEMA, _native


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
def test_gradients_whose_layout_changes_from_step_to_step(impl):
    """What was worked out for one step's gradients must not serve the next one's."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, 3, 3, generator=generator)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    optimizer, oracle_ = AdamEMA([ours], impl=impl), torch.optim.Adam([theirs])
    for kind in ("same", "channels-last", "same", "expanded"):
        grad = torch.randn(6, 4, 3, 3, generator=generator)
        if kind == "expanded":
            grad = grad[..., :1].expand(6, 4, 3, 3)
        theirs.grad = grad.contiguous()
        ours.grad = grad.contiguous(memory_format=torch.channels_last) if kind == "channels-last" else grad
        optimizer.step()
        oracle_.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, kind=kind: f"{kind}: {m}")


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


def master_and_leaf(*shape, **options):
    p = torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    leaf = torch.nn.Parameter(torch.zeros(*shape, dtype=torch.bfloat16))
    return p, leaf, AdamEMA([p], leaves={p: leaf}, emas=1, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_leaf_has_the_gradient_and_gets_the_rounded_parameter(impl):
    """Bit for bit what a parameter without one makes of the same gradient; halves to even, overflow and NaN as torch."""
    p, leaf, optimizer = master_and_leaf(600, impl=impl, lr=0.0)
    assert torch.equal(leaf, p.bfloat16()), "from the beginning"
    q = torch.nn.Parameter(p.detach().clone())
    q.grad_dtype = None
    plain = AdamEMA([q], emas=1, impl=impl, lr=0.0)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, 0x7FC00001, 0x7F800000], dtype=torch.int32)
    for step in range(3):
        if step == 2:  # as a resume does
            with torch.no_grad():
                p[:6] = q[:6] = bits.view(torch.float32)
            assert leaf[0] != p[0].bfloat16()
            optimizer.refresh()
            assert torch.equal(leaf.view(torch.int16), p.bfloat16().view(torch.int16))
        for o in (optimizer, plain):
            o.param_groups[0]["lr"] = 1e-2 * (step < 2)
        leaf.grad = torch.randn(600).bfloat16()
        q.grad, p.grad = leaf.grad.clone(), torch.full((600,), math.nan)  # what is not the leaf's is not read
        optimizer.step(ema_betas=(0.5,))
        plain.step(ema_betas=(0.5,))
        pairs = [(p, q), (optimizer.emas[0][0], plain.emas[0][0]), (leaf, q.bfloat16())]
        pairs += [(optimizer.state[p][key], plain.state[q][key]) for key in plain.state[q]]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(optimizer.grad_norm, plain.grad_norm)
    assert optimizer.state_dict()["state"][0].keys() == plain.state_dict()["state"][0].keys()


@pytest.mark.parametrize("impl", IMPLS)
def test_what_holds_of_parameters_holds_of_leaves(impl):
    """Without a gradient they stay their parameter, rounded; zero_grad, autograd's versions, copies."""
    p, leaf, optimizer = master_and_leaf(3, impl=impl, lr=0.1)
    for change in (0.0, 1.0):
        with torch.no_grad():
            p.add_(change)
        optimizer.step(ema_betas=(0.5,))
        assert torch.equal(leaf, p.bfloat16()) and not optimizer.state
    loss = (leaf * leaf).sum()
    loss.backward(retain_graph=True)
    optimizer.step(ema_betas=(0.5,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    leaf.grad = torch.ones_like(leaf)
    other = copy.deepcopy(optimizer)
    optimizer.zero_grad()
    assert leaf.grad is None and p.grad is None
    ((q, twin),) = other.leaves.items()
    assert q is other.param_groups[0]["params"][0] and twin is not leaf
    twin.grad = torch.ones_like(twin)
    other.step(ema_betas=(0.5,))
    assert torch.equal(twin, q.bfloat16()) and not torch.equal(twin, leaf)


@pytest.mark.parametrize(
    ("parameter", "leaf"),
    [
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(4), torch.zeros(5, dtype=torch.bfloat16)),
        (torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.bfloat16).t()),
    ],
)
def test_refuses_leaves_that_do_not_fit(parameter, leaf):
    p = torch.nn.Parameter(parameter)
    with pytest.raises(RuntimeError, match="a leaf is bfloat16 and its parameter float32"):
        AdamEMA([p], leaves={p: leaf})


@pytest.mark.parametrize("impl", IMPLS)
def test_refuses_a_leaf_whose_memory_was_replaced(impl):
    _, leaf, optimizer = master_and_leaf(4, 3, impl=impl)
    leaf.grad = torch.ones_like(leaf)
    optimizer.step(ema_betas=(0.5,))
    leaf.data = torch.zeros(3, 4, dtype=torch.bfloat16).t()
    with pytest.raises(RuntimeError, match="memory layout"):
        optimizer.step(ema_betas=(0.5,))


def test_refuses_another_gradient_of_a_leaf():
    if not _native.missing("adam_ema"):
        _, leaf, optimizer = master_and_leaf(4, impl="native")
        leaf.grad_dtype = None
        leaf.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match="gradient of a leaf must be bfloat16"):
            optimizer.step(ema_betas=(0.5,))


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


def test_takes_every_argument_of_torchs_adam():
    """`impl` chooses how; what torch's optimizer is told about its own ways changes nothing, nor reaches a state_dict."""
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (AdamEMA, torch.optim.Adam))
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        assert ours[name].default == expected.default and ours[name].kind == expected.kind, name
    for options in ({"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}):
        p = param(2)
        optimizer = AdamEMA([{"params": [p], **options}], **options)
        p.grad = torch.ones(2)
        optimizer.step()
        other = torch.optim.Adam([param(2)], foreach=True)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["fused"] is True and other.param_groups[0]["foreach"] is None


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_and_tensors_that_hold_little(impl):
    """An empty first group, a scalar, a parameter of no elements."""
    scalar, none, twin = torch.nn.Parameter(torch.tensor(2.0)), param(3, 0), torch.nn.Parameter(torch.tensor(2.0))
    optimizer = AdamEMA([{"params": []}, {"params": [scalar, none]}], impl=impl, emas=1)
    adam = torch.optim.Adam([twin])
    optimizer.step(ema_betas=(0.5,))
    for step in range(3):
        scalar.grad, twin.grad = torch.tensor(1.0 + step), torch.tensor(1.0 + step)
        none.grad = torch.zeros(3, 0)
        optimizer.step(ema_betas=(0.5,))
        adam.step()
    torch.testing.assert_close(scalar, twin)
    assert optimizer.grad_norm == 3 and optimizer.state[none]["step"] == 3


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR", "ReduceLROnPlateau", "CosineAnnealingLR"])
def test_schedulers_of_torch(kind):
    """They write lr (and some of them betas) into the groups, and read initial values from there."""
    make = {
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 6),
        "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    }[kind]
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = AdamEMA([p]), torch.optim.Adam([q])
    schedulers = [make(o) for o in optimizers]
    for step in range(6):
        p.grad, q.grad = torch.full((5,), 1.0 + step), torch.full((5,), 1.0 + step)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
        assert optimizers[0].param_groups[0]["betas"] == optimizers[1].param_groups[0]["betas"]
    torch.testing.assert_close(p, q)


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"amsgrad": True}, ValueError, "amsgrad=True"),
        ({"maximize": True}, ValueError, "maximize=True"),
        ({"differentiable": True}, ValueError, "differentiable=True"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1"),
        ({"lr": "1e-3"}, ValueError, "lr must be at least 0, got '1e-3'"),
        ({"betas": None}, ValueError, "betas must be two numbers"),
        ({"eps": None}, ValueError, "eps must be at least 0, got None"),
        ({"emas": -1}, ValueError, "emas must be a number of moving averages"),
        ({"emas": 0.5}, ValueError, "emas must be a number of moving averages"),
        ({"lr": math.nan}, ValueError, "lr must be at least 0"),
        ({"lr": torch.zeros(2)}, ValueError, "one element"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.9))}, ValueError, "betas must be two numbers"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, triton, native, got 'fast'"),
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
    with pytest.raises(ValueError, match="one element"):
        optimizer.step(ema_betas=(torch.ones(2),))
    optimizer.param_groups[0]["maximize"] = True  # set behind the constructor's back
    with pytest.raises(ValueError, match="maximize=True"):
        optimizer.step(ema_betas=(0.5,))
    optimizer.param_groups[0]["maximize"] = False
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(ema_betas=(0.5,))
    assert not optimizer.state


def test_refuses_a_parameter_with_gaps():
    p = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2])
    p.grad = torch.ones(4, 4)
    if not _native.missing("adam_ema"):
        with pytest.raises(RuntimeError, match="gaps or overlaps"):
            AdamEMA([p], impl="native").step()
    AdamEMA([p], impl="reference").step()
    assert p.ne(0).all()


GPU_IMPLS = ["reference", "triton", "native"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_200_steps_on_a_gpu(impl, bf16, kind):
    assert_gate(by_us(kind, impl, 200, bf16=bf16, reload_at=101, device="cuda"), *oracle(kind, 200, bf16))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
def test_leaves_on_a_gpu(impl):
    found = by_us(torch.optim.Adam, impl, 200, bf16=True, leafed=LEAFED, reload_at=101, device="cuda")
    assert_gate(found, *oracle(torch.optim.Adam, 200, True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_cuda_graph_and_no_waiting(impl, max_norm):
    """A captured step replays what eager steps do, on new gradients, lr and decay; no step waits for the device."""
    steps = [[gradient(step, i, raw=True) for i in (0, 1, 2, 6)] for step in range(10)]
    ended = []
    for graphed in (False, True):
        params = [torch.nn.Parameter(torch.ones(g.shape, device="cuda")) for g in steps[2]]
        lr, beta = torch.tensor(0.0, device="cuda"), torch.tensor(0.0, device="cuda")
        optimizer = AdamEMA(params, lr=lr, capturable=True, max_norm=max_norm, emas=1, impl=impl)
        for p in params:
            p.grad = torch.zeros_like(p)
        graph, norms = torch.cuda.CUDAGraph(), []
        for step, grads in enumerate(steps):
            for p, g in zip(params, grads, strict=True):
                p.grad.copy_(torch.zeros(()) if g is None else g)
            lr.fill_(0.1 / (step + 1))
            beta.fill_(step / (step + 2))
            if graphed and step == 3:
                with torch.cuda.graph(graph):
                    optimizer.step(ema_betas=(beta,))
            torch.cuda.set_sync_debug_mode("error")
            try:
                if graphed and 3 <= step < 8:
                    graph.replay()
                else:  # before, and with another table after
                    optimizer.step(ema_betas=(beta,))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            norms.append(optimizer.grad_norm.clone())
        ended.append([*params, *optimizer.emas[0], *norms])
    for eager, graphed in zip(*ended, strict=True):
        torch.testing.assert_close(graphed, eager)
