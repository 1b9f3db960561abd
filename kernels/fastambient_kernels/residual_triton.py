"""Triton kernels of `residual` and how they are launched; mathematics and names are those of residual.py.

A tile is BLOCK_P pixels of BLOCK_C channels, as in group_norm_silu_kernels.py. In channels-last all pixels of a batch
are one long picture; where no channel matters, all elements are the pixels of one channel, whatever the format.

Sums over pixels: one of each channel from each program, then those in order. There are no atomics: a result depends on
the shape and the plan alone. The functions fill given outputs, with the arguments of the native operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastambient_kernels.group_norm_silu_kernels import _block, _origin, _place
from fastambient_kernels.group_norm_silu_triton import _TYPES, _launch, _processors
from fastambient_kernels.triton_common import cast_rne, device_guard

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase

_TILE = 8192  # bytes of each tensor; 32 for a thread of eight warps


@triton.jit
def forward(
    out, y, x, bias, scale, channels, pixels, tiles, chunk, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    n, _, c0, start, end = _block(channels, pixels, tiles, chunk, BLOCK_C)
    local, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    has_c = c0 + local < channels
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    b = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        b = tl.load(bias + c0 + local, mask=has_c, other=0.0)
    for at in range(start, end, BLOCK_P):
        inside = (at + p < end)[:, None] & has_c[None, :]
        origin = _origin(n, c0, at, channels, pixels, CHANNELS_LAST)
        total = tl.load(y + origin + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(x + origin + place, mask=inside, other=0.0).to(tl.float32)
        total = (total + b[None, :]) * scale
        tl.store(out + origin + place, cast_rne(total, out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    d, partial, dy, scale, channels, pixels, tiles, chunk, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """d = dy * scale, and its sums over a chunk of pixels: partial [N, tiles, C]; either may be None."""
    n, tile, c0, start, end = _block(channels, pixels, tiles, chunk, BLOCK_C)
    local, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    has_c = c0 + local < channels
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for at in range(start, end, BLOCK_P):
        inside = (at + p < end)[:, None] & has_c[None, :]
        origin = _origin(n, c0, at, channels, pixels, CHANNELS_LAST)
        value = tl.load(dy + origin + place, mask=inside, other=0.0).to(tl.float32) * scale
        if d is not None:
            tl.store(d + origin + place, cast_rne(value, d.dtype.element_ty), mask=inside)
        if partial is not None:
            total += value
    if partial is not None:
        tl.store(partial + (n * tiles + tile) * channels + c0 + local, tl.sum(total, 0), mask=has_c)


@triton.jit
def sum_rows(d_bias, partial, rows, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """d_bias [C] from partial [rows, C]."""
    c, r = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for row in range(0, rows, BLOCK_N):
        inside = (row + r < rows)[:, None] & (c < channels)[None, :]
        total += tl.load(partial + (row + r)[:, None] * channels + c[None, :], mask=inside, other=0.0)
    tl.store(d_bias + c, tl.sum(total, 0), mask=c < channels)


class _Call:
    """How a tensor is cut: a plain function of its shape and the number of multiprocessors."""

    def __init__(self, like: Tensor, *, by_channel: bool, processors: int | None) -> None:
        samples, channels = like.shape[:2]
        last = samples * channels == like.numel() or not like.is_contiguous()
        if not by_channel:
            samples = channels = 1
            last = False
        elif last:
            samples = 1
        pixels = like.numel() // (samples * channels)
        tile = _TILE // like.element_size()
        padded, whole = triton.next_power_of_2(pixels), triton.next_power_of_2(channels)
        block_c = min(whole, 128) if last else min(whole, max(1, tile // padded))
        block_p = min(padded, tile // block_c)
        blocks = triton.cdiv(channels, block_c)
        wanted = triton.cdiv(8 * (processors or _processors(like.device)), samples * blocks)
        tiles = min(wanted, triton.cdiv(pixels, block_p))
        chunk = triton.cdiv(triton.cdiv(pixels, tiles), block_p) * block_p
        tiles = triton.cdiv(pixels, chunk)
        self.programs, self.rows = samples * tiles * blocks, samples * tiles
        self.cut = channels, pixels, tiles, chunk
        self.blocks = {"BLOCK_C": block_c, "BLOCK_P": block_p, "CHANNELS_LAST": last}
        self.blocks["num_warps"] = max(1, 8 * block_c * block_p // tile)


def residual(
    y: Tensor, x: Tensor, bias: Tensor | None, scale: float, out: Tensor, *, launch: Callable[..., None] = _launch,
    processors: int | None = None,
) -> None:  # fmt: skip
    """Fills out."""
    call = _Call(y, by_channel=bias is not None, processors=processors)
    with device_guard(y):
        launch(forward, call.programs, out, y, x, bias, scale, *call.cut, **call.blocks)


def residual_backward(
    dy: Tensor, scale: float, d: Tensor | None, d_bias: Tensor | None, *, launch: Callable[..., None] = _launch,
    processors: int | None = None,
) -> None:  # fmt: skip
    """Fills d and d_bias, where they are there."""
    call = _Call(dy, by_channel=d_bias is not None, processors=processors)
    channels, partial = call.cut[0], None
    if d_bias is not None:
        partial = torch.empty((call.rows, channels), dtype=torch.float32, device=dy.device)
    with device_guard(dy):
        launch(backward, call.programs, d, partial, dy, scale, *call.cut, **call.blocks)
        if d_bias is not None:
            columns = min(64, triton.next_power_of_2(channels))
            launch(
                sum_rows, triton.cdiv(channels, columns), d_bias, partial, call.rows, channels, BLOCK_N=64,
                BLOCK_C=columns, num_warps=4,
            )  # fmt: skip


_IN_USE = [  # shape, dtype, channels-last, a bias
    ((64, 256, 32, 32), torch.bfloat16, True, True),
    ((64, 256, 32, 32), torch.float32, True, True),
    ((64, 192, 16, 16), torch.bfloat16, True, True),
    ((64, 256, 32, 32), torch.bfloat16, False, True),
    ((64, 256, 32, 32), torch.bfloat16, True, False),
    ((64, 256, 32, 32), torch.float32, True, False),
]


def aot_cases() -> list[AotCase]:
    """What the launchers launch on 132 multiprocessors for `_IN_USE`, specialised as Triton does for its arguments."""
    from fastambient_kernels.aot import launched

    cases: dict[str, AotCase] = {}

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        streamed = tuple(a for a in ("out", "y", "x", "d", "dy") if given.get(a) is not None)
        name = f"residual {kernel.__name__} {title if streamed else ''}".strip()
        cases.setdefault(name, launched(name, kernel, programs, arguments, constants, streamed=streamed))

    for shape, dtype, last, biased in _IN_USE:
        title = f"{'x'.join(map(str, shape))} {_TYPES[dtype]}{' nhwc' if last else ''}{' bias' if biased else ''}"
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        bias = torch.empty(shape[1]) if biased else None
        options: dict[str, Any] = {"launch": record, "processors": 132}
        residual(x, x, bias, 0.5, x, **options)
        residual_backward(x, 0.5, x, bias, **options)
        if biased:
            title += ", scale 1"
            residual_backward(x, 1.0, None, bias, **options)
    return list(cases.values())
