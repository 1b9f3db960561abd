"""Resampling of pictures by a factor of two with a small separable filter, and filtering alone: one operator.

Mathematics
-----------
With taps t[0..L-1], L even, normalised to sum(t) = 1, and x zero outside the picture, along each axis

    down     y[i] = sum_k t[k] * x[2i + k - pad]                           floor((size + 2 pad - L)/2) + 1 values
    up       y[i] = 2 * sum_k t[k] * x[(i + pad - k)/2], even i + pad - k  2 size - 2 - 2 pad + L values
    filter   y[i] = sum_k t[k] * x[i + k - pad]                            size + 2 pad - L + 1 values

With pad = L/2 - 1, "down" halves (an odd size is rounded down), "up" doubles, and a constant stays one. "Up" without
its factor is the adjoint of "down" (4 in two dimensions), and "filter" with t reversed and pad L - 1 - pad that of
"filter". So every pass, backward ones included, is the same sum for each output o:

    y[o] = sum_m weights[o mod phases, m] * x[floor((stride*o + offset)/phases) + m]

with phases = 2 for "up", whose even and odd outputs have every other tap, and stride = 2 for "down". Sums are float32;
nothing is kept for the backward pass. NCSN++ filters with [1, 3, 3, 1] (Karras et al., "Analyzing and Improving the
Image Quality of StyleGAN", 2020); [1, 1] is the 2x2 box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastambient_kernels._registration import choose, register
from fastambient_kernels.group_norm_silu import memory_format_of

MODES = ("down", "up", "filter")


def reference(x: Tensor, taps: Sequence[float], mode: str, pad: int) -> Tensor:
    """Plain torch in at least float32, differentiable, returned in x's dtype: depthwise convolutions."""
    work = torch.promote_types(x.dtype, torch.float32)
    t = torch.tensor(taps, dtype=torch.float64, device=x.device)
    weight = t.outer(t) / t.sum() ** 2 * (4 if mode == "up" else 1)
    channels = x.shape[1]
    depthwise = weight.to(work).expand(channels, 1, -1, -1)
    if mode == "up":
        y = F.conv_transpose2d(x.to(work), depthwise, stride=2, padding=pad, groups=channels)
    else:
        y = F.conv2d(x.to(work), depthwise, stride=2 if mode == "down" else 1, padding=pad, groups=channels)
    return y.to(x.dtype)


class Geometry(NamedTuple):
    """What is summed, along each axis: see above."""

    weights: list[float]  # [phases, m]
    phases: int
    stride: int
    offset: int


def geometry(taps: Sequence[float], mode: str, pad: int, factor: float) -> Geometry:
    """The sum of a mode, times `factor`, for taps of any sum."""
    total = sum(taps) / factor
    if mode != "up":
        return Geometry([t / total for t in taps], 1, 2 if mode == "down" else 1, -pad)
    length, offset = len(taps), pad + 2 - len(taps)
    weights = []
    for phase in (0, 1):
        last = phase + pad - 2 * ((phase + offset) // 2)  # the tap on the first value, from which on every other one
        weights += [taps[last - 2 * m] / total for m in range(length // 2)]
    return Geometry(weights, 2, 1, offset)


def _size(size: int, length: int, mode: str, pad: int) -> int:
    if mode == "up":
        return 2 * size - 2 - 2 * pad + length
    return (size + 2 * pad - length) // (2 if mode == "down" else 1) + 1


def _fake(
    x: Tensor, weights: Sequence[float], phases: int, stride: int, offset: int, height: int, width: int
) -> Tensor:
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _run(impl: str) -> Any:
    def run(
        x: Tensor, weights: Sequence[float], phases: int, stride: int, offset: int, height: int, width: int
    ) -> Tensor:
        y = _fake(x, weights, phases, stride, offset, height, width)
        if y.numel() == 0:
            return y
        if impl == "native":
            torch.ops.fastambient_native.resample(x, weights, phases, stride, offset, y)
        else:
            from fastambient_kernels import resample_triton  # type: ignore[attr-defined]

            resample_triton.resample(x, weights, phases, stride, offset, y)
        return y

    return run


_ops = {
    impl: register(
        f"resample_{impl}(Tensor x, float[] weights, int phases, int stride, int offset, SymInt height, SymInt width)"
        " -> Tensor",
        _run(impl),
        _fake,
    )
    for impl in ("native", "triton")
}


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, taps: list[float], mode: str, pad: int, impl: str, height: int, width: int
    ) -> Tensor:
        ctx.settings = taps, mode, pad, impl, x.shape[2], x.shape[3], memory_format_of(x)
        return _forward(x, taps, mode, pad, impl, height, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        taps, mode, pad, impl, height, width, memory_format = ctx.settings
        dy = dy.contiguous(memory_format=memory_format)  # it may be expanded, or in another format
        adjoint, factor = {"down": ("up", 1.0), "up": ("down", 2.0), "filter": ("filter", 1.0)}[mode]
        if mode == "filter":
            taps, pad = taps[::-1], len(taps) - 1 - pad
        dx = _ops[impl](dy, *geometry(taps, adjoint, pad, factor), height, width)
        return dx.contiguous(memory_format=memory_format), *[None] * 6  # a dy of one pixel is in either format


def _forward(x: Tensor, taps: list[float], mode: str, pad: int, impl: str, height: int, width: int) -> Tensor:
    return _ops[impl](x, *geometry(taps, mode, pad, 2.0 if mode == "up" else 1.0), height, width)


def resample(x: Tensor, taps: Sequence[float], *, mode: str, pad: int | None = None, impl: str = "auto") -> Tensor:
    """Filter x with outer(taps, taps)/sum(taps)^2 and halve ("down") or double ("up") its resolution, or neither.

    Parameters
    ----------
    x : float [N, C, H, W], contiguous or (faster) channels-last; float32 or bfloat16. Under "auto", float64 goes
        through the reference, whatever FASTAMBIENT_IMPL says
    taps : an even number of finite weights with a positive sum; need not be symmetric
    mode : "down", "up" or "filter"
    pad : rows and columns of zeros around x, for "up" what is cut off around y, in [0, len(taps)); by default
        len(taps)/2 - 1, with which "down" gives floor(H/2) and "up" 2H rows
    impl : "auto", "reference", "triton" or "native"

    Returns
    -------
    [N, C, H', W'] in x's dtype and memory format; sizes as above

    Raises
    ------
    TypeError, ValueError : wrong dtypes, shapes, taps or modes; nothing would be left of the picture
    RuntimeError : the implementation that was asked for is not available here
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise TypeError(f"x must be float [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    taps = [float(t) for t in taps]
    if not taps or len(taps) % 2 or not 0 < sum(taps) < float("inf"):
        raise ValueError(f"taps must be an even number of finite weights with a positive sum, got {taps}")
    pad = len(taps) // 2 - 1 if pad is None else pad
    if not 0 <= pad < len(taps):
        raise ValueError(f"pad must lie in 0 .. {len(taps) - 1}, got {pad}")
    height, width = (_size(size, len(taps), mode, pad) for size in x.shape[2:])
    if min(height, width) < 1:
        raise ValueError(f"{len(taps)} taps with pad {pad} leave nothing of {x.shape[2]}x{x.shape[3]} pixels ({mode})")
    if x.shape[1] * max(height * width, x.shape[2] * x.shape[3]) >= 2**31:
        raise ValueError(f"a sample may have 2^31 - 1 values, before and after, got {list(x.shape)} ({mode})")
    if x.dtype == torch.float64 and impl == "auto":
        impl = "reference"
    taken = choose("resample", impl, x.device, x.dtype)
    if taken == "reference" or x.numel() == 0:
        return reference(x, taps, mode, pad)
    x = x.contiguous(memory_format=memory_format_of(x))
    if not torch.is_grad_enabled():  # sampling: autograd's part of a call would cost as much as a small picture
        return _forward(x, taps, mode, pad, taken, height, width)
    return _Resample.apply(x, taps, mode, pad, taken, height, width)
