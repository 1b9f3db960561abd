"""Streamed moments and their Frechet distance: against numpy, the exact distance, torch-fidelity and closed forms."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastambient.errors import InputError
from fastambient.evaluation.frechet import Moments, frechet_distance, frechet_of_moments


def _streamed(x: np.ndarray, block: int = 37) -> Moments:
    moments = Moments()
    for start in range(0, len(x), block):
        moments.add(x[start : start + block])
    return moments


def _correlated(n: int, d: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) / np.sqrt(d) + generator.normal(size=d)


def _exact(n: int, mean: np.ndarray, root: np.ndarray, *, seed: int) -> np.ndarray:
    """n vectors whose sample mean is `mean` and whose unbiased sample covariance is root root', to rounding."""
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(n - 1)
    return (z - z.mean(0)) @ root.T + mean


@pytest.mark.parametrize("block", [1, 7, 100, 5000])
def test_blocks_give_the_moments_of_the_whole(block):
    x = _correlated(2500, 9, 1)
    moments = _streamed(x, block)
    assert (moments.n, moments.dimensions) == (2500, 9)
    np.testing.assert_allclose(moments.mean(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x, rowvar=False), rtol=1e-10, atol=1e-13)


def test_merged_streams_are_one_stream():
    x = _correlated(300, 6, 2)
    whole, empty = _streamed(x), Moments()
    parts = [_streamed(x[a:b]) for a, b in ((0, 1), (1, 180), (180, 300))]
    for part in (*parts, Moments()):
        empty.merge(part)
    assert empty.n == 300
    np.testing.assert_allclose(empty.mean(), whole.mean(), rtol=1e-12)
    np.testing.assert_allclose(empty.covariance(), whole.covariance(), rtol=1e-11)
    # What was merged from stays as it was, and apart.
    np.testing.assert_allclose(parts[1].covariance(), np.cov(x[1:180], rowvar=False), rtol=1e-10, atol=1e-13)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    """E[x^2] - E[x]^2 at 10^8 deviations would hold no digit at all."""
    x = np.random.default_rng(3).normal(size=(1000, 4))
    shifted = x + 1e8
    # Adding 1e8 rounds x itself to 1.5e-8.
    np.testing.assert_allclose(_streamed(shifted).covariance(), np.cov(x, rowvar=False), atol=1e-7)


def test_takes_tensors_and_other_dtypes_in_float64():
    x = np.random.default_rng(4).integers(0, 256, (50, 3), dtype=np.uint8)
    expected = np.cov(x, rowvar=False)
    for block in (
        x,
        torch.from_numpy(x),
        x.astype(np.float32),
        torch.from_numpy(x).to(torch.bfloat16),
        x.astype(np.int64),
    ):
        moments = _streamed(block)
        np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-12)
    moments.add(x[:0])
    assert moments.n == 50
    alone = Moments()
    alone.add(torch.ones(2, 3, requires_grad=True))
    assert alone.covariance().tolist() == np.zeros((3, 3)).tolist()


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 16), (40, 500, 30), (2000, 1500, 64)])
def test_distance_of_streams_is_the_exact_one(n, m, d):
    x, y = _correlated(n, d, 5), _correlated(m, d, 6)
    assert frechet_of_moments(_streamed(x), _streamed(y)) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert frechet_of_moments(_streamed(x), _streamed(x)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("n", "m", "d"), [(6, 9, 40), (6, 900, 40), (900, 6, 40), (2, 2, 200), (100, 50, 600)])
def test_singular_covariances_lose_what_is_promised_at_most(n, m, d):
    x, y = _correlated(n, d, 7), _correlated(m, d, 8)
    a, b = _streamed(x), _streamed(y)
    largest = max(np.linalg.eigvalsh(side.covariance()).max() for side in (a, b))
    assert abs(frechet_of_moments(a, b) - frechet_distance(x, y)) < 1e-8 * d * largest


@pytest.mark.parametrize(
    ("n", "m", "d"), [(500, 400, 16), (1500, 1000, 64), (64, 65, 64), (20, 30, 64), (20, 400, 64), (400, 20, 64)]
)
def test_equals_torch_fidelity(n, m, d):
    """Both paths, to 1e-3 relative, with fewer samples than dimensions, too."""
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = (_correlated(size, d, seed).astype(np.float32) for size, seed in ((n, 9), (m, 10)))
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(side)) for side in (x, y)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert expected > 1
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-3)
    assert frechet_of_moments(_streamed(x), _streamed(y)) == pytest.approx(expected, rel=1e-3)


def _both(x: np.ndarray, y: np.ndarray) -> list[float]:
    return [frechet_distance(x, y), frechet_of_moments(_streamed(x), _streamed(y))]


def test_closed_form_of_diagonal_covariances():
    """|difference of means|^2 + sum of (difference of deviations)^2."""
    s, t = np.array([0.1, 1.0, 2.0, 30.0, 5.0]), np.array([0.2, 1.0, 0.01, 10.0, 6.0])
    mean, other = np.arange(5.0), np.array([1.0, -1.0, 0.0, 3.0, 2.5])
    x, y = _exact(80, mean, np.diag(s), seed=11), _exact(41, other, np.diag(t), seed=12)
    expected = np.square(mean - other).sum() + np.square(s - t).sum()
    assert _both(x, y) == pytest.approx([expected] * 2, rel=1e-9)


def test_closed_form_of_commuting_covariances():
    """One set of axes, turned: the deviations along them pair up as if diagonal. One is 0: a singular covariance."""
    axes = np.linalg.qr(np.random.default_rng(13).normal(size=(4, 4)))[0]
    s, t = np.array([3.0, 1.0, 0.0, 0.5]), np.array([0.3, 2.0, 1.0, 0.5])
    x, y = (_exact(50, np.zeros(4), axes * deviations, seed=14 + i) for i, deviations in enumerate((s, t)))
    assert _both(x, y) == pytest.approx([np.square(s - t).sum()] * 2, rel=1e-6)


def test_closed_form_in_the_plane():
    """Of 2 x 2 matrices with the eigenvalues a, b: sqrt(a) + sqrt(b) = sqrt(trace + 2 sqrt(det)); these do not commute."""
    p, q = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 3.0], [0.0, 0.2]])
    s, t = p @ p.T, q @ q.T
    assert abs(s @ t - t @ s).max() > 1
    root = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    x, y = _exact(30, np.zeros(2), p, seed=16), _exact(20, np.ones(2), q, seed=17)
    assert _both(x, y) == pytest.approx([2 + np.trace(s) + np.trace(t) - 2 * root] * 2, rel=1e-9)


def test_bad_input():
    moments = Moments()
    with pytest.raises(InputError, match="at least 1"):
        moments.mean()
    with pytest.raises(InputError, match=r"\[B, D\]"):
        moments.add(np.zeros(3))
    moments.add(np.zeros((1, 3)))
    with pytest.raises(InputError, match="at least 2"):
        moments.covariance()
    with pytest.raises(InputError, match="at least 2"):
        frechet_of_moments(moments, moments)
    with pytest.raises(InputError, match=r"\[B, 3\]"):
        moments.add(np.zeros((2, 4)))
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="NaN or infinity"):
            moments.add(np.array([[0.0, 1.0, 2.0], [bad, 1.0, 2.0]]))
    assert moments.n == 1  # nothing of a refused block was added
    other = _streamed(np.eye(4))
    with pytest.raises(InputError, match="3 and of 4"):
        moments.merge(other)
    moments.add(np.ones((1, 3)))
    with pytest.raises(InputError, match="3 and 4 dimensions"):
        frechet_of_moments(moments, other)


_MEASURE = """
import numpy as np
from fastambient.evaluation.frechet import Moments, frechet_of_moments
from fastambient.system import peak_resident

def stream(count, d, seed):
    moments, block = Moments(), np.random.default_rng(seed).standard_normal((500, d), np.float32)
    for i in range(count // 500):
        moments.add(block + i % 7)
    return moments

frechet_of_moments(stream(500, 64, 0), stream(500, 64, 1))  # the libraries' own buffers
before = peak_resident()
a, b = stream(50_000, 2048, 0), stream(2_500, 2048, 1)
streamed = peak_resident()
distance = frechet_of_moments(a, b)
print(a.n, before, streamed, peak_resident(), distance)
"""


@pytest.mark.slow
def test_fifty_thousand_need_no_more_memory_than_covariances():
    """The vectors alone are 410 MB in float32 and 819 MB in float64; a covariance is 34 MB."""
    out = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True).stdout.split()
    count, before, streamed, after = (int(word) for word in out[:4])
    covariance = 2048 * 2048 * 8
    assert count == 50_000 and float(out[4]) > 0
    assert streamed - before < 5 * covariance  # two of them, and blocks
    assert after - before < 10 * covariance
