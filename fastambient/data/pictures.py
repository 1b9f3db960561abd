"""Image files in a folder or a zip, with labels from `dataset.json` or sub-folders and sidecar text beside them.

Opening reads every header and keeps names alone; pixels are decoded by `read`.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastambient.console import progress
from fastambient.data.archives import ZIP_ERRORS, Files
from fastambient.data.decode import BadEntry, is_grey, use_image
from fastambient.data.items import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    TEXT_KINDS,
    EncodedSource,
    Entry,
    check_labels,
    check_size,
    decode_text,
    is_hidden,
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
        if not found:
            raise InputError(f"no image in {files.path}: expected PNG, JPEG, WebP or BMP files, also in sub-folders")
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


def _load_json(files: Files, name: str) -> object:
    try:
        with files.open(name) as stream:
            return json.loads(stream.read())
    except ZIP_ERRORS as error:
        raise InputError(
            f"{files.where(name)} is no valid JSON ({error}); expected EDM's form, or remove it"
        ) from error


def _read_labels(files: Files, images: list[str]) -> tuple[dict[str, int] | None, list[str] | None]:
    """(label of each image or None, class names or None)."""
    if "dataset.json" not in files.names:
        folders = {name.split("/")[0] for name in images if "/" in name}
        if len(folders) < 2 or not all("/" in name for name in images):
            return None, None
        class_names = sorted(folders)
        number = {folder: i for i, folder in enumerate(class_names)}
        return {name: number[name.split("/")[0]] for name in images}, class_names

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
