"""A "generator" of known memorization: it returns training images, changed in known ways, and fresh images."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_sample_images

KINDS = ("exact", "noise 0.01", "noise 0.05", "blend", "flip", "shift", "fresh")


def textures(n: int, seed: int, *, size: int = 32, channels: int = 3) -> np.ndarray:
    """uint8 [n, channels, size, size]: smooth fields of random waves with a little grain, all different."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    images = np.zeros((n, channels, size, size))
    for _ in range(6):
        fy, fx, phase, height = (g.normal(size=(n, channels, 1, 1)) for _ in range(4))
        images += height * np.sin(2 * np.pi * (1.5 * fy * y + 1.5 * fx * x) + 6 * phase)
    return np.clip(np.rint(128 + 30 * images + g.normal(size=images.shape)), 0, 255).astype(np.uint8)


def photographs() -> np.ndarray:
    """uint8 [95, 3, 28, 28]: the most detailed tiles of the two photographs that scikit-learn brings, at half size."""
    tiles = []
    for picture in load_sample_images().images:
        rows, columns = picture.shape[0] // 56, picture.shape[1] // 56
        halved = picture[: rows * 56, : columns * 56].reshape(rows * 28, 2, columns * 28, 2, 3).mean((1, 3))
        tiles.append(halved.reshape(rows, 28, columns, 28, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 28, 28))
    found = np.rint(np.concatenate(tiles)).astype(np.uint8)
    detailed = np.argsort(-found.std((2, 3)).mean(1), kind="stable")[:95]  # sky is like sky
    return np.random.default_rng(0).permutation(found[detailed])


def generate(train: np.ndarray, fresh: np.ndarray, each: int, seed: int = 0) -> tuple[np.ndarray, dict[str, slice]]:
    """`each` samples of every kind, from training images of their own (blends: of two), and their rows.

    Noise is in units of pixels in [-1, 1]; a shift is by one pixel to the right, its border repeated.
    """
    g = np.random.default_rng(seed)
    parts = []
    for i, kind in enumerate(KINDS):
        images = (fresh[:each] if kind == "fresh" else train[i * each : (i + 1) * each]).astype(np.float64)
        if kind.startswith("noise"):
            images = images + float(kind.split()[1]) * 127.5 * g.normal(size=images.shape)
        elif kind == "blend":
            images = (images + train[np.arange(len(images)) + (len(KINDS) - 1) * each]) / 2
        elif kind == "flip":
            images = images[..., ::-1]
        elif kind == "shift":
            images = np.concatenate([images[..., :1], images[..., :-1]], axis=-1)
        parts.append(np.clip(np.rint(images), 0, 255).astype(np.uint8))
    return np.concatenate(parts), {kind: slice(i * each, (i + 1) * each) for i, kind in enumerate(KINDS)}
