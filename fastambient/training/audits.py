"""Audits of a run while it trains: copying and quality of the EMA weights against images seen, and a rule that stops.

audits.jsonl, a row an audit: nimg, kimg, samples (drawn, seeds 0..n-1), copies, rate and ci95 (gap ratio below the
threshold, among all training images), train_rate (the same among as many training images as the control searches),
holdout_rate (the control: held-out images), fd (Frechet distance to `references` held-out images, in the features of
`embedder`, of `dimensions`; evaluation.audit_features, pixels by default), seconds.

An audit draws from Philox at its sample seeds and from generators of its own, and loads the EMA weights into a copy of
the network: training's numbers are the same with and without it. Every rank draws its share of the samples; rank 0
measures them while the others wait in a collective: in seconds, or as long as a network that is asked for takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastambient.console import duration, progress, say, warn
from fastambient.data.items import Source
from fastambient.data.store import Store
from fastambient.data.streaming import ShardStream
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import FastambientError, InputError
from fastambient.files import write_bytes
from fastambient.sampling import SamplingSettings, sample
from fastambient.training.config import Settings
from fastambient.training.distributed import World
from fastambient.training.run import RunFolder

if TYPE_CHECKING:
    from fastambient.evaluation.embedders import Embedder

_MOST_NUMBERS = 2**25  # of held-out pixels in float64 (256 MiB); a Frechet distance takes a few times as much
_MOST_EMBEDDED = 10_000  # held-out images that a network sees: minutes on a CPU, once
_LOADED: set[tuple[str | None, ...]] = set()  # settings of embedders that this process could load
_SNAPSHOTS = 2  # weights of the last audits at or below the rate that are kept


def check_audits(settings: Settings, data: Source | Store | ShardStream | None) -> None:
    """InputError where audits are asked for and `data` has nothing to audit with. None: a stream.

    A SOURCE is asked again as the store that it becomes.
    """
    if settings.training.audit_kimg:
        stops = settings.training.stop_when_copying is not None
        option = "--stop-when-copying" if stops else "--audit-every"
        need_holdout(option, settings, data, why="copying cannot be told from chance")


def need_holdout(what: str, settings: Settings, data: Source | Store | ShardStream | None, *, why: str) -> None:
    """InputError, in the name of the option `what`, where `data` has no two clean held-out images; `why`: what there is
    not without them."""
    if settings.data.stream or isinstance(data, ShardStream) or data is None:
        raise InputError(f"{what}: a stream holds no image back to compare with; leave --stream or {what} out")
    if isinstance(data, Store):
        if data.hand_out or data.train.images is None or data.holdout.images is None:
            raise InputError(
                f"{what}: {data.path} was handed out, it holds no clean image to compare with; leave {what} out"
            )
        held = len(data.holdout)
    else:
        held = 2 if settings.data.holdout is None else settings.data.holdout
    if held < 2:
        raise InputError(
            f"{what} with {held or 'no'} held-out images, expected at least 2: without them {why}; hold more back"
            " (data.holdout, prepare --holdout)"
        )


def check_audit_embedder(settings: Settings) -> None:
    """InputError where `audit_embedder` would raise one. A sweep's cells share theirs, which is loaded once."""
    e = settings.evaluation
    if (key := (e.audit_features, e.features, e.weights, e.preprocess)) not in _LOADED:
        audit_embedder(settings)
        _LOADED.add(key)


def audit_embedder(settings: Settings, *, device: str = "cpu") -> Embedder:
    """That of the audits' Frechet distance; the run's own weights and preprocessing where it is the evaluation's, too.

    InputError as of `load_embedder`.
    """
    from fastambient.evaluation.run import embedder_settings, open_embedder

    e = settings.evaluation
    found = open_embedder(*embedder_settings(e, e.audit_features, None, None), device=device)
    assert found is not None  # by the settings' check
    return found


@dataclass(frozen=True)
class AuditSets:
    """What samples are measured against: chosen once, so that all audits of a run, and its evaluation, agree.

    train : uint8 [N, C, H, W], all training images
    train_some : as many distinct ones as `control` has; `train` itself where those are all
    control : uint8 [K, C, H, W], distinct held-out images, at most as many as distinct training images
    reference : float32 [M, D], features of the held-out images of the Frechet distance
    embedder : of these features
    """

    train: np.ndarray
    train_some: np.ndarray
    control: np.ndarray
    reference: np.ndarray
    embedder: Embedder

    @classmethod
    def of(
        cls, train: np.ndarray, holdout: np.ndarray, *, flips: bool, seed: int, embedder: Embedder | None = None
    ) -> AuditSets:
        """The same choice by `seed` as an evaluation's. `embedder`: None is pixels.

        Raises
        ------
        InputError : fewer than two distinct images on a side, or a held-out image that trains
        """
        from fastambient.evaluation.embedders import load_embedder
        from fastambient.evaluation.features import default_cache, features
        from fastambient.evaluation.metrics import check_sets, equal_counts

        embedder = embedder or load_embedder("pixel")
        control, some = equal_counts(*check_sets(train, holdout, flips=flips), seed=seed)
        pixel = embedder.name == "pixel"
        reference, most = holdout, max(2, _MOST_NUMBERS // holdout[0].size) if pixel else _MOST_EMBEDDED
        if most < len(holdout):
            reference = holdout[np.sort(np.random.default_rng(seed).choice(len(holdout), most, replace=False))]
        with progress(f"features of held-out images ({embedder.label})", len(reference)) as advance:
            found = features(
                reference, embedder, cache=None if pixel else default_cache(), on_batch=None if pixel else advance
            )  # kept for runs to come, and resumed ones
        return cls(train, train if some is None else train[some], holdout[control], found, embedder)


def measure(
    samples: np.ndarray,
    sets: AuditSets,
    *,
    threshold: float,
    bootstrap: int,
    seed: int,
    flips: bool,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """A row of audits.jsonl without nimg, kimg and seconds. `samples` uint8 [N, C, H, W], N >= 2; `on_batch` is called
    with the number of samples that the embedder has seen since the call before."""
    from fastambient.evaluation.features import features
    from fastambient.evaluation.memorization import bootstrap_interval
    from fastambient.evaluation.nearest_pictures import nearest_pictures
    from fastambient.evaluation.quality import distance_of_features

    copies, some, control = (
        None if images is None else nearest_pictures(samples, images, flips=flips).copies(threshold)
        for images in (sets.train, None if sets.train_some is sets.train else sets.train_some, sets.control)
    )
    assert copies is not None and control is not None
    return {
        "samples": len(samples),
        "references": len(sets.reference),
        "embedder": sets.embedder.name,
        "dimensions": sets.reference.shape[1],
        "copies": int(copies.sum()),
        "rate": float(copies.mean()),
        "ci95": list(bootstrap_interval(copies, resamples=bootstrap, seed=seed)),
        "train_rate": float((copies if some is None else some).mean()),
        "holdout_rate": float(control.mean()),
        "fd": distance_of_features(
            features(samples, sets.embedder, on_batch=on_batch), sets.reference, device=sets.embedder.device
        ),
    }


def excess(row: dict[str, Any]) -> float:
    """The held-out-controlled copy rate of a row: what is left of it when chance is taken off.

    Where fewer images are held out than train, the copies of all training images count: d1/d2 has no scale, so that
    chance hardly depends on how many images are searched, while a part of them has only its part of the copies.
    """
    return float(row["rate"] - row["holdout_rate"])


def last_allowed(rows: Sequence[dict[str, Any]], rate: float) -> dict[str, Any] | None:
    """The last audit whose controlled rate is at most `rate`, or None."""
    return next((row for row in reversed(rows) if excess(row) <= rate), None)


class _Interrupted(Exception):
    pass


def _interrupt_where(stopping: Callable[[], bool]) -> Callable[[int], None]:
    """To be called after each batch."""

    def after_batch(count: int) -> None:
        if stopping():
            raise _Interrupted

    return after_batch


@dataclass(frozen=True)
class Audited:
    """What came of an audit, on every rank.

    interrupted : a signal came before the samples were drawn and measured; the audit is owed
    copying : the rule says that the run ends here
    row : of audits.jsonl, on rank 0; None where the audit was interrupted or the model has diverged
    """

    interrupted: bool = False
    copying: bool = False
    row: dict[str, Any] | None = None


class Auditor:
    """Draws, measures, and keeps the weights that the stop rule may go back to."""

    def __init__(self, run: RunFolder, settings: Settings, store: Store, world: World) -> None:
        check_audits(settings, store)
        self.run, self.settings, self.world = run, settings, world
        e = settings.evaluation
        self.flips = e.flips or settings.data.xflip
        self.sets: AuditSets | None = None
        if world.first:
            assert store.train.images is not None and store.holdout.images is not None
            self.sets = AuditSets.of(
                store.train.images[:], store.holdout.images[:], flips=self.flips, seed=e.seed,
                embedder=audit_embedder(settings, device=str(world.device)),
            )  # fmt: skip

    def message(self) -> str:
        """For the start of a run."""
        from fastambient.evaluation.metrics import few_held_out

        t, s = self.settings.training, self.sets
        assert s is not None
        text = f"audits every {t.audit_kimg:g} kimg: {self.settings.evaluation.audit_num} samples against"
        text += f" {len(s.train):,} training images and {len(s.control):,} held-out ones; FD to {len(s.reference):,}"
        if s.embedder.name != "pixel":
            text += f" in features of {s.embedder.label}"
        if t.stop_when_copying is not None:
            text += f"; stops when copying exceeds the control by more than {t.stop_when_copying:.3g}"
        return f"{text}. {few_held_out(len(s.control), len(s.train))}".removesuffix(". ")

    def __call__(
        self, denoiser: EDMDenoiser, shape: tuple[int, int, int], nimg: int, *, stopping: Callable[[], bool]
    ) -> Audited:
        """Audit the weights of `denoiser`; every rank calls. `stopping` is asked between batches of samples, drawn or
        embedded."""
        began = time.perf_counter()
        samples, failed, interrupted = self._draw(denoiser, shape, stopping)
        if interrupted:
            return Audited(interrupted=True)
        if failed:
            if self.world.first:
                warn(f"no audit at {nimg / 1000:g} kimg: the samples are not finite, the model has diverged")
            return Audited()
        row: dict[str, Any] | None = None
        flags = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # copying, interrupted
        if self.sets is not None:
            e, rate = self.settings.evaluation, self.settings.training.stop_when_copying
            try:
                row = {"nimg": nimg, "kimg": nimg / 1000} | measure(
                    samples, self.sets, threshold=e.threshold, bootstrap=e.bootstrap, seed=e.seed, flips=self.flips,
                    on_batch=_interrupt_where(stopping),
                )  # fmt: skip
                row["seconds"] = round(time.perf_counter() - began, 3)
                flags[0] = float(rate is not None and excess(row) > rate)
            except _Interrupted:
                flags[1] = 1
        copying, interrupted = (flag > 0 for flag in self.world.sum(flags).tolist())
        if interrupted:
            return Audited(interrupted=True)
        if row is not None:
            say(audit_line(row))
        return Audited(copying=copying, row=row)

    def _draw(
        self, denoiser: EDMDenoiser, shape: tuple[int, int, int], stopping: Callable[[], bool]
    ) -> tuple[np.ndarray, bool, bool]:
        """Samples uint8 [n, C, H, W] of all ranks, and whether one failed or was interrupted."""
        world, num = self.world, self.settings.evaluation.audit_num
        seeds = range(world.rank, num, world.size)
        drawn = torch.zeros(num, *shape, dtype=torch.uint8, device=world.device)
        flags = torch.zeros(2, dtype=torch.float64, device=world.device)

        try:
            sampling = SamplingSettings(**self.settings.tree()["sampling"])
            if len(seeds):
                drawn[world.rank :: world.size] = sample(
                    denoiser, seeds, shape=shape, settings=sampling, graph=False, on_batch=_interrupt_where(stopping)
                ).to(world.device)
        except FastambientError:
            flags[0] = 1
        except _Interrupted:
            flags[1] = 1
        failed, interrupted = world.sum(flags).tolist()
        return world.sum(drawn).cpu().numpy(), failed > 0, interrupted > 0

    def snapshot(self, nimg: int) -> Path:
        return self.run.snapshots / f"nimg-{nimg:012d}.safetensors"

    def keep(self, nimg: int, write: Callable[[Path], None]) -> None:
        """Keep the weights of an audit at or below the rate; those of long ago go."""
        self.run.snapshots.mkdir(exist_ok=True)
        write(self.snapshot(nimg))
        for old in sorted(self.run.snapshots.glob("nimg-*.safetensors"))[:-_SNAPSHOTS]:
            old.unlink(missing_ok=True)

    def take(self, nimg: int, write: Callable[[Path], None]) -> None:
        """The run stopped at `nimg`: model.safetensors becomes the weights of the last audit at or below the rate."""
        rate = self.settings.training.stop_when_copying
        assert rate is not None
        rows = self.run.read_audits()
        row, end = last_allowed(rows, rate), rows[-1]
        last = (
            f"{100 * end['rate']:.1f} % copies, less {100 * end['holdout_rate']:.1f} % of held-out images, are more"
            f" than {100 * rate:.3g} % at {nimg / 1000:g} kimg"
        )
        if row is None or not self.snapshot(row["nimg"]).is_file():
            write(self.run.weights)
            warn(f"{last}, and no earlier audit was at or below it: {self.run.weights} holds the weights of"
                 f" {nimg / 1000:g} kimg; audit more often (--audit-every) to stop in time")  # fmt: skip
            return
        write_bytes(self.run.weights, self.snapshot(row["nimg"]).read_bytes())
        say(
            f"{last}: {self.run.weights} holds the weights of {row['kimg']:g} kimg, where it was"
            f" {100 * excess(row):.3g} %"
        )


def audit_line(row: dict[str, Any]) -> str:
    """A row for people."""
    from fastambient.evaluation.quality import distance_name, spaces

    low, high = (100 * side for side in row["ci95"])
    matched = row["train_rate"]
    at_equal = "" if matched == row["rate"] else f" (among as many training images {100 * matched:.1f} %)"
    return (
        f"audit at {row['kimg']:g} kimg: {100 * row['rate']:.1f} % copies ({low:.1f} - {high:.1f} %), held-out control"
        f" {100 * row['holdout_rate']:.1f} %{at_equal}, {distance_name([row], 'pixel')} ({spaces([row])})"
        f" {row['fd']:.4g}, in {duration(row['seconds'])}"
    )
