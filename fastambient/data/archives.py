"""The files of a source, in a folder or a zip: names that stay inside, and entries that do not explode."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from fastambient.data.decode import BadEntry
from fastambient.data.items import file_stamp
from fastambient.errors import InputError

MAX_ENTRY_BYTES = 512 << 20
MAX_EXPANSION = 200  # of entries above SMALL_BYTES; deflate reaches 1032

SMALL_BYTES = 16 << 20

# What reading an entry may raise; RuntimeError is an encrypted one's.
ZIP_ERRORS = (BadEntry, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)


class Files(Protocol):
    path: Path
    names: list[str]  # every file, relative, with forward slashes, sorted

    def where(self, name: str) -> str: ...

    def open(self, name: str) -> BinaryIO: ...

    def stamps(self, names: list[str]) -> Iterable[tuple[str, int, int]]: ...  # of the files that hold them


class Folder:
    def __init__(self, path: Path) -> None:
        def fail(error: OSError) -> None:
            raise error

        self.path = path
        found = (Path(root, file) for root, _, files in os.walk(path, onerror=fail) for file in files)
        self.names = sorted(file.relative_to(path).as_posix() for file in found)

    def where(self, name: str) -> str:
        return str(self.path / name)

    def open(self, name: str) -> BinaryIO:
        file = self.path / name
        if file.exists() and not file.is_file():  # opening a pipe waits for its writer, a device never ends
            raise BadEntry("is no regular file, but a pipe, a socket or a device")
        return open(file, "rb")

    def stamps(self, names: list[str]) -> Iterable[tuple[str, int, int]]:
        return (file_stamp(self.path / name, name) for name in names)


class Zip:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = open_zip(path)
        self.names = sorted({info.filename for info in self._zip.infolist() if not info.is_dir()})

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None}  # another process opens the file by itself

    def where(self, name: str) -> str:
        return f"{self.path}: {name}"

    def open(self, name: str) -> BinaryIO:
        if self._zip is None:
            self._zip = open_zip(self.path)
        return open_entry(self._zip, name)

    def stamps(self, names: list[str]) -> Iterable[tuple[str, int, int]]:
        return [file_stamp(self.path, self.path.name)]


def is_unsafe_name(name: str) -> bool:
    """Whether a name from a zip or a manifest is absolute or climbs out of its folder, on any system."""
    return bool(re.match(r"[/\\]|[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(f"{path} is no zip file, or a damaged one ({error}); make or download it again") from error
    for name in archive.namelist():
        if is_unsafe_name(name):
            raise InputError(
                f"{path} holds the unsafe name {name!r}; names in a data set zip must be relative and free of '..'"
            )
    return archive


def open_entry(archive: zipfile.ZipFile, name: str, max_bytes: int = MAX_ENTRY_BYTES) -> BinaryIO:
    info = archive.getinfo(name)
    expansion = info.file_size / max(info.compress_size, 1)
    if info.file_size > max_bytes or (info.file_size > SMALL_BYTES and expansion > MAX_EXPANSION):
        raise BadEntry(
            f"unpacks to {info.file_size:,} bytes from {info.compress_size:,}: refused as a decompression bomb"
        )
    return archive.open(info)  # type: ignore[return-value]  # never gives more than file_size bytes
