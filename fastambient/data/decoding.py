"""The first half of `prepare`: every picture decoded once, on all cores, into chunks that outlive a killed process.

A chunk is a range of the source's rows: `chunk-START.npy` with the pixels, then `chunk-START.npz` with all else and the
fingerprint of the files it was made from. A chunk is taken over from an earlier try where its fingerprint and its
pixels' ids agree, so that a repaired picture costs its chunk alone.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastambient.console import progress
from fastambient.data.ids import image_id
from fastambient.data.items import Source
from fastambient.data.near_duplicates import perceptual_hash
from fastambient.data.shards import ShardedArray, write_npy
from fastambient.errors import FastambientError, InputError
from fastambient.files import write_bytes
from fastambient.processes import die_with_parent

_CHUNK_BYTES = 64 << 20  # of pixels; few chunks for the address space, small ones for workers and progress
_CHUNK_ROWS = (256, 8192)
_COLUMNS = ("ids", "mirrored", "labels", "sums", "squares", "hashes")
_WORTH_KEEPING = 64 << 20  # bytes of pixels
_ALONE = 2000  # so few pictures are decoded here: a worker needs seconds to start


@dataclass(frozen=True)
class Decoded:
    """All pictures of a source that can be read, in its order; arrays of 8 to 32 bytes a picture in memory."""

    images: ShardedArray  # uint8 [N, C, H, W], memory-mapped
    ids: np.ndarray  # int64 [N]
    mirrored: np.ndarray  # int64 [N], ids of the mirror images
    labels: np.ndarray  # int64 [N], -1 without
    sums: np.ndarray  # int64 [N], of the pixels
    squares: np.ndarray  # int64 [N], of the pixels' squares
    hashes: np.ndarray | None  # uint64 [N], perceptual
    skipped: dict[str, str]  # name -> reason
    _chunks: list[Path]
    _ends: np.ndarray

    def standard_deviation(self, rows: np.ndarray) -> float:
        """Root mean square deviation of the pixels of `rows` / 127.5 - 1 from their mean, from exact integers."""
        n = len(rows) * math.prod(self.images.shape[1:])
        total, squares = (sum(column[rows].tolist()) for column in (self.sums, self.squares))
        return math.sqrt((n * squares - total**2) / n**2) / 127.5

    def names_and_texts(self, rows: np.ndarray) -> Iterator[tuple[str, dict[str, str]]]:
        """(name in the source, sidecar text by kind) of `rows`; one chunk's in memory, so ascending rows are fast."""
        loaded, here = -1, []
        for row in rows.tolist():
            number = int(np.searchsorted(self._ends, row, side="right"))
            if number != loaded:
                loaded, here = number, json.loads(_load(self._chunks[number])["described"].tobytes())
            name, text = here[row - (int(self._ends[number - 1]) if number else 0)]
            yield name, text


def decode(source: Source, folder: Path, *, workers: int, hashed: bool) -> Decoded:
    """Decode every picture of `source` into chunks in `folder`, on `workers` processes.

    Parameters
    ----------
    hashed : whether perceptual hashes are wanted

    Raises
    ------
    InputError : a picture cannot be read (unless the source skips such), or none can
    """
    rows = _chunk_rows(source)
    chunks = [(folder / f"chunk-{start:012d}.npz", start) for start in range(0, source.length, rows)]
    wanted = {name for path, _ in chunks for name in (path.name, path.with_suffix(".npy").name)}
    for old in folder.glob("chunk-*"):
        if old.name not in wanted:
            old.unlink()
    todo = [(str(path), start, min(start + rows, source.length), hashed) for path, start in chunks]
    workers = min(workers, len(todo)) if source.length > _ALONE else 1
    with progress(f"reading {source.name}", source.length) as advance:
        if workers == 1:
            for job in todo:
                advance(_decode_chunk(source, *job, advance=advance))
        else:
            _in_parallel(source, todo, workers, advance)
    return _gather(source, [path for path, _ in chunks])


def has_progress(folder: Path) -> bool:
    """Whether `folder` holds so many decoded pictures that they are worth keeping after an error."""
    return sum(file.stat().st_size for file in folder.glob("chunk-*.npy")) > _WORTH_KEEPING


def _chunk_rows(source: Source) -> int:
    low, high = _CHUNK_ROWS
    wanted = min(max(source.length // 256, low), high)
    return max(1, min(wanted, _CHUNK_BYTES // (source.channels * source.resolution**2)))


_Job = tuple[str, int, int, bool]  # file, first row, end, whether hashes are wanted


def _in_parallel(source: Source, todo: list[_Job], workers: int, advance: Callable[[int], None]) -> None:
    # Spawned, not forked: a fork copies locks that torch's threads may hold.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (source,)) as pool:
        futures: dict[Future[int], int] = {pool.submit(_worker_chunk, job): job[2] - job[1] for job in todo}
        try:
            for future in as_completed(futures):
                future.result()
                advance(futures.pop(future))
        except BrokenProcessPool as error:
            raise FastambientError(
                "a process that decodes pictures was killed, perhaps for lack of memory; run the same command again to "
                "go on, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what is being decoded is finished and kept


_worker_source: Source


def _start_worker(source: Source) -> None:
    global _worker_source
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets a chunk end
    _worker_source = source


def _worker_chunk(job: _Job) -> int:
    return _decode_chunk(_worker_source, *job)


def _decode_chunk(
    source: Source, path: str, start: int, stop: int, hashed: bool, *, advance: Callable[[int], None] | None = None
) -> int:
    """Rows that `advance` was not told of."""
    file = Path(path)
    shape = (source.channels, source.resolution, source.resolution)
    made_from = f"{source.fingerprint(start, stop)} {shape} {hashed}"
    if _is_sound(file, made_from):
        return stop - start
    file.unlink(missing_ok=True)
    before = set(source.skipped)
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    described: list[tuple[str, dict[str, str]]] = []
    pixels = np.empty((stop - start, *shape), np.uint8)
    said = start
    for item in source.read(start, stop):
        pixels[len(described)] = item.image
        columns["ids"].append(image_id(item.image))
        columns["mirrored"].append(image_id(item.image[..., ::-1]))
        columns["labels"].append(item.label)
        flat = item.image.reshape(-1).astype(np.int64)
        columns["sums"].append(int(flat.sum()))
        columns["squares"].append(int(flat @ flat))
        if hashed:
            columns["hashes"].append(perceptual_hash(item.image))
        described.append((item.name, item.text))
        if advance is not None:
            advance(item.row + 1 - said)
            said = item.row + 1
    n = len(described)
    write_npy(file.with_suffix(".npy"), (n, *shape), np.uint8, [pixels[:n]])
    record: dict[str, Any] = {
        name: np.array(values, np.uint64 if name == "hashes" else np.int64) for name, values in columns.items()
    }
    skipped = {name: reason for name, reason in source.skipped.items() if name not in before}
    for name, value in (("described", described), ("skipped", skipped)):
        record[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)
    _save(file, record | {"made_from": np.array(made_from)})
    return stop - said


def _is_sound(file: Path, made_from: str) -> bool:
    """Whether an earlier try decoded this chunk from the same files, with nothing skipped, and its pixels are whole."""
    try:
        record = _load(file)
        if str(record["made_from"]) != made_from or record["skipped"].tobytes() != b"{}":
            return False
        pixels = np.load(file.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        ids = record["ids"]
        return len(pixels) == len(ids) and all(image_id(p) == i for p, i in zip(pixels, ids.tolist(), strict=True))
    except (OSError, ValueError, KeyError, EOFError, InputError):
        return False


def _save(file: Path, record: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **record)
    write_bytes(file, buffer.getvalue())


def _load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def _gather(source: Source, paths: list[Path]) -> Decoded:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    skipped: dict[str, str] = {}
    for path in paths:
        record = _load(path)
        for name, column in parts.items():
            column.append(record[name])
        skipped |= json.loads(record["skipped"].tobytes())
    columns = {name: np.concatenate(column) for name, column in parts.items() if column}
    n = len(columns["ids"]) if columns else 0
    if not n:
        raise InputError(f"no image of {source.name} can be read")
    shape = (n, source.channels, source.resolution, source.resolution)
    return Decoded(
        images=ShardedArray(
            [p.with_suffix(".npy") for p, ids in zip(paths, parts["ids"], strict=True) if len(ids)], shape,
            np.dtype(np.uint8), maps=0,
        ),
        ids=columns["ids"], mirrored=columns["mirrored"], labels=columns["labels"], sums=columns["sums"],
        squares=columns["squares"], hashes=columns["hashes"] if len(columns["hashes"]) else None,
        skipped=source.skipped | skipped, _chunks=paths, _ends=np.cumsum([len(ids) for ids in parts["ids"]]),
    )  # fmt: skip
