"""Files that are whole or absent: everything is written under a temporary name, synced and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastambient.errors import InputError


def cache_folder(name: str) -> Path:
    """`name` in $FASTAMBIENT_CACHE, else in $XDG_CACHE_HOME/fastambient, else in ~/.cache/fastambient."""
    if own := os.environ.get("FASTAMBIENT_CACHE"):
        return Path(own) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastambient" / name


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
    if path.exists() and not path.is_file():  # a device, for one, would be replaced by a file
        raise OSError(errno.EEXIST, "exists and is no file", str(path))
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


def keep_out_of_git(folder: Path) -> None:
    """A ``.gitignore`` of everything in `folder`: private pictures, or weights that may hold them, are not committed by
    accident. Who wants them committed deletes it."""
    write_bytes(folder / ".gitignore", b"# pictures and weights may be private; delete this file to commit them\n*\n")


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
    with _parents(path):
        temporary = _temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            _publish(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_folder(path: Path, *, force: bool = False, keep: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Yield (work, new): a folder beside `path` that is found again by the next call, whatever ended this one, and the
    name in it that becomes `path` when the block ends without an error.

    Parameters
    ----------
    force : as in `refuse_existing`
    keep : whether the work folder is worth keeping after an error; a killed process leaves it in any case

    Raises
    ------
    InputError : `path` exists and must not be replaced, or another process works on it
    """
    refuse_existing(path, force=force)
    path = path.resolve() if path.is_symlink() else path
    work = path.with_name(f".{path.name}.preparing")
    with _parents(path):
        work.mkdir(exist_ok=True)
        lock = FileLock(str(work / "lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process is preparing {path}; wait for it, or choose another name") from None
        done = False
        try:
            yield work, work / "new"
            refuse_existing(path, force=force)  # made by somebody else meanwhile
            _publish(work / "new", path)
            done = True
        finally:
            if done or not keep(work):
                shutil.rmtree(work, ignore_errors=True)
            lock.release()


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the parents of `path`; those that are empty at the end go again."""
    missing = [p for p in path.absolute().parents if not p.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty: the folder is there
                parent.rmdir()


def _publish(new: Path, path: Path) -> None:
    """Rename a complete folder to `path`, in place of what is there."""
    for file in new.rglob("*"):
        if file.is_file():
            _sync(file)
    if path.exists():
        old = _temporary_name(path)
        os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old)
    else:
        os.replace(new, path)
    _sync(path.parent)


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
