"""Maximum cosine against brute force, its shares against planted ones, and its control."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from planted import textures

from fastambient.errors import InputError
from fastambient.evaluation import evaluate, similarity
from fastambient.evaluation.embedders import load_embedder
from fastambient.evaluation.similarity import most_similar


def _features(n: int, seed: int, d: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 2, size=(n, d)).astype(np.float32)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def test_is_the_largest_cosine_whatever_the_blocks(monkeypatch):
    samples, images = _features(37, 1), _features(61, 2)
    images[40] = images[11]  # equally similar: the first counts
    samples[5] = 3 * images[11]
    expected = _cosines(samples, images)
    for block in (7, 1000):
        monkeypatch.setattr(similarity, "_SAMPLE_BLOCK", block)
        monkeypatch.setattr(similarity, "_IMAGE_BLOCK", block)
        pairs: list[int] = []
        found = most_similar(samples, images, on_block=pairs.append)
        assert np.allclose(found.cosine, expected.max(1), atol=1e-6) and found.cosine.dtype == np.float32
        assert np.array_equal(found.index, expected.argmax(1)) and found.index[5] == 11
        assert not found.mirrored.any() and sum(pairs) == 37 * 61
    assert found.cosine.max() <= 1.0


def test_mirror_images_are_searched_and_named():
    images, mirrored = _features(20, 3), _features(20, 4)
    samples = np.concatenate([images[:5], mirrored[5:9]])
    found = most_similar(samples, images, mirrored)
    assert found.index.tolist() == list(range(9)) and found.mirrored.tolist() == [False] * 5 + [True] * 4
    assert not most_similar(samples, images, images).mirrored.any(), "its mirror image is no nearer"


def test_a_vector_of_zeros_is_like_nothing():
    found = most_similar(np.zeros((2, 3), np.float32), np.eye(3, dtype=np.float32))
    assert found.cosine.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((0, 3)), np.ones((2, 3))), "expected .N, D."),
        ((np.ones((2, 3)), np.ones((2, 4))), "one embedder"),
        ((np.ones((2, 3)), np.ones((2, 3)), np.ones((1, 3))), "a mirror image of each image"),
        ((np.full((2, 3), np.nan), np.ones((2, 3))), "NaN"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        most_similar(*arguments)


def test_faiss_gives_the_same_where_it_is_installed(monkeypatch):
    pytest.importorskip("faiss")
    samples, images = _features(30, 5), _features(500, 6)
    expected = most_similar(samples, images)
    monkeypatch.setattr(similarity, "FAISS_FROM", 100)
    found = most_similar(samples, images)
    assert np.array_equal(found.index, expected.index) and np.allclose(found.cosine, expected.cosine, atol=1e-6)


def test_many_images_are_given_to_faiss_block_by_block(monkeypatch):
    """Where faiss is not installed: what it is asked for, on a stand-in."""

    class IndexFlatIP:
        def __init__(self, d):
            self.rows = np.zeros((0, d), np.float32)

        def add(self, x):
            assert len(x) <= 64 and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
            self.rows = np.concatenate([self.rows, x])

        def search(self, x, k):
            products = x @ self.rows.T
            return products.max(1, keepdims=True), products.argmax(1)[:, None]

    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=IndexFlatIP))
    monkeypatch.setattr(similarity, "_IMAGE_BLOCK", 64)
    monkeypatch.setattr(similarity, "FAISS_FROM", 100)
    samples, images = _features(30, 5), _features(500, 6)
    pairs: list[int] = []
    found = most_similar(samples, images, on_block=pairs.append)
    assert np.array_equal(found.index, _cosines(samples, images).argmax(1)) and sum(pairs) == 30 * 500


def _measured(holdout: int | None, *, seed: int = 0, flips: bool = False):
    train, held = textures(40, 1, size=12), textures(90, 2, size=12)
    samples = textures(50, 3, size=12)
    samples[:10] = train[:10]
    samples[10:14] = held[:4]
    samples[14:20] = train[14:20, ..., ::-1]
    held = None if holdout is None else held[:holdout]
    options = {"embedder": load_embedder("pixel"), "bootstrap": 200, "seed": seed, "flips": flips, "settings": {}}
    return samples, train, held, evaluate(samples, train, held, **options)


def test_shares_their_intervals_and_the_excess_are_those_that_were_planted():
    samples, train, held, found = _measured(90)
    told = found.metrics["similarity"]
    assert told["above_0.95"] == 0.2 == told["above_0.9"]
    assert told["above_0.95_ci95"][0] < 0.2 < told["above_0.95_ci95"][1]
    assert {"embedder": "pixel", "preprocess": "pixels / 127.5 - 1", "dimensions": 432}.items() <= told.items()
    score = found.scores[1]
    assert (score.key, score.closer, score.threshold) == ("similarity", "high", 0.95) and "pixels" in score.label
    assert score.index[:10].tolist() == list(range(10)) and score.values.mean() == pytest.approx(told["mean"])
    # The control: as many held-out images as train, so that some of the four copies are not looked for.
    assert 0 < (share := told["holdout_above_0.95"]) <= 0.08 and told["control"]["images"] == 40
    assert share == (score.control > 0.95).mean() and told["excess_0.95"] == pytest.approx(0.2 - share)
    low, high = told["excess_0.95_ci95"]
    assert low < told["excess_0.95"] < high < told["above_0.95_ci95"][1] + 0.02
    flat = [x.reshape(len(x), -1) / 127.5 - 1 for x in (samples, held)]
    own = [_cosines(flat[0][i : i + 1], flat[1][j : j + 1])[0, 0] for i, j in enumerate(score.control_index)]
    assert np.allclose(own, score.control, atol=1e-5), "places in all held-out images"
    assert told["holdout_mean"] == pytest.approx(np.mean(own), abs=1e-5)


def test_flips_reach_the_similarity_of_both_sides():
    *_, found = _measured(90, flips=True)
    score = found.scores[1]
    assert found.metrics["similarity"]["above_0.95"] == pytest.approx(0.32)
    assert score.mirrored[14:20].all() and not score.mirrored[:10].any()
    samples, train, held, _ = _measured(90)
    swapped = evaluate(samples, held[:40], train, embedder=load_embedder("pixel"), flips=True, settings={})
    assert swapped.metrics["similarity"]["holdout_above_0.95"] == pytest.approx(0.32)


def test_fewer_held_out_images_are_compared_at_equal_counts():
    *_, found = _measured(20)
    told = found.metrics["similarity"]
    assert told["above_0.95"] == 0.2 and told["control"]["images"] == 20
    assert told["control"]["train_above_0.95"] < 0.2 and told["holdout_above_0.95"] == 0.08
    assert told["excess_0.95"] == pytest.approx(told["control"]["train_above_0.95"] - 0.08)
    assert told["control"]["train_mean"] < told["mean"]


def test_without_a_held_out_set_only_what_needs_none_is_given():
    *_, found = _measured(None)
    m = found.metrics
    assert m["similarity"]["above_0.95"] == 0.2 and m["memorization"]["gap_ratio"]["rate"] == 0.2
    assert [m["similarity"][k] for k in ("holdout_mean", "holdout_above_0.9", "excess_0.9", "excess_0.9_ci95")] == [
        None
    ] * 4
    assert m["memorization"]["gap_ratio"]["holdout_rate"] is None and m["memorization"]["control"]["images"] == 0
    assert m["frechet"]["pixel"]["value"] is None and m["quality"] == [] and m["fld"] is None and m["mifid"] is None
    assert m["counts"]["holdout"] == 0 and len(m["notes"]) == 1 and "no held-out set" in m["notes"][0]
    assert all(len(score.control) == len(score.control_index) == 0 for score in found.scores)
    assert found.holdout is None
