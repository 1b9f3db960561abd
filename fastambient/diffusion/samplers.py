"""Samplers: from unit-variance latents to images, with any denoiser called as D(x, sigma).

Sources: Karras et al. (EDM, 2022), Algorithms 1 and 2, Eq. 5; Lu et al., "DPM-Solver++" (2022, arXiv 2211.01095),
Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]


def sigma_steps(steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """The noise levels t_0 = sigma_max > ... > t_{steps-1} = sigma_min, t_steps = 0 (EDM, Eq. 5), in float64."""
    if steps < 2:
        raise ValueError(f"the sampler needs at least 2 steps, got {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def _denoised(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """D(x, sigma) in x's dtype, with the same level for every sample."""
    return denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)


def heun(
    denoiser: Denoiser,
    latents: Tensor,
    steps: int = 18,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    randn: Callable[[int], Tensor] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """EDM's second-order sampler; deterministic at ``S_churn = 0`` (Algorithm 1), stochastic above (Algorithm 2).

    Parameters
    ----------
    denoiser : called as ``denoiser(x, sigma)`` with x in the latents' dtype and sigma of shape [N]
    latents : float32 or float64 [N, ...], unit variance; the state keeps this dtype
    steps : number of noise levels, at least 2; 2*steps - 1 evaluations of the denoiser
    S_churn, S_min, S_max, S_noise : amount of fresh noise, the sigmas it is added between, and its scale
    randn : unit noise of step i for ``S_churn > 0``; default torch.randn_like
    on_step : called after every step

    Returns
    -------
    [N, ...] in the latents' dtype, not clamped.

    Raises
    ------
    ValueError : fewer than 2 steps, or not 0 < sigma_min < sigma_max
    """
    t = sigma_steps(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - _denoised(denoiser, x, sigma)) / sigma

    x = latents * t[0]
    for i in range(steps):
        t_cur, t_next = t[i], t[i + 1]
        if S_churn > 0 and S_min <= t_cur <= S_max:
            t_hat = t_cur * (1 + min(S_churn / steps, math.sqrt(2) - 1))
            noise = torch.randn_like(x) if randn is None else randn(i).to(x)
            x = x + math.sqrt(t_hat**2 - t_cur**2) * S_noise * noise
            t_cur = t_hat
        d = slope(x, t_cur)
        x_next = x + (t_next - t_cur) * d
        if t_next > 0:
            x_next = x + (t_next - t_cur) * (d + slope(x_next, t_next)) / 2
        x = x_next
        if on_step is not None:
            on_step()
    return x


def dpmpp_2m(
    denoiser: Denoiser,
    latents: Tensor,
    steps: int = 18,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order from one evaluation a step, by the change since the step before. Deterministic.

    Between two levels the probability flow has the exact solution x' = (t'/t)*x + (1 - t'/t)*D for a D that stays as it
    is; in lambda = -ln(sigma) a D that changes linearly is extrapolated to the middle of the step (Lu et al.,
    Algorithm 2, with alpha = 1). The first step and the last, to sigma 0 where lambda has no end, are first order.

    Parameters
    ----------
    denoiser : called as ``denoiser(x, sigma)`` with x in the latents' dtype and sigma of shape [N]
    latents : float32 or float64 [N, ...], unit variance; the state keeps this dtype
    steps : number of noise levels, at least 2, of EDM's schedule; as many evaluations of the denoiser
    on_step : called after every step

    Returns
    -------
    [N, ...] in the latents' dtype, not clamped.

    Raises
    ------
    ValueError : fewer than 2 steps, or not 0 < sigma_min < sigma_max
    """
    t = sigma_steps(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    x, before = latents * t[0], None
    for i in range(steps):
        t_cur, t_next = t[i], t[i + 1]
        denoised = D = _denoised(denoiser, x, t_cur)
        if before is not None and t_next > 0:
            r = math.log(t[i - 1] / t_cur) / math.log(t_cur / t_next)  # the step before over this one, in lambda
            D = denoised + (denoised - before) / (2 * r)
        x = t_next / t_cur * x + (1 - t_next / t_cur) * D
        before = denoised
        if on_step is not None:
            on_step()
    return x
