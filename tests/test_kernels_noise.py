"""The noise contract: known answers, purity, range, distribution."""

from __future__ import annotations

import math

import pytest
import torch

from fastambient_kernels.noise import Stream, normal, philox4x32, random_words, uniform

KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    out = philox4x32(*map(torch.tensor, counter), *map(torch.tensor, key))
    assert [f"{int(w):08x}" for w in out] == words.split()


def test_normals_known_answers():
    first = normal(torch.tensor([0]), 4, seed=0, stream=0)[0]
    torch.testing.assert_close(
        first, torch.tensor([0.9911376, -0.9246629, -0.6176091, -0.4820684]), atol=2e-7, rtol=2e-7
    )
    # counter (243f6a88, id 85a308d3 + 13198a2e << 32, stream 03707344), key a4093822 299f31d0
    element = 0x243F6A88 * 4
    ids = torch.tensor([0x85A308D3 | 0x13198A2E << 32])
    words = random_words(ids, 4, seed=0xA4093822 | 0x299F31D0 << 32, stream=0x03707344, first=element)
    assert [f"{int(w):08x}" for w in words[0]] == KNOWN[2][2].split()
    u = (words[0] >> 8) * 2.0**-24
    z = torch.sqrt(-2 * torch.log(u[0])) * torch.cos(2 * torch.pi * u[1])
    assert z.item() == pytest.approx(-0.5514680, abs=3e-7)


def test_streams_are_the_contracts():
    names = ("FIXED", "FRESH", "SIGMA", "AUGMENT", "DROPOUT", "LATENT")
    assert [Stream[name] for name in names] == list(range(6))


def box_muller(words):
    """Normals of four words, in Python's own float64."""
    u = [(w >> 8) * 2.0**-24 for w in words]
    radii = [math.sqrt(-2 * math.log(max(u[a], 1e-7))) for a in (0, 2)]
    return [r * f(2 * math.pi * u[b]) for r, b in zip(radii, (1, 3), strict=True) for f in (math.cos, math.sin)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("id", [0, -1, 2**63 - 1, -(2**63), 1224113, 5680941])
def test_normals_are_box_mullers_to_the_last_digits(id, dtype):
    """Ids at both ends of int64, and two with a uniform of 0: there the logarithm is that of 1e-7."""
    words = random_words(torch.tensor([id]), 4, seed=0, stream=0)[0].tolist()
    if id in (1224113, 5680941):
        assert 0 in (words[0] >> 8, words[2] >> 8)
    z = normal(torch.tensor([id]), 4, seed=0, stream=0, dtype=dtype)[0]
    expected = torch.tensor(box_muller(words), dtype=torch.float64)
    assert (z.double() - expected).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)


def test_draws_depend_on_nothing_but_their_names():
    ids = torch.tensor([5, -7, 2**62, 11])
    whole = normal(ids, 50, seed=3, stream=Stream.FRESH)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(normal(ids[[2]], 50, seed=3, stream=Stream.FRESH)[0], whole[2])
    assert torch.equal(normal(ids.flip(0), 50, seed=3, stream=Stream.FRESH), whole.flip(0))
    assert torch.equal(normal(ids, 13, seed=3, stream=Stream.FRESH), whole[:, :13])
    assert torch.equal(normal(ids, 50, seed=torch.tensor(3), stream=Stream.FRESH), whole)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"
    for other in (
        normal(ids, 50, seed=4, stream=Stream.FRESH),
        normal(ids, 50, seed=3 + 2**32, stream=Stream.FRESH),
        normal(ids, 50, seed=3, stream=Stream.FIXED),
        normal(ids + 1, 50, seed=3, stream=Stream.FRESH),
        normal(ids ^ (1 << 40), 50, seed=3, stream=Stream.FRESH),
    ):
        assert (other != whole).float().mean() > 0.99


def test_first_continues_the_sequence():
    ids = torch.arange(3)
    whole = uniform(ids, 40, seed=9, stream=3)
    assert torch.equal(uniform(ids, 24, seed=9, stream=3, first=16), whole[:, 16:])
    with pytest.raises(ValueError, match="multiple of 4"):
        uniform(ids, 4, seed=9, stream=3, first=2)


def test_seeds_are_64_bits_signed_or_unsigned():
    ids = torch.arange(2)
    assert torch.equal(normal(ids, 8, seed=-1, stream=0), normal(ids, 8, seed=2**64 - 1, stream=0))
    with pytest.raises(ValueError, match="64 bits"):
        normal(ids, 8, seed=2**64, stream=0)
    with pytest.raises(TypeError, match="int64"):
        normal(ids.int(), 8, seed=0, stream=0)


def test_moments_and_range():
    z = normal(torch.arange(64), 16384, seed=1, stream=0, dtype=torch.float64)
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert z.abs().max() <= 5.68
    lanes = z.unflatten(1, (-1, 4)).flatten(0, 1)
    correlation = torch.corrcoef(lanes.T) - torch.eye(4, dtype=z.dtype)
    assert correlation.abs().max() < 5 / len(lanes) ** 0.5


def test_float32_is_close_to_float64():
    ids = torch.arange(16)
    low, high = (normal(ids, 4096, seed=2, stream=0, dtype=d) for d in (torch.float32, torch.float64))
    assert (low - high).abs().max() < 1e-6  # the angle is exact; 1e-7 each for log, sine and cosine, times |z| <= 5.68
