"""Counter-based noise: Philox4x32-10 and normals by Box-Muller.

Mathematics
-----------
Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) maps a 128-bit counter and a
64-bit key to four 32-bit words. Here

    key     = (low, high 32 bits of the seed)
    counter = (element // 4, id low, id high, stream)

so that a draw is a pure function of (seed, stream, id, element): the same on every rank, device and resume, and in
any order. Four words r_0..r_3 give uniforms u_j = (r_j >> 8) * 2^-24 and normals

    R = sqrt(-2 ln max(u_a, 1e-7)),  z_a = R cos(2 pi u_b),  z_b = R sin(2 pi u_b)   for (a, b) = (0, 1), (2, 3)

with lane = element % 4; |z| <= sqrt(-2 ln 1e-7) = 5.68.

The words are integers, equal in every implementation to the last bit. Of `normal` there is the reference alone: fast
paths make normals where they are used.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
from torch import Tensor

from fastambient_kernels._registration import choose, register, seed_tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers of the round function
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_MASK = 0xFFFFFFFF
_U_MIN = 1e-7  # keeps ln finite, and equal in every implementation


class Stream(enum.IntEnum):
    """The last counter word: what a draw is for. Ids are image ids in FIXED, an epoch in ORDER, a sample seed in
    LATENT, and positions (images seen so far + index in the global batch) in all others."""

    FIXED = 0  # the one noise of a training image, under the noise seed
    FRESH = 1  # the noise of a training step
    SIGMA = 2
    AUGMENT = 3  # flips and geometric augmentation
    DROPOUT = 4
    LATENT = 5
    ORDER = 6  # permutations of a data set


def _mulhilo(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit values held in int64, without leaving 63 bits."""
    low, high = (x & 0xFFFF) * m, (x >> 16) * m  # each below 2^48
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor | int, k1: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. All arguments broadcast; words are int64 tensors in [0, 2^32)."""
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def split_words(value: int | Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(low, high) 32-bit words of a 64-bit integer, signed or unsigned, as int64 tensors."""
    if not isinstance(value, Tensor):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"a seed must fit in 64 bits, got {value}")
        value &= 0xFFFFFFFFFFFFFFFF
        return torch.tensor(value & _MASK, device=device), torch.tensor(value >> 32, device=device)
    if value.dtype != torch.int64:
        raise TypeError(f"seeds and ids must be int64, got {value.dtype}")
    return value & _MASK, (value >> 32) & _MASK


def _reference_words(ids: Tensor, seed: Tensor, stream: int, first: int, count: int) -> Tensor:
    k0, k1 = split_words(seed, ids.device)
    low, high = split_words(ids)
    blocks = torch.arange(first // 4, first // 4 + -(-count // 4), device=ids.device)
    shape = (ids.shape[0], blocks.shape[0])
    words = philox4x32(
        blocks[None].expand(shape), low[:, None].expand(shape), high[:, None].expand(shape),
        torch.full(shape, stream, device=ids.device), k0, k1,
    )  # fmt: skip
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def _run_words(impl: str) -> Any:
    def run(ids: Tensor, seed: Tensor, stream: int, first: int, count: int) -> Tensor:
        out = torch.empty(ids.shape[0], count, dtype=torch.int64, device=ids.device)
        if impl == "native":
            torch.ops.fastambient_native.random_words(ids, seed, stream, first, out)
        else:
            from fastambient_kernels import random_triton  # type: ignore[attr-defined]

            random_triton.words(ids, seed, stream, first, out)
        return out

    return run


def _fake_words(ids: Tensor, seed: Tensor, stream: int, first: int, count: int) -> Tensor:
    return ids.new_empty(ids.shape[0], count)


_word_ops = {
    impl: register(
        f"random_words_{impl}(Tensor ids, Tensor seed, int stream, int first, int count) -> Tensor",
        _run_words(impl),
        _fake_words,
    )
    for impl in ("native", "triton")
}


def random_words(
    ids: Tensor, count: int, *, seed: int | Tensor, stream: int, first: int = 0, impl: str = "auto"
) -> Tensor:
    """Words of elements first .. first + count - 1 for each id.

    Parameters
    ----------
    ids : int64 [N]
    count : words of each id, >= 0
    seed : 64 bits, a Python integer or an int64 tensor with one element
    stream : what the draw is for, see `Stream`; 32 bits
    first : a multiple of 4; first + count <= 2^34
    impl : "auto", "reference", "triton" or "native"

    Returns
    -------
    int64 [N, count] in [0, 2^32)

    Raises
    ------
    TypeError, ValueError : wrong dtypes, shapes or ranges
    RuntimeError : the implementation that was asked for is not available here
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise TypeError(f"ids must be int64 [N], got {ids.dtype} {list(ids.shape)}")
    if first % 4 or not 0 <= first <= 2**34 - count:
        raise ValueError(f"first must be a multiple of 4, and all words of 2^34, got {first} and {count} words")
    key = seed_tensor(seed, ids.device)
    taken = choose("random_words", impl, ids.device)
    if taken == "reference" or ids.shape[0] * count == 0:
        return _reference_words(ids, key, int(stream), first, count)
    return _word_ops[taken](ids.contiguous(), key, int(stream), first, count)


def uniform(
    ids: Tensor, count: int, *, seed: int | Tensor, stream: int, first: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniforms in [0, 1) with 24 bits, [N, count]; arguments as in `random_words`."""
    return (random_words(ids, count, seed=seed, stream=stream, first=first) >> 8).to(dtype) * 2.0**-24


def normal(ids: Tensor, count: int, *, seed: int | Tensor, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, [N, count]; arguments as in `random_words`. `dtype` is also the precision of Box-Muller."""
    work = torch.promote_types(dtype, torch.float32)
    bits = (random_words(ids, -(-count // 4) * 4, seed=seed, stream=stream) >> 8).unflatten(1, (-1, 2, 2))
    radius = torch.sqrt(-2.0 * torch.log((bits[..., 0].to(work) * 2.0**-24).clamp(min=_U_MIN)))
    # 2*pi*u in float32 is off by up to 2.4e-7. The word's 24 bits are a fraction of a turn, so its nearest quarter and
    # the rest, in [-pi/4, pi/4], come out exactly in integers.
    quarter = (bits[..., 1] + 2**21) >> 22
    rest = (bits[..., 1] - (quarter << 22)).to(work) * (math.pi / 2 * 2.0**-22)
    sin, cos = torch.sin(rest), torch.cos(rest)
    odd = (quarter & 1).bool()
    z_a = torch.where(odd, sin, cos) * (1 - ((quarter + 1) & 2))  # cosine is negative in quarters 1 and 2
    z_b = torch.where(odd, cos, sin) * (1 - (quarter & 2))  # sine in 2 and 3
    z = radius[..., None] * torch.stack([z_a, z_b], dim=-1)
    return z.flatten(1)[:, :count].to(dtype)
