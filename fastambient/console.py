"""What the program says while it works: plain lines on stderr, and a progress bar with rate and time left.

Results (tables, JSON) go to stdout; everything here goes to stderr, so that a pipe stays clean.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import category

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

WARNING = "warning: "  # begins every line of `warn`
_SHOW_AFTER_SECONDS = 2.0  # anything faster needs no bar
_PLAIN_EVERY_SECONDS = 10.0  # without a terminal: one line this often


def console() -> Console:
    """Made anew on each call, because tests and launchers replace ``sys.stderr``."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def say(message: str) -> None:
    console().print(message)


def warn(message: str) -> None:
    console().print(f"{WARNING}{message}")


def program() -> str:
    """This program as it was called, for a line to be pasted into a shell: ``.venv/bin/fastambient``, or
    ``python -m fastambient``; the bare name where another program uses the library."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("fastambient", "__main__.py"):
        return f"{shlex.quote(sys.orig_argv[0])} -m fastambient"
    return shlex.quote(str(called)) if called.stem == "fastambient" else "fastambient"


def duration(seconds: float) -> str:
    """``1d 02h``, ``3h 04m``, ``5m 06s`` or ``7s``."""
    s = int(max(seconds, 0.0))
    if s >= 86400:
        return f"{s // 86400}d {s % 86400 // 3600:02d}h"
    if s >= 3600:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 60}m {s % 60:02d}s" if s >= 60 else f"{s}s"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task) -> Text:  # type: ignore[no-untyped-def]
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"- {self.unit}/s")


@contextmanager
def progress(
    description: str, total: int, unit: str = "images", *, enabled: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)``. A bar on a terminal, otherwise a line every ten seconds; nothing before two seconds."""
    start = time.monotonic()
    done, last = 0, start
    if not enabled:
        yield lambda n: None
        return
    if not sys.stderr.isatty():

        def plain(n: int) -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - start > _SHOW_AFTER_SECONDS and now - last > _PLAIN_EVERY_SECONDS:
                last = now
                rate = done / (now - start)
                left = duration((total - done) / rate) if rate > 0 else "?"
                say(f"{description}: {done:,}/{total:,} {unit}, {rate:,.1f} {unit}/s, {left} left")

        yield plain
        return

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn(),
        console=console(), transient=True,
    )  # fmt: skip
    task = bar.add_task(description, total=total)
    shown = False

    def advance(n: int) -> None:
        nonlocal shown
        bar.advance(task, n)
        if not shown and time.monotonic() - start > _SHOW_AFTER_SECONDS:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()


def shown_name(name: str) -> str:
    """A name that a terminal and a page can show: a file's may hold line breaks, control codes and broken UTF-8."""
    return "".join("?" if category(c)[0] == "C" or category(c) in ("Zl", "Zp") else c for c in name)
