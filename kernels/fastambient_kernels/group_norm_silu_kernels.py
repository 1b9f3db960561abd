"""Triton kernels of `group_norm_silu`; mathematics and names are those of group_norm_silu.py, launches are in
group_norm_silu_triton.py.

A tile is BLOCK_P pixels of BLOCK_C channels of one sample. In both memory formats the compiler lays the threads along
what lies side by side, so one set of kernels serves both.

    resident   a program holds all pixels of BLOCK_G whole groups: one kernel, x (and dy) are read once
    split      pixels are shared among programs: sums of each channel over a chunk of pixels (`partial_*`), their
               combination (`combine_*`), then the elementwise pass (`*_split`)

Moments are two-pass where the tile is resident; elsewhere they are shifted by a value of the channel and combined by
Chan's rule. There are no atomics: a result depends on the shape and the plan alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastambient_kernels.triton_common import cast_rne


@triton.jit
def _affine(weight, bias, scale, shift, n, c, inside, scale_stride, shift_stride):
    """(k, b) per channel: w = k*z + b."""
    k = tl.load(weight + c, mask=inside, other=0.0)
    b = tl.load(bias + c, mask=inside, other=0.0)
    if scale is not None:
        s = 1.0 + tl.load(scale + n * scale_stride + c, mask=inside, other=0.0)
        k *= s
        b *= s
    if shift is not None:
        b += tl.load(shift + n * shift_stride + c, mask=inside, other=0.0)
    return k, b


@triton.jit
def _activation(w, SILU: tl.constexpr):
    return w / (1.0 + tl.exp(-w)) if SILU else w


@triton.jit
def _slope(w, SILU: tl.constexpr):
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-w))
        return s * tl.fma(w, 1.0 - s, 1.0)
    return tl.full(w.shape, 1.0, tl.float32)


@triton.jit
def _place(p, c, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets [P, C] from the tile's first element: 32 bits."""
    return p[:, None] * channels + c[None, :] if CHANNELS_LAST else c[None, :] * pixels + p[:, None]


@triton.jit
def _origin(n, c, p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Where channel c of pixel p of sample n (int64) lies: 64 bits."""
    wide = tl.cast(pixels, tl.int64)
    return (n * wide + p) * channels + c if CHANNELS_LAST else (n * channels + c) * wide + p


@triton.jit
def _group_sum(value, member, ONE: tl.constexpr):
    """[C] summed over each channel's group, as [C]; member [C, G] tells which that is; unused where there is ONE."""
    if ONE:
        return tl.zeros_like(value) + tl.sum(value, 0)
    by_group = tl.sum(tl.where(member, value[:, None], 0.0), 0)
    return tl.sum(tl.where(member, by_group[None, :], 0.0), 1)


@triton.jit
def forward_resident(
    y, mean, rstd, x, weight, bias, scale, shift, add, scale_stride, shift_stride, add_stride,
    channels, pixels, groups, eps, SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(groups, BLOCK_G)
    n, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_G
    local, p, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_G)
    c = first * SIZE + local
    has_c = (local < BLOCK_G * SIZE) & (c < channels)
    inside = (p < pixels)[:, None] & has_c[None, :]
    member = (local // SIZE)[:, None] == g[None, :]
    origin = _origin(n, first * SIZE, 0, channels, pixels, CHANNELS_LAST)
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    u = tl.load(x + origin + place, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        u += tl.load(add + n * add_stride + c, mask=has_c, other=0.0)[None, :]
        u = tl.where(inside, u, 0.0)
    k, b = _affine(weight, bias, scale, shift, n, c, has_c, scale_stride, shift_stride)
    count = tl.cast(pixels, tl.float32) * SIZE
    m = _group_sum(tl.sum(u, 0), member, BLOCK_G == 1) / count
    d = tl.where(inside, u - m[None, :], 0.0)
    r = 1.0 / tl.sqrt_rn(_group_sum(tl.sum(d * d, 0), member, BLOCK_G == 1) / count + eps)
    w = tl.fma(d, (k * r)[None, :], b[None, :])
    tl.store(y + origin + place, cast_rne(_activation(w, SILU), y.dtype.element_ty), mask=inside)
    heads = has_c & (local % SIZE == 0)
    tl.store(mean + n * groups + first + local // SIZE, m, mask=heads)
    tl.store(rstd + n * groups + first + local // SIZE, r, mask=heads)


@triton.jit
def _write_sums(sum_dv, sum_dvz, d_scale, d_add, bias, weight, n, c, inside, channels, s1, s2, add_gradient):
    at = n * channels + c
    tl.store(sum_dv + at, s1, mask=inside)
    tl.store(sum_dvz + at, s2, mask=inside)
    if d_scale is not None:
        gain, offset = tl.load(weight + c, mask=inside, other=0.0), tl.load(bias + c, mask=inside, other=0.0)
        tl.store(d_scale + at, gain * s2 + offset * s1, mask=inside)
    if d_add is not None:
        tl.store(d_add + at, add_gradient, mask=inside)


@triton.jit
def backward_resident(
    dx, sum_dv, sum_dvz, d_scale, d_add, dy, x, mean, rstd, weight, bias, scale, shift, add,
    scale_stride, shift_stride, add_stride, channels, pixels, groups, SIZE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(groups, BLOCK_G)
    n, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_G
    local, p, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_G)
    c = first * SIZE + local
    has_c = (local < BLOCK_G * SIZE) & (c < channels)
    inside = (p < pixels)[:, None] & has_c[None, :]
    member = (local // SIZE)[:, None] == g[None, :]
    origin = _origin(n, first * SIZE, 0, channels, pixels, CHANNELS_LAST)
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    z = tl.load(x + origin + place, mask=inside, other=0.0).to(tl.float32)
    dv = tl.load(dy + origin + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + n * groups + first + local // SIZE, mask=has_c, other=0.0)
    r = tl.load(rstd + n * groups + first + local // SIZE, mask=has_c, other=0.0)
    if add is not None:
        m -= tl.load(add + n * add_stride + c, mask=has_c, other=0.0)
    z = tl.where(inside, (z - m[None, :]) * r[None, :], 0.0)
    k, b = _affine(weight, bias, scale, shift, n, c, has_c, scale_stride, shift_stride)
    dv *= _slope(tl.fma(z, k[None, :], b[None, :]), SILU)
    s1, s2 = tl.sum(dv, 0), tl.sum(dv * z, 0)
    count = tl.cast(pixels, tl.float32) * SIZE
    g1 = _group_sum(k * s1, member, BLOCK_G == 1) / count
    g2 = _group_sum(k * s2, member, BLOCK_G == 1) / count
    gradient = r[None, :] * (k[None, :] * dv - g1[None, :] - z * g2[None, :])
    tl.store(dx + origin + place, cast_rne(gradient, dx.dtype.element_ty), mask=inside)
    add_gradient = s1
    if d_add is not None:
        add_gradient = r * (k * s1 - pixels * g1 - g2 * tl.sum(z, 0))
    _write_sums(sum_dv, sum_dvz, d_scale, d_add, bias, weight, n, c, has_c, channels, s1, s2, add_gradient)


@triton.jit
def _block(channels, pixels, tiles, chunk, BLOCK_C: tl.constexpr):
    """Of a program of a split kernel: sample, tile number, first channel, first pixel and the end of its pixels."""
    column_blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    n = (pid // (column_blocks * tiles)).to(tl.int64)
    tile = pid // column_blocks % tiles
    start = tile * chunk
    return n, tile, pid % column_blocks * BLOCK_C, start, tl.minimum(start + chunk, pixels)


@triton.jit
def partial_moments(
    partial, x, channels, pixels, tiles, chunk, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel of x over a chunk of pixels: partial [N, tiles, 2, C]."""
    n, tile, c0, start, end = _block(channels, pixels, tiles, chunk, BLOCK_C)
    local, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c = c0 + local
    has_c = c < channels
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    first = _origin(n, c0, start, channels, pixels, CHANNELS_LAST)
    shift = tl.load(x + first + (local if CHANNELS_LAST else local * pixels), mask=has_c, other=0.0).to(tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for at in range(start, end, BLOCK_P):
        inside = (at + p < end)[:, None] & has_c[None, :]
        origin = _origin(n, c0, at, channels, pixels, CHANNELS_LAST)
        value = tl.load(x + origin + place, mask=inside, other=0.0)
        d = tl.where(inside, value.to(tl.float32) - shift[None, :], 0.0)
        s1 += d
        s2 = tl.fma(d, d, s2)
    count = end - start
    delta = tl.sum(s1, 0) / count
    m2 = tl.maximum(tl.sum(s2, 0) - delta * delta * count, 0.0)
    to = partial + ((n * tiles + tile) * 2) * channels + c
    tl.store(to, shift + delta, mask=has_c)
    tl.store(to + channels, m2, mask=has_c)


@triton.jit
def combine_moments(
    mean, rstd, partial, add, add_stride, channels, pixels, groups, tiles, chunk, eps,
    SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """mean and rstd [N, G] of BLOCK_G groups of one sample from the partial moments; BLOCK_S >= SIZE channels each."""
    blocks = tl.cdiv(groups, BLOCK_G)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    g, s = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    c = g[:, None] * SIZE + s[None, :]
    inside = (g < groups)[:, None] & (s < SIZE)[None, :]
    m = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    m2 = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    seen = 0.0
    for tile in range(tiles):
        count = tl.minimum(chunk, pixels - tile * chunk).to(tl.float32)
        source = partial + ((n * tiles + tile) * 2) * channels + c
        delta = tl.load(source, mask=inside, other=0.0) - m
        share = count / (seen + count)
        m = tl.fma(delta, share, m)
        m2 += tl.load(source + channels, mask=inside, other=0.0) + delta * delta * (seen * share)
        seen += count
    if add is not None:
        m += tl.load(add + n * add_stride + c, mask=inside, other=0.0)
    of_group = tl.sum(tl.where(inside, m, 0.0), 1) / SIZE
    d = tl.where(inside, m - of_group[:, None], 0.0)
    variance = tl.sum(m2 + d * d * tl.cast(pixels, tl.float32), 1) / (tl.cast(pixels, tl.float32) * SIZE)
    tl.store(mean + n * groups + g, of_group, mask=g < groups)
    tl.store(rstd + n * groups + g, 1.0 / tl.sqrt_rn(variance + eps), mask=g < groups)


@triton.jit
def _channel_statistics(mean, rstd, add, n, c, has_c, groups, add_stride, SIZE: tl.constexpr):
    """(m, r) [C]: z = (x - m)*r."""
    m = tl.load(mean + n * groups + c // SIZE, mask=has_c, other=0.0)
    r = tl.load(rstd + n * groups + c // SIZE, mask=has_c, other=0.0)
    if add is not None:
        m -= tl.load(add + n * add_stride + c, mask=has_c, other=0.0)
    return m, r


@triton.jit
def forward_split(
    y, x, mean, rstd, weight, bias, scale, shift, add, scale_stride, shift_stride, add_stride,
    channels, pixels, groups, tiles, chunk, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n, _, c0, start, end = _block(channels, pixels, tiles, chunk, BLOCK_C)
    local, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c = c0 + local
    has_c = c < channels
    m, r = _channel_statistics(mean, rstd, add, n, c, has_c, groups, add_stride, SIZE)
    k, b = _affine(weight, bias, scale, shift, n, c, has_c, scale_stride, shift_stride)
    k *= r
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    for at in range(start, end, BLOCK_P):
        inside = (at + p < end)[:, None] & has_c[None, :]
        origin = _origin(n, c0, at, channels, pixels, CHANNELS_LAST)
        value = tl.load(x + origin + place, mask=inside, other=0.0).to(tl.float32)
        w = tl.fma(value - m[None, :], k[None, :], b[None, :])
        tl.store(y + origin + place, cast_rne(_activation(w, SILU), y.dtype.element_ty), mask=inside)


@triton.jit
def partial_sums(
    partial, dy, x, mean, rstd, weight, bias, scale, shift, add, scale_stride, shift_stride, add_stride,
    channels, pixels, groups, tiles, chunk, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums of dv, dv*z and z of each channel over a chunk of pixels: partial [N, tiles, 3, C]."""
    n, tile, c0, start, end = _block(channels, pixels, tiles, chunk, BLOCK_C)
    local, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c = c0 + local
    has_c = c < channels
    m, r = _channel_statistics(mean, rstd, add, n, c, has_c, groups, add_stride, SIZE)
    k, b = _affine(weight, bias, scale, shift, n, c, has_c, scale_stride, shift_stride)
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    s0 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for at in range(start, end, BLOCK_P):
        inside = (at + p < end)[:, None] & has_c[None, :]
        origin = _origin(n, c0, at, channels, pixels, CHANNELS_LAST)
        z = (tl.load(x + origin + place, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
        dv = tl.load(dy + origin + place, mask=inside, other=0.0).to(tl.float32)
        dv *= _slope(tl.fma(z, k[None, :], b[None, :]), SILU)
        s1 += dv
        s2 = tl.fma(dv, z, s2)
        if add is not None:
            s0 += tl.where(inside, z, 0.0)
    to = partial + ((n * tiles + tile) * 3) * channels + c
    tl.store(to, tl.sum(s1, 0), mask=has_c)
    tl.store(to + channels, tl.sum(s2, 0), mask=has_c)
    if add is not None:
        tl.store(to + 2 * channels, tl.sum(s0, 0), mask=has_c)


@triton.jit
def combine_sums(
    means, sum_dv, sum_dvz, d_scale, d_add, partial, rstd, weight, bias, scale, scale_stride,
    channels, pixels, groups, tiles, SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The sums of each channel, and means [2, N, G] over groups of k*dv and k*dv*z."""
    blocks = tl.cdiv(groups, BLOCK_G)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    g, s = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    c = g[:, None] * SIZE + s[None, :]
    inside = (g < groups)[:, None] & (s < SIZE)[None, :]
    s0 = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    s1 = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    s2 = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    for tile in range(tiles):
        source = partial + ((n * tiles + tile) * 3) * channels + c
        s1 += tl.load(source, mask=inside, other=0.0)
        s2 += tl.load(source + channels, mask=inside, other=0.0)
        if d_add is not None:
            s0 += tl.load(source + 2 * channels, mask=inside, other=0.0)
    k, _ = _affine(weight, bias, scale, None, n, c, inside, scale_stride, 0)
    count = tl.cast(pixels, tl.float32) * SIZE
    g1, g2 = tl.sum(k * s1, 1) / count, tl.sum(k * s2, 1) / count
    samples = tl.num_programs(0) // blocks
    tl.store(means + n * groups + g, g1, mask=g < groups)
    tl.store(means + (samples + n) * groups + g, g2, mask=g < groups)
    add_gradient = s1
    if d_add is not None:
        r = tl.load(rstd + n * groups + g, mask=g < groups, other=0.0)[:, None]
        add_gradient = r * (k * s1 - pixels * g1[:, None] - s0 * g2[:, None])
    _write_sums(sum_dv, sum_dvz, d_scale, d_add, bias, weight, n, c, inside, channels, s1, s2, add_gradient)


@triton.jit
def backward_split(
    dx, dy, x, mean, rstd, means, weight, bias, scale, shift, add, scale_stride, shift_stride, add_stride,
    samples, channels, pixels, groups, tiles, chunk, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n, _, c0, start, end = _block(channels, pixels, tiles, chunk, BLOCK_C)
    local, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c = c0 + local
    has_c = c < channels
    m, r = _channel_statistics(mean, rstd, add, n, c, has_c, groups, add_stride, SIZE)
    k, b = _affine(weight, bias, scale, shift, n, c, has_c, scale_stride, shift_stride)
    g1 = r * tl.load(means + n * groups + c // SIZE, mask=has_c, other=0.0)
    g2 = r * tl.load(means + (samples + n) * groups + c // SIZE, mask=has_c, other=0.0)
    place = _place(p, local, channels, pixels, CHANNELS_LAST)
    for at in range(start, end, BLOCK_P):
        inside = (at + p < end)[:, None] & has_c[None, :]
        origin = _origin(n, c0, at, channels, pixels, CHANNELS_LAST)
        z = (tl.load(x + origin + place, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
        dv = tl.load(dy + origin + place, mask=inside, other=0.0).to(tl.float32)
        dv *= _slope(tl.fma(z, k[None, :], b[None, :]), SILU)
        gradient = (r * k)[None, :] * dv - g1[None, :] - z * g2[None, :]
        tl.store(dx + origin + place, cast_rne(gradient, dx.dtype.element_ty), mask=inside)


@triton.jit
def parameter_gradients(
    d_weight, d_bias, sum_dv, sum_dvz, scale, scale_stride, samples, channels,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the samples, in order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for at in range(0, samples, BLOCK_N):
        n = (at + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        inside = (n < samples) & (c < channels)[None, :]
        s1 = tl.load(sum_dv + n * channels + c[None, :], mask=inside, other=0.0)
        s2 = tl.load(sum_dvz + n * channels + c[None, :], mask=inside, other=0.0)
        if scale is not None:
            gain = 1.0 + tl.load(scale + n * scale_stride + c[None, :], mask=inside, other=0.0)
            s1 *= gain
            s2 *= gain
        db += s1
        dw += s2
    tl.store(d_weight + c, tl.sum(dw, 0), mask=c < channels)
    tl.store(d_bias + c, tl.sum(db, 0), mask=c < channels)
