"""Dropout whose mask is a function of (seed, position, layer, element), and is never stored.

Mathematics
-----------
Element e of a sample, counted with the channel fastest (memory order in channels-last), is kept iff

    half e % 2 (low first) of word layer * 2^26 + e // 2 of (seed, Stream.DROPOUT, position)  >=  round(65536 * p)

and is then divided by 1 - p (Srivastava et al. 2014; "inverted" scaling). The words are those of noise.py, one for two
elements: no batch split, rank, resume or memory format changes a mask. Dropout is its own adjoint: backward is the
same pass over dy, with the mask made again, so that nothing but the positions is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastambient_kernels._registration import choose, register, seed_tensor
from fastambient_kernels.noise import Stream, random_words

LAYER_WORDS = 2**26  # set aside for one layer of one sample
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
MAX_LAYERS = 256  # the generator's element counter has 32 bits and counts words by four


def keep_mask(positions: Tensor, count: int, *, p: float, seed: int | Tensor, layer: int, impl: str = "auto") -> Tensor:
    """What dropout keeps of `count` elements: bool [N, count] for positions int64 [N]."""
    first = layer * LAYER_WORDS
    words = random_words(positions, -(-count // 2), seed=seed, stream=Stream.DROPOUT, first=first, impl=impl)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :count]
    return halves >= _threshold(p)


def _threshold(p: float) -> int:
    return round(p * 65536)


def reference(x: Tensor, positions: Tensor, seed: int | Tensor, layer: int, p: float) -> Tensor:
    """Plain torch, in at least float32, differentiable, returned in x's dtype."""
    mask = keep_mask(positions, x.shape[1:].numel(), p=p, seed=seed, layer=layer, impl="reference")
    if x.dim() > 2:
        mask = mask.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    mask = torch.empty_like(x, dtype=torch.bool).copy_(mask)  # in x's memory format, which the result then keeps
    work = torch.promote_types(x.dtype, torch.float32)
    return torch.where(mask, x.to(work) * (1 / (1 - p)), 0.0).to(x.dtype)


def _run(impl: str) -> Any:
    def run(x: Tensor, positions: Tensor, seed: Tensor, layer: int, p: float) -> Tensor:
        y = torch.empty_like(x)
        arguments = x, positions, seed, int(Stream.DROPOUT), layer * LAYER_WORDS, _threshold(p), 1 / (1 - p), y
        if impl == "native":
            torch.ops.fastambient_native.dropout(*arguments)
        else:
            from fastambient_kernels import random_triton  # type: ignore[attr-defined]

            random_triton.dropout(*arguments)
        return y

    return run


def _fake(x: Tensor, positions: Tensor, seed: Tensor, layer: int, p: float) -> Tensor:
    return torch.empty_like(x)


_ops = {
    impl: register(
        f"dropout_{impl}(Tensor x, Tensor positions, Tensor seed, int layer, float p) -> Tensor", _run(impl), _fake
    )
    for impl in ("native", "triton")
}


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, positions: Tensor, seed: Tensor, layer: int, p: float, impl: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(positions, seed)
        ctx.settings = layer, p, impl
        return _ops[impl](x, positions, seed, layer, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        layer, p, impl = ctx.settings
        return _ops[impl](_channels_last(dy), *ctx.saved_tensors, layer, p), None, None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    """x with its channels side by side in memory: the order in which elements count."""
    return x.contiguous(memory_format=_FORMATS.get(x.dim(), torch.contiguous_format))


def dropout(
    x: Tensor, positions: Tensor, *, p: float, seed: int | Tensor, layer: int = 0, impl: str = "auto"
) -> Tensor:
    """Zero elements of `x` with probability `p` (to 2^-16) and divide the others by 1 - p.

    Parameters
    ----------
    x : float [N, C, ...]; fast in channels-last and as [N, C], other formats are copied
    positions : int64 [N], images seen so far + index in the global batch
    p : in [0, 1)
    seed : 64 bits, a Python integer or an int64 tensor with one element on x's device
    layer : in [0, 256); names the mask within a network
    impl : "auto", "reference", "triton" or "native"

    Returns
    -------
    as x, in its dtype and memory format

    Raises
    ------
    TypeError, ValueError : wrong dtypes, shapes or ranges
    RuntimeError : the implementation that was asked for is not available here
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise TypeError(f"x must be float [N, C, ...], got {x.dtype} {list(x.shape)}")
    if positions.dtype != torch.int64 or positions.shape != x.shape[:1]:
        raise TypeError(f"positions must be int64 [{len(x)}], got {positions.dtype} {list(positions.shape)}")
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    if not 0 <= layer < MAX_LAYERS:
        raise ValueError(f"layer must lie in 0 .. {MAX_LAYERS - 1}, got {layer}")
    if x.shape[1:].numel() > 2 * LAYER_WORDS:
        raise ValueError(f"a sample may have {2 * LAYER_WORDS} elements, got {x.shape[1:].numel()}")
    taken = choose("dropout", impl, x.device, x.dtype)
    fits = x.dim() in (2, *_FORMATS)
    if taken == "reference" or x.numel() == 0 or not fits:
        return reference(x, positions, seed, layer, p)
    y = _Dropout.apply(_channels_last(x), positions.contiguous(), seed_tensor(seed, x.device), layer, float(p), taken)
    return y.contiguous() if x.is_contiguous() else y
