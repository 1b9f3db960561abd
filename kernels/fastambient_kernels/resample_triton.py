"""Triton kernel of `resample`; the mathematics is in resample.py.

A thread makes 16 bytes of the output: neighbouring channels of a pixel, so that every access is 128 bits wide where the
channels are a multiple of that. A program takes some rows of the output, of which all but the first find most of what
they read in the multiprocessor's cache. A contiguous picture is one of a single channel for each of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastambient_kernels.triton_common import INTERPRETED, cast_rne, device_guard

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase


@triton.jit
def resample_kernel(
    y, x, height, width, out_height, out_width, groups, tiles_h, tiles_w,
    WEIGHTS: tl.constexpr, TAPS: tl.constexpr, PHASES: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid // tiles_w
    n = (tile // tiles_h).to(tl.int64)
    unit = tl.arange(0, ROWS * UNITS)
    i = tile % tiles_h * ROWS + unit // UNITS
    column = pid % tiles_w * UNITS + unit % UNITS  # a unit is VECTOR channels of a pixel
    j = column // groups
    channel = column % groups * VECTOR
    lane = tl.arange(0, VECTOR)[None, :]
    inside = (i < out_height) & (j < out_width)
    # Floor: a shift rounds negative numbers down as well.
    row = (STRIDE * i + OFFSET) >> (PHASES - 1)
    first = (STRIDE * j + OFFSET) >> (PHASES - 1)
    x += n * height * width * groups * VECTOR
    total = tl.zeros([ROWS * UNITS, VECTOR], tl.float32)
    for m in tl.static_range(TAPS):
        line = tl.zeros([ROWS * UNITS, VECTOR], tl.float32)
        for k in tl.static_range(TAPS):
            there = inside & (row + m >= 0) & (row + m < height) & (first + k >= 0) & (first + k < width)
            place = ((row + m) * width + first + k) * (groups * VECTOR) + channel
            value = tl.load(x + place[:, None] + lane, mask=there[:, None], other=0.0).to(tl.float32)
            if PHASES == 2:
                weight = tl.where(j % 2 == 0, WEIGHTS[k], WEIGHTS[TAPS + k])[:, None]
            else:
                weight = WEIGHTS[k]
            line += weight * value
        if PHASES == 2:
            weight = tl.where(i % 2 == 0, WEIGHTS[m], WEIGHTS[TAPS + m])[:, None]
        else:
            weight = WEIGHTS[m]
        total += weight * line
    y += n * out_height * out_width * groups * VECTOR
    place = (i * out_width + j) * (groups * VECTOR) + channel
    tl.store(y + place[:, None] + lane, cast_rne(total, y.dtype.element_ty), mask=inside[:, None])


@dataclass(frozen=True)
class Plan:
    """Blocks for one shape of the output."""

    vector: int  # channels of a unit
    groups: int  # units of a pixel
    rows: int
    units: int
    warps: int  # of 32 threads


def plan(channels: int, out_height: int, out_width: int, itemsize: int) -> Plan:
    """A plain function of the shape: a unit a thread, some rows of the output, no more threads than work."""
    vector = 16 // itemsize
    while channels % vector:
        vector //= 2
    groups = channels // vector
    most = 8192 if INTERPRETED else 256  # units; interpreted, few programs
    rows = min(4, triton.next_power_of_2(out_height))
    units = min(most // rows, triton.next_power_of_2(out_width * groups))
    rows = min(most // units, triton.next_power_of_2(out_height))
    return Plan(vector, groups, rows, units, max(1, rows * units // 32))


def resample(x: Tensor, weights: Sequence[float], phases: int, stride: int, offset: int, y: Tensor) -> None:
    """Fill `y` [N, C, H', W'], which lies in memory as x does: contiguous or channels-last."""
    (samples, channels, height, width), (out_height, out_width) = x.shape, y.shape[2:]
    if x.is_contiguous() and y.is_contiguous():
        samples, channels = samples * channels, 1
    p = plan(channels, out_height, out_width, x.element_size())
    warps = max(1, p.warps // 2) if torch.version.hip else p.warps  # of 64 threads there
    tiles_h, tiles_w = triton.cdiv(out_height, p.rows), triton.cdiv(out_width * p.groups, p.units)
    with device_guard(x):
        resample_kernel[(samples * tiles_h * tiles_w,)](
            y, x, height, width, out_height, out_width, p.groups, tiles_h, tiles_w, WEIGHTS=tuple(weights),
            TAPS=len(weights) // phases, PHASES=phases, STRIDE=stride, OFFSET=offset, ROWS=p.rows, UNITS=p.units,
            VECTOR=p.vector, num_warps=warps,
        )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """The published networks' filter on 64x64 pixels, as `resample` launches it and Triton specialises its integers."""
    from fastambient_kernels.aot import AotCase
    from fastambient_kernels.resample import geometry

    cases = []
    for dtype, size, channels in (("fp32", 4, 256), ("bf16", 2, 256), ("bf16", 2, 1)):
        for mode, out, moved in (("down", 32, 5), ("up", 128, 1.25), ("filter", 63, 2)):  # of the output's bytes
            p = plan(channels, out, out, size)
            weights, phases, stride, offset = geometry([1, 3, 3, 1], mode, 1, 2.0 if mode == "up" else 1.0)
            integers = {"height": 64, "width": 64, "out_height": out, "out_width": out, "groups": p.groups}
            integers |= {"tiles_h": -(-out // p.rows), "tiles_w": -(-out * p.groups // p.units)}
            fixed = {name: value for name, value in integers.items() if value == 1}
            cases.append(AotCase(
                name=f"resample {mode} {dtype}{' nhwc' if channels > 1 else ''}", kernel=resample_kernel,
                signature={"y": f"*{dtype}", "x": f"*{dtype}", **{k: "i32" for k in integers if k not in fixed}},
                constexprs=fixed | {
                    "WEIGHTS": tuple(weights), "TAPS": len(weights) // phases, "PHASES": phases, "STRIDE": stride,
                    "OFFSET": offset, "ROWS": p.rows, "UNITS": p.units, "VECTOR": p.vector,
                },
                attrs={"y": 16, "x": 16} | {k: 16 for k, v in integers.items() if v % 16 == 0},
                num_warps=p.warps, amd_warps=max(1, p.warps // 2),
                elements=int(p.rows * p.units * p.vector * size * moved), streamed=("x", "y") if channels > 1 else (),
                max_instructions=800, max_registers=96,
            ))  # fmt: skip
    return cases
