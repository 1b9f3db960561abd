"""Quality figures on sets whose answers are known: one distribution, disjoint ones, dropped modes, a line of points."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from fastambient.errors import InputError
from fastambient.evaluation import quality as module
from fastambient.evaluation.frechet import frechet_distance
from fastambient.evaluation.quality import figure_name, quality

_FIGURES = ("fd", "kid", "precision", "recall", "density", "coverage")


@pytest.fixture(autouse=True)
def _few_subsets(monkeypatch):
    """KID's mean needs no hundred subsets here."""
    monkeypatch.setattr(module, "KID_SUBSETS", 5)


def _normal(n: int, d: int = 4, *, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, size=(n, d)).astype(np.float32)


def _modes(n: int, modes: int, *, seed: int) -> np.ndarray:
    """n points at each of so many corners, 50 deviations apart."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.normal(size=(n, 4)) + 50 * np.eye(4)[k] for k in range(modes)]).astype(np.float32)


def test_two_halves_of_one_distribution():
    x = _normal(1200)
    found = quality(x[:600], x[600:], embedder="e")
    assert found["fd"] == pytest.approx(frechet_distance(x[:600], x[600:])) and found["fd"] < 0.1
    assert abs(found["kid"]) < 0.02
    assert found["precision"] > 0.85 and found["recall"] > 0.85
    assert found["density"] == pytest.approx(1, abs=0.1)
    # Naeem et al.: for equal distributions and large equal sets the expected density is 1, the coverage 1 - 1/2^k.
    assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)


def test_a_set_against_itself():
    x = _normal(100)
    found = quality(x, x, embedder="e")
    assert found["fd"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    # Each reference ball holds its own centre and k others.
    assert found["density"] == pytest.approx(6 / 5, abs=0.05)
    assert found["kid_std"] == 0  # both sets are whole: one subset


def test_disjoint_distributions():
    found = quality(_normal(200), _normal(250, seed=1, mean=40.0), embedder="e")
    assert [found[name] for name in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]
    assert found["fd"] == pytest.approx(4 * 40**2, rel=0.05) and found["kid"] > 1e6


def test_dropped_modes_lower_recall_and_coverage_alone():
    found = quality(_modes(150, 1, seed=1), _modes(150, 4, seed=2), embedder="e")
    assert found["precision"] > 0.8 and found["density"] > 0.7
    assert found["recall"] == pytest.approx(0.25, abs=0.05)
    assert found["coverage"] == pytest.approx(0.25, abs=0.03)


def test_samples_that_are_no_reference_lower_precision_alone():
    found = quality(_modes(150, 4, seed=2), _modes(150, 1, seed=1), embedder="e")
    assert found["recall"] > 0.8 and found["coverage"] > 0.9
    assert found["precision"] == pytest.approx(0.25, abs=0.05)
    assert found["density"] == pytest.approx(0.25, abs=0.05)


def test_density_and_coverage_of_points_on_a_line():
    """Reference 0, 1, ..., 9 with k = 5: the balls of 0 and 9 reach to 5, of 1 and 8 to 4, of all others to 3."""
    reference = np.arange(10.0, dtype=np.float32)[:, None]
    radius = np.array([5, 4, 3, 3, 3, 3, 3, 3, 4, 5])
    for samples in ([0.0], [-4.5], [4.4, 4.6], [-6.0, 15.0], [2.5, 100.0, 9.0]):
        inside = np.abs(reference - np.array(samples)) <= radius[:, None]
        found = quality(np.array(samples, np.float32)[:, None], reference, embedder="e")
        assert found["density"] == pytest.approx(inside.sum() / (5 * len(samples)))
        assert found["coverage"] == pytest.approx(inside.any(1).mean())
    assert quality(np.array([[-4.5]], np.float32), reference, embedder="e")["density"] == pytest.approx(1 / 5)
    assert quality(np.array([[-4.5]], np.float32), reference, embedder="e")["coverage"] == pytest.approx(1 / 10)


def test_precision_and_recall_are_not_exchanged():
    """Samples between 0 and 1, the reference from 0 to 100: every sample is near the reference, few of it near them."""
    samples, reference = (np.linspace(0, end, 50, dtype=np.float32)[:, None] for end in (1, 100))
    found = quality(samples, reference, embedder="e")
    assert found["precision"] == 1 and found["recall"] == pytest.approx(1 / 50)


def test_far_from_the_origin_nothing_changes():
    """Distances are of centred vectors: |x|^2 + |y|^2 - 2 x.y of features near 10^4 would drown them."""
    x, y = _normal(120).astype(np.float64), _normal(150, seed=1).astype(np.float64)
    near, far = quality(x, y, embedder="e"), quality(x + 1e6, y + 1e6, embedder="e")
    for name in ("fd", "precision", "recall", "density", "coverage"):
        assert far[name] == pytest.approx(near[name], rel=1e-6)


def test_blocks_change_nothing(monkeypatch):
    x, y = _normal(130), _normal(170, seed=1, mean=0.5)
    whole = quality(x, y, embedder="e")
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_HELD", 1)  # Moments and KID in float32
    parts = quality(x, y, embedder="e")
    assert parts["fd"] == pytest.approx(whole["fd"], rel=1e-9)
    assert parts["kid"] == pytest.approx(whole["kid"], rel=1e-3)
    for name in ("precision", "recall", "density", "coverage"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-7)


def test_kid_is_the_unbiased_estimate_and_follows_the_seed():
    """Of two whole sets, by the formula: the diagonals are left out."""
    x, y = _normal(30, 3).astype(np.float64), _normal(30, 3, seed=1, mean=1.0).astype(np.float64)
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (30 * 29)  # noqa: E731
    expected = off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert quality(x, y, embedder="e")["kid"] == pytest.approx(expected, rel=1e-9)
    x, y = _normal(40), _normal(90, seed=1)
    one, again, other = (quality(x, y, embedder="e", seed=seed) for seed in (3, 3, 4))
    assert one == again and one["kid"] != other["kid"] and one["kid_std"] > 0
    quality(x, y, embedder="e", seed=2**63)  # RandomState takes 32 bits


def test_figures_carry_counts_reference_and_a_warning():
    found = quality(_normal(12), _normal(60, seed=1), embedder="inception", reference_name="held-out")
    assert found["figures"] == {
        "FID-12 vs held-out": found["fd"],
        "KID-12 vs held-out": found["kid"],
        "precision-12 vs held-out": found["precision"],
        "recall-12 vs held-out": found["recall"],
        "density-12 vs held-out": found["density"],
        "coverage-12 vs held-out": found["coverage"],
    }
    assert (found["samples"], found["reference"], found["dimensions"]) == (12, "held-out (60 images)", 4)
    assert found["embedder"] == "inception" and found["notes"] == []
    few = quality(_normal(12, 20), _normal(60, 20, seed=1), embedder="pixel", reference_name="test")
    assert "FD-12 vs test (fewer samples than dimensions)" in few["figures"] and "KID-12 vs test" in few["figures"]
    few = quality(_normal(60, 20), _normal(12, 20, seed=1), embedder="pixel")
    assert "FD-60 vs held-out (fewer reference images than dimensions)" in few["figures"]


@pytest.mark.parametrize(
    ("samples", "written"),
    [
        (1, "1"), (300, "300"), (999, "999"), (1000, "1k"), (1697, "1.7k"), (12_345, "12.3k"), (50_000, "50k"),
        (999_940, "999.9k"), (999_960, "1M"), (1_000_000, "1M"), (2_500_000, "2.5M"),
    ],
)  # fmt: skip
def test_counts_in_names(samples, written):
    assert figure_name("FD", samples, "held-out") == f"FD-{written} vs held-out"


def test_names_warn_below_the_dimensions_only():
    assert figure_name("FD", 300, "held-out", dimensions=300) == "FD-300 vs held-out"
    assert figure_name("FD", 300, "held-out", dimensions=301) == "FD-300 vs held-out (fewer samples than dimensions)"
    both = figure_name("FD", 300, "held-out", dimensions=301, references=299)
    assert both == "FD-300 vs held-out (fewer samples and reference images than dimensions)"


@pytest.mark.parametrize(
    ("n", "m", "missing"),
    [
        (1, 1, set(_FIGURES)),
        (1, 9, {"fd", "kid", "precision", "recall"}),
        (3, 9, {"precision", "recall"}),
        (4, 5, {"density", "coverage"}),
        (4, 6, set()),
        (9, 3, {"precision", "recall", "density", "coverage"}),
    ],
)
def test_what_cannot_be_had_is_none_and_said(n, m, missing):
    found = quality(_normal(n), _normal(m, seed=1), embedder="e")
    assert {name for name in _FIGURES if found[name] is None} == missing
    assert bool(found["notes"]) == bool(missing)
    told = " ".join(found["notes"])
    assert all((name.upper() if name in ("fd", "kid") else name) in told for name in missing)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_without_torch_fidelity_the_rest_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_kid", None)
    found = quality(_normal(20), _normal(20, seed=1), embedder="e")
    assert found["kid"] is found["precision"] is found["recall"] is None
    assert found["fd"] > 0 and found["coverage"] > 0 and "pip install" in found["notes"][0]


@pytest.mark.filterwarnings("error")
def test_nothing_is_printed(capfd, monkeypatch):
    x, y = _normal(40), _normal(90, seed=1)
    x.flags.writeable = y.flags.writeable = False  # like a mapped file
    quality(x, y, embedder="e")
    monkeypatch.setattr(module, "_HELD", 1)
    quality(x, y, embedder="e")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), "one embedder"),
        (np.zeros((5, 3, 1)), np.zeros((5, 3)), "expected"),
        (np.zeros((0, 3)), np.zeros((5, 3)), "at least 1"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "NaN"),
        (np.zeros((5, 3)), np.full((5, 3), np.inf), "infinity"),
    ],
)
def test_bad_input(samples, reference, message):
    with pytest.raises(InputError, match=message):
        quality(samples, reference, embedder="e")


@pytest.mark.slow
def test_importing_the_package_takes_no_torch_fidelity():
    code = "import sys, fastambient, fastambient.evaluation.quality; print('torch_fidelity' in sys.modules, 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
