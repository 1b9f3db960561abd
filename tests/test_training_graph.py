"""A step from static memory: a stand-in for a CUDA graph calls the captured function again at each replay."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_run
from torch.overrides import TorchFunctionMode

from fastambient.training.config import TrainingSettings
from fastambient.training.distributed import World
from fastambient.training.graph import GraphedIteration, why_no_graph
from fastambient.training.loop import Trainer
from fastambient.training.run import RunFolder
from fastambient_kernels import _native

DYNAMIC = ("training.lr_rampup_kimg=0.03", "training.ema_halflife_kimg=0.05", "training.ema_rampup_ratio=0.5")


def trainer_of(path, *assignments):
    return Trainer(RunFolder(make_run(path, *DYNAMIC, *assignments)), World())


def tensors(trainer):
    optimizer = trainer.optimizer
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    return [*(p.detach().clone() for p in trainer.network.parameters()), *moments, *optimizer.emas[0]]


def fake_capture(function, device):
    """Nothing is computed now; a replay writes the output in place."""
    output = torch.full((27,), torch.nan, dtype=torch.float64)
    return lambda: output.copy_(function()), output


@pytest.mark.parametrize(
    "assignments",
    [
        ("training.batch_gpu=2", "data.xflip=true", "training.augment=0.3"),
        ("model.dropout=0.3", "data.use_labels=true", "model.label_dropout=0.2"),
        ("data.noisy=float32", "training.optimizer=adamw", "training.weight_decay=0.1", "data.train=20"),
    ],
)
def test_replays_are_steps_bit_for_bit(tmp_path, assignments):
    """Fresh positions over the border of an epoch, a growing lr and EMA decay, and steps asked for out of order."""
    plain, graphed = (trainer_of(tmp_path / name, *assignments) for name in ("plain", "graphed"))
    captures = []

    def capture(function, device):
        captures.append(device)
        return fake_capture(function, device)

    graphed.step.run = GraphedIteration(graphed.step.iteration, World().device, capture=capture)
    results = []
    for nimg in (0, 8, 16, 24, 88, 96, 32, 40):
        asked = {"stop": nimg == 24, "line": nimg == 40}
        results += [plain.step(nimg, **asked), graphed.step(nimg, **asked)]
        assert results[-1] == results[-2]
        assert plain.step.fields["positions"].tolist() == list(range(nimg, nimg + 8)), "not the batch that was prepared"
        assert results[-1].stop == asked["stop"] and results[-1].line == asked["line"]
    assert captures == [torch.device("cpu")]
    assert len({r.loss for r in results}) == 8 and len({r.lr for r in results}) > 4
    for a, b in zip(tensors(plain), tensors(graphed), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.sigma_loss.sums, graphed.sigma_loss.sums)


def test_a_replay_reads_static_memory_alone(tmp_path):
    """Of what a step is given; and all of it: nothing that was frozen at the capture differs from a new step's."""
    trainer = trainer_of(tmp_path / "run")
    step, seen = trainer.step, []
    for nimg in (0, 8):
        step(nimg)
        seen.append([t.data_ptr() for t in (*step.fields.values(), step.lr, step.ema_beta, step.numbers)])
        assert trainer.optimizer.param_groups[0]["lr"].data_ptr() == step.lr.data_ptr()
    assert seen[0] == seen[1]
    positions = step.fields["positions"]
    assert positions.tolist() == list(range(8, 16))
    assert torch.equal(step.fields["index"], step.loader.rows.index(positions))


class NoHost(TorchFunctionMode):
    """What a CUDA graph cannot hold: tensors made from the host's numbers, and reading back."""

    FORBIDDEN = {
        torch.tensor, torch.as_tensor, torch.from_numpy, torch.unique, torch.nonzero, torch.Tensor.new_tensor,
        *(getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")),
    }  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.FORBIDDEN, f"{getattr(func, '__name__', func)} in a step that may be captured"
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("dropout" not in _native.OPERATORS, reason="the reference operators read seeds back")
@pytest.mark.parametrize("assignments", [
    ("noise.sigma_tn=0.2", "training.batch_gpu=2", "data.xflip=true", "training.augment=0.3"),
    ("noise.sigma_tn=0.2", "model.dropout=0.3", "data.use_labels=true", "model.label_dropout=0.2", "noise.mode=fresh"),
    ("noise.sigma_tn=0.2", "data.noisy=float16", "model.model_type=DhariwalUNet", "model.model_channels=64", "training.checkpoint_levels=1"),
])  # fmt: skip
def test_an_iteration_makes_nothing_from_the_host_and_reads_nothing_back(tmp_path, monkeypatch, assignments):
    monkeypatch.delenv("FASTAMBIENT_IMPL", raising=False)
    trainer = trainer_of(tmp_path / "run", *assignments)
    trainer.step(0)  # makes what a capture cannot
    # The optimizer has its own way on a GPU, a pinned table: test_kernels_adam_ema_use.py.
    monkeypatch.setattr(trainer.optimizer, "step", lambda **_: None)
    with NoHost():
        trainer.step.iteration()
    with NoHost(), pytest.raises(AssertionError, match="new_tensor"):
        trainer.step.lr.new_tensor(1.0)


def test_a_capture_that_fails_half_way_changes_nothing(tmp_path, capsys):
    plain, graphed = (trainer_of(tmp_path / name) for name in ("plain", "graphed"))

    def broken(function, device):
        graphed.optimizer.zero_grad()
        sigma, loss = graphed.step.forward(graphed.step.loader.batch(graphed.step.fields))
        loss.sum().backward()  # gradients lie in the memory of a graph that there will never be
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graphed.step.run = GraphedIteration(graphed.step.iteration, World().device, capture=broken)
    for nimg in range(0, 40, 8):
        assert plain.step(nimg) == graphed.step(nimg)
    for a, b in zip(tensors(plain), tensors(graphed), strict=True):
        assert torch.equal(a, b)
    said = [line for line in capsys.readouterr().err.splitlines() if "CUDA graph" in line]
    assert len(said) == 1 and "no CUDA graph of the training step (operation not permitted)" in said[0]


def test_what_is_wrong_with_a_step_is_not_hidden():
    def wrong():
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        GraphedIteration(wrong, World().device, capture=fake_capture)()


def test_which_runs_have_a_graph(tmp_path, capsys):
    t, cuda = TrainingSettings(), World(device=torch.device("cuda", 0))
    assert why_no_graph(t, cuda) is None
    assert why_no_graph(dataclasses.replace(t, cuda_graph="on"), cuda) is None
    assert "off" in why_no_graph(dataclasses.replace(t, cuda_graph="off"), cuda)
    assert "apex" in why_no_graph(dataclasses.replace(t, optimizer="apex"), cuda)
    assert "2 ranks" in why_no_graph(t, dataclasses.replace(cuda, size=2))
    assert "cpu" in why_no_graph(t, World())
    for setting, said in (("auto", 0), ("on", 1), ("off", 0)):
        trainer_of(tmp_path / setting, f"training.cuda_graph={setting}")
        assert capsys.readouterr().err.count("no CUDA graph of the training step (a cpu has none)") == said


def test_the_next_batch_is_prepared_before_the_results_are_read(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    step, events = trainer.step, []
    prepare, run = step._prepare, step.run

    class Results:
        def __init__(self, tensor):
            self.tensor = tensor

        def cpu(self):
            events.append("read")
            return self.tensor

    step._prepare = lambda nimg: events.append(nimg) or prepare(nimg)
    step.run = lambda: events.append("run") or Results(run())
    step(0)
    step(8)
    assert events == [0, "run", 8, "read", "run", 16, "read"], "a batch is prepared once"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("assignments", [(), ("training.batch_gpu=2", "data.xflip=true", "training.augment=0.3")])
def test_a_gpu_replays_steps(tmp_path, capsys, precision, assignments):
    """Within what atomics of the backward pass leave; the capture must not fall back."""
    world, results = World(device=torch.device("cuda", 0)), []
    for setting in ("off", "auto"):
        path = make_run(tmp_path / setting, "training.device=cuda", *DYNAMIC, *assignments,
                        f"training.cuda_graph={setting}", f"training.precision={precision}")  # fmt: skip
        trainer = Trainer(RunFolder(path), world)
        results.append([trainer.step(nimg) for nimg in range(0, 80, 8)])
        assert isinstance(trainer.step.run, GraphedIteration) == (setting == "auto")
    assert "no CUDA graph" not in capsys.readouterr().err
    assert trainer.step.run.replayed is not None
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    for a, b in zip(*results, strict=True):
        assert a.lr == b.lr and a.ambient_share == b.ambient_share
        assert b.loss == pytest.approx(a.loss, rel=tolerance)


@pytest.mark.gpu
def test_a_gpu_goes_on_without_a_graph_where_a_step_reads_back(tmp_path, capsys):
    world = World(device=torch.device("cuda", 0))
    trainer = Trainer(RunFolder(make_run(tmp_path / "r", "training.device=cuda")), world)
    first = next(iter(trainer.network.parameters()))
    first.register_hook(lambda g: g * float(g.isfinite().all()))
    losses = [trainer.step(nimg).loss for nimg in range(0, 40, 8)]
    assert capsys.readouterr().err.count("no CUDA graph of the training step") == 1
    assert len(set(losses)) == 5 and all(p.isfinite().all() for p in trainer.network.parameters())
