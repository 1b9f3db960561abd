"""The two-regime training step of ambient diffusion: noise injection with preconditioning, and the loss.

Mathematics
-----------
Shah et al., "Does Generation Require Memorization? Creative Diffusion Models using Ambient Diffusion" (ICML 2025),
Algorithm 1, in the notation of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
(EDM, 2022). A sample at noise level s is in the ambient regime iff 0 < sigma_tn <= s, else in the clean one.
With tau = sigma_tn in the ambient regime and 0 in the clean one,

    y   = x0 + tau * eps_fixed         what the sample may see: x_n, or x0 itself
    q   = sqrt(s^2 - tau^2)            computed as sqrt((s - tau)(s + tau))
    x   = y + q * eps                  network input before preconditioning
    D   = c_skip*x + c_out*F(c_in*x, c_noise)

The loss lambda(s) |prediction - y|^2 is evaluated in F-space, where it is bounded and exact in low precision:

    loss = (A*F - Y)^2,  Y = alpha*y + beta*eps
    clean:    A = 1,          alpha = s / (sd*h),           beta = -sd / h,            h = sqrt(s^2 + sd^2)
    ambient:  A = a = q^2/s^2, alpha = a*(1-c_skip)/c_out,  beta = -(tau^2*q/s^2 + c_skip*a*q)/c_out

"unit" weighting divides A and Y by a, and gives weight 0 where s < sigma_tn*sqrt(1 + 1/(m-1)), m = 4: there the
divided form is unbounded.

Coefficients are chosen per sample before anything is formed from them, so the unused regime cannot leak a NaN.
A flip acts on y and eps together: the noise moves with the image. Element indices count the unflipped C,H,W order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastambient_kernels._registration import choose, differentiable_once, register, seed_tensor
from fastambient_kernels.noise import Stream, normal

WEIGHTINGS = ("paper", "unit")
BUFFER_M = 4.0  # unit weighting: ambient draws with s/sigma_tn below sqrt(1 + 1/(m-1)) get weight 0


class Coefficients(NamedTuple):
    """Per-sample scalars, each [N] in float32 (float64 when sigma or the images are)."""

    c_in: Tensor  # network input = c_in * x
    c_noise: Tensor  # ln(sigma) / 4, the network's second input
    tau: Tensor  # sigma_tn in the ambient regime, 0 in the clean one
    q: Tensor  # standard deviation of the fresh noise
    A: Tensor  # loss = (A*F - alpha*y - beta*eps)^2
    alpha: Tensor
    beta: Tensor


class AmbientNoise(NamedTuple):
    net_input: Tensor  # c_in * x, [N, C, H, W] in `out_dtype` and `memory_format`
    coefficients: Coefficients


def is_ambient(sigma: Tensor, sigma_tn: float) -> Tensor:
    """The regime of each level: 0 < sigma_tn <= sigma. An infinite sigma_tn is plain EDM, as 0 is."""
    # In sigma's precision, so that the comparison agrees with s - tau >= 0; filled on the device, because a copy from
    # the host cannot be captured in a CUDA graph.
    level = torch.full_like(sigma, sigma_tn)
    return (sigma >= level) & (level > 0)


def coefficients(sigma: Tensor, *, sigma_tn: float, sigma_data: float, weighting: str = "paper") -> Coefficients:
    """The scalars of the module's mathematics for noise levels `sigma` (float [N], > 0)."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    _check_levels(sigma_tn, sigma_data)
    s, sd = sigma.to(torch.promote_types(sigma.dtype, torch.float32)), float(sigma_data)
    ambient = is_ambient(s, sigma_tn)
    tau = torch.where(ambient, s.new_tensor(sigma_tn), 0.0)  # finite in both regimes, also for sigma_tn = inf
    h = torch.sqrt(s * s + sd * sd)
    c_in, c_skip, c_out = 1 / h, (sd / h) ** 2, s * sd / h
    q = torch.sqrt((s - tau) * (s + tau))  # s^2 - tau^2 would cancel near tau
    a = (q / s) ** 2
    if weighting == "paper":
        A, alpha, beta = a, a * (1 - c_skip) / c_out, -((tau / s) ** 2 * q + c_skip * a * q) / c_out
    else:
        kept = s >= tau * (1 + 1 / (BUFFER_M - 1)) ** 0.5
        safe_q = torch.where(q > 0, q, 1.0)  # q = 0 lies inside the buffer
        A = kept.to(s.dtype)
        alpha = torch.where(kept, (1 - c_skip) / c_out, 0.0)
        beta = torch.where(kept, -(tau * tau / safe_q + c_skip * q) / c_out, 0.0)
    # The clean regime has its own form: the ambient one at tau = 0 is the same number up to rounding, and inexact.
    A = torch.where(ambient, A, 1.0)
    alpha = torch.where(ambient, alpha, s / (sd * h))
    beta = torch.where(ambient, beta, -sd / h)
    return Coefficients(c_in, torch.log(s) / 4, tau, q, A, alpha, beta)


def _per_sample(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _check_levels(sigma_tn: float, sigma_data: float) -> None:
    if not sigma_tn >= 0:
        raise ValueError(f"sigma_tn must be 0 or more, got {sigma_tn}")
    if not 0 < sigma_data < float("inf"):
        raise ValueError(f"sigma_data must be above 0 and finite, got {sigma_data}")


def _check(
    images: Tensor, ids: Tensor, flips: Tensor | None, positions: Tensor, sigma: Tensor, x_n: Tensor | None,
    sigma_tn: float, sigma_data: float,
) -> None:  # fmt: skip
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(f"images must be uint8 or float [N, C, H, W], got {images.dtype} {list(images.shape)}")
    _check_levels(sigma_tn, sigma_data)
    each = (images.shape[0],)  # len() would be a constant of a compiled graph
    for name, value, shape, kind in (
        ("ids", ids, each, "int64"), ("positions", positions, each, "int64"), ("sigma", sigma, each, "float"),
        ("flips", flips, each, "bool"), ("x_n", x_n, images.shape, "float"),
    ):  # fmt: skip
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
        if not (value.is_floating_point() if kind == "float" else value.dtype == getattr(torch, kind)):
            raise TypeError(f"{name} must be {kind}, got {value.dtype}")
        if value.device != images.device:
            raise ValueError(f"{name} must be on the images' device, {images.device}, not on {value.device}")


@torch.no_grad()  # as in the fast paths, F alone has a gradient
def _visible_and_fresh(
    images: Tensor, ids: Tensor, positions: Tensor, c: Coefficients, sigma_tn: float, noise_seed: int | Tensor,
    run_seed: int | Tensor, x_n: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, eps), unflipped, in the working precision."""
    work = c.q.dtype
    x0 = images.to(work) / 127.5 - 1 if images.dtype == torch.uint8 else images.to(work)
    numel = x0.shape[1:].numel()
    if not 0 < sigma_tn < float("inf"):
        y = x0  # plain EDM
    elif x_n is None:
        fixed = normal(ids, numel, seed=noise_seed, stream=Stream.FIXED, dtype=work).view_as(x0)
        y = x0 + _per_sample(c.tau) * fixed
    else:
        y = torch.where(_per_sample(c.tau > 0), x_n.to(work), x0)
    return y, normal(positions, numel, seed=run_seed, stream=Stream.FRESH, dtype=work).view_as(x0)


def _flip(x: Tensor, flips: Tensor | None) -> Tensor:
    return x if flips is None else torch.where(_per_sample(flips.bool()), x.flip(3), x)


def _working_sigma(sigma: Tensor, images: Tensor) -> Tensor:
    return sigma.double() if images.dtype == torch.float64 else sigma


@torch.no_grad()
def _reference_noise(
    images: Tensor, ids: Tensor, flips: Tensor | None, positions: Tensor, sigma: Tensor, x_n: Tensor | None,
    noise_seed: int | Tensor, run_seed: int | Tensor, sigma_tn: float, sigma_data: float, out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> AmbientNoise:  # fmt: skip
    c = coefficients(_working_sigma(sigma, images), sigma_tn=sigma_tn, sigma_data=sigma_data)
    y, eps = _visible_and_fresh(images, ids, positions, c, sigma_tn, noise_seed, run_seed, x_n)
    net_input = _flip(_per_sample(c.c_in) * (y + _per_sample(c.q) * eps), flips)
    return AmbientNoise(net_input.to(out_dtype, memory_format=memory_format), c)


def _scaled(dF: Tensor, grad: Tensor) -> Tensor:
    """dF of each sample times its gradient, rounded once: 1/96 in bfloat16 would shift every entry by 0.2 %."""
    return (dF * _per_sample(grad)).to(dF.dtype)


class _ReferenceLoss(torch.autograd.Function):
    """Keeps dF from the forward pass; backward only scales it."""

    @staticmethod
    def forward(ctx, F: Tensor, A: Tensor, Y: Tensor) -> Tensor:  # type: ignore[override]
        residual = _per_sample(A) * F.to(Y.dtype) - Y
        # dF takes F's dtype: for bf16 networks it is half the memory, and autograd would round it anyway.
        ctx.save_for_backward((2 * _per_sample(A) * residual).to(F.dtype))
        return residual.square().flatten(1).sum(1)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (dF,) = ctx.saved_tensors
        return _scaled(dF, grad), None, None


# Registered fast paths: torch.ops.fastambient.ambient_{noise,loss}_{native,triton}. The arguments are those of the
# public functions in a fixed form: float32 sigma, seeds as tensors, uint8 or float32 images, x_n in half or float32.

_DATA = (
    "Tensor images, Tensor ids, Tensor? flips, Tensor positions, Tensor sigma, Tensor? x_n, Tensor noise_seed,"
    " Tensor run_seed, float sigma_tn, float sigma_data"
)


def _run_noise(impl: str) -> Any:
    def run(
        images: Tensor, ids: Tensor, flips: Tensor | None, positions: Tensor, sigma: Tensor, x_n: Tensor | None,
        noise_seed: Tensor, run_seed: Tensor, sigma_tn: float, sigma_data: float, dtype: torch.dtype,
        channels_last: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        net_input, table = _empty_noise(images, dtype, channels_last)
        data = (ids, flips, positions, sigma, x_n, noise_seed, run_seed, sigma_tn, sigma_data, channels_last)
        if impl == "native":
            torch.ops.fastambient_native.ambient_noise(images, *data, net_input, table)
        else:
            from fastambient_kernels import ambient_triton  # type: ignore[attr-defined]

            ambient_triton.noise(net_input, table, images, *data)
        return net_input, table

    return run


def _empty_noise(images: Tensor, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net_input = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=layout)
    return net_input, torch.empty(len(Coefficients._fields), images.shape[0], dtype=torch.float32, device=images.device)


def _fake_noise(images: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_noise(images, rest[-2], rest[-1])


def _run_loss(impl: str) -> Any:
    def run(F: Tensor, images: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dF = torch.empty_like(F)
        if impl == "native":
            losses = torch.empty(F.shape[0], dtype=torch.float32, device=F.device)
            torch.ops.fastambient_native.ambient_loss(F, images, *rest, dF, losses)
            return losses, dF
        from fastambient_kernels import ambient_triton  # type: ignore[attr-defined]

        return ambient_triton.loss(dF, F, images, *rest), dF

    return run


def _fake_loss(F: Tensor, images: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return F.new_empty(F.shape[0], dtype=torch.float32), torch.empty_like(F)


_noise_ops, _loss_ops = (
    {
        impl: register(f"ambient_{name}_{impl}({schema}) -> (Tensor, Tensor)", run(impl), fake)
        for impl in ("native", "triton")
    }
    for name, schema, run, fake in (
        ("noise", f"{_DATA}, ScalarType dtype, bool channels_last", _run_noise, _fake_noise),
        ("loss", f"Tensor F, {_DATA}, bool unit, bool channels_last", _run_loss, _fake_loss),
    )
)


class _FastLoss(torch.autograd.Function):
    """A registered loss: dF comes out of the forward pass, backward only scales it."""

    @staticmethod
    def forward(ctx, F: Tensor, impl: str, *rest: Any) -> Tensor:  # type: ignore[override]
        loss, dF = _loss_ops[impl](F, *rest)
        ctx.save_for_backward(dF)
        ctx.unused = len(rest) + 1
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (dF,) = ctx.saved_tensors
        return _scaled(dF, grad), *[None] * ctx.unused


def _fixed_form(
    images: Tensor, ids: Tensor, flips: Tensor | None, positions: Tensor, sigma: Tensor, x_n: Tensor | None,
    noise_seed: int | Tensor, run_seed: int | Tensor, sigma_tn: float, sigma_data: float,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of a registered operator."""
    device = images.device
    if x_n is not None:
        x_n = (x_n if x_n.dtype == torch.float16 else x_n.float()).contiguous()
    return (
        (images if images.dtype == torch.uint8 else images.float()).contiguous(),
        ids.contiguous(), None if flips is None else flips.bool().contiguous(), positions.contiguous(),
        sigma.float().contiguous(), x_n, seed_tensor(noise_seed, device), seed_tensor(run_seed, device),
        float(sigma_tn), float(sigma_data),
    )  # fmt: skip


def _work_dtype(images: Tensor, sigma: Tensor, network: torch.dtype) -> torch.dtype:
    """What decides whether a fast path fits: float64 anywhere asks for the reference."""
    return torch.float64 if torch.float64 in (images.dtype, sigma.dtype) else network


def ambient_noise(
    images: Tensor,
    ids: Tensor,
    flips: Tensor | None,
    positions: Tensor,
    sigma: Tensor,
    *,
    sigma_tn: float,
    sigma_data: float,
    noise_seed: int | Tensor,
    run_seed: int | Tensor,
    x_n: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    impl: str = "auto",
) -> AmbientNoise:
    """Noise a batch for one training step and precondition it: what the network is given.

    Parameters
    ----------
    images : uint8 [N, C, H, W] in 0..255, or float **already scaled** to [-1, 1], as ``images / 127.5 - 1``. Floats are
        not checked, which would take as long as the operator on a CPU and a wait on a GPU: ``images.float()`` of
        0..255 trains without an error, on pictures of 127 times the contrast. Pass uint8 as it is.
    ids : int64 [N], image ids of the noise contract: equal images must have equal ids
    flips : bool [N] or None; true mirrors a sample along its width together with its noise
    positions : int64 [N], images seen so far + index in the global batch
    sigma : float [N], noise levels > 0
    sigma_tn : noise level of the training set, used in sigma's precision; 0 or infinite is plain EDM
    sigma_data : standard deviation of the data
    noise_seed, run_seed : 64 bits each, as a Python integer or a one-element int64 tensor; `noise_seed` is a secret
    x_n : float [N, C, H, W], the precomputed noised images (unflipped), or None to regenerate them
    out_dtype : dtype of the network input; default float32 (float64 for float64 images)
    memory_format : memory format of the network input; default contiguous
    impl : "auto", "reference", "triton" or "native"

    Returns
    -------
    AmbientNoise(net_input, coefficients)

    Raises
    ------
    TypeError, ValueError : wrong dtypes, shapes or ranges
    RuntimeError : the implementation that was asked for is not available here

    Source: Shah et al. 2025, Algorithm 1; EDM, Table 1.
    """
    _check(images, ids, flips, positions, sigma, x_n, sigma_tn, sigma_data)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a float dtype, got {out_dtype}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")
    dtype = out_dtype or _work_dtype(images, sigma, torch.float32)
    layout = memory_format or torch.contiguous_format
    taken = choose("ambient_noise", impl, images.device, _work_dtype(images, sigma, dtype))
    data = (images, ids, flips, positions, sigma, x_n, noise_seed, run_seed, sigma_tn, sigma_data)
    if taken == "reference" or images.numel() == 0:
        return _reference_noise(*data, dtype, layout)
    net_input, table = _noise_ops[taken](*_fixed_form(*data), dtype, layout == torch.channels_last)
    return AmbientNoise(net_input, Coefficients(*table.unbind(0)))


def ambient_loss(
    F: Tensor,
    images: Tensor,
    ids: Tensor,
    flips: Tensor | None,
    positions: Tensor,
    sigma: Tensor,
    *,
    sigma_tn: float,
    sigma_data: float,
    noise_seed: int | Tensor,
    run_seed: int | Tensor,
    x_n: Tensor | None = None,
    weighting: str = "paper",
    impl: str = "auto",
) -> Tensor:
    """The two-regime loss of the network's raw output `F`, on the same draws as `ambient_noise`.

    Parameters are those of `ambient_noise`, and

    F : float [N, C, H, W], the raw network output for ``net_input`` and ``coefficients.c_noise``
    weighting : "paper" (Algorithm 1) or "unit" (divided by a^2, zero in the buffer above sigma_tn)

    Returns
    -------
    float32 [N] (float64 for float64 images): lambda(s) |prediction - target|^2 summed over channels and pixels.
    EDM's objective is its mean over the batch. Differentiable in `F` alone.
    """
    _check(images, ids, flips, positions, sigma, x_n, sigma_tn, sigma_data)
    if F.shape != images.shape or not F.is_floating_point():
        raise TypeError(f"F must be float {list(images.shape)}, got {F.dtype} {list(F.shape)}")
    if F.device != images.device:
        raise ValueError(f"F must be on the images' device, {images.device}, not on {F.device}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    taken = choose("ambient_loss", impl, images.device, _work_dtype(images, sigma, F.dtype))
    if taken == "reference" or images.numel() == 0:
        c = coefficients(_working_sigma(sigma, images), sigma_tn=sigma_tn, sigma_data=sigma_data, weighting=weighting)
        y, eps = _visible_and_fresh(images, ids, positions, c, sigma_tn, noise_seed, run_seed, x_n)
        return _ReferenceLoss.apply(F, c.A, _flip(_per_sample(c.alpha) * y + _per_sample(c.beta) * eps, flips))
    data = _fixed_form(images, ids, flips, positions, sigma, x_n, noise_seed, run_seed, sigma_tn, sigma_data)
    channels_last = not F.is_contiguous() and F.is_contiguous(memory_format=torch.channels_last)
    F = F if channels_last else F.contiguous()
    return _FastLoss.apply(F, taken, *data, weighting == "unit", channels_last)
