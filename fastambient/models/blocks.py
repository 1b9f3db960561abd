"""The residual block of both U-Nets, with attention, activation checkpointing and regional compilation.

The architecture is that of EDM (Karras et al. 2022, Appendix F). The arrangement of the arithmetic is ours: attention
is one fused call over [N, H*W, C] tokens, a residual branch ends in one pass with all biases, and the blocks' layers of
the embedding are one product.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastambient.errors import InputError
from fastambient.models.layers import Conv2d, Dropout, DropoutKey, GroupNorm, Init, Linear
from fastambient_kernels import residual


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network have in common."""

    emb_channels: int
    init: Init
    init_zero: Init  # last layer of each residual branch
    init_attn: Init
    dropout: float
    channels_per_head: int | None  # None: one attention head whatever the width
    adaptive_scale: bool  # the embedding scales and shifts the second norm, rather than being added before it
    resample_proj: bool  # the shortcut of a resampling block has a 1x1 kernel even if the width stays
    skip_scale: float  # on the sum of branch and shortcut
    eps: float  # of the norms
    resample_filter: Sequence[float] = (1, 1)


class UNetBlock(nn.Module):
    """Residual block: norm, convolution (with resampling), embedding, norm, dropout, convolution; then attention.

    Parameters
    ----------
    layer : number of the block within its network, from 1; names its dropout masks

    Attributes
    ----------
    recompute : activation checkpointing: nothing but the input is kept for the backward pass, which computes the block
        anew, with the same dropout mask
    compiled : the parts before and after dropout run through torch.compile, set by `compile_blocks`
    """

    recompute = False
    compiled = False

    def __init__(
        self, in_channels: int, out_channels: int, style: BlockStyle, layer: int, *,
        attention: bool = False, resample: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        s = style
        self.skip_scale, self.adaptive_scale = s.skip_scale, s.adaptive_scale
        # As in EDM, a layer narrower than one head has no attention.
        self.heads = 0 if not attention else 1 if s.channels_per_head is None else out_channels // s.channels_per_head
        if self.heads and out_channels % self.heads:
            raise InputError(
                f"{self.heads} attention heads cannot share {out_channels} channels equally; choose "
                "model.model_channels and model.channel_mult so that widths with attention are multiples of "
                f"{s.channels_per_head}"
            )
        resampling = {"resample": resample, "resample_filter": s.resample_filter}
        self.norm0 = GroupNorm(in_channels, s.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, s.init, **resampling)  # type: ignore[arg-type]
        self.affine = Linear(s.emb_channels, out_channels * (2 if s.adaptive_scale else 1), s.init)
        self.norm1 = GroupNorm(out_channels, s.eps)
        self.dropout = Dropout(s.dropout, layer)
        self.conv1 = Conv2d(out_channels, out_channels, 3, s.init_zero)
        self.skip = None
        if out_channels != in_channels or resample:
            kernel = 1 if s.resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, s.init, **resampling)  # type: ignore[arg-type]
        if self.heads:
            self.norm2 = GroupNorm(out_channels, s.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, s.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, s.init_zero)

    def forward(self, x: Tensor, emb: Tensor, key: DropoutKey | None, skip: Tensor | None = None) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, H', W'].

        emb : what `BlockEmbeddings` has for this block
        skip : the last channels of in_channels where x holds the first ones alone
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(x, emb, key, skip)
        # A keyed mask comes out the same without the generator's state, which a CUDA graph could not read.
        return checkpoint(self._compute, x, emb, key, skip, use_reentrant=False, preserve_rng_state=key is None)

    def _compute(self, x: Tensor, emb: Tensor, key: DropoutKey | None, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        begin, finish = _compiled_parts() if self.compiled else (UNetBlock._begin, UNetBlock._finish)
        return finish(self, self.dropout(begin(self, x, emb), key), x)

    # A bias is never a pass of its own, as a GPU's libraries make it: conv0's is added with the embedding's before the
    # second norm, the others with the shortcut. On a CPU, whose convolutions add it for nothing, this costs nothing.

    def _begin(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(self.norm0(x), with_bias=False)
        if self.adaptive_scale:
            scale, shift = emb.chunk(2, dim=1)
            return self.norm1(y, add=self.conv0.bias.expand(len(y), -1), scale=scale, shift=shift)
        return self.norm1(y, add=emb)  # conv0's bias is in it

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        y = self.conv1(y, with_bias=False)
        bias: Tensor = self.conv1.bias
        if self.skip is not None:
            x = self.skip(x, with_bias=False)
            bias = bias + self.skip.bias if self.skip.kernel else bias
        x = residual(y, x, bias, self.skip_scale)
        return residual(x, self._attend(x), self.proj.bias, self.skip_scale) if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        """Attention without its last bias."""
        _, channels, height, width = x.shape
        tokens = self.norm2(x, silu=False).flatten(2).transpose(1, 2)  # [N, L, C], a view in channels-last
        # The output channels of qkv are laid out as (head, channel, q/k/v); attention wants the last one first.
        split = (self.heads, channels // self.heads, 3)
        weight = self.qkv.weight.flatten(1).unflatten(0, split).movedim(2, 0).flatten(0, 2)
        bias = self.qkv.bias.unflatten(0, split).movedim(2, 0).flatten()
        qkv = F.linear(tokens, weight, bias).unflatten(2, (3, *split[:2]))  # [N, L, 3, heads, C/heads]
        y = scaled_dot_product(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        y = F.linear(y, self.proj.weight.flatten(1))
        return y.transpose(1, 2).unflatten(2, (height, width))


class BlockEmbeddings(nn.Module):
    """What each block adds of the embedding, or scales and shifts by: the blocks' `affine` layers as one product.

    One at a time, each is a call for a few rows. It has no parameters of its own.

    Attributes
    ----------
    joined : weight and bias of the product where they are kept, by `keep_joined`
    """

    joined: tuple[Tensor, Tensor] | None = None

    def __init__(self, blocks: Iterable[UNetBlock]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)  # not as modules, whose parameters would have a second name

    def forward(self, emb: Tensor) -> Iterable[Tensor]:
        """emb [N, emb_channels] -> for each block in order [N, out_channels], with its first convolution's bias, or
        with `adaptive_scale` [N, 2*out_channels]: views of one tensor."""
        weight, bias = self.joined or self.join()
        y = F.linear(emb, weight, bias)
        if y.dtype is torch.bfloat16:
            y = y.float()  # which the norms would make of each part
        return y.split([len(block.affine.weight) for block in self.blocks], dim=1)

    def join(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([block.affine.weight for block in self.blocks])
        biases = [block.affine.bias for block in self.blocks]
        if self.blocks[0].adaptive_scale:
            return weight, torch.cat(biases)  # type: ignore[arg-type]
        # One tensor for both kinds: of a sum of two, both would be handed the same memory as their gradients, and what
        # is added to one of them in place, by a second micro-batch, would be added to the other.
        biases += [block.conv0.bias for block in self.blocks]
        return weight, torch.cat(biases).unflatten(0, (2, -1)).sum(0)  # type: ignore[arg-type]


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over tokens [N, heads, L, C].

    Of few tokens a CPU takes float32: torch's bfloat16 kernel there takes two to four times as long for 64 and 16 of
    them, and is no faster for 256. Of many pictures of few tokens it takes plain products: torch's fused kernel, made
    for long sequences, takes twice as long for 64 pictures of 16 tokens.
    """
    if q.device.type != "cpu" or q.shape[2] > 64:
        return F.scaled_dot_product_attention(q, k, v)
    dtype, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(work), k.to(work), v.to(work)
    with torch.autocast("cpu", enabled=False):  # which would cast back
        if q.shape[0] < 16:
            return F.scaled_dot_product_attention(q, k, v).to(dtype)
        return ((q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v).to(dtype)


def with_bf16_weights(module: nn.Module) -> nn.Module:
    """A copy for use under bfloat16 autocast, which leaves autocast no weight to cast at each call, nor its gradient.

    Weights of convolutions and of the blocks' embedding layers are bfloat16, which is what autocast makes of them, so
    that the numbers are the same to the bit; all other tensors are shared.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for layer in module.modules():
        cast = layer.affine if isinstance(layer, UNetBlock) else layer
        if isinstance(layer, UNetBlock) or (isinstance(layer, Conv2d) and layer.kernel):
            weight: nn.Parameter = cast.weight  # type: ignore[assignment]
            memo[id(weight)] = nn.Parameter(weight.detach().bfloat16(), requires_grad=weight.requires_grad)
    return copy.deepcopy(module, memo)


def keep_joined(module: nn.Module) -> None:
    """Join the weights of the blocks' embeddings once, for use without gradients while they stay as they are."""
    for layer in module.modules():
        if isinstance(layer, BlockEmbeddings):
            weight, bias = layer.join()
            layer.joined = weight.detach(), bias.detach()


def recompute_levels(network: nn.Module, levels: int) -> None:
    """Let the blocks of the `levels` highest resolutions (0: none) keep their input alone for the backward pass."""
    names = tuple(f"{res}x{res}_" for res in network.resolutions[:levels])  # type: ignore[index]
    for part in (network.enc, network.dec):
        for name, block in part.items():  # type: ignore[operator, union-attr]
            if isinstance(block, UNetBlock):
                block.recompute = name.startswith(names)


@functools.cache
def _compiled_parts() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What comes before and after dropout in a block, which names its layer and would be another graph in each: so
    blocks of equal shapes share their compiled code, because a graph has weights for inputs."""
    begin, finish = (torch.compile(f, dynamic=False, fullgraph=True) for f in (UNetBlock._begin, UNetBlock._finish))
    return begin, finish


def compile_blocks(network: nn.Module, on: bool) -> None:
    """Let the blocks run through torch.compile, or as they are; copies of the network do as it does."""
    if on:  # a network has some twenty kinds of blocks, each with a graph of its own
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 256)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 1024)
    for block in network.modules():
        if isinstance(block, UNetBlock):
            block.compiled = on
