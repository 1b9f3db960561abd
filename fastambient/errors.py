"""The errors a user may see: one line that names the value, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastambientError(Exception):
    """A failure that is not the input's fault (a full disk, a lost rank). Exit code 1."""

    exit_code = 1


class InputError(FastambientError):
    """Something the user gave cannot be used. Exit code 2."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; nearest: a, b"`` for the known names closest to `word`, or all of them where none is close."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(names)}"
