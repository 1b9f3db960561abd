"""training.optimizer apex against AdamEMA, with a stand-in for NVIDIA's FusedAdam made of torch's Adam."""

from __future__ import annotations

import copy
import math
import shutil
import sys
from types import ModuleType

import pytest
import torch
from conftest import make_run, read_stats, train_here
from safetensors.torch import load_file
from torch import nn

from fastambient.errors import InputError
from fastambient.training import checkpoint
from fastambient.training.config import TrainingSettings, resolve
from fastambient.training.optimizer import build_optimizer
from fastambient.training.request import TrainRequest, plan
from fastambient_kernels import AdamEMA, adam_ema_apex
from fastambient_kernels.adam_ema_apex import ApexAdamEMA, missing
from fastambient_kernels.adam_ema_table import layout

SHAPES = [(3, 4, 3, 3), (8,), (5, 6), (1,)]


class FusedAdam(torch.optim.Optimizer):
    """apex's arguments, its step counted by group, its moments; and its blindness to strides, as an assertion."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.kind = torch.optim.AdamW if adam_w_mode else torch.optim.Adam

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for t in (p.grad, state["exp_avg"], state["exp_avg_sq"]):
                    assert layout(t) == layout(p) and t.dtype is torch.float32
                inner = self.kind([p], **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})
                inner.state[p] = state | {"step": torch.tensor(group["step"] - 1.0)}
                inner.step()


def install(monkeypatch, *, fused=FusedAdam, extension=True):
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    if fused is not None:
        optimizers.FusedAdam = fused
    for name, module in (("apex", apex), ("apex.optimizers", optimizers)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C") if extension else None)
    monkeypatch.setattr(adam_ema_apex, "DEVICES", ("cpu", "cuda"))


@pytest.fixture
def apex(monkeypatch):
    install(monkeypatch)


def parameters():
    make = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=make)) for shape in SHAPES]
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
    return params


def trained(kind, *, steps=12, reload_at=None, **options):
    """(parameters, moments, averages; norms and counts of each step) of two groups, with gradients to clean up."""
    params = parameters()

    def make():
        return kind([{"params": params[:2]}, {"params": params[2:], "betas": (0.8, 0.9)}], emas=2, **options)

    optimizer, seen = make(), []
    for step in range(steps):
        if step == reload_at:
            # as from a file: no strides
            state = copy.deepcopy(optimizer.state_dict())
            for values in state["state"].values():
                values.update({k: v.contiguous() for k, v in values.items()})
            emas, optimizer = optimizer.ema_state(), make()
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step(ema_betas=(0.0, 0.0))  # a step that the state has to replace
            optimizer.load_state_dict(state)
            optimizer.load_ema_state(emas)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))  # not channels-last
            if step == 5:
                p.grad.view(-1)[0] = (math.nan, math.inf, -math.inf, 1.0)[i]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        optimizer.step(ema_betas=(0.9, 0.5))
        assert optimizer.nonfinite.dtype == torch.int64 and optimizer.grad_norm.dtype == torch.float64
        seen.append((optimizer.grad_norm.item(), optimizer.nonfinite.item()))
    states = [optimizer.state_dict()["state"][i] for i in range(len(params))]
    moments = [values[key] for values in states for key in ("exp_avg", "exp_avg_sq", "step")]
    return [p.detach() for p in params] + moments + optimizer.emas[0] + optimizer.emas[1], seen


@pytest.mark.parametrize("reload_at", [None, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"max_norm": 0.5, "eps": 1e-3},
    ],
)
def test_numbers_are_adam_emas(apex, options, reload_at):
    expected, seen = trained(AdamEMA, **options)
    found, also_seen = trained(ApexAdamEMA, reload_at=reload_at, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
    assert [bad for _, bad in also_seen] == [bad for _, bad in seen] == [0] * 5 + [3] + [0] * 6
    assert [norm for norm, _ in also_seen] == pytest.approx([norm for norm, _ in seen], rel=1e-6)


def test_a_parameter_without_a_gradient_stays_and_its_average_moves(apex):
    params = parameters()
    optimizer = ApexAdamEMA(params, emas=1)
    optimizer.step(ema_betas=(0.5,))
    assert optimizer.nonfinite == 0 and not optimizer.state_dict()["state"], "no gradient at all"
    before = params[1].detach().clone()
    with torch.no_grad():
        optimizer.emas[0][1].zero_()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step(ema_betas=(0.5,))
    assert torch.equal(params[1].detach(), before) and torch.equal(optimizer.emas[0][1], before / 2)
    assert list(optimizer.state_dict()["state"]) == [0]


def test_a_run_is_that_of_adam_and_goes_on_from_either(tmp_path, apex):
    """Its settings say cuda, which apex needs; the rank is on the CPU."""

    def with_apex(path):
        text = (path / "config.yaml").read_text()
        assert "optimizer: adam" in text
        (path / "config.yaml").write_text(text.replace("optimizer: adam", "optimizer: apex"))

    def results(path):
        return {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}

    adam = make_run(tmp_path / "adam", "training.device=cuda")
    train_here(adam)
    path = make_run(tmp_path / "apex", "training.device=cuda")
    with_apex(path)
    train_here(path)
    for row, expected in zip(read_stats(path), read_stats(adam), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    for name, expected in results(adam).items():
        torch.testing.assert_close(results(path)[name], expected, rtol=1e-3, atol=1e-4)
    whole = results(path)
    shutil.rmtree(checkpoint.checkpoints(path / "checkpoints")[-1])
    train_here(path, resume=True)
    assert all(torch.equal(whole[k], v) for k, v in results(path).items()), "a resume is bit for bit"
    shutil.rmtree(checkpoint.checkpoints(adam / "checkpoints")[-1])
    with_apex(adam)
    train_here(adam, resume=True)
    for name, expected in whole.items():
        torch.testing.assert_close(results(adam)[name], expected, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_said(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert missing(cpu) == "NVIDIA's apex runs on CUDA alone, not on cpu"
    monkeypatch.setitem(sys.modules, "apex", None)  # not there
    assert "what PyPI calls apex is another project" in missing(cuda)
    install(monkeypatch, fused=None)
    assert "what PyPI calls apex is another project" in missing(cuda)
    install(monkeypatch, extension=False)
    assert "without its CUDA extension amp_C" in missing(cuda)
    with pytest.raises(InputError, match=r"training\.optimizer apex: .*amp_C.*; use adam"):
        build_optimizer(nn.Linear(2, 2), TrainingSettings(optimizer="apex"))
    with pytest.raises(RuntimeError, match=r"apex: .*amp_C"):
        ApexAdamEMA([nn.Parameter(torch.ones(2))])
    install(monkeypatch)
    assert missing(cuda) is None
    assert isinstance(build_optimizer(nn.Linear(2, 2), TrainingSettings(optimizer="apex")), ApexAdamEMA)
    with pytest.raises(RuntimeError, match="float32 parameters"):
        ApexAdamEMA([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="writes no leaves"):
        ApexAdamEMA([p], leaves={p: torch.ones(2, dtype=torch.bfloat16)})


def test_a_request_without_apex_is_refused_before_anything_is_written(monkeypatch):
    with pytest.raises(
        InputError, match=r"training\.optimizer apex runs on CUDA alone and training\.device is cpu; use adam"
    ):
        resolve(resolution=8, assignments=["training.optimizer=apex"])
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(InputError, match="another project"):
        plan(TrainRequest(assignments=["training.optimizer=apex", "training.device=cuda"]))
