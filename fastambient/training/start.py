"""From a request to a running training: settings, store and run folder first, then one or more ranks."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastambient.console import say, warn
from fastambient.data.downloads import is_url
from fastambient.data.loaders import ReadError
from fastambient.data.preparation import prepare
from fastambient.data.store import Store
from fastambient.data.streaming import ShardStream
from fastambient.errors import FastambientError, InputError
from fastambient.files import keep_out_of_git, new_folder, refuse_existing
from fastambient.processes import die_with_parent
from fastambient.training.audits import check_audits
from fastambient.training.auto_sigma import choose_sigma_tn
from fastambient.training.data import measure_sigma_data, use_noise
from fastambient.training.distributed import (
    World,
    inside_launcher,
    join_world,
    launch,
    leave_world,
    run_from_first,
)
from fastambient.training.ending import finished, how_to_extend, set_length
from fastambient.training.loop import train
from fastambient.training.request import Plan, TrainRequest, plan, say_if_digits, say_if_other_level
from fastambient.training.run import RunFolder
from fastambient.training.stopping import Interrupted, how_to_resume


def create_run(plan: Plan, out: Path, *, force: bool = False) -> Path:
    """Write the run folder in one step: store (for a SOURCE), settings, noise seed. Nothing is left after an error."""
    # A run that is replaced must not be one that somebody is training.
    there = RunFolder(out)
    replaced = there.lock() if force and there.config.is_file() else contextlib.nullcontext()
    with replaced, new_folder(out, force=force, marker="config.yaml") as folder:
        run = RunFolder(folder)
        d, n = plan.settings.data, plan.settings.noise
        if isinstance(plan.data, Store):
            store = plan.data
            run.pin_store(store, plan.clean)
            if store.hand_out:  # its own noise is nobody's
                seed = plan.clean.noise_seed if plan.clean is not None else 0
            else:
                seed = store.noise_seed if plan.noise_seed is None else plan.noise_seed
            if not store.hand_out and seed == store.noise_seed:
                use_noise(store, plan.settings)
            source = str(store.path.resolve())
            sides, sigma_data = (len(store.train), len(store.holdout)), store.sigma_data
        elif isinstance(plan.data, ShardStream):
            run.pin_stream(plan.data)
            seed = secrets.randbits(64) if plan.noise_seed is None else plan.noise_seed
            source, sides = d.source if is_url(d.source) else os.path.abspath(d.source), (plan.data.length, 0)
            sigma_data = n.sigma_data or measure_sigma_data(plan.data)
        else:
            store = prepare(
                plan.data, run.store, sigma_tn=n.sigma_tn, noise_seed=plan.noise_seed, train=d.train, holdout=d.holdout,
                split_seed=d.split_seed, noisy=d.noisy,
            )  # fmt: skip
            check_audits(plan.settings, store)
            run.pin_store(store)
            seed = store.noise_seed
            use_noise(store, plan.settings)
            source = d.source if not Path(d.source).exists() else str(Path(d.source).resolve())
            sides, sigma_data = (len(store.train), len(store.holdout)), store.sigma_data
        filled: dict[str, dict[str, Any]] = {
            "data": {
                "source": source,
                "train": sides[0],
                "holdout": sides[1],
                "cache": None if d.cache is None else os.path.abspath(d.cache),
                "shard_index": d.shard_index
                if d.shard_index is None or is_url(d.shard_index)
                else os.path.abspath(d.shard_index),
                "clean": None if plan.clean is None else str(plan.clean.path.resolve()),
            },
            "noise": {"sigma_data": sigma_data if n.sigma_data is None else n.sigma_data},
        }
        run.write_settings(plan.settings.with_values(filled, where="data"))
        run.write_noise_seed(seed)
        keep_out_of_git(folder)
    return out


def start(path: Path, *, resume: bool = False, ranks: int | None = None, device: str | None = None) -> None:
    """Train the run at `path` on as many ranks as its settings (or the arguments) say; returns when it is finished.

    Raises
    ------
    Interrupted : stopped by a signal, after a checkpoint
    SystemExit : a rank failed and has said why
    """
    run = RunFolder.existing(path)
    with _says_how_to_resume(path), run.lock():
        settings = run.read_settings()
        t = settings.training
        ranks, device = ranks or t.ranks, device or t.device
        if t.batch % ranks:
            raise InputError(f"a batch of {t.batch} does not divide among {ranks} ranks; use a divisor of {t.batch}")
        if resume and (how := finished(run, settings)):
            say(f"{path} is finished: {how}, weights in {run.weights}{how_to_extend(path, settings)}")
            return
        if ranks == 1:
            train(path, World(device=torch.device(device)), resume=resume)
            return
        code = launch(_rank, (str(path), device, resume), ranks=ranks)
    if code >= 128:
        raise Interrupted(code - 128, how_to_resume(path))
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def _says_how_to_resume(path: Path) -> Iterator[None]:
    """A signal before the loop listens, while the store is checked or the network is built, ends as one in the loop."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        signum = signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else signal.SIGTERM
        if isinstance(stopped, SystemExit) and stopped.code != 128 + signum:
            raise
        raise Interrupted(signum, f"stopped by {signum.name}; {how_to_resume(path)}") from None


def _rank(path: str, device: str, resume: bool) -> int:
    """One rank of `start`; its exit code. Rank 0 speaks for all."""
    die_with_parent()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    world = join_world(device)
    try:
        train(Path(path), world, resume=resume)
        leave_world()
        return 0
    except Interrupted as stopped:
        if world.first:
            say(str(stopped).split(";")[0])  # the launching process says how to resume, whatever became of this one
        leave_world()
        os._exit(stopped.exit_code)  # a plain return would wait for a launcher that is already shutting down
    except FastambientError as error:
        if world.first or isinstance(error, ReadError):  # a reader fails on one rank, all else on every one
            print(f"error: {error}", file=sys.stderr, flush=True)
        # The other ranks wait in a collective that will never come: leave at once, and the launcher ends them.
        os._exit(error.exit_code)


def new(request: TrainRequest, out: Path | None, *, force: bool = False) -> None:
    """Create a run and train it; under torchrun, on the ranks that are there."""
    out = out or RunFolder.new_name()
    if not inside_launcher():
        refuse_existing(out, force=force, marker="config.yaml")  # before the data is opened
        choice = None
        if request.auto_sigma_tn:
            choice = choose_sigma_tn(request, out)
            options = {k: dict(v) for k, v in (request.options or {}).items()}
            options.setdefault("noise", {})["sigma_tn"] = choice.sigma_tn
            request = replace(request, options=options, auto_sigma_tn=False)
        planned = plan(request, verify=choice is None)
        say_if_other_level(planned)
        e, t = planned.settings.evaluation, planned.settings.training
        if e.audit_features != "pixel" and not t.audit_kimg:
            warn("--audit-features without audits has no effect; add --audit-every KIMG")
        create_run(planned, out, force=force)
        if choice is not None:
            choice.write(out)
        say_if_digits(request)
        start(out)
        return
    if request.auto_sigma_tn:
        raise InputError("--sigma-tn auto trains a pilot run first, which a launcher's ranks do not; name a --sigma-tn")
    # The launcher's ranks are the run's: a batch must divide among them before a folder is made.
    options = {k: dict(v) for k, v in (request.options or {}).items()}
    options.setdefault("training", {})["ranks"] = int(os.environ["WORLD_SIZE"])
    request = replace(request, options=options)
    _under_torchrun(lambda: create_run(plan(request), out, force=force), resume=False)


def resume(path: Path, *, ranks: int | None = None, device: str | None = None, kimg: float | None = None) -> None:
    """Continue a run, on its own ranks or on others: the numbers do not depend on them.

    kimg : its new length, see `set_length`
    """

    def found() -> Path:
        run = RunFolder.existing(path)
        if kimg is not None:
            with run.lock():
                set_length(run, kimg)
            if run.metrics.is_file():
                say(f"{run.metrics} and what lies beside it are of the shorter run until it is evaluated again")
        return run.path

    if inside_launcher():
        _under_torchrun(found, resume=True)
    else:
        start(found(), resume=True, ranks=ranks, device=device)


def _under_torchrun(prepare_run: Callable[[], Path], *, resume: bool) -> None:
    world = join_world("cuda" if torch.cuda.is_available() else "cpu")
    path = run_from_first(world, prepare_run)
    run = RunFolder.existing(path)
    with run.lock() if world.first else contextlib.nullcontext():
        if resume and (how := finished(run, run.read_settings())):
            if world.first:
                settings = run.read_settings()
                say(f"{path} is finished: {how}, weights in {run.weights}{how_to_extend(path, settings)}")
        else:
            train(path, world, resume=resume)
    leave_world()
