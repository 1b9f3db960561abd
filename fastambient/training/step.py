"""One optimizer step: batch -> noise -> network -> loss -> backward -> optimizer with EMA.

The host fills static memory with its part of the batch (`data/loaders.py`), launches `iteration` (as one CUDA graph
where there is one), prepares the next step's part while the device works, and reads the results back in one piece.

Every random number is a function of (seed, position), position = images seen so far + index in the global batch:
neither the number of ranks nor the micro-batch nor a resume changes a draw.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastambient.console import warn
from fastambient.data.augment import augment
from fastambient.data.loaders import Batch, Fields, Loader
from fastambient.diffusion.edm import draw_sigma
from fastambient.errors import InputError
from fastambient.training import compile as compiling
from fastambient.training.config import Settings
from fastambient.training.distributed import World, mean_in_float32
from fastambient.training.graph import GraphedIteration, why_no_graph
from fastambient.training.monitor import SigmaLoss
from fastambient.training.optimizer import ema_beta, learning_rate
from fastambient_kernels import AdamEMA, ambient_loss, ambient_noise, is_ambient, seed_tensor


@dataclass(frozen=True)
class StepResult:
    loss: float  # sum over pixels, mean over the global batch
    lr: float
    grad_norm: float
    nonfinite_grads: int  # entries replaced by the clean-up
    ambient_share: float  # of this batch's draws
    stop: bool  # some rank was asked to stop
    line: bool  # rank 0 is about to print a line
    data_wait: float = field(default=0.0, compare=False)  # seconds that this rank's device waited for its batch


class TrainingStep:
    """Holds what a step needs; call it with the images seen so far.

    Parameters
    ----------
    network : raw network F, on `world.device`: what `working_network` returns
    loader : of this rank's share of the batch
    optimizer : of its weights, or of their float32 masters
    num_classes : label_dim of the network, 0 if unconditional
    noise_seed : the secret of the noise contract
    """

    def __init__(
        self,
        network: nn.Module,
        loader: Loader,
        optimizer: AdamEMA,
        sigma_loss: SigmaLoss,
        settings: Settings,
        world: World,
        *,
        num_classes: int,
        noise_seed: int,
    ) -> None:
        self.network, self.loader, self.optimizer = network, loader, optimizer
        self.sigma_loss, self.settings, self.world = sigma_loss, settings, world
        self.num_classes = num_classes
        # On the device once: a seed made anew at each use would be a copy to the device each time.
        self.noise_seed, self.seed = (seed_tensor(s, world.device) for s in (noise_seed, settings.training.seed))
        batch = settings.training.batch
        if batch % world.size:
            raise InputError(
                f"a batch of {batch} does not divide among {world.size} ranks; use a multiple of {world.size}"
            )
        self.share = batch // world.size
        self.micro = settings.training.batch_gpu or self.share
        if self.share % self.micro:
            raise InputError(
                f"training.batch_gpu {self.micro} does not divide a rank's share of {self.share} images"
                f" (batch {batch} on {world.size} ranks)"
            )
        self.parallel: nn.Module = network
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
            if optimizer.leaves:
                self.parallel.register_comm_hook(None, lambda _, bucket: mean_in_float32(bucket))
                for master in optimizer.leaves:  # as the wrapper does with its own parameters
                    world.copy_from_first(master.detach())
        # Static memory of `iteration`: the host's part of a batch; lr, EMA decay, and what this rank was asked for.
        self.fields = loader.static()
        self.lr, self.ema_beta, *_ = self.numbers = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._prepared: tuple[int, Fields] | None = None  # images seen and batch of the step to come
        self._to_compile = compiling.wanted(settings.training)
        reason = why_no_graph(settings.training, world)
        self.run: Callable[[], Tensor] = self.iteration
        if reason is None:
            self.run = GraphedIteration(self.iteration, world.device)
        elif settings.training.cuda_graph == "on" and world.first:
            warn(f"training.cuda_graph on: no CUDA graph of the training step ({reason})")

    def __call__(self, nimg: int, *, stop: bool = False, line: bool = False) -> StepResult:
        t = self.settings.training
        lr, beta = learning_rate(nimg, t), ema_beta(nimg + t.batch, t)
        asked = time.perf_counter()
        prepared = self._prepared
        batch = prepared[1] if prepared is not None and prepared[0] == nimg else self._prepare(nimg)
        waited = time.perf_counter() - asked
        self.loader.fill(self.fields, batch)
        numbers = _pinned(torch.tensor([lr, beta, stop, line], dtype=torch.float64), self.world)
        self.numbers.copy_(numbers, non_blocking=True)
        for group in self.optimizer.param_groups:  # a restored optimizer has a copy
            group["lr"] = self.lr
        if self._to_compile:
            self._to_compile = False
            compiling.compile_network(self.network, self._probe, tell=self.world.first)
        self.optimizer.refresh()
        clock = _Clock(self.world.device)
        results = self.run()
        clock.launched()
        self._prepared = nimg + t.batch, self._prepare(nimg + t.batch)  # while the device works
        clock.prepared()
        results = results.cpu()  # the step's one wait for the device
        waited += clock.device_waited()
        bins, (draws, stops, lines, norm, bad) = results[:-5].view(2, -1), results[-5:].tolist()
        self.sigma_loss.sums += bins
        return StepResult(
            float(bins[0].sum()) / t.batch, lr, norm, int(bad), draws / t.batch, stop=stops > 0, line=lines > 0,
            data_wait=waited,
        )  # fmt: skip

    def _probe(self) -> None:
        """The network forward and backward on the first micro-batch of static memory; leaves nothing."""
        with contextlib.nullcontext() if self.world.size == 1 else self.parallel.no_sync():  # type: ignore[operator]
            _, loss = self.forward(self.loader.batch(self.fields, slice(0, self.micro)))
            loss.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _prepare(self, nimg: int) -> Fields:
        """The host's part of this rank's batch of the step after `nimg` images."""
        return self.loader.host(nimg)

    def iteration(self) -> Tensor:
        """The device's part of a step: reads static memory, waits for nothing, and can be captured in a CUDA graph.

        Returns
        -------
        float64 [2 * bins + 5]: loss sums and counts per bin of sigma, ambient draws, ranks asked to stop and to print
        (sums over all ranks), norm of the gradients, how many of their entries were replaced
        """
        world = self.world
        self.optimizer.zero_grad(set_to_none=True)  # of a step before, or of a capture that failed half-way
        bins = None
        ambient = torch.zeros((), dtype=torch.float64, device=world.device)
        for start in range(0, self.share, self.micro):
            last = start + self.micro == self.share
            part = slice(start, start + self.micro)
            with contextlib.nullcontext() if last or world.size == 1 else self.parallel.no_sync():  # type: ignore[operator]
                sigma, loss = self.forward(self.loader.batch(self.fields, part))
                # Sums over pixels, mean over the batch; DDP then takes the mean over ranks.
                (loss.sum() / self.share).backward()
            binned = self.sigma_loss.bin(sigma, loss.detach())
            bins = binned if bins is None else bins + binned
            ambient += is_ambient(sigma, self.settings.noise.sigma_tn or 0.0).sum()
        assert bins is not None
        sums = world.sum(torch.cat([bins.flatten(), ambient[None], self.numbers[2:]]))
        self.optimizer.step(ema_betas=[self.ema_beta])
        norm, bad = self.optimizer.grad_norm, self.optimizer.nonfinite
        assert norm is not None and bad is not None
        return torch.cat([sums, norm.double()[None], bad.double()[None]])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sigma [N], loss [N]) of a batch."""
        n, t, positions = self.settings.noise, self.settings.training, batch.positions
        above = (n.sigma_tn or 0.0) if n.regime == "ambient" else 0.0
        sigma = draw_sigma(positions, seed=self.seed, P_mean=n.P_mean, P_std=n.P_std, above=above)
        if batch.clean is not None:  # no image without a clean one below sigma_tn, however the host rounded
            sigma = torch.where(batch.clean, sigma, sigma.clamp(min=n.sigma_tn))
        images, flips, augment_labels = self._augmented(batch, sigma)
        # Fresh noise is the fixed noise of an image that is new at every draw.
        ids, noise_seed = (batch.ids, self.noise_seed) if n.mode == "fixed" else (positions, self.seed)
        keywords: dict[str, Any] = {
            "sigma_tn": n.sigma_tn, "sigma_data": n.sigma_data, "noise_seed": noise_seed, "run_seed": self.seed,
            "x_n": batch.x_n if n.mode == "fixed" else None,
        }  # fmt: skip
        noised = ambient_noise(images, ids, flips, positions, sigma, memory_format=torch.channels_last, **keywords)
        labels = None
        if self.num_classes:
            assert batch.labels is not None
            labels = nn.functional.one_hot(batch.labels, self.num_classes).to(noised.net_input.dtype)
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=t.precision == "bf16"):
            F = self.parallel(
                noised.net_input,
                noised.coefficients.c_noise,
                labels,
                augment_labels,
                dropout_key=(self.seed, positions),
            )
        loss = ambient_loss(F, images, ids, flips, positions, sigma, weighting=n.weighting, **keywords)
        return sigma, loss

    def _augmented(self, batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(images, flips, augmentation labels): geometry acts in the clean regime only, flips everywhere.

        A mirror image moves its noise along, inside the operators. ``augment_ambient: reference`` mirrors and warps
        the clean image first, under the same noise, as the reference does: two observations of one picture, a leak.
        """
        t = self.settings.training
        if t.augment == 0:
            return batch.images, batch.flips, None
        leaking = t.augment_ambient == "reference"
        images = batch.images.float() / 127.5 - 1
        active = torch.ones_like(batch.flips) if leaking else ~is_ambient(sigma, self.settings.noise.sigma_tn or 0.0)
        images, labels = augment(
            images, batch.positions, p=t.augment, seed=self.seed, xflips=batch.flips, active=active
        )
        if not leaking:
            return images, batch.flips, labels
        mirrored = torch.where(batch.flips.view(-1, 1, 1, 1), images.flip(3), images)
        return mirrored, torch.zeros_like(batch.flips), labels


class _Clock:
    """How long the device had nothing to do because the next batch was not there yet.

    A CPU works before the batch is prepared, so that it waits for all of the preparing; a GPU meanwhile, so that it
    waits for what the host was longer at it than the device at its step. Read after the results: nothing more is waited
    for.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.began = time.perf_counter()
        if self.on_gpu:
            self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.first.record()

    def launched(self) -> None:
        if self.on_gpu:
            self.last.record()
        self.after = time.perf_counter()

    def prepared(self) -> None:
        self.ready = time.perf_counter()

    def device_waited(self) -> float:
        """Seconds."""
        preparing = self.ready - self.after
        if not self.on_gpu:
            return preparing
        busy = self.first.elapsed_time(self.last) / 1e3
        return min(preparing, max(0.0, self.ready - self.began - busy))


def _pinned(host: Tensor, world: World) -> Tensor:
    """`host` in memory that a GPU copies from without the CPU waiting."""
    return host.pin_memory() if world.device.type == "cuda" else host
