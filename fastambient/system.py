"""What is here: versions, devices, and the implementations of each operator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

_PACKAGES = ("fastambient", "torch", "triton", "numpy", "safetensors", "pillow", "scikit-learn", "scipy")
_OPERATORS = ("ambient_noise", "ambient_loss")


def information() -> dict[str, dict[str, Any]]:
    """Sections of name -> value, all JSON types."""
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
        "bf16_on_cpu": "avx512_bf16" in _cpu_flags(),
    }
    return {"versions": versions, "devices": devices, "operators": dict.fromkeys(_OPERATORS, "reference")}


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()
