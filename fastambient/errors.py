"""The errors a user may see: one line that names the value, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class FastambientError(Exception):
    """A failure that is not the input's fault (a full disk, a lost rank). Exit code 1."""

    exit_code = 1


class InputError(FastambientError):
    """Something the user gave cannot be used. Exit code 2."""

    exit_code = 2


def data_option(name: str, value: object) -> str:
    """A data setting as ``prepare`` and as ``train`` take it: ``--holdout 5 (train: --set data.holdout=5)``."""
    return f"--{name.replace('_', '-')} {value} (train: --set data.{name}={value})"


def check_seed(name: str, seed: int, *, secret: bool = False) -> None:
    """InputError where `seed` is no unsigned 64-bit integer, which a key of the generator is. A secret one is not
    printed."""
    if not 0 <= seed < 2**64:
        raise InputError(f"{name} must be a 64-bit integer, 0 to 2^64 - 1" + ("" if secret else f", got {seed}"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; nearest: a, b"`` for the known names closest to `word`, or all of them where none is close."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(names)}"


def nearest_beside(path: Path) -> str:
    """``"; nearest: photos"``: what lies where `path`, which is not there, should, under names close to its own; ""
    where nothing does."""
    try:
        names = sorted(there.name for there in path.parent.iterdir() if not there.name.startswith("."))
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; nearest: {', '.join(str(path.with_name(name)) for name in near)}" if near else ""
