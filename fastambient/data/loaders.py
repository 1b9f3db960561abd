"""What the loaders share: a step's batch in two parts, the host's and the device's; and which loader a run takes.

    fields = loader.host(nimg)           # for this rank's share of the step after nimg images; while the device works
    loader.fill(static, fields)          # copies into memory of `loader.static()`, without the host waiting
    batch = loader.batch(static, part)   # on the device, by device operations alone: may lie in a CUDA graph

    loader     fields beside the positions       where the rest happens
    resident   row numbers                       the whole set is in device memory and gathered there
    dali       images, ids, labels, x_n          a DALI pipeline reads and decodes ahead
    workers    images, ids, labels, x_n          processes of torch's DataLoader read ahead

The batch at a position is a function of (run seed, position) and the set, whatever the loader, the number of ranks and
workers, the micro-batch, or where a run was resumed: `Rows.index` says which row stands there, and Philox at the
position whether it is mirrored. The sequence of shuffled epochs is endless, so that every batch is full and lies across
the border of two epochs where it must: there is no last batch to pad or drop.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastambient.data.rows import Rows, SizedRows, as_tensors, fetch_decoded
from fastambient.errors import FastambientError, InputError
from fastambient.system import available_memory
from fastambient_kernels import seed_tensor
from fastambient_kernels.noise import Stream, uniform

Fields = dict[str, Tensor]
NAMES = ("auto", "resident", "dali", "workers")
RESIDENT_SHARE = 0.5  # of the free memory of a GPU, or of the available main memory, that the set may take
_AHEAD = 2  # batches that are ready, beside those that DALI or the workers have under way


class ReadError(FastambientError):
    """The training set cannot be read on: a reader failed, or a file was cut short. One rank may be alone with it."""


@dataclass(frozen=True)
class Batch:
    """Training samples, all tensors on the loader's device. Images and x_n are unflipped: the noise operator flips
    the finished picture, so that the fixed noise moves with it."""

    images: Tensor  # uint8 [N, C, H, W]
    ids: Tensor  # int64 [N], image ids of the noise contract
    flips: Tensor  # bool [N], true mirrors the width
    labels: Tensor | None  # int64 [N], class labels
    positions: Tensor  # int64 [N], images seen so far + index in the global batch
    x_n: Tensor | None  # float16 or float32 [N, C, H, W], the precomputed noised images
    clean: Tensor | None = None  # bool [N], false where `images` is nothing and x_n alone may be used; None: all true


@dataclass(frozen=True)
class Share:
    """A rank's part of each global batch: the ranks' parts lie one after another and share no position."""

    batch: int  # images a step, over all ranks
    rank: int = 0
    ranks: int = 1

    @property
    def size(self) -> int:
        return self.batch // self.ranks

    def positions(self, nimg: int) -> Tensor:
        """int64 [size] of the step after `nimg` images."""
        first = nimg + self.rank * self.size
        return torch.arange(first, first + self.size)


class Loader:
    """The interface, and what is alike for all.

    Parameters
    ----------
    rows : what is drawn from
    share : this rank's part of each batch
    seed : run seed, 64 bits, of the flips
    device : where batches are made
    xflip : whether half of the samples are mirrored
    """

    def __init__(self, rows: Rows, share: Share, *, seed: int, device: torch.device | str, xflip: bool) -> None:
        self.rows, self.share, self.device, self.xflip = rows, share, torch.device(device), xflip
        self._seed = seed_tensor(seed, self.device)

    def read(self, positions: Tensor) -> Fields:
        """The host's part of the batch at any `positions` (int64 [N]), here and now."""
        return {"positions": positions} | as_tensors(fetch_decoded(self.rows, self.rows.index(positions).numpy()))

    def host(self, nimg: int) -> Fields:
        """The host's part of this rank's share of the step after `nimg` images; on CUDA in pinned memory or on the
        device already.

        Raises
        ------
        ReadError : the data cannot be read
        """
        return self.pinned(self.read(self.share.positions(nimg)))

    def pinned(self, fields: Fields) -> Fields:
        """In memory that a GPU copies from without the CPU waiting."""
        if self.device.type != "cuda":
            return fields
        return {name: value if value.is_cuda else value.pin_memory() for name, value in fields.items()}

    def static(self) -> Fields:
        """Memory on the device for what `host` gives, zero: to be filled before each step."""
        one = self.read(self.share.positions(0)[:1])
        return {
            name: torch.zeros(self.share.size, *value.shape[1:], dtype=value.dtype, device=self.device)
            for name, value in one.items()
        }

    def fill(self, static: Fields, fields: Fields) -> None:
        """Copy `fields` into `static`; the host does not wait for a GPU."""
        for name, memory in static.items():
            memory.copy_(fields[name], non_blocking=True)
            if fields[name].is_cuda:  # made on a reader's stream: not to be reused before this stream has read it
                fields[name].record_stream(torch.cuda.current_stream(self.device))

    def batch(self, fields: Fields, part: slice = slice(None)) -> Batch:
        """The samples of `fields`, which lie on the device, or of a part of them. Waits for nothing."""
        positions = fields["positions"][part]
        return Batch(
            images=fields["images"][part], ids=fields["ids"][part], flips=self.flips(positions), positions=positions,
            labels=fields["labels"][part] if "labels" in fields else None,
            x_n=fields["x_n"][part] if "x_n" in fields else None,
            clean=fields["clean"][part] if "clean" in fields else None,
        )  # fmt: skip

    def at(self, positions: Tensor) -> Batch:
        """The samples at any `positions` (int64 [N]) of the sequence, read here and now."""
        fields = self.read(positions.cpu())
        return self.batch({name: value.to(self.device) for name, value in fields.items()})

    def flips(self, positions: Tensor) -> Tensor:
        if not self.xflip:
            return torch.zeros_like(positions, dtype=torch.bool)
        return uniform(positions, 1, seed=self._seed, stream=Stream.AUGMENT)[:, 0] < 0.5

    def close(self) -> None:
        """Stop reading ahead. The loader may be used again, and is closed by itself when it is no longer used."""


class StreamingLoader(Loader):
    """A loader that reads ahead in a thread, which is told nothing: the next request is `share.batch` images on.
    Another one, after a resume, starts the reading anew."""

    _reader: Reader | None = None

    def stream(self, nimg: int) -> Iterator[Fields]:
        """The host's parts of the steps after nimg, nimg + batch, nimg + 2 * batch ... images: a generator that ends
        what it began when it is closed, and holds no reference to the loader."""
        raise NotImplementedError

    def host(self, nimg: int) -> Fields:
        if self._reader is None or self._reader.nimg != nimg:
            self.close()
            self._reader = Reader(self.stream(nimg), nimg, self.share.batch)
        return self.pinned(self._reader.next())

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class Reader:
    """Takes a stream of batches in a thread of its own, a few ahead; `nimg` is what the next one is for."""

    def __init__(self, stream: Iterator[Fields], nimg: int, batch: int) -> None:
        self.nimg, self._batch = nimg, batch
        self._ready: queue.Queue[Fields | BaseException] = queue.Queue(_AHEAD)
        self._failed: BaseException | None = None
        stop = threading.Event()
        self.thread = threading.Thread(target=_read_ahead, args=(stream, self._ready, stop), daemon=True, name="reader")
        # Also when it is forgotten or the program ends: a thread that holds CUDA memory must not outlive the library.
        self._end = weakref.finalize(self, _end, self.thread, stop)
        self.thread.start()

    def next(self) -> Fields:
        """The next batch; waits for it. ReadError where the stream failed."""
        found = self._failed or self._ready.get()
        if isinstance(found, BaseException):
            self._failed = found  # nothing follows it: asked again, say so again
            raise ReadError(f"the training set cannot be read on: {str(found) or type(found).__name__}") from found
        self.nimg += self._batch
        return found

    def close(self) -> None:
        self._end()


def _read_ahead(stream: Iterator[Fields], ready: queue.Queue[Fields | BaseException], stop: threading.Event) -> None:
    def put(item: Fields | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for fields in stream:
            put(fields)
            if stop.is_set():
                break
    except BaseException as error:
        put(error)
    finally:
        stream.close()  # type: ignore[attr-defined]  # pipeline and workers end in the thread that made them


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    thread.join(timeout=20)


def cpus(ranks: int = 1) -> int:
    """Processors that one of `ranks` ranks may use for reading: those of this process, shared among the ranks here."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


def choose(name: str, size: int | None, device: torch.device, *, ranks: int = 1) -> tuple[str, str]:
    """Which loader a setting means here: (resident, dali or workers; why, in words).

    auto is resident where the set takes at most half of the memory that is free on the GPU, or available on the
    machine for all of its ranks; else dali where it is installed and runs, else workers.

    size : bytes of the set (`SizedRows.nbytes`); None: it is streamed
    """
    if name != "auto":
        return name, "as asked for"
    if size is not None:
        free: int | None
        if device.type == "cuda":
            free, where = torch.cuda.mem_get_info(device)[0], "is free on the GPU"
        else:
            available, here = available_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
            free, where = None if available is None else available // here, "a rank may take of main memory"
        if free is None:
            return "resident", "how much memory there is is not known"
        compared = f"{size / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB {where}"
        if size <= RESIDENT_SHARE * free:
            return "resident", f"the set takes {compared}"
        reason = f"the set takes {compared}, of which it may have half"
    else:
        reason = "the set is streamed"
    from fastambient.data import dali

    missing = dali.missing(device)
    return ("dali", reason) if missing is None else ("workers", f"{reason}; {missing}")


def make_loader(
    name: str, rows: Rows, share: Share, *, seed: int, device: torch.device, xflip: bool, workers: int | None = None
) -> Loader:
    """The loader `name`, which `choose` gave.

    workers : reading processes of a rank; None: as many as there are processors for it

    Raises
    ------
    InputError : the loader cannot read these rows, or is not installed
    FastambientError : the device's memory does not suffice
    """
    if name == "resident":
        from fastambient.data.resident import ResidentLoader

        if not hasattr(rows, "nbytes"):
            raise InputError("--loader resident: a set that is streamed cannot be held in memory; use dali or workers")
        return ResidentLoader(cast(SizedRows, rows), share, seed=seed, device=device, xflip=xflip)
    if name == "dali":
        from fastambient.data.dali import DaliLoader

        return DaliLoader(rows, share, seed=seed, device=device, xflip=xflip, workers=workers)
    from fastambient.data.workers import WorkersLoader

    return WorkersLoader(rows, share, seed=seed, device=device, xflip=xflip, workers=workers)
