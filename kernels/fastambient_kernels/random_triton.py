"""Triton kernels of `random_words` and `dropout`; the mathematics is in noise.py and dropout.py.

A row is what one Philox call gives: four words, or the fate of eight elements. Dropout reads and writes a row in pieces
of 16 bytes: one in bfloat16, two in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastambient_kernels.noise import Stream
from fastambient_kernels.triton_common import INTERPRETED, cast_rne, device_guard, elements, philox_words

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase

_DROPOUT = tl.constexpr(int(Stream.DROPOUT))


@triton.jit
def words_kernel(out, ids, seed, first, count, tiles, STREAM: tl.constexpr, ROWS: tl.constexpr):
    pid = tl.program_id(0)
    n, row = pid // tiles, pid % tiles * ROWS + tl.arange(0, ROWS)
    r0, r1, r2, r3 = philox_words(tl.load(seed), tl.load(ids + n), STREAM, first + row)
    # The axis that is joined last counts fastest: 0, 1, 2, 3.
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [ROWS, 4])
    e = elements(row, 4)
    tl.store(out + n.to(tl.int64) * count + e, words.to(tl.int64), mask=e < count)


@triton.jit
def _halves(word_a, word_b):
    """uint32 [R, 4]: low and high half of each word."""
    low, high = tl.join(word_a & 0xFFFF, word_b & 0xFFFF), tl.join(word_a >> 16, word_b >> 16)
    return tl.reshape(tl.join(low, high), [word_a.shape[0], 4])


@triton.jit
def _drop(y, x, place, inside, halves, threshold, scale):
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(y + place, cast_rne(tl.where(halves >= threshold, value, 0.0), y.dtype.element_ty), mask=inside)


@triton.jit
def dropout_kernel(
    y, x, positions, seed, first, numel, tiles, threshold, scale, ROWS: tl.constexpr, VECTOR: tl.constexpr
):
    pid = tl.program_id(0)
    n, row = pid // tiles, pid % tiles * ROWS + tl.arange(0, ROWS)
    r0, r1, r2, r3 = philox_words(tl.load(seed), tl.load(positions + n), _DROPOUT, first + row)
    base = n.to(tl.int64) * numel
    if VECTOR == 8:
        # Words 0, 1, 2, 3, low half before high: the axis that is joined last counts fastest.
        low = tl.join(tl.join(r0 & 0xFFFF, r2 & 0xFFFF), tl.join(r1 & 0xFFFF, r3 & 0xFFFF))
        high = tl.join(tl.join(r0 >> 16, r2 >> 16), tl.join(r1 >> 16, r3 >> 16))
        e = elements(row, 8)
        _drop(y, x, base + e, e < numel, tl.reshape(tl.join(low, high), [ROWS, 8]), threshold, scale)
    else:
        e = elements(row * 2, 4)
        _drop(y, x, base + e, e < numel, _halves(r0, r1), threshold, scale)
        e = elements(row * 2 + 1, 4)
        _drop(y, x, base + e, e < numel, _halves(r2, r3), threshold, scale)


def _counter(first: int) -> int:
    """The counter of word `first`: 32 bits, as the int32 that arithmetic in the kernel wraps around."""
    counter = first // 4
    return counter - 2**32 if counter >= 2**31 else counter


def _rows(count: int) -> int:
    """Rows of a program that `count` rows of a sample are cut into; interpreted, few programs."""
    return min(triton.next_power_of_2(count), 8192 if INTERPRETED else 256)


def words(ids: Tensor, seed: Tensor, stream: int, first: int, out: Tensor) -> None:
    """Fill `out`, int64 [N, count]."""
    n, count = out.shape
    rows = max(32, _rows(triton.cdiv(count, 4)))
    tiles = triton.cdiv(count, 4 * rows)
    with device_guard(out):
        words_kernel[(n * tiles,)](
            out, ids, seed, _counter(first), count, tiles, STREAM=stream, ROWS=rows, num_warps=max(1, rows // 64)
        )


def dropout(
    x: Tensor, positions: Tensor, seed: Tensor, stream: int, first: int, threshold: int, scale: float, y: Tensor
) -> None:
    """Fill `y`, which lies in memory as `x` [N, ...] does: float32 or bfloat16, elements in memory order."""
    assert stream == Stream.DROPOUT
    n = len(x)
    numel = x.numel() // n
    rows = max(64, _rows(triton.cdiv(numel, 8)))
    tiles = triton.cdiv(numel, 8 * rows)
    lanes = 64 if torch.version.hip else 32
    with device_guard(x):
        dropout_kernel[(n * tiles,)](
            y, x, positions, seed, _counter(first), numel, tiles, threshold, scale, ROWS=rows,
            VECTOR=16 // x.element_size(), num_warps=max(1, rows // lanes),
        )  # fmt: skip


def aot_cases() -> list[AotCase]:
    from fastambient_kernels.aot import AotCase

    pointers = {"seed": "*i64"}
    numbers = {"first": "i32", "tiles": "i32"}
    cases = [
        AotCase(
            name=f"random_words {rows}", kernel=words_kernel,
            signature={"out": "*i64", "ids": "*i64", **pointers, "count": "i32", **numbers},
            constexprs={"STREAM": 2, "ROWS": rows}, attrs={"out": 16, "ids": 16, "seed": 16, "count": 16},
            num_warps=max(1, rows // 64), elements=rows * 32, streamed=("out",), max_instructions=600, max_registers=64,
        )
        for rows in (32, 256)
    ]  # fmt: skip
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        for rows in (64, 256):
            cases.append(AotCase(
                name=f"dropout {dtype} {rows}", kernel=dropout_kernel,
                signature={
                    "y": f"*{dtype}", "x": f"*{dtype}", "positions": "*i64", **pointers, **numbers, "numel": "i32",
                    "threshold": "i32", "scale": "fp32",
                },
                constexprs={"ROWS": rows, "VECTOR": 16 // size},
                attrs={"y": 16, "x": 16, "positions": 16, "seed": 16, "numel": 16},
                num_warps=rows // 32, amd_warps=rows // 64, elements=rows * 16 * size, streamed=("x", "y"),
                max_instructions=600, max_registers=64,
            ))  # fmt: skip
    return cases
