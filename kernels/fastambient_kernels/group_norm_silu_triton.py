"""How the Triton kernels of `group_norm_silu` are launched: what each program does, and which way is taken.

The functions fill given outputs, with the arguments of the native operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from fastambient_kernels import group_norm_silu_kernels as kernels
from fastambient_kernels.triton_common import device_guard

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase

# Elements of a tile that a program holds, by direction (two tensors backward), and how many of them a thread does.
# More would fit, with one program on a multiprocessor: nothing is computed while it loads.
_RESIDENT = {False: 16384, True: 8192}
_PER_THREAD = {False: 32, True: 16}


@dataclass(frozen=True)
class Plan:
    """Blocks of all kernels for one shape."""

    size: int  # channels of a group
    resident: bool
    block_g: int  # whole groups of a resident program
    block_c: int
    block_p: int
    warps: int
    chunk: int  # pixels of a split program, and how many programs share a sample's pixels
    tiles: int


def plan(
    samples: int, channels: int, pixels: int, groups: int, *, channels_last: bool, itemsize: int, backward: bool,
    processors: int,
) -> Plan:  # fmt: skip
    """A plain function of the shape: no tuning run, and the same sums in the same order on the same device."""
    size, padded = channels // groups, triton.next_power_of_2(pixels)

    def tile(block_g: int) -> int:
        return padded * triton.next_power_of_2(min(block_g, groups) * size)

    def wide(block_g: int, least: int) -> bool:
        """Rows of channels that start on 16 bytes and are long enough; the whole row is as long as it gets."""
        row = block_g * size * itemsize
        return not channels_last or block_g >= groups or (row % 16 == 0 and row >= least)

    limit = _RESIDENT[backward]
    powers = [2**i for i in range(groups.bit_length() + 1)]
    # 64 bytes of a row are two sectors; 32, one sector, is the least that wastes nothing.
    block_g = next(g for g in powers if wide(g, 64))
    if tile(block_g) > limit:
        block_g = next(g for g in powers if wide(g, 32))
    while block_g < groups and tile(2 * block_g) <= 4096:  # small pictures: something to do for every thread
        block_g *= 2
    programs = samples * triton.cdiv(groups, block_g)
    if tile(block_g) <= limit and (programs >= processors or tile(block_g) <= 8192):
        block_c = triton.next_power_of_2(min(block_g, groups) * size)
        warps = max(1, min(16, tile(block_g) // (32 * _PER_THREAD[backward])))
        return Plan(size, True, block_g, block_c, padded, warps, pixels, 1)

    # What lies side by side goes as far as 512 bytes or more; then the other way, to 4096 elements in all.
    whole = triton.next_power_of_2(channels)
    block_c = min(whole, 128) if channels_last else min(whole, 4096 // min(512, padded))
    block_p = min(padded, 4096 // block_c)
    wanted = triton.cdiv(4 * processors, samples * triton.cdiv(channels, block_c))
    tiles = min(wanted, triton.cdiv(pixels, block_p))
    chunk = triton.cdiv(triton.cdiv(pixels, tiles), block_p) * block_p
    return Plan(size, False, 1, block_c, block_p, 8, chunk, triton.cdiv(pixels, chunk))


@cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _combining(p: Plan, groups: int) -> dict[str, Any]:
    """Blocks of a combine kernel, some 256 channels a program, and the number of its programs for a sample."""
    block_s = triton.next_power_of_2(p.size)
    block_g = min(triton.next_power_of_2(groups), max(1, 256 // block_s))
    return {"SIZE": p.size, "BLOCK_S": block_s, "BLOCK_G": block_g, "num_warps": max(1, block_s * block_g // 128)}


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants)


class _Call:
    """A shape, its plan, and the arguments that its kernels have in common."""

    def __init__(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None, groups: int, backward: bool,
        processors: int | None,
    ) -> None:  # fmt: skip
        self.samples, self.channels = x.shape[:2]
        self.pixels, self.groups = x[0, 0].numel(), groups
        last = self.pixels == 1 or not x.is_contiguous()
        self.plan = p = plan(
            self.samples, self.channels, self.pixels, groups, channels_last=last, itemsize=x.element_size(),
            backward=backward, processors=processors or _processors(x.device),
        )  # fmt: skip
        self.shape = (self.channels, self.pixels, groups)
        self.strides = tuple(0 if v is None else v.stride(0) for v in (scale, shift, add))
        self.tile = {"BLOCK_C": p.block_c, "BLOCK_P": p.block_p, "CHANNELS_LAST": last, "num_warps": p.warps}
        if p.resident:
            self.programs = self.samples * triton.cdiv(groups, p.block_g)
            self.tile |= {"SIZE": p.size, "BLOCK_G": p.block_g}
        else:
            self.programs = self.samples * p.tiles * triton.cdiv(self.channels, p.block_c)
            self.combine = _combining(p, groups)
            self.combining = self.samples * triton.cdiv(groups, self.combine["BLOCK_G"])

    def partial(self, x: Tensor, sums: int) -> Tensor:
        return torch.empty((self.samples, self.plan.tiles, sums, self.channels), dtype=torch.float32, device=x.device)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    y: Tensor, mean: Tensor, rstd: Tensor, groups: int, eps: float, silu: bool, *,
    launch: Callable[..., None] = _launch, processors: int | None = None,
) -> None:  # fmt: skip
    """Fills y, mean and rstd."""
    call = _Call(x, scale, shift, add, groups, False, processors)
    p, shape = call.plan, call.shape
    affine = (weight, bias, scale, shift, add, *call.strides)
    with device_guard(x):
        if p.resident:
            launch(
                kernels.forward_resident, call.programs, y, mean, rstd, x, *affine, *shape, eps, SILU=silu, **call.tile
            )
            return
        partial, cut = call.partial(x, 2), (p.tiles, p.chunk)
        launch(kernels.partial_moments, call.programs, partial, x, *shape[:2], *cut, **call.tile)
        launch(
            kernels.combine_moments, call.combining, mean, rstd, partial, add, call.strides[2], *shape, *cut, eps,
            **call.combine,
        )  # fmt: skip
        launch(
            kernels.forward_split, call.programs, y, x, mean, rstd, *affine, *shape, *cut, SIZE=p.size, SILU=silu,
            **call.tile,
        )  # fmt: skip


def group_norm_silu_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, dx: Tensor, sum_dv: Tensor, sum_dvz: Tensor, d_weight: Tensor,
    d_bias: Tensor, d_scale: Tensor | None, d_add: Tensor | None, groups: int, silu: bool, *,
    launch: Callable[..., None] = _launch, processors: int | None = None,
) -> None:  # fmt: skip
    """Fills dx, the sums of each sample and channel, and the gradients of the parameters."""
    call = _Call(x, scale, shift, add, groups, True, processors)
    p, shape = call.plan, call.shape
    affine = (weight, bias, scale, shift, add, *call.strides)
    sums = (sum_dv, sum_dvz, d_scale, d_add)
    with device_guard(x):
        if p.resident:
            launch(
                kernels.backward_resident, call.programs, dx, *sums, dy, x, mean, rstd, *affine, *shape, SILU=silu,
                **call.tile,
            )  # fmt: skip
        else:
            partial, means, cut = call.partial(x, 3), torch.empty_like(mean.expand(2, -1, -1)), (p.tiles, p.chunk)
            split = {"SIZE": p.size, "SILU": silu, **call.tile}
            launch(kernels.partial_sums, call.programs, partial, dy, x, mean, rstd, *affine, *shape, *cut, **split)
            launch(
                kernels.combine_sums, call.combining, means, *sums, partial, rstd, weight, bias, scale,
                call.strides[0], *shape, p.tiles, **call.combine,
            )  # fmt: skip
            launch(
                kernels.backward_split, call.programs, dx, dy, x, mean, rstd, means, *affine, call.samples, *shape,
                *cut, **split,
            )  # fmt: skip
        columns = min(128, triton.next_power_of_2(call.channels))
        launch(
            kernels.parameter_gradients, triton.cdiv(call.channels, columns), d_weight, d_bias, sum_dv, sum_dvz, scale,
            call.strides[0], call.samples, call.channels, BLOCK_N=8, BLOCK_C=columns, num_warps=4,
        )  # fmt: skip


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_IN_USE = [  # shape of x, groups, dtype, channels-last, optional inputs
    ((64, 256, 32, 32), 32, torch.bfloat16, True, ("scale", "shift")),
    ((64, 256, 32, 32), 32, torch.float32, True, ()),
    ((64, 256, 32, 32), 32, torch.bfloat16, False, ("add",)),
    ((64, 128, 64, 64), 32, torch.bfloat16, True, ("add",)),
    ((8, 256, 64, 64), 32, torch.float32, False, ("scale", "shift")),
    ((64, 192, 16, 16), 32, torch.bfloat16, True, ("scale", "shift")),
]


def aot_cases() -> list[AotCase]:
    """What the launchers launch on 132 multiprocessors for `_IN_USE`, specialised as Triton does for its arguments."""
    from fastambient_kernels.aot import launched

    cases: dict[str, AotCase] = {}

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        streamed = tuple(a for a in ("x", "dy", "y", "dx") if a in kernel.arg_names)
        name = f"group_norm_silu {kernel.__name__} {title if streamed else ''}".strip()
        tails = ("x",) if kernel is kernels.partial_moments else ()
        cases.setdefault(name, launched(name, kernel, programs, arguments, constants, streamed=streamed, tails=tails))

    for shape, groups, dtype, last, optional in _IN_USE:
        n, c = shape[:2]
        title = f"{'x'.join(map(str, shape))} {_TYPES[dtype]}{' nhwc' if last else ''} {'+'.join(optional)}".strip()
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        weight, rows, statistics = torch.empty(c), torch.empty(n, c), torch.empty(n, groups)
        scale, shift, add = (rows if name in optional else None for name in ("scale", "shift", "add"))
        affine = (weight, weight, scale, shift, add)
        options: dict[str, Any] = {"launch": record, "processors": 132}
        forward: list[Any] = [x, *affine, x, statistics, statistics, groups, 1e-5, True]
        backward: list[Any] = [x, x, statistics, statistics, *affine, x, rows, rows, weight, weight, scale, add]
        backward += [groups, True]
        group_norm_silu(*forward, **options)
        group_norm_silu_backward(*backward, **options)
    return list(cases.values())
