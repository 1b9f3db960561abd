"""Training from WebDataset shards as they are, without a store: local tars, or tars behind http(s) addresses.

    epoch    a permutation of the shards by (seed, epoch)
    window   `window` consecutive shards of it, whose samples are permuted together by (seed, epoch, window)

So which sample stands at a position is a pure function of (seed, position) and of the shards: every sample once an
epoch, whatever the number of ranks and workers, and a run goes on anywhere. Each process holds the order of two
windows, 8 bytes a sample, and the indices of their tars; a machine reads, or downloads, a few shards at a time.

How many images each shard holds is in `shards.json` beside the shards (shard_index.py): made for local shards by
looking through them once, read from the same address for others. A broken picture under ``on_bad_image="skip"`` is
replaced by the next sound one of its shard, which is a function of the shard alone; it is named once in each process
that reads, and counted once over all of them in the file `journal`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastambient.data.decode import BadEntry
from fastambient.data.downloads import CACHE_GB, Downloads
from fastambient.data.ids import image_id
from fastambient.data.items import ON_BAD_IMAGE, EncodedSource, Entry, file_stamp, open_binary
from fastambient.data.order import permutation
from fastambient.data.shard_index import find_shards
from fastambient.data.tars import Shard, index_shard, load_index, read_image, save_index
from fastambient.errors import FastambientError, InputError, check_seed, data_option

WINDOW = 8  # shards whose samples are mixed

_WINDOW_BIT = 40  # a window's permutation has the id (window + 1) << 40 | epoch, the shards' the epoch itself
_K = TypeVar("_K")
_V = TypeVar("_V")


class ShardStream(EncodedSource):
    """Rows of a loader (rows.py), and a source, too: row numbers count the shards' images in the pattern's order.

    Parameters
    ----------
    spec : a tar, a folder of tars, a pattern such as `shards-{0000..0099}.tar` or `shards/*.tar`; or an http(s)
        address, with {a,b} and {000..123} alone
    seed : run seed, 64 bits: the order
    resolution : pixels that pictures are cropped and resized to; None: their own size
    window : shards whose samples are mixed; another number is another order
    on_bad_image : "error" or "skip"
    index : `shards.json` elsewhere than beside the shards: a path or an http(s) address
    cache : folder for downloaded shards, and for the indices of all; None: `fastambient/shards` in the user's folder
        for caches
    cache_bytes : how large it may become

    Raises
    ------
    InputError : nothing there, an index that does not fit the shards, or pictures that break a rule of a source
    """

    def __init__(
        self,
        spec: str | os.PathLike[str],
        *,
        seed: int,
        resolution: int | None = None,
        window: int = WINDOW,
        on_bad_image: str = "error",
        index: str | None = None,
        cache: Path | None = None,
        cache_bytes: int = round(CACHE_GB * 1e9),
    ) -> None:
        if on_bad_image not in ON_BAD_IMAGE:
            raise InputError(f"--on-bad-image must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image!r}")
        if window < 1:
            raise InputError(f"a window must hold at least 1 shard, got {window}")
        check_seed("the run seed", seed)
        super().__init__(Path(str(spec)).name, resolution, on_bad_image)
        found = find_shards(str(spec), index)
        if resolution is None and found.resolution is None:
            raise InputError(
                f"{spec}: the images are not square or not of one size; pass {data_option('resolution', 'R')} to crop "
                "and resize all of them"
            )
        self.resolution = resolution or found.resolution or 0
        self.channels, self.num_classes, self.shards, self.seed = found.channels, found.classes, found.shards, seed
        self.shape = (self.channels, self.resolution, self.resolution)
        self._counts = torch.tensor([shard.images for shard in self.shards], dtype=torch.int64)
        self._starts = torch.cumsum(self._counts, 0) - self._counts
        self.length, self.window = int(self._counts.sum()), min(window, len(self.shards))
        if not self.length:
            raise InputError(f"no image in {spec}: expected entries named KEY.png, .jpg, .jpeg, .webp or .bmp")
        self._remote, self._cache = found.remote, Downloads(cache, cache_bytes)
        if found.remote:
            largest = sorted((shard.bytes for shard in self.shards), reverse=True)
            self._cache.check_room(sum(largest[: 2 * self.window]), f"two windows of {self.window} shards")
        self._forget()

    journal: Path | None = None  # where every process notes a picture that it skips: a line ["name", "reason"]

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(vars(self))
        for name in ("_orders", "_windows", "_tables", "_lock", "_ahead"):
            kept.pop(name)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        """What is computed or looked up when it is needed."""
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._windows: dict[tuple[int, int], Tensor] = {}
        self._tables: dict[int, Shard] = {}
        self._lock = threading.RLock()
        self._ahead: threading.Thread | None = None

    # The order

    def index(self, positions: Tensor) -> Tensor:
        """Which row stands at each of `positions` (int64 [N] >= 0): int64 [N] on the CPU. Downloads of the window
        that is met, and of the next one, begin in a thread."""
        positions = positions.cpu()
        epochs, within = positions // self.length, positions % self.length
        rows = torch.empty_like(positions)
        for epoch in torch.unique(epochs).tolist():
            (here,) = torch.nonzero(epochs == epoch, as_tuple=True)
            _, ends = self._order(epoch)
            windows = torch.searchsorted(ends, within[here], right=True)
            for number in torch.unique(windows).tolist():
                chosen = here[windows == number]
                start = int(ends[number - 1]) if number else 0
                rows[chosen] = self._window(epoch, number)[within[chosen] - start]
        return rows

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The shards of an epoch in their order, and the position in it where each window ends."""

        def compute() -> tuple[Tensor, Tensor]:
            order = permutation(len(self.shards), seed=self.seed, epoch=epoch)
            ends = torch.cumsum(self._counts[order], 0)
            last = ends[-1:] if len(ends) % self.window else ends[:0]
            return order, torch.cat([ends[self.window - 1 :: self.window], last])

        with self._lock:
            return _remember(self._orders, epoch, compute, keep=2)

    def _shards_of(self, epoch: int, number: int) -> list[int]:
        order, _ = self._order(epoch)
        return order[number * self.window : (number + 1) * self.window].tolist()

    def _window(self, epoch: int, number: int) -> Tensor:
        """The rows of a window in their order: int64 [n]."""

        def compute() -> Tensor:
            spans = [(int(self._starts[s]), int(self._counts[s])) for s in self._shards_of(epoch, number)]
            rows = torch.cat([torch.arange(start, start + count) for start, count in spans])
            key = (number + 1 << _WINDOW_BIT) | epoch
            return rows[permutation(len(rows), seed=self.seed, epoch=key)]

        with self._lock:
            if self._remote and (epoch, number) not in self._windows:
                self._fetch_ahead(epoch, number)
            return _remember(self._windows, (epoch, number), compute, keep=2)

    def _fetch_ahead(self, epoch: int, number: int) -> None:
        """Download this window and the next one in a thread: whoever reads a shard finds it, or waits for it."""
        if self._ahead is not None and self._ahead.is_alive():
            return
        following = (epoch, number + 1) if self._shards_of(epoch, number + 1) else (epoch + 1, 0)
        wanted = self._shards_of(epoch, number) + self._shards_of(*following)
        self._ahead = threading.Thread(target=self._download, args=(wanted,), daemon=True, name="downloads")
        self._ahead.start()

    def _download(self, wanted: list[int]) -> None:
        for number in wanted:
            try:
                self._path(number)
            except FastambientError:
                return  # said by whoever reads the shard

    # The samples

    def fetch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Images uint8 [n, C, H, W], their ids int64 [n] and, in a labelled set, labels int64 [n] of the rows `index`
        (int64 [n])."""
        images = np.empty((len(index), *self.shape), np.uint8)
        labels = np.empty(len(index), np.int64)
        numbers = self._number(index)
        order = np.argsort(index, kind="stable")  # as they lie in the files
        for chosen in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(index) else ():
            number = int(numbers[chosen[0]])
            for entries, place in self._opened(number, index[chosen], chosen):
                images[place], labels[place] = self._sound(entries)
        found: dict[str, np.ndarray] = {
            "images": images,
            "ids": np.array([image_id(image) for image in images], np.int64),
        }
        return found | ({"labels": labels} if self.num_classes else {})

    def _number(self, rows: np.ndarray) -> np.ndarray:
        """Which shard each row lies in; empty shards hold none."""
        return np.searchsorted((self._starts + self._counts).numpy(), rows, side="right")

    def _opened(self, number: int, rows: np.ndarray, places: np.ndarray) -> Iterator[tuple[Iterator[Entry], int]]:
        """(its entry and all that follow in the shard, from the start again after its end; place) of each row."""
        start, count = int(self._starts[number]), int(self._counts[number])
        path, opened = self._open(number)
        with opened as file:  # before the index: a file that is open stays, whoever tidies the cache
            shard = self._table(number, path)
            entry = partial(self._entry, file, shard, start)
            for row, place in zip((rows - start).tolist(), places.tolist(), strict=True):
                yield (entry((row + k) % count) for k in range(count)), place

    def _open(self, number: int) -> tuple[Path, IO[bytes]]:
        """A shard and its open file; downloaded again where another process tidied it away before it was opened."""
        for left in range(4, -1, -1):
            path = self._path(number)
            try:
                return path, open_binary(path)
            except InputError:
                if not (self._remote and left) or path.exists():
                    raise
        raise AssertionError("the last try returns or raises")

    def _entry(self, file: Any, shard: Shard, start: int, i: int) -> Entry:
        name, open_image = shard.image_name(i), partial(read_image, file, shard, i)
        label = int(shard.labels[i])
        return Entry(start + i, f"{shard.name}: {name}", f"{shard.path}: {name}", open_image, label, dict)

    def _sound(self, entries: Iterator[Entry]) -> tuple[np.ndarray, int]:
        """Image and label of the first of `entries` that can be read."""
        for entry in entries:
            try:
                return self._decode(entry), entry.label
            except BadEntry as error:
                self._bad(entry.name, entry.where, error)
                where = entry.where.partition(": ")[0]
        raise InputError(f"none of the images of {where} can be read; replace the shard")

    def _bad(self, name: str, where: str, error: BadEntry) -> None:
        is_new = name not in self.skipped
        super()._bad(name, where, error)
        if is_new and self.journal is not None:
            line = json.dumps([name, str(error)]).encode() + b"\n"
            fd = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(fd, line)  # in one piece, so that the lines of several processes do not mix
            finally:
                os.close(fd)

    def _path(self, number: int) -> Path:
        shard = self.shards[number]
        if not self._remote:
            return Path(shard.place)
        return self._cache.get(shard.place, size=shard.bytes, sha256=shard.sha256)

    def _table(self, number: int, path: Path) -> Shard:
        with self._lock:
            return _remember(self._tables, number, partial(self._look_through, number, path), keep=2 * self.window)

    def _look_through(self, number: int, path: Path) -> Shard:
        listed = self.shards[number]
        size = file_stamp(path, listed.name)[1]
        if size != listed.bytes:
            raise InputError(
                f"{path} has {size:,} bytes, where its shards.json says {listed.bytes:,}: it was changed or cut short; "
                "restore it, or remove shards.json to have all shards looked through again"
            )
        shard = self._kept_index(path, listed.name)
        labelled = int((shard.labels >= 0).sum())
        if len(shard.labels) != listed.images or labelled != (listed.images if self.num_classes else 0):
            raise InputError(
                f"{path} holds {len(shard.labels):,} images, {labelled:,} with a label, where its shards.json says "
                f"{listed.images:,} of {self.num_classes:,} classes; remove shards.json, or make it again"
            )
        if shard.labels.max(initial=-1) >= self.num_classes > 0:
            raise InputError(
                f"{path} has the class {shard.labels.max()}, above the {self.num_classes:,} of shards.json"
            )
        return shard

    def _kept_index(self, path: Path, name: str) -> Shard:
        """The index of a shard, looked through by one process of the machine: that takes a tenth of the time of
        decoding it, which each of many processes would spend."""

        def make(file: IO[bytes]) -> None:
            save_index(file, index_shard(path, name, self._bad, lambda _: None))

        key = " ".join(map(str, (path.absolute(), *file_stamp(path, name))))
        kept = self._cache.made(key, "index.npz", make)
        try:
            return load_index(kept, path, name)
        except BadEntry:  # it was tidied away meanwhile, or the disk is failing
            return index_shard(path, name, self._bad, lambda _: None)

    # A source's side

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for number, first, end in self._spans(start, stop):
            rows = np.arange(first, end)
            for entries, _ in self._opened(number, rows, rows):
                yield next(entries)

    def _stamps(self, start: int, stop: int) -> Iterable[tuple[str, int, int]]:
        for number, _, _ in self._spans(start, stop):
            yield self.shards[number].name, self.shards[number].bytes, self.shards[number].images

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, its first row, end) of the shards that hold rows start .. stop - 1, cut to these."""
        ends = self._starts + self._counts
        number = int(torch.searchsorted(ends, start, right=True))
        while start < stop:
            end = min(int(ends[number]), stop)
            if start < end:
                yield number, start, end
            start, number = max(start, end), number + 1


def read_journal(path: Path) -> dict[str, str]:
    """name -> reason of the pictures that a stream's processes have skipped so far, each once."""
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for line in path.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError):  # a kill may have cut off a line
            name, reason = json.loads(line)
            found[name] = reason
    return found


def _remember(memory: dict[_K, _V], key: _K, compute: Callable[[], _V], *, keep: int) -> _V:
    """memory[key], computed where it is not there; of the others the `keep` - 1 that were used last stay."""
    value = memory.pop(key) if key in memory else compute()
    while len(memory) >= keep:
        memory.pop(next(iter(memory)))
    memory[key] = value
    return value
