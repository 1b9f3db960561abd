"""Nearest neighbours against brute force in integers, and the copy rate on sets where the answer is planted."""

from __future__ import annotations

import numpy as np
import pytest
from planted import textures
from scipy.stats import binom

from fastambient.errors import InputError
from fastambient.evaluation import memorization, nearest
from fastambient.evaluation.memorization import (
    bootstrap_interval,
    copies_per_image,
    distinct,
    excess_interval,
    nearest_two,
)


def _random(n: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def _brute_force(samples: np.ndarray, images: np.ndarray) -> np.ndarray:
    difference = samples[:, None].astype(np.int64) - images[None]
    return np.square(difference).reshape(len(samples), len(images), -1).sum(-1)


def _nudged(images: np.ndarray, seed: int = 1) -> np.ndarray:
    """Near-copies: every pixel moved by at most one level."""
    step = np.random.default_rng(seed).integers(-1, 2, images.shape)
    return np.clip(images.astype(np.int64) + step, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 20)])
def test_distances_are_exact_and_blocks_do_not_matter(monkeypatch, shape):
    images, samples = _random(50, shape, 1), _random(31, shape, 2)
    samples[:10] = _nudged(images[20:30])
    squared = _brute_force(samples, images)
    order = np.argsort(squared, axis=1, kind="stable")[:, :2]
    found = []
    for block in (7, 1000):
        monkeypatch.setattr(memorization, "_SAMPLE_BLOCK", block)
        monkeypatch.setattr(memorization, "_IMAGE_BLOCK", block)
        found.append(nearest_two(samples, images))
    for result in found:
        assert np.array_equal(result.index, order)
        assert np.array_equal(result.distance, np.sqrt(np.take_along_axis(squared, order, 1)) / 127.5)
        assert not result.flipped.any()


def test_extreme_pixels_stay_exact_where_float32_sums_would_not():
    """Dark pictures give the largest products: sums of 2e8, of which float32 keeps multiples of 16."""
    dark = np.random.default_rng(3).integers(0, 2, (30, 3, 64, 64), np.uint8)
    result = nearest_two(dark[:10], dark[10:])
    squared = np.sort(_brute_force(dark[:10], dark[10:]), axis=1)[:, :2]
    assert np.array_equal(result.distance, np.sqrt(squared) / 127.5)


def test_distance_unit_is_l2_over_pixels_in_minus_one_to_one():
    images = np.stack([np.zeros((1, 2, 2), np.uint8), np.full((1, 2, 2), 255, np.uint8)])
    assert nearest_two(images[:1], images).distance[0].tolist() == [0.0, 4.0]  # sqrt(4 pixels * 2^2)


def test_ties_go_to_the_earlier_image(monkeypatch):
    monkeypatch.setattr(memorization, "_IMAGE_BLOCK", 2)
    images = np.full((5, 1, 1, 2), 100, np.uint8)
    images[:, 0, 0, 0] = [200, 102, 98, 102, 98]
    images[3:, 0, 0, 1] = 101
    assert nearest_two(np.full((1, 1, 1, 2), 100, np.uint8), images).index[0].tolist() == [1, 2]


def test_planted_copies_are_counted_exactly():
    train = _random(60, seed=3)
    samples = _random(100, seed=4)
    samples[:30] = _nudged(train[np.arange(30) % 12])
    found = nearest_two(samples, train)
    assert found.copies().tolist() == [True] * 30 + [False] * 70
    assert copies_per_image(found) == {**dict.fromkeys(range(6), 3), **dict.fromkeys(range(6, 12), 2)}
    assert list(copies_per_image(found)) == list(range(12))
    assert sum(copies_per_image(found, 0.95).values()) == found.copies(0.95).sum() > 40
    assert nearest_two(samples, _random(60, seed=5)).copies().sum() == 0


def test_threshold_is_strict_and_uses_distances_not_squares():
    images = np.zeros((2, 1, 1, 1), np.uint8)
    images[1] = 40
    samples = np.array([9, 10, 11], np.uint8).reshape(3, 1, 1, 1)  # ratios 9/31, 10/30, 11/29
    assert nearest_two(samples, images).copies().tolist() == [True, False, False]


def test_duplicates_in_the_training_set_do_not_hide_copies():
    train = _random(20, seed=6)
    repeated = np.concatenate([train, train[:5], train[:5]])
    samples = _nudged(train[:10])
    found = nearest_two(samples, repeated)
    assert found.copies().all() and found.index[:, 0].tolist() == list(range(10))
    assert distinct(repeated).tolist() == list(range(20))


def test_flips_find_mirrored_copies_and_a_mirror_is_no_second_image():
    train = _random(20, seed=7)
    train[0, :, :, 4:] = train[0, :, :, 3::-1]  # nearly its own mirror image
    train[0, 0, 0, 0] ^= 1
    train[19] = train[4, ..., ::-1]  # the same picture under flips
    samples = np.concatenate([_nudged(train[:4]), _nudged(train[4:8, ..., ::-1])])
    plain, flips = nearest_two(samples, train), nearest_two(samples, train, flips=True)
    assert plain.copies().tolist() == [True] * 5 + [False] * 3
    assert flips.copies().all()
    assert flips.index[:, 0].tolist() == list(range(8))
    assert flips.flipped[1:].tolist() == [False] * 3 + [True] * 4
    assert distinct(train, flips=True).tolist() == list(range(19))
    symmetric = np.concatenate([train, train[..., ::-1]], axis=3)
    assert not nearest_two(_nudged(symmetric), symmetric, flips=True).flipped.any(), "its mirror image is no nearer"


def test_bootstrap_interval_is_deterministic_and_close_to_the_binomial_one():
    hits = np.zeros(400, bool)
    hits[:100] = True
    low, high = bootstrap_interval(hits, resamples=20_000, seed=1)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.004) and high == pytest.approx(0.25 + half, abs=0.004)
    assert bootstrap_interval(hits, seed=1) == bootstrap_interval(hits, seed=1)
    assert bootstrap_interval(hits, resamples=50, seed=1) != bootstrap_interval(hits, resamples=50, seed=2)
    # No hit in 10 is no certainty: 1 - 0.025^(1/10) (Clopper and Pearson).
    assert bootstrap_interval(np.zeros(10, bool)) == pytest.approx((0, 1 - 0.025**0.1))
    assert bootstrap_interval(np.ones(10, bool)) == pytest.approx((0.025**0.1, 1))


@pytest.mark.parametrize("n", [20, 100, 300])
def test_the_interval_covers_the_true_rate_whatever_it_is(n):
    """By the binomial distribution of the hits itself, at rates from one in 500 to one half. A rate near 0 or 1 is
    covered more often than 95 %: some number of hits is so likely that no interval can leave it out."""
    ends = np.array([bootstrap_interval(np.arange(n) < hits, seed=hits) for hits in range(n + 1)])
    for rate in np.linspace(0.002, 0.5, 250):
        inside = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
        covered = binom.pmf(np.arange(n + 1), n, rate)[inside].sum()
        assert 0.9 <= covered <= (1 if rate * n < 20 else 0.98), (rate, covered)


def test_one_copy_is_no_less_alarming_than_none():
    ends = np.array([bootstrap_interval(np.arange(100) < hits) for hits in range(10)])
    assert (np.diff(ends, axis=0) >= 0).all() and (np.diff(ends[:, 1]) > 0).all()


@pytest.mark.parametrize(("up", "down"), [(0.0, 0.0), (0.002, 0.0), (0.02, 0.02), (0.1, 0.01), (0.3, 0.0), (0.97, 0.0)])
def test_the_interval_of_an_excess_covers_it(up, down):
    generator, n, inside = np.random.default_rng(4), 200, 0
    for seed in range(300):
        kind = generator.choice(4, n, p=[up, down, (1 - up - down) / 4, 3 * (1 - up - down) / 4])
        low, high = excess_interval(np.isin(kind, (0, 2)), np.isin(kind, (1, 2)), seed=seed)
        assert -1 <= low < high <= 1
        inside += low <= up - down <= high
    assert inside / 300 >= 0.9


def test_the_interval_of_an_excess_follows_its_seed_and_knows_pairs():
    hits = np.arange(400) < 100
    control = hits & (np.arange(400) >= 60)  # the control's hits are hits of both: 60 are the training set's alone
    low, high = excess_interval(hits, control, resamples=20_000)
    half = 1.96 * np.sqrt(0.15 * 0.85 / 400)
    assert (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=0.004)
    assert excess_interval(hits, control, seed=1) == excess_interval(hits, control, seed=1)
    assert excess_interval(hits, control, resamples=50, seed=1) != excess_interval(hits, control, resamples=50, seed=2)
    # No sample is a hit of one side alone: both shares are at most 1 - 0.0125^(1/400) off.
    assert excess_interval(hits, hits) == pytest.approx((-(1 - 0.0125 ** (1 / 400)), 1 - 0.0125 ** (1 / 400)))


def test_bad_input():
    images = _random(5)
    with pytest.raises(InputError, match="equal sizes"):
        nearest_two(_random(3, (1, 8, 9)), images)
    with pytest.raises(InputError, match="1 distinct"):
        nearest_two(images, np.repeat(images[:1], 4, axis=0))
    with pytest.raises(InputError, match="0 samples"):
        nearest_two(images[:0], images)
    with pytest.raises(InputError, match="float64"):
        nearest_two(images / 255, images)


@pytest.fixture
def directions(monkeypatch):
    """Bounds from principal directions for small sets, too."""
    monkeypatch.setattr(nearest, "_WORTH", 0)
    monkeypatch.setattr(nearest, "_FIT_IMAGES", 64)
    monkeypatch.setattr(nearest, "DIRECTIONS", 16)


@pytest.mark.parametrize("kind", ["textures", "noise", "one grey level", "two heaps", "black and white"])
@pytest.mark.parametrize("flips", [False, True])
def test_bounds_from_directions_lose_no_neighbour(directions, kind, flips):
    """Pictures of few directions, of none, and where rounding would show the most."""
    g = np.random.default_rng(5)
    images = {
        "textures": lambda: textures(300, 1, size=16),
        "noise": lambda: _random(300, (3, 16, 16), 1),
        "one grey level": lambda: 200 + g.integers(0, 2, (300, 3, 16, 16), np.uint8),
        "two heaps": lambda: (
            np.where(np.arange(300) % 2, 3, 250).astype(np.uint8)[:, None, None, None]
            + g.integers(0, 4, (300, 3, 16, 16), np.uint8)
        ),
        "black and white": lambda: 255 * g.integers(0, 2, (300, 3, 16, 16), np.uint8),
    }[kind]()
    images, samples = images[:240], images[240:].copy()
    samples[:20] = _nudged(images[100:120])
    samples[20:25] = images[100:105]
    squared = _brute_force(samples, images)
    if flips:
        squared = np.minimum(squared, _brute_force(samples, images[..., ::-1]))
    found = nearest_two(samples, images, flips=flips)
    assert np.array_equal(found.index, np.argsort(squared, axis=1, kind="stable")[:, :2])
    assert np.array_equal(found.distance, np.sqrt(np.sort(squared, axis=1)[:, :2]) / 127.5)


def test_directions_leave_few_pairs_to_compare(directions, monkeypatch):
    compared = []
    compare = nearest._Best.compare
    monkeypatch.setattr(nearest._Best, "compare", lambda self, i, j: (compared.append(len(i)), compare(self, i, j)))
    monkeypatch.setattr(memorization, "_IMAGE_BLOCK", 100)
    images = textures(1000, 1, size=16)
    nearest_two(images[900:], images[:900])
    assert sum(compared) < 0.04 * 900 * 100


def test_distances_of_pairs_are_exact_at_their_largest():
    a, b = np.zeros((1, 12_288), np.uint8), np.full((1, 12_288), 255, np.uint8)
    assert nearest.squared_distances(a, b).tolist() == [12_288 * 255**2]
