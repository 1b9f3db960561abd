"""What a sweep is asked for, and the cells that it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastambient.errors import InputError, did_you_mean
from fastambient.sweep.results import TARGET, WITHIN
from fastambient.training.config import check_sigma_tn

BASELINES = ("fresh-noise", "weight-decay", "early-stop", "ambient-stop")
WEIGHT_DECAY = 0.05  # decoupled, AdamW: what Transformers for images are usually trained with (He et al., 2022, MAE)
STOP_RATE = 0.05  # of the early-stop and ambient-stop baselines
_TWINS = {"edm": "early-stop", "early-stop": "edm", "ambient": "ambient-stop", "ambient-stop": "ambient"}
_OWN = ("noise.sigma_tn", "noise.mode", "training.seed", "training.audit_kimg", "training.stop_when_copying")


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
    features: str | None = None  # embedder of the evaluation; None: its default, below 16 pixels "pixel"
    assignments: Sequence[str] = ()  # section.name=value, for every cell
    target: float = TARGET
    within: float = WITHIN
    stop_rate: float = STOP_RATE
    weight_decay: float = WEIGHT_DECAY
    parallel: int | None = None  # cells at once; None: one a GPU, else one a CPU core
    gpus: int = 0
    audit_every: float | None = None  # kimg between audits of every run; None: of those that the rule may stop alone
    noise_seed: int | None = None  # each cell's is made of it and the cell's name; None: of the system


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

    @property
    def twin(self) -> Cell | None:
        """The same training with the stop rule, or without it."""
        kind = _TWINS.get(self.kind)
        return None if kind is None else Cell(kind, self.sigma_tn, self.seed)


def cells(request: SweepRequest) -> list[Cell]:
    """All cells, a whole seed before the next one.

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
    if not 0 <= r.weight_decay < math.inf:
        raise InputError(f"--weight-decay must be 0 or more, got {r.weight_decay:g}")
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
