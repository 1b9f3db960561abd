"""Signals that end a run: after its checkpoint, and with the line that continues it."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fastambient.console import program
from fastambient.errors import FastambientError


class Interrupted(FastambientError):
    """Ctrl-C or SIGTERM, after the checkpoint was written. Exit code 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def how_to_resume(path: Path) -> str:
    return f"resume with: {program()} train --resume {shlex.quote(str(path))}"


class StopSignal:
    """Remembers a first Ctrl-C or SIGTERM for the loop to act on; a second one acts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @contextmanager
    def listen(self) -> Iterator[StopSignal]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
