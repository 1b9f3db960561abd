"""The two pictures beside a metrics.json: the first samples, and those most alike to training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastambient.evaluation.figures_layout import Block, draw
from fastambient.evaluation.metrics import Evaluation
from fastambient.evaluation.report_gallery import is_copy, nearest_pairs
from fastambient.pictures import grid

_SAMPLES = 64
_PAIRS, _COLUMNS = 24, 8
_WIDTH = 1024  # pixels of a row of pairs; larger pictures stand in fewer columns


def draw_samples(path: Path, name: str, pictures: np.ndarray, *, seeded: bool) -> None:
    """Write the first samples as a PNG, row by row, with a title that says what they are.

    Parameters
    ----------
    name : of the run
    pictures : uint8 [N, C, H, W], N >= 1, all samples
    seeded : they are those of the seeds 0 to N - 1
    """
    some = pictures[:_SAMPLES]
    all_of = f"the first {len(some)} of {len(pictures):,}" if len(some) < len(pictures) else f"all {len(pictures)}"
    order = f"seeds 0 to {len(some) - 1}, row by row" if seeded else "in their order, row by row"
    draw(path, [Block(f"{name}: {all_of} samples, {order}, not selected", grid(some)[None, None])], enlarged=False)


def draw_nearest(path: Path, name: str, evaluation: Evaluation) -> None:
    """Write the samples most alike to a training image as a PNG: above each other a sample and its nearest training
    image (mirrored where its mirror image is the nearer one), over them the gap ratio and whether it is a copy."""
    pairs, score = nearest_pairs(evaluation, _PAIRS), evaluation.scores[0]
    copies, all_copies = is_copy(pairs.value, score), int(is_copy(score.values, score).sum())
    shown, all_samples = len(pairs.value), len(evaluation.samples)
    title = (
        f"{name}: the {shown} of {all_samples:,} samples that are most alike to a training image, by d1/d2, the"
        f" distance to the nearest over that to the second nearest; {all_copies:,} of {all_samples:,} are copies"
        f" (d1/d2 < {score.threshold:.3g})"
    )
    columns = max(2, min(_COLUMNS, _WIDTH // evaluation.samples.shape[-1]))
    blocks = []
    for start in range(0, shown, columns):
        some = range(start, min(start + columns, shown))
        labels = [f"{pairs.value[i]:.2f}" + (" copy" if copies[i] else "") for i in some]
        tiles = np.stack([side[some.start : some.stop] for side in (pairs.samples, pairs.nearest)])
        alarmed = frozenset(i - start for i in some if copies[i])
        rows = ("sample", "nearest training image")
        blocks.append(Block(title if start == 0 else "", tiles, rows, labels, alarmed))
    draw(path, blocks)
