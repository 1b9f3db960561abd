"""The end of a residual branch in one pass: (y + x + bias) * scale.

Mathematics
-----------
y is the branch, x the shortcut, and bias [C] that of the convolutions before them, which a GPU's library would add in a
pass of its own. Backward, over samples n and pixels p:

    d = dy * scale, the gradient of y and of x        d_bias[c] = sum_{n, p} d[n, c, p]

One pass over dy gives both. The sum is float32 over blocks and runs in a fixed order: a gradient does not depend on the
number of threads. Where scale is 1, d is dy itself, and nothing is written for it. Nothing is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastambient_kernels._registration import choose, register
from fastambient_kernels.group_norm_silu import memory_format_of


def reference(y: Tensor, x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Plain torch in at least float32, differentiable, returned in y's dtype."""
    work = torch.promote_types(y.dtype, torch.float32)
    total = y.to(work) + x.to(work)
    if bias is not None:
        total = total + bias.to(work).reshape(-1, *[1] * (y.dim() - 2))
    return (total if scale == 1 else total * scale).to(y.dtype)


def _module(impl: str) -> Any:
    """What holds the functions residual and residual_backward that fill given outputs."""
    if impl == "native":
        return torch.ops.fastambient_native
    from fastambient_kernels import residual_triton  # type: ignore[attr-defined]

    return residual_triton


def _empty(y: Tensor, x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(y)


def _empty_backward(dy: Tensor, scale: float, bias: bool) -> tuple[Tensor, Tensor]:
    # A registered operator always returns tensors: empty ones where there is nothing to compute.
    d = dy.new_empty(0) if scale == 1 else torch.empty_like(dy)
    return d, dy.new_empty(dy.shape[1] if bias else 0, dtype=torch.float32)


def _run(impl: str) -> Any:
    def run(y: Tensor, x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        out = _empty(y, x, bias, scale)
        _module(impl).residual(y, x, bias, scale, out)
        return out

    return run


def _run_backward(impl: str) -> Any:
    def run(dy: Tensor, scale: float, bias: bool) -> tuple[Tensor, Tensor]:
        d, d_bias = _empty_backward(dy, scale, bias)
        _module(impl).residual_backward(dy, scale, None if scale == 1 else d, d_bias if bias else None)
        return d, d_bias

    return run


_ops, _backward_ops = {}, {}
for _impl in ("native", "triton"):
    _ops[_impl] = register(
        f"residual_{_impl}(Tensor y, Tensor x, Tensor? bias, float scale) -> Tensor", _run(_impl), _empty
    )
    _backward_ops[_impl] = register(
        f"residual_backward_{_impl}(Tensor dy, float scale, bool bias) -> (Tensor, Tensor)",
        _run_backward(_impl),
        _empty_backward,
    )


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, bias: Tensor | None, scale: float, impl: str) -> Tensor:  # type: ignore[override]
        ctx.scale, ctx.impl, ctx.memory_format = scale, impl, memory_format_of(y)
        return _ops[impl](y, x, bias, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        scale, bias = ctx.scale, ctx.needs_input_grad[2]
        d, d_bias = dy, None
        if bias or scale != 1:
            dy = dy.contiguous(memory_format=ctx.memory_format)  # it may be expanded, or in another format
            scaled, d_bias = _backward_ops[ctx.impl](dy, scale, bias)
            d = dy if scale == 1 else scaled
        return d, d, d_bias if bias else None, None, None


def residual(y: Tensor, x: Tensor, bias: Tensor | None = None, scale: float = 1.0, *, impl: str = "auto") -> Tensor:
    """(y + x + bias) * scale, computed in float32 and rounded once; gradients of every input.

    Parameters
    ----------
    y : float [N, C, ...], contiguous or channels-last; float32 or bfloat16. Under "auto", float64 goes through the
        reference, whatever FASTAMBIENT_IMPL says
    x : as y; brought to its memory format. Of two dtypes both become the wider one
    bias : float [C], or None
    impl : "auto", "reference", "triton" or "native"

    Returns
    -------
    [N, C, ...] in y's memory format

    Raises
    ------
    TypeError, ValueError : shapes or dtypes that do not fit
    RuntimeError : the implementation that was asked for is not available here
    """
    shape, dtype = y.shape, y.dtype  # each look at a tensor is time
    if len(shape) < 2 or not dtype.is_floating_point or not x.dtype.is_floating_point:
        raise TypeError(f"y and x must be float [N, C, ...], got {dtype} {list(shape)} and {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"x must be {list(shape)} as y is, got {list(x.shape)}")
    if bias is not None and bias.shape != (shape[1],):
        raise ValueError(f"bias must be [{shape[1]}], got {list(bias.shape)}")
    if x.dtype != dtype:
        dtype = torch.promote_types(dtype, x.dtype)
        y, x = y.to(dtype), x.to(dtype)
    if dtype == torch.float64 and impl == "auto":
        impl = "reference"
    taken = choose("residual", impl, y.device, dtype)
    if taken == "reference" or y.numel() == 0:
        return reference(y, x, bias, scale)
    memory_format = memory_format_of(y)
    y, x = y.contiguous(memory_format=memory_format), x.contiguous(memory_format=memory_format)
    if bias is not None:
        bias = bias.float().contiguous()  # differentiable: a gradient in its own dtype
    if not torch.is_grad_enabled():  # sampling: autograd's part of a call would cost as much as a small pass
        return _ops[taken](y, x, bias, float(scale))
    return _Residual.apply(y, x, bias, float(scale), taken)
