"""What is here: versions, devices, and the implementations of each operator."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from fastambient_kernels import _native, _registration

_PACKAGES = ("fastambient", "torch", "triton", "numpy", "safetensors", "pillow", "scikit-learn", "scipy",
             "nvidia-dali-cuda130", "nvidia-dali-cuda120")  # fmt: skip
# Operator -> module of its Triton kernels, None where there is none.
_OPERATORS: dict[str, str | None] = {
    "ambient_noise": "ambient_triton",
    "ambient_loss": "ambient_triton",
    "group_norm_silu": "group_norm_silu_triton",
    "adam_ema": "adam_ema_triton",
    "dropout": "random_triton",
    "random_words": "random_triton",
    "conv2d": None,
    "residual": "residual_triton",
    "resample": "resample_triton",
}
_HERE = "available"


def information() -> dict[str, dict[str, Any]]:
    """Sections of name -> value, all JSON types.

    ``operators`` names what ``impl="auto"`` takes on the best device here; ``native``, ``cuda`` and ``triton`` say for
    each operator that this implementation is available, or why not. The reference is available everywhere.
    """
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    devices: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "bf16_on_cpu": bf16_on_cpu(),
    }
    native = {name: _said(_native.missing(name)) for name in _OPERATORS}
    in_cuda = {"adam_ema": _said(_cuda_missing())}
    triton = {name: _said(_triton_missing(name, "cuda" if cuda else "cpu")) for name in _OPERATORS}
    return {
        "versions": versions,
        "devices": devices,
        "operators": {
            name: _auto({"triton": triton[name], "native": in_cuda.get(name, "")} if cuda else {"native": native[name]})
            for name in _OPERATORS
        },
        "native": native,
        "cuda": in_cuda,
        "triton": triton,
    }


def slow_operators(device: str) -> str:
    """One line that names the operators which "auto" runs in plain torch on "cpu" or "cuda", and why; "" where a fast
    path runs all of them, and where FASTAMBIENT_IMPL chose."""
    if os.environ.get("FASTAMBIENT_IMPL", "auto") != "auto":
        return ""
    by_reason: dict[str, list[str]] = {}
    for name in _OPERATORS:
        if device == "cuda":
            reason = None if name == "conv2d" else _triton_missing(name, "cuda")  # cuDNN's convolutions are fast
            reason = reason and (_cuda_missing() if name == "adam_ema" else reason)
        else:
            reason = _native.missing(name)
        if reason:
            by_reason.setdefault(reason, []).append(name)
    told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
    return f"these operators run in plain torch, which is slower: {told}" if told else ""


def _said(reason: str | None) -> str:
    return f"not available: {reason}" if reason else _HERE


def _auto(fast: dict[str, str]) -> str:
    """What "auto" takes of the fast paths of the device, the best first, or what FASTAMBIENT_IMPL says."""
    asked = os.environ.get("FASTAMBIENT_IMPL", "auto")
    return asked if asked != "auto" else next((name for name, said in fast.items() if said == _HERE), "reference")


def _triton_missing(operator: str, device: str) -> str | None:
    module = _OPERATORS[operator]
    if module is not None and importlib.util.find_spec(f"fastambient_kernels.{module}") is None:
        return f"there is no Triton kernel of {operator}"
    return _registration.unavailable(operator, "triton", torch.device(device))


def _cuda_missing() -> str | None:
    try:
        return _native.missing("adam_ema", "cuda")
    except RuntimeError as error:  # FASTAMBIENT_CUDA=on makes it one; here it is the answer
        return str(error)


def peak_resident() -> int:
    """Bytes of main memory that this process held at most; 0 where nothing says.

    Linux's own high-water mark: getrusage's also covers what the process held that this one was started from.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        if sys.platform == "win32":
            return 0
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes of main memory that a new process can take without swapping: the least of what the machine has and what
    this process's control group leaves; None where nothing says."""
    found = [free for free in (_machine_memory(), _group_memory()) if free is not None]
    return min(found, default=None)


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _group_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Version 2, or 1; memory that holds files can be had back."""
    for folder, limit, used, files in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            return None if most == "max" else max(0, int(most) - int(now) + int(stat.get(files, 0)))
        except (OSError, ValueError):
            continue
    return None


def processor() -> str:
    """The CPU's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def bf16_on_cpu() -> bool:
    """Whether the CPU multiplies in bfloat16, as AVX512_BF16 and AMX do, and Arm's BF16; False where nothing says."""
    return not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(next((line for line in file if line.startswith(("flags", "Features"))), "").split())
    except OSError:
        return set()
