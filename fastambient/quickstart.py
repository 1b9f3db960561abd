"""Two models side by side on the built-in digits: EDM, and ambient diffusion at sigma_tn = 0.2."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from fastambient.console import duration, progress, say
from fastambient.errors import FastambientError
from fastambient.evaluation.report import write_report
from fastambient.evaluation.run import evaluate_run
from fastambient.evaluation.table import print_table
from fastambient.files import refuse_existing
from fastambient.processes import die_with_parent, python_command
from fastambient.training.run import RunFolder

MODELS = (("edm", 0.0), ("ambient", 0.2))


def train_side_by_side(runs: list[tuple[Path, list[str]]], *, nimg: int) -> None:
    """Run ``fastambient train --out PATH ARGUMENTS`` for all at once, the cores divided among them; `nimg` images each.

    Raises
    ------
    FastambientError : one failed; the others are ended
    """
    logs = [tempfile.TemporaryFile("w+") for _ in runs]  # noqa: SIM115
    threads = str(max(1, (os.cpu_count() or 1) // len(runs)))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # each is a run of its own, whatever started this one
        environment.pop(name, None)
    children = [
        subprocess.Popen(
            python_command("fastambient.cli", "train", "--gpus", "0", "--out", str(path), *arguments),
            env=environment,
            preexec_fn=die_with_parent,
            stdout=log,
            stderr=log,
        )
        for (path, arguments), log in zip(runs, logs, strict=True)
    ]
    try:
        with progress("training both", nimg * len(runs)) as advance:
            seen = 0
            while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
                now = sum(RunFolder(path).images_seen() for path, _ in runs)
                advance(now - seen)
                seen = now
                time.sleep(0.5)
        for child, (path, _), log in zip(children, runs, logs, strict=True):
            if child.poll():
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                raise FastambientError(f"training {path} failed with exit code {child.returncode}: {last}")
    finally:
        for log in logs:
            log.close()
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()


def quickstart(out: Path, *, force: bool = False, kimg: float = 64, num: int = 1000, seed: int = 0) -> None:
    """Train both models at once, sample and measure both, print the table, write pictures and report.html.

    Parameters
    ----------
    out : folder for the runs ``edm`` and ``ambient`` and for report.html
    kimg : length of each training, thousands of images
    num : samples of each evaluation
    """
    refuse_existing(out, force=force)
    began = time.monotonic()
    common = [
        "--data",
        "digits",
        "--kimg",
        f"{kimg:g}",
        "--seed",
        str(seed),
        "--set",
        f"training.sample_kimg={kimg / 2:g}",
    ]
    say(f"training EDM and the ambient model on 100 digits, {kimg:g} kimg each")
    runs = [(out / name, [*common, "--sigma-tn", f"{sigma_tn:g}"]) for name, sigma_tn in MODELS]
    for path, _ in runs:
        if path.exists():  # removed here: until the new runs have begun, the old ones' images would count as theirs
            refuse_existing(path, force=force, marker="config.yaml")
            shutil.rmtree(path)
    train_side_by_side(runs, nimg=round(kimg * 1000))
    # Pixels: of pictures this small a network for photographs, at 30 ms each, sees no more.
    evaluated = [evaluate_run(path, num=num, features="pixel") for path, _ in runs]
    write_report(out / "report.html", [e.report for e in evaluated], title="fastambient quickstart: 100 digits")
    print_table(evaluated)
    say(f"done in {duration(time.monotonic() - began)}; open {out / 'report.html'}")
