"""Guidance: away from what a worse denoiser says, D = D_guide + W*(D_model - D_guide).

Sources: Ho and Salimans, "Classifier-free diffusion guidance" (2022); Karras et al., "Guiding a diffusion model with a
bad version of itself" (2024), for the form and for a guide of its own; Kynkaanniemi et al., "Applying guidance in a
limited interval improves sample and distribution quality in diffusion models" (2024).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ClassDenoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class GuidedDenoiser:
    """The guided D(x, sigma, class_labels) of a denoiser and its guide.

    Parameters
    ----------
    denoiser : called as ``denoiser(x, sigma, class_labels)``, such as an `EDMDenoiser`
    weight : W; 1 is the denoiser alone, 0 the guide alone
    guide : a worse denoiser of the same images and classes, called with the same arguments (autoguidance). None takes
        the denoiser without a class (classifier-free guidance; it was trained with label dropout), both halves in one
        call of 2N samples
    interval : (low, high), the noise levels low < sigma <= high that are guided; None guides all of them. Where no
        sample is guided the denoiser is called alone.
    """

    def __init__(
        self,
        denoiser: ClassDenoiser,
        weight: float,
        *,
        guide: ClassDenoiser | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.denoiser, self.weight, self.guide, self.interval = denoiser, weight, guide, interval

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Estimate the clean image: x float [N, ...], sigma [N], class_labels one-hot [N, label_dim] -> like x.

        Raises
        ------
        ValueError : no class to leave out, without a guide
        """
        if self.weight == 1:
            return self.denoiser(x, sigma, class_labels)
        if self.interval is None:
            return self._guided(x, sigma, class_labels)
        low, high = self.interval
        inside = (low < sigma) & (sigma <= high)
        if inside.all():
            return self._guided(x, sigma, class_labels)
        alone = self.denoiser(x, sigma, class_labels)
        if not inside.any():
            return alone
        guided = self._guided(x, sigma, class_labels)
        return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), guided, alone)

    def _guided(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        if self.guide is not None:
            model, guide = self.denoiser(x, sigma, class_labels), self.guide(x, sigma, class_labels)
        elif class_labels is None:
            raise ValueError("classifier-free guidance needs class labels; give them, or a guide")
        else:
            labels = torch.cat([class_labels, torch.zeros_like(class_labels)])
            both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), labels)
            model, guide = both.chunk(2)
        return torch.lerp(guide, model, self.weight)
