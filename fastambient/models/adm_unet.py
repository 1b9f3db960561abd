"""ADM (Dhariwal & Nichol 2021), with EDM's settings and parameter names.

Source: Karras et al. 2022 (EDM), Appendix F.3 and Table 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

import torch.nn.functional as F
from torch import Tensor, nn

from fastambient.models.blocks import BlockEmbeddings, BlockStyle, UNetBlock
from fastambient.models.layers import (
    Conv2d,
    DropoutKey,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    check_sizes,
    drop_labels,
    one_hot_or_zeros,
)

_INIT = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
_INIT_ZERO = Init("kaiming_uniform", weight=0.0)
_EPS = 1e-5


class DhariwalUNet(nn.Module):
    """F(x, c_noise): the raw network of ADM.

    Parameters
    ----------
    img_resolution, img_channels : size of the (square) pictures
    label_dim : number of classes; 0 for an unconditional network
    augment_dim : number of augmentation labels; 0 for none
    model_channels : width at full resolution
    channel_mult : width of each level, as a multiple of `model_channels`; each level halves the resolution
    channel_mult_emb : width of the embedding, likewise
    num_blocks : residual blocks a level in the encoder (one more in the decoder)
    attn_resolutions : resolutions with self-attention, in heads of 64 channels
    dropout, label_dropout : probabilities, at training time

    Raises
    ------
    InputError : a value out of range
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, augment_dim=augment_dim,
            model_channels=model_channels, channel_mult=channel_mult, channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks, dropout=dropout, label_dropout=label_dropout,
        )  # fmt: skip
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.num_blocks = num_blocks
        self.resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]
        emb_channels = model_channels * channel_mult_emb
        style = BlockStyle(
            emb_channels=emb_channels, init=_INIT, init_zero=_INIT_ZERO, init_attn=_INIT, dropout=dropout,
            channels_per_head=64, adaptive_scale=True, resample_proj=False, skip_scale=1.0, eps=_EPS,
        )  # fmt: skip
        number = count(1)

        def block(cin: int, cout: int, *, attention: bool = False, resample: str | None = None) -> UNetBlock:
            return UNetBlock(cin, cout, style, next(number), attention=attention, resample=resample)

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, _INIT_ZERO, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, _INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, _INIT)
        init_label = Init("kaiming_normal", weight=math.sqrt(label_dim))  # unit variance over the classes
        self.map_label = Linear(label_dim, emb_channels, init_label, bias=False) if label_dim else None

        self.enc = nn.ModuleDict()
        skips: list[int] = []  # widths of the tensors handed to the decoder
        width = widths[0]
        for level, res in enumerate(self.resolutions):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(img_channels, width, 3, _INIT)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, resample="down")
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(width, widths[level], attention=res in attn_resolutions)
                width = widths[level]
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, res in reversed(list(enumerate(self.resolutions))):
            if res == self.resolutions[-1]:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, resample="up")
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(width + skips.pop(), widths[level], attention=attention)
                width = widths[level]
        self.block_embeddings = BlockEmbeddings(m for m in self.modules() if isinstance(m, UNetBlock))
        self.out_norm = GroupNorm(width, _EPS)
        self.out_conv = Conv2d(width, img_channels, 3, _INIT_ZERO)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """The raw output F; parameters as in `fastambient.models.song_unet.SongUNet.forward`."""
        emb = iter(self.block_embeddings(self._embed(c_noise, class_labels, augment_labels, dropout_key)))
        skips = []
        for res in self.resolutions:
            if res == self.resolutions[0]:
                x = self.enc[f"{res}x{res}_conv"](x)
            else:
                x = self.enc[f"{res}x{res}_down"](x, next(emb), dropout_key)
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{res}x{res}_block{i}"](x, next(emb), dropout_key)
                skips.append(x)
        for res in reversed(self.resolutions):
            if res == self.resolutions[-1]:
                x = self.dec[f"{res}x{res}_in0"](x, next(emb), dropout_key)
                x = self.dec[f"{res}x{res}_in1"](x, next(emb), dropout_key)
            else:
                x = self.dec[f"{res}x{res}_up"](x, next(emb), dropout_key)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{res}x{res}_block{i}"](x, next(emb), dropout_key, skips.pop())
        return self.out_conv(self.out_norm(x))

    def _embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, key: DropoutKey | None
    ) -> Tensor:
        emb = self.map_noise(c_noise).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = one_hot_or_zeros(class_labels, emb, self.label_dim)
            if self.training and self.label_dropout:
                labels = drop_labels(labels, self.label_dropout, key)
            emb = emb + self.map_label(labels)
        return F.silu(emb)
