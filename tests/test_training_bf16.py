"""training.precision bf16: bfloat16 weights with float32 masters, in one process and in several."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import make_run, read_stats, train_here
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastambient.training import checkpoint, loop
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.optimizer import build_optimizer
from fastambient.training.run import RunFolder

BF16 = ("training.precision=bf16", "training.lr_rampup_kimg=0.01", "model.dropout=0.2", "noise.sigma_tn=0.2")
NETWORKS = {
    "ddpmpp": (),
    "ncsnpp": ("model.encoder_type=residual", "model.resample_filter=[1,3,3,1]", "model.embedding_type=fourier"),
    "adm": ("model.model_type=DhariwalUNet", "model.model_channels=64"),
}


def trainer_of(path, *assignments, world=None):
    return Trainer(RunFolder(make_run(path, *BF16, *assignments)), world or World())


def under_autocast(trainer):
    """The same trainer with float32 weights alone, each of which autocast casts at each step."""
    step = trainer.step
    step.network = step.parallel = trainer.network
    trainer.optimizer = step.optimizer = build_optimizer(trainer.network, trainer.settings.training)
    return trainer


def masters(trainer):
    optimizer = trainer.optimizer
    state = [t for p in trainer.network.parameters() for t in optimizer.state[p].values()]
    return [*(p.detach() for p in trainer.network.parameters()), *state, *optimizer.emas[0]]


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_of_autocast_to_the_bit(tmp_path, name):
    """What is cast is the same, only when it is cast differs; master weights, moments and averages are float32."""
    ours, theirs = trainer_of(tmp_path / "ours", *NETWORKS[name]), under_autocast(trainer_of(tmp_path / "theirs", *NETWORKS[name]))  # fmt: skip
    start = [p.detach().clone() for p in ours.network.parameters()]
    for nimg in range(0, 32, 8):
        assert ours.step(nimg) == theirs.step(nimg)
    for a, b in zip(masters(ours), masters(theirs), strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b)
    moved = [not torch.equal(p, q) for p, q in zip(ours.network.parameters(), start, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    for p, leaf in ours.optimizer.leaves.items():
        assert torch.equal(leaf, p.bfloat16())
    norms = [p for m in ours.step.network.modules() if hasattr(m, "groups") for p in m.parameters()]
    assert norms and all(p.dtype is torch.float32 for p in norms)


class Casts(TorchDispatchMode):
    """Shapes of what is cast."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_no_weight_is_cast(tmp_path, monkeypatch):
    """Forward or backward; of the embeddings' small layers alone."""
    counts = []
    for change in (lambda trainer: trainer, under_autocast):
        trainer = change(trainer_of(tmp_path / str(len(counts)), "training.batch=6"))  # of no weight's width
        shapes = {tuple(p.shape) for n, p in trainer.network.named_parameters() if p.dim() > 1 and "map_" not in n}
        trainer.step(0)
        monkeypatch.setattr(trainer.optimizer, "step", lambda **_: None)  # the reference widens gradients
        with Casts() as casts:
            trainer.step(6)
        counts.append(sum(shape in shapes for shape in casts.shapes))
    assert counts[0] == 0 and counts[1] > 2 * len(shapes)


def test_micro_batches_add_up_in_float32(tmp_path):
    """They keep autocast's way: its gradients are float32."""
    trainer = trainer_of(tmp_path / "run", "training.batch_gpu=2")
    assert trainer.step.network is trainer.network and not trainer.optimizer.leaves
    trainer.step(0)
    assert all(p.grad.dtype is torch.float32 for p in trainer.network.parameters())
    assert trainer_of(tmp_path / "other", "training.batch_gpu=8").optimizer.leaves


def test_a_change_of_the_masters_reaches_the_step(tmp_path):
    """Whoever makes it: weights that were loaded, or written in place."""
    one, two = trainer_of(tmp_path / "one"), trainer_of(tmp_path / "two")
    one.step(8)
    with torch.no_grad():
        for p in one.network.parameters():
            p.add_(0.01)
    two.network.load_state_dict(one.network.state_dict())
    first, second = one.step(16), two.step(16)
    assert first.loss == second.loss and first.grad_norm == second.grad_norm


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("bf16") / "whole", *BF16, "training.keep_checkpoints=9")
    train_here(path)
    return path


def from_the_first_checkpoint(whole, path, precision):
    shutil.copytree(whole, path)
    shutil.rmtree(checkpoint.checkpoints(path / "checkpoints")[-1])
    text = (path / "config.yaml").read_text()
    assert "precision: bf16" in text
    (path / "config.yaml").write_text(text.replace("precision: bf16", f"precision: {precision}"))
    train_here(path, resume=True)
    return load_file(checkpoint.checkpoints(path / "checkpoints")[-1] / "state.safetensors")


def test_a_resume_is_bit_for_bit(whole, tmp_path):
    found = from_the_first_checkpoint(whole, tmp_path / "cut", "bf16")
    expected = load_file(checkpoint.checkpoints(whole / "checkpoints")[-1] / "state.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in found.items())
    assert read_stats(tmp_path / "cut") == read_stats(whole)


def test_a_run_may_change_its_precision(whole, tmp_path, monkeypatch):
    """A checkpoint holds float32 masters under the same names in both; what fp32 wrote goes on in bf16."""
    wide = from_the_first_checkpoint(whole, tmp_path / "fp32", "fp32")
    assert {v.dtype for v in wide.values()} == {torch.float32}
    half = load_file(checkpoint.checkpoints(whole / "checkpoints")[-1] / "state.safetensors")
    assert wide.keys() == half.keys() and not all(torch.equal(v, half[k]) for k, v in wide.items())
    for name in ("model", "ema"):
        a, b = (torch.cat([v.flatten() for k, v in t.items() if k.startswith(name)]) for t in (wide, half))
        assert (a - b).norm() < 0.05 * b.norm()
    (tmp_path / "fp32" / "config.yaml").write_text((whole / "config.yaml").read_text())
    trainer = Trainer(RunFolder(tmp_path / "fp32"), World())
    assert trainer.restore() and trainer.nimg == 160
    assert all(torch.equal(v, wide[f"model.{k}"]) for k, v in trainer.network.state_dict().items())
    seen = []
    monkeypatch.setattr(trainer.step, "run", lambda: seen.extend(trainer.optimizer.leaves.items()) or run())
    run = trainer.step.iteration
    trainer.optimizer.step = lambda **_: None  # the weights that this step computed with stay
    trainer.optimizer.grad_norm = trainer.optimizer.nonfinite = torch.zeros(())
    trainer.step(160)
    assert seen and all(torch.equal(leaf, p.bfloat16()) for p, leaf in seen)


def _ranks(rank, size, path, folder):
    """One of `size` ranks: starts from weights of its own, takes steps, and writes what it holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    build = loop.build_network

    def other(*arguments):
        network = build(*arguments)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(1e-3 * rank)
        return network

    loop.build_network = other
    trainer = Trainer(RunFolder(path), World(rank, size))
    optimizer, seen = trainer.optimizer, []
    leaf = next(leaf for leaf in optimizer.leaves.values())
    leaf.register_hook(lambda g: seen.append(g.clone()))
    step, means = optimizer.step, []

    def spied(**keywords):
        means.append(leaf.grad.clone())
        step(**keywords)

    optimizer.step = spied
    results = [trainer.step(nimg) for nimg in range(0, 18, 6)]
    torch.save({"masters": masters(trainer)[: len(trainer.names)], "leaves": [*optimizer.leaves.values()],
                "own": seen[0], "mean": means[0], "loss": [r.loss for r in results]}, f"{folder}/{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_stay_identical_and_sum_in_float32(tmp_path):
    """Three ranks, since halves of two would be exact: the mean is rounded to bfloat16 once."""
    path, size = make_run(tmp_path / "run", *BF16, "training.batch=6"), 3
    mp.spawn(_ranks, (size, path, str(tmp_path)), nprocs=size)
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size))
    for other in others:
        assert other["loss"] == first["loss"] and torch.equal(other["mean"], first["mean"])
        for kind in ("masters", "leaves"):
            assert all(map(torch.equal, first[kind], other[kind]))
    exact = torch.stack([f["own"] for f in (first, *others)]).double().mean(0)
    assert first["own"].dtype is first["mean"].dtype is torch.bfloat16 and not torch.equal(first["own"], first["mean"])
    assert (first["mean"] != exact.bfloat16()).double().mean() < 0.01
