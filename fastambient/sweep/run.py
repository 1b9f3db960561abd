"""A sweep from its request to its report: data and run folders first, then the cells, then what came of them."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastambient.console import duration, say
from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.data.store import Store, is_store
from fastambient.errors import FastambientError, InputError
from fastambient.files import refuse_existing, write_bytes, write_json
from fastambient.sweep.jobs import run_all
from fastambient.sweep.request import Cell, SweepRequest, cells
from fastambient.sweep.results import (
    MEASURED,
    SAMPLES,
    choice,
    columns,
    marker,
    result_of_cell,
    rows_for_people,
    summarize,
    table,
)
from fastambient.training.config import Settings
from fastambient.training.ending import finished
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run

_FILLED = (  # by create_run from the data, or of no influence on a run's numbers
    "data.source", "data.train", "data.holdout", "data.cache", "data.shard_index", "data.clean", "data.loader",
    "data.workers", "training.device", "training.ranks",
)  # fmt: skip
_PHOTOGRAPHS = 16  # pixels; of smaller pictures a network for photographs, at 30 ms each, sees no more than pixels


def sweep(request: SweepRequest, out: Path) -> dict[str, Any]:
    """Train and measure every cell that is not finished, then write what came of all of them; returns sweep.json.

    Raises
    ------
    InputError : a bad request, or a cell in `out` that was trained with other settings than are asked for now
    Interrupted : Ctrl-C or SIGTERM, after the runs' checkpoints; the same call goes on
    FastambientError : cells failed; what came of the others has been written
    """
    from fastambient.evaluation.run import embedder_settings, open_embedder

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
        request = replace(request, features=features_of(request, store.resolution))
        for cell in planned:
            _create(request, cell, store, out / cell.name)
        evaluation = Settings().with_assignments(request.assignments).evaluation
        open_embedder(*embedder_settings(evaluation, request.features, None, None))  # now, not after the first cell
        todo = [cell for cell in planned if not _measured(request, out / cell.name)]
        say(f"{out}: {len(planned)} cells, {len(planned) - len(todo)} of them finished; data {store.path}")
        asked = {cell.name for cell in planned}
        others = sorted(p.parent.name for p in out.glob("*/config.yaml") if p.parent.name not in asked)
        if others:
            say(f"not asked for now, and so not among the results: {', '.join(others)}")
        failed = run_all(request, todo, out) if todo else {}
        there = [c for c in planned if c not in failed]
        trouble = "\n".join(failed.values())
        if not there:
            raise FastambientError(f"every cell failed:\n{trouble}")
        results = [result_of_cell(c.kind, c.sigma_tn, c.seed, out / c.name, request.features) for c in there]
        summary = summarize(results, target=request.target, within=request.within)
        summary["settings"] = _settings_of(request, store)
        summary["failed"] = [c.name for c in failed]
        _write(request, there, summary, out)
        say(f"done in {duration(time.monotonic() - began)}")
        print(
            f"written: {', '.join(str(out / name) for name in ('report.html', 'pareto.png', 'table.md', 'sweep.json'))}"
        )
        if failed:
            raise FastambientError(
                f"{len(failed)} of {len(planned)} cells failed and are not among the results; the same command tries"
                f" them again:\n{trouble}"
            )
        return summary
    finally:
        lock.release()
        if {path.name for path in out.iterdir()} <= {".lock", "logs"}:  # refused: nothing is left behind
            (out / ".lock").unlink(missing_ok=True)
            for path in (out / "logs", out):
                with suppress(OSError):
                    path.rmdir()


def features_of(request: SweepRequest, resolution: int) -> str:
    """The embedder that is asked for, or that suits pictures of this size."""
    if request.features is not None:
        return request.features
    if resolution < _PHOTOGRAPHS:
        return "pixel"
    return Settings().with_assignments(request.assignments).evaluation.features


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
    opened = open_source(request.data, resolution=d.resolution, on_bad_image=d.on_bad_image)
    write_json(file, asked)
    return prepare(
        opened, path,
        train=d.train, holdout=d.holdout, split_seed=d.split_seed, workers=os.cpu_count() or 1,
    )  # fmt: skip


def train_request(request: SweepRequest, cell: Cell, store: Store, out: Path) -> TrainRequest:
    """What ``train`` would be asked for this cell of the sweep in `out`."""
    options: dict[str, dict[str, Any]] = {
        "noise": {"sigma_tn": cell.sigma_tn} | cell.options.get("noise", {}),
        "training": {"seed": cell.seed, "sample_kimg": 0.0, "ranks": 1, "device": "cuda" if request.gpus else "cpu"}
        | ({} if request.kimg is None else {"kimg": request.kimg})
        | ({} if request.audit_every is None else {"audit_kimg": request.audit_every})
        | cell.options.get("training", {}),
    }
    seed = _noise_seed(request, cell, out) if store.manifest["noisy"] == "none" else None
    return TrainRequest(
        data=str(store.path), preset=request.preset, assignments=request.assignments, options=options, noise_seed=seed
    )


def _noise_seed(request: SweepRequest, cell: Cell, out: Path) -> int:
    """That of the cell's twin, which is the same training, or one of its own: levels that share a seed would give the
    images away together. By the cell's name, so that cells which are added later share none, either."""
    if cell.twin is not None and (twin := RunFolder(out / cell.twin.name)).config.is_file():
        return twin.read_noise_seed()
    if request.noise_seed is None:
        return secrets.randbits(64)
    return int.from_bytes(hashlib.sha256(f"{request.noise_seed} {cell.name}".encode()).digest()[:8], "big")


def _create(request: SweepRequest, cell: Cell, store: Store, path: Path) -> None:
    """The cell's run folder, untrained; one that is there must have the data and settings that are asked for."""
    found = plan(train_request(request, cell, store, path.parent))
    if not path.exists():
        create_run(found, path)
        return
    run = RunFolder.existing(path)
    run.open_store(verify=False)
    if not run.trained_on(store):
        raise InputError(
            f"the cell {path} was trained on another store than {store.path}; choose another --out, or move that"
            " folder away"
        )
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
    same = "metrics" in there and there == marker(request.num, str(request.features)) | {"metrics": there["metrics"]}
    return same and (path / SAMPLES).is_file() and bool(finished(run, run.read_settings()))


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
    from fastambient.sweep.plot import plot_pareto, plot_training

    write_json(out / "sweep.json", summary)
    text = table(summary)
    write_bytes(out / "table.md", text.encode())
    plot_pareto(out / "pareto", summary)
    audited = plot_training(out / "training", summary)
    print(text)
    seed = planned[0].seed  # the first one that has a cell
    runs = [
        evaluate_run(out / c.name, samples=out / c.name / SAMPLES, name=c.name, features=request.features).report
        for c in planned
        if c.seed == seed
    ]
    chosen = summary["chosen"]
    found = SweepReport(
        choice(summary),
        chosen["reason"],
        chosen["rule"],
        columns(summary),
        rows_for_people(summary),
        (out / "pareto.png").read_bytes(),
        (out / "training.png").read_bytes() if audited else None,
    )
    title = f"fastambient sweep: {request.data}; pictures of seed {seed}"
    write_report(out / "report.html", runs, title=title, sweep=found)
