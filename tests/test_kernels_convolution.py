"""conv2d: its own weight gradient against float64, at every border, tail and layout; and where torch's is taken."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastambient import models
from fastambient_kernels import _native, conv2d

operator = importlib.import_module("fastambient_kernels.convolution")
native = pytest.mark.skipif("conv2d" not in _native.OPERATORS, reason=f"no native code: {_native.missing('conv2d')}")
TOLERANCE = 2e-6  # of the largest entry, see docs/numerics.md
SHAPES = [  # n, in, out, height, width, kernel
    (2, 3, 5, 4, 4, 3),
    (3, 24, 24, 8, 8, 3),  # a tile and a half of inputs with AVX2
    (1, 33, 13, 5, 3, 3),  # tails of both
    (70, 1, 1, 2, 2, 3),  # several samples a block, and some left
    (1, 17, 7, 3, 300, 3),  # a row longer than a block
    (2, 8, 6, 40, 20, 3),  # blocks of some rows, and some left
    (2, 8, 6, 1, 1, 3),  # all border
    (2, 20, 12, 7, 6, 1),
    (2, 9, 7, 6, 5, 5),
]


def inputs(n, channels, out, height, width, kernel):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).contiguous(memory_format=torch.channels_last)
            for s in ((n, channels, height, width), (out, channels, kernel, kernel)))  # fmt: skip
    dy = torch.randn(n, out, height, width, generator=g).contiguous(memory_format=torch.channels_last)
    return x, w, torch.randn(out, generator=g), dy


def gradients(run, dy, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = run(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def exact(x, w, b, dy):
    plain = lambda x, w, b: F.conv2d(x, w, b, padding=w.shape[-1] // 2)  # noqa: E731
    return gradients(plain, dy.double(), x.double(), w.double(), b.double())


def assert_near(found, right):
    for value, expected in zip(found, right, strict=True):
        assert value.shape == expected.shape
        assert (value.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_float64(nan_filled, shape, impl):
    x, w, b, dy = inputs(*shape)
    found = gradients(lambda *leaves: conv2d(*leaves, impl=impl), dy, x, w, b)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_near(found, exact(x, w, b, dy))


@native
def test_other_layouts_give_the_same(nan_filled):
    x, w, b, dy = inputs(2, 10, 7, 5, 6, 3)
    right = gradients(conv2d, dy, x, w, b)
    for other in ((x.contiguous(), w, dy), (x, w.contiguous(), dy), (x, w, dy.contiguous())):
        torch.testing.assert_close(gradients(conv2d, other[2], other[0], other[1], b)[2:], right[2:], rtol=0, atol=0)
    wide = torch.cat([x, x], 1)[:, ::2]  # channels two apart
    assert_near(gradients(conv2d, dy, wide, w, b), exact(wide, w, b, dy))
    expanded = torch.ones(()).expand(2, 7, 5, 6)  # what sum() hands back
    assert_near(gradients(conv2d, expanded, x, w, b), exact(x, w, b, expanded))


@native
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_what_is_wanted_is_computed(wanted, monkeypatch):
    x, w, b, dy = inputs(2, 10, 7, 5, 6, 3)
    right, called, run = exact(x, w, b, dy)[1:], [], operator.conv_weight
    monkeypatch.setattr(operator, "conv_weight", lambda *a: called.append(a[3]) or run(*a))
    leaves = [v.detach().requires_grad_(k in wanted) for k, v in enumerate((x, w, b))]
    conv2d(*leaves).backward(dy)
    for k, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (k in wanted)
        if leaf.grad is not None:
            assert_near([leaf.grad], [right[k]])
    assert called == ([] if wanted == (0,) else [2 in wanted])


@native
def test_threads_change_no_bit():
    x, w, b, dy = inputs(3, 40, 50, 20, 12, 3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(conv2d, dy, x, w, b)[2:])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@native
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """FASTAMBIENT_ISA lowers the choice; the other tests run what this machine has best."""
    code = (
        "import test_kernels_convolution as t\nfor shape in t.SHAPES:\n x, w, b, dy = t.inputs(*shape)\n"
        " t.assert_near(t.gradients(lambda *l: t.conv2d(*l, impl='native'), dy, x, w, b), t.exact(x, w, b, dy))"
    )
    environment = os.environ | {"FASTAMBIENT_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@native
def test_a_network_s_gradients_are_the_reference_s(monkeypatch):
    network = models.SongUNet(
        img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
        dropout=0.0,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    g = torch.Generator().manual_seed(0)
    for p in network.parameters():  # some start at zero, whose gradients would say nothing
        torch.nn.init.normal_(p, std=0.1, generator=g)
    x, c_noise = torch.randn(4, 3, 8, 8, generator=g), torch.randn(4, generator=g)

    def gradients_of():
        network.zero_grad()
        network(x, c_noise).square().sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    calls, run = [], operator.conv_weight
    monkeypatch.setattr(operator, "conv_weight", lambda *a: calls.append(1) or run(*a))
    monkeypatch.setenv("FASTAMBIENT_IMPL", "native")
    ours = gradients_of()
    assert len(calls) == sum(p.dim() == 4 and p.shape[-1] == 3 for p in network.parameters()) > 10
    monkeypatch.setenv("FASTAMBIENT_IMPL", "reference")
    for name, right in gradients_of().items():
        assert (ours[name] - right).norm() <= 1e-5 * right.norm(), name


@native
def test_opcheck_and_one_graph():
    x, w, b, dy = inputs(2, 10, 7, 5, 6, 3)
    torch.library.opcheck(torch.ops.fastambient.conv_weight_native.default, (x, dy, 3, True))
    torch.library.opcheck(torch.ops.fastambient.conv_weight_native.default, (x, dy, 3, False))
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    right = gradients(conv2d, dy, x, w, b)
    torch.testing.assert_close(gradients(compiled, dy, x, w, b), right)


def test_gradcheck():
    leaves = [v.double().requires_grad_() for v in inputs(1, 2, 2, 3, 3, 3)[:3]]
    assert torch.autograd.gradcheck(conv2d, leaves)


@native
def test_where_torch_s_own_is_taken(monkeypatch):
    monkeypatch.setattr(operator, "conv_weight", lambda *a: pytest.fail("the native gradient was taken"))
    x, w, b, dy = inputs(2, 10, 7, 5, 6, 3)
    one = w[:, :, 1:2, 1:2]
    for run, leaves in (
        (conv2d, (x.double(), w.double(), b.double())),
        (conv2d, (x.bfloat16(), w.bfloat16(), b.bfloat16())),
        (conv2d, (x, one, b)),
        (lambda *l: conv2d(*l, impl="reference"), (x, w, b)),
    ):  # fmt: skip
        gradients(run, dy.to(leaves[0].dtype), *leaves)
    leaves = [v.clone().requires_grad_() for v in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(*leaves)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert leaves[1].grad.dtype == torch.float32
    with torch.no_grad():
        assert conv2d(*leaves).grad_fn is None
    assert conv2d(x[:0].requires_grad_(), w, b).shape == (0, 7, 5, 6)
    monkeypatch.setenv("FASTAMBIENT_IMPL", "triton")  # GPUs' convolutions are their library's: no kernel to ask for
    gradients(conv2d, dy, x, w, b)


def test_bad_input():
    x = torch.zeros(1, 2, 4, 4)
    for shape in ((2, 2, 2, 2), (2, 2, 3, 1), (2, 2, 3)):
        with pytest.raises(ValueError, match=r"weight must be \[O, C, k, k\] with k odd"):
            conv2d(x, torch.zeros(shape))
    with pytest.raises(RuntimeError, match="its own library's"):
        conv2d(x, torch.zeros(2, 2, 3, 3), impl="triton")
    with pytest.raises(RuntimeError, match=r"computes in float32, not torch\.bfloat16"):
        conv2d(x.bfloat16(), torch.zeros(2, 2, 3, 3), impl="native")


@native
def test_the_operator_checks_what_it_is_given():
    x, w, b, dy = inputs(2, 10, 7, 5, 6, 3)
    run = torch.ops.fastambient_native.conv_weight
    for bad, message in (
        ((x.contiguous(), dy, w, None), "x must be channels-last"),
        ((x, dy[:1], w, None), "same samples"),
        ((x, dy.double(), w, None), "dy must be float32"),
        ((x, dy, w[:, :9].contiguous(memory_format=torch.channels_last), None), "d_weight must be"),
        ((x, dy, w, b[:6]), "d_bias must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*bad)


@native
def test_a_fault_would_show(monkeypatch):
    """Taps the wrong way round, or a border that is not zero, must fail the comparison above."""
    x, w, b, dy = inputs(2, 10, 7, 5, 6, 3)
    right, run = exact(x, w, b, dy), operator.conv_weight
    for wrong in (
        lambda x, dy, k, bias: (run(x, dy, k, bias)[0].flip(2), run(x, dy, k, bias)[1]),
        lambda x, dy, k, bias: run(x.roll(1, 3), dy, k, bias),
    ):
        monkeypatch.setattr(operator, "conv_weight", wrong)
        with pytest.raises(AssertionError):
            assert_near(gradients(conv2d, dy, x, w, b), right)
