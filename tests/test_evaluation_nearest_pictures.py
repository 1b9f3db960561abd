"""Copies of training images that stand in the set twice, nearly: by planted ones, in known shares."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from planted import textures

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from near_duplicate_copies import by_jpeg, shots

from fastambient.data import near_duplicates as module
from fastambient.evaluation.memorization import nearest_two
from fastambient.evaluation.metrics import evaluate
from fastambient.evaluation.nearest_pictures import nearest_pictures
from fastambient.evaluation.report_figures import figures
from fastambient.evaluation.table import sentence
from fastambient.training.audits import AuditSets, measure


def noised(images: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    noise = sigma * 127.5 * np.random.default_rng(seed).normal(size=images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def sets():
    """30 pictures, of which the first ten stand in the set a second and the first four a third time, nearly."""
    pictures, fresh = textures(30, 1), textures(20, 2)
    train = np.concatenate([pictures, by_jpeg(pictures[:10], 80), by_jpeg(pictures[:4], 60)])
    # copies: of eight that have near-duplicates, of six that have none; then pictures that copy nothing
    samples = np.concatenate([noised(pictures[:8], 0.03, 3), noised(pictures[20:26], 0.03, 4), fresh[:10]])
    return train, fresh[10:], samples


@pytest.mark.parametrize("flips", [False, True])
def test_copies_of_what_stands_there_twice_are_found(sets, flips):
    train, _, samples = sets
    mirrored = samples[..., ::-1] if flips else samples
    plain, found = (search(mirrored, train, flips=flips) for search in (nearest_two, nearest_pictures))
    assert plain.copies().tolist() == [False] * 8 + [True] * 6 + [False] * 10
    assert found.copies().tolist() == [True] * 14 + [False] * 10
    assert (found.index[:, 0] == plain.index[:, 0]).all() and (found.distance[:, 0] == plain.distance[:, 0]).all()
    assert (found.passed[:8] == plain.distance[:8, 1]).all() and (found.distance[:8, 1] > 5 * found.passed[:8]).all()
    others = found.index[:8, 1]
    squared = np.square((mirrored[:8, None].astype(float) - train[None]) / 127.5).sum((2, 3, 4))
    if flips:
        squared = np.minimum(
            squared, np.square((mirrored[:8, None].astype(float) - train[None, ..., ::-1]) / 127.5).sum((2, 3, 4))
        )
    for k in range(8):  # by hand: the nearest that is not picture k in any of its versions; exactly that one
        versions = [k, 30 + k] + ([40 + k] if k < 4 else [])
        allowed = np.setdiff1d(np.arange(len(train)), versions)
        best = allowed[squared[k][allowed].argmin()]
        assert others[k] == best and found.distance[k, 1] == pytest.approx(squared[k][best] ** 0.5)


def test_the_order_of_the_set_and_exact_copies_change_nothing(sets):
    """Which of a group comes first decides what is left out of the second search."""
    train, _, samples = sets
    for order in (np.arange(len(train))[::-1], np.random.default_rng(5).permutation(len(train))):
        again = np.concatenate([train[order], train[order][:20]])
        assert nearest_pictures(samples, again).copies().tolist() == [True] * 14 + [False] * 10


def test_near_duplicates_of_near_duplicates_are_pictures_of_their_own(sets):
    """A film from one picture to another: each frame is alike to the next few, and the first one not to the last."""
    train, *_ = sets
    ends, count = train[[11, 12]].astype(float), 40
    film = np.rint([(1 - t) * ends[0] + t * ends[1] for t in np.linspace(0, 1, count)]).astype(np.uint8)
    k = np.arange(count)
    alike = np.zeros((count, count), bool)
    alike[tuple(module.near_duplicates_of(k, film))] = True
    by_pairs = [[bool(module.are_near_duplicates(film[[i]], film[[j]])[0]) for j in k] for i in k]
    assert alike.tolist() == by_pairs and alike[0, 1] and not alike[0, -1]
    found = nearest_pictures(noised(film[[0, 39]], 0.02, 7), np.concatenate([film, train[20:]]))
    for row, (own, other) in enumerate(found.index.tolist()):
        assert own == (0, 39)[row] and other < count and not alike[own, other]
        assert alike[own, other + (1 if own else -1)], "the next one that is no near-duplicate of the nearest"


def test_new_shots_of_known_scenes_are_seldom_copies():
    """Chains of near-duplicates made all of a scene's shots one picture: a third of the new ones were copies of it."""
    generator = np.random.default_rng(0)
    many, new = (shots(textures(20, 1), count, generator, light=5.0) for count in (16, 5))
    assert nearest_pictures(new, many).copies().mean() < 0.1


def test_one_sample_says_nothing_of_another(sets):
    train, _, samples = sets
    together = nearest_pictures(samples, train)
    for k in range(len(samples)):
        alone = nearest_pictures(samples[k : k + 1], train)
        assert (alone.index[0] == together.index[k]).all() and (alone.distance[0] == together.distance[k]).all()


def test_what_lies_between_twins_and_copies_neither_is_no_copy(sets):
    train, *_ = sets
    assert not nearest_pictures(noised(train[:8], 0.9, 6), train).copies().any()


def test_a_set_of_one_picture_alone_stays_as_it_is(sets):
    """Where there is no other picture, the near-duplicate is the second nearest."""
    train, _, samples = sets
    group = train[[0, 30, 40]]
    found, plain = nearest_pictures(samples[:1], group), nearest_two(samples[:1], group)
    assert (found.index == plain.index).all() and np.isnan(found.passed).all() and not found.copies().any()


def test_the_rates_and_the_note(sets):
    train, holdout, samples = sets
    told = evaluate(samples, train, holdout, settings={}).metrics
    memorization = told["memorization"]
    assert memorization["gap_ratio"]["copies"] == 14 and memorization["gap_ratio"]["holdout_rate"] == 0
    assert memorization["near_duplicates"] == {"copies": 8, "rate_without": pytest.approx(6 / 24)}
    (note,) = [note for note in told["notes"] if "near-duplicate" in note]
    assert note.startswith("8 of the copies are near to training images that")
    assert "the copy rate would be 25.0 %" in note and "58.3 % of samples are copies" in sentence(told)
    assert "; 25.0 % if near-duplicates among these counted as different pictures); of held-out" in sentence(told)
    rows = {figure.name: figure.value for figure in figures(told)}
    assert rows["Copy rate, near-duplicates apart"] == "25.0\N{NO-BREAK SPACE}%"
    single = evaluate(samples, train[:30], settings={}).metrics
    assert "apart" not in " ".join(figure.name for figure in figures(single)) and "different" not in sentence(single)
    assert single["memorization"]["near_duplicates"] is None and not any("near-dup" in n for n in single["notes"])


def test_the_control_and_the_audits_of_a_run_count_alike(sets):
    """A stop rule that is blind to what stands in the set twice would not stop what is copied first."""
    train, _, samples = sets
    other = evaluate(samples, textures(50, 9), train, settings={}).metrics["memorization"]["gap_ratio"]
    assert other["copies"] == 0 and other["holdout_rate"] == pytest.approx(14 / 24)
    audited = AuditSets.of(train, textures(50, 9), flips=False, seed=0)
    told = measure(samples, audited, threshold=1 / 3, bootstrap=10, seed=0, flips=False)
    assert told["copies"] == 14 and told["holdout_rate"] == 0


def test_hashes_are_made_of_pairs_that_may_be_twins_alone(sets, monkeypatch):
    """They cost more than the search itself: not all of a set, nor all that are near to some sample."""
    train, _, samples = sets
    hashed = []
    original = module.perceptual_hash
    monkeypatch.setattr(module, "perceptual_hash", lambda image: hashed.append(1) or original(image))
    assert nearest_pictures(samples, train).copies().sum() == 14
    once = len(hashed)
    assert once <= 2 * 8 + 22, "the two nearest of each copy, and all that are alike to these"
    nearest_pictures(np.concatenate([samples] * 3), train)
    assert len(hashed) == 2 * once
    small = nearest_pictures(samples[..., :28, :28], train[..., :28, :28])
    assert small.passed is None and small.copies().sum() == 6, "too small for the hash"
