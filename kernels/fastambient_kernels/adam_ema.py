"""Adam or AdamW, clean-up and clipping of gradients, and moving averages of the weights, in one pass over memory.

Mathematics
-----------
For each parameter p with gradient g, state m, v and step t (t counts from 1), and averages e_1..e_k with decays b_i:

    g <- 0 where NaN, +-1e5 where +-inf              nonfinite = number of entries replaced
    norm = |g| over all parameters
    g <- g * min(1, max_norm / (norm + 1e-6))        only with max_norm, as torch.nn.utils.clip_grad_norm_
    g <- g + weight_decay * p                        weight decay of Adam (coupled)
    p <- p * (1 - lr * weight_decay)                 or of AdamW (decoupled)
    m <- beta1 * m + (1 - beta1) * g
    v <- beta2 * v + (1 - beta2) * g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    e_i <- b_i * e_i + (1 - b_i) * p
    leaf <- p, rounded to bfloat16                   only where p has one, whose gradient is g then

(Kingma and Ba, "Adam", arXiv 1412.6980, Algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2.) The
clean-up is EDM's (Karras et al., arXiv 2206.00364). One pass reads p, g, m, v, e and writes p, m, v, e: 36 bytes a
parameter in float32 with one average, and as many with a leaf, whose gradient is half as large. The gradient itself is
not written. Sums of squares are float64 over fixed chunks in a fixed order, so that the norm does not depend on the
number of threads. With max_norm a pass over g comes first.

Interface
---------
What the fast implementations get is a table of addresses (`adam_ema_table.py`): handing 2,700 tensors of a large
network to an operator takes 0.6 ms at each step, about as long as a GPU's whole pass. So there is no operator to trace:
`torch.compile` leaves `step` out of its graphs; CUDA graphs can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastambient_kernels._registration import IMPLEMENTATIONS, choose
from fastambient_kernels.adam_ema_reference import Step, adam_ema_reference, average, zeros
from fastambient_kernels.adam_ema_table import CUDA_CHUNK, Table, Tensors, check_leaf, run_cuda, run_native, settle


class AdamEMA(torch.optim.Optimizer):
    """`torch.optim.Adam` (or AdamW) that also cleans and clips gradients and keeps moving averages of the parameters.

    State, defaults and `state_dict` are those of `torch.optim.Adam(fused=True)` and load into it and from it.
    Parameters must lie on one device. Float32 parameters with float32 or bfloat16 gradients run in one pass over
    memory; other floating-point types run the reference. A parameter without a gradient keeps its value, state and
    step, as in torch; its averages still move towards it, so that every average is one over the same steps.

    Parameters
    ----------
    params : iterable of parameters, of (name, parameter), or of groups
    lr : learning rate >= 0, or a tensor with one element, read on its device at each step
    betas, eps, weight_decay : as torch.optim.Adam; betas are floats
    decoupled_weight_decay : True for AdamW's decay, False for Adam's; give AdamW's default weight_decay=0.01 yourself
    amsgrad, maximize, differentiable : not supported; here so that code written for Adam gets an error
    foreach, fused : as torch.optim.Adam, without effect: `impl` chooses, and every implementation is one fused pass
    capturable : allow a step to be captured in a CUDA graph. Nothing waits for the device either way. Run one step
        before capturing; let `lr` and ``ema_betas`` be tensors on the device, since numbers are frozen into the graph
    max_norm : clip the norm of all gradients together to this; None does not clip
    emas : number of moving averages
    leaves : for float32 parameters, the bfloat16 tensor that a model computes with in their place. The parameter is its
        master: the leaf's gradient is taken for the parameter's, and a step writes the rounded parameter into the leaf
    impl : "auto", "reference", "triton" (GPU), "native" (C++ on a CPU, CUDA C++ on a GPU)

    Attributes
    ----------
    emas : for each average, its tensors in the order of parameters, groups one after the other; float32 (float64 for
        float64 parameters). They start as copies of the parameters.
    grad_norm : float64 [] on the device: norm of the cleaned gradients of the last step, before clipping
    nonfinite : int64 [] on the device: how many entries of the last step's gradients were NaN or infinite

    Raises
    ------
    ValueError, TypeError : a setting out of range; complex or integer parameters; the same parameter twice
    RuntimeError : sparse gradients; an implementation that is not available; parameters on several devices

    Notes
    -----
    A parameter that was changed by others than `step` reaches its leaf through `refresh`. Gradients of leaves are not
    seen by what looks for a parameter's gradient, such as `torch.amp.GradScaler` or `clip_grad_norm_`.

    Gradients that hold another memory layout than their parameter are copied at each step. `torch.amp.GradScaler`
    unscales gradients and skips steps itself, as with any optimizer that does not take its scale.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        emas: int = 0,
        leaves: Mapping[Tensor, Tensor] | None = None,
        impl: str = "auto",
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        if not isinstance(emas, int) or emas < 0:
            raise ValueError(f"emas must be a number of moving averages, 0 or more, got {emas!r}")
        self.max_norm, self.impl = max_norm, impl
        self.emas: list[list[Tensor]] = [[] for _ in range(emas)]
        self.leaves = dict(leaves or {})
        self._rounded: list[int] = []  # versions of the parameters that the leaves hold
        self.grad_norm: Tensor | None = None  # None before the first step
        self.nonfinite: Tensor | None = None
        self._table: Table | None = None
        self._spare: Table | None = None
        self._captured: list[Table] = []
        # The keys of torch.optim.Adam, so that a state_dict loads there and runs its fused form.
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, "foreach": None, "capturable": capturable,
            "differentiable": differentiable, "fused": True, "decoupled_weight_decay": decoupled_weight_decay,
        })  # fmt: skip
        self.refresh()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the averages of its parameters start as copies of them."""
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(foreach=None, fused=True)  # a state_dict with both set would be refused by torch's
        params = group["params"]
        if wrong := _unsupported(params):
            self.param_groups.pop()
            raise wrong
        for copies in self.emas:
            copies += [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in params]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round parameters into their leaves, if any parameter was changed in place since by others than `step`."""
        versions = [p._version for p in self.leaves]
        if versions != self._rounded:
            for p, leaf in self.leaves.items():
                check_leaf(p, leaf)
            torch._foreach_copy_(list(self.leaves.values()), list(self.leaves))
            self._rounded = versions

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, leaves included."""
        super().zero_grad(set_to_none)
        for leaf in self.leaves.values():
            if set_to_none:
                leaf.grad = None
            elif leaf.grad is not None:
                leaf.grad = torch.zeros_like(leaf.grad)

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, ema_betas: Sequence[float | Tensor] = ()) -> Any:
        """One step.

        Parameters
        ----------
        closure : as torch's
        ema_betas : the decay of each average for this step, in [0, 1]; floats or tensors with one element

        Returns
        -------
        what the closure returned, or None
        """
        if len(ema_betas) != len(self.emas):
            raise ValueError(f"step() needs {len(self.emas)} ema_betas, one for each average, got {len(ema_betas)}")
        for beta in ema_betas:
            if isinstance(beta, Tensor) and beta.numel() != 1:
                raise ValueError(f"an ema_beta must be a number or have one element, got shape {list(beta.shape)}")
            if not isinstance(beta, Tensor) and not 0 <= beta <= 1:
                raise ValueError(f"ema_betas must lie in [0, 1], got {beta}")
        for group in self.param_groups:  # a user may have set it since
            _refuse_unsupported(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        betas = tuple(beta.reshape(()) if isinstance(beta, Tensor) else float(beta) for beta in ema_betas)
        self.refresh()  # for parameters that have no gradient now
        with torch.no_grad():
            tensors, still = self._gather()
            self.grad_norm, self.nonfinite = self._run(Step(tensors, self.param_groups, betas, self.max_norm))
            for p, emas in still:
                for ema, beta in zip(emas, betas, strict=True):
                    average(ema, p, beta)
            self._rounded = [p._version for p in self.leaves]
        return loss

    def _gather(self) -> tuple[Tensors, list[tuple[Tensor, list[Tensor]]]]:
        """(what has a gradient, what has none: parameters and their averages)"""
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        leaves, emas = [self.leaves.get(p) for p in params], self.emas
        grads: list[Any] = [(p if leaf is None else leaf).grad for p, leaf in zip(params, leaves, strict=True)]
        still = [(p, [copies[i] for copies in emas]) for i, p in enumerate(params) if grads[i] is None]
        if still:
            have = [i for i, g in enumerate(grads) if g is not None]
            columns = (params, groups, grads, leaves, *emas)
            params, groups, grads, leaves, *emas = ([column[i] for i in have] for column in columns)
        if any(g.layout is not torch.strided for g in grads):
            raise RuntimeError("AdamEMA does not support sparse gradients: use torch.optim.SparseAdam")
        states = [self.state[p] for p in params]
        if not all(states):
            for p, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        exp_avgs, exp_avg_sqs, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        return Tensors(params, grads, exp_avgs, exp_avg_sqs, steps, groups, leaves, emas), still

    def _run(self, step: Step) -> tuple[Tensor, Tensor]:
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        if not step.tensors.params:
            return zeros(device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in step.groups):
            raise RuntimeError("AdamEMA: capturing a step in a CUDA graph needs capturable=True in every group")
        impl = _choose(self.impl, device, step.tensors.params)
        if impl == "reference":
            settle(step.tensors, device)
            return adam_ema_reference(step)
        run, chunk = run_native, 0
        if impl == "triton":
            from fastambient_kernels import adam_ema_triton

            run, chunk = adam_ema_triton.run, adam_ema_triton.CHUNK
        elif device.type == "cuda":
            run, chunk = run_cuda, CUDA_CHUNK
        table = self._table_for(device, chunk, capturing=capturing)
        table.fill(step.tensors, settle=partial(settle, step.tensors, device, dense=True))
        table.set_numbers(step.groups, step.ema_betas)
        found = run(table, step.max_norm)
        leaves = [leaf for leaf in step.tensors.leaves if leaf is not None]
        for changed in (step.tensors.params, leaves, *step.tensors.emas):
            increment_version(changed)
        return found

    def _table_for(self, device: torch.device, chunk: int, *, capturing: bool) -> Table:
        """The table to fill. A captured graph reads its own at every replay: it gets one that no other step fills."""
        shape = (device, len(self.param_groups), len(self.emas), chunk)
        if self._table is None or self._table.shape != shape:
            self._table, self._spare = Table(*shape), None
        if capturing:
            if self._spare is None:
                raise RuntimeError(
                    "AdamEMA: run a step before capturing one in a CUDA graph, and again before the next graph"
                )
            table, self._spare = self._spare, None
            self._captured.append(table)
            return table
        if self._spare is None and device.type == "cuda" and all(group["capturable"] for group in self.param_groups):
            self._spare = Table(*shape)
            self._spare.reserve([p for group in self.param_groups for p in group["params"]])
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_norm", "impl", "emas", "leaves", "grad_norm", "nonfinite")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends here, too
        for group in state["param_groups"]:
            _check_group(group)
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(foreach=None, fused=True)
            for name in ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
                group.setdefault(name, self.defaults[name])
            for p in group["params"]:
                if values := self.state.get(p):
                    step = torch.as_tensor(values["step"], dtype=torch.float32, device=p.device)
                    values["step"] = step.reshape(())
        self._table, self._spare, self._rounded = None, None, []
        self.__dict__.setdefault("_captured", [])  # its graphs live on

    def ema_state(self) -> dict[str, Tensor]:
        """The averages by name, ``"<average>.<parameter>"`` with both counted from 0; not copies. They are not part of
        `state_dict`, which stays one of torch.optim.Adam."""
        return {f"{i}.{j}": ema for i, copies in enumerate(self.emas) for j, ema in enumerate(copies)}

    @torch.no_grad()
    def load_ema_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `ema_state` returned into the averages.

        Raises
        ------
        ValueError : names or shapes differ; nothing has been copied then
        """
        own = self.ema_state()
        known = own.keys() & state.keys()
        if wrong := [k for k in own.keys() | state.keys() if k not in known or own[k].shape != state[k].shape]:
            names = ", ".join(sorted(wrong)[:8])
            raise ValueError(f"averages that are missing, unexpected or of another shape: {names}")
        for name, ema in own.items():
            ema.copy_(state[name])


def _choose(impl: str, device: torch.device, params: Sequence[Tensor]) -> str:
    """As `choose`, and: types other than float32 are for the reference."""
    if not all(p.dtype is torch.float32 for p in params):
        if impl not in ("auto", "reference"):
            raise RuntimeError(f"adam_ema: impl={impl!r} needs float32 parameters, use 'reference'")
        return "reference"
    return choose("adam_ema", impl, device, torch.float32)


def _refuse_unsupported(group: Mapping[str, Any]) -> None:
    if wrong := [name for name in ("amsgrad", "maximize", "differentiable") if group.get(name)]:
        raise ValueError(f"AdamEMA does not support {wrong[0]}=True")


def _check_group(group: Mapping[str, Any]) -> None:
    _refuse_unsupported(group)
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got shape {list(lr.shape)}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_at_least_zero(b) and b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name in ("lr", "eps", "weight_decay"):
        if not _at_least_zero(group[name]) and not (name == "lr" and isinstance(lr, Tensor)):
            raise ValueError(f"{name} must be at least 0, got {group[name]!r}")


def _at_least_zero(value: Any) -> bool:
    return isinstance(value, Real) and float(value) >= 0


def _unsupported(params: Sequence[Tensor]) -> Exception | None:
    for p in params:
        if not p.is_floating_point():
            return TypeError(f"AdamEMA supports real floating-point parameters, got {p.dtype}")
    if len(set(params)) != len(params):
        return ValueError("AdamEMA: a parameter appears twice in a group")
    return None
