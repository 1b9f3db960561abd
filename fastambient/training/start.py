"""From a request to a running training: settings, store and run folder first, then one or more ranks."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fastambient import models
from fastambient.console import say, warn
from fastambient.data.dali import need_dali
from fastambient.data.downloads import is_url
from fastambient.data.loaders import ReadError, choose
from fastambient.data.preparation import prepare
from fastambient.data.sources import Source, open_source
from fastambient.data.store import Store, is_store
from fastambient.data.streaming import ShardStream
from fastambient.diffusion.ambient import share_message
from fastambient.errors import FastambientError, InputError, check_seed
from fastambient.files import keep_out_of_git, new_folder, refuse_existing
from fastambient.processes import die_with_parent
from fastambient.training.audits import check_audit_embedder, check_audits
from fastambient.training.auto_sigma import choose_sigma_tn
from fastambient.training.config import (
    EvaluationSettings,
    Settings,
    check,
    check_sigma_tn,
    network_config,
    read_yaml,
    resolve,
)
from fastambient.training.data import check_hand_out, measure_sigma_data, open_clean, open_stream, store_set, use_noise
from fastambient.training.distributed import (
    World,
    inside_launcher,
    join_world,
    launch,
    leave_world,
    run_from_first,
)
from fastambient.training.ending import finished, how_to_extend, set_length
from fastambient.training.estimate import estimate_run, fit_micro_batch
from fastambient.training.loop import train
from fastambient.training.optimizer import need_apex
from fastambient.training.run import RunFolder
from fastambient.training.stopping import Interrupted, how_to_resume


@dataclass(frozen=True)
class TrainRequest:
    """What ``fastambient train`` was asked for; None is "not said"."""

    data: str | None = None
    preset: str | None = None
    config: Path | None = None
    assignments: Sequence[str] = ()
    options: Mapping[str, Mapping[str, Any]] | None = None  # settings tree of explicit options
    noise_seed: int | None = None
    fit: bool = False  # find the largest micro-batch that fits: ``--batch auto``
    auto_sigma_tn: bool = False  # choose it from a pilot run: ``--sigma-tn auto``


@dataclass(frozen=True)
class Plan:
    """Settings and data of a run that is not there yet."""

    settings: Settings
    data: Source | Store
    noise_seed: int | None
    clean: Store | None = None  # beside a hand-out


def plan(request: TrainRequest, *, verify: bool = True) -> Plan:
    """Open the data and settle every setting; nothing is written.

    verify : check every file of a store; False where it was done just now

    Raises
    ------
    InputError : anything wrong with the request
    """
    if request.noise_seed is not None:
        check_seed("--noise-seed", request.noise_seed, secret=True)
    options = {k: dict(v) for k, v in (request.options or {}).items()}
    tree = read_yaml(request.config) if request.config else {}
    if request.data is not None:
        options.setdefault("data", {})["source"] = request.data
    layers = [(str(request.config), tree), ("command line", options)]

    # What to open may itself be set anywhere; the preset, which follows the resolution, does not matter for it.
    early = Settings()
    for where, layer in layers:
        early = early.with_values(layer, where=where)
    early = early.with_assignments(request.assignments)
    if early.noise.sigma_tn is not None:
        check_sigma_tn(early.noise.sigma_tn, early.sampling.sigma_max)
    d = early.data
    data: Source | Store
    clean: Store | None = None
    if d.stream:
        _check_stream(early)
        data = open_stream(early)
    elif is_store(d.source):
        data = Store.open(d.source, verify=verify)
        wanted = {"resolution": data.resolution, "train": len(data.train), "holdout": len(data.holdout)}
        for name, there in wanted.items():
            asked = getattr(d, name)
            if asked is not None and asked != there:
                raise InputError(f"data.{name} {asked}: the store {d.source} holds {there}; prepare another store")
    else:
        data = open_source(d.source, resolution=d.resolution, on_bad_image=d.on_bad_image)

    settings = resolve(
        resolution=data.resolution, preset=request.preset, layers=layers, assignments=request.assignments
    )
    if isinstance(data, Store):
        settings = _agree_with_store(settings, data, asked_sigma_tn=early.noise.sigma_tn, noise_seed=request.noise_seed)
        check(settings)
        check_hand_out(settings, data)
        clean = open_clean(settings, verify=verify)
        store_set(settings, data, clean, noise_seed=0)
    elif d.clean is not None or settings.noise.regime == "ambient":
        raise InputError("--clean and --regime ambient are for a store that was handed out (prepare --hand-out)")
    check_audits(settings, data)
    settings = settings.with_values({"evaluation": _files(settings.evaluation)}, where="evaluation")
    if settings.evaluation.audit_features != "pixel":
        check_audit_embedder(settings)  # absent weights are found before anything is prepared or a pilot trains
    if settings.data.use_labels and not data.num_classes:
        raise InputError(f"data.use_labels: {settings.data.source} has no class labels")
    t = settings.training
    if t.batch % t.ranks:
        raise InputError(f"--batch {t.batch} does not divide among {t.ranks} ranks; use a multiple of {t.ranks}")
    if t.batch_gpu and (t.batch // t.ranks) % t.batch_gpu:
        raise InputError(
            f"training.batch_gpu {t.batch_gpu} does not divide a rank's share of {t.batch // t.ranks} images"
        )
    if t.optimizer == "apex":
        need_apex(torch.device(t.device))
    if settings.data.loader == "dali":
        need_dali(torch.device(t.device))
    with torch.device("meta"):  # a network that cannot be built is found before anything is written
        models.build(network_config(settings, channels=data.channels, num_classes=data.num_classes))
    if request.fit:
        if t.batch_gpu:
            raise InputError(f"--batch auto finds training.batch_gpu, which is set to {t.batch_gpu}; leave one out")
        held = _data_bytes(settings, data, clean) if _loader(settings, data, clean)[0] == "resident" else 0
        micro, found = fit_micro_batch(
            settings, channels=data.channels, num_classes=data.num_classes, data_bytes=held or 0
        )
        say(found)
        settings = settings.with_values({"training": {"batch_gpu": micro}}, where="--batch auto")
    return Plan(settings, data, request.noise_seed, clean)


def _check_stream(settings: Settings) -> None:
    """InputError for what a stream cannot give."""
    d = settings.data
    if is_store(d.source):
        raise InputError(f"--stream reads tar shards; {d.source} is a store: leave --stream out")
    for name, value in (("train", d.train), ("holdout", d.holdout)):
        if value is not None:
            raise InputError(f"data.{name} {value}: a stream is not split; hold shards back by the pattern instead")
    if d.noisy != "none":
        raise InputError(
            f"data.noisy {d.noisy}: a stream stores nothing, its noise is made anew each time; leave it out"
        )
    if d.loader == "resident":
        raise InputError("--loader resident: a stream cannot be held in memory; use dali or workers")


def _loader(settings: Settings, data: Source | Store, clean: Store | None) -> tuple[str, str]:
    """The loader that a run here would take, and why."""
    t = settings.training
    return choose(settings.data.loader, _data_bytes(settings, data, clean), torch.device(t.device), ranks=t.ranks)


def _data_bytes(settings: Settings, data: Source | Store, clean: Store | None) -> int | None:
    """Of the training set in a rank's memory, at most, where a source is not split yet; None where it is streamed."""
    if settings.data.stream:
        return None
    if isinstance(data, Store):
        return store_set(settings, data, clean, noise_seed=0).rows.nbytes  # type: ignore[attr-defined]
    images = settings.data.train or data.default_train or data.length
    noisy = {"none": 0, "float16": 2, "float32": 4}[settings.data.noisy if settings.noise.mode == "fixed" else "none"]
    return images * data.channels * data.resolution**2 * (1 + noisy)


def _agree_with_store(
    settings: Settings, store: Store, *, asked_sigma_tn: float | None, noise_seed: int | None
) -> Settings:
    """The command line wins, except over noise that is already in the pictures."""
    if store.manifest["noisy"] == "none":
        if asked_sigma_tn is None and store.sigma_tn is not None:
            settings = settings.with_values({"noise": {"sigma_tn": store.sigma_tn}}, where=str(store.path))
        if settings.data.noisy != "none":
            raise InputError(f"data.noisy {settings.data.noisy}: the store {store.path} holds no noised copy")
        return settings
    if asked_sigma_tn is not None and asked_sigma_tn != store.sigma_tn:
        raise InputError(
            f"--sigma-tn {asked_sigma_tn:g}: the noised copy in {store.path} was made at sigma_tn {store.sigma_tn:g};"
            " prepare another store, or leave the option out"
        )
    if noise_seed is not None and store.hand_out:
        raise InputError(f"--noise-seed: {store.path} was handed out, its noise has no seed; leave the option out")
    if noise_seed is not None and noise_seed != store.noise_seed:
        raise InputError(
            f"--noise-seed: the noised copy in {store.path} was made with another seed; leave the option out"
        )
    return settings.with_values(
        {"noise": {"sigma_tn": store.sigma_tn}, "data": {"noisy": store.manifest["noisy"]}}, where=str(store.path)
    )


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


def _files(e: EvaluationSettings) -> dict[str, str]:
    """Embedders and weights that are files, to be found from any folder that the run is resumed or evaluated in."""
    from fastambient.evaluation.embedders import NAMES

    values = {name: getattr(e, name) for name in ("features", "audit_features", "weights")}
    return {k: os.path.abspath(v) for k, v in values.items() if v and v not in NAMES and Path(v).is_file()}


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
        _say_if_other_level(planned)
        e, t = planned.settings.evaluation, planned.settings.training
        if e.audit_features != "pixel" and not t.audit_kimg:
            warn("--audit-features without audits has no effect; add --audit-every KIMG")
        create_run(planned, out, force=force)
        if choice is not None:
            choice.write(out)
        _say_if_digits(request)
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


def _say_if_digits(request: TrainRequest) -> None:
    """Nobody who has forgotten --data should wait for a model of digits."""
    named = request.config is not None or any(text.strip().startswith("data.source") for text in request.assignments)
    if request.data is None and not named:
        say("no --data: training on the built-in 8x8 digits")


def _say_if_other_level(planned: Plan) -> None:
    store, asked = planned.data, planned.settings.noise.sigma_tn
    if isinstance(store, Store) and store.sigma_tn is not None and asked != store.sigma_tn:
        say(f"sigma_tn {asked:g} as asked for; {store.path} was prepared with {store.sigma_tn:g}")


def describe(request: TrainRequest) -> str:
    """The settings of a run with its parameter count, memory and time: ``--dry-run``."""
    if request.auto_sigma_tn:
        raise InputError("--dry-run trains nothing, and --sigma-tn auto needs a pilot run; name a --sigma-tn")
    planned = plan(request)
    _say_if_digits(request)
    _say_if_other_level(planned)
    s = planned.settings
    estimate = estimate_run(s, channels=planned.data.channels, num_classes=planned.data.num_classes)
    tree = yaml.safe_dump(s.tree(), sort_keys=False, default_flow_style=None).rstrip()
    message, warning = share_message(
        s.noise.sigma_tn or 0.0, resolution=planned.data.resolution, P_mean=s.noise.P_mean, P_std=s.noise.P_std,
        weighting=s.noise.weighting, regime=s.noise.regime,
    )  # fmt: skip
    loader = "loader {}: {}".format(*_loader(s, planned.data, planned.clean))
    return "\n".join(filter(None, (tree, "", message, loader, warning and f"warning: {warning}", estimate.text)))
