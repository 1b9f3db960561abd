"""The optimizer by name, the learning-rate ramp, and the clean-up of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastambient.training.config import TrainingSettings

_GRAD_LIMIT = 1e5  # what an infinite gradient becomes, as in EDM


def build_optimizer(network: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(
        list(network.parameters()),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(nimg: int, settings: TrainingSettings) -> float:
    """Linear ramp over the first lr_rampup_kimg thousand images, then constant (EDM)."""
    return settings.lr * min(nimg / max(settings.lr_rampup_kimg * 1000, 1e-8), 1.0)


@torch.no_grad()
def clean_gradients(gradients: Sequence[Tensor]) -> tuple[float, int]:
    """Replace NaN by 0 and infinities by +-1e5, in place.

    Returns
    -------
    (norm over all gradients after the clean-up, number of entries replaced)
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
    if norm.isfinite():  # a sum of squares hides no NaN and no infinity
        return norm.item(), 0
    bad = sum(int((~g.isfinite()).sum()) for g in gradients)
    for g in gradients:
        torch.nan_to_num_(g, nan=0.0, posinf=_GRAD_LIMIT, neginf=-_GRAD_LIMIT)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))).double())
    return norm.item(), bad


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """State by parameter name, flat, for safetensors: ``exp_avg.enc.16x16_conv.weight`` and so on."""
    state = optimizer.state_dict()["state"]
    return {f"{key}.{names[index]}": value for index, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        key, name = flat.split(".", 1)
        state.setdefault(index_of[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
