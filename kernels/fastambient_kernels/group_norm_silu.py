"""Group norm with its neighbours fused: silu(GN(x + add)*(1 + scale) + shift).

Mathematics
-----------
With u = x + add (add per sample and channel) and, over each (sample, group), mean m and variance v of u,

    z = (u - m) * rstd,   rstd = 1/sqrt(v + eps),   w = (z*weight + bias)*(1 + scale) + shift,   y = silu(w)

Backward, with dw = dy*silu'(w), k = weight*(1 + scale), and <.> the mean over a (sample, group):

    dx = rstd*(k*dw - <k*dw> - z*<k*dw*z>)
    d_weight = sum_n (1+scale) sum_p dw*z      d_scale = sum_p dw*(z*weight + bias)      d_add = sum_p dx
    d_bias   = sum_n (1+scale) sum_p dw        d_shift = sum_p dw

Statistics are float32 at least, and shifted: never E[x^2] - E[x]^2. The forward pass keeps x, m and rstd, and backward
makes z again. The sums over samples and pixels run in a fixed order: a gradient does not depend on the number of
threads. Wu & He, "Group Normalization" (2018); the arrangement of add, scale and shift is that of EDM's blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastambient_kernels._registration import choose, differentiable_once, register


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """Plain torch in at least float32, differentiable, returned in x's dtype."""
    # torch's kernels round mean and variance to the input's dtype, so low precision is widened before them.
    work = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)

    def spread(value: Tensor) -> Tensor:
        return value.to(work).reshape(*value.shape, *[1] * (x.dim() - 2))

    u = x.to(work)
    if add is not None:
        u = u + spread(add)
    if not u.is_contiguous():
        # torch's channels-last kernel on the CPU computes E[x^2] - E[x]^2, so it is given values around 0. A constant
        # changes neither the norm nor its gradient: no need to differentiate the mean.
        by_group = u.detach().unflatten(1, (groups, -1))
        mean = by_group.mean(tuple(range(2, by_group.dim())), keepdim=True)
        u = u - mean.expand(-1, -1, by_group.shape[2], *mean.shape[3:]).flatten(1, 2)
    w = F.group_norm(u, groups, weight.to(work), bias.to(work), eps)
    if scale is not None:
        w = w * (spread(scale) + 1)
    if shift is not None:
        w = w + spread(shift)
    return (F.silu(w) if silu else w).to(x.dtype)


_OPTIONAL = "Tensor? scale, Tensor? shift, Tensor? add, int groups"


def _empty_forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = x.shape[0]
    return torch.empty_like(x), weight.new_empty(n, groups), weight.new_empty(n, groups)


def _empty_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, channels = x.shape[0], x.shape[1]
    # A registered operator always returns tensors: empty ones where there is no such input. d_shift, the sum of dw, is
    # always made: other sums are made of it.
    d_scale = weight.new_empty(0) if scale is None else weight.new_empty(n, channels)
    d_add = weight.new_empty(0) if add is None else weight.new_empty(n, channels)
    d_shift = weight.new_empty(n, channels)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), d_scale, d_shift, d_add


def _module(impl: str) -> Any:
    """What holds the functions group_norm_silu and group_norm_silu_backward that fill given outputs."""
    if impl == "native":
        return torch.ops.fastambient_native
    from fastambient_kernels import group_norm_silu_triton  # type: ignore[attr-defined]

    return group_norm_silu_triton


def _run_forward(impl: str) -> Any:
    def run(
        x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
        groups: int, eps: float, silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        outputs = _empty_forward(x, weight, bias, scale, shift, add, groups, eps, silu)
        _module(impl).group_norm_silu(x, weight, bias, scale, shift, add, *outputs, groups, eps, silu)
        return outputs

    return run


def _run_backward(impl: str) -> Any:
    def run(
        dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
        shift: Tensor | None, add: Tensor | None, groups: int, silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        outputs = _empty_backward(dy, x, mean, rstd, weight, bias, scale, shift, add, groups, silu)
        dx, d_weight, d_bias, d_scale, d_shift, d_add = outputs
        _module(impl).group_norm_silu_backward(
            dy, x, mean, rstd, weight, bias, scale, shift, add, dx, d_shift, torch.empty_like(d_shift),
            d_weight, d_bias, None if scale is None else d_scale, None if add is None else d_add, groups, silu,
        )  # fmt: skip
        return outputs

    return run


_forward_ops, _backward_ops = {}, {}
for _impl in ("native", "triton"):
    _forward_ops[_impl] = register(
        f"group_norm_silu_{_impl}(Tensor x, Tensor weight, Tensor bias, {_OPTIONAL}, float eps, bool silu)"
        " -> (Tensor, Tensor, Tensor)",
        _run_forward(_impl),
        _empty_forward,
    )
    _backward_ops[_impl] = register(
        f"group_norm_silu_backward_{_impl}(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
        f" {_OPTIONAL}, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _run_backward(_impl),
        _empty_backward,
    )


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
        groups: int, eps: float, silu: bool, impl: str,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = _forward_ops[impl](x, weight, bias, scale, shift, add, groups, eps, silu)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, add)
        ctx.groups, ctx.silu, ctx.impl = groups, silu, impl
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        x, mean, rstd, weight, bias, scale, shift, add = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format_of(x))  # it may be expanded, or in another format
        dx, d_weight, d_bias, d_scale, d_shift, d_add = _backward_ops[ctx.impl](
            dy, x, mean, rstd, weight, bias, scale, shift, add, ctx.groups, ctx.silu
        )
        return (
            dx, d_weight, d_bias, None if scale is None else d_scale, None if shift is None else d_shift,
            None if add is None else d_add, None, None, None, None,
        )  # fmt: skip


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format to work in: channels-last where a pixel's channels lie side by side, else contiguous."""
    if x.is_contiguous() or x.dim() not in (4, 5) or x.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """silu(GN(x + add)*(1 + scale) + shift); gradients of every input.

    Parameters
    ----------
    x : float [N, C, ...], contiguous or channels-last; float32 or bfloat16. Under "auto", float64 (of x or weight)
        goes through the reference, whatever FASTAMBIENT_IMPL says
    weight, bias : float [C]
    groups : divides C
    scale, shift, add : float [N, C], or None
    silu : False leaves the activation out
    impl : "auto", "reference", "triton" or "native"

    Returns
    -------
    [N, C, ...] in x's dtype and memory format

    Raises
    ------
    TypeError, ValueError : shapes or dtypes that do not fit
    RuntimeError : the implementation that was asked for is not available here
    """
    shape, dtype = x.shape, x.dtype  # each look at a tensor is time
    if len(shape) < 2 or not dtype.is_floating_point:
        raise TypeError(f"x must be float [N, C, ...], got {dtype} {list(shape)}")
    n, channels = shape[0], shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups cannot share {channels} channels equally")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    _check("weight", weight, (channels,), x)
    _check("bias", bias, (channels,), x)
    for name, value in (("scale", scale), ("shift", shift), ("add", add)):
        if value is not None:
            _check(name, value, (n, channels), x)
    if dtype == torch.float64 or weight.dtype == torch.float64:
        dtype = torch.float64
        if impl == "auto":
            impl = "reference"
    taken = choose("group_norm_silu", impl, x.device, dtype)
    if taken == "reference" or x.numel() == 0:
        return reference(x, weight, bias, groups, eps, scale, shift, add, silu)
    # Casts are differentiable: parameters of another dtype get their gradient in it.
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    scale = None if scale is None else _rows(scale)
    shift = None if shift is None else _rows(shift)
    add = None if add is None else _rows(add)
    x = x.contiguous(memory_format=memory_format_of(x))
    if not torch.is_grad_enabled():  # sampling: autograd's part of a call would cost as much as a small norm
        return _forward_ops[taken](x, weight, bias, scale, shift, add, groups, eps, silu)[0]
    return _GroupNormSiLU.apply(x, weight, bias, scale, shift, add, groups, eps, silu, taken)


def _check(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be float, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}, not on {value.device}")


def _rows(v: Tensor) -> Tensor:
    """In float32, rows side by side; views of a wider tensor (a part of an affine layer's output) stay as they are."""
    v = v.float()
    return v if v.is_contiguous() or v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous()


class GroupNormSiLU(nn.Module):
    """`group_norm_silu` with parameters of its own; state_dict as torch.nn.GroupNorm's.

    Parameters
    ----------
    groups, channels, eps : as in torch.nn.GroupNorm, in its order
    silu : False for the norm alone
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, silu: bool = True, impl: str = "auto") -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"{groups} groups cannot share {channels} channels equally")
        self.groups, self.eps, self.silu, self.impl = groups, eps, silu, impl
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    @classmethod
    def from_torch(cls, norm: nn.GroupNorm, *, silu: bool = True, impl: str = "auto") -> GroupNormSiLU:
        """In place of `norm` (and of the nn.SiLU after it), sharing its parameters.

        Raises
        ------
        ValueError : the norm has no weight and bias
        """
        if norm.weight is None or norm.bias is None:
            raise ValueError("the GroupNorm must be affine: it has no weight and bias to share")
        module = cls(norm.num_groups, norm.num_channels, norm.eps, silu=silu, impl=impl)
        module.weight, module.bias = norm.weight, norm.bias
        return module

    def forward(
        self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(
            x, self.weight, self.bias, groups=self.groups, eps=self.eps, scale=scale, shift=shift, add=add,
            silu=self.silu, impl=self.impl,
        )  # fmt: skip
