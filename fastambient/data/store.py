"""The store: a prepared, split and (optionally) noised data set in one folder. Format version 1.

    manifest.json            what is here, and the size and SHA-256 of every other file but the noise seed's
    noise_seed               the seed of the fixed noise, 16 hex digits, readable by its owner alone
    noise_levels             every sigma_tn that this seed has noised the images at, one a line; runs add theirs
    train/, holdout/         images-00000.npy ...   uint8 [n, C, H, W], about 256 MB each
                             ids.npy                int64 [N], image ids
                             labels.npy             int64 [N], only in a labelled set
                             names.jsonl            what each image is called in the source, one JSON string a line
                             text.jsonl             sidecar text, one JSON object an image, where there is any
                             names_offsets.npy, text_offsets.npy   int64 [N + 1], where their lines begin
    train/noisy-00000.npy    float16 or float32 [n, C, H, W]: x_n = x0 + sigma_tn * eps, unflipped, if asked for
    near_duplicates.json     groups of near-duplicates, if they were looked for

Who has the noise seed and x_n has x0. So the seed stands in no other file, and its hash in none either: a small seed
is found from its hash by trying. A hand-out (``"hand_out": true``, see handout.py) has no seed, no clean image and no
name.

A store is written by preparation.py under a temporary name and renamed, so that nobody ever sees half of one.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastambient.console import progress
from fastambient.data.archives import is_unsafe_name
from fastambient.data.shards import ShardedArray
from fastambient.data.text import Names, Texts
from fastambient.errors import InputError
from fastambient.files import sha256_file

FORMAT = "fastambient-store"
VERSION = 1
_L = TypeVar("_L", Texts, Names)
NOISY: dict[str, type | None] = {"none": None, "float16": np.float16, "float32": np.float32}


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a store's manifest (of any version; `Store.open` checks it)."""
    file = Path(path) / "manifest.json"
    try:  # "" would be the folder one is in, and a pipe would be waited for
        return bool(str(path)) and file.is_file() and json.loads(file.read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


@dataclass(frozen=True)
class Split:
    """One side of a store. `ids` and `labels` are int64 [N] arrays in memory; images stay on disk."""

    images: ShardedArray | None  # uint8 [N, C, H, W]; None in a hand-out, which has no clean image
    ids: np.ndarray
    labels: np.ndarray | None
    noisy: ShardedArray | None  # float16 or float32 [N, C, H, W]: x_n, unflipped
    texts: Texts | None  # sidecar text
    names: Names | None  # in the source; None in a hand-out and in a store of an older program

    def __len__(self) -> int:
        return len(self.ids)


class Store:
    """An open store.

    Attributes
    ----------
    path, manifest : where it lies, and its manifest
    shape, channels, resolution : [C, H, W] and its parts
    num_classes, class_names : 0 and None without labels
    sigma_data : standard deviation of the training images in [-1, 1]
    sigma_tn : noise level it was prepared for, or None
    hand_out : whether it holds noised images alone
    train, holdout : its two sides
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        try:
            self.path, self.manifest = path, manifest
            channels, height, width = (int(value) for value in manifest["shape"])
            self.shape, self.channels, self.resolution = (channels, height, width), channels, width
            self.num_classes = int(manifest["labels"]["num_classes"])
            self.class_names: list[str] | None = manifest["labels"]["names"]
            self.sigma_data = float(manifest["sigma_data"])
            self.sigma_tn = None if manifest["sigma_tn"] is None else float(manifest["sigma_tn"])
            noisy = NOISY[manifest["noisy"]]
            self.hand_out = manifest.get("hand_out", False) is True
            counts = {side: int(manifest["split"][side]) for side in ("train", "holdout")}
            self._files = sorted(manifest["files"])
            if self.hand_out and noisy is None:
                raise ValueError("a hand-out without noised images")
            if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
                raise ValueError(f"sigma_data is {self.sigma_data}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path / 'manifest.json'} is damaged ({error!r}); prepare the store again") from error
        self.train = self._side("train", counts["train"], noisy)
        self.holdout = self._side("holdout", counts["holdout"], None)

    @staticmethod
    def open(path: str | os.PathLike[str], *, verify: bool = True) -> Store:
        """Open a store; `verify` also checks every file's SHA-256, which reads it all once.

        Raises
        ------
        InputError : no store, another version, or a file that is missing or not the one that was written
        """
        path = Path(path)
        file = path / "manifest.json"
        try:
            manifest = json.loads(file.read_bytes())
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}")
        except OSError as error:
            raise InputError(
                f"{path} is no store: {file.name} cannot be read ({error.strerror}); name a folder that prepare made,"
                " or restore the file"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{file} is no store's manifest ({error}); prepare the store again") from error
        if manifest.get("version") != VERSION:
            raise InputError(
                f"{path} is a store of format version {manifest.get('version')}, this program reads version {VERSION}; "
                "prepare it again, or use the program that made it"
            )
        _check_files(path, manifest, verify=verify)
        return Store(path, manifest)

    @cached_property
    def noise_seed(self) -> int:
        """The seed of the fixed noise: a secret, read when it is asked for. InputError where it is missing."""
        file = self.path / "noise_seed"
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({error.strerror}); without it the fixed noise of this store cannot be made "
                "again: restore the file, or prepare a new store"
            ) from error
        except ValueError:
            text = ""
        if not re.fullmatch(r"[0-9a-f]{16}", text):
            raise InputError(f"{file} is damaged: expected 16 hex digits; restore it, or prepare a new store")
        return int(text, 16)

    def use_noise_at(self, sigma_tn: float) -> list[float] | None:
        """Put a level on record at which the store's noise seed is used, and return the others that are on record: who
        has x0 + a*eps and x0 + b*eps has x0. None where they are not known: in a store of an older program, or in one
        that cannot be written to."""
        file = self.path / "noise_levels"
        try:
            levels = {float(line) for line in file.read_text(encoding="ascii").split()}
            if sigma_tn not in levels:
                with open(file, "a", encoding="ascii") as record:
                    record.write(f"{sigma_tn!r}\n")
        except (OSError, ValueError):
            return None
        return sorted(levels - {sigma_tn})

    def check_noise(self) -> None:
        """InputError where the noise seed is missing, or is not the one that the noised images were made with. No
        checksum can say it: the seed is a secret."""
        if self.hand_out:
            return
        seed, noisy = self.noise_seed, self.train.noisy
        if noisy is None or self.train.images is None or self.sigma_tn is None:
            return
        from fastambient.data.mixed import noised  # imports this module

        some = slice(0, 8)
        again = noised(self.train.images[some], self.train.ids[some], self.sigma_tn, seed)
        if not np.allclose(noisy[some], again, rtol=1e-3, atol=1e-3):
            raise InputError(
                f"{self.path / 'noise_seed'} is not the seed, or {self.sigma_tn:g} not the sigma_tn, that the noised"
                " images of this store were made with; restore the file, or prepare a new store"
            )

    def summary(self) -> str:
        """What `prepare` says of it, in one line."""
        size = f"{self.channels}x{self.resolution}x{self.resolution}"
        if self.hand_out:
            return (
                f"{len(self.train):,} noised images of {size} at sigma_tn {self.sigma_tn:g} to hand out, no clean image"
                " and no seed"
            )
        return (
            f"{len(self.train):,} training and {len(self.holdout):,} held-out images of {size}, sigma_data"
            f" {self.sigma_data:.4g}" + (f", {self.num_classes:,} classes" if self.num_classes else "")
        )

    def _side(self, side: str, count: int, noisy: type | None) -> Split:
        def array(kind: str, shape: tuple[int, ...], dtype: type) -> ShardedArray:
            paths = [self.path / name for name in self._files if re.fullmatch(rf"{side}/{kind}(-\d+)?\.npy", name)]
            return ShardedArray(paths, (count, *shape), np.dtype(dtype))

        return Split(
            images=None if self.hand_out else array("images", self.shape, np.uint8),
            ids=array("ids", (), np.int64)[:],
            labels=array("labels", (), np.int64)[:] if self.num_classes else None,
            noisy=None if noisy is None else array("noisy", self.shape, noisy),
            texts=self._lines(Texts, f"{side}/text", count),
            names=self._lines(Names, f"{side}/names", count),
        )

    def _lines(self, kind: type[_L], stem: str, count: int) -> _L | None:
        file, offsets = f"{stem}.jsonl", f"{stem}_offsets.npy"
        if not {file, offsets} <= set(self._files):
            return None
        array = ShardedArray([self.path / offsets], (count + 1,), np.dtype(np.int64))
        return kind(self.path / file, array[:])


def _check_files(path: Path, manifest: dict[str, Any], *, verify: bool) -> None:
    try:
        files = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path / 'manifest.json'} is damaged ({error!r}); prepare the store again") from error
    for name, _, _ in files:
        if is_unsafe_name(name):
            raise InputError(f"{path / 'manifest.json'} lists the unsafe name {name!r}; prepare the store again")
    known = {name for name, _, _ in files}
    for side in ("train", "holdout"):
        for shard in sorted(path.glob(f"{side}/*.npy")):
            if shard.relative_to(path).as_posix() not in known:
                raise InputError(
                    f"{shard} is not in the store's manifest: it was added later; remove it, or prepare the store again"
                )
    total = sum(size for _, size, _ in files)
    with progress(f"checking {path.name}", total, "bytes", enabled=verify) as advance:
        for name, size, sha256 in files:
            file = path / name
            if not file.is_file():
                raise InputError(f"{file} is missing; restore it, or prepare the store again")
            if file.stat().st_size != size:
                raise InputError(
                    f"{file} has {file.stat().st_size:,} bytes instead of {size:,}; prepare the store again"
                )
            if verify and sha256_file(file) != sha256:
                raise InputError(
                    f"{file} has another checksum than in the manifest: it was changed or damaged; "
                    "prepare the store again"
                )
            advance(size)
