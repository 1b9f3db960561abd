"""The Triton kernels of random words and dropout, interpreted on a CPU: equal to the reference to the last bit."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import torch

from fastambient_kernels import dropout
from fastambient_kernels.noise import random_words

random_triton = pytest.importorskip("fastambient_kernels.random_triton")
POSITIONS = torch.tensor([5, 2**40, -1])


@pytest.mark.parametrize(("count", "first"), [(1, 0), (7, 4), (128, 0), (1001, 2**33)])
@pytest.mark.parametrize("stream", [2, 6])
def test_words(nan_filled, stream, count, first):
    keywords = {"seed": 2**64 - 3, "stream": stream, "first": first}
    words = random_words(POSITIONS, count, impl="triton", **keywords)
    assert torch.equal(words, random_words(POSITIONS, count, impl="reference", **keywords))


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (3, 1), (3, 24, 8, 8), (3, 1030)])
def test_dropout(nan_filled, monkeypatch, shape, dtype, rows):
    monkeypatch.setattr(random_triton, "_rows", lambda count: rows)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for impl in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        y = dropout(leaf, POSITIONS, p=0.13, seed=2**64 - 5, layer=255, impl=impl)
        (y * 2).sum().backward()
        results.append((y.detach(), leaf.grad))
    for ours, reference in zip(*results, strict=True):
        assert torch.equal(ours, reference)
    assert 0 < (results[0][0] == 0).double().mean() < 0.5 or x.numel() < 10


def test_opcheck():
    x, seed = torch.randn(3, 24), torch.tensor(11)
    torch.library.opcheck(torch.ops.fastambient.dropout_triton.default, (x, POSITIONS, seed, 3, 0.2))
    torch.library.opcheck(torch.ops.fastambient.random_words_triton.default, (POSITIONS, seed, 2, 8, 13))
