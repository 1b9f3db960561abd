"""One registered boundary for every fast path, and one place that chooses among implementations.

Each public function takes ``impl="auto|reference|triton|native"``:

    reference   plain torch, any device, float64-capable: what the others are tested against
    triton      Triton kernels: CUDA and ROCm devices, or a CPU under TRITON_INTERPRET=1
    native      C++ on the CPU, float32 and bfloat16; `AdamEMA` also in CUDA C++

"auto" takes native on a CPU, triton (or else native) on a GPU, where they are there, and says once for each operator
what it took; FASTAMBIENT_IMPL replaces "auto" by a name. A named implementation that is not available is an error and
never falls back.

Fast paths are operators of ``torch.ops.fastambient`` made by `register`: a schema, one function for all devices, and
a fake for tracing; an ``autograd.Function`` around them gives gradients, and that traces under ``fullgraph=True``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastambient_kernels import _native

IMPLEMENTATIONS = ("auto", "reference", "triton", "native")
_FAST_DTYPES = (torch.float32, torch.bfloat16)

_library = torch.library.Library("fastambient", "DEF")
_announced: set[str] = set()
_chosen: dict[tuple[str, str, str, torch.device, torch.dtype | None], str] = {}  # what `choose` found


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``torch.ops.fastambient.<name>`` from a schema such as ``"f(Tensor x, float eps) -> Tensor"``.

    `run` is its implementation on every device; `fake` gives outputs of the right shape, dtype and strides. Returns
    what calls it: through the dispatcher where something traces or intercepts, else `run` itself. The way through the
    dispatcher and back to Python takes some 30 us, as long as a small net's kernel.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastambient::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fastambient, name).default

    def call(first: Tensor, *rest: Any) -> Any:
        plain = type(first) is Tensor or type(first) is nn.Parameter
        if plain and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
            return run(first, *rest)
        return operator(first, *rest)

    return call


_TRITON_MISSING = None if importlib.util.find_spec("triton") else "the package triton is not installed"


def unavailable(operator: str, impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why `impl` cannot run `operator` on a device (and, if given, for a dtype); None where it can."""
    if impl == "reference":
        return None
    if dtype is not None and dtype not in _FAST_DTYPES:
        return f"fast paths compute in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if impl == "triton":
        if operator == "conv2d":
            return "a GPU's convolutions are its own library's"
        if _TRITON_MISSING:
            return _TRITON_MISSING
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels run on GPUs; on a CPU only interpreted, under TRITON_INTERPRET=1"
        return None
    return _native.missing(operator, device.type)


def choose(operator: str, impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The implementation to run: "reference", "triton" or "native".

    Raises
    ------
    ValueError : no such implementation
    RuntimeError : it was asked for by name and is not available here; says why
    """
    asked = os.environ.get("FASTAMBIENT_IMPL", "auto") if impl == "auto" else impl
    if torch.compiler.is_compiling():
        return _choose(operator, impl, asked, device, dtype)
    key = operator, impl, asked, device, dtype
    taken = _chosen.get(key)
    if taken is None:
        taken = _choose(operator, impl, asked, device, dtype)
        if taken == "native":  # loaded or not at import; whether Triton runs on a CPU is a matter of the environment
            _chosen[key] = taken
    return taken


def _choose(operator: str, impl: str, asked: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """asked : `impl`, or what FASTAMBIENT_IMPL says in place of "auto" """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto" and device.type == "meta" and (dtype is None or dtype in _FAST_DTYPES):
        return "triton"  # shapes alone, for which its fake serves: what is counted is a GPU's work, whatever is here
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"FASTAMBIENT_IMPL must be one of {', '.join(IMPLEMENTATIONS)}, got {asked!r}")
    if impl == "auto" and asked == "triton" and operator == "conv2d":
        return "reference"  # a GPU's convolutions are its own library's: there is nothing to ask for
    if asked != "auto":
        if reason := unavailable(operator, asked, device, dtype):
            raise RuntimeError(f"{operator}: impl={asked!r} is not available: {reason}")
        return asked
    first_reason = None
    for taken in ("native",) if device.type == "cpu" else ("triton", "native"):
        reason = unavailable(operator, taken, device, dtype)
        if reason is None:
            break
        first_reason = first_reason or reason
    else:
        taken = "reference"
    _announce(operator, taken, device, first_reason)
    return taken


def _announce(operator: str, taken: str, device: torch.device, reason: str | None) -> None:
    if torch.compiler.is_compiling() or device.type == "meta":  # nothing is computed there
        return
    key = f"{operator}/{device.type}/{taken}"
    if key not in _announced:
        _announced.add(key)
        if os.environ.get("FASTAMBIENT_QUIET") != "1":
            why = f" ({reason})" if reason else ""
            print(f"fastambient_kernels: {operator} on {device.type}: {taken}{why}", file=sys.stderr)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For an autograd.Function's backward: a second derivative through it is an error.

    torch's `once_differentiable` makes it one only where the incoming gradient needs a gradient itself. That of
    ``loss.sum()`` does not: a gradient penalty would then be a constant, and nothing would say so.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        every = outputs if isinstance(outputs, tuple) else (outputs,)
        refused = torch._C._functions.DelayedError(
            "fastambient_kernels: fast operators have no second derivative (group_norm_silu: impl='reference' has)",
            len(every),
        )
        return refused(*(None if t is None else t.detach().requires_grad_() for t in every))  # type: ignore[arg-type]

    return once


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A 64-bit seed as an int64 tensor with one element: no recompilation when it changes, safe in CUDA graphs."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"a seed tensor must be int64 with one element, got {seed.dtype} {list(seed.shape)}")
        return seed.to(device)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed must fit in 64 bits, got {seed}")
    tensor = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)
    if tensor.dtype != torch.int64:
        raise TypeError(f"a seed must be an integer, got {seed!r}")
    return tensor
