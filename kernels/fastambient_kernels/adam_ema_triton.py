"""Triton kernels of `adam_ema` and their launcher.

`prepare_kernel` counts steps and derives nine numbers for each parameter; `update_kernel` does all the rest, one chunk
a program; `norm_kernel` comes first where gradients are clipped. Tensors are reached through the addresses in a table
(`adam_ema_table.py`). Full chunks of aligned tensors have no masks and use 128-bit accesses; tails and tensors that are
not aligned are launched apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastambient_kernels.adam_ema_table import COEFFICIENTS, COLUMNS, SETTINGS, Table, run_gpu
from fastambient_kernels.triton_common import INTERPRETED, cast_rne, device_guard

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase

CHUNK = 16384 if INTERPRETED.value else 2048  # an interpreted program costs the same whatever its width
_AMD_WARPS = 4
WARPS = _AMD_WARPS if torch.version.hip else 8  # 8 elements a thread: 128 bits of bfloat16
ROWS = 256  # of the table, in a program of prepare_kernel

_GRAD_LIMIT = tl.constexpr(1e5)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_SETTINGS = tl.constexpr(SETTINGS)
_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
# Columns of the table.
_P = tl.constexpr(0)
_G = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SQ = tl.constexpr(3)
_STEP = tl.constexpr(4)
_NUMEL = tl.constexpr(5)
_GROUP = tl.constexpr(6)
_LEAF = tl.constexpr(8)
_EMAS = tl.constexpr(COLUMNS)


@triton.jit
def prepare_kernel(table, groups, coefficients, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Count the step of ROWS parameters; write their numbers. Double precision, as torch has it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    step_at = tl.load(table + row * WIDTH + _STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_at, mask=inside, other=0.0) + 1.0
    tl.store(step_at, step, mask=inside)
    setting = groups + tl.load(table + row * WIDTH + _GROUP, mask=inside, other=0) * _SETTINGS
    lr = tl.load(setting)
    beta1 = tl.load(setting + 1)
    beta2 = tl.load(setting + 2)
    eps = tl.load(setting + 3)
    weight_decay = tl.load(setting + 4)
    decoupled = tl.load(setting + 5) != 0
    t = step.to(tl.float64)
    correction1 = 1.0 - _power(beta1, t)
    correction2 = 1.0 - _power(beta2, t)
    out = coefficients + row * _COEFFICIENTS
    tl.store(out, (lr / correction1).to(tl.float32), mask=inside)
    tl.store(out + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=inside)
    tl.store(out + 2, eps.to(tl.float32), mask=inside)
    tl.store(out + 3, beta1.to(tl.float32), mask=inside)
    tl.store(out + 4, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(out + 5, beta2.to(tl.float32), mask=inside)
    tl.store(out + 6, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(out + 7, tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(tl.float32), mask=inside)
    tl.store(out + 8, tl.where(decoupled, 0.0, weight_decay).to(tl.float32), mask=inside)


@triton.jit
def _power(beta, t):
    positive = beta > 0
    return tl.where(positive, tl.exp2(t * tl.log2(tl.where(positive, beta, 1.0))), 0.0)


@triton.jit
def _address(table, row, COLUMN: tl.constexpr, WIDTH: tl.constexpr, begin, dtype: tl.constexpr, FULL: tl.constexpr):
    """Where element `begin` of a tensor lies."""
    at = tl.load(table + row * WIDTH + COLUMN).to(tl.pointer_type(dtype)) + begin
    if FULL:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _clean(table, row, begin, i, inside, WIDTH: tl.constexpr, BF16: tl.constexpr, FULL: tl.constexpr):
    """(cleaned gradient in float32, which entries are finite)"""
    at = _address(table, row, _G, WIDTH, begin, tl.bfloat16 if BF16 else tl.float32, FULL)
    g = tl.load(at + i, mask=inside, other=None if FULL else 0.0).to(tl.float32)
    finite = tl.abs(g) <= _FLOAT_MAX
    infinite = tl.where(g > 0, _GRAD_LIMIT, tl.where(g < 0, -_GRAD_LIMIT, 0.0))  # NaN compares as neither
    return tl.where(finite, g, infinite), finite


@triton.jit
def _summarise(g, finite, index, squares, counts):
    wide = g.to(tl.float64)
    tl.store(squares + index, tl.sum(wide * wide, 0))
    tl.store(counts + index, tl.sum((finite == 0).to(tl.int32), 0).to(tl.int64))


@triton.jit
def _lerp(start, end, weight, one_minus_weight):
    """start + weight * (end - start), from whichever end is nearer, as torch.lerp"""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - one_minus_weight * difference)


@triton.jit(do_not_specialize=["first"])
def norm_kernel(
    table, chunks, squares, counts, first,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BF16: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Sum of squares and count of the non-finite entries of one chunk."""
    index = first + tl.program_id(0)
    row, begin = tl.load(chunks + index * 2), tl.load(chunks + index * 2 + 1)
    i = tl.arange(0, CHUNK)
    inside = None if FULL else i < (tl.load(table + row * WIDTH + _NUMEL) - begin)
    g, finite = _clean(table, row, begin, i, inside, WIDTH, BF16, FULL)
    _summarise(g, finite, index, squares, counts)


@triton.jit(do_not_specialize=["first"])
def update_kernel(
    table, betas, chunks, coefficients, clip, squares, counts, first,
    WIDTH: tl.constexpr, EMAS: tl.constexpr, CHUNK: tl.constexpr, BF16: tl.constexpr, FULL: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """One chunk: clean, update, round, average. Without CLIP also what `norm_kernel` does."""
    index = first + tl.program_id(0)
    row, begin = tl.load(chunks + index * 2), tl.load(chunks + index * 2 + 1)
    number = coefficients + row * _COEFFICIENTS
    step_size, v_scale, eps = tl.load(number), tl.load(number + 1), tl.load(number + 2)
    beta1, one_minus_beta1 = tl.load(number + 3), tl.load(number + 4)
    beta2, one_minus_beta2 = tl.load(number + 5), tl.load(number + 6)
    decay, l2 = tl.load(number + 7), tl.load(number + 8)
    i = tl.arange(0, CHUNK)
    inside = None if FULL else i < (tl.load(table + row * WIDTH + _NUMEL) - begin)
    other: tl.constexpr = None if FULL else 0.0
    g, finite = _clean(table, row, begin, i, inside, WIDTH, BF16, FULL)
    p_at = _address(table, row, _P, WIDTH, begin, tl.float32, FULL)
    m_at = _address(table, row, _EXP_AVG, WIDTH, begin, tl.float32, FULL)
    v_at = _address(table, row, _EXP_AVG_SQ, WIDTH, begin, tl.float32, FULL)
    p = tl.load(p_at + i, mask=inside, other=other)
    m = tl.load(m_at + i, mask=inside, other=other)
    v = tl.load(v_at + i, mask=inside, other=other)
    if CLIP:
        g = g * tl.load(clip)
    else:
        _summarise(g, finite, index, squares, counts)
    g = g + l2 * p
    m = _lerp(m, g, one_minus_beta1, beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    p = decay * p - tl.div_rn(step_size * m, tl.sqrt_rn(v) * v_scale + eps)
    tl.store(m_at + i, m, mask=inside)
    tl.store(v_at + i, v, mask=inside)
    tl.store(p_at + i, p, mask=inside)
    if BF16:  # noqa: SIM102  # a constant: leaves have bfloat16 gradients
        if tl.load(table + row * WIDTH + _LEAF) != 0:
            leaf_at = _address(table, row, _LEAF, WIDTH, begin, tl.bfloat16, FULL)
            tl.store(leaf_at + i, cast_rne(p, tl.bfloat16), mask=inside)
    for k in tl.static_range(EMAS):
        beta = tl.load(betas + k)
        ema_at = _address(table, row, _EMAS + k, WIDTH, begin, tl.float32, FULL)
        ema = tl.load(ema_at + i, mask=inside, other=other)
        ema = _lerp(ema, p, (1.0 - beta).to(tl.float32), beta.to(tl.float32))
        tl.store(ema_at + i, ema, mask=inside)


class _Kernels:
    """The two passes that `run_gpu` asks for."""

    @staticmethod
    def norm(table: Table, squares: Tensor, counts: Tensor) -> None:
        for first, chunks, bf16, full in table.launches:
            norm_kernel[(chunks,)](
                table.rows, table.chunks, squares, counts, first,
                WIDTH=table.width, CHUNK=table.chunk, BF16=bf16, FULL=full, num_warps=WARPS,
            )  # fmt: skip

    @staticmethod
    def update(table: Table, squares: Tensor, counts: Tensor, clip: Tensor | None) -> None:
        rows, emas = len(table.rows), table.width - COLUMNS
        coefficients = torch.empty(rows, COEFFICIENTS, dtype=torch.float32, device=table.device)
        prepare_kernel[(triton.cdiv(rows, ROWS),)](
            table.rows, table.groups, coefficients, rows, WIDTH=table.width, ROWS=ROWS
        )
        for first, chunks, bf16, full in table.launches:
            update_kernel[(chunks,)](
                table.rows, table.betas, table.chunks, coefficients, clip, squares, counts, first,
                WIDTH=table.width, EMAS=emas, CHUNK=table.chunk, BF16=bf16, FULL=full, CLIP=clip is not None,
                num_warps=WARPS,
            )  # fmt: skip


def run(table: Table, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """The step; (norm, nonfinite) as `adam_ema_reference` returns them."""
    with device_guard(table.rows):
        return run_gpu(table, max_norm, norm=_Kernels.norm, update=_Kernels.update)


def aot_cases() -> list[AotCase]:
    from fastambient_kernels.aot import AotCase

    pointers = {"table": "*i64", "chunks": "*i64", "squares": "*fp64", "counts": "*i64"}
    signature = pointers | {"betas": "*fp64", "coefficients": "*fp32", "clip": "*fp32", "first": "i32"}
    attrs = dict.fromkeys((k for k in signature if k != "first"), 16)
    cases = [
        AotCase(
            name="adam_ema.prepare",
            kernel=prepare_kernel,
            signature={"table": "*i64", "groups": "*fp64", "coefficients": "*fp32", "rows": "i32"},
            constexprs={"WIDTH": COLUMNS + 1, "ROWS": ROWS},
            attrs={"table": 16, "groups": 16, "coefficients": 16},
            elements=ROWS * (8 * 2 + 4 * 2 + 4 * COEFFICIENTS),
        )
    ]
    for bf16 in (False, True):
        dtype, g_bytes = ("bf16", 2) if bf16 else ("fp32", 4)
        for full in (True, False):
            kind = f"{dtype}{'' if full else ' tails'}"
            shared = {"CHUNK": 2048, "BF16": bf16, "FULL": full}
            streamed = ("*table",) if full else ()
            cases.append(
                AotCase(
                    name=f"adam_ema.norm {kind}",
                    kernel=norm_kernel,
                    signature=pointers | {"first": "i32"},
                    constexprs=shared | {"WIDTH": COLUMNS + 1},
                    attrs=dict.fromkeys(pointers, 16),
                    num_warps=8,
                    amd_warps=_AMD_WARPS,
                    streamed=streamed,
                    elements=2048 * g_bytes,
                    max_instructions=400,
                    max_registers=64,
                )
            )
            for emas, clip in ((0, False), (1, False), (2, False), (1, True)):
                constants = {"clip": None} if not clip else {}
                cases.append(
                    AotCase(
                        name=f"adam_ema.update {kind}, {emas} averages{', clip' if clip else ''}",
                        kernel=update_kernel,
                        signature={k: t for k, t in signature.items() if k not in constants},
                        constexprs=shared | {"WIDTH": COLUMNS + emas, "EMAS": emas, "CLIP": clip} | constants,
                        attrs={k: v for k, v in attrs.items() if k not in constants},
                        num_warps=8,
                        amd_warps=_AMD_WARPS,
                        streamed=streamed,
                        elements=2048 * (28 + 8 * emas),  # of bfloat16 gradients with their leaves
                        max_instructions=1500,
                        max_registers=72 if full else 96,
                    )
                )
    return cases
