"""A store to hand out: what the ambient regime may see, and nothing that gives x0 back.

It holds x_n = x0 + sigma_tn * eps, with eps from the operating system's generator, random ids, class labels with the
classes' names, sigma_data to two decimals, and no seed, no clean image, no file name, no order of the source, no
captions unless they were asked for. Every bit of eps is the system's: the state of an ordinary generator could be
worked out from a few pictures that somebody has, and with it the noise of all others. Copies and mirror images of a
picture are left out, because two observations of one picture are less noise than one: so is a second hand-out of the
same pictures.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor


def system_normal(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Standard normals from the system's generator, float64 of `shape`: Box-Muller on 52-bit uniforms in (0, 1)."""
    n = math.prod(shape)
    words = np.frombuffer(os.urandom(16 * ((n + 1) // 2)), np.uint64).reshape(2, -1)
    u, v = (torch.from_numpy(((w >> np.uint64(12)) + 0.5) * 2.0**-52) for w in words)
    radius = torch.sqrt(-2 * torch.log(u))
    z = torch.cat([radius * torch.cos(2 * math.pi * v), radius * torch.sin(2 * math.pi * v)])
    return z[:n].view(shape)


def noised_by_system(images: np.ndarray, sigma_tn: float) -> np.ndarray:
    """x0 + sigma_tn * eps of uint8 [n, C, H, W] images, float32.

    Summed in float64: in float32 a small sum of large terms would end in zeros, as many as the terms' exponents say,
    and so would tell how bright a pixel is.
    """
    x0 = torch.from_numpy(images).double() / 127.5 - 1
    return (x0 + sigma_tn * system_normal(x0.shape)).float().numpy()


def random_ids(n: int) -> np.ndarray:
    """int64 [n] from the system's generator: they say nothing of a picture."""
    return np.frombuffer(os.urandom(8 * n), np.int64)


def shuffle(n: int) -> np.ndarray:
    """A permutation of 0..n-1 by the system's generator, int64 [n]."""
    return np.argsort(np.frombuffer(os.urandom(8 * n), np.uint64), kind="stable")
