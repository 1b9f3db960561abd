"""Parquet files and Arrow streams as rows in groups, read with pyarrow a group or less at a time.

Files come from anywhere: a row group of a parquet file may not unpack to more than a stated multiple of the file, Arrow
batches must be uncompressed (as `datasets` writes them) and are validated before a value is read, and what pyarrow
raises becomes an InputError that names the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastambient.data.archives import MAX_EXPANSION, SMALL_BYTES
from fastambient.data.items import file_stamp
from fastambient.errors import InputError

_BATCH_BYTES = 32 << 20  # of images that a parquet file is decoded in at once, about
_MAX_BATCH = 1024  # rows
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class TableFile:
    """A file of rows in groups.

    Attributes
    ----------
    path, stamp : where it lies, and its `file_stamp` when it was opened
    rows : int64 [groups], rows of each
    schema : of its columns
    types : column -> type
    images : columns that may hold image files: bytes, or structs with a field `bytes`
    """

    rows: np.ndarray
    schema: pa.Schema
    types: dict[str, pa.DataType]
    images: list[str]

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, file_stamp(path, path.name)

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a group in order, `columns` of them."""
        raise NotImplementedError

    def _set_schema(self, schema: pa.Schema) -> None:
        self.schema, self.types = schema, {field.name: field.type for field in schema}
        self.images = [name for name, kind in self.types.items() if _holds_images(kind)]
        if len(self.types) < len(schema):
            raise InputError(f"{self.path} has two columns of one name, among {', '.join(self.types)}; rename one")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, struct.error) as error:
            kind, reason = self.path.suffix[1:], (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.path} is cut short, damaged or no {kind} file ({reason}); make or download it again"
            ) from error


class ParquetFile(TableFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._reading(), self._open() as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            self.rows = np.array([group.num_rows for group in groups], np.int64)
            self._set_schema(file.schema_arrow)
        if (self.rows < 0).any():
            raise InputError(f"{path} is damaged: it claims {self.rows.min():,} rows; make or download it again")

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self._reading(), self._open() as file:
            metadata, packed = file.metadata.row_group(group), self.stamp[1]
            # Of the row group alone: what it says of a column ends the process where it is damaged (pyarrow 26).
            unpacked = metadata.total_byte_size
            if unpacked > SMALL_BYTES and unpacked > MAX_EXPANSION * packed:
                raise InputError(
                    f"{self.path}: row group {group} unpacks to {unpacked:,} bytes from a file of {packed:,}: refused "
                    "as a decompression bomb"
                )
            a_row = max(unpacked // max(metadata.num_rows, 1), 1)
            rows = min(max(_BATCH_BYTES // a_row, 1), _MAX_BATCH)
            yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


class ArrowFile(TableFile):
    """An Arrow IPC stream, memory-mapped; a group is a record batch, found by its offset."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        rows: list[int] = []
        offsets: list[int] = []
        with self._reading(), pa.memory_map(str(path)) as file:
            self._set_schema(pa.ipc.open_stream(file).schema)
            while True:
                at = file.tell()
                try:
                    message = pa.ipc.read_message(file)
                except EOFError:
                    break
                if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
                    raise InputError(f"{path} has compressed or dictionary-encoded data; save the set as parquet")
                rows.append(pa.ipc.read_record_batch(message, self.schema).num_rows)
                offsets.append(at)
            file.seek(at)
            if file.read(len(_END_OF_STREAM)) != _END_OF_STREAM:  # a file that ends between two batches reads like one
                raise InputError(f"{path} is cut short: it lacks the end of an Arrow stream; copy or save it again")
        self.rows, self._offsets = np.array(rows, np.int64), np.array(offsets, np.int64)

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self._reading(), pa.memory_map(str(self.path)) as file:
            file.seek(int(self._offsets[group]))
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), self.schema).select(columns)
            batch.validate(full=True)  # offsets that point outside would be followed
            yield batch


def _is_compressed(message: bytes) -> bool:
    """Whether a record batch's flatbuffer has a compression: pyarrow would unpack whatever size it claims."""

    def field(table: int, number: int) -> int:  # where a field of a table stands, 0 where it is absent
        vtable = table - struct.unpack_from("<i", message, table)[0]
        (size,) = struct.unpack_from("<H", message, vtable)
        at = 4 + 2 * number
        offset = struct.unpack_from("<H", message, vtable + at)[0] if at < size else 0
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", message)[0], 2)  # Message.header, a table
    return bool(field(header + struct.unpack_from("<I", message, header)[0], 3))  # RecordBatch.compression


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return "bytes" in names and _holds_images(names["bytes"])
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
