"""The resident loader: the whole training set in device memory, gathered on the device.

The host's part of a step is which rows stand at its positions; all else is the device's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastambient.data.loaders import Batch, Fields, Loader, Share
from fastambient.data.rows import SizedRows, as_tensors, fetch_decoded
from fastambient.errors import FastambientError

_CHUNK_BYTES = 64 << 20  # copied to the device in pieces: the host never holds the whole set


class ResidentLoader(Loader):
    """Holds all rows on a device. Parameters as `Loader`'s.

    Raises
    ------
    FastambientError : the device's memory does not suffice
    """

    def __init__(self, rows: SizedRows, share: Share, *, seed: int, device: torch.device | str, xflip: bool) -> None:
        super().__init__(rows, share, seed=seed, device=device, xflip=xflip)
        try:
            self.held = _to_device(rows, self.device)
        except torch.OutOfMemoryError as error:
            raise FastambientError(
                f"the training set of {rows.nbytes / 2**30:.1f} GiB does not fit on {self.device}; use --loader dali or"
                " workers"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return sum(tensor.nbytes for tensor in self.held.values())

    def read(self, positions: Tensor) -> Fields:
        """Positions and row numbers, int64 [N]."""
        return {"positions": positions, "index": self.rows.index(positions)}

    def batch(self, fields: Fields, part: slice = slice(None)) -> Batch:
        index = fields["index"][part]
        gathered = {name: tensor.index_select(0, index) for name, tensor in self.held.items()}
        return super().batch({"positions": fields["positions"][part]} | gathered)


def _to_device(rows: SizedRows, device: torch.device) -> Fields:
    held: Fields = {}
    count = max(1, _CHUNK_BYTES * len(rows) // max(rows.nbytes, 1))
    for start in range(0, len(rows), count):
        part = np.arange(start, min(start + count, len(rows)))
        for name, values in as_tensors(fetch_decoded(rows, part)).items():
            if name not in held:
                held[name] = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, device=device)
            held[name][start : start + len(values)].copy_(values)
    return held
