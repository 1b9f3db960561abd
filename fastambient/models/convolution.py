"""3x3 convolutions whose weight gradient is a product of matrices, on a CPU.

oneDNN's weight gradient of few channels-last pictures runs well below the rate of its forward pass (AMD EPYC, AVX2: 60
to 100 against 110 to 140 GFLOP/s). In channels-last memory, tap (i, j) of it is one product of matrices:

    dW[:, :, i, j] = sum over pixels p of g(p) x(p + (i, j) - 1)^T = G^T X_(i,j)

With both pictures padded to a row of w + 2, X_(i,j) is X from row i*(w + 2) + j on: nothing is copied for a tap. Small
maps, where the padding is much of the picture, gather all nine taps for one product instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Measured: 1.05 to 1.5 times as fast as oneDNN within these bounds (least at 16x16), 0.4 to 0.9 times outside.
_MIN_CHANNELS = 128
_MAX_PICTURES = 8
_SMALL_MAP = 8  # pixels
_ROWS = 2048  # pixels whose nine products run from the cache


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)``, and where it pays the weight gradient by products of matrices.

    Parameters
    ----------
    x : [N, Cin, H, W]
    weight : [Cout, Cin, 3, 3]
    bias : [Cout]
    """
    if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling() and _pays(x, weight):
        return _Conv3x3.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and 0 < len(x) <= _MAX_PICTURES
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        g = gradients[0].contiguous(memory_format=torch.channels_last)
        dx, _, dbias = torch.ops.aten.convolution_backward(
            g, x, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]],
        )  # fmt: skip
        return dx, weight_gradient(x, g, like=weight), dbias


def weight_gradient(x: Tensor, g: Tensor, *, like: Tensor) -> Tensor:
    """Gradient of a padded 3x3 convolution's weight.

    Parameters
    ----------
    x : [N, Cin, H, W] float32, channels-last, its input
    g : [N, Cout, H, W] float32, channels-last, the gradient of its output
    like : the weight [Cout, Cin, 3, 3], channels-last

    Returns
    -------
    As `like`, in its memory format
    """
    n, cin, height, width = x.shape
    cout = g.shape[1]
    gradient = torch.empty_like(like)
    taps = gradient.permute(0, 2, 3, 1)  # [Cout, 3, 3, Cin], as it lies in memory
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    if max(height, width) <= _SMALL_MAP:
        across, down, pictures = padded.stride(2), padded.stride(1), padded.stride(0)
        windows = padded.as_strided((n, height, width, 3, 3, cin), (pictures, down, across, down, across, 1))
        rows = g.permute(0, 2, 3, 1).reshape(-1, cout)
        torch.mm(rows.t(), windows.reshape(-1, 9 * cin), out=taps.view(cout, 9 * cin))
        return gradient
    row = width + 2
    X = padded.view(-1, cin)
    G = F.pad(g.permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2)).view(-1, cout)  # zeros meet what lies past a row's end
    used = len(G) - 2 * row - 2  # the last two rows of the last picture are padding
    for first in range(0, used, _ROWS):
        some = G[first : min(first + _ROWS, used)].t()
        for i in range(3):
            for j in range(3):
                start = first + i * row + j
                tap, pixels = taps[:, i, j], X[start : start + some.shape[1]]
                torch.addmm(tap, some, pixels, beta=float(first > 0), out=tap)
    return gradient
