"""The parts of a step: EMA, learning rate, clean-up, and independence of micro-batches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import make_run
from torch import nn

from fastambient.diffusion.ambient import two_regime_loss
from fastambient.errors import InputError
from fastambient.training.config import TrainingSettings
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.optimizer import build_optimizer, ema_beta, ema_weights, learning_rate, load_ema_weights
from fastambient.training.run import RunFolder
from fastambient_kernels.noise import normal


def test_ema_has_its_half_life():
    t = TrainingSettings(batch=10, ema_halflife_kimg=0.1, ema_rampup_ratio=None, lr=0.0)
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, t)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    for k in range(10):  # 100 images
        optimizer.step(ema_betas=[ema_beta(1000 + 10 * k, t)])
    weights = ema_weights(optimizer, ["weight", "bias"])
    torch.testing.assert_close(weights["weight"], start + 0.5, rtol=1e-5, atol=1e-6)
    load_ema_weights(optimizer, ["weight", "bias"], {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert optimizer.emas[0][0].eq(1).all() and optimizer.emas[0][1].eq(0).all()


def test_ema_ramps_up_and_can_be_off():
    ramp = {"ema_halflife_kimg": 500, "ema_rampup_ratio": 0.05}
    assert ema_beta(1000, TrainingSettings(batch=50, **ramp)) == pytest.approx(0.5)
    assert ema_beta(10**9, TrainingSettings(batch=500_000, **ramp)) == pytest.approx(0.5)
    assert ema_beta(8, TrainingSettings(batch=8, ema_halflife_kimg=0)) == 0.0


def test_learning_rate_ramp():
    t = TrainingSettings(lr=2e-4, lr_rampup_kimg=10)
    assert [learning_rate(n, t) for n in (0, 5000, 10_000, 10**6)] == [0, 1e-4, 2e-4, 2e-4]
    assert learning_rate(1, TrainingSettings(lr=1e-3, lr_rampup_kimg=0)) == 1e-3


def test_optimizer_follows_the_settings():
    layer = nn.Linear(2, 2)
    adam = build_optimizer(layer, TrainingSettings(lr=1e-3, eps=1e-6))
    assert not adam.param_groups[0]["decoupled_weight_decay"] and len(adam.emas) == 1
    assert adam.param_groups[0]["lr"] == 1e-3 and adam.param_groups[0]["eps"] == 1e-6
    adamw = build_optimizer(layer, TrainingSettings(optimizer="adamw", weight_decay=0.1, beta2=0.99))
    assert adamw.param_groups[0]["decoupled_weight_decay"]
    assert adamw.param_groups[0]["weight_decay"] == 0.1 and adamw.param_groups[0]["betas"] == (0.9, 0.99)


def test_gradients_are_cleaned_and_counted(tmp_path):
    trainer = Trainer(RunFolder(make_run(tmp_path / "r")), World())
    bad = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    first = next(iter(trainer.network.parameters()))
    first.register_hook(lambda g: torch.cat([bad, g.flatten()[4:]]).view_as(g))
    result = trainer.step(0)
    assert result.nonfinite_grads == 3 and 1.4e5 < result.grad_norm < 1.5e5
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def gradients(path, *assignments):
    """(gradients of the first step, its result) of a run with these settings."""
    trainer = Trainer(RunFolder(make_run(path, *assignments)), World())
    seen = []

    def step(*, ema_betas):
        seen.extend(p.grad.clone() for p in trainer.step.network.parameters())
        trainer.optimizer.grad_norm, trainer.optimizer.nonfinite = torch.zeros(()), torch.zeros(())

    trainer.optimizer.step = step
    for parameter in trainer.network.parameters():  # zero-initialised layers would hide the rest
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    result = trainer.step(64)
    return seen, result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulation_changes_nothing_but_rounding(tmp_path, dropout):
    """Every draw, dropout masks too, is a function of the position in the global batch."""
    common = (f"model.dropout={dropout}", "noise.sigma_tn=0.2")
    whole, one = gradients(tmp_path / "whole", *common)
    parts, two = gradients(tmp_path / "parts", "training.batch_gpu=2", *common)
    assert one.loss == pytest.approx(two.loss, rel=1e-6) and one.ambient_share == two.ambient_share
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item() + 1e-12)


def test_the_average_follows_the_images_seen(tmp_path):
    """Half-life min(40, half of the images seen at the end of the step), written out over twenty steps of 8 images."""
    settings = ("training.ema_halflife_kimg=0.04", "training.ema_rampup_ratio=0.5", "training.lr_rampup_kimg=0.02")
    trainer = Trainer(RunFolder(make_run(tmp_path / "run", *settings)), World())
    weight = next(p for p in trainer.network.parameters() if p.dim() == 4)
    name = next(n for n, p in trainer.network.named_parameters() if p is weight)
    average = weight.detach().double()
    start = average.clone()
    for nimg in range(0, 160, 8):
        result = trainer.step(nimg)
        assert result.lr == pytest.approx(1e-3 * min(nimg / 20, 1))
        if nimg == 0:
            assert torch.equal(weight.detach().double(), start), (
                "the ramp begins at 0: the optimizer must have been told"
            )
        beta = 0.5 ** (8 / min(40, 0.5 * (nimg + 8)))
        average = beta * average + (1 - beta) * weight.detach().double()
    torch.testing.assert_close(
        ema_weights(trainer.optimizer, trainer.names)[name].double(), average, rtol=1e-5, atol=1e-6
    )
    assert (average - start).abs().max() > 1e-3


def test_batches_must_divide(tmp_path):
    with pytest.raises(InputError, match=r"batch_gpu 3 does not divide"):
        make_run(tmp_path / "r", "training.batch_gpu=3")
    with pytest.raises(InputError, match=r"--batch 8 does not divide among 3 ranks"):
        make_run(tmp_path / "r", "training.ranks=3")
    assert not list(tmp_path.iterdir())


def test_bf16_is_near_fp32(tmp_path):
    fp32, one = gradients(tmp_path / "a")
    bf16, two = gradients(tmp_path / "b", "training.precision=bf16")
    assert one.loss == pytest.approx(two.loss, rel=0.02)
    norm = lambda gs: torch.cat([g.flatten() for g in gs])  # noqa: E731
    assert torch.nn.functional.cosine_similarity(norm(fp32), norm(bf16), dim=0) > 0.99


def test_augmentation_leaves_the_ambient_regime_alone(tmp_path):
    """Clean draws are warped, ambient ones only mirrored together with their noise; `reference` warps both."""
    common = ("training.augment=1", "noise.sigma_tn=0.2", "training.batch=64")
    trainer = Trainer(RunFolder(make_run(tmp_path / "a", *common)), World())
    batch = trainer.step.loader.at(torch.arange(64))
    sigma = torch.tensor([0.1, 0.5]).repeat(32)
    images, flips, labels = trainer.step._augmented(batch, sigma)
    x0 = batch.images.float() / 127.5 - 1
    assert torch.equal(images[1::2], x0[1::2]), "an ambient image was warped"
    assert (images[::2] != x0[::2]).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(flips, batch.flips) and 10 < flips.sum() < 54
    assert torch.equal(labels[:, 0], flips.float()) and not labels[1::2, 1:].any()
    leaking = Trainer(RunFolder(make_run(tmp_path / "b", *common, "training.augment_ambient=reference")), World())
    images, flips, _ = leaking.step._augmented(batch, sigma)
    assert not flips.any() and (images != x0).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("weighting", ["paper", "unit"])
@pytest.mark.parametrize(("noisy", "mode"), [("none", "fixed"), ("float32", "fixed"), ("float32", "fresh")])
def test_a_step_is_algorithm_1(tmp_path, noisy, mode, weighting):
    """Sigma, network input, loss and dropout key from the contract's streams, not from the operators."""
    numbers = ("sigma_tn=0.2", "sigma_data=0.6", "P_mean=-0.9", "P_std=1.3", f"weighting={weighting}", f"mode={mode}")
    common = (*(f"noise.{n}" for n in numbers), "training.seed=3", "training.batch=64", "data.xflip=true")
    run = RunFolder(make_run(tmp_path / "run", *common, f"data.noisy={noisy}", noise_seed=77))
    step, positions = Trainer(run, World()).step, torch.arange(640, 704)
    F = normal(positions, 64, seed=1, stream=9).view(64, 1, 8, 8)
    seen = []

    class Spy(nn.Module):
        def forward(self, x, c_noise, *args, dropout_key):
            seen.append((x, c_noise, dropout_key))
            return F

    step.parallel = Spy()
    batch = step.loader.at(positions)
    sigma, loss = step.forward(batch)
    torch.testing.assert_close(sigma.log(), -0.9 + 1.3 * normal(positions, 1, seed=3, stream=2)[:, 0])
    x0 = batch.images / 127.5 - 1
    names, seed = (batch.ids, 77) if mode == "fixed" else (positions, 3)
    x_n = x0 + 0.2 * normal(names, 64, seed=seed, stream=0).view_as(x0)
    eps = normal(positions, 64, seed=3, stream=1).view_as(x0)
    assert 16 < batch.flips.sum() < 48
    x0, x_n, eps = (torch.where(batch.flips.view(-1, 1, 1, 1), v.flip(3), v) for v in (x0, x_n, eps))
    settings = {"sigma_tn": 0.2, "sigma_data": 0.6, "weighting": weighting}
    expected = two_regime_loss(F, x0, x_n, eps, sigma, **settings).flatten(1).sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    s = sigma.view(-1, 1, 1, 1)
    x = torch.where(s >= 0.2, x_n + (s**2 - 0.2**2).clamp(min=0).sqrt() * eps, x0 + s * eps)
    net_input, c_noise, (seed, where) = seen[0]
    torch.testing.assert_close(net_input, x / (s**2 + 0.6**2).sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert seed == 3 and torch.equal(where, positions)


@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_the_clean_image_of_an_ambient_draw_reaches_nothing(tmp_path, augment):
    """Next to the noised copy the picture itself may be any other: inputs and losses stay bit for bit."""
    common = (f"training.augment={augment}", "data.xflip=true", "data.noisy=float32", "noise.sigma_tn=0.2")
    trainer = Trainer(RunFolder(make_run(tmp_path / "run", *common, "training.batch=64")), World())
    batch, seen = trainer.step.loader.at(torch.arange(64)), []

    class Spy(nn.Module):
        def forward(self, x, *args, **kwargs):
            seen.append(x)
            return torch.ones_like(x)

    trainer.step.parallel = Spy()
    sigma, loss = trainer.step.forward(batch)
    ambient = sigma >= 0.2
    others = torch.where(ambient.view(-1, 1, 1, 1), 255 - batch.images, batch.images)
    _, loss_of_others = trainer.step.forward(dataclasses.replace(batch, images=others))
    assert 16 < ambient.sum() < 56
    assert torch.equal(seen[0], seen[1]) and torch.equal(loss, loss_of_others)


def test_fresh_noise_is_new_at_every_draw_and_fixed_is_not(tmp_path):
    for mode in ("fixed", "fresh"):
        trainer = Trainer(RunFolder(make_run(tmp_path / mode, f"noise.mode={mode}", "noise.sigma_tn=80")), World())
        seen = []

        class Spy(nn.Module):
            def forward(self, x, *args, seen=seen, **kwargs):
                seen.append(x)
                return torch.zeros_like(x, requires_grad=True)

        trainer.step.parallel = Spy()
        first = trainer.step.loader.at(torch.arange(8))
        # the same images at other positions, at sigma = sigma_tn, where no fresh noise is added
        import fastambient.training.step as step

        original, step.draw_sigma = step.draw_sigma, lambda positions, **_: torch.full((8,), 80.0)
        try:
            for shift in (0, 1000):
                trainer.step.forward(dataclasses.replace(first, positions=torch.arange(8) + shift))
        finally:
            step.draw_sigma = original
        assert torch.equal(seen[0], seen[1]) == (mode == "fixed")
