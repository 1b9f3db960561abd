"""Ranks: one process that trains, or several that agree on everything.

``--gpus N`` (``--processes N`` on a CPU) starts N ranks through torch's elastic launch; inside ``torchrun`` the ranks
are there already. One rank runs in the calling process itself. Only tensors travel between ranks: torch's object
collectives would pickle.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastambient.errors import FastambientError, InputError

_TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may be sampling a grid or syncing a large checkpoint


@dataclass(frozen=True)
class World:
    """This rank's place among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def copy_from_first(self, values: Tensor) -> None:
        """Overwrite with rank 0's."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def text_from_first(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size == 1:
            return text
        data = text.encode()
        length = self.sum(torch.tensor([len(data) if self.first else 0], device=self.device))
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.copy_from_first(buffer)
        return bytes(buffer.cpu().tolist()).decode()


def mean_in_float32(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What a communication hook of DistributedDataParallel does: gradients of any type are summed over ranks in float32
    and rounded once."""
    buffer = bucket.buffer()
    reduced = dist.all_reduce(buffer.float() / dist.get_world_size(), async_op=True).get_future()
    return reduced.then(lambda done: buffer.copy_(done.value()[0]))


def inside_launcher() -> bool:
    """True under torchrun or another launcher that speaks its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_ranks(gpus: int | None, processes: int | None) -> tuple[int, str]:
    """(number of ranks, "cuda" or "cpu") from ``--gpus`` and ``--processes``.

    Raises
    ------
    InputError : both given, or more GPUs than there are
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is not None and processes is not None:
        raise InputError("--gpus and --processes exclude each other: ranks are either GPUs or CPU processes")
    if processes is not None:
        if processes < 1:
            raise InputError(f"--processes must be 1 or more, got {processes}")
        return processes, "cpu"
    if gpus is None:
        gpus = there
    if gpus < 0:
        raise InputError(f"--gpus must be 0 (CPU) or more, got {gpus}")
    if gpus > there:
        raise InputError(f"--gpus {gpus}: this machine has {there} visible GPUs; use --gpus 0 for the CPU")
    return (gpus, "cuda") if gpus else (1, "cpu")


def join_world(device_type: str) -> World:
    """Join the process group of a launcher's environment."""
    rank, size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=_TIMEOUT)
    return World(rank, size, device)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(worker: Callable[..., int], arguments: tuple[Any, ...], *, ranks: int) -> int:
    """Run ``worker(*arguments)`` in `ranks` processes on this machine; returns the exit code.

    The worker prints its own errors and returns its exit code; a rank that fails ends the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # their tracebacks; the ranks print what went wrong
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"fastambient-{os.getpid()}", max_restarts=0, monitor_interval=0.1, start_method="spawn",
    )  # fmt: skip
    try:
        codes = elastic_launch(config, worker)(*arguments)
        return max(codes.values())
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        code = next((f.exitcode for f in error.failures.values() if f.exitcode > 0), 1)
        if all(f.exitcode < 0 for f in error.failures.values()):
            _, failure = error.get_first_failure()
            raise FastambientError(f"rank {failure.local_rank} was killed by signal {-failure.exitcode}") from None
        return code


def run_from_first(world: World, prepare: Callable[[], Path]) -> Path:
    """Call `prepare` on rank 0 and give its path to all; its InputError ends every rank, printed once."""
    message = ""
    if world.first:
        try:
            message = f"ok:{prepare()}"
        except (InputError, FastambientError) as error:
            message = f"{error.exit_code}:{error}"
    message = world.text_from_first(message)
    kind, _, rest = message.partition(":")
    if kind == "ok":
        return Path(rest)
    if world.first:
        raise (InputError if kind == "2" else FastambientError)(rest)
    raise SystemExit(int(kind))
