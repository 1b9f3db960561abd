"""Load the compiled libraries that lie beside this file, each in its own try, and say why one is not there.

    libfastambient_cpu.so    all operators in C++ (torch.ops.fastambient_native)
    libfastambient_cuda.so   AdamEMA in CUDA C++

FASTAMBIENT_NATIVE=off (FASTAMBIENT_CUDA=off) leaves them unloaded, =on makes a missing one an error.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

_HERE = Path(__file__).parent
LIBRARIES = {
    "cpu": ("libfastambient_cpu.so", "FASTAMBIENT_NATIVE"),
    "cuda": ("libfastambient_cuda.so", "FASTAMBIENT_CUDA"),
}


def load(kind: str) -> str | None:
    """Load the library of a kind ("cpu" or "cuda"); None if it is loaded, else why not.

    Raises
    ------
    RuntimeError : its environment variable is "on", and it cannot be loaded
    """
    name, variable = LIBRARIES[kind]
    wanted = os.environ.get(variable, "auto")
    if wanted == "off":
        return f"switched off by {variable}=off"
    if kind == "cuda" and not torch.cuda.is_available():
        reason = "there is no CUDA device"
    elif not (_HERE / name).is_file():
        reason = f"{name} was not built (no compiler, CMake or torch when fastambient was installed)"
    else:
        try:
            torch.ops.load_library(str(_HERE / name))
            return None
        except (OSError, RuntimeError) as error:
            reason = f"{name} cannot be loaded: {' '.join(str(error).split())}"
    if wanted == "on":
        raise RuntimeError(f"{variable}=on: {reason}")
    return reason


# At import, so that asking costs nothing and torch.compile can look through it.
_REASON = load("cpu")
_FUNCTIONS = {"conv2d": "convolution"}  # of torch.ops.fastambient_native, where not named as the operator is
_NAMES = ("ambient_noise", "ambient_loss", "group_norm_silu", "adam_ema", "dropout", "random_words", "conv2d",
          "residual", "resample")  # fmt: skip
OPERATORS = frozenset(
    name for name in _NAMES if _REASON is None and hasattr(torch.ops.fastambient_native, _FUNCTIONS.get(name, name))
)


def missing(operator: str, device: str = "cpu") -> str | None:
    """Why no compiled library runs an operator on a type of device, or None.

    Raises
    ------
    RuntimeError : on "cuda", where FASTAMBIENT_CUDA=on and that library cannot be loaded
    """
    if device == "cuda" and operator == "adam_ema":
        return _cuda_reason()
    if device != "cpu":
        return f"the compiled code of {operator} runs on CPUs, not on {device}"
    if operator in OPERATORS:
        return None
    return _REASON or f"the library holds no {operator}"


@cache
def _cuda_reason() -> str | None:
    return load("cuda")
