"""The command line as a user meets it: contracts, help, and every error as one line."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, cli, read_stats
from PIL import Image

from fastambient import cli as command_line
from fastambient.training.distributed import World

SMALL = [
    item
    for a in (*TINY, "training.batch=8", "training.sample_kimg=0", "evaluation.features=pixel")
    for item in ("--set", a)
]


def run(*arguments, capsys):
    """(exit code, stdout, stderr) of the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        command_line.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.fixture(autouse=True)
def _handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prepare", ["SOURCE", "--resolution", "--sigma-tn", "--noise-seed", "--train", "--holdout", "--split-seed", "--noisy", "--on-bad-image", "1.5*R/64", "pixels"]),
        ("train", ["--data", "--out", "--preset", "--config", "--sigma-tn", "--gpus", "--processes", "--kimg", "thousands of images", "--batch", "--seed", "--noise-seed", "--precision", "--checkpoint-kimg", "--checkpoint-levels", "B|auto", "--set", "--dry-run", "--force", "--resume", "[default: digits]"]),
        ("sample", ["--seeds", "--out", "--class", "--steps", "--batch", "--sampler", "--S-churn", "--S-min", "--S-max", "--S-noise", "--guidance", "--autoguidance", "--guidance-interval", "--precision", "heun", "dpmpp-2m", "[default: 1; with --autoguidance 2]"]),
        ("evaluate", ["--data", "--samples", "--num", "--out", "RUN/metrics.json", "--features", "--weights", "--preprocess", "efficientnet-lite0"]),
        ("audit", ["--samples", "--train", "--holdout", "--features", "--weights", "--preprocess", "--flips", "--num", "--resolution", "--cache", "--on-bad-image", "--out", "--gpus", "audit.json"]),
        ("info", ["--json"]),
        ("quickstart", ["--out", "runs/quickstart"]),
    ],
)  # fmt: skip
def test_help_names_every_option_with_units_and_defaults(command, words, capsys):
    code, out, _ = run(command, "--help", capsys=capsys)
    text = " ".join(out.split())
    assert code == 0
    assert not [w for w in words if w not in text]


@pytest.mark.parametrize("arguments", [[], ["figure"]])
def test_without_a_command_there_is_help(arguments, capsys):
    """As it is laid out, not squeezed into one line of error."""
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2 and not err
    assert "Usage: " in out and out.count("\n") > 8


def test_info_json(capsys):
    code, out, err = run("info", "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0 and not err
    assert found["versions"]["torch"] and found["operators"]["ambient_loss"] in ("reference", "native", "triton")


BAD = [
    (["train", "--bogus"], "No such option: --bogus"),
    (["train", "--kimg", "many"], "'--kimg'"),
    (["train", "--preset", "digit"], "unknown preset 'digit'; nearest: digits"),
    (["train", "--set", "training.lrr=1"], "nearest: lr"),
    (["train", "--sigma-tn", "-1"], "sigma_tn must lie between 0"),
    (["train", "--sigma-tn", "nan"], "sigma_tn must lie between 0"),
    (["train", "--sigma-tn", "inf"], "sigma_tn must lie between 0"),
    (["train", "--sigma-tn", "81"], "sigma_max = 80"),
    (["train", "--gpus", "99"], "GPUs"),
    (["train", "--gpus", "-1"], "--gpus must be 0"),
    (["train", "--gpus", "0", "--processes", "2"], "exclude each other"),
    (["train", "--processes", "0"], "--processes must be 1 or more"),
    (["train", "--processes", "3", "--batch", "8"], "--batch 8 does not divide among 3 ranks"),
    (["train", "--batch", "0"], "training.batch must be 1 or more"),
    (["train", "--batch", "most"], "--batch must be a whole number or auto, got 'most'"),
    (["train", "--batch", "auto", "--set", "training.batch_gpu=4"], "--batch auto finds training.batch_gpu"),
    (["train", "--checkpoint-levels", "9"], "training.checkpoint_levels must be between 0 and"),
    (["train", "--precision", "fp16"], "fp16"),
    (["train", "--data", "nowhere"], "'nowhere'"),
    (["train", "--data", ""], "the source is empty"),
    (["prepare", "", "--out", "new"], "the source is empty"),
    (["train", "--data", "model.pkl"], "nothing"),
    (["train", "--config", "none.yaml"], "cannot read the settings file none.yaml"),
    (["train", "--config", "model.pkk"], "nearest: model.pkl"),
    (["train", "--resume", "nothing"], "there is no run folder nothing"),
    (["train", "--resume", "taken", "--kimg", "3"], "taken is no run folder"),
    (["train", "--resume", "taken", "--batch", "8"], "leave out --batch"),
    (["train", "--resume", "taken", "--dry-run"], "leave out --dry-run"),
    (["train", "--resume", "taken", "--force"], "leave out --force"),
    (["train", "--out", "taken", "--force"], "holds no config.yaml, so it is not replaced"),
    (["train", "--out", "deep/er/run", "--set", "data.train=9999"], "1,797"),
    (["train", "--out", "taken"], "the folder taken exists and is not empty"),
    (["train", "--out", "model.pkl", "--force"], "model.pkl exists and is a file"),
    (["train", "--out", "model.pkl/run"], "model.pkl is a file"),
    (["train", "--out", "."], "the folder . is the one you are in"),
    (["prepare", "digits", "--out", "model.pkl", "--force"], "model.pkl exists and is a file"),
    (["prepare", "digits", "--out", "."], "the folder . is the one you are in"),
    (["prepare", "digits", "--out", "taken"], "the folder taken exists and is not empty"),
    (["prepare", "digits", "--out", "new", "--sigma-tn", "nan"], "sigma_tn"),
    (["prepare", "digits", "--out", "new", "--train", "9999"], "1,797"),
    (["prepare", "digits", "--out", "new", "--holdout", "1885"], "digits has 1,797 images, too few for --holdout 1885"),
    (["prepare", "digits", "--out", "new", "--split-seed", "99999999999999999999"], "--split-seed must be a 64-bit"),
    (["prepare", "digits", "--out", "new", "--noise-seed", "-1"], "--noise-seed must be a 64-bit integer, 0 to 2^64 - 1"),
    (["train", "--noise-seed", "-1"], "--noise-seed must be a 64-bit integer, 0 to 2^64 - 1"),
    (["train", "--noise-seed", "18446744073709551616"], "--noise-seed must be a 64-bit integer, 0 to 2^64 - 1"),
    (["train", "--seed", "-1"], "training.seed must be a 64-bit integer, 0 to 2^64 - 1, got -1"),
    (["train", "--set", "data.split_seed=-1"], "data.split_seed must be a 64-bit integer, 0 to 2^64 - 1, got -1"),
    (["train", "--set", "data.train=0"], "data.train must be 1 or more, got 0"),
    (["train", "--set", "data.resolution=0"], "--set data.resolution=0): expected 1 to 8000 pixels"),
    (["prepare", "digits"], "--out"),
    (["prepare", "empty", "--out", "new"], "empty"),
    (["sample", "nothing", "--seeds", "0", "--out", "new"], "no run or weights file nothing"),
    (["sample", "model.pkl", "--seeds", "0", "--out", "new"], "never loaded"),
    (["sample", "taken", "--seeds", "0", "--out", "new"], "taken is no run folder: it holds neither model.safetensors"),
    (["sample", "taken", "--seeds", "x", "--out", "new"], "--seeds"),
    (["sample", "taken", "--seeds", "0", "--out", "new", "--sampler", "euler"], "'heun', 'dpmpp-2m'"),
    (["sample", "taken", "--seeds", "0", "--out", "new", "--guidance-interval", "1"], "--guidance-interval must be LOW,HIGH"),
    (["evaluate", "nothing"], "there is no run folder nothing"),
    (["evaluate", "taken"], "no run folder"),
    (["quickstart", "--out", "taken"], "the folder taken exists and is not empty"),
    (["frobnicate"], "frobnicate"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pkl").write_bytes(b"cos\nsystem\n")
    if message == "nothing":
        message = "pickle"
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert message in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "kept.txt", "model.pkl", "taken"]


def test_long_errors_are_not_wrapped_outside_a_terminal(tmp_path):
    name = "x" * 300
    done = cli("train", "--data", name, check=2, env={"COLUMNS": "40"})
    assert done.stderr.count("\n") == 1 and name in done.stderr and done.stderr.startswith("error: ")


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("fastambient.system.information", broken)
    code, out, err = run("info", capsys=capsys)
    assert code == 1 and out == "" and err.startswith("error: unexpected RuntimeError: two lines; please report it")
    monkeypatch.setenv("FASTAMBIENT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        command_line.main(["info"])


def test_a_launchers_ranks_are_the_runs(tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", 0), ("WORLD_SIZE", 3), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("fastambient.training.start.join_world", lambda device: World(0, 1))
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "--gpus", 0, "--out", "run", "--batch", 8, capsys=capsys)
    assert code == 2 and "--batch 8 does not divide among 3 ranks" in err
    assert not list(tmp_path.iterdir()), "a folder was made for a run that cannot start"


def test_from_pictures_to_metrics(tmp_path, monkeypatch, capsys):
    """prepare -> train -> sample -> evaluate on a folder of real digits as PNG files."""
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for i in range(60):
        folder = tmp_path / "pictures" / f"digit{digits.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 255 / 16).round().astype(np.uint8)).save(folder / f"{i:03d}.png")
    code, out, _ = run(
        "prepare", "pictures", "--out", "store", "--train", 40, "--holdout", 20, "--sigma-tn", 0.2, capsys=capsys
    )
    assert code == 0 and "40 training and 20 held-out images of 1x8x8" in out
    code, out, err = run("train", "--data", "store", "--out", "run", "--kimg", 0.08, *SMALL, capsys=capsys)
    assert code == 0 and "sigma_tn 0.2: 63.4% of the draws" in err
    code, out, _ = run("sample", "run", "--seeds", "0-3,100", "--out", "samples", "--steps", 3, capsys=capsys)
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "samples").glob("seed*")) == [
        f"seed{s:09d}.png" for s in (0, 1, 2, 3, 100)
    ]
    options = ["--sampler", "heun", "--steps", 3, "--S-churn", 20, "--S-min", 0.05, "--S-max", "inf", "--S-noise", 1.01]
    guide = next((tmp_path / "run" / "checkpoints").iterdir())
    options += ["--autoguidance", guide, "--guidance", 1.5, "--guidance-interval", "0.1,9", "--precision", "fp32"]
    for seeds, name in (("0-3", "a.npz"), ("3", "b.npz")):
        code, _, err = run("sample", "run", "--seeds", seeds, "--out", name, *options, capsys=capsys)
        assert code == 0 and "2 x 5 evaluations a picture" in err
    a, b = (np.load(tmp_path / name, allow_pickle=False)["images"] for name in ("a.npz", "b.npz"))
    assert abs(a[3].astype(int) - b[0]).max() <= 1, "the picture of a seed depends on its batch"
    plain = Image.open(tmp_path / "samples" / "seed000000003.png")
    assert abs(np.asarray(plain).astype(int) - b[0, 0]).max() > 1, "churn shows in no picture"
    code, _, _ = run("sample", "run", "--seeds", "3", "--out", "c.npz", "--sampler", "dpmpp-2m", capsys=capsys)
    assert code == 0
    code, _, err = run("sample", "run", "--seeds", "3", "--out", "d.npz", "--guidance", 2, capsys=capsys)
    assert code == 2 and "--guidance 2 needs a class-conditional model" in err
    code, out, _ = run("evaluate", "run", "--num", 20, capsys=capsys)
    assert code == 0 and "copy rate" in out
    written = "run/report.html, run/metrics.json, run/nearest.csv, run/evaluation.png, run/nearest.png"
    assert out.splitlines()[-1] == f"written: {written}" and all(Path(name).is_file() for name in written.split(", "))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with open(tmp_path / "run" / "nearest.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    assert sorted(pair["sample_name"] for pair in pairs) == sorted(f"seed {i}" for i in range(20))
    assert all((tmp_path / "pictures" / pair["gap_ratio_train_name"]).is_file() for pair in pairs)
    assert {"train": 40, "holdout": 20, "samples": 20}.items() <= metrics["counts"].items()
    assert {"value", "reference", "train_vs_reference"} <= metrics["frechet"]["pixel"].keys()
    assert {"threshold", "rate", "ci95", "holdout_rate"} <= metrics["memorization"]["gap_ratio"].keys()
    assert {"median", "holdout_median"} <= metrics["memorization"]["nearest_distance"].keys()
    assert metrics["settings"]["sigma_tn"] == 0.2
    assert metrics["settings"]["kimg"] == 0.08 == metrics["settings"]["kimg_planned"]
    report = (tmp_path / "run" / "report.html").read_bytes()
    assert (tmp_path / "run" / "nearest.png").is_file() and (tmp_path / "run" / "report.html").is_file()
    code, _, _ = run("evaluate", "run", "--samples", "samples", "--out", "other.json", capsys=capsys)
    assert code == 0 and json.loads((tmp_path / "other.json").read_text())["counts"]["samples"] == 5
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics, "--out leaves metrics.json alone"
    assert (tmp_path / "run" / "report.html").read_bytes() == report and (tmp_path / "other-report.html").is_file()
    for wrong in (["--out", "samples"], ["--out", "none/m.json"], ["--samples", "samples", "--num", -2]):
        code, _, err = run("evaluate", "run", *wrong, capsys=capsys)
        assert code == 2 and err.startswith(f"error: {wrong[-2]} ") and err.count("\n") == 1, "found before sampling"
    # a second run with a config.yaml of the first has the same losses
    code, _, _ = run("train", "--config", "run/config.yaml", "--out", "again", capsys=capsys)
    assert code == 0 and read_stats(tmp_path / "again") == read_stats(tmp_path / "run")


def test_commands_name_slow_operators_in_one_line_and_no_others(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": "", "FASTAMBIENT_IMPL": "auto"}
    quick = [*TINY, "training.sample_kimg=0", "training.kimg=0.008", "training.batch=8"]
    quick = [part for setting in quick for part in ("--set", setting)]
    here = cli("train", "--out", tmp_path / "a", *quick, env=environment)
    without = cli("train", "--out", tmp_path / "b", *quick, env=environment | {"FASTAMBIENT_NATIVE": "off"})
    assert "fastambient_kernels:" not in here.stderr + without.stderr
    slow = [line for line in without.stderr.splitlines() if "run in plain torch" in line]
    assert len(slow) == 1 and "conv2d" in slow[0] and slow[0].endswith("(switched off by FASTAMBIENT_NATIVE=off)")


def wait_for_lines(path, lines, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not reach {lines} lines")


def spawn(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "fastambient", *map(str, arguments)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )  # fmt: skip


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_a_checkpoint_and_the_line_that_resumes(tmp_path, signum, code):
    child = spawn("train", "--gpus", 0, "--out", "run", "--kimg", 80, *SMALL, cwd=tmp_path)
    wait_for_lines(tmp_path / "run" / "stats.jsonl", 5)
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert f"resume with: {sys.executable} -m fastambient train --resume run" in err and "Traceback" not in err
    nimg = read_stats(tmp_path / "run")[-1]["nimg"]
    assert (tmp_path / "run" / "checkpoints" / f"nimg-{nimg:012d}").is_dir()


@pytest.mark.slow
def test_sigkill_at_a_random_moment_then_resume_is_bit_for_bit(tmp_path):
    import random

    from test_training_run import assert_same, contents

    common = ["--gpus", 0, "--kimg", 1.6, "--checkpoint-kimg", 0.2, "--noise-seed", 3, "--sigma-tn", 0.2, *SMALL]
    cli("train", "--out", "whole", *common, cwd=tmp_path)
    moments = random.Random()
    kills = 0
    for attempt in range(3):
        name = f"run{attempt}"
        child = spawn("train", "--out", name, *common, cwd=tmp_path)
        wait_for_lines(tmp_path / name / "stats.jsonl", moments.randrange(1, 180))
        child.kill()
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
        cli("train", "--resume", name, cwd=tmp_path)
        assert_same(contents(tmp_path / "whole"), contents(tmp_path / name))
    assert kills, "every run was finished before it was killed"


@pytest.mark.slow
def test_one_and_two_ranks_agree(tmp_path):
    common = ["--kimg", 0.4, "--checkpoint-kimg", 0.2, "--noise-seed", 3, "--sigma-tn", 0.2, *SMALL]
    cli("train", "--out", "one", "--processes", 1, *common, cwd=tmp_path)
    done = cli("train", "--out", "two", "--processes", 2, *common, cwd=tmp_path)
    assert "2 rank(s) on cpu" in done.stderr and "Traceback" not in done.stderr
    one, two = (read_stats(tmp_path / name) for name in ("one", "two"))
    assert [r["nimg"] for r in one] == [r["nimg"] for r in two] and len(one) == 50
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), a["nimg"]
        assert a["ambient_share"] == b["ambient_share"], "the ranks drew other numbers"
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    # and a run may go on with another number of ranks
    two_more = tmp_path / "two"
    for later in sorted((two_more / "checkpoints").iterdir())[1:]:
        import shutil

        shutil.rmtree(later)
    cli("train", "--resume", "two", "--processes", 1, cwd=tmp_path)
    assert len(read_stats(two_more)) == 50


def children_of(pid):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = re.sub(r"\(.*\)", "x", file.read()).split()
            except OSError:
                continue
            if int(fields[3]) == pid and fields[2] != "Z":
                found.append(int(entry))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and prctl")
def test_ranks_end_with_their_parent(tmp_path):
    child = spawn("train", "--processes", 2, "--out", "run", "--kimg", 800, *SMALL, cwd=tmp_path)
    wait_for_lines(tmp_path / "run" / "stats.jsonl", 3)
    ranks = children_of(child.pid)
    assert len(ranks) >= 2
    child.kill()
    child.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end and any(os.path.exists(f"/proc/{p}") and p in alive() for p in ranks):
        time.sleep(0.1)
    assert not [p for p in ranks if p in alive()]
    cli("train", "--resume", "run", "--processes", 1, "--set", "x", check=2, cwd=tmp_path)  # the lock is free again


def alive():
    out = set()
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    if re.sub(r"\(.*\)", "x", file.read()).split()[2] != "Z":
                        out.add(int(entry))
            except OSError:
                continue
    return out


@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path):
    child = spawn("train", "--processes", 2, "--out", "run", "--kimg", 800, *SMALL, cwd=tmp_path)
    wait_for_lines(tmp_path / "run" / "stats.jsonl", 3)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 143, err
    assert f"resume with: {sys.executable} -m fastambient train --resume run" in err and "Traceback" not in err
    nimg = read_stats(tmp_path / "run")[-1]["nimg"]
    assert (tmp_path / "run" / "checkpoints" / f"nimg-{nimg:012d}").is_dir()


@pytest.mark.parametrize(("load", "policy", "count"), [(3.0, None, "100"), (0.1, None, None), (3.0, "active", None)])
def test_threads_wait_asleep_beside_other_programs(monkeypatch, load, policy, count):
    from fastambient import cli as commands

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    commands._wait_politely()
    assert os.environ.get("GOMP_SPINCOUNT") == count
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


def test_the_command_line_is_read_before_torch_is_loaded():
    """OpenMP reads its settings when torch is imported."""
    code = "import sys, fastambient.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prepare_says_where_few_images_are_held_out(tmp_path, capsys):
    """Before the training, not after it; not where somebody has named a number."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (80, 8, 8, 1), dtype=np.uint8))
    for name, more, said in (("a", [], True), ("b", ["--holdout", "20"], False)):
        code, _, err = run(
            "prepare", tmp_path / "x.npy", "--out", tmp_path / name, "--noise-seed", "1", *more, capsys=capsys
        )
        assert code == 0 and ("30 or more tell copying from chance (--holdout)" in err) is said
