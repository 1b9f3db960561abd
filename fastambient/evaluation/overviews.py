"""What lies beside a metrics.json: a picture of the first samples, one of those most alike to training images, and a
list of every sample with the training image that is nearest to it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastambient.evaluation.figures_layout import Block, draw
from fastambient.evaluation.metrics import Evaluation
from fastambient.evaluation.report_gallery import is_copy, most_alike, nearest_pairs
from fastambient.files import write_bytes
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


def write_nearest(path: Path, evaluation: Evaluation) -> None:
    """Write nearest.csv: one row a sample, the most alike first by the gap ratio, with the training image that is
    nearest to it and, where an embedder was given, the one that is most similar.

    Columns: sample (position), sample_name, and for each measure its value (``gap_ratio``, ``similarity``), ``_copy``
    (0 or 1, at the threshold of metrics.json), ``_train_index``, ``_train_name`` and ``_mirrored`` (0 or 1).
    """
    first, names = evaluation.scores[0], evaluation.train_names
    header = ["sample", "sample_name"]
    columns: list[Sequence[Any]] = []
    for s in evaluation.scores:
        header += [s.key, *(f"{s.key}_{what}" for what in ("copy", "train_index", "train_name", "mirrored"))]
        index = s.index.tolist()
        columns += [
            [f"{value:.6g}" for value in s.values.tolist()], is_copy(s.values, s).astype(int).tolist(), index,
            [""] * len(index) if names is None else [_cell(names[i]) for i in index],
            s.mirrored.astype(int).tolist(),
        ]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for n in most_alike(first.values, first).tolist():
        own = "" if evaluation.sample_names is None else _cell(evaluation.sample_names[n])
        writer.writerow([n, own, *(column[n] for column in columns)])
    write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))


def _cell(name: str) -> str:
    """A name that a spreadsheet does not take for a formula: "./" in front is the same file."""
    return f"./{name}" if name[:1] in "=+-@\t\r" and name else name
