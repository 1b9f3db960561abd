"""DDPM++ and NCSN++ (Song et al. 2021) as one network, with EDM's settings and parameter names.

    DDPM++  embedding positional, encoder standard, decoder standard, resample_filter [1, 1]
    NCSN++  embedding fourier,    encoder residual, decoder standard, resample_filter [1, 3, 3, 1], channel_mult_noise 2

Source: Karras et al. 2022 (EDM), Appendix F.3 and Table 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastambient.errors import InputError, did_you_mean
from fastambient.models.blocks import BlockEmbeddings, BlockStyle, UNetBlock
from fastambient.models.layers import (
    Conv2d,
    DropoutKey,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    check_sizes,
    drop_labels,
    one_hot_or_zeros,
)

_INIT = Init("xavier_uniform")
_INIT_ZERO = Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = Init("xavier_uniform", weight=math.sqrt(0.2))
_EPS = 1e-6


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(str(value), known)}")


class SongUNet(nn.Module):
    """F(x, c_noise): the raw network of DDPM++ and NCSN++.

    Parameters
    ----------
    img_resolution, img_channels : size of the (square) pictures
    label_dim : number of classes; 0 for an unconditional network
    augment_dim : number of augmentation labels; 0 for none
    model_channels : width at full resolution
    channel_mult : width of each level, as a multiple of `model_channels`; each level halves the resolution
    channel_mult_emb, channel_mult_noise : width of the embedding and of the noise embedding, likewise
    num_blocks : residual blocks a level in the encoder (one more in the decoder)
    attn_resolutions : resolutions with self-attention
    dropout, label_dropout : probabilities, at training time
    embedding_type : "positional" or "fourier"
    encoder_type : "standard", "skip" or "residual": how the encoder sees the downsampled input picture
    decoder_type : "standard" or "skip": whether each level adds to an upsampled output picture
    resample_filter : taps of the resampling filter

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
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, augment_dim=augment_dim,
            model_channels=model_channels, channel_mult=channel_mult, channel_mult_emb=channel_mult_emb,
            channel_mult_noise=channel_mult_noise, num_blocks=num_blocks, dropout=dropout, label_dropout=label_dropout,
            resample_filter=resample_filter,
        )  # fmt: skip
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.num_blocks, self.encoder_type, self.decoder_type = num_blocks, encoder_type, decoder_type
        self.resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        style = BlockStyle(
            emb_channels=emb_channels, init=_INIT, init_zero=_INIT_ZERO, init_attn=_INIT_ATTN, dropout=dropout,
            channels_per_head=None, adaptive_scale=False, resample_proj=True, skip_scale=math.sqrt(0.5), eps=_EPS,
            resample_filter=resample_filter,
        )  # fmt: skip
        number = count(1)

        def block(cin: int, cout: int, *, attention: bool = False, resample: str | None = None) -> UNetBlock:
            return UNetBlock(cin, cout, style, next(number), attention=attention, resample=resample)

        def picture_conv(cin: int, cout: int, kernel: int, resample: str | None = None, init: Init = _INIT) -> Conv2d:
            return Conv2d(cin, cout, kernel, init, resample=resample, resample_filter=resample_filter)

        if embedding_type == "positional":
            self.map_noise: nn.Module = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, _INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, _INIT, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, _INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, _INIT)

        self.enc = nn.ModuleDict()
        skips: list[int] = []  # widths of the tensors handed to the decoder
        width, picture_width = model_channels, img_channels
        for level, res in enumerate(self.resolutions):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = picture_conv(img_channels, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, resample="down")
                if encoder_type == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = picture_conv(img_channels, img_channels, 0, "down")
                    self.enc[f"{res}x{res}_aux_skip"] = picture_conv(img_channels, width, 1)
                elif encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = picture_conv(picture_width, width, 3, "down_fused")
                    picture_width = width
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
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(width + skips.pop(), widths[level], attention=attention)
                width = widths[level]
            if decoder_type == "skip" or level == 0:
                if res != self.resolutions[-1] and decoder_type == "skip":
                    self.dec[f"{res}x{res}_aux_up"] = picture_conv(img_channels, img_channels, 0, "up")
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(width, _EPS)
                self.dec[f"{res}x{res}_aux_conv"] = picture_conv(width, img_channels, 3, init=_INIT_ZERO)
        self.block_embeddings = BlockEmbeddings(m for m in self.modules() if isinstance(m, UNetBlock))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """The raw output F.

        Parameters
        ----------
        x : float [N, C, H, W], the preconditioned input c_in * x
        c_noise : float [N], ln(sigma) / 4
        class_labels : one-hot float [N, label_dim], None for no class; not looked at by an unconditional network
        augment_labels : float [N, augment_dim], None for no augmentation
        dropout_key : (run seed, positions int64 [N]): dropout is a function of them; None takes torch's generator
        """
        emb = iter(self.block_embeddings(self._embed(c_noise, class_labels, augment_labels, dropout_key)))
        x, skips = self._encode(x, emb, dropout_key)
        return self._decode(x, skips, emb, dropout_key)

    def _embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, key: DropoutKey | None
    ) -> Tensor:
        emb = self.map_noise(c_noise)
        cos, sin = emb.chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1).to(self.map_layer0.weight.dtype)  # this family has the sines first
        if self.map_label is not None:
            labels = one_hot_or_zeros(class_labels, emb, self.label_dim)
            if self.training and self.label_dropout:
                labels = drop_labels(labels, self.label_dropout, key)
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))  # unit variance over the classes
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Iterator[Tensor], key: DropoutKey | None) -> tuple[Tensor, list[Tensor]]:
        picture, skips = x, []
        for res in self.resolutions:
            if res == self.resolutions[0]:
                x = self.enc[f"{res}x{res}_conv"](x)
            else:
                x = self.enc[f"{res}x{res}_down"](x, next(emb), key)
                if self.encoder_type == "skip":
                    picture = self.enc[f"{res}x{res}_aux_down"](picture)
                    x = x + self.enc[f"{res}x{res}_aux_skip"](picture)
                elif self.encoder_type == "residual":
                    x = picture = (x + self.enc[f"{res}x{res}_aux_residual"](picture)) * math.sqrt(0.5)
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{res}x{res}_block{i}"](x, next(emb), key)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Iterator[Tensor], key: DropoutKey | None) -> Tensor:
        picture: Tensor | None = None
        for res in reversed(self.resolutions):
            if res == self.resolutions[-1]:
                x = self.dec[f"{res}x{res}_in0"](x, next(emb), key)
                x = self.dec[f"{res}x{res}_in1"](x, next(emb), key)
            else:
                x = self.dec[f"{res}x{res}_up"](x, next(emb), key)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{res}x{res}_block{i}"](x, next(emb), key, skips.pop())
            if self.decoder_type == "skip" or res == self.resolutions[0]:
                y = self.dec[f"{res}x{res}_aux_conv"](self.dec[f"{res}x{res}_aux_norm"](x))
                picture = y if picture is None else y + self.dec[f"{res}x{res}_aux_up"](picture)
        assert picture is not None
        return picture
