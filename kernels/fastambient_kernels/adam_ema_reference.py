"""The step of `AdamEMA` in plain torch: the formulas of `adam_ema.py`, whatever the device and the type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastambient_kernels.adam_ema_table import Tensors

GRAD_LIMIT = 1e5  # what an infinite gradient becomes


class Step(NamedTuple):
    """What one step works on, whatever the implementation."""

    tensors: Tensors
    groups: list[dict[str, Any]]
    ema_betas: tuple[float | Tensor, ...]
    max_norm: float | None


def adam_ema_reference(step: Step) -> tuple[Tensor, Tensor]:
    """The step in plain torch, on any device, in float64 where parameters are; waits for no device.

    Returns
    -------
    (norm of the cleaned gradients before clipping: float64 [], entries replaced: int64 [])
    """
    params, grads, exp_avgs, exp_avg_sqs, steps, groups, leaves, emas = step.tensors
    squares, nonfinite = zeros(params[0].device)
    clean = []
    for p, g in zip(params, grads, strict=True):
        g = g.to(torch.promote_types(p.dtype, torch.float32))
        nonfinite += (~g.isfinite()).sum()
        g = torch.nan_to_num(g, nan=0.0, posinf=GRAD_LIMIT, neginf=-GRAD_LIMIT)
        squares += g.double().square().sum()
        clean.append(g)
    norm = squares.sqrt()
    if step.max_norm is not None:
        scale = (step.max_norm / (norm + 1e-6)).clamp(max=1.0)
        clean = [g * scale for g in clean]
    for p, g, m, v, t, group in zip(params, clean, exp_avgs, exp_avg_sqs, steps, groups, strict=True):
        _adam(p, g, m, v, t, step.groups[group])
    for p, leaf in zip(params, leaves, strict=True):
        if leaf is not None:
            leaf.copy_(p)
    for copies, beta in zip(emas, step.ema_betas, strict=True):
        for ema, p in zip(copies, params, strict=True):
            average(ema, p, beta)
    return norm, nonfinite


def zeros(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)


def _adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, group: Mapping[str, Any]) -> None:
    lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    step.add_(1)
    correction1, correction2 = (1 - beta ** step.double() for beta in (beta1, beta2))
    stored = (p, m, v)
    p, m, v = (t.to(g.dtype) for t in stored)  # low-precision parameters compute in float32
    if weight_decay and group["decoupled_weight_decay"]:
        p.mul_(1 - lr * weight_decay)
    elif weight_decay:
        g = g.add(p, alpha=weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.sub_(m / (v.sqrt() / correction2.sqrt() + group["eps"]) * (lr / correction1))
    for old, new in zip(stored, (p, m, v), strict=True):
        if new is not old:
            old.copy_(new)


def average(ema: Tensor, p: Tensor, beta: float | Tensor) -> None:
    """ema <- beta * ema + (1 - beta) * p"""
    weight = 1 - beta
    ema.lerp_(p.to(ema.dtype), weight.to(ema) if isinstance(weight, Tensor) else weight)
