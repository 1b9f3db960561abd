"""Checkpoints: safetensors and JSON, whole or absent, checked before they are used.

checkpoints/nimg-000000064000/state.safetensors   model.*, ema.*, optimizer.*
                             /state.json          nimg, sizes of the logs, sums that are still open, how it ended
                             /SHA256SUMS          of both, in the usual text form
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastambient.console import warn
from fastambient.errors import FastambientError, InputError
from fastambient.files import new_folder, sha256_file

FORMAT_VERSION = 1
_NAME = re.compile(r"nimg-(\d{12})")


class CorruptCheckpoint(Exception):
    """A checkpoint that must not be used; its message says why."""


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def save(folder: Path, nimg: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `nimg` images and drop all but the last `keep`.

    Raises
    ------
    FastambientError : the disk is full or not writable; earlier checkpoints are untouched
    """
    path = folder / f"nimg-{nimg:012d}"
    try:
        with new_folder(path, force=True) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
            body = {"format_version": FORMAT_VERSION, "nimg": nimg} | state
            (temporary / "state.json").write_text(json.dumps(body))
            sums = "".join(f"{sha256_file(temporary / n)}  {n}\n" for n in ("state.safetensors", "state.json"))
            (temporary / "SHA256SUMS").write_text(sums)
    except (OSError, SafetensorError) as error:
        kept = checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise FastambientError(f"cannot write the checkpoint {path}: {error}; {last}") from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of one checkpoint; CorruptCheckpoint where its sums do not agree."""
    try:
        lines = (path / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name in ("state.safetensors", "state.json"):
            if sha256_file(path / name) != sums.get(name):
                raise CorruptCheckpoint(f"{name} does not match its checksum")
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptCheckpoint(str(error)) from None
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint format {state.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return tensors, state


def last_state(folder: Path) -> dict[str, Any] | None:
    """state.json of the newest checkpoint, as it stands; None where there is none, or it cannot be read."""
    found = checkpoints(folder)
    if not found:
        return None
    try:
        state = json.loads((found[-1] / "state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def load_latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest sound checkpoint; corrupt ones are named and passed over. None where there is none at all.

    Raises
    ------
    FastambientError : there are checkpoints, and every one is corrupt
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load(path)
        except CorruptCheckpoint as reason:
            warn(f"the checkpoint {path} is corrupt ({reason}); falling back to the one before")
    if found:
        raise FastambientError(f"every checkpoint in {folder} is corrupt; start again with --force or restore a copy")
    return None
