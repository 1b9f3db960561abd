"""`shards.json`: how many images each shard of a stream holds, so that their order is known before any is read.

    {"format": "fastambient-shards", "version": 1, "channels": 3, "resolution": 64, "classes": 10,
     "shards": [{"name": "shards-0000.tar", "images": 9984, "bytes": 268435456, "sha256": "..."}, ...]}

It lies beside the shards. Names are relative to it; `resolution` is null where the images looked at are not square or
differ in size, `classes` 0 without labels, `sha256` may be left out. For local shards it is made when they are first
streamed. Behind an address it has to be there: `write_index` makes it where the shards are, before they are uploaded,
with checksums that every download is held to.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastambient.console import progress, say
from fastambient.data.archives import is_unsafe_name
from fastambient.data.decode import BadEntry, is_grey, use_image
from fastambient.data.downloads import is_url, read_url
from fastambient.data.items import LOOK_AT, MAX_CLASSES, file_stamp, is_hidden, open_binary, warn_of_unread
from fastambient.data.sources import expand, expand_braces
from fastambient.data.tars import index_shard, read_image
from fastambient.errors import InputError
from fastambient.files import sha256_file, write_json

NAME = "shards.json"
_FORMAT, _VERSION = "fastambient-shards", 1
_MAX_BYTES = 1 << 28  # of shards.json: a million shards


class ListedShard(NamedTuple):
    name: str  # relative to shards.json
    place: str  # path or address
    images: int
    bytes: int
    sha256: str | None


class ShardList(NamedTuple):
    shards: list[ListedShard]
    channels: int
    resolution: int | None
    classes: int
    remote: bool


def find_shards(spec: str, index: str | None = None) -> ShardList:
    """The shards that `spec` names, with what `shards.json` says of them; see ShardStream.

    Raises
    ------
    InputError : nothing there, another kind of address, or an index that is missing, broken or of other shards
    """
    remote = is_url(spec)
    if remote:
        if glob.has_magic(re.sub(r"\{[^{}]*\}", "", spec).partition("?")[0]) or "?" in spec:
            raise InputError(f"{spec}: an address cannot be searched; list its shards, as in shards-{{0000..0099}}.tar")
        places = list(dict.fromkeys(expand_braces(spec)))
        base = _common_folder(places)
        names = [place[len(base) :] for place in places]
        content = _read(index or base + NAME, _no_index(spec))
    else:
        paths = _local(spec)
        folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        places, names = [str(path) for path in paths], _names(paths, folder)
        content = _local_index(paths, folder / NAME, index)
    listed = {entry["name"]: entry for entry in content["shards"]}
    if missing := next((name for name in names if name not in listed), None):
        raise InputError(
            f"{NAME} does not list {missing}; shards that are added or renamed are another data set: "
            f"remove {NAME} to have all looked through again, or make it again before uploading"
        )
    shards = [
        ListedShard(name, place, listed[name]["images"], listed[name]["bytes"], listed[name].get("sha256"))
        for name, place in zip(names, places, strict=True)
    ]
    return ShardList(shards, content["channels"], content["resolution"], content["classes"], remote)


def index_shards(spec: str) -> tuple[Path, dict[str, Any]]:
    """Write `shards.json` beside the local shards that `spec` names; (the file, its content). InputError for an
    address, and as `write_index`."""
    if is_url(spec):
        raise InputError(f"{spec}: shards are looked through where they lie on a disk; make the index before uploading")
    paths = _local(spec)
    file = Path(os.path.commonpath([path.absolute().parent for path in paths])) / NAME
    return file, write_index(paths, file)


def write_index(paths: list[Path], out: Path, *, checksums: bool = True) -> dict[str, Any]:
    """Look through local shards and write `shards.json`; returns its content.

    Parameters
    ----------
    paths : plain tars, below the folder of `out`
    out : the file to write
    checksums : whether every byte is read, too, for SHA-256

    Raises
    ------
    InputError : a shard is cut short, compressed, holds links or unsafe names, or labels on some images alone
    """
    names = _names(paths, out.absolute().parent)
    looks = max(1, LOOK_AT // len(paths))
    entries: list[dict[str, Any]] = []
    sizes: set[tuple[int, int]] = set()
    labelled = images = classes = 0
    grey, unread = True, Counter[str]()
    with progress(f"looking through {len(paths):,} shards", sum(p.stat().st_size for p in paths), "bytes") as advance:
        for path, name in zip(paths, names, strict=True):
            shard = index_shard(path, name, _leave_out, advance, unread)
            n = len(shard.labels)
            entries.append({"name": name, "images": n, "bytes": file_stamp(path, name)[1]})
            if checksums:
                entries[-1]["sha256"] = sha256_file(path)
            images, labelled = images + n, labelled + int((shard.labels >= 0).sum())
            classes = max(classes, 1 + int(shard.labels.max(initial=-1)))
            if labelled not in (0, images):
                raise InputError(
                    f"{path}: some images have a .cls beside them and some have none; add it, or remove all"
                )
            with open_binary(path) as file:
                for i in sorted({n * k // looks for k in range(looks)}) if n else ():
                    try:
                        size, is_one = use_image(
                            partial(read_image, file, shard, i), lambda image: (image.size, is_grey(image)), whole=False
                        )
                    except BadEntry:
                        continue  # said when it is read
                    sizes.add(size)
                    grey = grey and is_one
    if not sizes:
        raise InputError(
            f"none of the images of {paths[0]} and {len(paths) - 1:,} more that were looked at can be read"
        )
    warn_of_unread(unread, str(out.parent))
    width, height = next(iter(sizes))
    content = {
        "format": _FORMAT, "version": _VERSION, "channels": 1 if grey else 3,
        "resolution": width if len(sizes) == 1 and width == height else None, "classes": classes, "shards": entries,
    }  # fmt: skip
    write_json(out, content)
    return content


def _leave_out(name: str, where: str, error: BadEntry) -> None:
    """An image too large to read has no number; a stream says so when it opens the shard."""


def _no_index(spec: str) -> str:
    return (
        f"{spec} is streamed by a list of its shards: make {NAME} where they lie on a disk (fastambient prepare "
        "--index SHARDS) and put it beside them"
    )


def _common_folder(addresses: list[str]) -> str:
    """What the addresses begin with, up to a slash of their path."""
    first, last = min(addresses), max(addresses)
    equal = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    base = first[: first[:equal].rindex("/") + 1]
    if not urlsplit(base).netloc or base.endswith("://"):
        raise InputError(f"{first} and {last} lie on different servers; give the shards of one")
    return base


def _names(paths: list[Path], folder: Path) -> list[str]:
    return [Path(os.path.relpath(path.absolute(), folder)).as_posix() for path in paths]


def _local(spec: str) -> list[Path]:
    if re.match(r"\w[\w+.-]+://|pipe:", spec):
        raise InputError(f"{spec}: only http:// and https:// addresses are streamed; copy the shards, or name a path")
    path = Path(spec)
    if path.is_dir():
        found: list[Path] | Iterator[Path] = sorted(found for found in path.glob("*.tar") if not is_hidden(found.name))
    else:
        found = [path] if path.exists() else expand(spec)
    paths = list(found)
    if not paths:
        raise InputError(f"there is no .tar in {spec}")
    if other := next((path for path in paths if path.suffix.lower() != ".tar" or not path.is_file()), None):
        raise InputError(f"{other} is no plain .tar file; streaming reads WebDataset tars")
    return paths


def _local_index(paths: list[Path], beside: Path, index: str | None) -> dict[str, Any]:
    if index is not None or beside.exists():
        return _read(index or str(beside))
    try:
        content = write_index(paths, beside, checksums=False)
    except OSError as error:
        raise InputError(f"{beside} cannot be written ({error.strerror}); make the folder writable once") from error
    say(f"{len(paths):,} shards looked through: {beside}")
    return content


def _read(place: str, remedy: str = "") -> dict[str, Any]:
    """A checked index from a path or an address."""
    if is_url(place):
        return _parse(read_url(place, _MAX_BYTES, remedy), place)
    try:
        return _parse(Path(place).read_bytes(), place)
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror or error}") from error


def _parse(data: bytes, where: str) -> dict[str, Any]:
    """A checked index; it may come from anywhere."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no valid JSON ({error}); make it again") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise InputError(f"{where} is no list of shards of this version ({_FORMAT}, version {_VERSION}); make it again")

    def number(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    def refuse(what: str, value: Any) -> None:
        raise InputError(f"{where}: {what}, got {str(value)[:80]!r}; make it again")

    if content.get("channels") not in (1, 3):
        refuse("channels must be 1 or 3", content.get("channels"))
    if "resolution" not in content or not (content["resolution"] is None or number(content["resolution"], 1, 8000)):
        refuse("resolution must be pixels or null", content.get("resolution"))
    if not number(content.get("classes"), 0, MAX_CLASSES):
        refuse(f"classes must be 0 to {MAX_CLASSES}", content.get("classes"))
    if not isinstance(content.get("shards"), list) or not content["shards"]:
        refuse("shards must be a list", content.get("shards"))
    for entry in content["shards"]:
        match entry:
            case {"name": str(name), "images": images, "bytes": size}:
                good = number(images, 0, 1 << 32) and number(size, 1, 1 << 44) and not is_unsafe_name(name)
                checksum = entry.get("sha256")
                if good and (checksum is None or re.fullmatch(r"[0-9a-f]{64}", str(checksum))):
                    continue
        refuse('a shard must be {"name", "images", "bytes"} with a relative name', entry)
    return content
