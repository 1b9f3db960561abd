"""The training loop of one rank, with images as the clock."""

from __future__ import annotations

import copy
import dataclasses
import gc
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastambient import models
from fastambient.allocator import keep_freed_memory
from fastambient.console import duration, say, warn
from fastambient.data.loaders import ReadError, Share, choose, make_loader
from fastambient.data.store import Store
from fastambient.data.streaming import read_journal
from fastambient.diffusion.ambient import share_message
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import FastambientError
from fastambient.models.blocks import compile_blocks, recompute_levels
from fastambient.nvml import open_gpu
from fastambient.pictures import grid, save_png
from fastambient.sampling import SamplingSettings, export, sample
from fastambient.sampling.plan import ambient_message
from fastambient.training import checkpoint
from fastambient.training.audits import Auditor, check_audits, excess
from fastambient.training.clock import crosses
from fastambient.training.config import PREVIEW_IMAGES, Settings, network_config
from fastambient.training.data import TrainingSet, store_set, stream_set
from fastambient.training.distributed import World
from fastambient.training.estimate import estimate_run, work_of
from fastambient.training.monitor import Monitor, SigmaLoss, gpu_fields, peak_memory
from fastambient.training.notes import notes
from fastambient.training.optimizer import (
    build_optimizer,
    ema_weights,
    load_ema_weights,
    load_optimizer_tensors,
    optimizer_tensors,
    working_network,
)
from fastambient.training.run import RunFolder
from fastambient.training.step import TrainingStep
from fastambient.training.stopping import Interrupted, StopSignal, how_to_resume

_GRID_SEEDS = range(PREVIEW_IMAGES)
_WARM_UP_STEPS = 3  # after which what there is stays: network, optimizer, data set, graph


def build_network(settings: Settings, data: TrainingSet | Store, device: torch.device) -> nn.Module:
    """A network with the initial weights of the run's seed, channels-last: the layout in which convolutions and norms
    are fastest on CPUs and GPUs alike. The global generator is left as it was. Blocks of the `checkpoint_levels`
    highest resolutions are computed anew in the backward pass."""
    config = network_config(settings, channels=data.channels, num_classes=data.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed & (2**63 - 1))
        network = models.build(config)
    recompute_levels(network, settings.training.checkpoint_levels)
    return network.to(device).to(memory_format=torch.channels_last).train()


@contextmanager
def no_automatic_collection() -> Iterator[None]:
    """Python's collector runs when asked alone: a collection in the middle of a step is time that a GPU waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


class Trainer:
    """Everything a run holds in memory, and how it goes to disk and back."""

    def __init__(self, run: RunFolder, world: World, *, planned: bool = False) -> None:
        """planned : `plan` has just opened the run's data, and verified a store that lies outside of the run"""
        self.run, self.world = run, world
        if world.device.type == "cpu":
            keep_freed_memory()
        self.settings = settings = run.read_settings()
        noise_seed = run.read_noise_seed()
        self.auditor: Auditor | None = None
        if settings.data.stream:
            check_audits(settings, None)
            self.data = stream_set(run.open_stream())
        else:
            # Once, before an image is used: by the plan of a new run, here of a resumed one. What was prepared into the
            # run folder is read back here for the first time.
            verify = world.first and (not planned or run.store.is_dir())
            store = run.open_store(verify=verify)
            self.data = store_set(settings, store, run.open_clean(verify=verify), noise_seed)
            if settings.training.audit_kimg:
                self.auditor = Auditor(run, settings, store, world)
        t = settings.training
        self.total_nimg = round(t.kimg * 1000)
        self.network = build_network(settings, self.data, world.device)
        self.names = [name for name, _ in self.network.named_parameters()]
        working = working_network(self.network, t, ranks=world.size)
        self.optimizer = build_optimizer(self.network, t, working)
        self.sigma_loss = SigmaLoss(world.device)
        rows = self.data.rows
        kind, reason = choose(settings.data.loader, getattr(rows, "nbytes", None), world.device, ranks=world.size)
        kind = world.text_from_first(kind)  # memory that is free may differ from rank to rank
        self.loader_line = f"loader {kind}: {reason}"
        self.loader = make_loader(
            kind, rows, Share(t.batch, world.rank, world.size), seed=t.seed, device=world.device,
            xflip=settings.data.xflip or t.augment > 0, workers=settings.data.workers,
        )  # fmt: skip
        self.num_classes = self.data.num_classes if settings.data.use_labels else 0
        self.step = TrainingStep(
            working, self.loader, self.optimizer, self.sigma_loss, settings, world,
            num_classes=self.num_classes, noise_seed=noise_seed,
        )  # fmt: skip
        self.nimg = 0
        self.seconds = 0.0  # of the run so far, over all resumes
        self.log_sizes: dict[str, int] = {}
        self.audit_owed = False  # a signal came before the audit at nimg
        self.copying = False  # the stop rule ended the run

    def save(self) -> None:
        """Checkpoint and exported weights; rank 0's work."""
        assert self.monitor is not None
        if self.copying:  # first, so that a run whose checkpoint says that it ended has the weights it ended with
            assert self.auditor is not None
            self.auditor.take(self.nimg, self.export)
        tensors: dict[str, Tensor] = {}
        ema = ema_weights(self.optimizer, self.names)
        parts = (
            ("model", self.network.state_dict()),
            ("ema", ema),
            ("optimizer", optimizer_tensors(self.optimizer, self.names)),
        )
        for prefix, part in parts:
            tensors |= {f"{prefix}.{k}": v.detach().cpu() for k, v in part.items()}
        state = {
            "seconds": self.seconds,
            "log_sizes": self.monitor.sizes(),
            "sigma_loss": self.sigma_loss.sums.tolist(),
            "weights_metadata": self.metadata(),
            "audit_owed": self.audit_owed,
            "ended": "copying" if self.copying else None,
        }
        keep = self.settings.training.keep_checkpoints
        checkpoint.save(self.run.checkpoints, self.nimg, tensors, state, keep=keep)
        if not self.copying:
            self.export(self.run.weights)

    def export(self, path: Path) -> None:
        """The EMA weights of now as a model.safetensors."""
        export(path, self.network.state_dict() | ema_weights(self.optimizer, self.names), self.metadata())

    def restore(self) -> bool:
        """Continue from the newest sound checkpoint, if there is one."""
        found = checkpoint.load_latest(self.run.checkpoints)
        if found is None:
            return False
        tensors, state = found
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for key, value in tensors.items():
            prefix, name = key.split(".", 1)
            parts[prefix][name] = value
        self.network.load_state_dict(parts["model"])
        load_ema_weights(self.optimizer, self.names, parts["ema"])
        load_optimizer_tensors(self.optimizer, self.names, parts["optimizer"])
        self.sigma_loss.sums.copy_(torch.tensor(state["sigma_loss"], dtype=torch.float64))
        self.nimg, self.seconds, self.log_sizes = state["nimg"], state["seconds"], state["log_sizes"]
        self.audit_owed, self.copying = state.get("audit_owed", False), state.get("ended") == "copying"
        return True

    def metadata(self) -> dict[str, Any]:
        """What model.safetensors says of itself. Never the noise seed, never a path."""
        s, data = self.settings, self.data
        return {
            "network": network_config(s, channels=data.channels, num_classes=data.num_classes),
            "sigma_data": s.noise.sigma_data,
            "noise": s.tree()["noise"],
            "sampling": s.tree()["sampling"],
            "precision": s.training.precision,
            "class_names": data.class_names if self.num_classes else None,
            "train_images": data.images,
            "nimg": self.nimg,
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.data.channels, self.data.resolution, self.data.resolution

    def ema_denoiser(self) -> EDMDenoiser:
        """The EMA weights of now, in a copy of the network: training's own stays as it is."""
        if not hasattr(self, "ema_network"):
            self.ema_network = copy.deepcopy(self.network).eval().requires_grad_(False)
            compile_blocks(self.ema_network, False)  # for a few pictures it would take longer than they do
        self.ema_network.load_state_dict(self.network.state_dict() | ema_weights(self.optimizer, self.names))
        assert self.settings.noise.sigma_data is not None
        return EDMDenoiser(self.ema_network, sigma_data=self.settings.noise.sigma_data, label_dim=self.num_classes)

    def audit(self, stop: StopSignal) -> None:
        """Audit the EMA weights, on every rank; `audit_owed` and `copying` say what came of it."""
        assert self.auditor is not None
        found = self.auditor(
            self.ema_denoiser(), self.shape, self.nimg, stopping=lambda: stop.signum is not None
        )  # fmt: skip
        self.audit_owed, self.copying = found.interrupted, found.copying
        if found.row is not None:
            assert self.monitor is not None
            self.monitor.audit(found.row)
            rate = self.settings.training.stop_when_copying
            if rate is not None and excess(found.row) <= rate:
                self.auditor.keep(self.nimg, self.export)

    def sample_grid(self) -> None:
        """Pictures of the first sample seeds with the EMA weights; a diverged model gives a warning, not an end."""
        assert self.monitor is not None
        sampling = SamplingSettings(**self.settings.tree()["sampling"])
        try:
            picture = grid(
                sample(self.ema_denoiser(), _GRID_SEEDS, shape=self.shape, settings=sampling, graph=False)
            )  # fmt: skip
        except FastambientError as error:
            warn(str(error))
            return
        self.run.samples.mkdir(exist_ok=True)
        save_png(self.run.samples / f"grid-{self.nimg:012d}.png", picture)
        self.monitor.picture("samples", picture, self.nimg)

    monitor: Monitor | None = None
    predicted_memory: float | None = None  # bytes of a rank
    memory_before = 0  # bytes at most, before the run was opened

    def train(self) -> None:
        """Run to the end, or to a signal."""
        t, world = self.settings.training, self.world
        if world.first:
            self.monitor = Monitor(
                self.run, nimg=self.nimg, total_nimg=self.total_nimg, device=world.device, sizes=self.log_sizes,
                stop_rate=t.stop_when_copying,
            )  # fmt: skip
            work = work_of(
                self.settings, channels=self.data.channels, num_classes=self.data.num_classes, ranks=world.size,
                gpu=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None,
            )  # fmt: skip
        # A beginning that was taken over from another run (ending.py) has a checkpoint, but no weights of its own yet.
        saved_at = self.nimg if self.log_sizes and self.run.weights.is_file() else -1
        gpu, read_at = open_gpu(world.device), self.nimg
        if gpu is not None:
            gpu.read()  # energy counts from here
        with StopSignal().listen() as stop, no_automatic_collection():
            began, first = time.perf_counter(), self.nimg
            if self.audit_owed:
                self.audit(stop)
                if self.audit_owed:  # the checkpoint says so already
                    self.interrupted(stop)
                saved_at = -1
            while self.nimg < self.total_nimg and not self.copying:
                step_began = time.perf_counter()
                line = self.monitor is not None and self.monitor.line_due()
                result = self.step(self.nimg, stop=stop.signum is not None, line=line)
                self.nimg += t.batch
                if self.nimg == first + _WARM_UP_STEPS * t.batch:
                    gc.collect()
                    gc.freeze()  # what is there now is not looked through again
                now = time.perf_counter()
                elapsed = now - step_began
                self.seconds, began = self.seconds + now - began, now  # with the pictures and checkpoints in between
                finished = self.nimg >= self.total_nimg
                if self.auditor is not None and (finished or crosses(self.nimg, t.batch, t.audit_kimg or 0)):
                    self.audit_owed = result.stop
                    if not result.stop:
                        self.audit(stop)
                finished = finished or self.copying
                due = finished or crosses(self.nimg, t.batch, t.checkpoint_kimg or 0)
                if due:
                    gc.collect()
                line = due or result.line  # on every rank: each reads its own GPU
                gauges = {}
                if line:
                    gauges, read_at = gpu_fields(gpu, world, images=self.nimg - read_at), self.nimg
                if self.monitor is not None:
                    record = {"nimg": self.nimg} | dataclasses.asdict(result) | {"images_per_second": t.batch / elapsed}
                    del record["stop"], record["line"]
                    record["data_wait"] = result.data_wait / elapsed
                    self.monitor.step(record | work.rates(elapsed) | gauges)
                    if line:
                        self.monitor.line()
                    if due:
                        self.monitor.sigma_row(self.sigma_loss.row(self.nimg))
                    if crosses(self.nimg, t.batch, t.sample_kimg or 0) or (finished and t.sample_kimg):
                        drawing = time.monotonic()
                        self.sample_grid()
                        self.monitor.pause(time.monotonic() - drawing)
                    if due or result.stop or self.audit_owed:
                        self.save()
                        saved_at = self.nimg
                if (result.stop and not finished) or self.audit_owed:
                    self.interrupted(stop)
            self.seconds += time.perf_counter() - began
        if self.monitor is not None:
            if saved_at != self.nimg:
                self.save()
            self.monitor.close()
            done = "finished" if not self.copying else "stopped when copying, at"
            say(f"{done} {self.nimg / 1000:g} kimg in {duration(self.seconds)}: {self.run.weights}")
            if told := ambient_message(self.settings.tree()["noise"]):
                say(told)
            predicted = self.predicted_memory
            of_the_run = "" if predicted is None else f"; {predicted / 2**30:.2f} GiB were predicted for the run's own"
            peak = peak_memory(world.device)
            whole = "of the GPU"
            if world.device.type != "cuda":
                added = (peak - self.memory_before) / 2**30
                whole = f"of the process with its libraries, {added:.2f} GiB of it since the run was opened"
            say(f"peak memory {peak / 2**30:.2f} GiB {whole}{of_the_run}")

    def interrupted(self, stop: StopSignal) -> NoReturn:
        """End by the signal that came, or that another rank got; the checkpoint is written."""
        signum = stop.signum or signal.SIGTERM
        if self.monitor is not None:
            self.monitor.close()
        raise Interrupted(
            signum,
            f"stopped by {signal.Signals(signum).name} at {self.nimg / 1000:g} kimg, checkpoint written;"
            f" {how_to_resume(self.run.path)}",
        )


def train(path: Path, world: World, *, resume: bool) -> None:
    """Train the run folder `path` on this rank: one that `plan` and `create_run` have just made, or, if `resume`, from
    its newest checkpoint.

    Raises
    ------
    Interrupted : a signal stopped it, after a checkpoint
    InputError, FastambientError : see the parts
    """
    before = peak_memory(world.device)
    trainer = Trainer(RunFolder(path), world, planned=not resume)
    trainer.memory_before = before
    s, n = trainer.settings, trainer.settings.noise
    resumed = resume and trainer.restore()
    if world.first:
        message, warning = share_message(
            n.sigma_tn or 0.0,
            resolution=trainer.data.resolution,
            P_mean=n.P_mean,
            P_std=n.P_std,
            weighting=n.weighting,
            regime=n.regime,
        )
        say(f"{path}: preset {s.model.preset}, {trainer.data.images:,} training images of "
            f"{trainer.data.resolution}x{trainer.data.resolution}, {world.size} rank(s) on {world.device.type}, "
            f"{s.training.precision}")  # fmt: skip
        say(f"{message}; sigma_data {n.sigma_data:.4g}")
        say(trainer.loader_line)
        if trainer.auditor is not None:
            say(trainer.auditor.message())
        for note in filter(None, (warning, *notes(s, trainer.data, world.device.type))):
            warn(note)
        if resume:
            at = f"from {trainer.nimg / 1000:g} kimg" if resumed else "from the start: no checkpoint was written yet"
            say(f"resuming {at}")
        # What is trained on here may be other ranks and another device than the settings name.
        here = dataclasses.replace(s.training, ranks=world.size, device=world.device.type)  # type: ignore[arg-type]
        cost = estimate_run(
            dataclasses.replace(s, training=here),
            channels=trainer.data.channels, num_classes=trainer.data.num_classes, nimg=trainer.nimg,
        )  # fmt: skip
        trainer.predicted_memory = cost.memory
        if cost.is_long:
            warn(f"{cost.text}; a smaller --preset or a smaller --kimg takes less")
        else:
            say(cost.text)
    try:
        trainer.train()
    except ReadError as error:
        raise ReadError(f"{error}; when that is settled, {how_to_resume(path)}") from error
    finally:
        trainer.loader.close()
        if world.first and (skipped := read_journal(trainer.run.skipped)):
            warn(f"{len(skipped):,} image(s) could not be read and were skipped: {trainer.run.skipped}")
