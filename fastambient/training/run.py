"""The run folder: where everything of a run lies, and the lock that keeps a second writer out.

config.yaml         the whole settings tree
noise_seed          the secret of the noise contract, readable by its owner only; never exported
store/              the prepared data set, where the run was started from a SOURCE
store_sha256        of the manifest of the store that the run was started on, wherever it lies
stats.jsonl         one object per optimizer step
skipped.jsonl       [image, reason], of the images that a stream left out: a line from each process that met one
sigma_loss.jsonl    loss per noise level, one object per checkpoint
audits.jsonl        copying and quality while it trained, one object per audit, drawn in audits.png and audits.svg
begun.json          run, nimg, seconds: where this one took over the beginning of another (in a sweep)
snapshots/          EMA weights of audits, where a rule may stop the run and go back to them
checkpoints/        nimg-000000064000/ ...
model.safetensors   EMA weights, self-contained
samples/  metrics.json  tensorboard/
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fastambient.data.store import Store, is_store
from fastambient.data.streaming import ShardStream
from fastambient.errors import InputError, nearest_beside
from fastambient.files import remove_leftovers, sha256_file, write_bytes
from fastambient.training.config import Settings, check, read_yaml
from fastambient.training.data import open_stream


class RunFolder:
    """Names inside a run folder, and its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.stats = path / "stats.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.sigma_loss = path / "sigma_loss.jsonl"
        self.audits = path / "audits.jsonl"
        self.begun = path / "begun.json"
        self.snapshots = path / "snapshots"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "model.safetensors"
        self.samples = path / "samples"
        self.metrics = path / "metrics.json"
        self.tensorboard = path / "tensorboard"
        self.store = path / "store"
        self._noise_seed = path / "noise_seed"
        self._store_sha256 = path / "store_sha256"
        self._clean_sha256 = path / "clean_sha256"
        self._stream_sha256 = path / "stream_sha256"

    @staticmethod
    def new_name(parent: Path = Path("runs")) -> Path:
        """An unused folder name from the time of day, such as runs/20260131-235959."""
        stem = datetime.now().strftime("%Y%m%d-%H%M%S")
        path, k = parent / stem, 1
        while path.exists():
            path, k = parent / f"{stem}-{k}", k + 1
        return path

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The run at `path`; InputError where there is none."""
        run = cls(path)
        if not path.is_dir():
            raise InputError(f"there is no run folder {path}{nearest_beside(path)}")
        if not run.config.is_file():
            raise InputError(f"{path} is no run folder: it holds no config.yaml{_what_it_is(path)}")
        return run

    @property
    def store_path(self) -> Path:
        """The store this run trains on: its own, or the one that config.yaml names."""
        return self.store if self.store.is_dir() else Path(self.read_settings().data.source)

    def pin_store(self, store: Store, clean: Store | None = None) -> None:
        """Remember which stores a run was started on: another split or noised copy must not take their place."""
        for file, pinned in ((self._store_sha256, store), (self._clean_sha256, clean)):
            if pinned is not None:
                write_bytes(file, f"{sha256_file(pinned.path / 'manifest.json')}\n".encode())

    def open_store(self, *, verify: bool = True, at: Path | None = None) -> Store:
        """The store of this run. InputError where another one lies in its place by now: its noise would be a second
        observation of every picture, and images that were held out would train.

        at : where it lies now, if it was moved
        """
        path = at or self.store_path
        if at is None and not path.exists():
            raise InputError(
                f"{self.path} was trained on the store {path}, which is not there: put it back, or write where it"
                f" lies now into data.source of {self.config}; evaluate also takes --data STORE"
            )
        if at is not None and not self._store_sha256.is_file():
            raise InputError(f"--data {at}: {self.path} does not say which store it was trained on; leave --data out")
        return self._unchanged(Store.open(path, verify=verify), self._store_sha256)

    def trained_on(self, store: Store) -> bool:
        """Whether this run's store has the same manifest: same images, in the same order, on the same sides."""
        pinned = self._store_sha256
        return pinned.is_file() and pinned.read_text("ascii", "replace").strip() == sha256_file(
            store.path / "manifest.json"
        )

    def open_clean(self, *, verify: bool = True) -> Store | None:
        """The store of clean images beside a hand-out, or None; errors as `open_store`'s."""
        path = self.read_settings().data.clean
        return None if path is None else self._unchanged(Store.open(path, verify=verify), self._clean_sha256)

    def pin_stream(self, stream: ShardStream) -> None:
        """Remember which shards are streamed: another list of them would be another order, and other ids."""
        write_bytes(self._stream_sha256, f"{stream.fingerprint(0, stream.length)}\n".encode())

    def open_stream(self) -> ShardStream:
        """The shards that this run streams. InputError where they are others by now."""
        stream = open_stream(self.read_settings())
        pinned = self._stream_sha256.read_text(encoding="ascii", errors="replace").strip()
        if pinned != stream.fingerprint(0, stream.length):
            raise InputError(
                f"the shards of {self.read_settings().data.source} are not those that {self.path} was started on (their"
                " names, sizes or numbers of images differ); put those back, or start another run"
            )
        stream.journal = self.skipped.absolute()
        return stream

    def _unchanged(self, store: Store, pinned: Path) -> Store:
        if pinned.is_file():
            expected = pinned.read_text(encoding="ascii", errors="replace").strip()
            if expected != sha256_file(store.path / "manifest.json"):
                raise InputError(
                    f"{store.path} is not the store that {self.path} was started on: it was prepared anew since;"
                    " put that one back, or start another run"
                )
        return store

    def write_settings(self, settings: Settings) -> None:
        text = yaml.safe_dump(settings.tree(), sort_keys=False, default_flow_style=None)
        write_bytes(self.config, text.encode())

    def read_settings(self) -> Settings:
        settings = Settings().with_values(read_yaml(self.config), where=str(self.config))
        check(settings)
        return settings

    def write_noise_seed(self, seed: int) -> None:
        write_bytes(self._noise_seed, f"{seed:016x}\n".encode(), mode=0o600)

    def read_noise_seed(self) -> int:
        """The secret of the noise contract: 16 hex digits."""
        try:
            text = self._noise_seed.read_text(encoding="ascii").strip()
            if len(text) != 16:
                raise ValueError("not 16 hex digits")
            return int(text, 16)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._noise_seed} cannot be used ({error}): without it the fixed noise cannot be continued"
            ) from None

    def read_stats(self) -> list[dict[str, Any]]:
        return _read_lines(self.stats)

    def images_seen(self) -> int:
        """nimg of the last step that is logged; 0 for a run that has not begun."""
        try:
            with open(self.stats, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                return int(json.loads(file.read().rsplit(b"\n", 2)[-2])["nimg"])
        except (OSError, IndexError, ValueError, KeyError):
            return 0  # not started, or a line that is being written

    def read_sigma_loss(self) -> list[dict[str, Any]]:
        return _read_lines(self.sigma_loss)

    def read_audits(self) -> list[dict[str, Any]]:
        return _read_lines(self.audits)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing, and drop what a killed writer left half-written. The lock vanishes with the
        process, however it ends."""
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process is training in {self.path}; wait for it or stop it") from None
        try:
            for folder in (self.path, self.checkpoints, self.snapshots):
                remove_leftovers(folder)
            yield
        finally:
            lock.release()


def _what_it_is(path: Path) -> str:
    """What a folder that is no run is instead, where that can be told, to name the one that was meant."""
    if is_store(path):
        return "; it is a store: train on it (train --data), and name that run"
    runs = sorted(file.parent for file in path.glob("*/config.yaml"))
    if runs:
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        return f"; runs lie in it: {runs[0]}{more}"
    return ""


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def truncate(path: Path, size: int) -> None:
    """Drop what was logged after the checkpoint that a run resumes from."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
