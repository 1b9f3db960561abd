"""Convolution with stride 1 and "same" zero padding, on a CPU by our own register tiles.

Mathematics
-----------
With pixels p, taps t and x zero outside the picture,

    y[n, p, o] = bias[o] + sum_{t, c} weight[o, t, c] * x[n, p + t, c]
    dx[n, p, c] = sum_{t, o} weight[o, -t, c] * dy[n, p + t, o]
    d_weight[o, t, c] = sum_{n, p} dy[n, p, o] * x[n, p + t, c]          d_bias[o] = sum_{n, p} dy[n, p, o]

The data gradient is a convolution of dy with the kernel turned around, so one native kernel gives y and dx. Its sums
for 8 pixels by up to 24 channels stay in registers while taps and input channels pass by: a broadcast a pixel, a load
of packed weights a vector, and nothing else between the multiplications. The pixels are one and the same of 8 samples:
a tap outside the picture is then outside for all of them and is left out, 1 - ((3h - 2) / 3h)^2 of the arithmetic of
an h x h picture (31 % at 4, 16 % at 8), and a thread takes whole samples, so threads meet once a call.

The weight gradient is a product of two matrices that have a row a pixel, long where the others are short. Libraries'
kernels for it run at half the rate of the forward pass and less on channels-last pictures, which is what all other
operators are fast on. Tiles of d_weight stay in registers while blocks of pixels pass by (the blocking of Goto & van de
Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008), read from where they lie, without the pixels whose
tap is outside. All sums run in a fixed order: no result depends on the number of threads.

Square pictures of h = 4, 8 or 16 pixels, 16 or more of them (32 for d_weight), with channels in eights, take 3x3
kernels by their spectra.
With one pixel of the border of zeros a picture has period N = h + 1 in both directions, and a kernel that reaches one
pixel far meets nothing but zeros where the period wraps: for all frequencies f of the N x N discrete Fourier transform

    Y[n, f, o] = sum_c X[n, f, c] conj(W[o, f, c])          DW[o, f, c] = sum_n conj(DY[n, f, o]) X[n, f, c]

give y and d_weight exactly, without padding, tiles or overlap. A real picture has 1 real and (N^2 - 1) / 2 complex
numbers (N is odd), and with ac, bd and (a + b)(c + d) three real products make a complex one: 37, 121 and 433
multiplications a picture and pair of channels, where pixels take 100, 484 and 2,116 (without taps outside) and
Winograd's F(2x2, 3x3) 64, 256 and 1,024. Each number is a product of two matrices, [samples x in] by [in x out], which
the 1x1 tiles compute. Transforms are separable: even and odd parts of a line by cosines and sines, at 12 operations a
pixel and channel (22 at h = 16). The bias is part of the first number; d_bias is the sum of dy's first numbers. Errors
are smaller than those of pixels, because sums are over channels alone and a transform is orthogonal: 3e-7 of the
largest entry, where pixels give 7e-7 to 1.5e-6 and torch's convolution the same (2e-6 for d_weight). Mathieu, Henaff &
LeCun, "Fast Training of Convolutional Networks through FFTs", 2014; Zlateski, Jia, Li & Durand, "FFT Convolutions are
Faster than Winograd on Modern CPUs, Here is Why", 2018 (three products: Gauss).

On a GPU all three are cuDNN's, so there is no Triton form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastambient_kernels._registration import choose, differentiable_once, register

_LAST = torch.channels_last
_MOST_WEIGHTS = 2**18  # float32: they stay in a core's second cache beside the pictures
_MOST_PIXELS = 64  # a tap of the kernel


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain torch, any dtype and device, differentiable."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether "auto" takes the native forward pass and data gradient: small pictures, and few enough weights.

    There the library's kernels spend their time on the border and on being called. On large ones both reach the same
    share of the processor's peak, and a 1x1 kernel of a large picture is bound by memory.
    """
    shape = x.shape
    return weight.numel() <= _MOST_WEIGHTS and shape[2] * shape[3] <= _MOST_PIXELS * weight.shape[2] ** 2


def _empty_picture(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    n, _, height, width = x.shape
    channels = weight.shape[1 if transposed else 0]  # as separate numbers: a tuple takes torch half a microsecond more
    return torch.empty(n, channels, height, width, dtype=x.dtype, device=x.device, memory_format=_LAST)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = _empty_picture(x, weight, bias, transposed)
    torch.ops.fastambient_native.convolution(x, weight, bias, transposed, y)
    return y


convolution = register(
    "convolution_native(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor", _run, _empty_picture
)


def _empty_weight(x: Tensor, dy: Tensor, kernel: int, bias: bool) -> tuple[Tensor, Tensor]:
    out, channels = dy.shape[1], x.shape[1]
    d_weight = torch.empty(out, channels, kernel, kernel, dtype=x.dtype, device=x.device, memory_format=_LAST)
    return d_weight, x.new_empty(out if bias else 0)


def _run_weight(x: Tensor, dy: Tensor, kernel: int, bias: bool) -> tuple[Tensor, Tensor]:
    d_weight, d_bias = _empty_weight(x, dy, kernel, bias)
    torch.ops.fastambient_native.conv_weight(x, dy, d_weight, d_bias if bias else None)
    return d_weight, d_bias


conv_weight = register(
    "conv_weight_native(Tensor x, Tensor dy, int kernel, bool bias) -> (Tensor, Tensor)", _run_weight, _empty_weight
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, ours: bool) -> Tensor:
    if not ours:
        return reference(x, weight, bias)
    return convolution(x.contiguous(memory_format=_LAST), weight.contiguous(memory_format=_LAST), bias, False)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, ours: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.ours = ours
        return _forward(x, weight, bias, ours)

    @staticmethod
    @differentiable_once
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = d_weight = d_bias = None
        dy = dy.contiguous(memory_format=_LAST)  # it may be expanded, or in another format
        kernel = weight.shape[-1]
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if wants_x:
            if ctx.ours:
                dx = convolution(dy, weight.contiguous(memory_format=_LAST), None, True)
            else:
                one, pad = (1, 1), (kernel // 2, kernel // 2)
                only_x = (True, False, False)
                dx = torch.ops.aten.convolution_backward(dy, x, weight, None, one, pad, one, False, (0, 0), 1, only_x)[
                    0
                ]
        if wants_weight or wants_bias:
            d_weight, d_bias = conv_weight(x.contiguous(memory_format=_LAST), dy, kernel, wants_bias)
        return dx, d_weight, d_bias if wants_bias else None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Convolution with stride 1 and "same" zero padding; gradients of every input.

    Parameters
    ----------
    x : float [N, C, H, W]; fast where it is channels-last
    weight : float [O, C, k, k], k odd
    bias : float [O], or None
    impl : "auto", "reference" or "native". Under "auto", in float32 on a CPU, outside of autocast, native computes all
        of what `is_small` holds for; else the weight gradient alone, and of a 1x1 kernel, which is one product of
        matrices, nothing

    Returns
    -------
    float [N, O, H, W], channels-last where native computes it, else in the memory format that torch gives it

    Raises
    ------
    ValueError : a kernel that is even or not square
    RuntimeError : the implementation that was asked for is not available here, or shapes do not fit
    """
    shape = weight.shape  # each look at a tensor is time
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight must be [O, C, k, k] with k odd, got {list(shape)}")
    ours, dtype = True, x.dtype
    if impl == "auto":
        here = dtype == weight.dtype == torch.float32 and x.is_cpu and x.dim() == 4
        # Autocast may give torch's convolution another dtype than the one that is seen here.
        if not here or torch.is_autocast_enabled("cpu"):
            return reference(x, weight, bias)
        ours = is_small(x, weight)
        if shape[2] == 1 and not ours:
            return reference(x, weight, bias)
    elif impl == "native" and dtype != torch.float32:
        raise RuntimeError(f"conv2d: impl='native' is not available: it computes in float32, not {dtype}")
    if choose("conv2d", impl, x.device, dtype) == "reference" or x.numel() == 0:
        return reference(x, weight, bias)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, ours)
    return _Convolution.apply(x, weight, bias, ours)
