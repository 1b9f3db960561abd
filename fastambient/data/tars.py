"""WebDataset: samples in plain tar files, found by their headers once and read by offset.

The index of a shard is a few arrays (offsets, sizes, names in one string of bytes): some 60 bytes a sample. Tars come
from anywhere. So links, devices and names that leave the folder are refused, sizes are checked before anything is
read, and a shard must end as a tar does: what follows a broken header would be lost without a word.
"""

from __future__ import annotations

import io
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from fastambient.console import progress
from fastambient.data.archives import MAX_ENTRY_BYTES, is_unsafe_name
from fastambient.data.decode import BadEntry
from fastambient.data.items import (
    IMAGE_SUFFIXES,
    LOOK_AT,
    MAX_CLASSES,
    MAX_TEXT_BYTES,
    TEXT_KINDS,
    UNREAD_SUFFIXES,
    EncodedSource,
    Entry,
    decode_text,
    file_stamp,
    is_hidden,
    open_binary,
    warn_of_unread,
)  # fmt: skip
from fastambient.errors import InputError

_MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records, which tarfile reads whole
_MAX_LABEL_BYTES = 64
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_TELL_EVERY = 16 << 20  # bytes of progress


class _Places(NamedTuple):
    """Where the bytes of a shard's entries lie; -1 where a sample has none."""

    at: np.ndarray  # int64 [n]
    size: np.ndarray  # uint32 [n]


class Shard(NamedTuple):
    """The index of a shard."""

    path: Path
    name: str
    stamp: tuple[str, int, int]
    images: _Places
    labels: np.ndarray  # int32 [n], -1 without
    texts: dict[str, _Places]
    names: bytes  # of the image entries, one after the other
    name_ends: np.ndarray  # int64 [n]

    def image_name(self, i: int) -> str:
        start = int(self.name_ends[i - 1]) if i else 0
        return os.fsdecode(self.names[start : int(self.name_ends[i])])


class Tars(EncodedSource):
    """Samples of tar files, shard after shard, in the order of each."""

    def __init__(self, name: str, paths: list[Path], resolution: int | None, on_bad_image: str) -> None:
        super().__init__(name, resolution, on_bad_image)
        base = os.path.commonpath([path.absolute().parent for path in paths])
        self._shards: list[Shard] = []
        unread: Counter[str] = Counter()
        with progress(f"looking through {name}", sum(path.stat().st_size for path in paths), "bytes") as advance:
            for path in paths:
                shard_name = Path(os.path.relpath(path.absolute(), base)).as_posix()
                self._shards.append(index_shard(path, shard_name, self._bad, advance, unread))
        self._starts = np.cumsum([0, *(len(shard.labels) for shard in self._shards)])
        self.length = int(self._starts[-1])
        if not self.length:
            raise InputError(f"no image in {name}: expected entries named KEY.png, .jpg, .jpeg, .webp or .bmp")
        warn_of_unread(unread, name)
        self._check_labels()
        self.text_kinds = tuple(kind for kind in TEXT_KINDS if any(kind in shard.texts for shard in self._shards))
        rows = sorted({self.length * i // LOOK_AT for i in range(LOOK_AT)})
        self._look((row, row + 1) for row in rows)

    def _check_labels(self) -> None:
        """A label on every sample or on none: one that is missing may have been lost in packing."""
        labelled = [bool((shard.labels >= 0).any()) for shard in self._shards]
        if not any(labelled):
            return
        for shard in self._shards:
            if (shard.labels < 0).any():
                where = f"{shard.path}: {shard.image_name(int(np.flatnonzero(shard.labels < 0)[0]))}"
                raise InputError(
                    f"{where} has no .cls beside it where other images have; add it, or remove all of them"
                )
            if (shard.labels >= MAX_CLASSES).any():
                where = f"{shard.path}: {shard.image_name(int(shard.labels.argmax()))}"
                raise InputError(
                    f"{where} has a class label in its .cls above {MAX_CLASSES - 1}; number the classes from 0"
                )
        self.num_classes = 1 + max(int(shard.labels.max(initial=-1)) for shard in self._shards)

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while number < len(self._shards) and (offset := int(self._starts[number])) < stop:
            shard = self._shards[number]
            if file_stamp(shard.path, shard.name) != shard.stamp:
                raise InputError(f"{shard.path} was changed after it was looked through; start again")
            with open_binary(shard.path) as file:
                for i in range(max(start - offset, 0), min(stop - offset, len(shard.labels))):
                    name = shard.image_name(i)
                    yield Entry(
                        offset + i, f"{shard.name}: {name}", f"{shard.path}: {name}",
                        partial(read_image, file, shard, i), int(shard.labels[i]), partial(_texts, file, shard, i),
                    )  # fmt: skip
            number += 1

    def _stamps(self, start: int, stop: int) -> Iterable[tuple[str, int, int]]:
        for shard, first, end in zip(self._shards, self._starts[:-1], self._starts[1:], strict=True):
            if first < stop and end > start:
                yield file_stamp(shard.path, shard.name)


def save_index(file: IO[bytes], shard: Shard) -> None:
    """Write a shard's index without its texts; `load_index` reads it."""
    np.savez(
        file, at=shard.images.at, size=shard.images.size, labels=shard.labels, name_ends=shard.name_ends,
        names=np.frombuffer(shard.names, np.uint8), stamp=np.array(shard.stamp[1:], np.int64),
    )  # fmt: skip


def load_index(file: Path, path: Path, name: str) -> Shard:
    """The index of the shard `path` from a file by `save_index`; BadEntry where that is broken or of another file."""
    stamp = file_stamp(path, name)
    try:
        with np.load(file, allow_pickle=False) as kept:
            found = {key: kept[key] for key in ("at", "size", "labels", "name_ends", "names", "stamp")}
    except Exception as error:  # whatever a broken zip makes numpy raise
        raise BadEntry(f"cannot be read: {error}") from error
    if found["stamp"].tolist() != list(stamp[1:]):
        raise BadEntry("is of another file")
    images = _Places(found["at"], found["size"])
    return Shard(path, name, stamp, images, found["labels"], {}, found["names"].tobytes(), found["name_ends"])


def read_image(file: BinaryIO, shard: Shard, i: int) -> BinaryIO:
    """The encoded image of sample i of a shard whose file is open."""
    return io.BytesIO(_read(file, int(shard.images.at[i]), int(shard.images.size[i])))


def _texts(file: BinaryIO, shard: Shard, i: int) -> dict[str, str]:
    found = {kind: (int(places.at[i]), int(places.size[i])) for kind, places in shard.texts.items()}
    return {
        kind: decode_text(_read(file, at, min(size, MAX_TEXT_BYTES + 1)), f".{kind}")
        for kind, (at, size) in found.items()
        if at >= 0
    }


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


class _Builder:
    """Collects the samples of one shard in compact arrays."""

    def __init__(self, path: Path, bad: Callable[[str, str, BadEntry], None], shard_name: str) -> None:
        self.path, self.bad, self.shard_name = path, bad, shard_name
        self.unread: Counter[str] = Counter()  # suffixes of pictures that are not read
        self.key: str | None = None
        self.keys = array("q")  # hashes
        self.labels, self.name_ends, self.names = array("i"), array("q"), bytearray()
        self.places = {kind: (array("q"), array("I")) for kind in ("", *TEXT_KINDS)}  # "": the image
        self.found: dict[str, tuple[str, int, int]] = {}  # kind of the open sample -> name, offset, size
        self.label = -1

    def add(self, file: BinaryIO, name: str, at: int, size: int) -> None:
        """An entry of the tar, in its order."""
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        suffix = suffix.lower()
        if f".{suffix}" in UNREAD_SUFFIXES:
            self.unread[f".{suffix}"] += 1
        if f".{suffix}" not in IMAGE_SUFFIXES and suffix not in (*TEXT_KINDS, "cls"):
            return
        if (key := f"{folder}/{stem}") != self.key:
            self.close()
            self.key = key
            self.keys.append(hash(key))
        if f".{suffix}" in IMAGE_SUFFIXES:
            if "" in self.found:
                raise InputError(
                    f"{self.path}: {name} is a second image of one sample, beside {self.found[''][0]}; "
                    "pack one image a key"
                )
            self.found[""] = name, at, size
        elif suffix in TEXT_KINDS:
            self.found[suffix] = name, at, size
        elif suffix == "cls":
            text = _read(file, at, min(size, _MAX_LABEL_BYTES + 1)).strip()
            if not text.isdigit() or size > _MAX_LABEL_BYTES:
                raise InputError(f"{self.path}: {name} must be a class number as text, got {text[:20]!r}")
            self.label = min(int(text), MAX_CLASSES)

    def close(self) -> None:
        """End the open sample; one without an image is left out."""
        found, label = self.found, self.label
        self.found, self.label = {}, -1
        if "" not in found:
            if label >= 0:
                key = (self.key or "").lstrip("/")
                raise InputError(
                    f"{self.path}: {key}.cls has no image next to it; pack a sample's entries one after the other, "
                    "as tar --sort=name does"
                )
            return
        name, _, size = found[""]
        if size > MAX_ENTRY_BYTES:
            reason = BadEntry(f"has {size:,} bytes, above the limit of {MAX_ENTRY_BYTES:,}")
            self.bad(f"{self.shard_name}: {name}", f"{self.path}: {name}", reason)
            return
        self.names += os.fsencode(name)
        self.name_ends.append(len(self.names))
        self.labels.append(label)
        for kind, (at, sizes) in self.places.items():
            _, here, size = found.get(kind, ("", -1, 0))
            at.append(here)
            sizes.append(min(size, 2**32 - 1))

    def build(self, stamp: tuple[str, int, int]) -> Shard:
        self.close()
        keys = np.sort(np.frombuffer(self.keys, np.int64))
        if (keys[1:] == keys[:-1]).any():
            raise InputError(
                f"{self.path} holds a key twice: the entries of a sample must stand one after the other, and no entry "
                "may be there in two versions; pack it again, with tar --sort=name"
            )
        places = {
            kind: _Places(np.frombuffer(at, np.int64), np.frombuffer(sizes, np.uint32))
            for kind, (at, sizes) in self.places.items()
            if not kind or any(here >= 0 for here in at)
        }
        return Shard(
            self.path, self.shard_name, stamp, places.pop(""), np.frombuffer(self.labels, np.int32), places,
            bytes(self.names), np.frombuffer(self.name_ends, np.int64),
        )  # fmt: skip


def index_shard(
    path: Path,
    name: str,
    bad: Callable[[str, str, BadEntry], None],
    advance: Callable[[int], None],
    unread: Counter[str] | None = None,
) -> Shard:
    """The index of a shard; `bad` is told of an image that is left out, `unread` counts pictures of other kinds."""
    stamp, builder, told = file_stamp(path, name), _Builder(path, bad, name), 0
    with open(path, "rb") as file:
        for entry in _entries_of(file, path):
            if entry.offset - told > _TELL_EVERY:
                advance(entry.offset - told)
                told = entry.offset
            entry_name = entry.name.removeprefix("./")
            if entry.isreg() and not is_hidden(entry_name):
                builder.add(file, entry_name, entry.offset_data, entry.size)
    advance(stamp[1] - told)
    if unread is not None:
        unread.update(builder.unread)
    return builder.build(stamp)


class _Header(tarfile.TarInfo):
    """A header whose size is one: tarfile would go backwards by a negative one, and read all of a huge extension."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.size > _MAX_EXTENSION and self.type in _EXTENSIONS):
            raise BadEntry(f"a header that claims {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _entries_of(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar up to its end; InputError for anything but files and folders with names that stay inside."""
    if file.read(6).startswith(_COMPRESSED):
        raise InputError(f"{path} is compressed, so its entries cannot be read one by one; unpack it to a plain .tar")
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header)
        while (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if tar.offset < entry.offset_data:  # type: ignore[attr-defined]
                raise BadEntry(f"{entry.name} claims {entry.size:,} bytes")
            if entry.offset_data + entry.size > size:
                raise BadEntry(f"unexpected end of data in {entry.name}")
            if is_unsafe_name(entry.name):
                raise InputError(
                    f"{path} holds the unsafe name {entry.name!r}; names in a tar must be relative and free of '..'"
                )
            if not (entry.isreg() or entry.isdir()) or entry.issparse():
                raise InputError(
                    f"{path}: {entry.name} is {_kind(entry)}; a tar of images may hold plain files and folders alone"
                )
            yield entry
        end: int = tar.offset  # type: ignore[attr-defined]
    except (tarfile.TarError, BadEntry, ValueError, RecursionError) as error:
        if "unexpected end" in str(error):
            raise InputError(f"{path} is cut short ({error}); copy or download it again") from error
        raise InputError(f"{path} is no tar file, or a damaged one ({error}); make or download it again") from error
    _check_end(file, end, path)


def _kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return f"a link to {entry.linkname!r}"
    return "a sparse file" if entry.issparse() else "a device, a pipe or of an unknown type"


def _check_end(file: BinaryIO, end: int, path: Path) -> None:
    """A tar ends with zeros; tarfile also stops, without a word, where a header is broken or missing."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise InputError(f"{path} is cut short: it lacks the zeros at the end of a tar; copy or download it again")
    if any(block):
        raise InputError(f"{path} has a damaged header at byte {end:,}; make or download it again")
    while block := file.read(1 << 20):
        if any(block):
            raise InputError(
                f"{path} goes on after its end, as tars written one after the other do; give each as a file of its own"
            )
