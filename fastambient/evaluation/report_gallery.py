"""The gallery of report.html: samples beside their nearest training images, as sprite sheets and compact numbers.

A page with 10,000 pairs would be slow with 20,000 pictures in it. So the pictures lie in a few sheets of about 2^20
pixels, lossless, base64 in elements that a browser neither runs nor decodes; the page's script decodes the sheets that
the visible pairs need. They stand in the order of the first measure, most alike first: the first view needs one sheet.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

from fastambient.console import shown_name
from fastambient.evaluation.metrics import Evaluation, Score
from fastambient.pictures import as_pictures

MOST_PIXELS = 24 * 2**20  # of all pictures of a run's gallery: 12,000 pairs of 32x32, about 35 MB of a page
_SHEET = 2**20  # pixels of a sheet: a browser decodes it in some 20 ms
_SIDE = 128  # pixels; larger pictures are averaged down for the gallery


@dataclass(frozen=True)
class Pairs:
    """Samples beside their nearest images (mirrored where the mirror image is the nearer one).

    samples, nearest: uint8 [K, C, H, W]; value: float64 [K], most alike first; number, index: int64 [K], positions
    of the samples and of the nearest images.
    """

    samples: np.ndarray
    nearest: np.ndarray
    value: np.ndarray
    number: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Sheets:
    """Pictures of one size in a few large ones.

    width, height: of a picture; columns: pictures in a row of a sheet; each: pictures a sheet; mime, files: the
    sheets' type and their base64 text.
    """

    width: int
    height: int
    columns: int
    each: int
    mime: str
    files: list[str]


def is_copy(values: np.ndarray, score: Score) -> np.ndarray:
    """bool [N]: below (closer is "low") or above (closer is "high") the score's threshold."""
    return values < score.threshold if score.closer == "low" else values > score.threshold


def most_alike(values: np.ndarray, score: Score) -> np.ndarray:
    """int64 [N], the order of the values with copies first; equal ones in their own order."""
    return np.argsort(values if score.closer == "low" else -values, kind="stable")


def nearest_pairs(evaluation: Evaluation, count: int, *, score: int = 0, control: bool = False) -> Pairs:
    """The `count` samples (or all, if there are fewer) that are most alike to an image, most alike first.

    Parameters
    ----------
    score : position in ``evaluation.scores``
    control : among the held-out images of the control instead of the training images; never mirrored
    """
    s = evaluation.scores[score]
    values, index, images = (
        (s.control, s.control_index, evaluation.holdout) if control else (s.values, s.index, evaluation.train)
    )
    if images is None or len(values) == 0:
        empty = evaluation.samples[:0]
        return Pairs(empty, empty, np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = most_alike(values, s)[:count]
    nearest = images[index[order]]
    if not control:
        mirrored = s.mirrored[order]
        nearest[mirrored] = nearest[mirrored][..., ::-1]
    return Pairs(evaluation.samples[order], nearest, values[order], order, index[order])


def sheets(images: np.ndarray) -> Sheets:
    """uint8 [N, C, H, W], N >= 1, as sheets; pictures above 128 pixels averaged down by a whole number.

    WebP without loss (whose "quality" is effort) is a third smaller than PNG on CIFAR-10 and as fast to write; where
    Pillow has none it is PNG.
    """
    images = reduced(as_pictures(images))
    n, c, h, w = images.shape
    columns = min(n, max(1, 2048 // w))
    each = columns * max(1, min(_SHEET // (columns * w * h), -(-n // columns)))
    kind, options = ("WEBP", {"lossless": True, "method": 1, "quality": 0}) if features.check("webp") else ("PNG", {})
    files = []
    for start in range(0, n, each):
        part = images[start : start + each]
        rows = -(-len(part) // columns)
        canvas = np.zeros((rows * columns, c, h, w), np.uint8)
        canvas[: len(part)] = part
        sheet = canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(sheet[..., 0] if c == 1 else sheet)).save(buffer, kind, **options)
        files.append(base64.b64encode(buffer.getvalue()).decode())
    return Sheets(w, h, columns, each, f"image/{kind.lower()}", files)


def shown(evaluation: Evaluation, most: int) -> np.ndarray:
    """int64 [K], the samples whose pictures the gallery holds, K <= most: those most alike to a training image by any
    of the measures, in the order of the first measure."""
    ranks = [np.argsort(most_alike(s.values, s)) for s in evaluation.scores]
    chosen = np.argsort(np.minimum.reduce(ranks), kind="stable")[:most]
    return chosen[np.argsort(ranks[0][chosen], kind="stable")]


def gallery_data(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, Sheets]]:
    """What the page's script needs of one run: numbers (JSON types; arrays as base64 of little-endian) and pictures.

    All samples' values are there, so that counts are exact; pictures up to `MOST_PIXELS`.
    """
    h, w = evaluation.samples.shape[2:]
    factor = -(-max(h, w) // _SIDE)
    most = max(1, MOST_PIXELS // (2 * -(-h // factor) * -(-w // factor)))
    chosen = shown(evaluation, most)
    nearest = np.stack([s.index[chosen] for s in evaluation.scores])
    used, first, place = np.unique(nearest, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # by first use: the first view needs one sheet
    rank = np.argsort(order, kind="stable")
    place = rank[place.reshape(nearest.shape)]
    pictures = {"samples": sheets(evaluation.samples[chosen]), "train": sheets(evaluation.train[used[order]])}
    scores = [
        {
            "key": s.key,
            "label": s.label,
            "closer": s.closer,
            "threshold": float(s.threshold),
            "values": _packed(s.values, "<f8"),
            "control": _packed(s.control, "<f8"),
            "index": _packed(s.index[chosen], "<i4"),
            "place": _packed(place[i], "<i4"),
            "mirrored": _packed(s.mirrored[chosen], "u1"),
        }
        for i, s in enumerate(evaluation.scores)
    ]
    layout = {
        name: {"width": p.width, "height": p.height, "columns": p.columns, "each": p.each, "mime": p.mime}
        for name, p in pictures.items()
    }
    names = {
        "samples": _named(evaluation.sample_names, chosen.tolist()),
        "train": _named(evaluation.train_names, used[order].tolist()),
    }
    numbers = {
        "total": len(evaluation.samples), "shown": _packed(chosen, "<i4"), "scores": scores, "sheets": layout,
        "names": names,
    }  # fmt: skip
    return numbers, pictures


def _named(names: Sequence[str] | None, positions: Sequence[int]) -> list[str] | None:
    return None if names is None else [shown_name(names[i]) for i in positions]


def most_copied(evaluation: Evaluation) -> list[tuple[int, int, str, np.ndarray]]:
    """(position, copies, name or "", uint8 [C, H, W], at most 128 pixels) of the training images that were copied
    most."""
    m = evaluation.metrics
    found = m.get("copies_per_train_image") or m["memorization"].get("copies_per_train_image") or {}
    rows: Sequence[dict[str, Any]] = found.get("top") or ()
    return [
        (i, row["copies"], shown_name(row.get("name", "")), reduced(evaluation.train[[i]])[0])
        for row in rows
        for i in [row["train_index"]]
    ]


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(kind)).tobytes()).decode()


def reduced(images: np.ndarray) -> np.ndarray:
    """uint8 [N, C, H, W], pictures above 128 pixels averaged down by a whole number: what a page shows of them."""
    factor = -(-max(images.shape[2:]) // _SIDE)
    if factor == 1:
        return images
    small = [
        np.asarray(Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).reduce(factor))
        for image in map(np.ascontiguousarray, images)
    ]
    stacked = np.stack(small)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
