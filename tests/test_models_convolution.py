"""The weight gradient by products of matrices is that of `F.conv2d`, and is taken where it pays alone."""

import pytest
import torch
import torch.nn.functional as F

from fastambient.models import convolution
from fastambient.models.convolution import conv3x3, weight_gradient

LAST = torch.channels_last


def tensors(n, cin, cout, height, width):
    torch.manual_seed(n + cin + height)
    x, g = (torch.randn(n, c, height, width).to(memory_format=LAST) for c in (cin, cout))
    return x, g, torch.randn(cout, cin, 3, 3).to(memory_format=LAST), torch.randn(cout)


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 5, 2, 2), (2, 4, 3, 8, 8), (3, 5, 4, 8, 9), (2, 4, 3, 16, 11), (1, 2, 3, 40, 64), (5, 3, 2, 23, 23)],
)
def test_weight_gradient(shape):
    """Against autograd in float64: sums of n = N*H*W products in float32, error at most n * 2^-24 of their magnitudes."""
    x, g, weight, _ = tensors(*shape)
    exact = weight.double().requires_grad_()
    F.conv2d(x.double(), exact, padding=1).backward(g.double())
    magnitude = torch.nn.grad.conv2d_weight(x.double().abs(), weight.shape, g.double().abs(), padding=1)
    found = weight_gradient(x, g, like=weight)
    assert found.is_contiguous(memory_format=LAST)
    assert ((found - exact.grad).abs() <= magnitude * x[:, 0].numel() * 2**-24).all()


def test_more_pixels_than_one_block(monkeypatch):
    x, g, weight, _ = tensors(3, 4, 5, 20, 20)
    whole = weight_gradient(x, g, like=weight)
    monkeypatch.setattr(convolution, "_ROWS", 100)
    assert torch.allclose(weight_gradient(x, g, like=weight), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contiguous_gradient", [False, True])
def test_all_gradients(contiguous_gradient):
    x, g, weight, bias = tensors(2, 128, 128, 12, 12)
    if contiguous_gradient:
        g = g.contiguous()
    gradients = []
    for function in (conv3x3, lambda *a: F.conv2d(*a, padding=1)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        out.backward(g)
        gradients.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, torchs in zip(*gradients, strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-4, atol=1e-4 * torchs.abs().max().item())


def test_where_it_pays(monkeypatch):
    called = []
    monkeypatch.setattr(convolution, "weight_gradient", lambda x, g, like: called.append(1) or torch.zeros_like(like))

    def taken(n=2, c=128, *, last=True, frozen=False, dtype=torch.float32):
        x, _, weight, bias = (t.to(dtype) for t in tensors(n, c, c, 8, 8))
        weight = (weight if last else weight.contiguous()).requires_grad_(not frozen)
        called.clear()
        conv3x3(x.requires_grad_(), weight, bias).sum().backward()
        return bool(called)

    assert taken()
    assert not taken(n=9) and not taken(c=64) and not taken(last=False) and not taken(frozen=True)
    assert not taken(dtype=torch.float64)
    with torch.no_grad():
        x, _, weight, bias = tensors(2, 128, 128, 8, 8)
        assert torch.equal(conv3x3(x, weight.requires_grad_(), bias), F.conv2d(x, weight, bias, padding=1))
