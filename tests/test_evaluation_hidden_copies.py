"""Copies of training images that stand in the set twice, nearly: by planted ones, in known shares."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from planted import textures

from fastambient.evaluation import hidden_copies as module
from fastambient.evaluation.hidden_copies import Searched, hidden_copies
from fastambient.evaluation.memorization import nearest_two
from fastambient.evaluation.metrics import evaluate


def encoded(images: np.ndarray, quality: int) -> np.ndarray:
    """The same pictures by way of JPEG."""
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    return np.stack(out)


def noised(images: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    noise = sigma * 127.5 * np.random.default_rng(seed).normal(size=images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def sets():
    """30 pictures, of which the first ten stand in the set a second and the first four a third time, nearly."""
    pictures, fresh = textures(30, 1), textures(20, 2)
    train = np.concatenate([pictures, encoded(pictures[:10], 80), encoded(pictures[:4], 60)])
    # copies: of eight that have near-duplicates, of six that have none; then pictures that copy nothing
    samples = np.concatenate([noised(pictures[:8], 0.03, 3), noised(pictures[20:26], 0.03, 4), fresh[:10]])
    return train, fresh[10:], samples


def hidden(samples: np.ndarray, images: np.ndarray) -> np.ndarray:
    return hidden_copies(samples, Searched(images, nearest_two(samples, images)))


@pytest.mark.parametrize("flips", [False, True])
def test_copies_of_what_stands_there_twice_are_found(sets, flips):
    train, _, samples = sets
    mirrored = samples[..., ::-1] if flips else samples
    neighbours = nearest_two(mirrored, train, flips=flips)
    assert neighbours.copies().tolist() == [False] * 8 + [True] * 6 + [False] * 10, "what the measure itself counts"
    found = hidden_copies(mirrored, Searched(train, neighbours), flips=flips)
    assert found.tolist() == [True] * 8 + [False] * 16


def test_the_order_of_the_set_and_exact_copies_change_nothing(sets):
    """Which of a group comes first decides what is left out of the second search."""
    train, _, samples = sets
    for order in (np.arange(len(train))[::-1], np.random.default_rng(5).permutation(len(train))):
        again = np.concatenate([train[order], train[order][:20]])
        assert hidden(samples, again).tolist() == [True] * 8 + [False] * 16


def test_what_lies_between_twins_and_copies_neither_is_no_copy(sets):
    """A near-duplicate's distance to itself is no measure: as far from both as from others is chance."""
    train, *_ = sets
    far = noised(train[:8], 0.9, 6)
    assert not hidden(far, train).any()


def test_a_control_is_searched_among_its_own_images_alone(sets):
    """What was not chosen to be searched is no second nearest, and no near-duplicate, either."""
    train, _, samples = sets
    among = np.setdiff1d(np.arange(len(train)), [30, 40])  # the near-duplicates of picture 0
    near = nearest_two(samples, train[among])
    near = dataclasses.replace(near, index=among[near.index])
    assert near.copies()[0] and not near.copies()[1]
    assert hidden_copies(samples, Searched(train, near, among)).tolist() == [False] + [True] * 7 + [False] * 16


def test_the_rates_and_the_note(sets):
    train, holdout, samples = sets
    told = evaluate(samples, train, holdout, settings={}).metrics
    memorization = told["memorization"]
    assert memorization["gap_ratio"]["rate"] == pytest.approx(6 / 24), "the measure stays what it is"
    assert memorization["near_duplicates"] == {
        "hidden_copies": 8, "rate": pytest.approx(14 / 24), "holdout_rate": 0.0,
    }  # fmt: skip
    (note,) = [note for note in told["notes"] if "near-duplicate" in note]
    assert (
        note.startswith("8 more samples copy") and "58.3 % of the samples are copies (held-out control 0.0 %)" in note
    )
    single = evaluate(samples, train[:30], settings={}).metrics
    assert single["memorization"]["near_duplicates"] is None and not any("near-dup" in n for n in single["notes"])


def test_hashes_are_made_of_pairs_that_may_be_twins_alone(sets, monkeypatch):
    """A picture takes a third of a millisecond: not all of a set, nor all that are near to some sample."""
    train, _, samples = sets
    hashed = []
    original = module.perceptual_hash
    monkeypatch.setattr(module, "perceptual_hash", lambda image: hashed.append(1) or original(image))
    assert hidden(samples, train).sum() == 8 and 16 <= len(hashed) <= 24
    assert not hidden(samples[..., :28, :28], train[..., :28, :28]).any(), "too small for the hash"
