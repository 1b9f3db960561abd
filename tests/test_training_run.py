"""Whole runs in this process: what they write, and resuming bit for bit."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_run, read_stats, train_here
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.data.store import Store
from fastambient.errors import FastambientError, InputError
from fastambient.evaluation.run import evaluate_run
from fastambient.pictures import grid
from fastambient.sampling import load, sample
from fastambient.training import checkpoint, loop, stopping
from fastambient.training.clock import crosses
from fastambient.training.distributed import World
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run, new, resume, start
from fastambient.training.stopping import Interrupted


def contents(path):
    """Everything that must not depend on how often a run was interrupted."""
    state = checkpoint.checkpoints(path / "checkpoints")[-1]
    return (
        *(
            {k: v.clone() for k, v in load_file(f).items()}
            for f in (state / "state.safetensors", path / "model.safetensors")
        ),
        read_stats(path),
        (path / "sigma_loss.jsonl").read_text(),
    )


def assert_same(a, b):
    for one, two in zip(a[:2], b[:2], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert a[2:] == b[2:]


def test_a_run_holds_what_it_should(tmp_path):
    path = make_run(tmp_path / "run", "training.sample_kimg=0.16", "sampling.steps=2", "noise.sigma_tn=0.2")
    train_here(path)
    stats = read_stats(path, timing=True)
    assert [row["nimg"] for row in stats] == list(range(8, 161, 8))
    for key in ("loss", "lr", "grad_norm", "images_per_second", "ambient_share", "nonfinite_grads"):
        assert all(isinstance(row[key], (int, float)) for row in stats)
    assert [p.name for p in checkpoint.checkpoints(path / "checkpoints")] == ["nimg-000000000080", "nimg-000000000160"]
    rows = RunFolder(path).read_sigma_loss()
    assert [r["nimg"] for r in rows] == [80, 160]
    assert all(sum(b["draws"] for b in r["bins"]) == 80 for r in rows)
    total = sum(b["draws"] * b["loss"] for b in rows[0]["bins"] if b["draws"])
    assert total == pytest.approx(8 * sum(row["loss"] for row in stats[:10]), rel=1e-6)
    assert (path / "samples" / "grid-000000000160.png").stat().st_size > 1000
    assert list((path / "tensorboard").iterdir())
    denoiser = load(path)
    shown = np.asarray(Image.open(path / "samples" / "grid-000000000160.png"))
    assert np.array_equal(shown, grid(sample(denoiser, range(64)))[0]), "the grid shows the EMA weights"
    last = load(path / "checkpoints" / "nimg-000000000160").state_dict()
    assert all(torch.equal(v, last[k]) for k, v in denoiser.state_dict().items())
    assert denoiser.metadata["nimg"] == 160 and denoiser.metadata["noise"]["sigma_tn"] == 0.2
    assert RunFolder(path).read_settings().data.train == 100


def test_the_noise_seed_stays_secret(tmp_path):
    seed = 0xDEADBEEF12345678
    path = make_run(tmp_path / "run", noise_seed=seed)
    train_here(path)
    assert RunFolder(path).read_noise_seed() == seed
    for name in ("noise_seed", "store/noise_seed"):
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o600
    forms = [f"{seed:x}".encode(), str(seed).encode(), seed.to_bytes(8, "little"), seed.to_bytes(8, "big")]
    for file in path.rglob("*"):
        if file.is_file() and file.name != "noise_seed":
            data = file.read_bytes()
            assert not any(form in data for form in forms), f"{file} holds the noise seed"
    with safe_open(path / "model.safetensors", "pt") as weights:
        assert str(tmp_path) not in json.dumps(weights.metadata()), "exported weights must not hold paths"


def test_nothing_but_the_seeds_own_files_depends_on_it(tmp_path):
    """Not even a hash: before the first step two runs that differ in the noise seed alone hold the same bytes."""
    first, second = (make_run(tmp_path / str(seed) / "run", noise_seed=seed) for seed in (2**63 + 11, 2**63 + 12))
    names = [{f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()} for path in (first, second)]
    assert names[0] == names[1]
    differing = {name for name in names[0] if (first / name).read_bytes() != (second / name).read_bytes()}
    assert differing == {"noise_seed", "store/noise_seed"}
    exported = [loop.Trainer(RunFolder(path), World()).metadata() for path in (first, second)]
    assert exported[0] == exported[1]


@pytest.mark.parametrize(
    ("argv0", "python", "shown"),
    [
        (".venv/bin/fastambient", "/usr/bin/python3", ".venv/bin/fastambient"),
        ("/my env/bin/fastambient", "/usr/bin/python3", "'/my env/bin/fastambient'"),
        ("/lib/fastambient/__main__.py", ".venv/bin/python", ".venv/bin/python -m fastambient"),
        ("/lib/pytest/__main__.py", "python", "fastambient"),
    ],
)
def test_the_line_that_resumes_is_what_the_user_would_type(argv0, python, shown, monkeypatch):
    monkeypatch.setattr("sys.argv", [argv0, "train"])
    monkeypatch.setattr("sys.orig_argv", [python, argv0, "train"])
    assert stopping.how_to_resume(Path("runs/mine")) == f"resume with: {shown} train --resume runs/mine"
    assert stopping.how_to_resume(Path("my runs/a")).endswith("train --resume 'my runs/a'")


def test_resume_from_every_checkpoint_is_bit_for_bit(tmp_path):
    common = ("model.dropout=0.2", "data.xflip=true", "noise.sigma_tn=0.2", "training.keep_checkpoints=9")
    whole = make_run(tmp_path / "whole", "training.checkpoint_kimg=0.04", *common)
    train_here(whole)
    for keep in (0, 1, 2):
        cut = tmp_path / f"cut{keep}"
        shutil.copytree(whole, cut)
        for later in checkpoint.checkpoints(cut / "checkpoints")[keep:]:
            shutil.rmtree(later)  # killed before it was written; its log lines were
        train_here(cut, resume=True)
        assert_same(contents(whole), contents(cut))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_rest_is_bit_for_bit(tmp_path, signum, monkeypatch):
    whole = make_run(tmp_path / "whole")
    train_here(whole)
    path = make_run(tmp_path / "run")
    calls = []

    def step(self, nimg, **keywords):
        calls.append(nimg)
        if len(calls) == 7:
            os.kill(os.getpid(), signum)
        return original(self, nimg, **keywords)

    original = loop.TrainingStep.__call__
    monkeypatch.setattr(loop.TrainingStep, "__call__", step)
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stopped:
        train_here(path)
    assert stopped.value.exit_code == 128 + signum
    assert f"fastambient train --resume {path}" in str(stopped.value)
    assert signal.getsignal(signum) == before, "the handler was not put back"
    assert 48 < checkpoint.load_latest(path / "checkpoints")[1]["nimg"] < 80, "not a regular checkpoint"
    train_here(path, resume=True)
    assert_same(contents(whole), contents(path))


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_before_the_loop_says_how_to_resume(tmp_path, raised, code, monkeypatch):
    path = make_run(tmp_path / "run")

    def build(*arguments):
        raise raised

    monkeypatch.setattr(loop, "build_network", build)
    with pytest.raises(Interrupted, match=f"fastambient train --resume {path}") as stopped:
        start(path)
    assert stopped.value.exit_code == code


def test_a_corrupt_checkpoint_costs_only_time(tmp_path, capsys):
    path = make_run(tmp_path / "run")
    train_here(path)
    expected = contents(path)
    file = checkpoint.checkpoints(path / "checkpoints")[-1] / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 255
    file.write_bytes(data)
    train_here(path, resume=True)
    assert "corrupt" in capsys.readouterr().err
    assert_same(expected, contents(path))


def test_resume_of_nothing_finished_or_unfinished(tmp_path, capsys):
    with pytest.raises(InputError, match="there is no run folder"):
        start(tmp_path / "none", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run folder: it holds no config"):
        start(tmp_path / "empty", resume=True)
    path = make_run(tmp_path / "run")
    start(path, resume=True)  # killed before the first checkpoint: starts over
    assert "from the start" in capsys.readouterr().err
    stats = read_stats(path)
    start(path, resume=True)
    assert "is finished" in capsys.readouterr().err
    assert read_stats(path) == stats
    with pytest.raises(InputError, match="batch of 8 does not divide among 3 ranks"):
        start(path, resume=True, ranks=3)


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    """Bit for bit the run that was that long from the start; a run's own end is said to be movable."""
    whole = make_run(tmp_path / "whole", "training.checkpoint_kimg=0.08")
    train_here(whole)
    path = make_run(tmp_path / "run", "training.checkpoint_kimg=0.08", "training.kimg=0.08")
    train_here(path)
    start(path, resume=True)
    assert f"train --resume {path} --kimg 0.16" in capsys.readouterr().err
    (path / "metrics.json").write_text("{}")
    resume(path, kimg=0.16)
    assert "metrics.json and what lies beside it are of the shorter run" in capsys.readouterr().err
    assert RunFolder(path).read_settings().training.kimg == 0.16
    assert_same(contents(whole), contents(path))
    for kimg in (0.16, 0.08, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="kimg"):
            resume(path, kimg=kimg)
    assert RunFolder(path).read_settings().training.kimg == 0.16


def test_what_is_no_run_is_told(tmp_path):
    prepare(open_source("digits"), tmp_path / "store")
    make_run(tmp_path / "many" / "edm-seed0")
    for path, words in (("store", "it is a store: train on it"), ("many", r"runs lie in it: .*many/edm-seed0$")):
        with pytest.raises(InputError, match=rf"{path} is no run folder: .*; {words}"):
            RunFolder.existing(tmp_path / path)


def test_digits_and_another_level_than_the_stores_are_said(tmp_path, capsys):
    prepare(open_source("digits"), tmp_path / "a", sigma_tn=0.3, noise_seed=5)
    short = ["training.kimg=0.008", "training.batch=8", *TINY, "training.sample_kimg=0"]
    new(TrainRequest(assignments=short), tmp_path / "x")
    assert "no --data: training on the built-in 8x8 digits" in capsys.readouterr().err
    for level, other in ((0.3, False), (0.4, True)):
        request = TrainRequest(
            data=str(tmp_path / "a"),
            assignments=[*short, f"noise.sigma_tn={level}"],
            noise_seed=9 if level == 0.4 else None,
        )
        new(request, tmp_path / f"{level}")
        err = capsys.readouterr().err
        assert ("sigma_tn 0.4 as asked for; " in err and "was prepared with 0.3" in err) == other
        assert "no --data" not in err


def test_one_writer(tmp_path):
    path = make_run(tmp_path / "run")
    with RunFolder(path).lock(), pytest.raises(InputError, match="another process is training"):
        start(path)
    before = (path / "config.yaml").read_text()
    with RunFolder(path).lock(), pytest.raises(InputError, match="another process is training"):
        new(TrainRequest(assignments=["training.seed=7"]), path, force=True)
    assert (path / "config.yaml").read_text() == before, "--force replaced a run that was being trained"


def test_a_resume_drops_what_a_killed_writer_left(tmp_path):
    path = make_run(tmp_path / "run")
    left = path / "checkpoints" / ".nimg-000000000080.0123abcd.tmp"
    left.mkdir(parents=True)
    (left / "state.safetensors").write_bytes(b"half")
    (path / ".model.safetensors.0123abcd.tmp").write_bytes(b"half")
    (path / ".mine.tmp").write_text("kept")
    start(path, resume=True)
    assert [p.name for p in path.rglob("*.tmp")] == [".mine.tmp"]


def test_nothing_is_left_of_a_run_that_could_not_start(tmp_path):
    bad = [
        {"assignments": ["data.train=99999"]},
        {"assignments": ["data.use_labels=true"], "data": str(tmp_path / "x.npy")},
        {"data": str(tmp_path / "missing")},
        {"noise_seed": -1},
        {"noise_seed": 2**64},
        {"preset": "nope"},
        {"assignments": ["model.channel_mult=[1,1,1,1,1,1]"]},
    ]
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8))
    for request in bad:
        with pytest.raises(InputError):
            create_run(plan(TrainRequest(**request)), tmp_path / "run")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy"], request


def test_stores_and_the_command_line(tmp_path):
    source = open_source("digits")
    plain = prepare(source, tmp_path / "plain", sigma_tn=0.3, noise_seed=5)
    noisy = prepare(source, tmp_path / "noisy", sigma_tn=0.3, noise_seed=5, noisy="float16")

    def settings(store, sigma_tn=None, noise_seed=None):
        options = {"noise": {"sigma_tn": sigma_tn}} if sigma_tn is not None else {}
        planned = plan(TrainRequest(data=str(store.path), options=options, noise_seed=noise_seed))
        return planned.settings

    assert settings(plain).noise.sigma_tn == 0.3, "what it was prepared for is the default"
    assert settings(plain, sigma_tn=0.4).noise.sigma_tn == 0.4, "the command line wins"
    assert settings(noisy).data.noisy == "float16" and settings(noisy, 0.3, 5).noise.sigma_tn == 0.3
    with pytest.raises(InputError, match=r"was made at sigma_tn 0\.3"):
        settings(noisy, sigma_tn=0.4)
    with pytest.raises(InputError, match="made with another seed"):
        settings(noisy, noise_seed=6)
    leaking = ["training.augment=0.1", "training.augment_ambient=reference"]
    plan(TrainRequest(data=str(plain.path), assignments=leaking))
    with pytest.raises(InputError, match=r"augment_ambient reference .* use data\.noisy none"):
        plan(TrainRequest(data=str(noisy.path), assignments=leaking))
    with pytest.raises(InputError, match=r"0 to 2\^64 - 1") as refused:
        plan(TrainRequest(noise_seed=2**64 + 12345))
    assert "12345" not in str(refused.value)
    with pytest.raises(InputError, match="holds 100; prepare another"):
        plan(TrainRequest(data=str(plain.path), assignments=["data.train=50"]))
    runs = [make_run(tmp_path / f"run-{s.path.name}", data=str(s.path), noise_seed=None) for s in (plain, noisy)]
    assert [RunFolder(r).read_noise_seed() for r in runs] == [5, 5]
    other = RunFolder(make_run(tmp_path / "other", "noise.sigma_data=0.5", data=str(plain.path), noise_seed=9))
    assert other.read_noise_seed() == 9 and other.read_settings().noise.sigma_data == 0.5, "the command line wins"
    assert RunFolder(runs[0]).read_settings().noise.sigma_data == plain.sigma_data
    assert not (runs[0] / "store").exists(), "a store is used where it lies"
    losses = []
    for run in runs:
        train_here(run)
        losses.append([row["loss"] for row in read_stats(run)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2), "the precomputed copy gives the same training"
    assert losses[0] != losses[1]


def test_a_stores_noise_seed_at_another_level_is_a_warning(tmp_path, capsys):
    """From the second level on, whichever the store was prepared for: one alone gives nothing away."""

    def store(name, **options):
        return prepare(open_source("digits"), tmp_path / name, noise_seed=5, **options).path

    def warned(path, sigma_tn, *assignments, noise_seed=None):
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        make_run(run, f"noise.sigma_tn={sigma_tn}", *assignments, data=str(path), noise_seed=noise_seed)
        return (re.findall("the noise seed of .* noised its images at (.*), too", capsys.readouterr().err) or [""])[0]

    one = store("one", sigma_tn=0.3)
    for ask in ((0.4,), (0.4,), (0,), (0.3, "noise.mode=fresh")):  # prepared for 0.3, and never noised at it
        assert not warned(one, *ask), ask
    assert not warned(one, 0.3, noise_seed=9)
    assert warned(one, 0.3) == "0.4" and warned(one, 0.5, noise_seed=5) == "0.3, 0.4" and warned(one, 0.4) == "0.3, 0.5"
    noisy = store("noisy", sigma_tn=0.3, noisy="float16")
    assert not warned(noisy, 0.3, "data.noisy=float16")
    own = make_run(tmp_path / "own", "noise.sigma_tn=0.2", noise_seed=None) / "store"
    assert not warned(own, 0.2) and warned(own, 0.3) == "0.2"
    (one / "noise_levels").unlink()  # a store of an older program
    assert warned(one, 0.4) == "another sigma_tn" and not warned(one, 0.3)


def test_mirrored_pairs_are_a_warning_under_x_flips(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "twins.npy", np.concatenate([images, images[:3, :, ::-1]]))
    expected = {"data.xflip=true": True, "training.augment=0.1": True, "data.xflip=false": False}
    expected |= {"data.xflip=true noise.sigma_tn=0": False}
    for number, (assignments, warned) in enumerate(expected.items()):
        options = ("data.train=23", "data.holdout=0", "training.kimg=0.008", *assignments.split())
        train_here(make_run(tmp_path / f"{number}", *options, data=str(tmp_path / "twins.npy")))
        assert ("3 pairs of training images mirror each other" in capsys.readouterr().err) == warned, assignments


def test_another_store_in_the_place_of_a_runs_own_is_refused(tmp_path):
    """Trained on after a resume, its noise would be a second observation of every picture, its split another one."""

    def store(**changed):
        options = {"sigma_tn": 0.3, "noise_seed": 5, "noisy": "float32", "force": True} | changed
        return prepare(open_source("digits"), tmp_path / "store", **options)

    path = make_run(tmp_path / "run", data=str(store().path), noise_seed=None)
    train_here(path)
    for changed in ({"noise_seed": 6}, {"split_seed": 1}, {"sigma_tn": 0.4}):
        store(**changed)
        for use in (lambda: train_here(path, resume=True), lambda: evaluate_run(path, num=2)):
            with pytest.raises(InputError, match=r"is not the store that .*run was started on"):
                use()
    store()  # the same one again
    train_here(path, resume=True)


def test_a_store_that_was_moved_is_missed_and_named_anew(tmp_path):
    prepare(open_source("digits"), tmp_path / "a", sigma_tn=0.3, noise_seed=5)
    path = make_run(tmp_path / "run", data=str(tmp_path / "a"), noise_seed=None)
    train_here(path)
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=r"trained on the store .*a, which is not there: .*evaluate also takes --data STORE"
    ):
        evaluate_run(path, num=2)
    with pytest.raises(InputError, match=r"write where it lies now into data.source of .*config.yaml"):
        train_here(path, resume=True)
    assert evaluate_run(path, num=2, data=tmp_path / "moved").metrics["counts"]["train"] == 100
    other = prepare(open_source("digits"), tmp_path / "c", sigma_tn=0.3, split_seed=1).path
    with pytest.raises(InputError, match=r"c is not the store that .*run was started on"):
        evaluate_run(path, num=2, data=other)
    own = make_run(tmp_path / "own")  # a store in the run folder may lie elsewhere, too
    train_here(own)
    (own / "store").rename(tmp_path / "elsewhere")
    assert evaluate_run(own, num=2, data=tmp_path / "elsewhere").metrics["counts"]["train"] == 100


def test_a_store_is_verified_once(tmp_path, monkeypatch):
    """By the plan of a new run; by the loop of a resumed one, and of what was prepared into the run folder."""
    verified, opened = [], Store.open

    def spy(path, *, verify=True):
        verified.extend([Path(path).name] * verify)
        return opened(path, verify=verify)

    prepare(open_source("digits"), tmp_path / "a", sigma_tn=0.3, train=20, holdout=4)
    monkeypatch.setattr(Store, "open", staticmethod(spy))
    options = {"training": {"kimg": 0.016, "batch": 8, "checkpoint_kimg": 0.008, "sample_kimg": 0, "device": "cpu"}}
    request = TrainRequest(data=str(tmp_path / "a"), assignments=TINY, options=options)
    new(request, tmp_path / "run")
    assert verified == ["a"]
    train_here(tmp_path / "run", resume=True)
    assert verified == ["a", "a"]
    damaged = tmp_path / "a" / "train" / "ids.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    for use in (lambda: new(request, tmp_path / "other"), lambda: train_here(tmp_path / "run", resume=True)):
        with pytest.raises(InputError, match=r"ids\.npy has another checksum"):
            use()
    assert not (tmp_path / "other").exists()
    new(TrainRequest(data="digits", assignments=TINY, options=options), tmp_path / "own")
    assert verified[4:] == ["store"]


def test_a_store_without_held_out_images_is_a_warning_at_the_start(tmp_path, capsys):
    for holdout in (0, 1, 2):
        prepare(open_source("digits"), tmp_path / f"{holdout}", sigma_tn=0.3, train=20, holdout=holdout)
        path = make_run(tmp_path / f"run-{holdout}", "training.kimg=0.008", data=str(tmp_path / f"{holdout}"))
        capsys.readouterr()
        train_here(path)
        assert ("no copy rate can be told from chance" in capsys.readouterr().err) == (holdout < 2)


def test_class_conditional_and_labels_dropped(tmp_path):
    path = make_run(tmp_path / "run", "data.use_labels=true", "model.label_dropout=0.2")
    train_here(path)
    assert load(path).label_dim == 10


def test_the_evaluation_is_the_one_that_the_settings_ask_for(tmp_path):
    """A run with x-flips trained on mirror images: they are searched without being asked for."""
    evaluation = ("threshold=0.5", "bootstrap=50", "seed=4", "num=3")
    path = make_run(tmp_path / "run", "data.xflip=true", *(f"evaluation.{e}" for e in evaluation))
    train_here(path)
    metrics = evaluate_run(path).metrics
    assert metrics["settings"]["protocol"] == {"space": "pixels in [-1, 1]", "flips": True, "bootstrap": 50, "seed": 4}
    assert metrics["memorization"]["gap_ratio"]["threshold"] == 0.5
    assert metrics["counts"]["samples"] == 3 and metrics["settings"]["sample_seeds"] == "0-2"


def test_crossings_are_a_function_of_nimg():
    marks = [nimg for nimg in range(8, 400, 8) if crosses(nimg, 8, 0.1)]
    assert marks == [104, 200, 304]
    assert not crosses(1000, 8, 0)


def test_a_full_disk_ends_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")
    writes = []

    def save_file(tensors, file):
        writes.append(file)
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        real(tensors, file)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(FastambientError, match=r"No space left.*nimg-000000000080"):
        train_here(path)
    monkeypatch.undo()
    train_here(path, resume=True)
    assert len(read_stats(path)) == 20


def test_training_works_outside_the_main_thread(tmp_path):
    path = make_run(tmp_path / "run", "training.kimg=0.016")
    thread = threading.Thread(target=train_here, args=(path,))
    thread.start()
    thread.join()
    assert len(read_stats(path)) == 2


def test_time_that_pictures_take_is_in_the_runs_time_and_in_the_time_left(tmp_path, monkeypatch, capsys):
    """Four previews of 1.5 seconds each dwarf 20 steps of a tiny network. The rate of a line is training's alone."""
    lefts = []

    class Spy(loop.Monitor):
        def line(self):
            lefts.append(self._seconds_left(time.monotonic(), self.recent[-1]["nimg"]))
            super().line()

    monkeypatch.setattr(loop, "Monitor", Spy)
    monkeypatch.setattr(loop.Trainer, "sample_grid", lambda self: time.sleep(1.5))
    monkeypatch.setattr("fastambient.training.monitor._LINE_EVERY_SECONDS", 1e9)  # a line with each checkpoint alone
    path = make_run(tmp_path / "run", "training.sample_kimg=0.04", "training.checkpoint_kimg=0.04")
    train_here(path)
    _, state = checkpoint.load_latest(path / "checkpoints")
    assert state["seconds"] > 3 * 1.5  # the last checkpoint is written before the last preview's pause is counted
    # A line comes before its preview: at 0.12 kimg two of them lie behind, and a third of that time is left.
    assert len(lefts) == 4 and lefts[2] > 2 * 1.5 / 3 and lefts[3] == 0
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s ", capsys.readouterr().err)]
    assert len(rates) == 4 and min(rates[1:]) > 40 / 1.5, "with a preview in it a line could not have more"


def test_the_collector_rests_while_training_and_is_put_back(tmp_path, monkeypatch):
    """Objects of the first steps are frozen; nothing is collected but at checkpoints."""
    seen, original = [], loop.TrainingStep.__call__

    def step(self, nimg, **keywords):
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return original(self, nimg, **keywords)

    collections = []
    monkeypatch.setattr(loop.TrainingStep, "__call__", step)
    monkeypatch.setattr(loop.gc, "collect", lambda: collections.append(len(seen)))
    frozen = gc.get_freeze_count()
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            train_here(make_run(tmp_path / f"{enabled}"))
            assert gc.isenabled() == enabled and gc.get_freeze_count() <= frozen
        finally:
            gc.enable()
        assert seen == [(False, False)] * 3 + [(False, True)] * 17
        assert collections == [3, 10, 20], "after the first steps and at both checkpoints"
        seen.clear()
        collections.clear()

    def broken(self, nimg, **keywords):
        raise ValueError("broken")

    monkeypatch.setattr(loop.TrainingStep, "__call__", broken)
    with pytest.raises(ValueError, match="broken"):
        train_here(make_run(tmp_path / "broken"))
    assert gc.isenabled()
