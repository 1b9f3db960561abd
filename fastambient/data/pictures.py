"""Image files in a folder or a zip, with labels from `dataset.json` or sub-folders and sidecar text beside them.

Opening reads every header and keeps names alone; pixels are decoded by `read`.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fastambient.console import progress, warn
from fastambient.data.archives import ZIP_ERRORS, Files
from fastambient.data.decode import BadEntry, is_grey, use_image
from fastambient.data.items import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    TEXT_KINDS,
    UNREAD_SUFFIXES,
    EncodedSource,
    Entry,
    check_labels,
    check_size,
    decode_text,
    is_hidden,
    warn_of_unread,
)  # fmt: skip
from fastambient.errors import InputError


def is_image_name(name: str) -> bool:
    """Whether a relative name is that of an image, and not hidden."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


class Pictures(EncodedSource):
    def __init__(self, files: Files, resolution: int | None, on_bad_image: str) -> None:
        super().__init__(files.path.resolve().name, resolution, on_bad_image)
        self._files = files
        found = [name for name in files.names if is_image_name(name)]
        suffixes = (Path(name).suffix.lower() for name in files.names if not is_hidden(name))
        unread = Counter(suffix for suffix in suffixes if suffix in UNREAD_SUFFIXES)
        if not found:
            raise InputError(
                f"no image in {files.path}: expected PNG, JPEG, WebP or BMP files, also in sub-folders"
                + _what_there_is(files, unread)
            )
        warn_of_unread(unread, str(files.path))
        self._labels, self.class_names = _read_labels(files, found)
        if self._labels is not None:
            self.num_classes = check_labels(np.array(list(self._labels.values())), files.where("dataset.json"))

        size: tuple[int, int] | None = None
        self._names: list[str] = []
        with progress(f"looking through {self.name}", len(found)) as advance:
            for name in found:
                advance(1)
                try:
                    header = use_image(
                        partial(files.open, name), lambda image: (image.size, is_grey(image)), whole=False
                    )
                except BadEntry as error:
                    self._bad(name, files.where(name), error)
                    continue
                size = size or header[0]
                if self._own_size:
                    check_size(header[0], size, files.where(name))
                self._note_size(header[0])
                self.channels = self.channels if header[1] else 3
                self._names.append(name)
        if size is None:
            raise InputError(
                f"none of the {len(found):,} images in {files.path} can be read; the first: {self.skipped[found[0]]}"
            )
        self.length, self.resolution = len(self._names), resolution or size[0]
        self.text_kinds = tuple(kind for kind in TEXT_KINDS if any(self._sidecar(name, kind) for name in self._names))

    def _sidecar(self, name: str, kind: str) -> str | None:
        """The name of an image's text of a kind, where there is one."""
        text, names = f"{name.rpartition('.')[0]}.{kind}", self._files.names
        at = bisect_left(names, text)  # a set of all names would take as much memory again
        return text if at < len(names) and names[at] == text != "dataset.json" else None

    def _sidecars(self, name: str) -> dict[str, str]:
        found = {kind: self._sidecar(name, kind) for kind in self.text_kinds}
        return {kind: text for kind, text in found.items() if text is not None}

    def _text(self, name: str) -> dict[str, str]:
        texts: dict[str, str] = {}
        for kind, sidecar in self._sidecars(name).items():
            try:
                with self._files.open(sidecar) as stream:
                    data = stream.read(MAX_TEXT_BYTES + 1)
            except (OSError, *ZIP_ERRORS) as error:
                raise BadEntry(f"has the text {sidecar}, which cannot be read ({error})") from error
            texts[kind] = decode_text(data, sidecar)
        return texts

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        for row in range(start, stop):
            name = self._names[row]
            label = -1 if self._labels is None else self._labels[name]
            where, open_file = self._files.where(name), partial(self._files.open, name)
            yield Entry(row, name, where, open_file, label, partial(self._text, name))

    def _stamps(self, start: int, stop: int) -> Iterable[tuple[str, int, int]]:
        names = self._names[start:stop]
        sidecars = (text for name in names for text in self._sidecars(name).values())
        labels = ["dataset.json"] if "dataset.json" in self._files.names else []
        return self._files.stamps([*names, *sidecars, *labels])


def _what_there_is(files: Files, unread: Mapping[str, int]) -> str:
    """What a source without an image may have been meant as: "" where nothing says."""
    if "train/ids.npy" in files.names:
        return "; it looks like a store that has lost its manifest.json: restore that, or prepare the store again"
    deeper = (name for name in files.names if name.lower().endswith((".parquet", ".tar")) and not is_hidden(name))
    if (name := next(deeper, None)) is not None:
        return f"; there is {name}: name the folder that it lies in, or the file"
    if unread:
        return f"; there are {', '.join(sorted(unread))} files: convert them to PNG"
    return ""


def _load_json(files: Files, name: str) -> object:
    try:
        with files.open(name) as stream:
            return json.loads(stream.read())
    except ZIP_ERRORS as error:
        raise InputError(
            f"{files.where(name)} is no valid JSON ({error}); expected EDM's form, or remove it"
        ) from error


def _common_folder(names: list[str]) -> str:
    """The folders that all of the sorted names lie in, with their last slash: a zip of a folder often begins with the
    folder itself. "" without."""
    first, last = (name.split("/")[:-1] for name in (names[0], names[-1]))
    common = itertools.takewhile(lambda parts: parts[0] == parts[1], zip(first, last, strict=False))
    return "".join(f"{part}/" for part, _ in common)


def _read_labels(files: Files, images: list[str]) -> tuple[dict[str, int] | None, list[str] | None]:
    """(label of each image or None, class names or None)."""
    if "dataset.json" not in files.names:
        above = _common_folder(images)
        inside = [name[len(above) :] for name in images]
        folders = {name.split("/")[0] for name in inside if "/" in name}
        if len(folders) < 2:
            return None, None
        if loose := [name for name, short in zip(images, inside, strict=True) if "/" not in short]:
            warn(
                f"{files.path}: its {len(folders)} folders are no classes, because {len(loose)} of {len(images)} images"
                f" lie beside them, {loose[0]} for one"
            )
            return None, None
        class_names = sorted(folders)
        number = {folder: i for i, folder in enumerate(class_names)}
        return {name: number[short.split("/")[0]] for name, short in zip(images, inside, strict=True)}, class_names

    where, content = files.where("dataset.json"), _load_json(files, "dataset.json")
    entries = content.get("labels") if isinstance(content, dict) else "no object"
    if entries is None:
        return None, None
    labels: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool):
                if labels.setdefault(name, label) != label:
                    raise InputError(f"{where} gives {name} two labels, {labels[name]} and {label}")
            case _:
                expected = '{"labels": [["path", integer], ...]}'
                raise InputError(f"{where}: expected {expected} or null, got {json.dumps(entry)[:80]}")
    if missing := next((name for name in images if name not in labels), None):
        raise InputError(f'{where} has no label for {missing}; add it, or set "labels" to null to train without labels')
    if extra := labels.keys() - set(images):
        raise InputError(
            f"{where} has a label for {min(extra)}, which is not there; restore the image or remove the entry"
        )
    return labels, None
