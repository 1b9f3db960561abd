"""Does a denoiser know its training images? Its error on held-out images over that on training images, per noise level.

At little noise every denoiser only copies its input, and at much noise none can tell images apart: the ratio is 1 at
both ends. Between them a model that has memorized returns the training image itself, and the ratio is far above 1
(Shah et al., 2025, arXiv 2502.21278, show it as pictures in their Fig. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastambient.data.store import Store
from fastambient.errors import InputError, check_seed
from fastambient.pictures import as_pictures
from fastambient_kernels import Stream, normal

LEVELS = 12  # default noise levels, from 0.02 to 10 of sigma_data

Denoiser = Callable[..., Tensor]  # called as D(x, sigma) or D(x, sigma, class_labels), like EDMDenoiser


def default_sigmas(sigma_data: float = 0.5) -> list[float]:
    """Twelve levels, evenly spaced in their logarithm, from 0.02 to 10 times the data's deviation."""
    return [float(sigma) for sigma in np.geomspace(0.02, 10.0, LEVELS) * sigma_data]


def denoising_gap(
    denoiser: Denoiser,
    train: Any,
    holdout: Any,
    *,
    sigmas: Sequence[float] | None = None,
    seed: int = 0,
    batch: int = 64,
    draws: int = 1,
    device: torch.device | str | None = None,
    train_classes: Any = None,
    holdout_classes: Any = None,
    most: int = 1000,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Mean squared denoising error |D(x0 + sigma eps; sigma) - x0|^2 per pixel, on training and on held-out images.

    Both sides hold equally many images, chosen by chance where there are more, and the i-th of each gets the same
    noise at every level, so that the sides differ in their images alone. The noise is that of no training: it is from
    Philox's stream of fresh noise at `seed`, one draw for each picture and repetition.

    Parameters
    ----------
    denoiser: an `EDMDenoiser` or anything called like one, D(x, sigma, class_labels) of float32 [B, C, H, W] in
        [-1, 1] plus noise and float32 [B]; class_labels is left out where it has no classes. It is asked in its
        evaluation mode and handed back as it was.
    train, holdout: uint8 [N, C, H, W] and [M, C, H, W], arrays or tensors.
    sigmas: noise levels, above 0; default `default_sigmas` of the denoiser's sigma_data.
    seed: of the noise and of the choice of images.
    batch: images a call.
    draws: noises an image and level.
    device: default the denoiser's own, else the CPU.
    train_classes, holdout_classes: class indices [N] and [M]; without them a conditional denoiser is asked without a
        class.
    most: images of each side at most.
    on_batch: called with the number of denoised images after each batch; there are 2 * levels * draws * images.

    Returns
    -------
    A row a level, JSON types: sigma, train, holdout (errors per pixel, in squared units of [-1, 1]), gap, holdout over
    train: about 1 without memorization, and gap_ci95, its 95 % interval over images (normal in the logarithm). gap is
    None where the training error is 0, gap_ci95 where an error is, or with one image.

    Raises
    ------
    InputError
        Pictures of different sizes or none, a level, count or class out of range, classes for an unconditional
        denoiser, or an error that is NaN.
    """
    train, holdout = as_pictures(train, "train"), as_pictures(holdout, "holdout")
    if train.shape[1:] != holdout.shape[1:]:
        raise InputError(
            f"training images of {list(train.shape[1:])} and held-out images of {list(holdout.shape[1:])} (C, H, W),"
            " expected equal sizes; take the data the model was trained on"
        )
    if min(len(train), len(holdout)) < 1:
        raise InputError(
            f"a denoising gap of {len(train)} training and {len(holdout)} held-out images, expected at least 1 of each"
        )
    levels = default_sigmas(getattr(denoiser, "sigma_data", 0.5)) if sigmas is None else [float(s) for s in sigmas]
    if not all(0 < sigma < float("inf") for sigma in levels):
        raise InputError(f"noise levels {levels}, expected numbers above 0")
    if min(batch, draws, most) < 1:
        raise InputError(f"batch {batch}, draws {draws} and most {most}, expected at least 1 each")
    check_seed("seed", seed)

    like = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
    if device is None:
        device = "cpu" if like is None else like.device
    classes = int(getattr(denoiser, "label_dim", 0))
    count = min(len(train), len(holdout), most)
    generator = np.random.default_rng(seed)
    sides = {}
    for name, images, labels in (("train", train, train_classes), ("holdout", holdout, holdout_classes)):
        one_hot = _one_hot(labels, len(images), classes, name)
        chosen = np.sort(generator.choice(len(images), count, replace=False))
        sides[name] = images[chosen], None if one_hot is None else one_hot[chosen]

    training = isinstance(denoiser, nn.Module) and denoiser.training
    if isinstance(denoiser, nn.Module):
        denoiser.eval()
    errors = {name: np.zeros((len(levels), count)) for name in sides}
    try:
        with torch.no_grad():
            for start in range(0, count, batch):
                rows = slice(start, min(start + batch, count))
                for draw in range(draws):
                    ids = torch.arange(rows.start, rows.stop) + draw * count
                    pixels = int(np.prod(train.shape[1:]))
                    noise = normal(ids, pixels, seed=seed, stream=Stream.FRESH).view(-1, *train.shape[1:]).to(device)
                    for name, (images, one_hot) in sides.items():
                        x0 = torch.from_numpy(images[rows]).to(device).float() / 127.5 - 1
                        labels = () if one_hot is None else (one_hot[rows].to(device),)
                        for i, level in enumerate(levels):
                            sigma = torch.full((len(x0),), level, device=x0.device)
                            error = denoiser(x0 + level * noise, sigma, *labels).double() - x0
                            errors[name][i, rows] += error.square().flatten(1).mean(1).cpu().numpy() / draws
                            if on_batch is not None:
                                on_batch(len(x0))
    finally:
        if isinstance(denoiser, nn.Module):
            denoiser.train(training)
    if not all(np.isfinite(each).all() for each in errors.values()):
        raise InputError("the denoising errors hold NaN or infinity, expected a trained denoiser; check its weights")
    return [_row(level, t, h) for level, t, h in zip(levels, errors["train"], errors["holdout"], strict=True)]


def classes_of(denoiser: nn.Module, store: Store) -> dict[str, Any]:
    """The arguments train_classes and holdout_classes for the two sides of a store, where it and the denoiser have
    classes."""
    if not getattr(denoiser, "label_dim", 0) or store.train.labels is None:
        return {}
    return {"train_classes": store.train.labels, "holdout_classes": store.holdout.labels}


def _row(level: float, train: np.ndarray, holdout: np.ndarray) -> dict[str, Any]:
    """Of one level, from the errors of its images [N]."""
    t, h = float(train.mean()), float(holdout.mean())
    row: dict[str, Any] = {"sigma": level, "train": t, "holdout": h, "gap": h / t if t > 0 else None, "gap_ci95": None}
    if min(t, h) > 0 and len(train) > 1:
        deviation = np.sqrt(sum(x.var(ddof=1) / len(x) / x.mean() ** 2 for x in (train, holdout)))
        row["gap_ci95"] = [float(h / t * np.exp(side * 1.96 * deviation)) for side in (-1, 1)]
    return row


def _one_hot(labels: Any, images: int, classes: int, name: str) -> Tensor | None:
    """float32 [N, classes], or None for no class."""
    if labels is None:
        return None
    index = np.asarray(labels)
    if not classes:
        raise InputError(f"{name}_classes for a denoiser without classes, expected None")
    if index.shape != (images,) or index.dtype.kind not in "iu" or not ((index >= 0) & (index < classes)).all():
        raise InputError(
            f"{name}_classes is {list(index.shape)} {index.dtype}, expected {images} integers in 0..{classes - 1}"
        )
    return nn.functional.one_hot(torch.from_numpy(index.astype(np.int64)), classes).float()
