"""Features of pictures, remembered on disk.

The cache
---------
A file's name is the SHA-256 of the pictures' bytes, shape and dtype, of the embedder's identity (kind, weights and
preprocessing) and of the versions of the packages that make features, so those of other pictures, weights or
preprocessing have another name: there is no stale file. Each holds its own checksum, and one that does not fit is
computed anew and replaced. Files are written whole or not at all, so any number of processes may share the folder, and
it may be deleted at any time, while it is used as well. Above `LIMIT` bytes the files that were used longest ago are
removed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastambient.console import warn
from fastambient.errors import InputError
from fastambient.evaluation.embedders import Embedder
from fastambient.files import cache_folder, write_bytes
from fastambient.pictures import as_pictures

LIMIT = 4 * 2**30  # bytes in the cache; the newest file stays in any case
_VERSION = "1"
_ROWS = 1024  # pictures hashed at a time
_MADE_BY = ("torch", "timm", "torch-fidelity", "efficientnet-lite-pytorch")  # another version may resize otherwise
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_NOT_KEPT: set[Path] = set()  # folders that features could not be written to, which was said


def default_cache() -> Path:
    """``features`` in the user's folder for caches: see `fastambient.files.cache_folder`."""
    return cache_folder("features")


def features(
    images: np.ndarray,
    embedder: Embedder,
    *,
    cache: Path | None = None,
    batch: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The embedder's features of each picture.

    Parameters
    ----------
    images: uint8 [N, C, H, W], N >= 1, C of 1 or 3; an array in a file (np.memmap) is read a batch at a time.
    cache: folder to look in first and to keep the result in; None for none. `default_cache` is the usual one.
    batch: pictures at a time.
    on_batch: called with the number of pictures that were done since the call before; once with N where the cache has
        them all.

    Returns
    -------
    float32 [N, D]

    Raises
    ------
    InputError
        Another dtype or shape, no picture, a batch below 1.
    """
    images = as_pictures(images)
    if len(images) == 0:
        raise InputError("features of 0 pictures, expected at least 1")
    if batch < 1:
        raise InputError(f"batch is {batch}, expected a whole number of at least 1")
    file = None if cache is None else Path(cache) / f"{cache_key(images, embedder)}.safetensors"
    if file is not None and (found := _read(file, len(images))) is not None:
        if on_batch is not None:
            on_batch(len(images))
        return found
    result: np.ndarray | None = None
    for start in range(0, len(images), batch):
        part = np.ascontiguousarray(images[start : start + batch])
        with torch.no_grad():
            x = embedder(torch.from_numpy(part if part.flags.writeable else part.copy())).cpu().numpy()
        if result is None:
            result = np.empty((len(images), x.shape[1]), np.float32)
        if x.shape[1] != result.shape[1]:
            raise InputError(
                f"{embedder.name} gives {x.shape[1]} numbers for picture {start} and {result.shape[1]} for the first,"
                " expected as many for each"
            )
        result[start : start + len(part)] = x
        if on_batch is not None:
            on_batch(len(part))
    assert result is not None
    if file is not None:
        _write(file, result)
    return result


def cache_key(images: np.ndarray, embedder: Embedder) -> str:
    """Hex SHA-256 of what the features depend on: pixels, shape, dtype, embedder, the versions of the packages that
    make them, and this file's."""
    digest = hashlib.sha256(
        f"{_VERSION} {_packages()}\n{embedder.identity}\n{images.dtype} {list(images.shape)}\n".encode()
    )
    for start in range(0, len(images), _ROWS):
        digest.update(np.ascontiguousarray(images[start : start + _ROWS]).data)
    return digest.hexdigest()


@cache
def _packages() -> str:
    found = []
    for name in _MADE_BY:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _read(file: Path, count: int) -> np.ndarray | None:
    """What the file holds, or None where there is none or it is damaged."""
    try:
        with safe_open(file, "np") as opened:
            x, told = opened.get_tensor("features"), (opened.metadata() or {}).get("sha256")
        if x.dtype != np.float32 or x.ndim != 2 or len(x) != count or _checksum(x, file) != told:
            return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # used now: the last to be removed
        os.utime(file)
    return np.array(x)


def _write(file: Path, x: np.ndarray) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, save({"features": x}, {"sha256": _checksum(x, file)}))
        _make_room(file)
    except OSError as error:  # a full disk, a folder that is not ours: the features are there all the same
        if file.parent not in _NOT_KEPT:  # once, not for each set of an evaluation
            warn(f"features are not kept in {file.parent}: {error.strerror or error}")
        _NOT_KEPT.add(file.parent)


def _checksum(x: np.ndarray, file: Path) -> str:
    """Of the numbers and the file's own name: a file that was renamed is no other pictures' features."""
    return hashlib.sha256(f"{file.name} {list(x.shape)}\n".encode() + x.tobytes()).hexdigest()


def _make_room(newest: Path) -> None:
    files = []
    for path in newest.parent.iterdir():
        if _NAME.fullmatch(path.name) and path != newest:
            with suppress(OSError):  # another process removed it
                files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = newest.stat().st_size + sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= LIMIT:
            break
        path.unlink(missing_ok=True)
        total -= size
