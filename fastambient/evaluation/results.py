"""The result of one evaluation, for files and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """One measure of how near each sample lies to the training set, and to held-out images.

    key: "gap_ratio" or "similarity"; label: for people, such as "cosine similarity (EfficientNet-Lite0)".
    closer: which end is a copy, "low" or "high".
    threshold: below (low) or above (high) it a sample counts as a copy.
    values: float64 [N], one a sample.
    index: int64 [N], each sample's nearest training image by this measure.
    mirrored: bool [N], the mirror image is the nearer one.
    control, control_index: float64 and int64 [N], the same among held-out images; [0] where there are none.
    """

    key: str
    label: str
    closer: str
    threshold: float
    values: np.ndarray
    index: np.ndarray
    mirrored: np.ndarray
    control: np.ndarray
    control_index: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and the pictures that a report shows.

    metrics: the content of metrics.json (JSON types only).
    samples, train: uint8 [N, C, H, W] and [M, C, H, W]; holdout: the same, or None where nothing is held out.
    scores: the gap ratio first; the cosine similarity where an embedder was given.
    sample_names, train_names: what each sample and training image is called where it came from ("cats/17.png",
    "seed 17"), or None where nothing is known but its position.
    """

    metrics: dict[str, Any]
    samples: np.ndarray
    train: np.ndarray
    holdout: np.ndarray | None
    scores: tuple[Score, ...]
    sample_names: Sequence[str] | None = None
    train_names: Sequence[str] | None = None
