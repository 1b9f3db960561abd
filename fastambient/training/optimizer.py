"""Adam or AdamW with the moving average of the weights: schedules, and the way to a checkpoint and back.

The step itself, clean-up of the gradients included, is `fastambient_kernels.AdamEMA`, or the same over NVIDIA's apex.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastambient.errors import InputError
from fastambient.models.blocks import with_bf16_weights
from fastambient.training.config import TrainingSettings
from fastambient_kernels import AdamEMA
from fastambient_kernels.adam_ema_apex import ApexAdamEMA, missing


def working_network(network: nn.Module, settings: TrainingSettings, *, ranks: int) -> nn.Module:
    """What a step computes with: `network`, or in bf16 a copy with bfloat16 weights, whose masters are `network`'s.

    Gradients of bfloat16 weights would add up in bfloat16 over micro-batches: where there are several, and for apex,
    which writes no such weights, autocast casts the float32 ones and widens their gradients.
    """
    at_once = settings.batch_gpu in (None, settings.batch // ranks)
    if settings.precision == "bf16" and at_once and settings.optimizer != "apex":
        return with_bf16_weights(network)
    return network


def build_optimizer(network: nn.Module, settings: TrainingSettings, working: nn.Module | None = None) -> AdamEMA:
    """One group, one average, in the order of ``network.parameters()``; float32 master weights.

    working : what the gradients come from, where that is `working_network`'s copy

    Raises
    ------
    InputError : apex is asked for and not available, or the network is not on a GPU
    """
    params = list(network.parameters())
    if settings.optimizer == "apex":
        need_apex(params[0].device)
    kind = ApexAdamEMA if settings.optimizer == "apex" else AdamEMA
    pairs = zip(params, (working or network).parameters(), strict=True)
    return kind(
        params,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decoupled_weight_decay=settings.optimizer == "adamw",
        capturable=params[0].is_cuda,
        emas=1,
        leaves={p: leaf for p, leaf in pairs if leaf is not p},
    )


def need_apex(device: torch.device) -> None:
    """InputError where ``training.optimizer: apex`` cannot run on `device`."""
    if (why := missing(device)) is not None:
        raise InputError(f"training.optimizer apex: {why}; use adam, which needs no other package")


def learning_rate(nimg: int, settings: TrainingSettings) -> float:
    """Linear ramp over the first lr_rampup_kimg thousand images, then constant (EDM)."""
    return settings.lr * min(nimg / max(settings.lr_rampup_kimg * 1000, 1e-8), 1.0)


def ema_beta(nimg: int, settings: TrainingSettings) -> float:
    """Decay of the average in a step that ends at `nimg` images: 0.5^(batch / half-life) (EDM).

    The half-life is at most `ema_rampup_ratio` of the images seen, so that early weights are forgotten; 0 keeps none.
    """
    halflife = settings.ema_halflife_kimg * 1000
    if settings.ema_rampup_ratio is not None:
        halflife = min(halflife, nimg * settings.ema_rampup_ratio)
    return float(0.5 ** (settings.batch / halflife)) if halflife > 0 else 0.0


def ema_weights(optimizer: AdamEMA, names: Sequence[str]) -> dict[str, Tensor]:
    """The averages by parameter name; no copies."""
    return dict(zip(names, optimizer.emas[0], strict=True))


@torch.no_grad()
def load_ema_weights(optimizer: AdamEMA, names: Sequence[str], weights: dict[str, Tensor]) -> None:
    for name, ema in ema_weights(optimizer, names).items():
        ema.copy_(weights[name])


def optimizer_tensors(optimizer: AdamEMA, names: Sequence[str]) -> dict[str, Tensor]:
    """State by parameter name, flat, for safetensors: ``exp_avg.enc.16x16_conv.weight`` and so on."""
    state = optimizer.state_dict()["state"]
    return {f"{key}.{names[index]}": value for index, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: AdamEMA, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        key, name = flat.split(".", 1)
        state.setdefault(index_of[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
