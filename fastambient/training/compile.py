"""torch.compile of the network's blocks: `training.compile`, with a cache on disk and a fall-back.

Compiling happens in a pass of its own before the first step, so that a failure costs nothing but the pass: whatever
goes wrong is said in one line, and the blocks run as they are. Later steps find everything compiled, and so does the
capture of a CUDA graph at the second step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from torch import nn

from fastambient.console import duration, say, warn
from fastambient.files import cache_folder
from fastambient.models.blocks import compile_blocks
from fastambient.training.config import TrainingSettings


def wanted(settings: TrainingSettings) -> bool:
    """Only where it is asked for: no measured row shows that "auto" should."""
    return settings.compile == "on"


def compile_network(network: nn.Module, probe: Callable[[], object], *, tell: bool) -> bool:
    """Compile the blocks of `network` while `probe` runs it forward and backward; True if they are compiled then.

    Kept in $TORCHINDUCTOR_CACHE_DIR, by default ``inductor`` in the user's folder for caches.

    probe : changes nothing that stays but gradients
    tell : this rank says how long it took, or why it failed
    """
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
    began = time.perf_counter()
    compile_blocks(network, True)
    try:
        probe()
    except Exception as error:  # of any kind: of tracing, of a C++ compiler, of a disk that is full
        compile_blocks(network, False)
        if tell:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warn(f"training.compile: compiling failed ({reason}); the blocks run as they are")
        return False
    if tell:
        say(f"compiled the network's blocks in {duration(time.perf_counter() - began)}; kept in {folder}")
    return True
