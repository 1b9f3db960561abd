"""Dropout and the generator's words: the contract, every implementation against the reference, gradients, tracing."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastambient_kernels import _native, dropout
from fastambient_kernels.dropout import keep_mask
from fastambient_kernels.noise import Stream, random_words

operator = importlib.import_module("fastambient_kernels.dropout")  # the package names its function so, too
SEED = 11
POSITIONS = torch.tensor([5, 2**40, -1])
native = pytest.mark.skipif("dropout" not in _native.OPERATORS, reason=f"no native code: {_native.missing('dropout')}")


def last(*shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def test_masks_are_the_contracts_words():
    keep = keep_mask(POSITIONS, 7, p=0.25, seed=SEED, layer=3)
    words = random_words(POSITIONS, 4, seed=SEED, stream=Stream.DROPOUT, first=3 * 2**26)
    for n in range(3):
        halves = [h for w in words[n].tolist() for h in (w & 0xFFFF, w >> 16)][:7]
        assert keep[n].tolist() == [h >= 0.25 * 65536 for h in halves]


def test_the_threshold_itself_is_kept():
    """One step of 2^-16 is seen where a half word is the threshold."""
    count, positions = 20_000, torch.arange(20)
    words = random_words(positions, count // 2, seed=SEED, stream=Stream.DROPOUT)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)
    assert (halves == 16384).any() and (halves == 16383).any()
    assert torch.equal(keep_mask(positions, count, p=0.25, seed=SEED, layer=0), halves >= 16384)


def test_masks_differ_between_layers_positions_and_seeds():
    p, count = 0.25, 40_000

    def keep(position=0, layer=1, seed=SEED):
        return keep_mask(torch.tensor([position]), count, p=p, seed=seed, layer=layer)

    base = keep()
    others = {
        "layer": keep(layer=2), "position": keep(1), "high word of the position": keep(2**32),
        "seed": keep(seed=SEED + 1),
    }  # fmt: skip
    independent = 2 * p * (1 - p)
    for what, other in others.items():
        assert (base != other).float().mean().item() == pytest.approx(independent, abs=0.015), what


@pytest.mark.parametrize("p", [0.05, 0.13, 0.5])
def test_keep_rate(p):
    n = 400_000
    keep = keep_mask(torch.arange(20), n // 20, p=p, seed=SEED, layer=4)
    assert abs(keep.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    even, odd = keep[:, 0::2].double().mean().item(), keep[:, 1::2].double().mean().item()
    assert abs(even - odd) < 5 * (4 * p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=native)])
def test_elements_count_with_the_channel_fastest(impl):
    x = last(3, 6, 5, 7) + 5
    y = dropout(x, POSITIONS, p=0.2, seed=SEED, layer=2, impl=impl)
    keep = keep_mask(POSITIONS, 6 * 35, p=0.2, seed=SEED, layer=2).view(3, 5, 7, 6).movedim(3, 1)
    torch.testing.assert_close(y, torch.where(keep, x / 0.8, 0.0))
    contiguous = dropout(x.contiguous(), POSITIONS, p=0.2, seed=SEED, layer=2, impl=impl)
    assert torch.equal(contiguous, y) and contiguous.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (3, 1), (3, 129), (3, 256, 32, 8), (3, 4, 1, 1)])
def test_native_is_the_reference_to_the_bit(nan_filled, shape, dtype):
    x, keywords = last(*shape, dtype=dtype), {"p": 0.13, "seed": 2**64 - 5, "layer": 255}
    x[(0,) * x.dim()] = torch.nan  # what is dropped is 0 whatever it was
    ours, reference = (dropout(x, POSITIONS, impl=impl, **keywords) for impl in ("native", "reference"))
    assert ours.dtype == dtype and torch.equal(ours.nan_to_num(7), reference.nan_to_num(7))
    parts = [dropout(x[i : i + 1], POSITIONS[i : i + 1], impl="native", **keywords) for i in range(3)]
    assert torch.equal(torch.cat(parts).nan_to_num(7), ours.nan_to_num(7))


@native
@pytest.mark.parametrize(("count", "first"), [(1, 0), (4, 8), (7, 4), (63, 0), (64, 0), (1001, 2**33)])
def test_native_words_are_the_references(nan_filled, count, first):
    keywords = {"seed": -3, "stream": 4, "first": first}
    words = random_words(POSITIONS, count, impl="native", **keywords)
    assert words.shape == (3, count) and torch.equal(
        words, random_words(POSITIONS, count, impl="reference", **keywords)
    )


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=native)])
def test_backward_is_the_same_mask(impl):
    x = last(3, 6, 4, 4).requires_grad_()
    dy = last(3, 6, 4, 4) + 3
    keywords = {"p": 0.3, "seed": SEED, "layer": 3, "impl": impl}
    (dropout(x, POSITIONS, **keywords) * dy).sum().backward()
    assert torch.equal(x.grad, dropout(dy, POSITIONS, **keywords))


def test_gradcheck():
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    run = lambda x: dropout(x, POSITIONS[:2], p=0.4, seed=1, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))


@native
def test_opcheck_and_one_graph():
    x, seed = last(3, 6, 4, 4), torch.tensor(SEED)
    torch.library.opcheck(torch.ops.fastambient.dropout_native.default, (x, POSITIONS, seed, 3, 0.2))
    torch.library.opcheck(torch.ops.fastambient.random_words_native.default, (POSITIONS, seed, 2, 8, 13))

    def double(x, positions):
        return dropout(x, positions, p=0.2, seed=SEED, layer=3) * 2

    compiled = torch.compile(double, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 2):
        torch.testing.assert_close(compiled(x[:n], POSITIONS[:n]), double(x[:n], POSITIONS[:n]))


@native
def test_a_fault_would_show(monkeypatch):
    """A mask shifted by one counter, or a half word compared the wrong way, must fail the comparison above."""
    x = last(3, 6, 5, 7)
    right = dropout(x, POSITIONS, p=0.2, seed=SEED, layer=2, impl="reference")
    run = operator._ops["native"]
    for wrong in (
        lambda x, p, s, layer, q: run(x, p, s, layer + 1, q),
        lambda x, p, s, layer, q: run(x, p, s, layer, 1 - q),
    ):
        monkeypatch.setitem(operator._ops, "native", wrong)
        assert not torch.allclose(dropout(x, POSITIONS, p=0.2, seed=SEED, layer=2, impl="native"), right)


@pytest.mark.parametrize(
    ("x", "keywords", "message"),
    [
        (torch.zeros(3, 4), {"p": 1.0}, r"p must lie in \[0, 1\)"),
        (torch.zeros(3, 4), {"p": float("nan")}, r"p must lie in \[0, 1\)"),
        (torch.zeros(3, 4), {"p": 0.1, "layer": 256}, "layer must lie"),
        (torch.zeros(2, 4), {"p": 0.1}, r"positions must be int64 \[2\]"),
        (torch.zeros(3, 4, dtype=torch.int32), {"p": 0.1}, "x must be float"),
        (torch.zeros(3, 1, 2**14, 2**13 + 1, device="meta"), {"p": 0.1}, "elements"),
    ],
)
def test_bad_input(x, keywords, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dropout(x, POSITIONS, seed=0, **keywords)
