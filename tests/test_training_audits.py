"""Audits while a run trains: what they measure, that training does not notice them, and the rule that stops."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import cli, make_run, train_here
from safetensors.torch import load_file
from test_training_run import assert_same, contents

from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.errors import FastambientError, InputError
from fastambient.evaluation import evaluate
from fastambient.evaluation.embedders import load_embedder
from fastambient.evaluation.features import features
from fastambient.evaluation.frechet import frechet_distance
from fastambient.sampling import load, sample
from fastambient.training import audits, audits_plot, checkpoint, loop
from fastambient.training.audits import AuditSets, check_audits, last_allowed, measure
from fastambient.training.auto_sigma import choose_sigma_tn
from fastambient.training.config import Settings, resolve
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import start
from fastambient.training.stopping import Interrupted

AUDITED = ("training.audit_kimg=0.04", "evaluation.audit_num=6", "sampling.steps=2", "sampling.batch=4")


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Drawing takes longer than these runs: one test draws, the others count the figures."""
    drawn = []
    if "curves" not in request.node.name:
        monkeypatch.setattr(audits_plot, "plot_audits", lambda path, rows, rate: drawn.append((len(rows), rate)))
    return drawn


def rows_of(path):
    """audits.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(path).read_audits()]


def _set(n: int, seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 254, (n, 1, size, size), np.uint8)


def test_planted_copies_are_counted_as_an_evaluation_counts_them():
    train, holdout, samples = _set(40, 1), _set(25, 2), _set(60, 3)
    samples[:24] = train[np.arange(24)] + 1  # 40 %
    samples[24:27] = holdout[:3] + 1
    sets = AuditSets.of(train, holdout, flips=False, seed=3)
    row = measure(samples, sets, threshold=1 / 3, bootstrap=500, seed=3, flips=False)
    told = evaluate(samples, train, holdout, embedder=None, bootstrap=500, seed=3, settings={}).metrics
    gap, control = told["memorization"]["gap_ratio"], told["memorization"]["control"]
    assert row["copies"] == 24 and row["rate"] == 0.4 and row["samples"] == 60
    assert row["holdout_rate"] == gap["holdout_rate"] == 0.05
    assert row["train_rate"] == control["train_rate"] < 0.4, "at the control's count"
    assert row["ci95"] == gap["ci95"] and row["fd"] == pytest.approx(told["frechet"]["pixel"]["value"], rel=1e-6)
    assert audits.excess(row) == row["rate"] - 0.05 > row["train_rate"], (
        "of fewer training images than train, few copies"
    )
    assert "among as many training images" in audits.audit_line(row | {"kimg": 1, "seconds": 2})


def test_a_large_held_out_set_is_thinned_for_the_distance_alone(monkeypatch):
    monkeypatch.setattr(audits, "_MOST_NUMBERS", 64 * 10)
    sets = AuditSets.of(_set(20, 1), _set(30, 2), flips=False, seed=0)
    assert len(sets.control) == 20 and len(sets.reference) == 10 and sets.train_some is sets.train


def test_the_distance_in_a_networks_features(tmp_path, monkeypatch, capsys):
    """That of the embedder that is named, which training does not notice either; weights are looked for before it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []
    for name, more in (("pixels", ()), ("network", ("evaluation.audit_features=efficientnet-lite0",))):
        path = make_run(tmp_path / name, *AUDITED, "data.holdout=20", *more)
        train_here(path)
        seen.append(load_file(path / "model.safetensors"))
    assert all(torch.equal(v, seen[1][k]) for k, v in seen[0].items())
    pixels, network = (RunFolder(tmp_path / name).read_audits() for name in ("pixels", "network"))
    assert {(r["embedder"], r["dimensions"]) for r in pixels} == {("pixel", 64)}
    assert {(r["embedder"], r["dimensions"]) for r in network} == {("efficientnet-lite0", 1280)}
    said = capsys.readouterr().err
    assert "in features of EfficientNet-Lite0" in said
    assert "FD-6 vs held-out (fewer samples and reference images than dimensions) (efficientnet-lite0)" in said
    drawn, embedder = sample(load(path), range(6)).numpy(), load_embedder("efficientnet-lite0")
    store = RunFolder(path).open_store()
    expected = frechet_distance(*(features(x, embedder) for x in (drawn, store.holdout.images[:])))
    assert network[-1]["fd"] == pytest.approx(expected, rel=1e-6)
    assert [r["copies"] for r in pixels] == [r["copies"] for r in network]
    for value, message in (("dinov2-vitb14", "dinov2"), ("none", "pixel or a network"), ("nothing", "no embedder")):
        asked = ["training.audit_kimg=1", f"evaluation.audit_features={value}"]
        with pytest.raises(InputError, match=message):
            plan(TrainRequest(data="digits", preset="digits", assignments=asked))
        if value != "none":  # before a pilot trains
            auto = TrainRequest(data="digits", preset="digits", assignments=asked, auto_sigma_tn=True)
            with pytest.raises(InputError, match=message):
                choose_sigma_tn(auto, tmp_path / "auto")


def test_an_embedder_in_a_file_is_found_from_any_folder(tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    monkeypatch.chdir(tmp_path)
    path = make_run(tmp_path / "run", *AUDITED, "data.holdout=20", "evaluation.audit_features=mean.pt")
    assert RunFolder(path).read_settings().evaluation.audit_features == str(tmp_path / "mean.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_here(path)
    assert {(r["embedder"], r["dimensions"]) for r in RunFolder(path).read_audits()} == {("mean.pt", 3)}


def test_training_does_not_notice_its_audits(tmp_path, monkeypatch, figures):
    common = ("model.dropout=0.2", "data.xflip=true", "noise.sigma_tn=0.2", "training.sample_kimg=0.08")
    plain = make_run(tmp_path / "plain", "sampling.steps=2", *common)
    torch.manual_seed(5)
    train_here(plain)
    state = torch.get_rng_state()
    audited = make_run(tmp_path / "audited", *AUDITED, *common)
    modes = []

    def call(self, *arguments, **keywords):
        found = original(self, *arguments, **keywords)
        modes.append(True)
        return found

    original = audits.Auditor.__call__
    monkeypatch.setattr(audits.Auditor, "__call__", call)
    torch.manual_seed(5)
    np_state = np.random.get_state()[1].copy()  # noqa: NPY002
    train_here(audited)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], np_state)  # noqa: NPY002
    assert len(modes) == 4
    expected, found = contents(plain), contents(audited)
    assert_same((expected[0], {}, *expected[2:]), (found[0], {}, *found[2:]))
    weights = [load_file(path / "model.safetensors") for path in (plain, audited)]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    rows = RunFolder(audited).read_audits()
    assert [row["nimg"] for row in rows] == [40, 80, 120, 160]
    keys = ["nimg", "kimg", "samples", "references", "embedder", "dimensions", "copies", "rate", "ci95", "train_rate", "holdout_rate",
            "fd", "seconds"]  # fmt: skip
    assert all(list(row) == keys and row["samples"] == 6 for row in rows)
    assert figures == [(1, None), (2, None), (3, None), (4, None)]
    # the row is that of the exported EMA weights
    run = RunFolder(audited)
    store, e = run.open_store(), run.read_settings().evaluation
    sets = AuditSets.of(store.train.images[:], store.holdout.images[:], flips=True, seed=e.seed)
    drawn = sample(load(audited), range(6)).numpy()
    again = measure(drawn, sets, threshold=e.threshold, bootstrap=e.bootstrap, seed=e.seed, flips=True)
    assert again == {k: rows[-1][k] for k in again}


def test_the_network_stays_in_training_mode(tmp_path):
    trainer = loop.Trainer(RunFolder(make_run(tmp_path / "run", *AUDITED)), loop.World())
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    ema = [v.clone() for v in trainer.optimizer.emas[0]]
    denoiser = trainer.ema_denoiser()
    denoiser(torch.randn(2, 1, 8, 8), torch.ones(2))
    assert trainer.network.training and not trainer.ema_network.training
    assert all(torch.equal(v, before[k]) for k, v in trainer.network.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(ema, trainer.optimizer.emas[0], strict=True))


@pytest.mark.parametrize("keep", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_resume_from_a_checkpoint_gives_the_same_audits(tmp_path, keep):
    whole = make_run(tmp_path / "whole", "training.keep_checkpoints=9", *AUDITED)
    train_here(whole)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for later in checkpoint.checkpoints(cut / "checkpoints")[keep:]:
        shutil.rmtree(later)
    with open(cut / "audits.jsonl", "a") as file:
        file.write('{"nimg": 999')  # killed in the middle of a line
    train_here(cut, resume=True)
    assert_same(contents(whole), contents(cut))
    assert rows_of(cut) == rows_of(whole) and len(rows_of(cut)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("at", "nimg"), [("step", 40), ("samples", 80), ("samples", 160), ("features", 80)])
def test_a_signal_leaves_an_audit_owed(tmp_path, monkeypatch, at, nimg):
    """Before an audit, or while its samples are drawn, also those of the last one, or embedded."""
    whole = make_run(tmp_path / "whole", *AUDITED)
    train_here(whole)
    path = make_run(tmp_path / "run", *AUDITED)
    sent = []

    def step(self, seen, **keywords):
        if at == "step" and seen == nimg - 16:  # the step after it is told
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original_step(self, seen, **keywords)

    def draw(*arguments, on_batch, **keywords):
        def told(count):
            if at == "samples" and not sent and trainers[-1].nimg == nimg:
                sent.append(os.kill(os.getpid(), signal.SIGTERM))
            on_batch(count)

        return original_sample(*arguments, on_batch=told, **keywords)

    def measured(*arguments, **keywords):
        if at == "features" and not sent and trainers[-1].nimg == nimg:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original_measure(*arguments, **keywords)

    original_step, original_sample, trainers = loop.TrainingStep.__call__, audits.sample, []
    original_measure = audits.measure
    original_init = loop.Trainer.__init__
    monkeypatch.setattr(
        loop.Trainer, "__init__", lambda self, *a, **k: (original_init(self, *a, **k), trainers.append(self))[0]
    )
    monkeypatch.setattr(loop.TrainingStep, "__call__", step)
    monkeypatch.setattr(audits, "sample", draw)
    monkeypatch.setattr(audits, "measure", measured)
    with pytest.raises(Interrupted) as stopped:
        train_here(path)
    assert stopped.value.exit_code == 143 and len(sent) == 1
    state = checkpoint.last_state(path / "checkpoints")
    assert state["nimg"] == nimg and state["audit_owed"]
    assert len(rows_of(path)) == nimg // 40 - 1
    start(path, resume=True)
    assert rows_of(path) == rows_of(whole)
    assert_same(contents(whole), contents(path))
    assert not checkpoint.last_state(path / "checkpoints")["audit_owed"]


def planted(rates):
    """A measurement that answers with these controlled rates, one an audit."""
    left = list(rates)

    def answer(samples, sets, **protocol):
        rate = left.pop(0)
        return {"samples": len(samples), "copies": 0, "rate": rate + 0.01, "ci95": [0, 1], "train_rate": 0.0,
                "holdout_rate": 0.01, "fd": 1.0}  # fmt: skip

    return answer


RULE = (*AUDITED, "training.stop_when_copying=0.1")


def test_the_rule_stops_and_goes_back_to_the_last_allowed_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audits, "measure", planted([0.0, 0.05, 0.3]))
    path = make_run(tmp_path / "run", *RULE)
    train_here(path)
    err = capsys.readouterr().err
    assert f"{path / 'model.safetensors'} holds the weights of 0.08 kimg" in err and "stopped when copying" in err
    assert [row["nimg"] for row in rows_of(path)] == [40, 80, 120]
    taken, state = load(path), checkpoint.last_state(path / "checkpoints")
    assert taken.metadata["nimg"] == 80 and (state["nimg"], state["ended"]) == (120, "copying")
    at_80 = load(path / "checkpoints" / "nimg-000000000080").state_dict()
    assert all(torch.equal(v, at_80[k]) for k, v in taken.state_dict().items())
    # it is finished: a resume says so and trains nothing, through the command and below it
    before = (path / "model.safetensors").read_bytes()
    start(path, resume=True)
    assert "is finished: stopped at 0.12 kimg, where copying exceeded" in capsys.readouterr().err
    train_here(path, resume=True)
    assert len(rows_of(path)) == 3 and (path / "model.safetensors").read_bytes() == before
    # killed after the weights were written and before the checkpoint was: the same end
    shutil.rmtree(checkpoint.checkpoints(path / "checkpoints")[-1])
    monkeypatch.setattr(audits, "measure", planted([0.3]))
    start(path, resume=True)
    assert (path / "model.safetensors").read_bytes() == before and len(rows_of(path)) == 3


@pytest.mark.slow
def test_the_rule_counts_at_the_end_and_not_at_the_rate_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "measure", planted([0.0, 0.1, 0.1 - 1e-12, 0.2]))
    path = make_run(tmp_path / "run", *RULE)
    train_here(path)
    assert load(path).metadata["nimg"] == 120 and len(rows_of(path)) == 4
    assert len(list((path / "snapshots").iterdir())) == 2, "old snapshots go"


def test_a_first_audit_above_the_rate_keeps_its_own_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audits, "measure", planted([0.5]))
    path = make_run(tmp_path / "run", *RULE)
    train_here(path)
    err = capsys.readouterr().err
    assert "no earlier audit was at or below it" in err and "holds the weights of 0.04 kimg" in err
    assert load(path).metadata["nimg"] == 40


def test_a_memorizer_is_stopped(tmp_path, monkeypatch):
    """Samples that are training images: the real measurement, without a planted answer."""
    path = make_run(tmp_path / "run", *RULE)
    train = RunFolder(path).open_store().train.images[:]
    monkeypatch.setattr(audits, "sample", lambda d, seeds, **k: torch.from_numpy(train[list(seeds)]))
    train_here(path)
    (row,) = rows_of(path)
    assert row["rate"] == 1 == row["train_rate"] and row["holdout_rate"] < 0.5


@pytest.mark.slow
def test_no_rule_no_snapshots_and_no_end(tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "measure", planted([0.9] * 4))
    path = make_run(tmp_path / "run", *AUDITED)
    train_here(path)
    assert len(rows_of(path)) == 4 and not (path / "snapshots").exists() and load(path).metadata["nimg"] == 160


def test_a_model_that_diverged_is_a_warning(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **keywords):
        raise FastambientError("not finite")

    monkeypatch.setattr(audits, "sample", broken)
    path = make_run(tmp_path / "run", *RULE, "training.sample_kimg=0")
    train_here(path)
    assert rows_of(path) == [] and "no audit at 0.04 kimg" in capsys.readouterr().err


def test_settings_follow_from_each_other():
    def t(*assignments):
        return resolve(resolution=8, assignments=assignments).training

    assert t().audit_kimg == 0 and t().stop_when_copying is None
    assert t("training.stop_when_copying=0.05", "training.kimg=30").audit_kimg == 3
    assert t("training.audit_kimg=2").audit_kimg == 2
    refused = {
        ("training.stop_when_copying=0.05", "training.audit_kimg=0"): "above 0 with --stop-when-copying, got 0",
        ("training.stop_when_copying=1",): r"a rate in \[0, 1\), 0.05 for 5 %, got 1",
        ("training.stop_when_copying=.nan",): r"a rate in \[0, 1\)",
        ("training.audit_kimg=-1",): "0 or more, got -1",
        ("evaluation.audit_num=1",): "2 or more, got 1",
    }
    for assignments, message in refused.items():
        with pytest.raises(InputError, match=message):
            t(*assignments)


def test_what_cannot_be_audited_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", _set(20, 0)[:, 0])
    source = open_source(str(tmp_path / "x.npy"))
    none = prepare(source, tmp_path / "none", holdout=0, noise_seed=1)
    given = prepare(source, tmp_path / "given", hand_out=True, noisy="float16", sigma_tn=0.2)
    cases = {
        str(none.path): ((), "no held-out images, expected at least 2"),
        str(given.path): (("noise.regime=ambient",), "was handed out"),
        str(tmp_path / "x.npy"): (("data.holdout=1",), "1 held-out images, expected at least 2"),
    }
    for data, (assignments, message) in cases.items():
        asked = TrainRequest(data=data, preset="digits", assignments=["training.audit_kimg=1", *assignments])
        with pytest.raises(InputError, match=f"--audit-every.*{message}") as refused:
            plan(asked)
        assert "\n" not in str(refused.value)
    streamed = Settings().with_assignments(["training.audit_kimg=1", "data.stream=true"])
    with pytest.raises(InputError, match="--audit-every: a stream holds no image back to compare"):
        check_audits(streamed, None)
    check_audits(Settings(), None)  # not asked for


def test_the_last_allowed_audit():
    rows = [{"nimg": n, "rate": r, "holdout_rate": 0.1} for n, r in ((1, 0.1), (2, 0.15), (3, 0.4))]
    assert last_allowed(rows, 0.1)["nimg"] == 2 and last_allowed(rows, 0.01)["nimg"] == 1
    assert last_allowed(rows[2:], 0.1) is None and last_allowed([], 0.1) is None


def test_the_curves_are_drawn_and_the_same_bytes_for_the_same_rows(tmp_path):
    row = {"kimg": 1.0, "rate": 0.1, "ci95": [0.05, 0.2], "train_rate": 0.1, "holdout_rate": 0.02, "fd": 3.0,
           "samples": 512}  # fmt: skip
    rows = [row, row | {"kimg": 2.0, "rate": 0.5, "ci95": [0.4, 0.6]}]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        audits_plot.plot_audits(tmp_path / name / "audits", rows, rate=0.1)
    for kind in ("png", "svg"):
        assert (tmp_path / "a" / f"audits.{kind}").stat().st_size > 5000
        assert "FD-512 vs held-out" in (tmp_path / "a" / "audits.svg").read_text()
        assert (tmp_path / "a" / f"audits.{kind}").read_bytes() == (tmp_path / "b" / f"audits.{kind}").read_bytes()


@pytest.mark.slow
def test_two_ranks_share_the_samples_and_agree_with_one(tmp_path):
    common = [
        "--kimg", 0.16, "--checkpoint-kimg", 0.08, "--noise-seed", 3, "--sigma-tn", 0.2, "--audit-every", 0.08,
        "--stop-when-copying", 0.9, *(x for a in (
            "model.model_channels=8", "model.channel_mult=[1,2]", "model.attn_resolutions=[4]", "training.batch=8",
            "training.sample_kimg=0", "evaluation.audit_num=7", "sampling.steps=2", "sampling.batch=4",
        ) for x in ("--set", a)),
    ]  # fmt: skip
    cli("train", "--out", "one", "--processes", 1, *common, cwd=tmp_path)
    done = cli("train", "--out", "two", "--processes", 2, *common, cwd=tmp_path)
    assert done.stderr.count("audit at") == 2
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert two["fd"] == pytest.approx(one["fd"], rel=0.02) and two["samples"] == 7
        assert (one["nimg"], one["copies"]) == (two["nimg"], two["copies"])
    assert json.loads((tmp_path / "two" / "audits.jsonl").read_text().splitlines()[0])["seconds"] > 0
