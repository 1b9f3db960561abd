"""Shared fixtures. Nothing here needs a network, a GPU or anything outside this repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are tiny: a thread pool costs more than it gives, and sums stay the same on every machine."""
    torch.set_num_threads(1)


def read_safetensors(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a recorded file in tests/data."""
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
