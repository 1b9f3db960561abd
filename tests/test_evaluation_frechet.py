"""Frechet distance against closed forms and against the textbook formula through scipy's matrix root."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from fastambient.errors import InputError
from fastambient.evaluation.frechet import bias_note, frechet_distance


def _textbook(x: np.ndarray, y: np.ndarray) -> float:
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(root).real)


def _correlated(n: int, d: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) / np.sqrt(d) + generator.normal(size=d)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 16), (300, 17, 16), (17, 17, 16), (40, 500, 30)])
def test_equals_the_textbook_formula(n, m, d):
    x, y = _correlated(n, d, 1), _correlated(m, d, 2)
    assert frechet_distance(x, y) == pytest.approx(_textbook(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(6, 9, 40), (6, 90, 40), (90, 6, 40), (2, 2, 5)])
def test_singular_covariances_equal_a_root_by_eigenvalues(n, m, d):
    """With fewer samples than dimensions sqrtm fails; tr (S T)^(1/2) = tr (S^(1/2) T S^(1/2))^(1/2) does not."""
    x, y = _correlated(n, d, 3), _correlated(m, d, 4)
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(s)
    half = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    root = np.sqrt(np.clip(np.linalg.eigvalsh(half @ t @ half), 0, None)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_closed_forms():
    x = _correlated(50, 8, 5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    shift = np.arange(8.0)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift @ shift), rel=1e-10)
    # Scaling by k scales the deviation: tr S (k - 1)^2.
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * np.trace(np.cov(x, rowvar=False)), rel=1e-10)
    # Two points a side, in one dimension: deviations |x0 - x1| / sqrt(2) with the unbiased variance.
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[5.0], [11.0]])) == pytest.approx(
        49 + 0.5 * (6 - 2) ** 2
    )


def test_is_symmetric_and_takes_other_dtypes():
    x, y = _correlated(30, 12, 6), _correlated(9, 12, 7)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    integers = np.arange(12, dtype=np.uint8).reshape(4, 3)
    assert frechet_distance(integers, integers + np.uint8(1)) == pytest.approx(3)


def test_many_pixels_need_no_square_root_of_their_size():
    """12,288 dimensions: a D x D float64 covariance alone would take 1.2 GB."""
    x = np.random.default_rng(8).normal(size=(40, 12_288))
    assert frechet_distance(x, x[:20] + 1.0) > 12_288


def test_many_samples_need_no_cross_matrix_of_their_size():
    """3,000 x 3,000 in float64 would be 72 MB."""
    x = _correlated(6000, 4, 9)
    tracemalloc.start()
    frechet_distance(x[:3000], x[3000:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "expected"),
        (np.zeros(5), np.zeros(5), "expected"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "NaN"),
        (np.zeros((5, 3)), np.full((5, 3), np.inf), "infinity"),
    ],
)
def test_bad_input(x, y, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(x, y)


def test_few_pictures_are_called_biased_with_the_numbers():
    enough = [(1000, 1000, 64), (5000, 1697, 64), (12_288, 12_288, 12_288)]
    assert [bias_note(*counts) for counts in enough] == ["", "", ""]
    for counts, told in {
        (999, 5000, 64): ("999 samples", "5,000 held-out", "1,000 of each", "64 numbers"),
        (5000, 999, 64): ("5,000 samples", "999 held-out", "1,000 of each"),
        (3071, 3072, 3072): ("3,071 samples", "3,072 of each", "3,072 numbers"),
    }.items():
        note = bias_note(*counts)
        assert all(words in note for words in told) and "\n" not in note


def test_the_distance_of_few_samples_of_one_distribution_is_too_large():
    """What the note says: the true distance is 0."""
    x = np.random.default_rng(10).normal(size=(4000, 30))
    assert frechet_distance(x[:40], x[2000:]) > 3 * frechet_distance(x[:400], x[2000:]) > 0.1
