"""metrics.json: its keys are a contract; its numbers are known on planted sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_run
from sklearn.datasets import load_digits

from fastambient.errors import InputError
from fastambient.evaluation import evaluate, frechet_distance
from fastambient.evaluation.memorization import bootstrap_interval, copies_per_image, nearest_two
from fastambient.evaluation.run import evaluate_run
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.run import RunFolder


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    images = (load_digits().images / 16 * 255).round().astype(np.uint8)[:, None]
    return np.random.default_rng(0).permutation(images)


def _noise_set(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 254, (n, 1, 8, 8), np.uint8)


def _planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, holdout, samples = _noise_set(50, 1), _noise_set(80, 2), _noise_set(100, 3)
    samples[:30] = train[:30] + 1
    return samples, train, holdout


def test_keys_are_those_of_the_contract():
    metrics = evaluate(*_planted(), settings={"steps": 18}).metrics
    assert set(metrics) == {
        "counts", "frechet", "memorization", "copies_per_train_image", "similarity", "quality", "mifid", "fld",
        "denoising_gap", "notes", "settings",
    }  # fmt: skip
    assert [metrics[key] for key in ("similarity", "quality", "mifid", "fld", "denoising_gap", "notes")] == [
        None, [], None, None, None, [],
    ]  # fmt: skip
    assert {"train", "holdout", "samples"} <= set(metrics["counts"])
    assert {"value", "reference", "train_vs_reference", "equal_counts", "dimensions"} == set(
        metrics["frechet"]["pixel"]
    )
    assert {"gap_ratio", "nearest_distance"} <= set(metrics["memorization"])
    assert {"threshold", "rate", "ci95", "holdout_rate"} <= set(metrics["memorization"]["gap_ratio"])
    assert {"median", "holdout_median"} <= set(metrics["memorization"]["nearest_distance"])
    assert metrics["settings"]["steps"] == 18
    assert metrics["settings"]["protocol"] == {
        "space": "pixels in [-1, 1]", "flips": False, "bootstrap": 1000, "seed": 0,
    }  # fmt: skip


def test_planted_copies_give_exactly_thirty_percent_and_the_control_none():
    samples, train, holdout = _planted()
    found = evaluate(samples, torch.from_numpy(train), holdout, settings={})
    metrics, (score,) = found.metrics, found.scores
    neighbours = nearest_two(samples, train)
    gap = metrics["memorization"]["gap_ratio"]
    assert gap["rate"] == 0.30 and gap["copies"] == 30 and gap["holdout_rate"] == 0.0
    assert gap["ci95"][0] < 0.30 < gap["ci95"][1] and gap["ci95"][1] - gap["ci95"][0] < 0.25
    assert metrics["counts"] == {
        "train": 50, "holdout": 80, "samples": 100, "train_distinct": 50, "holdout_distinct": 80,
    }  # fmt: skip
    copied = metrics["memorization"]["copies_per_train_image"]
    assert copied["images_copied"] == 30 and copied["histogram"] == {"1": 30}
    assert copied["top"][0] == {"train_index": 0, "copies": 1} and len(copied["top"]) == 10
    assert metrics["copies_per_train_image"] == copied
    assert score.index[:30].tolist() == list(range(30)) and (score.values < score.threshold).sum() == 30
    assert np.array_equal(score.values, neighbours.ratio) and (score.key, score.closer) == ("gap_ratio", "low")
    control = nearest_two(samples, holdout[np.unique(score.control_index)])
    low, high = metrics["memorization"]["control"]["excess_ci95"]
    assert 0.2 < low < 0.3 < high < 0.4
    nearest = metrics["memorization"]["nearest_distance"]
    assert nearest["median"] == np.median(neighbours.distance[:, 0]) and nearest["holdout_median"] > nearest["median"]
    away = (samples.astype(float) - holdout[score.control_index]).reshape(100, -1)
    away = np.linalg.norm(away, axis=1) / 127.5
    assert np.allclose(away, control.distance[:, 0]), "places in all held-out images"
    assert nearest["holdout_median"] == pytest.approx(np.median(away))


def test_frechet_is_in_pixels_against_all_held_out_images():
    samples, train, holdout = _planted()
    pixel = evaluate(samples, train, holdout, settings={}).metrics["frechet"]["pixel"]
    flat = [images.reshape(len(images), -1) / 127.5 for images in (samples, train, holdout)]
    assert pixel["value"] == pytest.approx(frechet_distance(flat[0], flat[2]))
    assert pixel["train_vs_reference"] == pytest.approx(frechet_distance(flat[1], flat[2]))
    assert pixel["reference"] == "holdout (80 images)"


def test_control_searches_as_many_images_as_the_training_side(digits):
    """Held-out digits sampled against a control of 1,600 images would look nearer than against 100."""
    train, holdout, samples = digits[:100], digits[100:1700], digits[1700:]
    metrics = evaluate(samples, train, holdout, settings={}).metrics
    nearest, control = metrics["memorization"]["nearest_distance"], metrics["memorization"]["control"]
    assert control["images"] == 100 and control["train_rate"] == metrics["memorization"]["gap_ratio"]["rate"]
    assert control["excess_ci95"][0] < 0 < control["excess_ci95"][1], "nothing was copied"
    assert nearest["holdout_median"] == pytest.approx(nearest["median"], rel=0.1)
    everything = evaluate(samples, holdout, train, settings={}).metrics
    assert everything["memorization"]["nearest_distance"]["median"] < 0.9 * nearest["holdout_median"]
    # Now fewer are held out than trained: the control has the smaller count on both sides.
    control = everything["memorization"]["control"]
    assert control["images"] == 100
    assert control["train_median"] == pytest.approx(nearest["holdout_median"], rel=0.1)


def test_duplicates_count_once_on_both_sides():
    samples, train, holdout = _planted()
    metrics = evaluate(samples, np.concatenate([train, train[:20]]), holdout.repeat(2, axis=0), settings={}).metrics
    assert metrics["counts"] == {
        "train": 70, "holdout": 160, "samples": 100, "train_distinct": 50, "holdout_distinct": 80,
    }  # fmt: skip
    assert metrics["memorization"]["control"]["images"] == 50
    assert metrics["memorization"]["gap_ratio"]["rate"] == 0.30
    assert metrics["counts"]["train"] == 70 and metrics["counts"]["train_distinct"] == 50
    assert metrics["counts"]["holdout_distinct"] == 80 and metrics["memorization"]["control"]["images"] == 50


def test_is_deterministic_and_json(digits):
    samples, train, holdout = digits[:150], digits[100:300], digits[300:900]
    settings = {
        "sigma_tn": float("inf"), "path": Path("a/b"), "seeds": np.arange(3), "lr": np.float32(0.5), "tuple": (1, 2),
    }  # fmt: skip
    one, two = (evaluate(samples, train, holdout, settings=settings).metrics for _ in range(2))
    assert json.dumps(one, allow_nan=False) == json.dumps(two, allow_nan=False)
    assert json.loads(json.dumps(one)) == one
    assert one["settings"]["sigma_tn"] == "inf" and one["settings"]["path"] == "a/b"
    assert one["settings"]["seeds"] == [0, 1, 2] and one["settings"]["lr"] == 0.5
    other = evaluate(samples, train, holdout, seed=5, settings=settings).metrics
    assert one["memorization"]["gap_ratio"]["rate"] == other["memorization"]["gap_ratio"]["rate"]
    assert one["memorization"]["nearest_distance"] != other["memorization"]["nearest_distance"]


def test_flips_reach_both_searches():
    samples, train, holdout = _planted()
    mirrored = np.ascontiguousarray(samples[..., ::-1])
    assert evaluate(mirrored, train, holdout, settings={}).metrics["memorization"]["gap_ratio"]["rate"] == 0.0
    assert (
        evaluate(mirrored, train, holdout, flips=True, settings={}).metrics["memorization"]["gap_ratio"]["rate"] == 0.30
    )
    # the control searches mirror images just the same: all 50 of these are held out
    control = evaluate(mirrored, holdout, train, flips=True, settings={}).metrics["memorization"]["gap_ratio"]
    assert control["rate"] == 0.0 and control["holdout_rate"] == 0.30
    fewer = evaluate(mirrored, train, holdout[:40], flips=True, settings={}).metrics["memorization"]["control"]
    assert fewer["train_rate"] > 0.10, "and so does the training side at the control's count"


def test_the_training_side_is_also_searched_at_the_controls_count():
    """20 of 50 training images: copies of the other 30 are not found there."""
    samples, train, holdout = _planted()
    memorization = evaluate(samples, train, holdout[:20], settings={}).metrics["memorization"]
    assert memorization["control"]["images"] == 20 and memorization["gap_ratio"]["rate"] == 0.30
    assert 0.03 <= memorization["control"]["train_rate"] <= 0.20
    low, high = memorization["control"]["excess_ci95"]
    assert 0.20 < low < 0.30 - memorization["gap_ratio"]["holdout_rate"] < high, "but the excess has all copies in it"


def test_the_smaller_side_is_drawn_from_all_images():
    """Sets may be sorted by class: the first 20 of 50 training images are not copied here, the others are."""
    samples, train, holdout = _planted()
    memorization = evaluate(samples, train[::-1], holdout[:20], settings={}).metrics["memorization"]
    assert memorization["control"]["train_rate"] > 0.05
    control = evaluate(samples, holdout[:20], train[::-1], settings={}).metrics["memorization"]["gap_ratio"]
    assert control["holdout_rate"] > 0.05


def test_a_threshold_of_one_is_allowed():
    assert evaluate(*_planted(), threshold=1.0, settings={}).metrics["memorization"]["gap_ratio"]["rate"] == 1.0


def test_every_parameter_reaches_every_figure():
    samples, train, holdout = _planted()
    metrics = evaluate(samples, train, holdout[:20], threshold=0.97, bootstrap=50, seed=7, settings={}).metrics
    neighbours, control = nearest_two(samples, train), nearest_two(samples, holdout[:20])
    m, copies = metrics["memorization"], neighbours.copies(0.97)
    assert 30 < copies.sum() < 100
    assert m["gap_ratio"] == {
        "threshold": 0.97,
        "copies": copies.sum(),
        "rate": copies.mean(),
        "ci95": list(bootstrap_interval(copies, resamples=50, seed=7)),
        "holdout_rate": control.copies(0.97).mean(),
        "holdout_ci95": list(bootstrap_interval(control.copies(0.97), resamples=50, seed=7)),
    }
    assert m["gap_ratio"]["holdout_rate"] > 0.1
    for other in ({"resamples": 50, "seed": 0}, {"seed": 7}):
        assert m["gap_ratio"]["ci95"] != list(bootstrap_interval(copies, **other))
    assert m["control"]["train_rate"] > 0.4, "of pictures of their own, too, some lie below 0.97"
    copied = m["copies_per_train_image"]
    assert copied["images_copied"] == len(copies_per_image(neighbours, 0.97))
    assert sum(int(times) * images for times, images in copied["histogram"].items()) == copies.sum()
    assert metrics["settings"]["protocol"] == {
        "space": "pixels in [-1, 1]", "flips": False, "bootstrap": 50, "seed": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, h: ((s[:1], t, h), {}), "1 samples, expected at least 2"),
        (lambda s, t, h: ((s, t[:1], h), {}), "1 training images"),
        (lambda s, t, h: ((s, t, h[:0]), {}), "0 held-out images"),
        (lambda s, t, h: ((s[..., :7], t, h), {}), r"samples of \[1, 8, 7\]"),
        (lambda s, t, h: ((s, t, h[:, :, :4]), {}), "held-out images of"),
        (lambda s, t, h: ((s.astype(float), t, h), {}), "samples is float64"),
        (lambda s, t, h: ((s, t, np.concatenate([h, t[:3]])), {}), "3 held-out images are training images"),
        (
            lambda s, t, h: ((s, t, np.concatenate([h, t[:3, ..., ::-1]])), {"flips": True}),
            "3 held-out images are the mirror images of",
        ),
        (lambda s, t, h: ((s, t, h), {"threshold": 0.0}), "threshold"),
        (lambda s, t, h: ((s, t, h), {"threshold": float("nan")}), "threshold"),
        (lambda s, t, h: ((s, t, h), {"bootstrap": 0}), "bootstrap"),
    ],
)
def test_bad_input(change, message):
    images, options = change(*_planted())
    with pytest.raises(InputError, match=message):
        evaluate(*images, settings={}, **options)


def test_an_unfinished_run_says_how_far_it_is(tmp_path, capsys):
    """Models copy more the longer they train: the planned length would be the wrong figure."""
    path = make_run(tmp_path / "run", "training.kimg=0.16", "noise.sigma_tn=0.2")
    trainer = Trainer(RunFolder(path), World())
    trainer.total_nimg = 80
    trainer.train()
    settings = evaluate_run(path, num=4).metrics["settings"]
    assert settings["kimg"] == 0.08 and settings["kimg_planned"] == 0.16
    assert "not finished: 0.08 of 0.16 kimg" in " ".join(capsys.readouterr().err.split())
