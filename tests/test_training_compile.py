"""Blocks through torch.compile: the same numbers within rounding, its own to the bit, and a failure that costs nothing."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from conftest import make_run, read_stats, train_here

from fastambient.errors import InputError
from fastambient.models import blocks
from fastambient.models.blocks import UNetBlock, compile_blocks
from fastambient.training import compile as compiling
from fastambient.training.config import TrainingSettings
from fastambient.training.distributed import World
from fastambient.training.graph import GraphedIteration
from fastambient.training.loop import Trainer
from fastambient.training.run import RunFolder

# Some of each path: shortcut convolutions, attention, dropout with its layers' numbers, both kinds of networks.
NETWORKS = {
    "ddpmpp": ("model.dropout=0.3",),
    "adm": ("model.model_type=DhariwalUNet", "model.model_channels=64", "training.checkpoint_levels=1"),
    "micro-batches": (
        "training.batch_gpu=4",
        "training.augment=0.3",
        "model.dropout=0.1",
        "training.checkpoint_levels=2",
    ),
}


@pytest.fixture
def traced(monkeypatch):
    """Traced and differentiated as Inductor would have it, without a compiler: seconds in place of minutes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    @functools.cache
    def parts():
        return tuple(torch.compile(f, dynamic=False, fullgraph=True, backend=backend) for f in
                     (UNetBlock._begin, UNetBlock._finish))  # fmt: skip

    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "_compiled_parts", parts)
    yield graphs
    torch._dynamo.reset()


def trainer_of(path, *assignments):
    return Trainer(RunFolder(make_run(path, *assignments)), World())


def weights(trainer):
    return [*(p.detach().clone() for p in trainer.network.parameters()), *trainer.optimizer.emas[0]]


def assert_near(one, other, tolerance):
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_without_it(tmp_path, traced, capsys, name):
    eager, compiled = (trainer_of(tmp_path / setting, *NETWORKS[name], f"training.compile={setting}")
                       for setting in ("off", "on"))  # fmt: skip
    for nimg in range(0, 24, 8):
        a, b = eager.step(nimg), compiled.step(nimg)
        assert b.loss == pytest.approx(a.loss, rel=1e-5) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    assert_near(weights(compiled), weights(eager), 1e-4)
    said = capsys.readouterr().err
    assert said.count("compiled the network's blocks in") == 1 and "compiling failed" not in said
    blocks = sum(isinstance(m, UNetBlock) for m in compiled.network.modules())
    assert 0 < len(traced) < 2 * blocks, "blocks of equal shapes share their graphs"


@pytest.mark.slow
def test_bf16(tmp_path, traced):
    eager, compiled = (trainer_of(tmp_path / setting, "training.precision=bf16", f"training.compile={setting}")
                       for setting in ("off", "on"))  # fmt: skip
    for nimg in (0, 8):
        assert compiled.step(nimg).loss == pytest.approx(eager.step(nimg).loss, rel=2e-2)
    assert traced


@pytest.mark.slow
def test_a_run_and_its_resume_are_the_same_run(tmp_path, traced):
    """To the bit, with checkpoints, samples and averages, which copy the network."""

    def of(name):
        return make_run(tmp_path / name, "training.compile=on", "model.dropout=0.2", "training.kimg=0.032",
                        "training.checkpoint_kimg=0.016", "training.sample_kimg=0.016", "training.keep_checkpoints=3")  # fmt: skip

    whole, halved = of("whole"), of("halved")
    train_here(whole)
    train_here(halved)
    newest = sorted((halved / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train_here(halved, resume=True)
    assert read_stats(halved) == read_stats(whole)
    assert (halved / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert traced and Trainer(RunFolder(halved), World()).settings.training.compile == "on"


def test_a_capture_finds_everything_compiled(tmp_path, traced):
    """The pass that compiles comes before the first step, the capture at the second."""
    trainer, seen = trainer_of(tmp_path / "run", "training.compile=on"), []

    def capture(function, device):
        seen.append(len(traced))
        output = function()
        return lambda: output, output

    trainer.step.run = GraphedIteration(trainer.step.iteration, World().device, capture=capture)
    trainer.step(0)
    trainer.step(8)
    assert seen == [len(traced)] and seen[0] > 0


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_failure_costs_nothing(tmp_path, monkeypatch, capsys, stage):
    """Also in the backward pass, which is compiled when it is first needed."""
    plain, failing = (trainer_of(tmp_path / setting, "model.dropout=0.2", f"training.compile={setting}")
                      for setting in ("off", "on"))  # fmt: skip

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("no C++ compiler\nfound here")

    def broken(self, x, emb):
        if stage == "forward":
            raise RuntimeError("no C++ compiler\nfound here")
        return Broken.apply(UNetBlock._begin(self, x, emb))

    monkeypatch.setattr(blocks, "_compiled_parts", lambda: (broken, UNetBlock._finish))
    for nimg in range(0, 24, 8):
        assert plain.step(nimg) == failing.step(nimg)
    assert all(map(torch.equal, weights(plain), weights(failing)))
    said = [line for line in capsys.readouterr().err.splitlines() if "compil" in line]
    assert len(said) == 1 and "compiling failed (no C++ compiler); the blocks run as they are" in said[0]
    assert not any(m.compiled for m in failing.network.modules() if isinstance(m, UNetBlock))


def test_what_is_wrong_with_a_step_is_not_hidden(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "run", "training.compile=on")

    def wrong(*_):
        raise RuntimeError("wrong")

    monkeypatch.setattr(trainer.step, "forward", wrong)
    with pytest.raises(RuntimeError, match="wrong"):
        trainer.step(0)


def test_which_runs_compile(tmp_path, monkeypatch):
    t = TrainingSettings()
    assert t.compile == "auto" and not compiling.wanted(t)
    assert compiling.wanted(dataclasses.replace(t, compile="on"))
    assert not compiling.wanted(dataclasses.replace(t, compile="off"))
    with pytest.raises(InputError, match=r"training\.compile must be one of auto, on, off, got 'yes'"):
        make_run(tmp_path / "wrong", "training.compile='yes'")
    monkeypatch.setattr(blocks, "_compiled_parts", lambda: pytest.fail("compiled"))
    for setting in ("auto", "off"):
        trainer_of(tmp_path / setting, f"training.compile={setting}").step(0)


def test_copies_have_weights_of_their_own(tmp_path, traced):
    network = trainer_of(tmp_path / "run").network
    compile_blocks(network, True)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    x, c = torch.randn(2, 1, 8, 8), torch.zeros(2)
    found = [n(x, c, dropout_key=(0, torch.arange(2))) for n in (network, other)]
    for n in (network, other):
        compile_blocks(n, False)
    right = [n(x, c, dropout_key=(0, torch.arange(2))) for n in (network, other)]
    torch.testing.assert_close(found, right)
    assert not torch.allclose(*right)


def test_the_cache_lies_where_the_user_has_it(tmp_path, monkeypatch, capsys):
    network = torch.nn.Identity()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("FASTAMBIENT_CACHE", str(tmp_path / "here"))
    assert compiling.compile_network(network, lambda: None, tell=True)
    assert f"kept in {tmp_path / 'here' / 'inductor'}" in capsys.readouterr().err.replace("\n", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "there"))
    assert compiling.compile_network(network, lambda: None, tell=False)
    assert not compiling.compile_network(network, lambda: 1 / 0, tell=False)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_inductor(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    eager, compiled = (trainer_of(tmp_path / setting, "model.dropout=0.3", f"training.compile={setting}")
                       for setting in ("off", "on"))  # fmt: skip
    for nimg in range(0, 24, 8):
        assert compiled.step(nimg).loss == pytest.approx(eager.step(nimg).loss, rel=1e-5)
    assert_near(weights(compiled), weights(eager), 1e-4)
    assert "compiled the network's blocks in" in capsys.readouterr().err
    assert any((tmp_path / "cache").rglob("*")), "nothing was kept"
