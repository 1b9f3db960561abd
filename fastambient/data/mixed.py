"""Training on a hand-out: its noised images in the ambient regime, somebody's own clean images in both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastambient.data.order import dataset_indices
from fastambient.data.store import Split
from fastambient.errors import InputError
from fastambient_kernels.noise import Stream, normal


class HandOutRows:
    """Rows of a hand-out, then those of a clean store.

    A position whose sigma is in the ambient regime draws from all rows, one in the clean regime from the clean rows
    alone. The field "clean" says which rows may be in the clean regime: the device lifts sigma to sigma_tn for others,
    should it round a sigma at the very boundary in another way than the host.

    Parameters
    ----------
    hand_out : training side of a hand-out store
    clean : training side of a store with clean images, or None: then `sigma_of` must give no sigma below sigma_tn
    seed : run seed, 64 bits
    sigma_tn : noise level of the hand-out
    noise_seed : of the fixed noise of the clean images
    sigma_of : positions int64 [N] -> sigma float32 [N], as the training step draws it; picklable
    labelled : whether class labels are used

    Raises
    ------
    InputError : images of another shape, or labels on one side alone
    """

    def __init__(
        self, hand_out: Split, clean: Split | None, *, seed: int, sigma_tn: float, noise_seed: int,
        sigma_of: Callable[[Tensor], Tensor], labelled: bool,
    ) -> None:  # fmt: skip
        assert hand_out.noisy is not None
        self.hand_out, self.clean, self.seed, self.sigma_of = hand_out, clean, seed, sigma_of
        self.sigma_tn, self.noise_seed, self.labelled = sigma_tn, noise_seed, labelled
        _, channels, height, width = hand_out.noisy.shape
        self.shape = (channels, height, width)
        if clean is not None:
            if clean.images is None:
                raise InputError("the clean store is a hand-out, too: it holds no clean image")
            if clean.images.shape[1:] != self.shape:
                raise InputError(
                    f"the clean images are {list(clean.images.shape[1:])}, those handed out {list(self.shape)}; prepare"
                    " them at one resolution, in one number of channels"
                )
            if labelled and clean.labels is None:
                raise InputError("the images handed out have class labels, the clean ones have none")

    def __len__(self) -> int:
        return len(self.hand_out) + (0 if self.clean is None else len(self.clean))

    @property
    def nbytes(self) -> int:
        assert self.hand_out.noisy is not None
        row = int(np.prod(self.shape)) * (1 + self.hand_out.noisy.dtype.itemsize) + 8 + 1 + (8 if self.labelled else 0)
        return len(self) * row

    def index(self, positions: Tensor) -> Tensor:
        all_rows = dataset_indices(positions, len(self), seed=self.seed)
        if self.clean is None:
            return all_rows
        # Another seed: the two orders are of one generator.
        clean_rows = dataset_indices(positions, len(self.clean), seed=(self.seed + 1) % 2**64) + len(self.hand_out)
        sigma = self.sigma_of(positions)
        return torch.where(sigma >= torch.full_like(sigma, self.sigma_tn), all_rows, clean_rows)

    def fetch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        noisy = self.hand_out.noisy
        assert noisy is not None
        clean = index >= len(self.hand_out)
        found: dict[str, np.ndarray] = {
            "images": np.zeros((len(index), *self.shape), np.uint8),
            "ids": np.empty(len(index), np.int64),
            "x_n": np.empty((len(index), *self.shape), noisy.dtype),
            "clean": clean,
        }
        if self.labelled:
            found["labels"] = np.empty(len(index), np.int64)
        for side, where in ((self.hand_out, ~clean), (self.clean, clean)):
            if side is None or not where.any():
                continue
            rows = index[where] - (len(self.hand_out) if side is self.clean else 0)
            found["ids"][where] = side.ids[rows]
            if self.labelled and side.labels is not None:
                found["labels"][where] = side.labels[rows]
            if side is self.hand_out:
                found["x_n"][where] = noisy[rows]
            elif side.images is not None:
                found["images"][where] = images = side.images[rows]
                found["x_n"][where] = noised(images, side.ids[rows], self.sigma_tn, self.noise_seed)
        return found


def noised(images: np.ndarray, ids: np.ndarray, sigma_tn: float, noise_seed: int) -> np.ndarray:
    """x_n = x0 + sigma_tn * eps_fixed of uint8 [n, C, H, W] images with int64 [n] ids: float32, by the same operations
    as the noise operator's."""
    x0 = torch.from_numpy(images).float() / 127.5 - 1
    eps = normal(torch.from_numpy(ids), x0[0].numel(), seed=noise_seed, stream=Stream.FIXED).view_as(x0)
    return (x0 + sigma_tn * eps).numpy()
