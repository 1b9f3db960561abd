"""Cells side by side, each in a process of its own (cell.py), and the end of them all by a signal or an error."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fastambient.console import WARNING, progress, say, warn
from fastambient.processes import die_with_parent, python_command
from fastambient.sweep.request import Cell, SweepRequest
from fastambient.sweep.results import STOPPED, cell_line, result_of_cell
from fastambient.training.ending import go_on_from
from fastambient.training.run import RunFolder
from fastambient.training.stopping import Interrupted

_POLL_SECONDS = 0.3
_GRACE_SECONDS = 60.0  # a run that is told to stop writes its checkpoint


class _Job:
    """The process of one cell, in a place among the parallel ones."""

    def __init__(self, request: SweepRequest, path: Path, log: Path, place: int, threads: int) -> None:
        self.path, self.place = path, place
        asked = (str(path), str(request.num), "cuda" if request.gpus else "cpu", str(request.features))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # each is a run of its own, whatever started this one
            environment.pop(name, None)
        if request.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % request.gpus)
        self.log: IO[str] = open(log, "a+", encoding="utf-8")  # noqa: SIM115
        self.heard = log.stat().st_size  # bytes: what an earlier call was told is not said again
        self.child = subprocess.Popen(
            python_command("fastambient.sweep.cell", *asked),
            env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then tells the children once
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """What the run has warned of since this was asked last, in whole lines."""
        with open(self.log.name, "rb") as log:  # its own place in the file, which the process goes on writing
            log.seek(self.heard)
            lines = log.read().split(b"\n")[:-1]
        self.heard += sum(len(line) + 1 for line in lines)
        said = (line.decode("utf-8", "replace").strip() for line in lines)
        return [line.removeprefix(WARNING) for line in said if line.startswith(WARNING)]

    def failure(self) -> str:
        """Of a process that has ended: the last thing that it said, "" where it did what it was to do."""
        if not self.child.returncode:
            return ""
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        return f"the cell {self.path} failed with exit code {self.child.returncode}: {last}"

    def end(self) -> None:
        try:
            self.child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.log.close()


def run_all(request: SweepRequest, todo: list[Cell], out: Path) -> dict[Cell, str]:
    """Train and measure these cells, `parallel` at once; returns which failed, and with what.

    A cell that fails, by training that diverges for one, leaves the others running: each is a run of its own. What runs
    warn of is said here as well, once for all of them.
    """
    cores = os.cpu_count() or 1
    parallel = min(request.parallel or request.gpus or cores, len(todo))
    threads = max(1, cores // parallel)
    images = {c.name: round(RunFolder(out / c.name).read_settings().training.kimg * 1000) for c in todo}
    waiting = sorted(todo, key=lambda c: (request.seeds.index(c.seed), c.kind not in STOPPED))
    jobs: dict[Cell, _Job] = {}
    count, total, failed, told = 0, len(todo), dict[Cell, str](), set[str]()
    seen = {c.name: min(RunFolder(out / c.name).images_seen(), images[c.name]) for c in todo}
    try:
        with progress("sweep", sum(images.values()) - sum(seen.values())) as advance:
            while waiting or jobs:
                while len(jobs) < parallel and (ready := [c for c in waiting if _is_ready(c, (*waiting, *jobs))]):
                    cell = ready[0]
                    waiting.remove(cell)
                    if cell.twin is not None and cell.kind not in STOPPED:
                        go_on_from(RunFolder(out / cell.name), RunFolder(out / cell.twin.name))
                    place = next(p for p in range(parallel) if p not in {j.place for j in jobs.values()})
                    log = out / "logs" / f"{cell.name}.log"
                    jobs[cell] = _Job(request, out / cell.name, log, place, threads)
                for cell, job in list(jobs.items()):
                    ended = job.child.poll() is not None
                    for text in job.warnings():
                        if text not in told:
                            warn(f"{cell.name}: {text}")
                            told.add(text)
                    # A run that the rule stopped counts as whole: the time left is that of the others.
                    now = images[cell.name] if ended else min(RunFolder(job.path).images_seen(), images[cell.name])
                    advance(max(now - seen[cell.name], 0))
                    seen[cell.name] = max(now, seen[cell.name])
                    if ended:
                        count += 1
                        if trouble := job.failure():
                            failed[cell] = trouble
                            warn(f"{trouble} ({count} of {total} done)")
                        else:
                            found = result_of_cell(cell.kind, cell.sigma_tn, cell.seed, job.path, request.features)
                            say(f"{cell_line(found)} ({count} of {total} done)")
                        jobs.pop(cell).end()
                time.sleep(_POLL_SECONDS)
    except (KeyboardInterrupt, SystemExit) as stopped:
        signum = signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else signal.SIGTERM
        _end(jobs)
        raise Interrupted(
            signum, f"stopped by {signum.name}, with checkpoints: the same command goes on, finished cells are kept"
        ) from None
    except BaseException:
        _end(jobs)
        raise
    return failed


def _is_ready(cell: Cell, unfinished: Sequence[Cell]) -> bool:
    """No cell of those that are unfinished trains its beginning."""
    return cell.kind in STOPPED or cell.twin not in unfinished


def _end(jobs: dict[Cell, _Job]) -> None:
    """Tell all runs to stop, which writes their checkpoints, and wait for them."""
    for job in jobs.values():
        if job.child.poll() is None:
            job.child.terminate()
    for job in jobs.values():
        job.end()
