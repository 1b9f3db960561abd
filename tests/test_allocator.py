"""What keeps freed memory, counted in page faults of a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")

_PROGRAM = """
import resource, sys
import torch
from fastambient.allocator import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def step():  # like activations: larger than glibc ever keeps (32 MiB), and many smaller
    tensors = [torch.ones(12 << 20)] + [torch.ones(1 << 20) for _ in range(8)]
    return sum(float(t[0]) for t in tensors)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(how: str, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how], env=clean | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_a_step_takes_no_memory_anew() -> None:
    _, usual = _run("usual")
    kept, faults = _run("keep")
    assert kept == "True"
    assert usual > 100  # 48 MiB mapped anew in each step, in pages of 4 KiB or 2 MiB
    assert faults < usual / 4


def test_the_environment_has_the_last_word() -> None:
    assert _run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
    assert _run("keep", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0] == "False"
