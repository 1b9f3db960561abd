"""Triton kernels of `ambient_noise` and `ambient_loss`; the mathematics is in ambient.py.

A program makes ROWS * VECTOR elements of one sample in the unflipped C,H,W order of the noise contract: each Philox
call gives four neighbours, and images are read with wide loads. Where a pixel goes (a flip, channels last) is only an
index of what is written, and of F. The regime is a scalar branch: clean samples make no fixed noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastambient_kernels.triton_common import INTERPRETED, cast_rne, device_guard, elements, normals

if TYPE_CHECKING:
    from fastambient_kernels.aot import AotCase

_BUFFER_EDGE = tl.constexpr((4 / 3) ** 0.5)  # sqrt(1 + 1/(m-1)) of "unit" weighting
_BYTES = {"u8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


@triton.jit
def _scalars(s, sigma_tn, sigma_data, UNIT: tl.constexpr):
    """(c_in, tau, q, A, alpha, beta) of a sample.

    Written in rho = q/s and tau/s, both regimes are one formula; tau = 0 makes it the clean one.
    """
    ambient = (s >= sigma_tn) & (sigma_tn > 0.0)
    tau = tl.where(ambient, sigma_tn, 0.0)
    h = tl.sqrt_rn(s * s + sigma_data * sigma_data)
    q = tl.sqrt_rn((s - tau) * (s + tau))
    rho = tl.where(ambient, q / s, 1.0)
    a = rho * rho
    clean_alpha, share = s / (sigma_data * h), (tau / s) * (tau / s) * (h / sigma_data)
    if UNIT:
        kept = s >= tau * _BUFFER_EDGE
        A = tl.where(kept, 1.0, 0.0)
        alpha = tl.where(kept, clean_alpha, 0.0)
        beta = tl.where(kept, -(share / tl.where(kept, rho, 1.0) + rho * (sigma_data / h)), 0.0)
    else:
        A = a
        alpha = a * clean_alpha
        beta = -rho * (share + a * (sigma_data / h))
    return 1.0 / h, tau, q, A, alpha, beta


@triton.jit
def _image(images, place, inside):
    pixel = tl.load(images + place, mask=inside, other=0).to(tl.float32)
    if images.dtype.element_ty == tl.uint8:
        pixel = tl.fma(pixel, 0.00784313725490196, -1.0)  # / 127.5 - 1
    return pixel


@triton.jit
def _visible(images, x_n, place, inside, tau, noise_seed, id, row, HAS_X_N: tl.constexpr, VECTOR: tl.constexpr):
    """y in float32: the image, its stored noised copy, or the image with its fixed noise."""
    if HAS_X_N:
        if tau > 0.0:
            y = tl.load(x_n + place, mask=inside, other=0.0).to(tl.float32)
        else:
            y = _image(images, place, inside)
    else:
        y = _image(images, place, inside)
        if tau > 0.0:
            y = tl.fma(normals(noise_seed, id, 0, row, VECTOR), tau, y)
    return y


@triton.jit
def _place(e, flip, channels, plane, width, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr):
    """Where element e of a sample lies in the output. ALIGNED: the width is a multiple of 4, so that four neighbours
    share their divisions."""
    start = e & -4 if ALIGNED else e
    w = start % width + (e - start)
    mirrored = e + tl.where(flip, width - 1 - 2 * w, 0)
    if CHANNELS_LAST:
        c = start // plane
        return (mirrored - c * plane) * channels + c
    return mirrored


@triton.jit
def ambient_noise_kernel(
    out, table, images, x_n, ids, flips, positions, sigma, noise_seed, run_seed,
    samples, numel, channels, plane, width, tiles, sigma_tn, sigma_data,
    HAS_X_N: tl.constexpr, HAS_FLIPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n, tile = pid // tiles, pid % tiles
    s = tl.load(sigma + n)
    c_in, tau, q, A, alpha, beta = _scalars(s, sigma_tn, sigma_data, False)
    if tile == 0:
        tl.store(table + n, c_in)
        tl.store(table + samples + n, tl.log(s) / 4)
        tl.store(table + 2 * samples + n, tau)
        tl.store(table + 3 * samples + n, q)
        tl.store(table + 4 * samples + n, A)
        tl.store(table + 5 * samples + n, alpha)
        tl.store(table + 6 * samples + n, beta)
    row = tile * ROWS + tl.arange(0, ROWS)
    e = elements(row, VECTOR)
    inside = e < numel
    base = n.to(tl.int64) * numel
    y = _visible(images, x_n, base + e, inside, tau, tl.load(noise_seed), tl.load(ids + n), row, HAS_X_N, VECTOR)
    eps = normals(tl.load(run_seed), tl.load(positions + n), 1, row, VECTOR)
    x = cast_rne(c_in * tl.fma(eps, q, y), out.dtype.element_ty)
    flip = False
    if HAS_FLIPS:
        flip = tl.load(flips + n) != 0
    if CHANNELS_LAST or flip:
        tl.store(out + base + _place(e, flip, channels, plane, width, CHANNELS_LAST, ALIGNED), x, mask=inside)
    else:
        tl.store(out + base + e, x, mask=inside)


@triton.jit
def ambient_loss_kernel(
    partial, dF, F, images, x_n, ids, flips, positions, sigma, noise_seed, run_seed,
    numel, channels, plane, width, tiles, sigma_tn, sigma_data,
    HAS_X_N: tl.constexpr, HAS_FLIPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n, tile = pid // tiles, pid % tiles
    _, tau, _, A, alpha, beta = _scalars(tl.load(sigma + n), sigma_tn, sigma_data, UNIT)
    row = tile * ROWS + tl.arange(0, ROWS)
    e = elements(row, VECTOR)
    inside = e < numel
    base = n.to(tl.int64) * numel
    y = _visible(images, x_n, base + e, inside, tau, tl.load(noise_seed), tl.load(ids + n), row, HAS_X_N, VECTOR)
    eps = normals(tl.load(run_seed), tl.load(positions + n), 1, row, VECTOR)
    target = tl.fma(eps, beta, alpha * y)
    flip = False
    if HAS_FLIPS:
        flip = tl.load(flips + n) != 0
    if CHANNELS_LAST or flip:
        place = base + _place(e, flip, channels, plane, width, CHANNELS_LAST, ALIGNED)
        residual = tl.fma(tl.load(F + place, mask=inside, other=0.0).to(tl.float32), A, -target)
        tl.store(dF + place, cast_rne(2.0 * A * residual, dF.dtype.element_ty), mask=inside)
    else:
        residual = tl.fma(tl.load(F + base + e, mask=inside, other=0.0).to(tl.float32), A, -target)
        tl.store(dF + base + e, cast_rne(2.0 * A * residual, dF.dtype.element_ty), mask=inside)
    tl.store(partial + pid, tl.sum(tl.sum(tl.where(inside, residual * residual, 0.0), 1), 0))


def configuration(numel: int, itemsize: int) -> dict[str, int]:
    """Rows of 16 bytes of the network's tensor that a program makes of a sample of `numel` elements: 8 elements a
    thread; interpreted, few programs."""
    vector = 16 // itemsize
    if INTERPRETED:
        return {"VECTOR": vector, "ROWS": min(triton.next_power_of_2(triton.cdiv(numel, vector)), 8192)}
    block = 1024 if numel > 512 else 256
    if torch.version.hip:  # warps of 64 lanes: a lane holds a whole row, so that its accesses are 128 bits wide
        block = max(block, 64 * vector)
        warps = block // (64 * vector)
    else:
        warps = block // 256
    return {"VECTOR": vector, "ROWS": block // vector, "num_warps": warps}


def _prepare(
    streamed: Tensor, images: Tensor, flips: Tensor | None, x_n: Tensor | None, channels_last: bool
) -> tuple[int, dict[str, Any]]:
    """(programs a sample, constexprs and warps)."""
    numel = images.shape[1:].numel()
    keywords: dict[str, Any] = configuration(numel, streamed.element_size())
    tiles = triton.cdiv(numel, keywords["ROWS"] * keywords["VECTOR"])
    keywords |= {"HAS_X_N": x_n is not None, "HAS_FLIPS": flips is not None, "CHANNELS_LAST": channels_last}
    return tiles, keywords | {"ALIGNED": images.shape[3] % 4 == 0}


def noise(
    net_input: Tensor, table: Tensor, images: Tensor, ids: Tensor, flips: Tensor | None, positions: Tensor,
    sigma: Tensor, x_n: Tensor | None, noise_seed: Tensor, run_seed: Tensor, sigma_tn: float, sigma_data: float,
    channels_last: bool,
) -> None:  # fmt: skip
    """Fill `net_input` (shape of `images`, float32 or bfloat16) and `table` [7, N], the columns of Coefficients."""
    n, c, h, w = images.shape
    tiles, keywords = _prepare(net_input, images, flips, x_n, channels_last)
    with device_guard(images):
        ambient_noise_kernel[(n * tiles,)](
            net_input, table, images, x_n, ids, flips, positions, sigma, noise_seed, run_seed,
            n, c * h * w, c, h * w, w, tiles, sigma_tn, sigma_data, **keywords,
        )  # fmt: skip


def loss(
    dF: Tensor, F: Tensor, images: Tensor, ids: Tensor, flips: Tensor | None, positions: Tensor, sigma: Tensor,
    x_n: Tensor | None, noise_seed: Tensor, run_seed: Tensor, sigma_tn: float, sigma_data: float, unit: bool,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    """Fill `dF`, which lies in memory as `F` does, and return the losses, float32 [N]."""
    n, c, h, w = images.shape
    tiles, keywords = _prepare(F, images, flips, x_n, channels_last)
    partial = torch.empty(n, tiles, device=F.device)
    with device_guard(images):
        ambient_loss_kernel[(n * tiles,)](
            partial, dF, F, images, x_n, ids, flips, positions, sigma, noise_seed, run_seed,
            c * h * w, c, h * w, w, tiles, sigma_tn, sigma_data, UNIT=unit, **keywords,
        )  # fmt: skip
    return partial.sum(1)


def aot_cases() -> list[AotCase]:
    from fastambient_kernels.aot import AotCase

    shared = {
        "ids": "*i64", "flips": "*i1", "positions": "*i64", "sigma": "*fp32", "noise_seed": "*i64", "run_seed": "*i64",
        "numel": "i32", "channels": "i32", "plane": "i32", "width": "i32", "tiles": "i32",
        "sigma_tn": "fp32", "sigma_data": "fp32",
    }  # fmt: skip
    pointers = ("ids", "flips", "positions", "sigma", "noise_seed", "run_seed", "numel", "plane", "width")
    cases = []
    # (image, x_n, output or F, flips, channels last, elements of a program, unit weighting). Small images (8 pixels)
    # take programs of 256 elements, of 512 on AMD in bfloat16; flips are off only where a user turned them off.
    for image, x_n, streamed, flips, last, block, unit in [
        ("u8", None, "bf16", True, False, 1024, False), ("u8", None, "fp32", True, False, 1024, False),
        ("u8", None, "fp32", False, False, 1024, True), ("u8", None, "bf16", True, True, 1024, False),
        ("u8", "fp16", "bf16", True, False, 1024, False), ("fp32", "fp32", "fp32", True, False, 1024, False),
        ("u8", None, "fp32", True, True, 1024, True), ("fp32", "fp16", "bf16", False, True, 1024, True),
        ("u8", None, "bf16", True, False, 256, False), ("u8", None, "bf16", True, False, 512, False),
        ("u8", None, "fp32", True, False, 256, False), ("u8", None, "fp32", True, True, 256, False),
    ]:  # fmt: skip
        signature = shared | {"images": f"*{image}"}
        constants: dict[str, Any] = {
            "HAS_X_N": x_n is not None,
            "HAS_FLIPS": flips,
            "CHANNELS_LAST": last,
            "ALIGNED": True,
        }
        constants |= {"VECTOR": 16 // _BYTES[streamed], "ROWS": block * _BYTES[streamed] // 16}
        for name, optional in (("x_n", f"*{x_n}" if x_n else None), ("flips", "*i1" if flips else None)):
            if optional:
                signature[name] = optional
            else:
                constants[name] = None
                signature.pop(name, None)
        words = f"{image}{f' x_n {x_n}' if x_n else ''} {streamed}{' nhwc' if last else ''}{' flips' if flips else ''}"
        words += f" {block}" if block != 1024 else ""
        launch: dict[str, Any] = {"num_warps": block // 256, "amd_warps": max(1, block // (64 * constants["VECTOR"]))}
        if streamed == "bf16" and block < 1024:
            launch["targets"] = ("gfx942",) if block == 512 else ("sm_80", "sm_90", "sm_100")
        attrs = dict.fromkeys((k for k in (*pointers, "images", "x_n") if k in signature), 16)
        # A flipped sample writes its pixels in the other order, channels last three apart: narrow, beside wide ones.
        wide: tuple[str, ...] = () if last else ("out",)
        cases.append(AotCase(
            name=f"ambient_noise {words}", kernel=ambient_noise_kernel,
            signature=signature | {"out": f"*{streamed}", "table": "*fp32", "samples": "i32"}, constexprs=constants,
            attrs=attrs | {"out": 16, "table": 16}, streamed=wide, tails=wide if flips else (),
            elements=block * (_BYTES[image] + _BYTES[streamed]), max_instructions=1500, max_registers=64, **launch,
        ))  # fmt: skip
        wide = () if last else ("F", "dF")
        cases.append(AotCase(
            name=f"ambient_loss {words}{' unit' if unit else ''}", kernel=ambient_loss_kernel,
            signature=signature | {"partial": "*fp32", "F": f"*{streamed}", "dF": f"*{streamed}"},
            constexprs=constants | {"UNIT": unit}, attrs=attrs | {"partial": 16, "F": 16, "dF": 16}, streamed=wide,
            tails=wide if flips else (), elements=block * (_BYTES[image] + 2 * _BYTES[streamed]),
            max_instructions=1500, max_registers=96 if last else 64, **launch,
        ))  # fmt: skip
    return cases
