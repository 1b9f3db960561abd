"""Files that are whole or absent: everything is written under a temporary name, synced and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastambient.errors import InputError


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` in one step. `mode` is the file's permission from its first moment on."""
    temporary = _temporary_name(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # names the file that was wanted, also where the system names none
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Drop what a killed process left in `folder` under a temporary name. Only the one writer of a folder may."""
    for left in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", left.name):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def new_folder(path: Path, *, force: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` when the block ends without an error, and vanishes
    when it does not, together with parents made for it, so that nobody ever sees half a folder.

    Parameters
    ----------
    force, marker : as in `refuse_existing`

    Raises
    ------
    InputError : `path` exists and must not be replaced
    """
    refuse_existing(path, force=force, marker=marker)
    path = path.resolve() if path.is_symlink() else path  # renaming onto a link would replace the link
    missing = [p for p in path.absolute().parents if not p.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            old = _temporary_name(path)
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: the folder is there
                parent.rmdir()


def check_parent(path: Path) -> None:
    """InputError where no file can be made at `path`: it is a folder, or what its parents begin with is no folder that
    may be written to."""
    place = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if not place.is_dir():
        raise InputError(f"{path} cannot be made: {place} is a file; choose another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be made: {place} is not writable; choose another name")


def refuse_existing(path: Path, *, force: bool = False, marker: str | None = None) -> None:
    """InputError where `path` exists (an empty folder may), unless `force`; and even then where it is a file, the
    folder one is in, or a folder without the file `marker`: ``--force`` replaces what this program made, not
    somebody's pictures."""
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"the folder {path} is the one you are in, or around it; choose a new folder inside it")
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not place.is_dir():
        what = "exists and is a file" if place == path else f"cannot be made: {place} is a file"
        raise InputError(f"{path} {what}; choose another name")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise InputError(
                f"the folder {path} exists and is not empty; choose another name or pass --force to replace it"
            )
        if marker is not None and not (path / marker).exists():
            raise InputError(
                f"--force: the folder {path} holds no {marker}, so it is not replaced; choose another name"
            )
