"""From a source to a store: decode (decoding.py), divide (split.py), write and noise.

Memory is that of a few hundred pictures and of some numbers a picture, whatever the size of the set. Everything is made
in a folder beside the store, `.NAME.preparing`, that a killed process leaves and the next call goes on from; the store
appears in one step, when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastambient.console import progress, say, shown_name, warn
from fastambient.data.decoding import Decoded, decode, has_progress
from fastambient.data.handout import noised_by_system, random_ids, shuffle
from fastambient.data.items import Source
from fastambient.data.mixed import noised
from fastambient.data.near_duplicates import MIN_RESOLUTION, join_groups, near_duplicate_groups
from fastambient.data.shards import Written, write_npy
from fastambient.data.split import MIN_SIDE, split
from fastambient.data.store import FORMAT, NOISY, VERSION, Store, is_store
from fastambient.data.text import line_offsets, write_lines
from fastambient.errors import FastambientError, InputError, check_seed
from fastambient.files import keep_out_of_git, refuse_existing, resumable_folder, sha256_file, write_bytes, write_json

SHARD_BYTES = 256 << 20
DEDUP = ("off", "keep", "drop")

_PIECE = 1 << 18  # values noised or copied at once, or one picture: noising takes some 75 bytes each


@dataclass(frozen=True)
class Request:
    """What a store is made to hold; see `prepare`."""

    sigma_tn: float | None = None
    noise_seed: int | None = None
    train: int | None = None
    holdout: int | None = None
    split_seed: int = 0
    noisy: str = "none"
    shard_bytes: int = SHARD_BYTES
    dedup: str | None = None
    hand_out: bool = False
    captions: bool | None = None


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    workers: int = 1,
    **options: Any,
) -> Store:
    """Read a source once and write it as a store.

    The split divides distinct pictures, by a permutation of their ids: it depends on the pictures, the counts and
    `split_seed`, not on file names. Exact duplicates stay in the data, all copies on one side, and mirror images with
    them: a run with x-flips trains on both.

    Parameters
    ----------
    source : an open source
    out : the folder to make
    force : replace an existing store (never another kind of folder)
    workers : processes that decode, of the spawn method: a script that asks for more than 1 needs the usual
        ``if __name__ == "__main__":``
    options : fields of `Request` by name
        sigma_tn : noise level of the training set, in units of the [-1, 1] images; needed for noised copies
        noise_seed : seed of the fixed noise, 64 bits; default: 64 bits from the operating system. A secret.
        train, holdout : numbers of images. By default a tenth is held out (at least 2, which an evaluation needs, of 4
            images on; at most 10,000) and the rest trains; of the built-in digits 100 train and the rest is held out.
        split_seed : which images train, 64 bits
        noisy : "none", or the dtype of stored noised training images: "float16", "float32"
        shard_bytes : size of a shard
        dedup : near-duplicates by perceptual hash: "off", "keep" them on one side, "drop" all but the first of each
            group, exact duplicates and mirror images included; the groups are listed in near_duplicates.json. Default
            "keep", and "off" for pictures that are too small for the hash
        hand_out : a store for somebody who may see noised images alone: see handout.py
        captions : whether sidecar text is stored; default yes, in a hand-out no

    Raises
    ------
    InputError : a bad image or number, or `out` exists, or another process prepares it
    FastambientError : writing failed, for instance on a full disk. No store is left behind; what is decoded is, where
        it is more than 64 MB, and the next call goes on from it.
    """
    out, request = Path(out), Request(**options)
    if request.dedup is None:
        request = replace(request, dedup="keep" if source.resolution >= MIN_RESOLUTION else "off")
    _check(out, request, force=force)
    if source.enlarged:
        of = f"{source.enlarged:,} of {source.looked_at:,} images"
        looked = " that were looked at" if source.looked_at < source.length else ""
        warn(
            f"{of}{looked} are smaller than {source.resolution} pixels and are enlarged, which adds no detail: choose a"
            " smaller resolution, or leave them out"
        )
    try:
        with resumable_folder(out, force=force, keep=has_progress) as (work, new):
            if not request.hand_out:
                request = replace(request, noise_seed=_noise_seed(work, request.noise_seed))
            decoded = decode(source, work, workers=workers, hashed=request.dedup != "off")
            if decoded.skipped:
                skipped, total = len(decoded.skipped), len(decoded.skipped) + len(decoded.ids)
                warn(f"{skipped:,} of {total:,} images were skipped")
            manifest = _write(work, new, source, decoded, request)
            if request.noise_seed is not None:
                shutil.copy2(work / "noise_seed", new / "noise_seed")  # with its rights from the first byte on
                levels = "" if request.noisy == "none" else f"{request.sigma_tn!r}\n"
                write_bytes(new / "noise_levels", levels.encode())
            if not request.hand_out:
                keep_out_of_git(new)
            write_json(new / "manifest.json", manifest)
    except OSError as error:
        raise FastambientError(
            f"the store {out} could not be written: {error.strerror or error}; {_what_is_left(out)}"
        ) from error
    except (KeyboardInterrupt, SystemExit):  # SIGTERM, too: fastambient.cli
        say(f"stopped before {out} was whole; {_what_is_left(out)}")
        raise
    store = Store.open(out, verify=False)
    there = [len(np.unique(side.ids)) for side in (store.train, store.holdout)]
    if request.hand_out:  # nothing on record says whether it is the second one
        warn(
            f"hand these pictures out once: the noise of {out} is new, and whoever has a second hand-out of them can"
            " average the two noises out"
        )
    if min(there) < MIN_SIDE and not request.hand_out:
        verb = "is" if there[1] == 1 else "are"
        warn(
            f"too few images to evaluate a run: {there[0]} train and {there[1]} {verb} held out, copies counted once; "
            f"evaluate needs {MIN_SIDE} of each"
        )
    return store


def _what_is_left(out: Path) -> str:
    left = out.with_name(f".{out.name}.preparing").is_dir()
    return "run the same command again to go on" if left else "nothing was left behind"


def _check(out: Path, request: Request, *, force: bool) -> None:
    r = request
    if r.noisy not in NOISY:
        raise InputError(f"--noisy must be one of {', '.join(NOISY)}, got {r.noisy!r}")
    if r.dedup not in DEDUP:
        raise InputError(f"--dedup must be one of {', '.join(DEDUP)}, got {r.dedup!r}")
    if r.sigma_tn is not None and not (math.isfinite(r.sigma_tn) and r.sigma_tn >= 0):
        raise InputError(f"--sigma-tn must be a finite number, 0 or more, got {r.sigma_tn}")
    if r.sigma_tn is None and r.noisy != "none":
        raise InputError(f"--noisy {r.noisy} needs a noise level: pass --sigma-tn S")
    if r.train is not None and r.train < 1:
        raise InputError(f"--train must be 1 or more, got {r.train}")
    if r.holdout is not None and r.holdout < 0:
        raise InputError(f"--holdout must be 0 or more, got {r.holdout}")
    check_seed("--split-seed", r.split_seed)
    if r.noise_seed is not None:
        check_seed("--noise-seed", r.noise_seed, secret=True)
    if r.hand_out:
        if r.noisy == "none" or not r.sigma_tn:
            raise InputError(
                "--hand-out holds noised images alone: pass --noisy float16 or float32, and --sigma-tn S > 0"
            )
        if r.noise_seed is not None:
            raise InputError(
                "--hand-out draws its noise from the operating system and keeps no seed: drop --noise-seed"
            )
        if r.holdout:
            raise InputError(f"--hand-out holds no clean image, so none is held out: drop --holdout {r.holdout}")
    refuse_existing(out, force=force)
    if out.is_dir() and any(out.iterdir()) and not is_store(out):
        raise InputError(f"{out} is no store, so --force does not replace it; choose another name")


def _noise_seed(work: Path, asked: int | None) -> int:
    """The seed of this store, also after a kill: what is noised already must not get a second noise."""
    file = work / "noise_seed"
    text = file.read_text(encoding="ascii", errors="replace").strip() if file.is_file() else ""
    before = int(text, 16) if re.fullmatch("[0-9a-f]{16}", text) else None
    if before is not None and asked in (None, before):
        return before
    shutil.rmtree(work / "new", ignore_errors=True)  # noised with another seed
    seed = secrets.randbits(64) if asked is None else asked
    write_bytes(file, f"{seed:016x}\n".encode(), mode=0o600)
    return seed


def _write(work: Path, new: Path, source: Source, decoded: Decoded, r: Request) -> dict[str, Any]:
    ids = decoded.ids
    # An image and its mirror image, where both are there, are one picture.
    pictures = unmirrored = np.where(np.isin(decoded.mirrored, ids), np.minimum(ids, decoded.mirrored), ids)
    near = None if decoded.hashes is None else near_duplicate_groups(decoded.hashes, decoded.images)
    if near is not None:
        pictures = join_groups(pictures, near)
    rows = np.unique(pictures, return_index=True)[1] if r.dedup == "drop" or r.hand_out else np.arange(len(ids))
    rows.sort()
    sides: dict[str, np.ndarray]
    if r.hand_out:
        train = rows if r.train is None else rows[split(pictures[rows], source, r.train, 0, r.split_seed)[0]]
        sides = {"train": train[shuffle(len(train))], "holdout": train[:0]}
    else:
        both = split(pictures[rows], source, r.train, r.holdout, r.split_seed)
        sides = {side: rows[chosen] for side, chosen in zip(("train", "holdout"), both, strict=True)}
    sigma_data = decoded.standard_deviation(sides["train"])
    if not sigma_data > 1e-6:
        raise InputError(
            f"the training images of {source.name} are all of one colour: there is nothing to learn from them"
        )
    if source.num_classes:
        _warn_of_two_classes(decoded, rows)
    texts = bool(source.text_kinds) and (not r.hand_out if r.captions is None else r.captions)
    writer = _Writer(work, new, decoded, r, sides)
    with progress(f"writing {source.name}", sum(map(len, sides.values()))) as advance:
        for side, chosen in sides.items():
            writer.write_side(side, chosen, labelled=bool(source.num_classes), texts=texts, advance=advance)
    if near is not None and not r.hand_out:
        writer.write_groups(pictures)
    train_ids, train_pictures = ids[sides["train"]], unmirrored[sides["train"]]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": source.name,
        "counts": {"images": len(ids), "skipped": len(decoded.skipped)},
        "shape": list(decoded.images.shape[1:]),
        "labels": {"num_classes": source.num_classes, "names": source.class_names},
        "sigma_tn": r.sigma_tn,
        "noisy": r.noisy,
        "sigma_data": sigma_data,
        "split": {
            "seed": r.split_seed, "train": len(sides["train"]), "holdout": len(sides["holdout"]),
            "duplicates": len(rows) - len(np.unique(ids[rows])),
            # of training images: both an image and its mirror image are there
            "mirrored_pairs": len(np.unique(train_ids)) - len(np.unique(train_pictures)),
        },
        "files": {name: asdict(written) for name, written in sorted(writer.files.items())},
    }  # fmt: skip
    if r.dedup == "drop":
        manifest["counts"]["dropped"] = len(ids) - len(rows)
    if r.hand_out:  # says nothing of the pictures that are not in it, nor which file they came from
        manifest |= {"hand_out": True, "source": "hand-out", "counts": {"images": len(sides["train"])}}
        manifest["sigma_data"] = max(round(sigma_data, 2), 0.01)  # all its digits would be a sum over clean pixels
        manifest["split"] = {"train": len(sides["train"]), "holdout": 0}
    return manifest


def _warn_of_two_classes(decoded: Decoded, rows: np.ndarray) -> None:
    """A picture whose copies lie in several classes teaches a model that they are the same."""
    ids, labels = decoded.ids[rows], decoded.labels[rows]
    order = np.lexsort((labels, ids))
    differs = np.flatnonzero((np.diff(ids[order]) == 0) & (np.diff(labels[order]) != 0))
    if not len(differs):
        return
    both = np.sort(rows[order[[differs[0], differs[0] + 1]]])
    names = " and ".join(shown_name(name) for name, _ in decoded.names_and_texts(both))
    n = len(np.unique(ids[order[differs]]))
    warn(
        f"{n:,} picture{'s lie' if n > 1 else ' lies'} in more than one class, as copies of each other ({names}): a"
        " class-conditional model learns them as both; keep one of each"
    )


class _Writer:
    """Writes the arrays of a new store; what an earlier try wrote for the same request is checked and taken over."""

    def __init__(self, work: Path, new: Path, decoded: Decoded, request: Request, sides: dict[str, np.ndarray]) -> None:
        self.new, self.decoded, self.request, self.files = new, decoded, request, dict[str, Written]()
        self._journal = work / "journal.jsonl"
        # Not the seed: its hash would give a small one away. Where it changed, `_noise_seed` has dropped it all.
        digest = hashlib.sha256(repr((replace(request, noise_seed=None), decoded.images.shape)).encode())
        for rows in sides.values():
            digest.update(decoded.ids[rows].tobytes())
        head = json.dumps({"request": digest.hexdigest()})
        self._earlier: dict[str, Written] = {}
        lines = self._journal.read_text("utf-8", "replace").split("\n") if self._journal.is_file() else [""]
        whole = lines[:-1]  # a kill may have cut off the last one
        if whole and whole[0] == head and new.is_dir():
            for line in whole[1:]:
                name, size, sha256 = json.loads(line)
                self._earlier[name] = Written(size, sha256)
        else:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            whole = [head]
        write_bytes(self._journal, "".join(f"{line}\n" for line in whole).encode())

    def _npy(self, name: str, shape: tuple[int, ...], dtype: Any, pieces: Iterable[np.ndarray]) -> None:
        self._keep(name, lambda: write_npy(self.new / name, shape, dtype, pieces))

    def _keep(self, name: str, write: Callable[[], Written]) -> None:
        file, before = self.new / name, self._earlier.get(name)
        if before is not None and file.is_file() and sha256_file(file) == before.sha256:
            self.files[name] = before
            return
        self.files[name] = written = write()
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, written.bytes, written.sha256]) + "\n")

    def write_side(
        self, side: str, rows: np.ndarray, *, labelled: bool, texts: bool, advance: Callable[[int], None]
    ) -> None:
        r, decoded = self.request, self.decoded
        (self.new / side).mkdir(exist_ok=True)
        shape = decoded.images.shape[1:]
        ids = random_ids(len(rows)) if r.hand_out else decoded.ids[rows]
        self._npy(f"{side}/ids.npy", ids.shape, np.int64, [ids])
        if labelled:
            self._npy(f"{side}/labels.npy", ids.shape, np.int64, [decoded.labels[rows]])
        noisy = NOISY[r.noisy] if side == "train" else None
        if not r.hand_out:
            for name, part in _shards(f"{side}/images", rows, math.prod(shape), r.shard_bytes):
                self._npy(name, (len(part), *shape), np.uint8, (decoded.images[p] for p in _pieces(part, shape)))
                if noisy is None:
                    advance(len(part))
        if noisy is not None and r.sigma_tn is not None:
            row_bytes = math.prod(shape) * np.dtype(noisy).itemsize
            for name, part in _shards(f"{side}/noisy", rows, row_bytes, r.shard_bytes):
                self._npy(name, (len(part), *shape), noisy, (self._noised(p) for p in _pieces(part, shape)))
                advance(len(part))
        if not r.hand_out:  # a file name says who is in the picture
            self._lines(f"{side}/names", (name for name, _ in decoded.names_and_texts(rows)), len(rows))
        if texts:
            found: Iterable[dict[str, str]] = (text for _, text in decoded.names_and_texts(rows))
            if r.hand_out:  # in another order than the source's, which alone is read fast: by way of memory
                in_order = np.argsort(rows)
                place = np.argsort(in_order).tolist()
                read = [text for _, text in decoded.names_and_texts(rows[in_order])]
                found = (read[i] for i in place)
            self._lines(f"{side}/text", found, len(rows))

    def _lines(self, stem: str, values: Iterable[Any], count: int) -> None:
        file = self.new / f"{stem}.jsonl"
        for name in (f"{stem}.jsonl", f"{stem}_offsets.npy"):  # anew: files may have been renamed since an earlier try
            self._earlier.pop(name, None)
        self._keep(f"{stem}.jsonl", lambda: write_lines(file, values))
        self._npy(f"{stem}_offsets.npy", (count + 1,), np.int64, [line_offsets(file)])

    def write_groups(self, pictures: np.ndarray) -> None:
        """near_duplicates.json: the names of all images that share a picture; ``dedup="drop"`` keeps the first of each
        group."""
        _, picture, sizes = np.unique(pictures, return_inverse=True, return_counts=True)
        rows = np.flatnonzero(sizes[picture] > 1)
        groups: dict[int, list[str]] = {}
        for row, (name, _) in zip(rows.tolist(), self.decoded.names_and_texts(rows), strict=True):
            groups.setdefault(int(picture[row]), []).append(name)
        file = self.new / "near_duplicates.json"
        write_json(file, {"images": len(rows), "groups": list(groups.values())})
        self.files[file.name] = Written(file.stat().st_size, sha256_file(file))
        if groups:
            dropped = self.request.dedup == "drop"
            fate = "all but the first of each dropped" if dropped else "each on one side of the split"
            say(f"{len(rows):,} images in {len(groups):,} groups of near-duplicates, {fate}: see {file.name}")

    def _noised(self, rows: np.ndarray) -> np.ndarray:
        """x_n = x0 + sigma_tn * eps; eps is the system's in a hand-out."""
        r, images = self.request, self.decoded.images[rows]
        assert r.sigma_tn is not None
        if r.noise_seed is not None:
            return noised(images, self.decoded.ids[rows], r.sigma_tn, r.noise_seed)
        return noised_by_system(images, r.sigma_tn)


def _shards(stem: str, rows: np.ndarray, row_bytes: int, shard_bytes: int) -> Iterator[tuple[str, np.ndarray]]:
    count = max(1, shard_bytes // row_bytes)
    for number, start in enumerate(range(0, len(rows), count)):
        yield f"{stem}-{number:05d}.npy", rows[start : start + count]


def _pieces(rows: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    count = max(1, _PIECE // math.prod(shape))
    return (rows[i : i + count] for i in range(0, len(rows), count))
