"""Are the samples as good and as varied as images that never trained? FD, KID, precision, recall, density, coverage.

All of them compare two sets of feature vectors and none looks at the training set: a generator that copies scores well.
Read them beside the copy rate.

| figure | says | source |
|---|---|---|
| FD (with Inception: FID) | distance of the normal distributions fitted to the sets | Heusel et al., 2017 |
| KID | squared maximum mean discrepancy, kernel (x.y / D + 1)^3, unbiased | Binkowski et al., 2018 |
| precision | share of samples within reach of the reference set | Kynkaanniemi et al., 2019 |
| recall | share of the reference set within reach of the samples | the same |
| density | reference balls that a sample lies in, mean over k; may exceed 1 | Naeem et al., 2020 |
| coverage | share of reference balls that hold a sample | the same |

"Within reach" of a set is inside a closed ball around one of its points that reaches to its k-th nearest neighbour in
the set: k = 3 for precision and recall, 5 for density and coverage, as in the papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastambient.errors import InputError
from fastambient.evaluation.frechet import Moments, frechet_distance, frechet_of_moments

REACH = 3  # k of precision and recall
BALLS = 5  # k of density and coverage
KID_SUBSETS, KID_SUBSET = 100, 1000  # and vectors in each; fewer where a set is smaller
_HELD = 2**26  # numbers in both sets, above which float64 copies of them would be the largest thing in memory
_ROWS = 1024  # rows of a block of distances


def quality(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    embedder: str,
    reference_name: str = "held-out",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """All figures of the samples against the reference set.

    FD is the exact one of `frechet_distance` while float64 copies of the features are small beside what is held anyway
    (up to 2^26 numbers, 32,768 vectors of 2,048), and that of streamed `Moments`, which hold two covariances, above and
    on a GPU. KID is the mean over torch-fidelity's 100 subsets of 1,000 and ``kid_std`` their standard deviation; a set
    of fewer is taken whole each time, so that the deviation is the other set's alone (0 where both are whole).
    Precision and recall are torch-fidelity's, too; without that package they and KID are None, and a note says so.

    Parameters
    ----------
    samples, reference: float32 features [N, D] and [M, D] of one embedder, finite.
    embedder: its name; "inception" makes an FD a FID.
    reference_name: what the reference images are, for the names of the figures.
    seed: of KID's subsets.
    device: where the distances are made.

    Returns
    -------
    JSON types only: embedder, samples, reference ("held-out (1697 images)"), dimensions, seed; fd, kid, kid_std,
    precision, recall, density, coverage, each a number or None; figures: the same numbers by `figure_name`; notes: a
    line for each figure that could not be had.

    Raises
    ------
    InputError
        Other shapes than [N, D] and [M, D], an empty set, or features that hold NaN or infinity.
    """
    samples, reference = np.asarray(samples), np.asarray(reference)
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise InputError(
            f"quality of features {list(samples.shape)} against {list(reference.shape)}, expected [N, D] and [M, D];"
            " embed both sets with one embedder"
        )
    n, m, dimensions = len(samples), len(reference), samples.shape[1]
    if min(n, m, dimensions) < 1:
        raise InputError(f"quality of {n} samples against {m} {reference_name} images, expected at least 1 of each")
    if not (np.isfinite(samples).all() and np.isfinite(reference).all()):
        raise InputError(f"{embedder} features hold NaN or infinity, expected finite numbers; check its weights")

    notes: list[str] = []
    values: dict[str, float | None] = {"fd": None}
    if min(n, m) < 2:
        notes.append(f"FD: needs at least 2 images of each, here {n} samples and {m} {reference_name} images")
    else:
        values["fd"] = distance_of_features(samples, reference, device=device)
    values |= _fidelity(samples, reference, reference_name, seed, device, notes)
    values |= _density_coverage(samples, reference, reference_name, device, notes)

    fd = "FID" if embedder == "inception" else "FD"
    figures = {figure_name(fd, n, reference_name, dimensions=dimensions, references=m): values["fd"]}
    for metric in ("kid", "precision", "recall", "density", "coverage"):
        label = metric.upper() if metric == "kid" else metric
        figures[figure_name(label, n, reference_name)] = values[metric]
    return {
        "embedder": embedder,
        "samples": n,
        "reference": f"{reference_name} ({m} images)",
        "dimensions": dimensions,
        "seed": seed,
        **values,
        "figures": figures,
        "notes": notes,
    }


def figure_name(
    metric: str, samples: int, reference: str, *, dimensions: int = 0, references: int | None = None
) -> str:
    """The name under which a figure may be quoted: ``FID-1k vs held-out``.

    Parameters
    ----------
    metric: FD, FID, KID, precision, ...
    samples: how many there are: 300 as it is, 1,000 as 1k, 12,345 as 12.3k, 2,000,000 as 2M.
    reference: the set it is measured against.
    dimensions: numbers a vector, where the figure has covariances in it; the name says when there are fewer vectors
        than that, because such a covariance is singular and the figure tells more of the counts than of the pictures.
    references: images of the reference set; None is enough of them.
    """
    few = [
        what
        for what, count in (("samples", samples), ("reference images", references))
        if count is not None and count < dimensions
    ]
    note = f" (fewer {' and '.join(few)} than dimensions)" if few else ""
    return f"{metric}-{_count(samples)} vs {reference}{note}"


def distance_name(rows: Sequence[dict[str, Any]], embedder: str) -> str:
    """`figure_name` of the Frechet distances of rows (samples; dimensions and references where they are known) in the
    features of the row's embedder, or else of `embedder`; more than one name where they differ."""
    names = (
        figure_name(
            "FID" if (row.get("embedder") or embedder) == "inception" else "FD",
            row["samples"],
            "held-out",
            dimensions=row.get("dimensions") or 0,
            references=row.get("references"),
        )
        for row in rows
    )
    return " | ".join(dict.fromkeys(names))


def spaces(rows: Sequence[dict[str, Any]]) -> str:
    """The embedders of rows' distances; rows that name none are in pixels."""
    return ", ".join(dict.fromkeys(row.get("embedder") or "pixel" for row in rows))


def _count(n: int) -> str:
    if n < 1000:
        return str(n)
    # What would be written 1000k is 1M.
    number, letter = (n / 1e3, "k") if round(n / 1e3, 1) < 1000 else (n / 1e6, "M")
    return f"{number:.1f}".removesuffix(".0") + letter


def own_distances(
    samples: np.ndarray,
    train: np.ndarray,
    holdout: np.ndarray,
    *,
    value: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The training images' own distance to the held-out ones, for comparison; features [N, D], 2 or more of each.

    Parameters
    ----------
    value: the distance of all samples.

    Returns
    -------
    train_vs_reference: of all training images. equal_counts: a distance falls as a set grows, so beside it both at as
    many images, those of the larger set chosen by `seed`: {"images", "value", "train_vs_reference"}.
    """
    count, generator = min(len(samples), len(train)), np.random.default_rng(seed)
    own = distance_of_features(train, holdout, device=device)
    equal = []
    for side, whole in ((samples, value), (train, own)):
        if len(side) > count:
            some = side[np.sort(generator.choice(len(side), count, replace=False))]
            whole = distance_of_features(some, holdout, device=device)
        equal.append(whole)
    return {
        "train_vs_reference": own,
        "equal_counts": {"images": count, "value": equal[0], "train_vs_reference": equal[1]},
    }


def distance_of_features(samples: np.ndarray, reference: np.ndarray, *, device: torch.device | str = "cpu") -> float:
    """Frechet distance of [N, D] and [M, D], N and M >= 2, by the cheaper way at their sizes; covariances of many
    vectors are made and rooted on `device`."""
    few = min(len(samples), len(reference)) <= samples.shape[1]
    if few or (samples.size + reference.size <= _HELD and torch.device(device).type == "cpu"):
        return frechet_distance(samples, reference)
    a, b = Moments(device=device), Moments(device=device)
    a.add(samples)
    b.add(reference)
    return frechet_of_moments(a, b)


def _fidelity(
    samples: np.ndarray,
    reference: np.ndarray,
    reference_name: str,
    seed: int,
    device: torch.device | str,
    notes: list[str],
) -> dict[str, float | None]:
    """KID, precision and recall by torch-fidelity."""
    values: dict[str, float | None] = dict.fromkeys(("kid", "kid_std", "precision", "recall"))
    try:
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import calculate_precision_recall_part
    except ImportError:
        notes.append('KID, precision, recall: need torch-fidelity; pip install "torch-fidelity>=0.4"')
        return values
    n, m = len(samples), len(reference)
    have = f"here {n} samples and {m} {reference_name} images"
    if min(n, m) < 2:
        notes.append(f"KID: needs at least 2 images of each, {have}")
    else:
        # A cube of a product of features far from 0 is large: in float32 its rounding would be seen.
        dtype = np.float64 if samples.size + reference.size <= _HELD else np.float32
        a, b = (torch.from_numpy(np.require(x, dtype, ["C", "W"])) for x in (samples, reference))
        size = min(KID_SUBSET, n, m)
        kid = kid_features_to_metric(
            a,
            b,
            kid_subset_size=size,
            kid_subsets=1 if n == m == size else KID_SUBSETS,  # all subsets of the whole are the whole
            rng_seed=seed % 2**32,
            verbose=False,
        )
        values["kid"] = float(kid["kernel_inception_distance_mean"])
        values["kid_std"] = float(kid["kernel_inception_distance_std"])
    if min(n, m) <= REACH:
        notes.append(f"precision, recall: need at least {REACH + 1} images of each, {have}")
    else:
        a, b = _centred(samples, reference, device)
        values["precision"], values["recall"] = calculate_precision_recall_part(a, b, REACH, _ROWS)
    return values


def _density_coverage(
    samples: np.ndarray, reference: np.ndarray, reference_name: str, device: torch.device | str, notes: list[str]
) -> dict[str, float | None]:
    if len(reference) <= BALLS:
        notes.append(
            f"density, coverage: need at least {BALLS + 1} {reference_name} images, here {len(reference)}",
        )
        return {"density": None, "coverage": None}
    a, b = _centred(samples, reference, device)
    inside, covered = 0, 0
    for balls in b.split(_ROWS):
        # The nearest to each is itself, at distance 0.
        radius = torch.cdist(balls, b).kthvalue(BALLS + 1, dim=1).values
        found = torch.zeros(len(balls), dtype=torch.bool, device=b.device)
        for block in a.split(_ROWS):
            hits = torch.cdist(balls, block) <= radius[:, None]
            inside += int(hits.sum())
            found |= hits.any(1)
        covered += int(found.sum())
    return {"density": inside / (BALLS * len(a)), "coverage": covered / len(b)}


def _centred(samples: np.ndarray, reference: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Both less the reference's mean: |x|^2 + |y|^2 - 2 x.y of vectors far from 0 would lose the distance of near ones.
    float64, or of many vectors float32, which takes no more memory than they do."""
    mean = reference.mean(0, dtype=np.float64)
    dtype = np.float64 if samples.size + reference.size <= _HELD else np.float32
    sides = []
    for x in (samples, reference):
        centred = np.empty(x.shape, dtype)
        for start in range(0, len(x), _ROWS):
            centred[start : start + _ROWS] = x[start : start + _ROWS] - mean
        sides.append(torch.from_numpy(centred).to(device))
    return sides[0], sides[1]
