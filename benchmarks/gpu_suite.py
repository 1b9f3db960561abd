"""Everything that is measured on a GPU, in one go: tests, operators, whole steps with profiles, sampling.

    python benchmarks/gpu_suite.py [--device cuda|cpu] [--scale full|tiny] [--minutes 8] [--out DIR]

Each part is a process of its own with a time budget; one that fails or takes too long is named and the others go on.
Parts come in order of importance, and those that the remaining minutes cannot hold are named, too. Rows, profiles, the
parts' output (log.txt) and a page (summary.md) go to ``benchmarks/results/gpu-suite-DEVICE`` or, at scale tiny, a
rehearsal of the same parts with small networks and batches, to ``runs/gpu-suite-tiny``. Exit code 1 if a part failed.
Compiling for the strong competitor takes most of the time; a second run finds torch.compile's results in its cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import protocol
import tables
import torch

from fastambient.console import duration, say

HERE = Path(__file__).parent
_LEAST = 15.0  # seconds; a part with less than this left is not begun


@dataclass(frozen=True)
class Part:
    name: str
    command: Sequence[str]  # arguments of Python
    seconds: float  # budget


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str  # done, failed or did not fit
    seconds: float
    notes: Sequence[str] = ()


def parts_of(scale: str, device: str, out: Path) -> list[Part]:
    """The parts of a suite, the most important first; sizes are all that differs between the scales."""
    full = scale == "full"
    options = ["--device", device, "--out", str(out)]

    def step(
        preset: str, batch: int, seconds: float, *, competitors: str = "reference,strong", compiled: bool = False
    ) -> Part:
        extra = ["--profile", str(out / f"profile-{preset}.json")] if batch == batches[0] and not compiled else []
        extra += ["--compile"] if compiled else []
        command = [str(HERE / "step_time.py"), "--preset", preset, "--batch", str(batch), "--rounds", rounds]
        name = f"step {preset} {batch}{' compiled' if compiled else ''}"
        return Part(name, [*command, "--competitors", competitors, *extra, *options], seconds)

    def sampling(preset: str, size: str, steps: int, seconds: float, *, competitors: str = "strong") -> Part:
        command = [str(HERE / "sampling_latency.py"), "--preset", preset, "--batches", size, "--steps", str(steps)]
        where = [*options[:3], str(out if "," in size else out / f"batch-{size}")]  # names of files do not say sizes
        precision = ["--precision", "bf16" if device == "cuda" else "fp32", "--rounds", rounds]
        return Part(f"sample {preset} {size}", [*command, *precision, "--competitors", competitors, *where], seconds)

    batches = (64, 256) if full else (4, 8)
    rounds = "9" if full else "5"
    tests = Part("GPU tests", ["-m", "pytest", "-m", "gpu", str(HERE.parent / "tests")], 90)
    kernels = Part("kernels", [str(HERE / "kernels.py"), *([] if full else ["--tiny"]), *options], 90)
    if not full:
        # One compiled competitor is enough for a rehearsal: on 2 cores it takes as long as all the rest.
        return [
            tests, kernels,
            step("digits", 4, 240, competitors="reference,strong"),
            step("small16", 4, 60, competitors="reference"),
            step("small32", 4, 60, competitors="reference"),
            sampling("digits", "1,2", 3, 60, competitors="reference"),
            sampling("small16", "1,2", 3, 60, competitors="reference"),
            step("digits", 8, 60, competitors="reference"),
        ]  # fmt: skip
    cifar10, ffhq64, adm = "cifar10-ddpmpp", "ffhq64-ncsnpp", "imagenet64-adm"
    return [
        tests, kernels,
        step(cifar10, 64, 100), step(ffhq64, 64, 120),
        sampling(cifar10, "1,64", 18, 100, competitors="reference,strong"),
        step(adm, 64, 150), sampling(ffhq64, "1,64", 40, 120),
        step(cifar10, 256, 100), step(ffhq64, 256, 120), step(adm, 256, 150),
        step(cifar10, 64, 120, competitors="strong", compiled=True),
        sampling(cifar10, "512", 18, 90), sampling(ffhq64, "512", 40, 180),
    ]  # fmt: skip


def run_part(part: Part, seconds: float, log: TextIO) -> Outcome:
    """Run a part for at most `seconds`; its output goes to the log, what a reader must know of it into the notes."""
    began, late = time.monotonic(), False
    # A file and no pipe: workers of torch.compile that outlive a part would hold its end open.
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(timeout=seconds)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
            late = isinstance(stopped, subprocess.TimeoutExpired)
            if not late:
                raise
        file.seek(0)
        output = file.read()
    took = time.monotonic() - began
    log.write(f"== {part.name}\n{output}\n")
    log.flush()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    notes = [line for line in lines if "does not fit" in line]
    if "pytest" in part.command:
        counted = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|errors?)\b", line)]
        notes += [re.sub(r"^=+ | =+$", "", line) for line in counted[-1:]]
    if late:
        return Outcome(part.name, "failed", took, [*notes, f"it took longer than {seconds:.0f} s"])
    if process.returncode:
        last = lines[-1] if lines else "it said nothing"
        return Outcome(part.name, "failed", took, [*notes, f"exit code {process.returncode}: {last[:300]}"])
    return Outcome(part.name, "done", took, notes)


def run_parts(parts: Sequence[Part], *, seconds: float, log: TextIO) -> list[Outcome]:
    """Run the parts one after the other within `seconds`, and say how much of them is left."""
    end = time.monotonic() + seconds
    outcomes = []
    for k, part in enumerate(parts):
        left = end - time.monotonic()
        where = f"[{k + 1}/{len(parts)}] {part.name}"
        if left < _LEAST:
            outcome = Outcome(part.name, "did not fit", 0.0, ["no time was left for it"])
        else:
            budget = min(part.seconds, left)
            say(f"{where}: at most {duration(budget)}, {duration(left)} left for all")
            outcome = run_part(part, budget, log)
        outcomes.append(outcome)
        say(f"{where}: {outcome.state}" + "".join(f"; {note}" for note in outcome.notes))
    return outcomes


def summary(outcomes: Sequence[Outcome], folder: Path, device: torch.device) -> str:
    """The page: machine, parts, and the tables of the rows in `folder` with their targets."""
    found = protocol.environment(device)
    versions = found["versions"]
    assert isinstance(versions, dict)
    rows = tables.read_rows(folder)
    lines = [
        f"# GPU suite on {found['device']}",
        "",
        f"{found['date']}; {', '.join(f'{k} {v}' for k, v in versions.items())}",
    ]
    if "gpu" in found:
        lines += ["", f"GPU: {json.dumps(found['gpu'])}"]
    lines += ["", "| part | | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} | {'; '.join(o.notes).replace('|', '/')} |" for o in outcomes]
    for name, title in (
        ("step", "Step time"), ("profile", "Where a step's time goes"), ("sampling", "Sampling latency"), ("kernels", "Operators"),
    ):  # fmt: skip
        lines += ["", f"## {title}", "", tables.table(name, rows)]
    return "\n".join(lines) + "\n"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: a rehearsal (default full)")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (default 8)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of rows and summary")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu --scale tiny is the rehearsal")
    device = torch.device(arguments.device)
    name = slug(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu"
    usual = protocol.RESULTS / f"gpu-suite-{name}" if arguments.scale == "full" else Path("runs/gpu-suite-tiny")
    out = (arguments.out or usual).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "summary.md").is_file():  # of a run before: a summary speaks of one run
        for old in out.rglob("*.json"):
            old.unlink()
    with (out / "log.txt").open("w") as log:
        outcomes = run_parts(parts_of(arguments.scale, device.type, out), seconds=60 * arguments.minutes, log=log)
    (out / "summary.md").write_text(summary(outcomes, out, device))
    failed = [o.name for o in outcomes if o.state == "failed"]
    say(f"{out / 'summary.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
