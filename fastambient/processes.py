"""Processes that this program starts."""

from __future__ import annotations

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Let the kernel end this process when its parent ends, however that happens (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
