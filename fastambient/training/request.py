"""What ``fastambient train`` was asked for, and the settings and data that follow from it; nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastambient import models
from fastambient.console import say
from fastambient.data.dali import need_dali
from fastambient.data.loaders import choose
from fastambient.data.sources import Source, open_source
from fastambient.data.store import Store, is_store
from fastambient.diffusion.ambient import share_message
from fastambient.errors import InputError, check_seed
from fastambient.training.audits import check_audit_embedder, check_audits
from fastambient.training.config import (
    EvaluationSettings,
    Settings,
    check,
    check_sigma_tn,
    network_config,
    read_yaml,
    resolve,
)
from fastambient.training.data import check_hand_out, open_clean, open_stream, store_set
from fastambient.training.estimate import estimate_run, fit_micro_batch
from fastambient.training.optimizer import need_apex


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


def _files(e: EvaluationSettings) -> dict[str, str]:
    """Embedders and weights that are files, to be found from any folder that the run is resumed or evaluated in."""
    from fastambient.evaluation.embedders import NAMES

    values = {name: getattr(e, name) for name in ("features", "audit_features", "weights")}
    return {k: os.path.abspath(v) for k, v in values.items() if v and v not in NAMES and Path(v).is_file()}


def say_if_digits(request: TrainRequest) -> None:
    """Nobody who has forgotten --data should wait for a model of digits."""
    named = request.config is not None or any(text.strip().startswith("data.source") for text in request.assignments)
    if request.data is None and not named:
        say("no --data: training on the built-in 8x8 digits")


def say_if_other_level(planned: Plan) -> None:
    store, asked = planned.data, planned.settings.noise.sigma_tn
    if isinstance(store, Store) and store.sigma_tn is not None and asked != store.sigma_tn:
        say(f"sigma_tn {asked:g} as asked for; {store.path} was prepared with {store.sigma_tn:g}")


def describe(request: TrainRequest) -> str:
    """The settings of a run with its parameter count, memory and time: ``--dry-run``."""
    if request.auto_sigma_tn:
        raise InputError("--dry-run trains nothing, and --sigma-tn auto needs a pilot run; name a --sigma-tn")
    planned = plan(request)
    say_if_digits(request)
    say_if_other_level(planned)
    s = planned.settings
    estimate = estimate_run(s, channels=planned.data.channels, num_classes=planned.data.num_classes)
    tree = yaml.safe_dump(s.tree(), sort_keys=False, default_flow_style=None).rstrip()
    message, warning = share_message(
        s.noise.sigma_tn or 0.0, resolution=planned.data.resolution, P_mean=s.noise.P_mean, P_std=s.noise.P_std,
        weighting=s.noise.weighting, regime=s.noise.regime,
    )  # fmt: skip
    loader = "loader {}: {}".format(*_loader(s, planned.data, planned.clean))
    return "\n".join(filter(None, (tree, "", message, loader, warning and f"warning: {warning}", estimate.text)))
