"""Operators of ambient diffusion training. Needs torch alone."""

from fastambient_kernels.ambient import ambient_loss, ambient_noise, coefficients, is_ambient
from fastambient_kernels.noise import Stream, normal, philox4x32, uniform

__all__ = ["Stream", "ambient_loss", "ambient_noise", "coefficients", "is_ambient", "normal", "philox4x32", "uniform"]
