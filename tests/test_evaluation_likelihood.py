"""FLD's gap and MiFID on sets whose share of copies is known, and the fit against its objective's gradient."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from fastambient.errors import InputError
from fastambient.evaluation import likelihood as module
from fastambient.evaluation.likelihood import (
    MIFID_THRESHOLD,
    VARIANCE_BOUND,
    feature_likelihood_divergence,
    likelihood_control,
    mifid,
)

_D = 64


def _features(n: int, seed: int, d: int = _D) -> np.ndarray:
    """Correlated and far from standard, like features."""
    mixing = np.random.default_rng(0).normal(size=(d, d)) / np.sqrt(d)
    return (np.random.default_rng(seed).normal(size=(n, d)) @ mixing * 3 + 2).astype(np.float32)


_TRAIN, _HOLDOUT, _FRESH = (_features(200, seed) for seed in (1, 2, 3))


def _planted(share: float) -> np.ndarray:
    copies = round(share * 200)
    return np.concatenate([_TRAIN[:copies], _FRESH[copies:]])


def _fld(samples: np.ndarray) -> dict[str, float]:
    return feature_likelihood_divergence(samples, _TRAIN, _HOLDOUT)


def test_fresh_samples_have_no_gap_and_score_as_the_baseline():
    found = _fld(_FRESH)
    assert abs(found["gap"]) < 2 and found["at_bound"] == 0
    assert abs(found["holdout"]) < 3  # C is what fresh images would score
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_gap_grows_with_the_share_of_copies():
    found = [_fld(_planted(share)) for share in (0, 0.05, 0.25, 0.5, 1)]
    gaps = [row["gap"] for row in found]
    assert all(b > a + 20 for a, b in itertools.pairwise(gaps))
    assert [row["at_bound"] for row in found] == [0, 0.05, 0.25, 0.5, 1]
    assert gaps[-1] > 1000 and all(math.isfinite(gap) for gap in gaps)


def test_each_copied_image_is_explained_to_the_bound():
    """All are copies: p(x) is one normal distribution's peak over m, so FLD(train) + C is known."""
    found = _fld(_TRAIN)
    expected = 50 * math.log(2 * math.pi * VARIANCE_BOUND) + 100 / _D * math.log(200)
    assert found["train"] + found["baseline"] == pytest.approx(expected, rel=1e-6)


def test_near_copies_have_a_gap_and_bad_samples_have_none():
    noise = np.random.default_rng(4).normal(size=_TRAIN.shape)
    near = _fld(_TRAIN + 0.3 * _TRAIN.std(0) * noise)
    assert near["gap"] > 10 and near["at_bound"] == 0
    bad = _fld(_FRESH * 5)
    assert abs(bad["gap"]) < 1 and bad["holdout"] > 50
    dropped = _fld(np.repeat(_FRESH[:4], 50, 0))
    assert abs(dropped["gap"]) < 2 and dropped["holdout"] > 10


def test_mirror_roles_mirror_the_gap():
    """Copies of the held-out images: the gap is negative."""
    assert feature_likelihood_divergence(_planted(0.25), _HOLDOUT, _TRAIN)["gap"] < 2
    assert _fld(_HOLDOUT)["gap"] < -20


def test_the_fit_is_a_maximum(monkeypatch):
    """At the fitted variances the gradient of sum log(p(x) + L(x)) vanishes, and no step lowers the likelihood."""
    monkeypatch.setattr(module, "_STEPS", 3000)
    monkeypatch.setattr(module, "_TOLERANCE", 1e-13)
    generator = np.random.default_rng(5)
    x, centres = generator.normal(size=(60, 3)), generator.normal(size=(15, 3))
    squared = torch.cdist(torch.from_numpy(x), torch.from_numpy(centres)).square()
    from_mean = torch.from_numpy(np.square(0.9 * (x - x.mean(0))).sum(1))

    def objective(log_v: torch.Tensor, log_v0: torch.Tensor) -> torch.Tensor:
        v, v0 = log_v.exp(), log_v0.exp()
        p = (torch.exp(-squared / 2 / v) / (2 * math.pi * v) ** 1.5).mean(1)
        base = torch.exp(-from_mean / 2 / v0) / (2 * math.pi * v0) ** 1.5
        return torch.log(p + base).mean()

    v = module._fit(centres, x)
    log_v = v.log().requires_grad_()
    # The base's variance is inner to the fit: its best value for these v.
    inner = minimize_scalar(lambda t: -float(objective(v.log(), torch.tensor(t))), bounds=(-5, 5), method="bounded")
    log_v0 = torch.tensor(float(inner.x), dtype=torch.float64)
    gradient = torch.autograd.grad(objective(log_v, log_v0), log_v)[0]
    free = v > VARIANCE_BOUND * 1.001
    assert free.sum() > 5 and gradient[free].abs().max() < 1e-4
    start = (squared.min(0).values / 3).clamp(min=VARIANCE_BOUND)
    assert objective(v.log(), log_v0) > objective(start.log(), log_v0)


def test_log_likelihood_by_the_formula():
    x, centres = _features(7, 6, 5), _features(4, 7, 5)
    v = np.array([0.5, 2.0, 7.0, 30.0])
    squared = np.square(x[:, None].astype(np.float64) - centres).sum(2)
    p = (np.exp(-squared / 2 / v) / (2 * np.pi * v) ** 2.5).mean(1)
    found = module._log_likelihood(x.astype(np.float64), centres.astype(np.float64), torch.from_numpy(v))
    assert found == pytest.approx(np.log(p), rel=1e-6)


def test_units_do_not_matter_and_constant_dimensions_are_left_out():
    """Features are standardised; a column that is constant while training is no measure."""
    scale, shift = np.geomspace(1e-3, 1e3, _D), np.linspace(-50, 50, _D)
    plain = _fld(_planted(0.1))
    moved = feature_likelihood_divergence(*(x * scale + shift for x in (_planted(0.1), _TRAIN, _HOLDOUT)))
    assert moved["gap"] == pytest.approx(plain["gap"], rel=1e-3)
    constant = [
        np.concatenate([x, np.full((200, 1), 0.1 + i)], 1) for i, x in enumerate((_planted(0.1), _TRAIN, _HOLDOUT))
    ]
    assert feature_likelihood_divergence(*constant)["gap"] == pytest.approx(plain["gap"], rel=1e-3)


def test_is_deterministic_blocks_change_nothing_and_large_sets_are_thinned(monkeypatch):
    plain = _fld(_planted(0.5))
    assert _fld(_planted(0.5)) == plain
    monkeypatch.setattr(module, "_ROWS", 7)
    other = _fld(_planted(0.5))
    assert list(other.values()) == [pytest.approx(value, rel=1e-6) for value in plain.values()]
    monkeypatch.setattr(module, "_MOST", 100)
    thinned = _fld(_planted(0.5))
    assert thinned["at_bound"] == pytest.approx(0.25, abs=0.1)  # half of the originals are still there
    assert thinned["gap"] > 50


def test_mirrored_copies_count_where_mirror_images_trained():
    """Features without a plane of symmetry: a mirror image is another vector, and copies of it are copies."""
    mirrored = _features(200, 30, _D)
    samples = mirrored + 1e-3 * _FRESH
    blind = feature_likelihood_divergence(samples, _TRAIN, _HOLDOUT)
    seeing = feature_likelihood_divergence(samples, _TRAIN, _HOLDOUT, mirrored=mirrored)
    assert abs(blind["gap"]) < 5 and seeing["gap"] > 50 and seeing["at_bound"] > 0.9
    own = feature_likelihood_divergence(_TRAIN + 1e-3 * _FRESH, _TRAIN, _HOLDOUT, mirrored=mirrored)
    assert own["gap"] == pytest.approx(seeing["gap"], rel=0.1), "either is half of what trained"
    assert mifid(3.0, samples, _TRAIN)["value"] == 3.0
    assert mifid(3.0, samples, _TRAIN, mirrored=mirrored)["value"] > 1e4
    with pytest.raises(InputError, match="a mirror image of each"):
        feature_likelihood_divergence(samples, _TRAIN, _HOLDOUT, mirrored=mirrored[:-1])


def test_the_control_is_what_held_out_images_reach():
    """Fresh samples are told from copies by it at any count, where a fixed limit would not do."""
    for n in (20, 60, 200):
        fresh = likelihood_control(_FRESH[:n], _TRAIN[:n], _HOLDOUT)
        planted = np.concatenate([_TRAIN[: n // 2], _FRESH[n // 2 : n]])
        copies = likelihood_control(planted, _TRAIN[:n], _HOLDOUT)
        assert fresh["images"] == min(n, 100) == copies["images"]
        assert abs(fresh["gap"] - fresh["holdout_gap"]) < 12 and copies["gap"] - copies["holdout_gap"] > 20, n
    whole = _fld(_FRESH[:100])
    assert likelihood_control(_FRESH[:100], _TRAIN, _HOLDOUT)["gap"] == pytest.approx(whole["gap"])
    low, high = whole["gap_ci95"]
    assert low < whole["gap"] < high and high - low < 20
    assert (
        likelihood_control(_FRESH, _TRAIN, _HOLDOUT[:3]) is None
        and likelihood_control(_FRESH[:1], _TRAIN, _HOLDOUT) is None
    )


def test_the_interval_of_the_gap_is_that_of_its_images():
    """Other training and held-out images of the same kind give another gap: as far as the interval says, about."""
    gaps, widths = [], []
    for i in range(12):
        found = feature_likelihood_divergence(_FRESH, _features(100, 40 + i, _D), _features(100, 80 + i, _D))
        gaps.append(found["gap"])
        widths.append((found["gap_ci95"][1] - found["gap_ci95"][0]) / 3.92)
    assert 0.5 < np.std(gaps, ddof=1) / np.mean(widths) < 2


def test_the_smallest_sets():
    found = feature_likelihood_divergence(_FRESH[:1], _TRAIN[:2], _HOLDOUT[:1])
    assert all(np.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize(
    ("samples", "train", "holdout", "message"),
    [
        (_FRESH, _TRAIN[:, :5], _HOLDOUT, "one embedder"),
        (_FRESH[:0], _TRAIN, _HOLDOUT, "at least 1 sample"),
        (_FRESH, _TRAIN[:1], _HOLDOUT, "2 training"),
        (_FRESH, _TRAIN, _HOLDOUT[:0], "1 held-out"),
        (_FRESH * np.nan, _TRAIN, _HOLDOUT, "NaN"),
        (_FRESH, np.ones_like(_TRAIN), _HOLDOUT, "different images"),
    ],
)
def test_bad_input(samples, train, holdout, message):
    with pytest.raises(InputError, match=message):
        feature_likelihood_divergence(samples, train, holdout)


def test_mifid_rises_with_copies():
    centred_fresh, centred_train = _FRESH - 2, _TRAIN - 2  # directions all over: far apart
    fresh, copies = mifid(3.0, centred_fresh, centred_train), mifid(3.0, centred_train, centred_train)
    assert fresh["distance"] > MIFID_THRESHOLD and fresh["value"] == 3.0
    assert copies["distance"] == pytest.approx(0, abs=1e-12) and copies["value"] == pytest.approx(3e6, rel=1e-3)
    noisy = mifid(3.0, centred_train + 0.3 * centred_fresh, centred_train)
    assert noisy["distance"] < MIFID_THRESHOLD
    assert noisy["value"] == pytest.approx(3.0 / (noisy["distance"] + 1e-6))


def test_mifid_by_hand():
    """Angles in the plane: the nearest of 0 and 90 degrees, a line having no direction (|cos|)."""
    train = np.array([[1.0, 0.0], [0.0, 2.0]])
    angles = np.deg2rad([10.0, 80.0, 190.0])
    samples = np.stack([np.cos(angles), np.sin(angles)], 1) * 7
    found = mifid(2.0, samples, train)
    distance = 1 - np.cos(np.deg2rad(10))
    assert found == pytest.approx({"value": 2 / (distance + 1e-6), "distance": distance, "threshold": 0.1})
    assert mifid(2.0, samples, train, threshold=distance / 2)["value"] == 2.0
    assert mifid(2.0, np.zeros((1, 2)), train)["distance"] == 1


def test_mifid_searches_all_blocks(monkeypatch):
    whole = mifid(1.0, _FRESH, _TRAIN)
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_COLUMNS", 9)
    assert mifid(1.0, _FRESH, _TRAIN) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("fd", "samples", "train", "message"),
    [
        (1.0, _FRESH, _TRAIN[:, :5], "one embedder"),
        (1.0, _FRESH[:0], _TRAIN, "at least 1"),
        (-1.0, _FRESH, _TRAIN, "from 0 on"),
        (float("nan"), _FRESH, _TRAIN, "from 0 on"),
        (1.0, _FRESH * np.inf, _TRAIN, "NaN"),
    ],
)
def test_mifid_bad_input(fd, samples, train, message):
    with pytest.raises(InputError, match=message):
        mifid(fd, samples, train)
