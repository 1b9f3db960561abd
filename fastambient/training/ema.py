"""Exponential moving average of the weights, with a half-life in images (EDM's form)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """ema <- beta*ema + (1 - beta)*weight, beta = 0.5^(batch / half-life).

    Parameters
    ----------
    network : the module that is trained; float32 weights
    halflife_nimg : half-life in images; 0 keeps no average
    rampup_ratio : the half-life is at most this share of the images seen, so that early weights are forgotten;
        None for no ramp
    """

    def __init__(self, network: nn.Module, *, halflife_nimg: float, rampup_ratio: float | None) -> None:
        self.halflife_nimg = halflife_nimg
        self.rampup_ratio = rampup_ratio
        self.names = [name for name, _ in network.named_parameters()]
        self.sources = [p.detach() for p in network.parameters()]
        self.weights = [p.detach().clone() for p in network.parameters()]

    def beta(self, nimg: int, batch: int) -> float:
        """Decay of a step that ends at `nimg` images."""
        halflife = self.halflife_nimg
        if self.rampup_ratio is not None:
            halflife = min(halflife, nimg * self.rampup_ratio)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, nimg: int, batch: int) -> None:
        torch._foreach_lerp_(self.weights, self.sources, 1 - self.beta(nimg, batch))

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.weights, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        for weight, target in zip(self.weights, network.parameters(), strict=True):
            target.copy_(weight)
