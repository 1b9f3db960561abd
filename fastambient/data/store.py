"""The store: a prepared, split and (optionally) noised data set in one folder. Format version 1.

    manifest.json            what is here, and the size and SHA-256 of every other file but the noise seed's
    noise_seed               the seed of the fixed noise, 16 hex digits, readable by its owner alone
    train/, holdout/         images-00000.npy ...   uint8 [n, C, H, W]
                             ids.npy                int64 [N], image ids
                             labels.npy             int64 [N], only in a labelled set
    train/noisy-00000.npy    float16 or float32 [n, C, H, W]: x_n = x0 + sigma_tn * eps, unflipped, if asked for

Who has the noise seed and x_n has x0. So the seed stands in no other file, and its hash in none either: a small seed
is found from its hash by trying.

A store is written under a temporary name and renamed, so that nobody ever sees half of one.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastambient.console import progress, warn
from fastambient.data.archives import is_unsafe_name
from fastambient.data.ids import image_id
from fastambient.data.order import permutation
from fastambient.data.shards import ShardedArray, write_npy
from fastambient.data.sources import Source
from fastambient.errors import FastambientError, InputError, check_seed, data_option
from fastambient.files import new_folder, refuse_existing, sha256_file, write_bytes, write_json
from fastambient_kernels.noise import Stream, normal

FORMAT = "fastambient-store"
VERSION = 1
NOISY: dict[str, type | None] = {"none": None, "float16": np.float16, "float32": np.float32}
SHARD_BYTES = 256 << 20

_MIN_SIDE = 2  # different images on either side that an evaluation needs: a nearest and a second nearest
_MAX_HOLDOUT = 10_000
_CHUNK = 512  # images noised or counted at once


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a store's manifest (of any version; `Store.open` checks it)."""
    file = Path(path) / "manifest.json"
    try:  # "" would be the folder one is in, and a pipe would be waited for
        return bool(str(path)) and file.is_file() and json.loads(file.read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    *,
    sigma_tn: float | None = None,
    noise_seed: int | None = None,
    train: int | None = None,
    holdout: int | None = None,
    split_seed: int = 0,
    noisy: str = "none",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Store:
    """Read a source once and write it as a store.

    The split divides distinct pictures, by a permutation of their ids: it depends on the pictures, the counts and
    `split_seed`, not on file names. Exact duplicates stay in the data, all copies on one side, and mirror images with
    them: a run with x-flips trains on both.

    Parameters
    ----------
    source : an open source
    out : the folder to make
    sigma_tn : noise level of the training set, in units of the [-1, 1] images; needed for noised copies
    noise_seed : seed of the fixed noise, 64 bits; default: 64 bits from the operating system. A secret.
    train, holdout : numbers of images. By default a tenth is held out (at least 2, which an evaluation needs, of 4
        images on; at most 10,000) and the rest trains; of the built-in digits 100 train and the rest is held out.
    split_seed : which images train, 64 bits
    noisy : "none", or the dtype of stored noised training images: "float16", "float32"
    force : replace an existing store (never another kind of folder)
    shard_bytes : size of a shard of uint8 images; the memory needed is about that of one shard

    Raises
    ------
    InputError : a bad image or number, or `out` exists
    FastambientError : writing failed, for instance on a full disk. Nothing is left behind.
    """
    out = Path(out)
    _check_arguments(
        out, sigma_tn=sigma_tn, noisy=noisy, force=force, train=train, holdout=holdout, split_seed=split_seed
    )
    if noise_seed is None:
        noise_seed = secrets.randbits(64)
    check_seed("--noise-seed", noise_seed, secret=True)
    try:
        with new_folder(out, force=force) as folder:
            manifest = _write(
                folder, source, sigma_tn=sigma_tn, noise_seed=noise_seed, train=train, holdout=holdout,
                split_seed=split_seed, noisy=noisy, shard_bytes=shard_bytes,
            )  # fmt: skip
            write_bytes(folder / "noise_seed", f"{noise_seed:016x}\n".encode(), mode=0o600)
            write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise FastambientError(
            f"the store {out} could not be written: {error.strerror or error}; nothing was left behind"
        ) from error
    store = Store.open(out, verify=False)
    there = [len(np.unique(side.ids)) for side in (store.train, store.holdout)]
    if min(there) < _MIN_SIDE:
        warn(
            f"too few images to evaluate a run: {there[0]} different ones train and {there[1]} are held out, where "
            f"evaluate needs {_MIN_SIDE} of each"
        )
    return store


def _check_arguments(
    out: Path, *, sigma_tn: float | None, noisy: str, force: bool, train: int | None, holdout: int | None,
    split_seed: int,
) -> None:  # fmt: skip
    if noisy not in NOISY:
        raise InputError(f"--noisy must be one of {', '.join(NOISY)}, got {noisy!r}")
    if sigma_tn is not None and not (math.isfinite(sigma_tn) and sigma_tn >= 0):
        raise InputError(f"--sigma-tn must be a finite number, 0 or more, got {sigma_tn}")
    if sigma_tn is None and noisy != "none":
        raise InputError(f"--noisy {noisy} needs a noise level: pass --sigma-tn S")
    if train is not None and train < 1:
        raise InputError(f"--train must be 1 or more, got {train}")
    if holdout is not None and holdout < 0:
        raise InputError(f"--holdout must be 0 or more, got {holdout}")
    check_seed("--split-seed", split_seed)
    refuse_existing(out, force=force)
    if out.is_dir() and any(out.iterdir()) and not is_store(out):
        raise InputError(f"{out} is no store, so --force does not replace it; choose another name")


def _write(
    folder: Path, source: Source, *, sigma_tn: float | None, noise_seed: int, train: int | None, holdout: int | None,
    split_seed: int, noisy: str, shard_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    shape = (source.channels, source.resolution, source.resolution)
    # Which side a picture belongs to is known when all ids are: pictures are decoded once, into a scratch file.
    scratch = folder / "decoded"
    ids, pictures, labels = _decode(source, scratch)
    decoded = np.memmap(scratch, np.uint8, mode="r", shape=(len(ids), *shape))
    sides = dict(zip(("train", "holdout"), _split(pictures, source, train, holdout, split_seed), strict=True))
    shard_rows = max(1, shard_bytes // math.prod(shape))
    dtype, histogram = NOISY[noisy], np.zeros(256, np.int64)
    with progress(f"writing {source.name}", sum(map(len, sides.values()))) as advance:
        for side, rows in sides.items():
            (folder / side).mkdir()
            write_npy(folder / side / "ids.npy", ids[rows])
            if source.num_classes:
                write_npy(folder / side / "labels.npy", labels[rows])
            for number, start in enumerate(range(0, len(rows), shard_rows)):
                chosen = rows[start : start + shard_rows]
                shard = decoded[chosen]
                write_npy(folder / side / f"images-{number:05d}.npy", shard)
                if side == "train":
                    for i in range(0, len(shard), _CHUNK):
                        histogram += np.bincount(shard[i : i + _CHUNK].reshape(-1), minlength=256)
                    if dtype is not None and sigma_tn is not None:
                        noised = _add_noise(shard, ids[chosen], sigma_tn, noise_seed, dtype)
                        write_npy(folder / side / f"noisy-{number:05d}.npy", noised)
                advance(len(shard))
    del decoded
    scratch.unlink()
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": source.name,
        "counts": {"images": len(ids), "skipped": len(source.skipped)},
        "shape": list(shape),
        "labels": {"num_classes": source.num_classes, "names": source.class_names},
        "sigma_tn": sigma_tn,
        "noisy": noisy,
        "sigma_data": _standard_deviation(histogram, source.name),
        "split": {
            "seed": split_seed, "train": len(sides["train"]), "holdout": len(sides["holdout"]),
            "duplicates": len(ids) - len(np.unique(ids)),
            # of training images: both an image and its mirror image are there
            "mirrored_pairs": len(np.unique(ids[sides["train"]])) - len(np.unique(pictures[sides["train"]])),
        },
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in files
        },
    }  # fmt: skip


def _decode(source: Source, scratch: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Append every picture's pixels to a file; (ids, pictures, labels), int64 [N] each. `pictures` are the ids, but an
    image and its mirror image, where both are there, are one picture."""
    ids, mirrored, labels = [], [], []
    with open(scratch, "wb") as file, progress(f"reading {source.name}", source.length) as advance:
        for item in source.read():
            file.write(item.image.tobytes())
            ids.append(image_id(item.image))
            mirrored.append(image_id(item.image[..., ::-1]))
            labels.append(item.label)
            advance(1)
    if source.skipped:
        warn(f"{len(source.skipped):,} of {len(source.skipped) + len(ids):,} images were skipped")
    if not ids:
        raise InputError(f"no image of {source.name} can be read")
    images, mirrors = np.array(ids, np.int64), np.array(mirrored, np.int64)
    pictures = np.where(np.isin(mirrors, images), np.minimum(images, mirrors), images)
    return images, pictures, np.array(labels, np.int64)


def _split(
    pictures: np.ndarray, source: Source, train: int | None, holdout: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of both sides, ascending. Copies of one picture never straddle."""
    n = len(pictures)
    asked = {"train": train, "holdout": holdout}
    if holdout is None:
        least = _MIN_SIDE if n >= 2 * _MIN_SIDE else 0
        holdout = min(max(n // 10, least), _MAX_HOLDOUT, n - min(train or 1, n))
        if source.default_train is not None:
            holdout = n - min(train or source.default_train, n)
    if train is None:
        train = n - holdout if source.default_train is None else min(source.default_train, n - holdout)
    if train < 1 or train + holdout > n:
        given = " and ".join(data_option(name, value) for name, value in asked.items() if value is not None)
        raise InputError(
            f"{source.name} has {n:,} images, too few for {given}: at least one image must train, and none does both"
        )
    _, group, sizes = np.unique(pictures, return_inverse=True, return_counts=True)
    side = np.zeros(len(sizes), np.int8)  # 0: unused
    takes_rest = train + holdout == n
    free = permutation(len(sizes), seed=seed).numpy()
    for number, name, wanted in ((1, "train", train), (2, "holdout", holdout)):
        taken = free if number == 2 and takes_rest else _first_fit(free, sizes, wanted)
        side[taken] = number
        free = free[side[free] == 0]
        count = int(sizes[taken].sum())
        if asked[name] not in (None, count) or (name == "train" and not count):
            raise InputError(
                f"{name} {wanted} would put copies or mirror images of one picture on both sides: {source.name} holds "
                f"{n:,} images of {len(sizes):,} distinct pictures; pass {data_option(name, count or n)} instead"
            )
    sides = side[group]
    return np.flatnonzero(sides == 1), np.flatnonzero(sides == 2)


def _first_fit(groups: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """The first of `groups` that fill `wanted` images; one too large for what is left is passed over."""
    ends = np.cumsum(sizes[groups])
    whole = int(np.searchsorted(ends, wanted, side="right"))
    taken, left = list(groups[:whole]), wanted - (int(ends[whole - 1]) if whole else 0)
    for group in groups[whole:]:
        if left == 0:
            break
        if sizes[group] <= left:
            taken.append(group)
            left -= int(sizes[group])
    return np.array(taken, np.int64)


def _standard_deviation(histogram: np.ndarray, name: str) -> float:
    """Root mean square deviation from the global mean of pixels / 127.5 - 1, exact for any number of images."""
    values = np.arange(256) / 127.5 - 1
    mean = float((histogram * values).sum() / histogram.sum())
    deviation = math.sqrt(float((histogram * (values - mean) ** 2).sum() / histogram.sum()))
    if not deviation > 1e-6:
        raise InputError(f"the training images of {name} are all of one colour: there is nothing to learn from them")
    return deviation


def _add_noise(images: np.ndarray, ids: np.ndarray, sigma_tn: float, noise_seed: int, dtype: type) -> np.ndarray:
    """x_n = x0 + sigma_tn * eps, by the same float32 operations as the noise operator's."""
    noised: np.ndarray = np.empty(images.shape, dtype)
    for i in range(0, len(images), _CHUNK):
        x0 = torch.from_numpy(images[i : i + _CHUNK]).float() / 127.5 - 1
        eps = normal(torch.from_numpy(ids[i : i + _CHUNK]), x0[0].numel(), seed=noise_seed, stream=Stream.FIXED)
        noised[i : i + _CHUNK] = (x0 + sigma_tn * eps.view_as(x0)).numpy()
    return noised


@dataclass(frozen=True)
class Split:
    """One side of a store. `ids` and `labels` are int64 [N] arrays in memory; images stay on disk."""

    images: ShardedArray  # uint8 [N, C, H, W]
    ids: np.ndarray
    labels: np.ndarray | None
    noisy: ShardedArray | None  # float16 or float32 [N, C, H, W]: x_n, unflipped

    def __len__(self) -> int:
        return len(self.images)


class Store:
    """An open store.

    Attributes
    ----------
    path, manifest : where it lies, and its manifest
    shape, channels, resolution : [C, H, W] and its parts
    num_classes, class_names : 0 and None without labels
    sigma_data : standard deviation of the training images in [-1, 1]
    sigma_tn : noise level it was prepared for, or None
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
            counts = {side: int(manifest["split"][side]) for side in ("train", "holdout")}
            self._files = sorted(manifest["files"])
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
            raise InputError(f"{path} is no store: {file.name} cannot be read ({error.strerror})") from error
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

    def _side(self, side: str, count: int, noisy: type | None) -> Split:
        def array(kind: str, shape: tuple[int, ...], dtype: type) -> ShardedArray:
            paths = [self.path / name for name in self._files if re.fullmatch(rf"{side}/{kind}(-\d+)?\.npy", name)]
            return ShardedArray(paths, (count, *shape), np.dtype(dtype))

        return Split(
            images=array("images", self.shape, np.uint8),
            ids=array("ids", (), np.int64)[:],
            labels=array("labels", (), np.int64)[:] if self.num_classes else None,
            noisy=None if noisy is None else array("noisy", self.shape, noisy),
        )


def _check_files(path: Path, manifest: dict[str, Any], *, verify: bool) -> None:
    try:
        files = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path / 'manifest.json'} is damaged ({error!r}); prepare the store again") from error
    for name, _, _ in files:
        if is_unsafe_name(name):
            raise InputError(f"{path / 'manifest.json'} lists the unsafe name {name!r}; prepare the store again")
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
