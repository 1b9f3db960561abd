"""The workers loader: processes of torch's DataLoader read ahead, on every system.

Each process opens the rows anew from their pickle, which this process made. The order and what stands at a position are
computed here, once, and the processes are sent row numbers: an epoch's order is not held by each of them.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastambient.data.loaders import Fields, Share, StreamingLoader, cpus
from fastambient.data.rows import Rows, fetch_decoded
from fastambient.errors import FastambientError

MOST = 8  # processes of a rank, unless asked for more: a batch is copied once more here, by one thread
_EACH = 2  # batches that each process has under way


class WorkersLoader(StreamingLoader):
    """Parameters as `Loader`'s.

    workers : processes; None: one for each processor that the rank has, at most 8
    """

    def __init__(self, rows: Rows, share: Share, *, workers: int | None = None, **common: Any) -> None:
        super().__init__(rows, share, **common)
        self.workers = workers or min(MOST, cpus(share.ranks))

    def stream(self, nimg: int) -> Iterator[Fields]:
        return _stream(self.rows, self.share, nimg, self.workers)


class _Sequence:
    """The sampler: row numbers of a rank's share of each step, without end."""

    def __init__(self, rows: Rows, share: Share, nimg: int) -> None:
        self.rows, self.share, self.nimg = rows, share, nimg

    def __iter__(self) -> Iterator[np.ndarray]:
        for nimg in itertools.count(self.nimg, self.share.batch):
            yield self.rows.index(self.share.positions(nimg)).numpy()


class _Fetched(Dataset):
    """What a process does: row numbers in, rows out."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray] | FastambientError:
        try:
            return fetch_decoded(self.rows, index)
        except FastambientError as error:
            return error  # raised by the reader: raised here it would come wrapped in a traceback's text


def _begin(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; which batch is the last one is the trainer's to say. And a process
    that is no longer needed ends at once: an orderly end, while its queue's thread still hands a batch over in torch's
    C++ code, is an abort that says so on the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(os._exit, 0)


def _stream(rows: Rows, share: Share, nimg: int, workers: int) -> Iterator[Fields]:
    loader = DataLoader(
        _Fetched(rows), batch_size=None, sampler=_Sequence(rows, share, nimg), num_workers=workers,  # type: ignore[arg-type]
        prefetch_factor=_EACH, worker_init_fn=_begin, multiprocessing_context="spawn",
        generator=torch.Generator(),  # the processes' seeds are drawn from it; the global one stays as it is
    )  # fmt: skip
    with warnings.catch_warnings():  # of more processes than processors, which may be asked for
        warnings.simplefilter("ignore")
        batches = iter(loader)
    for k in itertools.count():
        try:
            found = next(batches)
        except (RuntimeError, EOFError, OSError) as error:  # the last two where it ended while it handed a batch over
            raise FastambientError(_what_happened(error)) from error
        if isinstance(found, FastambientError):
            raise found
        yield {"positions": share.positions(nimg + k * share.batch)} | found


def _what_happened(error: Exception) -> str:
    if str(error).startswith("Caught "):  # in a process that goes on: the text of a traceback
        return f"in a reading process: {str(error).strip().splitlines()[-1]}"
    return (
        f"a reading process ended ({str(error).partition(chr(10))[0] or type(error).__name__}): it was killed, for want"
        " of memory or of shared memory (/dev/shm) perhaps; use fewer with --set data.workers=N, or --loader dali"
    )
