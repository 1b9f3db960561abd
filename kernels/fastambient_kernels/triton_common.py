"""What several Triton kernels share: rounding to bfloat16, and the noise contract's normals.

Normals are those of `noise.py`: one Philox4x32-10 call gives four words, and they give elements 4g .. 4g+3 of a
sample. Sine and cosine are a reduction in integers and two short polynomials: a uniform holds 24 bits of a turn, so its
quarter turn and the exact rest fall out of a shift. This needs no library call (the general ones reduce any angle and
keep a stack), so that the interpreter, NVIDIA and AMD run the same formula; its error is 1e-7.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_TO_UNIFORM = tl.constexpr(2.0**-24)
_U_MIN = tl.constexpr(1e-7)
_TO_RADIANS = tl.constexpr(3.7450702829238412e-07)  # pi/2 * 2^-22: from 2^-24 turns


@triton.jit
def cast_rne(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, rounded to nearest even: as compiled casts do; interpreted ones to bfloat16 truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return tl.where(x == x, rounded, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def box_muller(word_a, word_b):
    """Two normals of two words (uint32)."""
    u = tl.maximum((word_a >> 8).to(tl.float32) * _TO_UNIFORM, _U_MIN)
    radius = tl.sqrt(-2.0 * tl.log(u))
    turn = word_b >> 8
    quarter = (turn + 0x200000) >> 22  # 0..4
    f = (turn.to(tl.int32) - (quarter << 22).to(tl.int32)).to(tl.float32) * _TO_RADIANS  # in [-pi/4, pi/4]
    z = f * f
    # Minimax polynomials of (sin f - f)/f^3 and (cos f - 1 + f^2/2)/f^4, relative error below 4e-9.
    sin = f + f * z * (-0.16666655242443085 + z * (0.008332177996635437 + z * -0.00019517296459525824))
    cos = 1.0 + z * (-0.5 + z * (0.04166664555668831 + z * (-0.001388736767694354 + z * 2.4438448235741816e-05)))
    odd = (quarter & 1) != 0
    z_a = radius * tl.where(odd, sin, cos)
    z_b = radius * tl.where(odd, cos, sin)
    # Signs of the quarter turn: cosine is negative in 1 and 2, sine in 2 and 3.
    z_a = (z_a.to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    z_b = (z_b.to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True)
    return z_a, z_b


@triton.jit
def philox_words(seed, id, stream: tl.constexpr, group):
    """The four words (uint32 [R]) of elements 4g .. 4g+3 for each g in `group` (int32 [R]); seed, id: int64 scalars."""
    low, high = (id & 0xFFFFFFFF).to(tl.uint32), ((id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, group, low, high, stream)


@triton.jit
def _four(seed, id, stream: tl.constexpr, group):
    r0, r1, r2, r3 = philox_words(seed, id, stream, group)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return z0, z1, z2, z3


@triton.jit
def normals(seed, id, stream: tl.constexpr, row, VECTOR: tl.constexpr):
    """Standard normals [R, VECTOR] of elements VECTOR*row .. VECTOR*row + VECTOR-1; `row` is int32 [R], VECTOR 4 or 8.

    A row is made by one thread and is what it loads and stores at once: joining lanes costs no shared memory.
    """
    z0, z1, z2, z3 = _four(seed, id, stream, row * (VECTOR // 4))
    if VECTOR == 8:
        z4, z5, z6, z7 = _four(seed, id, stream, row * 2 + 1)
        z0, z1, z2, z3 = tl.join(z0, z4), tl.join(z1, z5), tl.join(z2, z6), tl.join(z3, z7)
    # The axis that is joined last counts fastest: 0, 1, 2, 3.
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [row.shape[0], VECTOR])


@triton.jit
def elements(row, VECTOR: tl.constexpr):
    """Element indices [R, VECTOR] of rows of `normals`."""
    return row[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def normals_kernel(out, seed_ptr, id_ptr, STREAM: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """ROWS * VECTOR normals of one id a program: what tests and the instruction budget look at."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = normals(tl.load(seed_ptr), tl.load(id_ptr), STREAM, row, VECTOR)
    tl.store(out + elements(row, VECTOR), cast_rne(z, out.dtype.element_ty))


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: a launch goes there, wherever the caller stands."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


def aot_cases() -> list[AotCase]:
    from fastambient_kernels.aot import AotCase

    return [
        AotCase(
            name=f"eight normals a thread, {dtype}",
            kernel=normals_kernel,
            signature={"out": f"*{dtype}", "seed_ptr": "*i64", "id_ptr": "*i64"},
            constexprs={"STREAM": 0, "ROWS": 1024 // vector, "VECTOR": vector},
            attrs={"out": 16, "seed_ptr": 16, "id_ptr": 16},
            num_warps=4,
            amd_warps=1024 // (64 * vector),
            streamed=("out",),
            elements=1024 * 16 // vector,
            max_instructions=400,
            max_registers=64,
        )
        for dtype, vector in (("fp32", 4), ("bf16", 8))
    ]
