"""Convolution with stride 1 and "same" zero padding whose weight gradient is our own on a CPU.

Mathematics
-----------
With pixels p, taps t and x zero outside the picture,

    y[n, p, o] = bias[o] + sum_{t, c} weight[o, t, c] * x[n, p + t, c]
    d_weight[o, t, c] = sum_{n, p} dy[n, p, o] * x[n, p + t, c]          d_bias[o] = sum_{n, p} dy[n, p, o]

The weight gradient is a product of two matrices that have a row a pixel: long where the others are short. Libraries'
kernels for it run at half the rate of the forward pass and less on channels-last pictures, which is what all other
operators are fast on. The native form keeps tiles of d_weight in registers while blocks of pixels pass by, all taps of
a tile from the same cached block (the blocking of Goto & van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008). Its sums run in a fixed order: a gradient does not depend on the number of threads. Forward pass
and data gradient are torch's. On a GPU all three are cuDNN's, so there is no Triton form.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastambient_kernels._registration import choose, register


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain torch, any dtype and device, differentiable."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _same(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, weight.shape[1 if transposed else 0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = _same(x, weight, bias, transposed)
    torch.ops.fastambient_native.convolution(x, weight, bias, transposed, y)
    return y


convolution = register(
    "convolution_native(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor", _convolve, _same
)


@register_flop_formula(torch.ops.fastambient.convolution_native)  # type: ignore[untyped-decorator]
def _convolution_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


def _empty(x: Tensor, dy: Tensor, kernel: int, bias: bool) -> tuple[Tensor, Tensor]:
    shape = (dy.shape[1], x.shape[1], kernel, kernel)
    d_weight = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return d_weight, x.new_empty(dy.shape[1] if bias else 0)


def _run(x: Tensor, dy: Tensor, kernel: int, bias: bool) -> tuple[Tensor, Tensor]:
    d_weight, d_bias = _empty(x, dy, kernel, bias)
    torch.ops.fastambient_native.conv_weight(x, dy, d_weight, d_bias if bias else None)
    return d_weight, d_bias


conv_weight = register(
    "conv_weight_native(Tensor x, Tensor dy, int kernel, bool bias) -> (Tensor, Tensor)", _run, _empty
)


@register_flop_formula(torch.ops.fastambient.conv_weight_native)  # type: ignore[untyped-decorator]
def _flops(x: torch.Size, dy: torch.Size, kernel: int, *_: Any, **__: Any) -> int:
    n, channels, height, width = x
    return 2 * n * height * width * channels * dy[1] * kernel**2


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return reference(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = d_weight = d_bias = None
        dy = dy.contiguous(memory_format=torch.channels_last)  # it may be expanded, or in another format
        kernel = weight.shape[-1]
        if ctx.needs_input_grad[0]:
            one, pad = (1, 1), (kernel // 2, kernel // 2)
            only_x = (True, False, False)
            dx = torch.ops.aten.convolution_backward(dy, x, weight, None, one, pad, one, False, (0, 0), 1, only_x)[0]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x = x.contiguous(memory_format=torch.channels_last)
            d_weight, d_bias = conv_weight(x, dy, kernel, ctx.needs_input_grad[2])
        return dx, d_weight, d_bias if ctx.needs_input_grad[2] else None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Convolution with stride 1 and "same" zero padding; gradients of every input.

    Parameters
    ----------
    x : float [N, C, H, W]; fast where it is channels-last
    weight : float [O, C, k, k], k odd
    bias : float [O], or None
    impl : "auto", "reference" or "native". Under "auto", native computes 3x3 kernels in float32 on a CPU, outside of
        autocast; a 1x1 kernel is one product of matrices, which torch does as fast

    Returns
    -------
    float [N, O, H, W] in the memory format that torch gives it

    Raises
    ------
    ValueError : a kernel that is even or not square
    RuntimeError : the implementation that was asked for is not available here, or shapes do not fit
    """
    kernel = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[2] != kernel or kernel % 2 == 0:
        raise ValueError(f"weight must be [O, C, k, k] with k odd, got {list(weight.shape)}")
    if impl == "auto":
        # Autocast may give torch's convolution another dtype than the one that is seen here.
        wide = kernel == 1 or x.dtype != torch.float32 or weight.dtype != x.dtype or x.device.type != "cpu"
        if wide or os.environ.get("FASTAMBIENT_IMPL") == "triton" or torch.is_autocast_enabled("cpu"):
            return reference(x, weight, bias)
    elif impl == "native" and x.dtype != torch.float32:
        raise RuntimeError(f"conv2d: impl='native' is not available: it computes in float32, not {x.dtype}")
    if choose("conv2d", impl, x.device, x.dtype) == "reference" or x.numel() == 0 or not torch.is_grad_enabled():
        return reference(x, weight, bias)
    return _Convolution.apply(x, weight, bias)
