"""Processes that this program starts."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading


def python_command(module: str, *arguments: str) -> list[str]:
    """A command that calls `main(arguments)` of a module of this package and exits with what it returns.

    It looks for modules where this process does. ``python -m`` looks in the current folder first, and would run a file
    of the user's there that is called like a module of the standard library.
    """
    start = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", start, *arguments]


def die_with_parent() -> None:
    """Let the kernel end this process when its parent ends, however that happens (Linux).

    The kernel's parent is the thread that started this process: not for processes that a passing thread starts.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def end_with_parent() -> None:
    """End this process of `multiprocessing`'s when its parent process does, whichever thread of it started this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="parent").start()
