"""The step of `AdamEMA` with NVIDIA's apex: FusedAdam between a clean-up and foreach averages. CUDA alone.

FusedAdam (github.com/NVIDIA/apex, `apex.optimizers` over the extension `amp_C`) does the two moments and the weights of
many tensors in one launch. It neither cleans gradients nor averages weights: a finite norm, which two launches find,
shows that there is nothing to clean up, and `torch._foreach_lerp_` averages. State, `state_dict` and averages are
AdamEMA's own tensors, which FusedAdam borrows: checkpoints of one load into the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastambient_kernels.adam_ema import AdamEMA
from fastambient_kernels.adam_ema_reference import GRAD_LIMIT, Step, zeros
from fastambient_kernels.adam_ema_table import layout, settle

DEVICES = ("cuda",)  # that FusedAdam runs on


def missing(device: torch.device) -> str | None:
    """Why this optimizer is not available on `device`, or None."""
    if device.type not in DEVICES:
        return f"NVIDIA's apex runs on CUDA alone, not on {device.type}"
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception as error:  # the other project of this name fails in ways of its own
        if isinstance(error, ModuleNotFoundError) and error.name == "apex":
            return (
                "NVIDIA's apex is not installed; it is built from github.com/NVIDIA/apex"
                " (what PyPI calls apex is another project)"
            )
        return (
            "what is installed as apex has no optimizers.FusedAdam: what PyPI calls apex is another project,"
            " NVIDIA's is built from github.com/NVIDIA/apex"
        )
    try:
        import amp_C  # noqa: F401
    except ImportError:
        return "NVIDIA's apex is installed without its CUDA extension amp_C: build it with --cpp_ext --cuda_ext"
    return None


class ApexAdamEMA(AdamEMA):
    """`AdamEMA` over apex's FusedAdam: the same arguments (but `impl`), attributes, numbers and state.

    FusedAdam counts steps by group: a parameter that had no gradient in some step is corrected as if it had had one.
    Gradients are cleaned in place, and copied where their type or memory layout is not their parameter's.

    Raises
    ------
    RuntimeError : apex is not available, see `missing`; parameters are not float32, as FusedAdam's moments are, or have
        leaves
    """

    _fused: Any = None  # made at the first step, and again after the state or the groups have changed
    _count: int = 0  # steps taken: FusedAdam wants it on the host

    def __init__(self, params: Any, **keywords: Any) -> None:
        super().__init__(params, impl="reference", **keywords)
        device = self.param_groups[0]["params"][0].device
        if (why := missing(device)) is not None:
            raise RuntimeError(f"apex: {why}")
        if any(p.dtype is not torch.float32 for group in self.param_groups for p in group["params"]):
            raise RuntimeError("apex: FusedAdam keeps float32 moments, give it float32 parameters")
        if self.leaves:
            raise RuntimeError("apex: FusedAdam writes no leaves, use AdamEMA")

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends here, too
        super().__setstate__(state)
        self._fused = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._fused = None

    def _run(self, step: Step) -> tuple[Tensor, Tensor]:
        params, _, exp_avgs, exp_avg_sqs, steps, _, _, emas = step.tensors
        device = self.param_groups[0]["params"][0].device
        if not params:
            return zeros(device)
        settle(step.tensors, device)  # FusedAdam reads memory, whatever the strides say
        for p in params:
            if p.grad is not None and (p.grad.dtype is not p.dtype or layout(p.grad) != layout(p)):
                p.grad = torch.empty_like(p).copy_(p.grad)
        grads = [p.grad for p in params if p.grad is not None]
        norm, nonfinite = _norm(grads), torch.zeros((), dtype=torch.int64, device=device)
        if not norm.isfinite():
            for g in grads:
                nonfinite += (~g.isfinite()).sum()
                torch.nan_to_num_(g, nan=0.0, posinf=GRAD_LIMIT, neginf=-GRAD_LIMIT)
            norm = _norm(grads)
        if step.max_norm is not None:
            torch._foreach_mul_(grads, (step.max_norm / (norm + 1e-6)).clamp(max=1.0).float())

        if self._fused is None:
            from apex.optimizers import FusedAdam

            groups = [{"params": list(group["params"])} for group in self.param_groups]
            self._fused = FusedAdam(groups, adam_w_mode=self.defaults["decoupled_weight_decay"])
            self._count = int(torch.stack(steps).max())
        for p, m, v in zip(params, exp_avgs, exp_avg_sqs, strict=True):
            self._fused.state[p].update(exp_avg=m, exp_avg_sq=v)
        for ours, theirs in zip(step.groups, self._fused.param_groups, strict=True):
            theirs.update({name: ours[name] for name in ("betas", "eps", "weight_decay")})
            theirs.update(lr=float(ours["lr"]), step=self._count)  # it adds one
        self._fused.step()
        self._count += 1
        torch._foreach_add_(steps, 1)
        for copies, beta in zip(emas, step.ema_betas, strict=True):
            torch._foreach_lerp_(copies, [p.detach() for p in params], 1 - float(beta))
        increment_version([*params, *exp_avgs, *exp_avg_sqs])
        return norm, nonfinite


def _norm(grads: list[Tensor]) -> Tensor:
    """float64 []: of all gradients together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)))
