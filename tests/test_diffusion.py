"""Preconditioning, the distribution of sigma, the share message and the sampler."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import read_safetensors
from torch import nn

from fastambient.diffusion.ambient import ambient_share, default_sigma_tn, share_message
from fastambient.diffusion.edm import EDMDenoiser, draw_sigma
from fastambient.diffusion.samplers import dpmpp_2m, heun, sigma_steps
from fastambient_kernels.noise import normal


@pytest.mark.parametrize("steps", [18, 40])
def test_heun_equals_the_recorded_sampler(steps):
    t, metadata = read_safetensors(f"sampler_{steps}.safetensors")
    assert int(metadata["num_steps"]) == steps
    mean, std = t["in.mean_std"]
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma[0].item())
        return mean + std**2 / (std**2 + sigma.view(-1, 1, 1, 1) ** 2) * (x - mean)

    samples = heun(denoiser, t["in.latents"], steps)
    assert (samples - t["out.samples"]).abs().max() < 1e-10
    assert len(calls) == 2 * steps - 1
    assert heun(denoiser, t["in.latents"].float(), steps).dtype == torch.float32


def test_steps_run_from_sigma_max_to_sigma_min_to_zero():
    t = sigma_steps(18)
    assert t[0] == pytest.approx(80) and t[17] == pytest.approx(0.002) and t[18] == 0
    assert all(a > b for a, b in itertools.pairwise(t))
    with pytest.raises(ValueError, match="at least 2 steps"):
        sigma_steps(1)


def test_churn_keeps_the_marginal_and_uses_the_given_noise():
    """For Gaussian data and its exact denoiser any amount of churn samples the same Gaussian."""
    std = 0.7
    denoiser = lambda x, s: std**2 / (std**2 + s.view(-1, 1) ** 2) * x  # noqa: E731
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2000, 8, generator=g, dtype=torch.float64)
    seen = []

    def randn(i):
        seen.append(i)
        return torch.randn(2000, 8, generator=g, dtype=torch.float64)

    out = heun(denoiser, latents, 100, S_churn=20, S_min=0.01, S_max=10, randn=randn)
    expected = [i for i, t in enumerate(sigma_steps(100)[:-1]) if 0.01 <= t <= 10]
    assert seen == expected and len(seen) > 5
    assert out.std() == pytest.approx(std, rel=0.02)
    assert not torch.allclose(out, heun(denoiser, latents, 100), atol=0.1)


def test_churn_is_algorithm_2():
    """More noise than steps: gamma is capped at sqrt(2) - 1; S_noise scales what is added."""
    g = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.randn(8, 3, 4, generator=g).double()
    denoiser = lambda x, s: 0.3 * torch.sin(x) + 0.1  # noqa: E731
    out = heun(denoiser, latents, 8, S_churn=20, S_min=0.05, S_max=50, S_noise=1.01, randn=lambda i: noise[i])
    t = [(80 ** (1 / 7) + i / 7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(8)] + [0.0]
    x = 80 * latents
    for i in range(8):
        gamma = math.sqrt(2) - 1 if 0.05 <= t[i] <= 50 else 0.0
        hat = t[i] * (1 + gamma)
        x = x + math.sqrt(hat**2 - t[i] ** 2) * 1.01 * noise[i]
        d = (x - denoiser(x, hat)) / hat
        euler = x + (t[i + 1] - hat) * d
        x = x + (t[i + 1] - hat) * (d + (euler - denoiser(euler, t[i + 1])) / t[i + 1]) / 2 if t[i + 1] else euler
    torch.testing.assert_close(out, x, rtol=1e-10, atol=1e-10)


MEAN, STD = torch.tensor([0.3, -0.2, 0.0, 0.9]).double(), torch.tensor([0.5, 0.1, 1.0, 0.25]).double()


def gaussian(x, sigma):
    """The exact denoiser of the data distribution N(MEAN, STD^2)."""
    return MEAN + STD**2 / (STD**2 + sigma.view(-1, 1) ** 2) * (x - MEAN)


def euler(denoiser, latents, steps, **schedule):
    t = sigma_steps(steps, **schedule)
    x = latents * t[0]
    for now, then in itertools.pairwise(t):
        x = x + (then - now) * (x - denoiser(x, x.new_full((len(x),), now))) / now
    return x


def distance_to_exact(sampler, steps):
    """Root mean square, from the end of the probability flow of that distribution: x - MEAN shrinks by its spread."""
    latents = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = MEAN + (80 * latents - MEAN) * STD / (STD**2 + 80**2).sqrt()
    return (sampler(gaussian, latents, steps, sigma_min=1e-4) - exact).square().mean().sqrt().item()


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence_to_the_exact_solution(sampler, order):
    errors = [distance_to_exact(sampler, steps) for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_dpmpp_2m_is_nearer_at_18_evaluations():
    calls = []

    def counted(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    dpmpp_2m(counted, torch.randn(2, 4).double(), 18)
    assert [c[0].item() for c in calls] == sigma_steps(18)[:-1], "one evaluation a step"
    found = distance_to_exact(dpmpp_2m, 18)
    assert found < 0.5 * distance_to_exact(euler, 18)
    assert found < 0.5 * distance_to_exact(heun, 9), "17 evaluations"


def test_dpmpp_2m_is_algorithm_2():
    """Lu et al.'s own symbols, lambda = -ln(sigma) and alpha = 1, on a denoiser that is not linear."""
    latents = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoiser = lambda x, s: 0.3 * torch.sin(x) + 0.1 * s.view(-1, 1) / (1 + s.view(-1, 1))  # noqa: E731
    sigma = [(20 ** (1 / 5) + i / 7 * (0.01 ** (1 / 5) - 20 ** (1 / 5))) ** 5 for i in range(8)]
    lam = [-math.log(s) for s in sigma]
    model = lambda x, i: denoiser(x, x.new_full((3,), sigma[i]))  # noqa: E731
    x = sigma[0] * latents
    Q = [model(x, 0)]
    x = sigma[1] / sigma[0] * x - (math.exp(-(lam[1] - lam[0])) - 1) * Q[0]
    for i in range(2, 8):
        Q.append(model(x, i - 1))
        h, r = lam[i] - lam[i - 1], (lam[i - 1] - lam[i - 2]) / (lam[i] - lam[i - 1])
        D = (1 + 1 / (2 * r)) * Q[i - 1] - 1 / (2 * r) * Q[i - 2]
        x = sigma[i] / sigma[i - 1] * x - (math.exp(-h) - 1) * D
    steps = []
    out = dpmpp_2m(
        denoiser, latents, 8, sigma_min=0.01, sigma_max=20, rho=5, on_step=lambda: steps.append(1)
    )  # the last step returns the denoised picture
    torch.testing.assert_close(out, model(x, 7), rtol=1e-12, atol=1e-12)
    assert len(steps) == 8
    single = dpmpp_2m(denoiser, latents.float(), 8, sigma_min=0.01, sigma_max=20, rho=5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), out, rtol=1e-4, atol=1e-4)


class _Known(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        self.seen = (c_noise, class_labels)
        return self.weight * x


def test_denoiser_is_table_1():
    D = EDMDenoiser(_Known(), sigma_data=0.4, label_dim=2)
    x, s = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    column = s.view(-1, 1, 1, 1)
    h2 = column**2 + 0.16
    expected = 0.16 / h2 * x + column * 0.4 / h2.sqrt() * 0.3 * x / h2.sqrt()
    out = D(x, s)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)
    c_noise, labels = D.network.seen
    torch.testing.assert_close(c_noise, (s.log() / 4).float())
    assert labels.shape == (3, 2) and not labels.any()
    torch.testing.assert_close(D(x, 1.0)[1], out[1])


def test_sigma_is_lognormal_and_a_function_of_position():
    positions = torch.arange(50000)
    sigma = draw_sigma(positions, seed=5, P_mean=-0.6, P_std=1.1)
    assert torch.equal(sigma[100:200], draw_sigma(positions[100:200], seed=5, P_mean=-0.6, P_std=1.1))
    logs = sigma.log()
    torch.testing.assert_close(logs, -0.6 + 1.1 * normal(positions, 1, seed=5, stream=2)[:, 0])  # the contract's stream
    assert logs.mean() == pytest.approx(-0.6, abs=0.025) and logs.std() == pytest.approx(1.1, abs=0.02)


@pytest.mark.parametrize(
    ("sigma_tn", "share"), [(0.1, 0.82), (0.2, 0.63), (0.4, 0.41), (0.5, 0.34), (1, 0.16), (1.5, 0.09), (2, 0.06)]
)
def test_share_of_ambient_draws(sigma_tn, share):
    assert ambient_share(sigma_tn) == pytest.approx(share, abs=0.005)
    drawn = draw_sigma(torch.arange(20000), seed=0)
    assert (drawn >= sigma_tn).float().mean() == pytest.approx(share, abs=0.015)


def test_share_message_warns_at_both_ends_and_speaks_of_resolution():
    assert ambient_share(4) == pytest.approx(0.016, abs=0.0005)
    assert ambient_share(0) == 0 and ambient_share(math.inf) == 0
    message, warning = share_message(1.5, resolution=64)
    assert "9.0%" in message and warning is None
    assert "few" in share_message(6, resolution=64)[1] and "P_mean" not in share_message(6, resolution=64)[1]
    assert "P_mean" in share_message(6, resolution=256)[1]
    assert "many" in share_message(0.03, resolution=64)[1]
    counted = ambient_share(1.5 * (4 / 3) ** 0.5) / ambient_share(1.5)
    assert f"of which {1 - counted:.1%} lie" in share_message(1.5, resolution=64, weighting="unit")[0]
    for none in (share_message(80, resolution=64, P_std=0.1, weighting="unit"), share_message(math.inf, resolution=64)):
        assert "0.0%" in none[0] and "few" in none[1]
    assert default_sigma_tn(64) == 1.5 and default_sigma_tn(8) == 0.1875
