"""What both U-Nets are made of: initialisation, convolution with resampling, group norm, embeddings, dropout.

The architectures are those of EDM (Karras et al. 2022, Appendix F), with EDM's parameter names and shapes, so that
its weights load. The arrangement of the arithmetic is ours: resampling is one pass (of a 2x2 box, torch's own), a 1x1
kernel runs on the smaller side of a resampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastambient.errors import InputError
from fastambient_kernels import conv2d, dropout, group_norm_silu, resample
from fastambient_kernels.dropout import MAX_LAYERS, keep_mask

DropoutKey = tuple[int | Tensor, Tensor]  # (run seed, positions int64 [N]): see `fastambient_kernels.dropout`

LABEL_DROPOUT_LAYER = 0  # layer number of label dropout; blocks are numbered from 1


class Init(NamedTuple):
    """A distribution for new weights, and the factors on it for weight and bias (0: start at zero)."""

    kind: str  # "xavier_uniform", "kaiming_uniform" or "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: Sequence[int], factor: float, fan_in: int, fan_out: int) -> Tensor:
        """Variance 2/(fan_in + fan_out) (xavier) or 1/fan_in (kaiming), times factor^2, from torch's generator."""
        if factor == 0:
            return torch.zeros(*shape)
        if self.kind == "kaiming_normal":
            return torch.randn(*shape) * (factor / math.sqrt(fan_in))
        variance = 2 / (fan_in + fan_out) if self.kind == "xavier_uniform" else 1 / fan_in
        return (torch.rand(*shape) * 2 - 1) * (factor * math.sqrt(3 * variance))


class Linear(nn.Module):
    """y = x W^T + b, with EDM's initialisation."""

    def __init__(self, in_features: int, out_features: int, init: Init, *, bias: bool = True) -> None:
        super().__init__()
        fans = (in_features, out_features)
        self.weight = nn.Parameter(init.draw((out_features, in_features), init.weight, *fans))
        self.bias = nn.Parameter(init.draw((out_features,), init.bias, *fans)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Square convolution with "same" zero padding, optionally halving ("down") or doubling ("up") the resolution.

    Resampling filters with the normalised outer product of `resample_filter`; a buffer holds it, as EDM's states do.
    Its order:

    up          filter, then convolution
    down        filter, then convolution
    down_fused  convolution, then filter, with no zero padding between them

    Parameters
    ----------
    kernel : 0 (resampling alone, no parameters), 1 or 3
    resample : None, "up", "down" or "down_fused"
    resample_filter : an even number of taps
    """

    weight: nn.Parameter
    bias: nn.Parameter
    resample_filter: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, init: Init, *,
        resample: str | None = None, resample_filter: Sequence[float] = (1, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel, self.resample = kernel, resample
        if kernel:
            fans = (in_channels * kernel**2, out_channels * kernel**2)
            self.weight = nn.Parameter(init.draw((out_channels, in_channels, kernel, kernel), init.weight, *fans))
            self.bias = nn.Parameter(init.draw((out_channels,), init.bias, *fans))
        if resample:
            taps = torch.as_tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])
            self.taps = tuple(map(float, resample_filter))
            self.filter_pad = (len(self.taps) - 1) // 2
            self.box = len(self.taps) == 2 and self.taps[0] == self.taps[1]

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        """with_bias : False leaves the bias, which comes last whatever the order, to the caller"""
        pad = self.kernel // 2
        bias = self.bias if with_bias and self.kernel else None
        if self.resample == "up":
            if self.kernel == 1:  # a 1x1 kernel commutes with the filter: a quarter of the arithmetic before it
                y = self._up(conv2d(x, self.weight))
                return y if bias is None else y + bias[:, None, None]
            x = self._up(x)
        elif self.resample == "down_fused":
            # Filter and convolution commute on the zero-extended picture; in this order the convolution has stride 2.
            return F.conv2d(self._filter(x, stride=1, pad=self.filter_pad + pad), self.weight, bias, stride=2)
        elif self.resample == "down":
            x = self._filter(x, stride=2, pad=self.filter_pad)
        return conv2d(x, self.weight, bias) if self.kernel else x

    def _filter(self, x: Tensor, *, stride: int, pad: int) -> Tensor:
        if self.box:  # torch has vectorised passes for it
            return F.avg_pool2d(x, 2, stride, pad)
        return resample(x, self.taps, mode="down" if stride == 2 else "filter", pad=pad)

    def _up(self, x: Tensor) -> Tensor:
        if self.box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return resample(x, self.taps, mode="up", pad=self.filter_pad)


class GroupNorm(nn.Module):
    """Group norm with at most 32 groups of at least 4 channels; arguments of the call as in `group_norm_silu`."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if self.groups == 0 or channels % self.groups:
            raise InputError(
                f"a layer has {channels} channels, which norm groups cannot share equally; choose model.model_channels "
                "and model.channel_mult so that all widths are multiples of 4, and of 32 from 128 on"
            )
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, *, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
        silu: bool = True,
    ) -> Tensor:  # fmt: skip
        w, b = self.weight, self.bias
        return group_norm_silu(x, w, b, groups=self.groups, eps=self.eps, add=add, scale=scale, shift=shift, silu=silu)


def _cos_sin(c_noise: Tensor, freqs: Tensor) -> Tensor:
    angle = c_noise.to(freqs.dtype).outer(freqs)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class PositionalEmbedding(nn.Module):
    """[cos, sin] of c_noise at `channels`/2 frequencies falling geometrically from 1 to 1/10000: [N] -> [N, channels].

    `endpoint` tells whether 1/10000 itself is the last frequency (DDPM++) or the first one left out (ADM).
    """

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.count, self.last = channels // 2, channels // 2 - int(endpoint)

    def forward(self, c_noise: Tensor) -> Tensor:
        work = torch.promote_types(c_noise.dtype, torch.float32)
        steps = torch.arange(self.count, dtype=work, device=c_noise.device)
        return _cos_sin(c_noise, (1 / 10000) ** (steps / self.last))


class FourierEmbedding(nn.Module):
    """[cos, sin] of 2 pi f c_noise at random frequencies f ~ N(0, 16^2), fixed from then on: [N] -> [N, channels]."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, c_noise: Tensor) -> Tensor:
        return _cos_sin(c_noise, 2 * math.pi * self.freqs.to(torch.promote_types(c_noise.dtype, torch.float32)))


class Dropout(nn.Module):
    """Dropout whose mask comes from a `DropoutKey`, or from torch's generator where the key is None."""

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        if layer >= MAX_LAYERS:
            raise InputError(f"the network has more than {MAX_LAYERS - 1} blocks; choose fewer model.num_blocks")
        self.p, self.layer = p, layer

    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if key is None:
            return F.dropout(x, self.p)
        return dropout(x, key[1], p=self.p, seed=key[0], layer=self.layer)


def drop_labels(labels: Tensor, p: float, key: DropoutKey | None) -> Tensor:
    """Label dropout: the whole one-hot row [label_dim] of a sample is zeroed with probability p."""
    if key is None:
        keep = torch.rand(len(labels), 1, device=labels.device) >= p
    else:
        keep = keep_mask(key[1], 1, p=p, seed=key[0], layer=LABEL_DROPOUT_LAYER)
    return labels * keep.to(labels.dtype)


def one_hot_or_zeros(labels: Tensor | None, like: Tensor, label_dim: int) -> Tensor:
    """Checked class labels: no labels are all zeros, which is "no class"."""
    if labels is None:
        return like.new_zeros(len(like), label_dim)
    if labels.shape != (len(like), label_dim):
        raise ValueError(f"class_labels must be [{len(like)}, {label_dim}], got {list(labels.shape)}")
    return labels.to(like.dtype)


def check_sizes(
    *, img_resolution: int, img_channels: int, label_dim: int, augment_dim: int, model_channels: int,
    channel_mult: Sequence[int], channel_mult_emb: int, num_blocks: int, dropout: float, label_dropout: float,
    channel_mult_noise: int = 1, resample_filter: Sequence[float] = (1, 1),
) -> None:  # fmt: skip
    """What both networks ask of their numbers.

    Raises
    ------
    InputError : names the value, its range and what to choose
    """
    for name, value, least in (
        ("img_resolution", img_resolution, 1), ("img_channels", img_channels, 1), ("label_dim", label_dim, 0),
        ("augment_dim", augment_dim, 0), ("model_channels", model_channels, 4), ("num_blocks", num_blocks, 1),
        ("channel_mult_emb", channel_mult_emb, 1), ("channel_mult_noise", channel_mult_noise, 1),
    ):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of {least} or more, got {value!r}")
    if model_channels % 2:
        raise InputError(f"model_channels must be even (half of the embedding are sines), got {model_channels}")
    if not channel_mult or any(not isinstance(m, int) or m < 1 for m in channel_mult):
        raise InputError(f"channel_mult must hold one whole number of 1 or more a level, got {channel_mult!r}")
    halvings = 2 ** (len(channel_mult) - 1)
    if img_resolution % halvings:
        raise InputError(
            f"a resolution of {img_resolution} cannot be halved {len(channel_mult) - 1} times; choose a multiple of "
            f"{halvings}, or fewer levels in model.channel_mult"
        )
    for name, p in (("dropout", dropout), ("label_dropout", label_dropout)):
        if not 0 <= p < 1:
            raise InputError(f"{name} must be at least 0 and below 1, got {p}")
    if not resample_filter or len(resample_filter) % 2 or not sum(resample_filter) > 0:
        raise InputError(
            f"resample_filter needs an even number of taps and a positive sum, got {list(resample_filter)}"
        )
