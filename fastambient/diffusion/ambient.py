"""The two-regime loss in readable form, and what a choice of sigma_tn means.

The trainer calls the fused operators of `fastambient_kernels`, which are tested against this file.

Source: Shah et al., "Does Generation Require Memorization? Creative Diffusion Models using Ambient Diffusion"
(ICML 2025), Algorithm 1; "unit" weighting as in the authors' later Ambient Omni.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHTING_M = 4.0  # m of the unit weighting's buffer
_PAPER_SIGMA_TN, _PAPER_RESOLUTION = 1.5, 64  # the middle of the paper's useful range at its resolution
_LOW_SHARE, _HIGH_SHARE = 0.01, 0.95


def two_regime_loss(
    F: Tensor,
    x0: Tensor,
    x_n: Tensor,
    eps: Tensor,
    sigma: Tensor,
    *,
    sigma_tn: float,
    sigma_data: float = 0.5,
    weighting: str = "paper",
) -> Tensor:
    """Loss per element of a network's raw output, each sample in the regime of its noise level.

    Parameters
    ----------
    F : float [N, ...], raw network output at c_in*x, where x = x0 + sigma*eps in the clean regime and
        x = x_n + sqrt(sigma^2 - sigma_tn^2)*eps in the ambient one
    x0 : [N, ...], clean images
    x_n : [N, ...], the images noised once, x0 + sigma_tn*(fixed noise); read in the ambient regime only
    eps : [N, ...], the fresh noise of this draw
    sigma : [N], noise levels > 0; a sample is in the ambient regime iff 0 < sigma_tn <= sigma
    sigma_tn : noise level of the training set; 0 or infinite is plain EDM
    weighting : "paper", or "unit": the paper's divided by (1 - sigma_tn^2/sigma^2)^2 and zero in the buffer
        sigma_tn <= sigma < sigma_tn*sqrt(4/3)

    Returns
    -------
    [N, ...], differentiable in F. The objective is its sum over elements, averaged over the batch.
    """
    if weighting not in ("paper", "unit"):
        raise ValueError(f"weighting must be 'paper' or 'unit', got {weighting!r}")
    s = sigma.reshape(-1, *[1] * (F.dim() - 1))
    sd = sigma_data
    ambient = (s >= s.new_tensor(sigma_tn)) & (sigma_tn > 0)
    h = torch.sqrt(s**2 + sd**2)
    c_skip, c_out = sd**2 / h**2, s * sd / h

    # Clean regime: EDM's own target, the form without cancellation at small sigma.
    T = (s / sd * x0 - sd * eps) / h

    # Ambient regime: (1-r)*D + r*x against x_n, in F-space. Where a sample is clean, tn = 0 keeps numbers finite.
    tn = torch.where(ambient, s.new_tensor(sigma_tn), 0.0)
    q = torch.sqrt((s - tn) * (s + tn))
    a = q**2 / s**2
    if weighting == "paper":
        A = a
        U = (a * (1 - c_skip) * x_n - (tn**2 * q / s**2 + c_skip * a * q) * eps) / c_out
    else:
        outside = s >= tn * math.sqrt(1 + 1 / (WEIGHTING_M - 1))
        safe_q = torch.where(outside, q, 1.0)
        A = outside.to(s.dtype)
        U = torch.where(outside, ((1 - c_skip) * x_n - (tn**2 / safe_q + c_skip * q) * eps) / c_out, 0.0)

    # One loss from selected parts: masking two losses would let a NaN of the unused one into the gradient.
    return (torch.where(ambient, A, 1.0) * F - torch.where(ambient, U, T)) ** 2


def ambient_share(sigma_tn: float, *, P_mean: float = -1.2, P_std: float = 1.2) -> float:
    """Share of training draws in the ambient regime: P(ln sigma >= ln sigma_tn)."""
    if sigma_tn <= 0 or math.isinf(sigma_tn):
        return 0.0
    return 0.5 * math.erfc((math.log(sigma_tn) - P_mean) / (P_std * math.sqrt(2)))


def default_sigma_tn(resolution: int) -> float:
    """1.5*R/64: averaging pixels averages noise, so the noise that hides an image shrinks with its resolution."""
    return _PAPER_SIGMA_TN * resolution / _PAPER_RESOLUTION


def share_message(
    sigma_tn: float, *, resolution: int, P_mean: float = -1.2, P_std: float = 1.2, weighting: str = "paper",
    regime: str = "both",
) -> tuple[str, str | None]:  # fmt: skip
    """(message, warning or None) for the start of a run: the share of ambient draws, and a hint where it is extreme."""
    if sigma_tn == 0:
        return "sigma_tn 0: plain EDM, no ambient draws", None
    if regime == "ambient":
        return f"sigma_tn {sigma_tn:g}: all draws are in the ambient regime, as asked for", None
    share = ambient_share(sigma_tn, P_mean=P_mean, P_std=P_std)
    message = f"sigma_tn {sigma_tn:g}: {share:.1%} of the draws are in the ambient regime"
    if weighting == "unit" and share > 0:
        buffer = share - ambient_share(sigma_tn * math.sqrt(1 + 1 / (WEIGHTING_M - 1)), P_mean=P_mean, P_std=P_std)
        message += f", of which {buffer / share:.1%} lie in the unit weighting's buffer and count nothing"
    if _LOW_SHARE <= share <= _HIGH_SHARE:
        return message, None
    too = "few" if share < _LOW_SHARE else "many"
    hint = f"that is {too}: too low or too high a sigma_tn turns back into plain EDM;"
    hint += f" 1.5*R/64 is {default_sigma_tn(resolution):g} here"
    if too == "few" and resolution > 64:
        hint += ", and above 64 pixels a larger noise.P_mean is needed, too"
    return message, hint
