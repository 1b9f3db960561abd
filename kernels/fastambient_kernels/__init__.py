"""Operators of ambient diffusion training. Needs torch alone."""

from fastambient_kernels._registration import seed_tensor
from fastambient_kernels.adam_ema import AdamEMA
from fastambient_kernels.ambient import ambient_loss, ambient_noise, coefficients, is_ambient
from fastambient_kernels.convolution import conv2d
from fastambient_kernels.dropout import dropout
from fastambient_kernels.group_norm_silu import GroupNormSiLU, group_norm_silu
from fastambient_kernels.noise import Stream, normal, philox4x32, uniform
from fastambient_kernels.resample import resample
from fastambient_kernels.residual import residual

__all__ = [
    "AdamEMA",
    "GroupNormSiLU",
    "Stream",
    "ambient_loss",
    "ambient_noise",
    "coefficients",
    "conv2d",
    "dropout",
    "group_norm_silu",
    "is_ambient",
    "normal",
    "philox4x32",
    "resample",
    "residual",
    "seed_tensor",
    "uniform",
]
