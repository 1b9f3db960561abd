"""Hugging Face data sets on this machine: parquet files, and folders of Arrow streams by `datasets.save_to_disk`.

Which column holds the images, the labels and the text, and the rows of all files as one source.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fastambient.console import progress, say
from fastambient.data.archives import MAX_ENTRY_BYTES, is_unsafe_name
from fastambient.data.decode import BadEntry
from fastambient.data.items import (
    LOOK_AT,
    MAX_CLASSES,
    MAX_TEXT_BYTES,
    EncodedSource,
    Entry,
    check_labels,
    decode_text,
    file_stamp,
)  # fmt: skip
from fastambient.data.table_files import ArrowFile, ParquetFile, TableFile
from fastambient.errors import InputError

_LOOK_GROUPS = 16  # row groups whose first images are looked at
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")


class _Columns(NamedTuple):
    """What the columns of a data set are."""

    image: str
    label: str | None
    class_names: list[str] | None
    texts: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        return [self.image, *([self.label] if self.label else []), *self.texts]


class Tables(EncodedSource):
    def __init__(
        self, name: str, files: list[TableFile], features: Any, resolution: int | None, on_bad_image: str
    ) -> None:
        super().__init__(name, resolution, on_bad_image)
        self._files = files
        self._columns = columns = _find_columns(files[0], features)
        for file in files[1:]:
            for column in columns.all:
                if (there := file.types.get(column)) != (expected := files[0].types[column]):
                    kind = f"as {there}" if there else "missing"
                    raise InputError(
                        f"{file.path} has the column {column} {kind}, expected {expected} as in {files[0].path.name}"
                    )
        groups = [(number, group) for number, file in enumerate(files) for group in np.flatnonzero(file.rows)]
        self._groups = np.array(groups, np.int64).reshape(-1, 2)  # file, group in it
        self._starts = np.cumsum([0, *(files[number].rows[group] for number, group in groups)])
        self._file_starts = np.cumsum([0, *(int(file.rows.sum()) for file in files)])
        self.length = int(self._starts[-1])
        if not self.length:
            raise InputError(f"no image in {name}: its files have no rows")
        self.text_kinds, self.class_names = columns.texts, columns.class_names
        if columns.class_names is not None:
            self.num_classes = len(columns.class_names)
        elif columns.label is not None:
            self.num_classes = self._count_classes(columns.label)
        self._look(self._spans())

    def _count_classes(self, label: str) -> int:
        classes = 0
        with progress(f"counting the classes of {self.name}", self.length) as advance:
            for number, group in self._groups:
                file = self._files[number]
                for batch in file.batches(int(group), [label]):
                    column = batch.column(label)
                    if column.null_count:
                        raise InputError(f"{file.path}: the column {label} has rows without a label")
                    if len(column):
                        classes = max(
                            classes, check_labels(column.to_numpy(zero_copy_only=False), f"{file.path}: {label}")
                        )
                    advance(len(column))
        return classes

    def _spans(self) -> Iterable[tuple[int, int]]:
        """The first rows of row groups all over the set."""
        count = len(self._groups)
        chosen = sorted({count * i // _LOOK_GROUPS for i in range(_LOOK_GROUPS)})
        rows = LOOK_AT // len(chosen)
        return [(int(self._starts[i]), int(min(self._starts[i] + rows, self._starts[i + 1]))) for i in chosen]

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        while group < len(self._groups) and (row := int(self._starts[group])) < stop:
            number, group_in_file = self._groups[group]
            file, first = self._files[number], int(self._file_starts[number])
            if file_stamp(file.path, file.path.name) != file.stamp:
                raise InputError(f"{file.path} was changed after it was opened; start again")
            for batch in file.batches(int(group_in_file), self._columns.all):
                for i in range(max(start - row, 0), min(stop - row, batch.num_rows)):
                    yield self._entry(file, batch, i, row + i, row + i - first)
                row += batch.num_rows
                if row >= stop:
                    return
            group += 1
            if row != self._starts[group]:
                raise InputError(f"{file.path} is damaged: it holds fewer rows than it claims; make it again")

    def _entry(self, file: TableFile, batch: pa.RecordBatch, i: int, row: int, number: int) -> Entry:
        name, columns = f"{file.path.name}: row {number}", self._columns
        where, label = f"{file.path}: row {number}", -1
        if columns.label is not None:
            value = batch.column(columns.label)[i].as_py()
            if value is None or not 0 <= value < self.num_classes:
                raise InputError(
                    f"{where}: {columns.label} is {value}; expected 0 to {self.num_classes - 1}, on every row"
                )
            label = int(value)
        image = partial(_image, batch.column(columns.image), i, where)
        return Entry(row, name, where, image, label, partial(_texts, batch, columns.texts, i))

    def _stamps(self, start: int, stop: int) -> Iterable[tuple[str, int, int]]:
        for file, first, end in zip(self._files, self._file_starts[:-1], self._file_starts[1:], strict=True):
            if first < stop and end > start:
                yield file_stamp(file.path, file.path.name)


def _image(column: pa.Array, i: int, where: str) -> io.BytesIO:
    value = column[i]
    if isinstance(value, pa.StructScalar):
        data = value["bytes"].as_buffer() if value.is_valid else None
        if data is None and (path := (value.as_py() or {}).get("path")) is not None:
            raise InputError(
                f"{where} holds only the path {path!r} of its image, not its bytes; save the data set again with "
                "datasets' save_to_disk or push_to_hub, which put the files in"
            )
    else:
        data = value.as_buffer()
    if data is None:
        raise BadEntry("has no image")
    if len(data) > MAX_ENTRY_BYTES:
        raise BadEntry(f"has {len(data):,} bytes, above the limit of {MAX_ENTRY_BYTES:,}")
    return io.BytesIO(data)


def _texts(batch: pa.RecordBatch, kinds: tuple[str, ...], i: int) -> dict[str, str]:
    texts: dict[str, str] = {}
    for kind in kinds:
        data = batch.column(kind)[i].as_buffer()
        if data is not None:
            texts[kind] = decode_text(memoryview(data)[: MAX_TEXT_BYTES + 1].tobytes(), kind)
    return texts


def open_parquet(name: str, paths: list[Path], resolution: int | None, on_bad_image: str) -> Tables:
    """A data set of parquet files. Of several splits, `train` is read, and said."""
    splits: dict[str, list[Path]] = {}
    for path in paths:
        match = _SPLIT.fullmatch(path.name)
        splits.setdefault(str(path.parent / match[1]) if match else "", []).append(path)
    names = [Path(split).name for split in splits]
    if len(splits) > 1:
        if names.count("train") != 1:
            found = ", ".join(split or f"files such as {splits[split][0].name}" for split in names)
            raise InputError(
                f"{name} holds several sets of parquet files ({found}) and no single train; name the files of one, "
                f"as in '{paths[0].parent}/NAME-*.parquet'"
            )
        say(f"{name} holds {', '.join(sorted(names))}: reading train; for another name its files")
    chosen = "" if names == [""] else next(split for split in splits if len(splits) == 1 or Path(split).name == "train")
    files = splits[chosen]
    if chosen:
        _check_complete(files)
    with progress(f"opening {name}", len(files), "files") as advance:
        opened: list[TableFile] = []
        for path in files:
            opened.append(ParquetFile(path))
            advance(1)
    return Tables(name, opened, None, resolution, on_bad_image)


def _check_complete(paths: list[Path]) -> None:
    """Every part of NAME-00000-of-00002.parquet is there; a part alone may be asked for by its name."""
    if len(paths) == 1:
        return
    parts = [_SPLIT.fullmatch(path.name) for path in paths]
    there = {(part[2], part[3]) for part in parts if part}
    totals = {total for _, total in there}
    expected = {(f"{i:05d}", total) for total in totals for i in range(int(total))}
    if len(totals) > 1 or there != expected:
        lost = min(expected - there, default=("", ""))
        prefix = parts[0][1] if parts[0] else ""
        raise InputError(f"{paths[0].parent} lacks {prefix}-{lost[0]}-of-{lost[1]}.parquet; restore or download it")


def open_saved(path: Path, resolution: int | None, on_bad_image: str) -> Tables:
    """A folder that `datasets.save_to_disk` wrote; of a DatasetDict the split `train`."""
    name = path.resolve().name
    if (path / "dataset_dict.json").is_file():
        splits = _json_of(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise InputError(f"{path} holds the splits {splits} and no train; give the folder of one of them")
        if len(splits) > 1:
            say(f"{name} holds {', '.join(sorted(map(str, splits)))}: reading train; for another give its folder")
        path = path / "train"
    try:
        names = [str(entry["filename"]) for entry in _json_of(path / "state.json")["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'state.json'} lists no files (_data_files); save the data set again") from error
    if unsafe := next(filter(is_unsafe_name, names), None):
        raise InputError(f"{path / 'state.json'} lists the unsafe name {unsafe!r}")
    if missing := next((file for file in names if not (path / file).is_file()), None):
        raise InputError(f"{path / missing} is missing; restore it, or save the data set again")
    if not names:
        raise InputError(f"no image in {path}: its state.json lists no files")
    features = _json_of(path / "dataset_info.json").get("features")
    with progress(f"opening {name}", len(names), "files") as advance:
        opened: list[TableFile] = []
        for file in names:
            opened.append(ArrowFile(path / file))
            advance(1)
    return Tables(name, opened, features, resolution, on_bad_image)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("no regular file")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); save the data set again") from error


def _find_columns(file: TableFile, features: Any) -> _Columns:
    """By the Hugging Face features where there are any, else by type (and the name `label`)."""
    if features is None and (metadata := (file.schema.metadata or {}).get(b"huggingface")):
        try:
            features = json.loads(metadata)["info"]["features"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{file.path}: its Hugging Face metadata is damaged ({error!r}); save it again") from error
    known: dict[str, dict[str, Any]] = {}
    if isinstance(features, dict):
        known = {name: f for name, f in features.items() if isinstance(f, dict) and name in file.types}
    label, class_names = _find_labels(file, known)
    texts = tuple(name for name, t in file.types.items() if pa.types.is_string(t) or pa.types.is_large_string(t))
    return _Columns(_find_image(file, known), label, class_names, texts)


def _find_image(file: TableFile, known: dict[str, dict[str, Any]]) -> str:
    images = [name for name, feature in known.items() if feature.get("_type") == "Image"] or file.images
    if len(images) > 1:
        images = [name for name in images if name in ("image", "img")] or images
    if len(images) == 1 and images[0] in file.images:
        return images[0]
    found = f"{', '.join(images)}" if len(images) > 1 else f"none among {', '.join(file.types) or 'none'}"
    raise InputError(
        f"{file.path} must have one column of images (bytes, or structs of bytes and path), or one called image; "
        f"found {found}"
    )


def _find_labels(file: TableFile, known: dict[str, dict[str, Any]]) -> tuple[str | None, list[str] | None]:
    """(column or None, class names or None)."""
    labels = [name for name, feature in known.items() if feature.get("_type") == "ClassLabel"]
    if not known and "label" in file.types and pa.types.is_integer(file.types["label"]):
        labels = ["label"]
    if not labels:
        return None, None
    label = next((name for name in ("label", "labels") if name in labels), labels[0])
    if len(labels) > 1:
        say(f"{file.path.name} has the class labels {', '.join(labels)}: taking {label}")
    if not pa.types.is_integer(file.types[label]):
        raise InputError(f"{file.path}: the class labels in {label} are {file.types[label]}; expected integers")
    names = known.get(label, {}).get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{file.path}: the class names of {label} are no list of names")
    if names is not None and not 0 < len(names) <= MAX_CLASSES:
        raise InputError(f"{file.path}: {label} has {len(names):,} class names; expected 1 to {MAX_CLASSES:,}")
    return label, names
