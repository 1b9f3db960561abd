"""Hugging Face data sets on this machine: parquet files, and folders of Arrow streams by `datasets.save_to_disk`.

Read with pyarrow alone, by row group or record batch. Files come from anywhere: the images' column of a parquet file
may not unpack to more than a stated multiple of its bytes, Arrow batches are validated before a value is read, and what
pyarrow raises becomes an InputError that names the file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastambient.console import progress, say
from fastambient.data.archives import MAX_ENTRY_BYTES, MAX_EXPANSION, SMALL_BYTES, is_unsafe_name
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
from fastambient.errors import InputError

_BATCH_BYTES = 32 << 20  # of images that a parquet file is decoded in at once, about
_MAX_BATCH = 1024  # rows
_LOOK_GROUPS = 16  # row groups whose first images are looked at
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
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


class _File:
    """A file of rows in groups. `rows` is int64 [groups]."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, file_stamp(path, path.name)
        self.rows = np.zeros(0, np.int64)

    def schema(self) -> pa.Schema:
        raise NotImplementedError

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    @contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            kind = self.path.suffix[1:]
            raise InputError(
                f"{self.path} is cut short, damaged or no {kind} file ({reason}); make or download it again"
            ) from error


class _Parquet(_File):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self.reading(), self._open() as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            self.rows = np.array([group.num_rows for group in groups], np.int64)
        if (self.rows < 0).any():
            raise InputError(f"{path} is damaged: it claims {self.rows.min():,} rows; make or download it again")

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)

    def schema(self) -> pa.Schema:
        with self.reading(), self._open() as file:
            return file.schema_arrow

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self.reading(), self._open() as file:
            metadata = file.metadata.row_group(group)
            unpacked = 0
            for i in range(metadata.num_columns):
                column = metadata.column(i)
                if column.path_in_schema.split(".")[0] not in columns:
                    continue
                packed, size = column.total_compressed_size, column.total_uncompressed_size
                unpacked += size
                if size > SMALL_BYTES and size > MAX_EXPANSION * packed:
                    raise InputError(
                        f"{self.path}: row group {group} of {column.path_in_schema} unpacks to {size:,} bytes from "
                        f"{packed:,}: refused as a decompression bomb"
                    )
            a_row = max(unpacked // max(metadata.num_rows, 1), 1)
            size = min(max(_BATCH_BYTES // a_row, 1), _MAX_BATCH)
            yield from file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)


class _Arrow(_File):
    """An Arrow IPC stream, memory-mapped; a group is a record batch, found by its offset."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        rows, offsets = [], []
        with self.reading(), pa.memory_map(str(path)) as file:
            with pa.ipc.open_stream(file) as stream:
                if any(pa.types.is_dictionary(field.type) for field in stream.schema):
                    raise InputError(f"{path} has dictionary-encoded columns, which are not read; save it as parquet")
                while True:
                    offsets.append(file.tell())
                    try:
                        rows.append(stream.read_next_batch().num_rows)
                    except StopIteration:
                        break
            end = offsets.pop()
        with open(path, "rb") as plain:  # the end of the file also ends a stream, without a word
            plain.seek(end)
            if not plain.read(len(_END_OF_STREAM)) == _END_OF_STREAM:
                raise InputError(f"{path} is cut short: it lacks the end of an Arrow stream; copy or save it again")
        self.rows, self._offsets = np.array(rows, np.int64), np.array(offsets, np.int64)

    def schema(self) -> pa.Schema:
        with self.reading(), pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            return stream.schema

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        schema = self.schema()
        with self.reading(), pa.memory_map(str(self.path)) as file:
            file.seek(int(self._offsets[group]))
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema).select(columns)
            batch.validate(full=True)  # offsets that point outside would be followed
            yield batch


class Tables(EncodedSource):
    def __init__(self, name: str, files: list[_File], features: Any, resolution: int | None, on_bad_image: str) -> None:
        super().__init__(name, resolution, on_bad_image)
        self._files = files
        self._columns = columns = _find_columns(files[0], files[0].schema(), features)
        for file in files[1:]:
            if missing := set(columns.all) - set(file.schema().names):
                raise InputError(f"{file.path} has no column {min(missing)}, which {files[0].path.name} has")
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

    def _entry(self, file: _File, batch: pa.RecordBatch, i: int, row: int, number: int) -> Entry:
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
    value = column[i].as_py()
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is not None:
            raise InputError(
                f"{where} holds only the path {str(path)!r} of its image, not its bytes; save the data set again with "
                "datasets' save_to_disk or push_to_hub, which put the files in"
            )
        value = data
    if value is None:
        raise BadEntry("has no image")
    if len(value) > MAX_ENTRY_BYTES:
        raise BadEntry(f"has {len(value):,} bytes, above the limit of {MAX_ENTRY_BYTES:,}")
    return io.BytesIO(value)


def _texts(batch: pa.RecordBatch, kinds: tuple[str, ...], i: int) -> dict[str, str]:
    texts: dict[str, str] = {}
    for kind in kinds:
        data = batch.column(kind)[i].as_buffer()
        if data is not None:
            texts[kind] = decode_text(data.slice(0, MAX_TEXT_BYTES + 1).to_pybytes(), kind)
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
        opened: list[_File] = []
        for path in files:
            opened.append(_Parquet(path))
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
        opened: list[_File] = []
        for file in names:
            opened.append(_Arrow(path / file))
            advance(1)
    return Tables(name, opened, features, resolution, on_bad_image)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); save the data set again") from error


def _find_columns(file: _File, schema: pa.Schema, features: Any) -> _Columns:
    """By the Hugging Face features where there are any, else by type (and the name `label`)."""
    types = {field.name: field.type for field in schema}
    if features is None and (metadata := (schema.metadata or {}).get(b"huggingface")):
        try:
            features = json.loads(metadata)["info"]["features"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{file.path}: its Hugging Face metadata is damaged ({error!r}); save it again") from error
    known = (
        {n: f for n, f in features.items() if isinstance(f, dict) and n in types} if isinstance(features, dict) else {}
    )

    images = [n for n, f in known.items() if f.get("_type") == "Image"] or [
        n for n, t in types.items() if _holds_images(t)
    ]
    if len(images) > 1:
        images = [n for n in images if n in ("image", "img")] or images
    if len(images) != 1 or not _holds_images(types[images[0]]):
        found = (
            f"{len(images)} ({', '.join(images)})" if len(images) > 1 else f"none among {', '.join(types) or 'none'}"
        )
        raise InputError(
            f"{file.path} must have one column of images (structs of bytes and path, or bytes), or one called image; "
            f"found {found}"
        )
    labels = [n for n, f in known.items() if f.get("_type") == "ClassLabel"]
    if not known and "label" in types and pa.types.is_integer(types["label"]):
        labels = ["label"]
    if len(labels) > 1:
        chosen = next((n for n in ("label", "labels") if n in labels), labels[0])
        say(f"{file.path.name} has the class labels {', '.join(labels)}: taking {chosen}")
        labels = [chosen]
    label = labels[0] if labels else None
    if label is not None and not pa.types.is_integer(types[label]):
        raise InputError(f"{file.path}: the class labels in {label} are {types[label]}; expected integers")
    class_names = known.get(label, {}).get("names") if label is not None else None
    if class_names is not None and not (
        isinstance(class_names, list)
        and 0 < len(class_names) <= MAX_CLASSES
        and all(isinstance(n, str) for n in class_names)
    ):
        raise InputError(f"{file.path}: the class names of {label} are no list of 1 to {MAX_CLASSES:,} names")
    texts = tuple(n for n, t in types.items() if pa.types.is_string(t) or pa.types.is_large_string(t))
    return _Columns(images[0], label, class_names, texts)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return "bytes" in names and _holds_images(names["bytes"])
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
