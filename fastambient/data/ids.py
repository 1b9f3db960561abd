"""Image ids: what a picture's fixed noise is keyed by.

An id is a function of the picture alone (its final uint8 pixels and their shape), so that exact duplicates share
their noise, and order, split, subset and file names do not matter.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a process that decodes pictures does without torch
    from torch import Tensor


def image_id(image: np.ndarray) -> int:
    """The first 64 bits of SHA-256 over shape and pixels.

    Parameters
    ----------
    image : uint8 [C, H, W]

    Returns
    -------
    A signed 64-bit integer: the digest's first 8 bytes, little endian. The hashed bytes are C, H, W as three
    little-endian uint32, then the pixels in C, H, W order.

    Raises
    ------
    TypeError : another dtype or number of axes
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise TypeError(f"an image must be uint8 [C, H, W], got {image.dtype} {list(image.shape)}")
    digest = hashlib.sha256(struct.pack("<3I", *image.shape))
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def image_ids(images: Tensor | np.ndarray | Iterable[np.ndarray]) -> Tensor:
    """Ids of uint8 [N, C, H, W] images (a tensor on any device, or an array) as int64 [N] on the CPU."""
    import torch

    arrays = images.cpu().numpy() if isinstance(images, torch.Tensor) else images
    return torch.tensor([image_id(image) for image in arrays], dtype=torch.int64)
