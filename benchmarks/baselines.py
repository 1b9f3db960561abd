"""The competitors of the trainer and the sampler: our own code, from the mathematics, on the same networks and weights.

reference   what the public reference does: float32, eager, contiguous, group norm and SiLU apart, depthwise convolutions
            for resampling, bias apart, attention by einsum in float32, per-tensor clean-up, Adam without fusing,
            per-tensor average; the sampler's state in float64
strong      what a careful engineer does with torch alone, none of our operators: bfloat16 autocast where the device has
            it, channels-last, torch.compile, fused Adam, foreach clean-up and average
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastambient.models.blocks import BlockEmbeddings, UNetBlock
from fastambient.models.layers import Conv2d, DropoutKey, GroupNorm

Network = Callable[..., Tensor]


def two_regime_loss(
    images: Tensor, flips: Tensor, sigma: Tensor, network: Callable[[Tensor, Tensor], Tensor], *,
    sigma_tn: float, sigma_data: float, noises: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Loss [N] as one writes it from the formulas: two draws, masks, D, target, both losses.

    images uint8 [N, C, H, W]; `network` gets (c_in * x, c_noise); `noises` replaces the draws: fixed, fresh, as flipped.
    """
    x0 = images.float() / 127.5 - 1
    x0 = torch.where(flips[:, None, None, None], x0.flip(3), x0)
    fixed, fresh = noises or [torch.randn_like(x0), torch.randn_like(x0)]
    s = sigma[:, None, None, None]
    ambient = (s >= sigma_tn).float() if sigma_tn > 0 else torch.zeros_like(s)
    x_n = x0 + sigma_tn * fixed
    q = (s**2 - sigma_tn**2).clamp(min=0).sqrt()
    x = (1 - ambient) * (x0 + s * fresh) + ambient * (x_n + q * fresh)
    h2 = s**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / h2, s * sigma_data / h2.sqrt(), 1 / h2.sqrt()
    D = c_skip * x + c_out * network(c_in * x, sigma.log() / 4)
    r = sigma_tn**2 / s**2
    weight = h2 / (s * sigma_data) ** 2
    clean_loss = weight * (D - x0) ** 2
    ambient_loss = weight * ((1 - r) * D + r * x - x_n) ** 2
    return ((1 - ambient) * clean_loss + ambient * ambient_loss).sum((1, 2, 3))


class _PlainGroupNorm(GroupNorm):
    """Group norm, scale and shift, SiLU: a pass each."""

    def forward(
        self, x: Tensor, *, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
        silu: bool = True,
    ) -> Tensor:  # fmt: skip
        if add is not None:
            x = x + add[:, :, None, None].to(x.dtype)
        x = F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if scale is not None and shift is not None:
            scale, shift = (v[:, :, None, None].to(x.dtype) for v in (scale, shift))
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x) if silu else x


class _PlainConv2d(Conv2d):
    """Resampling by depthwise convolutions, convolution, bias: a pass each."""

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        pad = self.kernel // 2
        if self.resample in ("up", "down"):
            x = _depthwise(self, x)
        if not self.kernel:
            return x
        y = F.conv2d(x, self.weight, padding=pad + (self.filter_pad if self.resample == "down_fused" else 0))
        if self.resample == "down_fused":
            y = F.conv2d(y, _taps(self, y), stride=2, groups=y.shape[1])
        return y + self.bias[:, None, None] if with_bias else y


class _TorchConv2d(Conv2d):
    """What torch alone gives: the bias with the convolution, boxes by pooling, other filters by depthwise convolutions."""

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        pad, bias = self.kernel // 2, self.bias if with_bias and self.kernel else None
        if self.resample == "down_fused":
            channels, filter_pad = x.shape[1], self.filter_pad + pad
            if self.box:
                x = F.avg_pool2d(x, 2, 1, filter_pad)
            else:
                x = F.conv2d(x, _taps(self, x), padding=filter_pad, groups=channels)
            return F.conv2d(x, self.weight, bias, stride=2)
        if self.resample:
            if not self.box:
                x = _depthwise(self, x)
            elif self.resample == "up":
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            else:
                x = F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight, bias, padding=pad) if self.kernel else x


def _taps(layer: Conv2d, x: Tensor) -> Tensor:
    return layer.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)


def _depthwise(layer: Conv2d, x: Tensor) -> Tensor:
    if layer.resample == "up":
        return F.conv_transpose2d(x, 4 * _taps(layer, x), stride=2, padding=layer.filter_pad, groups=x.shape[1])
    return F.conv2d(x, _taps(layer, x), stride=2, padding=layer.filter_pad, groups=x.shape[1])


class _SeparateBlock(UNetBlock):
    """Sums, factors, biases and the embedding a pass each, as one writes them and as torch.compile can fuse them."""

    def _compute(self, x: Tensor, emb: Tensor, key: DropoutKey | None, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        y = self.conv0(self.norm0(x))
        if self.adaptive_scale:
            scale, shift = emb.chunk(2, dim=1)
            y = self.norm1(y, scale=scale, shift=shift)
        else:
            y = self.norm1(y, add=emb)
        y = self.conv1(self.dropout(y, key))
        x = self._rescaled(y + (x if self.skip is None else self.skip(x)))
        return self._rescaled(x + self._attend(x) + self.proj.bias[:, None, None]) if self.heads else x

    def _rescaled(self, x: Tensor) -> Tensor:
        return x if self.skip_scale == 1 else x * self.skip_scale


class _SeparateEmbeddings(BlockEmbeddings):
    """A product for each block, without the bias that `_SeparateBlock` adds by itself."""

    def forward(self, emb: Tensor) -> Iterable[Tensor]:
        return (block.affine(emb) for block in self.blocks)


class _PlainBlock(_SeparateBlock):
    """And attention as two einsums around a softmax in float32."""

    def _attend(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x, silu=False)).reshape(n * self.heads, channels // self.heads, 3, -1)
        q, k, v = qkv.float().unbind(2)
        weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
        a = torch.einsum("nqk,nck->ncq", weights, v).to(x.dtype)
        return self.proj(a.reshape(n, channels, height, width), with_bias=False)


REFERENCE = {
    GroupNorm: _PlainGroupNorm,
    Conv2d: _PlainConv2d,
    UNetBlock: _PlainBlock,
    BlockEmbeddings: _SeparateEmbeddings,
}
TORCH = {
    GroupNorm: _PlainGroupNorm,
    Conv2d: _TorchConv2d,
    UNetBlock: _SeparateBlock,
    BlockEmbeddings: _SeparateEmbeddings,
}


def rearranged(network: nn.Module, layers: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """The same network with another arrangement of the arithmetic in layers of these types; changed in place."""
    for module in network.modules():
        module.__class__ = layers.get(type(module), type(module))  # same parameters, another forward
    return network


def as_shipped(network: nn.Module) -> nn.Module:
    """The same network as the reference ships it, contiguous; changed in place."""
    return rearranged(network, REFERENCE).to(memory_format=torch.contiguous_format)


def by_torch(network: nn.Module) -> nn.Module:
    """The same network from torch's own operators, channels-last; changed in place."""
    return rearranged(network, TORCH).to(memory_format=torch.channels_last)


class PerTensorAdam:
    """Clean-up, Adam and moving average, each a loop over the parameters."""

    def __init__(self, params: Sequence[Tensor], *, lr: float) -> None:
        self.params = list(params)
        self.optimizer = torch.optim.Adam(self.params, lr=lr, foreach=False, fused=False)
        self.ema = [p.detach().clone() for p in self.params]

    def step(self, beta: float) -> None:
        for p in self.params:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for e, p in zip(self.ema, self.params, strict=True):
            e.copy_(p.detach().lerp(e, beta))


class FusedAdam:
    """The same from torch's own fused pieces."""

    def __init__(self, params: Sequence[Tensor], *, lr: float) -> None:
        self.params = list(params)
        self.detached = [p.detach() for p in self.params]
        self.optimizer = torch.optim.Adam(self.params, lr=lr, fused=True)
        self.ema = [p.detach().clone() for p in self.params]

    def step(self, beta: float) -> None:
        gradients = [p.grad for p in self.params if p.grad is not None]
        # A finite norm shows that there is nothing to clean up.
        if not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            for gradient in gradients:
                torch.nan_to_num_(gradient, nan=0, posinf=1e5, neginf=-1e5)
        for p in self.params:  # torch's fused CPU Adam reads gradients in the parameter's memory order
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, self.detached, 1 - beta)


class BaselineStep:
    """One training step of a competitor on batches that it is given.

    Parameters
    ----------
    kind : "reference" or "strong"
    network : raw network; it is taken over and changed
    """

    def __init__(
        self, kind: str, network: nn.Module, *, sigma_tn: float, sigma_data: float, lr: float, beta: float,
        bf16: bool = False,
    ) -> None:  # fmt: skip
        self.sigma_tn, self.sigma_data, self.beta, self.bf16 = sigma_tn, sigma_data, beta, bf16
        self.strong = kind == "strong"
        self.network = by_torch(network) if self.strong else as_shipped(network)
        self.call: Network = torch.compile(self.network) if self.strong else self.network
        self.optimizer = (FusedAdam if self.strong else PerTensorAdam)(list(network.parameters()), lr=lr)

    def loss(
        self, images: Tensor, flips: Tensor, sigma: Tensor, noises: Sequence[Tensor] | None = None, *,
        bf16: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """Loss [N] with its graph; `bf16` puts the network under autocast or not (default: as this competitor does)."""
        bf16 = self.strong and self.bf16 if bf16 is None else bf16

        def network(x: Tensor, c_noise: Tensor) -> Tensor:
            if self.strong:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                return self.call(x, c_noise).float()

        keywords = {"sigma_tn": self.sigma_tn, "sigma_data": self.sigma_data, "noises": noises}
        return two_regime_loss(images, flips, sigma, network, **keywords)  # type: ignore[arg-type]

    def __call__(
        self, images: Tensor, flips: Tensor, sigma: Tensor | None = None, noises: Sequence[Tensor] | None = None, *,
        P_mean: float = -1.2, P_std: float = 1.2,
    ) -> float:  # fmt: skip
        """One step; its loss, sum over pixels and mean over the batch. Without `sigma` and `noises` it draws them."""
        for p in self.optimizer.params:
            p.grad = None
        if sigma is None:
            sigma = torch.exp(P_mean + P_std * torch.randn(len(images), device=images.device))
        loss = self.loss(images, flips, sigma, noises).sum() / len(images)
        loss.backward()
        self.optimizer.step(self.beta)
        return loss.item()


def _levels(steps: int, latents: Tensor) -> Tensor:
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    i = torch.arange(steps, dtype=torch.float64, device=latents.device)
    return torch.cat([(high + i / (steps - 1) * (low - high)) ** 7, i[:1] * 0])


def _denoise(network: nn.Module, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """D(x, sigma) in float64 from a network in float32."""
    x, s = x.float(), sigma.float().expand(len(x))
    h2 = (s**2 + sigma_data**2)[:, None, None, None]
    column = s[:, None, None, None]
    out = network(x / h2.sqrt(), s.log() / 4)
    return (sigma_data**2 / h2 * x + column * sigma_data / h2.sqrt() * out).double()


def heun_float64(network: nn.Module, latents: Tensor, steps: int, *, sigma_data: float) -> Tensor:
    """EDM's deterministic sampler as its code runs it: the state in float64, the network in float32."""
    t = _levels(steps, latents)
    x = latents.double() * t[0]
    for now, after in pairwise(t):
        d = (x - _denoise(network, x, now, sigma_data)) / now
        x_next = x + (after - now) * d
        if after > 0:
            x_next = x + (after - now) * (d + (x_next - _denoise(network, x_next, after, sigma_data)) / after) / 2
        x = x_next
    return x


def dpmpp_2m_float64(network: nn.Module, latents: Tensor, steps: int, *, sigma_data: float) -> Tensor:
    """DPM-Solver++(2M) in the same arrangement, from Lu et al.'s Algorithm 2 with h the steps in -ln(sigma)."""
    t = _levels(steps, latents)
    x, before, h_before = latents.double() * t[0], None, None
    for now, after in pairwise(t):
        D = _denoise(network, x, now, sigma_data)
        h = (now / after).log()  # infinite in the last step, which goes to D itself
        slope = 0 if before is None or after == 0 else (D - before) * h / h_before
        x = after / now * x - torch.expm1(-h) * (D + slope / 2)
        before, h_before = D, h
    return x


SAMPLERS = {"heun": heun_float64, "dpmpp-2m": dpmpp_2m_float64}
