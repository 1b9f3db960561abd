"""Guidance: the formula, its two kinds of guide, what is evaluated, and where."""

from __future__ import annotations

import pytest
import torch

from fastambient.diffusion.guidance import GuidedDenoiser
from fastambient.diffusion.samplers import sigma_steps

X, SIGMA = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.full((4,), 2.0)
LABELS = torch.eye(3)[[0, 1, 2, 1]]


class Counting:
    """A denoiser that depends on all it is given, and remembers the number of samples of each call."""

    def __init__(self, scale=1.0):
        self.scale, self.sizes = scale, []

    def __call__(self, x, sigma, class_labels):
        self.sizes.append(len(x))
        shift = 0 if class_labels is None else class_labels @ torch.tensor([1.0, 2.0, 4.0])
        return self.scale * x / (1 + sigma + shift).view(-1, 1, 1, 1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.7, 4.0])
def test_classifier_free_guidance_is_one_call_of_both_halves(weight):
    D = Counting()
    out = GuidedDenoiser(D, weight)(X, SIGMA, LABELS)
    assert D.sizes == [8]
    conditional, unconditional = D(X, SIGMA, LABELS), D(X, SIGMA, torch.zeros(4, 3))
    torch.testing.assert_close(out, unconditional + weight * (conditional - unconditional))


@pytest.mark.parametrize("labels", [None, LABELS])
def test_autoguidance_asks_model_and_guide_for_the_same(labels):
    good, bad = Counting(), Counting(0.5)
    out = GuidedDenoiser(good, 2.5, guide=bad)(X, SIGMA, labels)
    assert good.sizes == bad.sizes == [4]
    torch.testing.assert_close(out, bad(X, SIGMA, labels) + 2.5 * (good(X, SIGMA, labels) - bad(X, SIGMA, labels)))


def test_weight_one_is_the_model_alone():
    D, guide = Counting(), Counting(0.5)
    for guided in (GuidedDenoiser(D, 1.0), GuidedDenoiser(D, 1.0, guide=guide)):
        assert torch.equal(guided(X, SIGMA, LABELS), D(X, SIGMA, LABELS))
    assert D.sizes == [4] * 4 and not guide.sizes
    with pytest.raises(ValueError, match="needs class labels"):
        GuidedDenoiser(D, 2.0)(X, SIGMA, None)


def test_interval_leaves_the_rest_alone_and_unasked():
    levels = sigma_steps(10)[:-1]
    good, bad = Counting(), Counting(0.5)
    guided, plain = (
        GuidedDenoiser(good, 3.0, guide=bad, interval=(0.3, levels[3])),
        GuidedDenoiser(good, 3.0, guide=bad),
    )
    for s in levels:
        at, asked = torch.full((4,), s), len(bad.sizes)
        inside = 0.3 < s <= torch.tensor(levels[3])
        out = guided(X, at, LABELS)
        assert len(bad.sizes) - asked == inside
        assert torch.equal(out, (plain if inside else good)(X, at, LABELS))
    mixed = torch.tensor([0.01, 1.0, 80.0, 1.0])  # samples at levels of their own
    out, model, all_guided = guided(X, mixed, LABELS), good(X, mixed, LABELS), plain(X, mixed, LABELS)
    assert torch.equal(out[[0, 2]], model[[0, 2]]) and torch.equal(out[[1, 3]], all_guided[[1, 3]])
    assert not torch.allclose(model, all_guided)
