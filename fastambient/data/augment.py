"""EDM's geometric augmentation with its nine conditioning labels.

Mathematics
-----------
Karras et al. 2022, appendix F.2 (from Karras et al., "Training Generative Adversarial Networks with Limited Data",
2020). Each map but the x-flip is enabled with probability p; a picture goes through them in this order:

    map                  parameters                             labels                 index
    x-flip               a in {0, 1}                            a                      0
    y-flip               b in {0, 1}, a coin when enabled       b                      1
    scale by 2^(0.2 c)   c ~ N(0, 1)                            c                      2
    rotation by theta    theta ~ U(-pi, pi)                     cos theta - 1, sin     3, 4
    stretch by 2^(0.2 d) d ~ N(0, 1), direction phi ~ U(-pi,pi) d cos phi, d sin phi   5, 6
      (and 2^(-0.2 d) across; phi = 0 with probability 1/2)
    translation          t_x, t_y ~ N(0, 1), in W/8 and H/8     t_x, t_y               7, 8

Angles run counter-clockwise as seen, x to the right, y down. A disabled map has its identity: labels 0.

The x-flip comes first in that order, yet here the noise operator applies it last, to the finished and noised
picture, because the fixed noise must move with the image. Both orders give the same picture if the geometry between
is mirrored: with X the x-flip and G the rest, X G = (X G X) X, and X G X is G with theta, phi and t_x negated. So the
labels of a flipped sample carry those three with the opposite sign: they describe the picture that the network sees
in EDM's own terms. All three are symmetric, so its distribution is EDM's, too.

Geometry acts on samples of the clean regime only (`active`): a map that is not exact on the pixel grid would act on
x_n's noise, and a second noise for the transformed picture would leak the first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastambient_kernels.noise import Stream, normal, uniform

LABEL_DIM = 9
_LOG2_STD = 0.2  # of scale and stretch
_SHIFT_STD = 0.125  # of the picture's width and height


def augment(
    images: Tensor, positions: Tensor, *, p: float, seed: int | Tensor, xflips: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Augmented images and the labels that tell the network what was done to them.

    Parameters
    ----------
    images : float [N, C, H, W] in [-1, 1], unflipped
    positions : int64 [N], images seen so far + index in the global batch
    p : probability of each map, 0..1
    seed : run seed, 64 bits; draws are elements 4.. of `Stream.AUGMENT` at (seed, position)
    xflips : bool [N]; only recorded in the labels, the noise operator flips
    active : bool [N]; the other samples come back bit for bit

    Returns
    -------
    (images [N, C, H, W] of the same dtype, labels float32 [N, 9]); values may leave [-1, 1] slightly, as bicubic
    interpolation overshoots.

    Raises
    ------
    ValueError : p outside 0..1
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in 0..1, got {p}")
    c, d, tx, ty = normal(positions, 8, seed=seed, stream=Stream.AUGMENT)[:, 4:].unbind(1)
    u = uniform(positions, 9, seed=seed, stream=Stream.AUGMENT, first=8)
    enabled = ((u[:, :5] < p) & active[:, None]).float()
    yflip, scale, rotate, stretch, shift = enabled.unbind(1)

    yflip = yflip * (u[:, 5] < 0.5)
    c, d, tx, ty = c * scale, d * stretch, tx * shift, ty * shift
    theta = (2 * u[:, 6] - 1) * math.pi * rotate
    phi = (2 * u[:, 7] - 1) * math.pi * (u[:, 8] < 0.5)

    flipped = torch.where(_per_sample(yflip > 0), images.flip(2), images)
    moved = _warp(flipped, _inverse_matrix(c, theta, d, phi), torch.stack([tx, ty], dim=1) * _SHIFT_STD)
    images = torch.where(_per_sample(enabled[:, 1:].any(1)), moved, flipped)

    mirror = 1 - 2 * xflips.float()
    labels = [
        xflips.float(), yflip, c, torch.cos(theta) - 1, torch.sin(theta) * mirror, d * torch.cos(phi),
        d * torch.sin(phi) * mirror, tx * mirror, ty,
    ]  # fmt: skip
    return images, torch.stack(labels, dim=1)


def _per_sample(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _rotation(angle: Tensor) -> Tensor:
    """[N, 2, 2]. With y down it turns clockwise by `angle`, as seen."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)


def _inverse_matrix(c: Tensor, theta: Tensor, d: Tensor, phi: Tensor) -> Tensor:
    """The linear part of scale, rotation and stretch, inverted: from output to input, [N, 2, 2].

    Elementwise throughout: a matrix product may round to TF32, and differently for other batch sizes.
    """
    along, across = torch.exp2(-_LOG2_STD * d), torch.exp2(_LOG2_STD * d)
    mean, half = (along + across) / 2, (along - across) / 2
    cos, sin = half * torch.cos(2 * phi), half * torch.sin(2 * phi)
    stretch = torch.stack([mean + cos, -sin, -sin, mean - cos], dim=1).view(-1, 2, 2)
    rotated = (_rotation(theta)[:, :, :, None] * stretch[:, None]).sum(2)
    return torch.exp2(-_LOG2_STD * c).view(-1, 1, 1) * rotated


def _warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Resample so that output point v, from the centre in pixels, shows input point matrix @ (v - shift).

    `shift` is a fraction of width and height. Sampled bicubically at twice the resolution and averaged down, which
    keeps shrunken pictures from aliasing; beyond its border a picture goes on as its mirror image.
    """
    height, width = images.shape[2:]
    x = (torch.arange(2 * width, device=images.device, dtype=matrix.dtype) + 0.5) / 2 - width / 2
    y = (torch.arange(2 * height, device=images.device, dtype=matrix.dtype) + 0.5) / 2 - height / 2
    x = x.view(1, 1, -1) - shift[:, 0].view(-1, 1, 1) * width
    y = y.view(1, -1, 1) - shift[:, 1].view(-1, 1, 1) * height
    m = matrix.view(-1, 2, 2, 1, 1)
    grid = torch.stack(
        [(m[:, 0, 0] * x + m[:, 0, 1] * y) * (2 / width), (m[:, 1, 0] * x + m[:, 1, 1] * y) * (2 / height)], dim=-1
    )
    return F.avg_pool2d(F.grid_sample(images, grid.to(images.dtype), "bicubic", "reflection", align_corners=False), 2)
