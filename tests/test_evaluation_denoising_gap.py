"""The gap of a denoiser that knows its training set, and of ones that cannot."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import InputError
from fastambient.evaluation import denoising_gap as module
from fastambient.evaluation.denoising_gap import default_sigmas, denoising_gap
from fastambient_kernels import Stream, normal

_SHAPE = (3, 8, 8)


def _images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *_SHAPE), dtype=np.uint8)


_TRAIN, _HOLDOUT = _images(40, 1), _images(60, 2)


def _floats(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float() / 127.5 - 1


def _ideal(images: np.ndarray):
    """The optimal denoiser of an empirical distribution (Karras et al., 2022, Eq. 57): the softmax mean of the set."""
    y = _floats(images).flatten(1)

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        weights = (-torch.cdist(x.flatten(1), y).square() / (2 * sigma[:, None] ** 2)).softmax(1)
        return (weights @ y).view_as(x)

    return D


def _wiener(x: Tensor, sigma: Tensor) -> Tensor:
    """The best linear denoiser of white pictures: it knows no image."""
    variance = 1 / 3
    return x * (variance / (variance + sigma**2)).view(-1, 1, 1, 1)


def test_a_denoiser_that_knows_the_training_set_has_a_large_gap():
    rows = denoising_gap(_ideal(_TRAIN), _TRAIN, _HOLDOUT, sigmas=[0.3, 2.0, 5.0, 1000.0])
    # It returns the training image itself to the last bit, and of a held-out one another picture: about twice the
    # variance of 1/3 off, less because it takes the nearest.
    assert rows[0]["train"] < 1e-12 and 0.5 < rows[0]["holdout"] < 2 / 3
    assert rows[0]["gap"] is None
    assert rows[1]["gap"] > 10
    assert 1.2 < rows[2]["gap"] < rows[1]["gap"]
    # At much noise it returns the mean of the set.
    assert rows[3]["gap"] == pytest.approx(1, abs=0.1) and rows[3]["train"] == pytest.approx(1 / 3, rel=0.1)


def test_a_denoiser_that_ignores_the_set_has_none():
    for row in denoising_gap(_wiener, _TRAIN, _HOLDOUT, sigmas=default_sigmas(1 / 3**0.5)):
        assert row["gap"] == pytest.approx(1, abs=0.05)
        expected = (1 / 3) * row["sigma"] ** 2 / (1 / 3 + row["sigma"] ** 2)
        assert row["train"] == pytest.approx(expected, rel=0.1)


def test_the_sides_exchanged_invert_the_gap():
    (row,) = denoising_gap(_ideal(_HOLDOUT[:40]), _TRAIN, _HOLDOUT[:40], sigmas=[1.0])
    assert row["gap"] < 0.01


def test_both_sides_get_the_same_noise_of_the_seed_and_equally_many_images():
    """The identity's error is the noise's own: equal to the last digit on both sides, sigma^2 on average."""
    calls = []

    def identity(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    rows = denoising_gap(identity, _TRAIN, _HOLDOUT, sigmas=[0.1, 1.0], seed=5, draws=3, batch=16)
    noise = normal(torch.arange(120), 192, seed=5, stream=Stream.FRESH).double().square().mean().item()
    for row in rows:
        assert row["train"] == pytest.approx(row["sigma"] ** 2 * noise, rel=1e-4)
        assert row["gap"] == pytest.approx(1, abs=1e-4)
    assert sum(calls) == 2 * 2 * 3 * 40 and max(calls) == 16
    seen: list[int] = []
    denoising_gap(identity, _TRAIN, _HOLDOUT, sigmas=[1.0], most=8, on_batch=seen.append)
    assert sum(seen) == 2 * 8
    other = denoising_gap(identity, _TRAIN, _HOLDOUT, sigmas=[1.0], seed=6, draws=3)
    assert other[0]["train"] != rows[1]["train"]


def test_the_batch_size_changes_nothing():
    rows = [denoising_gap(_ideal(_TRAIN), _TRAIN, _HOLDOUT, sigmas=[2.0], batch=batch)[0] for batch in (7, 64)]
    assert list(rows[0].values()) == [pytest.approx(value, rel=1e-5) for value in rows[1].values()]


def test_the_interval_of_the_gap_is_that_of_its_images():
    """Errors of images that are known: the ratio of means by bootstrap has about the interval that is told."""
    generator = np.random.default_rng(0)
    errors = generator.gamma(4.0, 1.0, (2, 60)) * np.array([[1.0], [1.5]])
    row = module._row(0.5, *errors)
    drawn = [np.mean(generator.choice(errors[1], 60)) / np.mean(generator.choice(errors[0], 60)) for _ in range(4000)]
    assert row["gap"] == pytest.approx(errors[1].mean() / errors[0].mean())
    assert row["gap_ci95"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), rel=0.04)
    assert (
        module._row(0.5, errors[0] * 0, errors[1])["gap_ci95"] is None
        and module._row(0.5, *errors[:, :1])["gap_ci95"] is None
    )


class _Network(nn.Module):
    """Returns its class's picture where it is told one; a dropout layer tells the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.told: list[Tensor | None] = []

    def forward(self, x: Tensor, noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        assert not self.training
        self.told.append(class_labels)
        return x * 0


def test_levels_classes_and_modes_of_a_real_denoiser():
    denoiser = EDMDenoiser(_Network(), sigma_data=0.25, label_dim=4).train()
    rows = denoising_gap(
        denoiser, torch.from_numpy(_TRAIN), _HOLDOUT, train_classes=np.arange(40) % 4, holdout_classes=np.full(60, 2)
    )
    assert [row["sigma"] for row in rows] == pytest.approx(np.geomspace(0.005, 2.5, 12))
    assert denoiser.training
    told = denoiser.network.told
    assert torch.equal(told[0], nn.functional.one_hot(torch.arange(40) % 4, 4).float())
    assert torch.equal(told[-1], nn.functional.one_hot(torch.full((40,), 2), 4).float())
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    denoiser.network.told.clear()
    denoising_gap(denoiser, _TRAIN, _HOLDOUT, sigmas=[1.0])
    assert denoiser.network.told[0].count_nonzero() == 0  # no class


def test_chosen_images_keep_their_classes():
    """Pictures of one grey each, and a denoiser that paints the grey of the class it is told: no error on any."""

    def grey(classes: np.ndarray) -> np.ndarray:
        return np.broadcast_to((classes * 60).astype(np.uint8)[:, None, None, None], (len(classes), *_SHAPE))

    class Painter:
        label_dim = 4

        def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return (labels.argmax(1) * 60 / 127.5 - 1).view(-1, 1, 1, 1).expand_as(x)

    train, holdout = (np.random.default_rng(i).integers(0, 4, n) for i, n in ((7, 30), (8, 90)))
    (row,) = denoising_gap(
        Painter(), grey(train), grey(holdout), sigmas=[1.0], most=20, train_classes=train, holdout_classes=holdout
    )
    assert row["train"] < 1e-10 and row["holdout"] < 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": _TRAIN[..., :4]}, "equal sizes"),
        ({"holdout": _HOLDOUT[:0]}, "at least 1"),
        ({"train": _TRAIN.astype(np.float32)}, "uint8"),
        ({"sigmas": [0.0]}, "above 0"),
        ({"sigmas": [float("nan")]}, "above 0"),
        ({"draws": 0}, "at least 1 each"),
        ({"seed": -1}, "64-bit"),
        ({"train_classes": np.zeros(40, np.int64)}, "without classes"),
        ({"denoiser": lambda x, sigma: x * float("nan")}, "NaN"),
        (
            {"denoiser": EDMDenoiser(_Network(), label_dim=2).eval(), "train_classes": np.full(40, 2)},
            r"integers in 0\.\.1",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"denoiser": _wiener, "train": _TRAIN, "holdout": _HOLDOUT} | change
    with pytest.raises(InputError, match=message):
        denoising_gap(**arguments)
