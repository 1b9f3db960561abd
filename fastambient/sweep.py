"""A sweep over sigma_tn: quality against copying, each cell a run of its own, beside the baselines to be beaten.

DIR/store         the prepared data set (unless a STORE was given)      DIR/logs/   what each cell's commands said
DIR/NAME/         a run folder a cell: EDM or ambient diffusion at one sigma_tn and seed, or a baseline
DIR/sweep.json    every cell's and every configuration's numbers, the rule and the chosen sigma_tn
DIR/table.md  DIR/pareto.svg  DIR/pareto.png   (with --audit-every also DIR/training.svg and .png)
DIR/report.html   the choice, curve and table, and the figures and pictures of every configuration's first seed

A cell is trained, sampled and measured as by ``train --resume``, ``sample`` and ``evaluate``, in a process of its own
(sweep_cell.py). The same command goes on where the last one ended: finished cells are kept, unfinished ones resumed.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from fastambient.console import duration, progress, say
from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.data.store import Store, is_store
from fastambient.errors import FastambientError, InputError, did_you_mean
from fastambient.files import refuse_existing, write_bytes, write_json
from fastambient.processes import die_with_parent
from fastambient.sweep_cell import MEASURED, SAMPLES, marker
from fastambient.sweep_results import (
    COLUMNS,
    WITHIN,
    cell_line,
    choice,
    result_of_cell,
    rows_for_people,
    summarize,
    table,
)
from fastambient.training.config import Settings, check_sigma_tn
from fastambient.training.ending import finished
from fastambient.training.run import RunFolder
from fastambient.training.start import TrainRequest, create_run, plan
from fastambient.training.stopping import Interrupted

BASELINES = ("fresh-noise", "weight-decay", "early-stop", "ambient-stop")
WEIGHT_DECAY = 0.05  # decoupled, AdamW: what Transformers for images are usually trained with (He et al., 2022, MAE)
STOP_RATE = 0.05  # of the early-stop and ambient-stop baselines
TARGET = 0.05  # of the rule that chooses, see sweep_results
_OWN = ("noise.sigma_tn", "noise.mode", "training.seed", "training.audit_kimg", "training.stop_when_copying")
_FILLED = (  # by create_run from the data, or of no influence on a run's numbers
    "data.source", "data.train", "data.holdout", "data.cache", "data.shard_index", "data.clean", "data.loader",
    "data.workers", "training.device", "training.ranks",
)  # fmt: skip
_PHOTOGRAPHS = 16  # pixels; of smaller pictures a network for photographs, at 30 ms each, sees no more than pixels
_POLL_SECONDS = 0.3
_GRACE_SECONDS = 60.0  # a run that is told to stop writes its checkpoint


@dataclass(frozen=True)
class SweepRequest:
    """What ``fastambient sweep`` was asked for."""

    data: str = "digits"  # SOURCE or STORE
    sigma_tn: Sequence[float] = (0.0, 0.1, 0.2, 0.4)
    seeds: Sequence[int] = (0, 1, 2)
    baselines: Sequence[str] = ()
    kimg: float | None = None
    preset: str | None = None
    num: int = 1000  # samples a cell
    features: str | None = None  # embedder of the evaluation; None: its default, below 16 pixels none
    assignments: Sequence[str] = ()  # section.name=value, for every cell
    target: float = TARGET
    within: float = WITHIN
    stop_rate: float = STOP_RATE
    weight_decay: float = WEIGHT_DECAY
    parallel: int | None = None  # cells at once; None: one a GPU, else one a CPU core
    gpus: int = 0
    audit_every: float | None = None  # kimg between audits of every run; None: of those that the rule may stop alone
    noise_seed: int | None = None  # of the first cell, the others count on; None: each its own, from the system


@dataclass(frozen=True)
class Cell:
    """One run. `options`: its own part of the settings tree."""

    kind: str  # edm, ambient or a baseline
    sigma_tn: float
    seed: int
    options: dict[str, dict[str, Any]] = field(compare=False, default_factory=dict)

    @property
    def name(self) -> str:
        level = f"-{self.sigma_tn:g}" if self.sigma_tn else ""
        return f"{self.kind}{level}-seed{self.seed}"


def cells(request: SweepRequest) -> list[Cell]:
    """All cells in the order they are trained in: a whole seed before the next one.

    Raises
    ------
    InputError : anything wrong with the request that needs no data to be seen
    """
    r = request
    for what, values in (("--sigma-tn", r.sigma_tn), ("--seeds", r.seeds)):
        if not values:
            raise InputError(f"{what} names none; name at least one")
        if len(set(values)) < len(values):
            raise InputError(f"{what} {','.join(f'{v:g}' for v in values)} names one twice")
    for sigma_tn in r.sigma_tn:
        check_sigma_tn(sigma_tn)
    for baseline in r.baselines:
        if baseline not in BASELINES:
            raise InputError(f"--baselines: unknown baseline {baseline!r}{did_you_mean(baseline, BASELINES)}")
    own = {*_OWN, *(("training.optimizer", "training.weight_decay") if "weight-decay" in r.baselines else ())}
    for text in r.assignments:
        if (name := text.partition("=")[0].strip()) in own:
            raise InputError(f"--set {name}: the sweep sets it itself, cell by cell; leave it out")
    if r.num < 2:
        raise InputError(f"--num must be 2 or more, got {r.num}")
    if r.parallel is not None and r.parallel < 1:
        raise InputError(f"--parallel must be 1 or more, got {r.parallel}")
    if r.audit_every is not None and not 0 < r.audit_every < math.inf:
        raise InputError(f"--audit-every must be above 0 kimg, got {r.audit_every:g}")
    for what, value in (("--target", r.target), ("--stop-rate", r.stop_rate)):
        if not 0 <= value < 1:
            raise InputError(f"{what} must be a rate in [0, 1), got {value:g}")
    ambient = [s for s in r.sigma_tn if s > 0]
    found = []
    for seed in r.seeds:
        found += [Cell("ambient" if s else "edm", s, seed) for s in r.sigma_tn]
        if "fresh-noise" in r.baselines:
            found += [Cell("fresh-noise", s, seed, {"noise": {"mode": "fresh"}}) for s in ambient]
        if "weight-decay" in r.baselines:
            decayed = {"training": {"optimizer": "adamw", "weight_decay": r.weight_decay}}
            found.append(Cell("weight-decay", 0.0, seed, decayed))
        if "early-stop" in r.baselines:
            found.append(Cell("early-stop", 0.0, seed, {"training": {"stop_when_copying": r.stop_rate}}))
        if "ambient-stop" in r.baselines:
            stopping = {"training": {"stop_when_copying": r.stop_rate}}
            found += [Cell("ambient-stop", s, seed, stopping) for s in ambient]
    return found


def sweep(request: SweepRequest, out: Path) -> dict[str, Any]:
    """Train and measure every cell that is not finished, then write what came of all of them; returns sweep.json.

    Raises
    ------
    InputError : a bad request, or a cell in `out` that was trained with other settings than are asked for now
    Interrupted : Ctrl-C or SIGTERM, after the runs' checkpoints; the same call goes on
    FastambientError : a cell failed; the others have been stopped, with checkpoints
    """
    planned = cells(request)
    if out.exists() and not (out / "logs").is_dir():
        refuse_existing(out)
    data = request.data if is_store(request.data) else None
    (out / "logs").mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(out / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process sweeps in {out}; wait for it or stop it") from None
    try:
        began = time.monotonic()
        store = Store.open(data) if data is not None else _own_store(request, out)
        check_holdout(store)
        if request.features is None and store.resolution < _PHOTOGRAPHS:
            request = replace(request, features="pixel")
        for number, cell in enumerate(planned):
            _create(request, cell, number, store, out / cell.name)
        todo = [cell for cell in planned if not _measured(request, out / cell.name)]
        say(f"{out}: {len(planned)} cells, {len(planned) - len(todo)} of them finished; data {store.path}")
        asked = {cell.name for cell in planned}
        others = sorted(p.parent.name for p in out.glob("*/config.yaml") if p.parent.name not in asked)
        if others:
            say(f"not asked for now, and so not among the results: {', '.join(others)}")
        if todo:
            _run_all(request, todo, out)
        results = [result_of_cell(c.kind, c.sigma_tn, c.seed, out / c.name, request.features) for c in planned]
        summary = summarize(results, target=request.target, within=request.within)
        summary["settings"] = _settings_of(request, store)
        _write(request, planned, summary, out)
        say(f"done in {duration(time.monotonic() - began)}: {out / 'report.html'}, {out / 'pareto.png'}")
        return summary
    finally:
        lock.release()


def check_holdout(store: Store) -> None:
    if store.hand_out or store.holdout.images is None or len(store.holdout) < 2:
        raise InputError(
            f"{store.path} has no two clean held-out images: without them copying cannot be told from chance;"
            " sweep on a store with some (prepare --holdout)"
        )


def _own_store(request: SweepRequest, out: Path) -> Store:
    """DIR/store, prepared once. InputError where it was made of other data than are asked for now."""
    d = Settings().with_assignments(request.assignments).data
    source = os.path.abspath(request.data) if Path(request.data).exists() else request.data
    asked = {"source": source} | {n: getattr(d, n) for n in ("resolution", "train", "holdout", "split_seed")}
    file, path = out / "data.json", out / "store"
    if is_store(str(path)):
        there = json.loads(file.read_text())
        if there != asked:
            other = next(name for name in asked if there.get(name) != asked[name])
            raise InputError(
                f"{path} was prepared with data.{other} {there.get(other)}, asked for is {asked[other]}; choose"
                " another --out"
            )
        return Store.open(str(path))
    write_json(file, asked)
    return prepare(
        open_source(request.data, resolution=d.resolution, on_bad_image=d.on_bad_image), path,
        train=d.train, holdout=d.holdout, split_seed=d.split_seed, workers=os.cpu_count() or 1,
    )  # fmt: skip


def train_request(request: SweepRequest, cell: Cell, number: int, store: Store) -> TrainRequest:
    """What ``train`` would be asked for this cell."""
    options: dict[str, dict[str, Any]] = {
        "noise": {"sigma_tn": cell.sigma_tn} | cell.options.get("noise", {}),
        "training": {"seed": cell.seed, "sample_kimg": 0.0, "ranks": 1, "device": "cuda" if request.gpus else "cpu"}
        | ({} if request.kimg is None else {"kimg": request.kimg})
        | ({} if request.audit_every is None else {"audit_kimg": request.audit_every})
        | cell.options.get("training", {}),
    }
    seed = None
    if store.manifest["noisy"] == "none":  # levels that share a seed would give the images away together
        seed = secrets.randbits(64) if request.noise_seed is None else (request.noise_seed + number) % 2**64
    return TrainRequest(
        data=str(store.path), preset=request.preset, assignments=request.assignments, options=options, noise_seed=seed
    )


def _create(request: SweepRequest, cell: Cell, number: int, store: Store, path: Path) -> None:
    """The cell's run folder, untrained; one that is there must have the settings that are asked for."""
    found = plan(train_request(request, cell, number, store))
    if not path.exists():
        create_run(found, path)
        return
    run = RunFolder.existing(path)
    run.open_store(verify=False)
    asked, there = found.settings, run.read_settings()
    if asked.noise.sigma_data is None:
        asked = replace(asked, noise=replace(asked.noise, sigma_data=there.noise.sigma_data))
    trees = asked.tree(), there.tree()
    for section, values in trees[0].items():
        for name, value in values.items():
            if f"{section}.{name}" not in _FILLED and trees[1][section][name] != value:
                raise InputError(
                    f"the cell {path} was trained with {section}.{name} {trees[1][section][name]}, asked for is"
                    f" {value}; choose another --out, or move that folder away"
                )


def _measured(request: SweepRequest, path: Path) -> bool:
    """Trained, and measured with as many samples and the same embedder as are asked for now."""
    run = RunFolder(path)
    try:
        there = json.loads((path / MEASURED).read_text())
    except (OSError, ValueError):
        return False
    whole = run.metrics.is_file() and (path / SAMPLES).is_file()
    return whole and there == marker(request.num, request.features) and bool(finished(run, run.read_settings()))


class _Job:
    """The process of one cell, in a place among the parallel ones."""

    def __init__(self, request: SweepRequest, path: Path, log: Path, place: int, threads: int) -> None:
        self.path, self.place = path, place
        features = [] if request.features is None else [request.features]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # each is a run of its own, whatever started this one
            environment.pop(name, None)
        if request.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % request.gpus)
        self.log: IO[str] = open(log, "a+", encoding="utf-8")  # noqa: SIM115
        device = "cuda" if request.gpus else "cpu"
        self.child = subprocess.Popen(
            [sys.executable, "-m", "fastambient.sweep_cell", str(path), str(request.num), device, *features],
            env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then tells the children once
        )  # fmt: skip

    def done(self) -> bool:
        """FastambientError where it failed, with the last thing that it said."""
        if self.child.poll() is None:
            return False
        if self.child.returncode:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
            raise FastambientError(f"the cell {self.path} failed with exit code {self.child.returncode}: {last}")
        return True

    def end(self) -> None:
        try:
            self.child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.log.close()


def _run_all(request: SweepRequest, todo: list[Cell], out: Path) -> None:
    """Train and measure these cells, `parallel` at once."""
    cores = os.cpu_count() or 1
    parallel = min(request.parallel or request.gpus or cores, len(todo))
    threads = max(1, cores // parallel)
    images = {c.name: round(RunFolder(out / c.name).read_settings().training.kimg * 1000) for c in todo}
    waiting, jobs, count, total = list(todo), {}, 0, len(todo)  # type: ignore[var-annotated]
    seen = {c.name: RunFolder(out / c.name).images_seen() for c in todo}
    try:
        with progress("sweep", sum(images.values()) - sum(seen.values())) as advance:
            while waiting or jobs:
                while waiting and len(jobs) < parallel:
                    cell = waiting.pop(0)
                    place = next(p for p in range(parallel) if p not in {j.place for j in jobs.values()})
                    log = out / "logs" / f"{cell.name}.log"
                    jobs[cell] = _Job(request, out / cell.name, log, place, threads)
                for cell, job in list(jobs.items()):
                    ended = job.done()
                    # A run that the rule stopped counts as whole: the time left is that of the others.
                    now = images[cell.name] if ended else min(RunFolder(job.path).images_seen(), images[cell.name])
                    advance(max(now - seen[cell.name], 0))
                    seen[cell.name] = max(now, seen[cell.name])
                    if ended:
                        jobs.pop(cell).end()
                        count += 1
                        found = result_of_cell(cell.kind, cell.sigma_tn, cell.seed, job.path, request.features)
                        say(f"{cell_line(found)} ({count} of {total} done)")
                time.sleep(_POLL_SECONDS)
    except (KeyboardInterrupt, SystemExit) as stopped:
        signum = signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else signal.SIGTERM
        _end(jobs)
        raise Interrupted(
            signum, f"stopped by {signum.name}, with checkpoints: the same command goes on, finished cells are kept"
        ) from None
    except FastambientError:
        _end(jobs)
        raise


def _end(jobs: dict[Cell, _Job]) -> None:
    """Tell all runs to stop, which writes their checkpoints, and wait for them."""
    for job in jobs.values():
        if job.child.poll() is None:
            job.child.terminate()
    for job in jobs.values():
        job.end()


def _settings_of(request: SweepRequest, store: Store) -> dict[str, Any]:
    """For sweep.json: everything that was asked for, but no seed of fixed noise."""
    return {
        "data": request.data, "resolution": store.resolution, "train": len(store.train), "holdout": len(store.holdout),
        "sigma_tn": list(request.sigma_tn), "seeds": list(request.seeds), "baselines": list(request.baselines),
        "kimg": request.kimg, "preset": request.preset, "num": request.num, "features": request.features,
        "assignments": list(request.assignments), "stop_rate": request.stop_rate, "weight_decay": request.weight_decay,
        "audit_every": request.audit_every,
    }  # fmt: skip


def _write(request: SweepRequest, planned: list[Cell], summary: dict[str, Any], out: Path) -> None:
    """sweep.json, table, curve, and the page with the first seed of every configuration."""
    from fastambient.evaluation.report import SweepReport, write_report
    from fastambient.evaluation.run import evaluate_run
    from fastambient.sweep_plot import plot_pareto, plot_training

    write_json(out / "sweep.json", summary)
    text = table(summary)
    write_bytes(out / "table.md", text.encode())
    plot_pareto(out / "pareto", summary)
    audited = plot_training(out / "training", summary)
    print(text)
    features = {} if request.features is None else {"features": request.features}
    runs = [
        evaluate_run(out / c.name, samples=out / c.name / SAMPLES, name=c.name, **features).report  # type: ignore[arg-type]
        for c in planned
        if c.seed == request.seeds[0]
    ]
    chosen = summary["chosen"]
    found = SweepReport(
        choice(summary),
        chosen["reason"],
        chosen["rule"],
        COLUMNS,
        rows_for_people(summary),
        (out / "pareto.png").read_bytes(),
        (out / "training.png").read_bytes() if audited else None,
    )
    title = f"fastambient sweep: {request.data}; pictures of seed {request.seeds[0]}"
    write_report(out / "report.html", runs, title=title, sweep=found)
