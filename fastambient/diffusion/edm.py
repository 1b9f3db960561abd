"""EDM: preconditioning around a network, and the training distribution of noise levels.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), Table 1 and Eq. 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastambient_kernels import Stream, normal
from fastambient_kernels.noise import uniform


class EDMDenoiser(nn.Module):
    """D(x, sigma) = c_skip*x + c_out*F(c_in*x, c_noise): the denoiser around a raw network F (EDM, Eq. 7).

    Parameters
    ----------
    network : module called as F(x, c_noise, class_labels=None, augment_labels=None)
    sigma_data : standard deviation of the data
    label_dim : number of classes; 0 for an unconditional network
    """

    def __init__(self, network: nn.Module, *, sigma_data: float = 0.5, label_dim: int = 0) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, got {sigma_data}")
        self.network = network
        self.sigma_data = float(sigma_data)
        self.label_dim = label_dim
        self.metadata: dict[str, Any] = {}  # of the weights file it was loaded from

    def forward(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Estimate the clean image.

        Parameters
        ----------
        x : float [N, C, H, W], noised images; its dtype is the result's, the network runs in its own
        sigma : noise level, a number or a tensor of one or N elements
        class_labels : one-hot float [N, label_dim], or None for no class
        augment_labels : float [N, augment_dim], or None for no augmentation
        """
        s = torch.as_tensor(sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        s = s.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        sd = self.sigma_data
        h = (s * s + sd * sd).sqrt()
        c_skip, c_out, c_in, c_noise = (sd / h) ** 2, s * sd / h, 1 / h, s.log() / 4
        dtype = next(self.network.parameters()).dtype
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(len(x), self.label_dim, device=x.device)
        if class_labels is not None:
            class_labels = class_labels.to(dtype)
        F = self.network((c_in * x).to(dtype), c_noise.flatten().to(dtype), class_labels, augment_labels)
        return (c_skip * x + c_out * F.to(s.dtype)).to(x.dtype)


def draw_sigma(
    positions: Tensor, *, seed: int | Tensor, P_mean: float = -1.2, P_std: float = 1.2, above: float = 0.0
) -> Tensor:
    """Noise levels of a training batch, ln sigma ~ N(P_mean, P_std^2) (EDM, Table 1): float32 [N] for int64 [N].

    above : sigma_tn, to draw from the ambient regime alone: the distribution on condition that sigma >= above
    """
    if above > 0:  # by the inverse of the distribution's tail
        tail = 0.5 * math.erfc((math.log(above) - P_mean) / P_std / math.sqrt(2))
        u = uniform(positions, 1, seed=seed, stream=Stream.SIGMA)[:, 0].double()
        z = -torch.special.ndtri(tail * (1 - u))
        return torch.exp(P_mean + P_std * z).float().clamp(min=above)
    return torch.exp(P_mean + P_std * normal(positions, 1, seed=seed, stream=Stream.SIGMA)[:, 0])
