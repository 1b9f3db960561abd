"""resample: every mode, tap count and padding against its definition in float64; layouts, gradients, tracing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastambient_kernels import _native, resample

operator = importlib.import_module("fastambient_kernels.resample")  # the package names its function so, too
native = pytest.mark.skipif(
    "resample" not in _native.OPERATORS, reason=f"no native code: {_native.missing('resample')}"
)
MODES = ["down", "up", "filter"]
TAPS = [(1, 3, 3, 1), (1, 1), (1, 2), (-1, 4, 3, 2), (1, 2, 3, 4, 5, 7)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6 + 2**-8}  # of the largest value, see docs/numerics.md


def matrix(size, taps, mode, pad):
    """The definition along one axis, float64 [outputs, size]: tap by tap, with Python's integers."""
    length, total = len(taps), sum(taps)
    if mode == "up":
        outputs = 2 * size - 2 - 2 * pad + length
    else:
        outputs = (size + 2 * pad - length) // (2 if mode == "down" else 1) + 1
    m = torch.zeros(outputs, size, dtype=torch.float64)
    for i in range(outputs):
        for k in range(length):
            if mode == "up" and (i + pad - k) % 2:
                continue
            j = (i + pad - k) // 2 if mode == "up" else i * (2 if mode == "down" else 1) + k - pad
            if 0 <= j < size:
                m[i, j] = taps[k] / total * (2 if mode == "up" else 1)
    return m


def exact(x, taps, mode, pad, dy=None):
    """[y] or, with dy, [y, dx] in float64."""
    rows, columns = (matrix(size, taps, mode, pad) for size in x.shape[2:])
    y = rows @ x.double() @ columns.T
    return [y] if dy is None else [y, rows.T @ dy.double() @ columns]


def picture(*shape, last=True, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def run(x, taps, mode, pad, dy=None, impl="native"):
    leaf = x.detach().requires_grad_()
    y = resample(leaf, taps, mode=mode, pad=pad, impl=impl)
    return [y.detach()] if dy is None else [y.detach(), *torch.autograd.grad(y, leaf, dy)]


def assert_near(found, right, dtype=torch.float32, least=0.0):
    for value, expected in zip(found, right, strict=True):
        assert value.shape == expected.shape
        assert (value.double() - expected).abs().max() <= TOLERANCE[dtype] * max(least, expected.abs().max().item())


def compare(impl, shape, taps, mode, pad, *, dtype=torch.float32, last=True, device="cpu", least=0.0):
    """y and dx against the definition; both in x's dtype and memory format."""
    x = picture(*shape, dtype=dtype, last=last)
    dy = picture(*exact(x, taps, mode, pad)[0].shape, dtype=dtype, last=last, seed=1)
    found = run(x.to(device), taps, mode, pad, dy.to(device), impl)
    assert all(v.dtype == dtype for v in found)
    layout = torch.channels_last if last and x[0, 0].numel() > 1 else torch.contiguous_format  # one pixel is in either
    assert all(v.is_contiguous(memory_format=layout) for v in found)
    assert_near([v.cpu() for v in found], exact(x, taps, mode, pad, dy), dtype, least)


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taps", TAPS)
def test_against_the_definition(nan_filled, taps, mode, last, dtype, impl):
    for pad in range(len(taps)):
        for shape in ((2, 24, 8, 6), (1, 3, 7, 9), (2, 1, 6, 7)):
            compare(impl, shape, taps, mode, pad, dtype=dtype, last=last)


@native
@pytest.mark.parametrize("mode", MODES)
def test_rows_longer_than_a_tile(nan_filled, mode):
    """The native loops cut a row where 4096 sums are reached."""
    for shape in ((1, 300, 4, 34), (1, 5000, 4, 6), (1, 1, 2, 9000), (1, 17, 4, 400)):
        compare("native", shape, (1, 3, 3, 1), mode, 1)
        compare("native", shape, (1, 2, 3, 4, 5, 7), mode, 2, last=False)


@native
@settings(max_examples=60, deadline=None)
@example(n=1, channels=2, height=4, width=4, taps=(0, 1) * 4, mode="down", pad=2, last=True, half=False)  # to one pixel
@example(n=2, channels=3, height=1, width=1, taps=(1, 3, 3, 1), mode="up", pad=1, last=True, half=False)  # from one
@example(n=2, channels=3, height=1, width=1, taps=(1, 3, 3, 1), mode="up", pad=1, last=False, half=True)
@given(
    n=st.integers(1, 3), channels=st.integers(1, 40), height=st.integers(1, 12), width=st.integers(1, 20),
    taps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=4).map(lambda p: sum(p, ())),
    mode=st.sampled_from(MODES), pad=st.integers(0, 7), last=st.booleans(), half=st.booleans(),
)  # fmt: skip
def test_any_size(n, channels, height, width, taps, mode, pad, last, half):
    pad = pad % len(taps)
    if mode != "up" and min(height, width) + 2 * pad < len(taps):
        return
    if mode == "up" and 2 * min(height, width) - 2 - 2 * pad + len(taps) < 1:
        return
    dtype = torch.bfloat16 if half else torch.float32
    compare("native", (n, channels, height, width), taps, mode, pad, dtype=dtype, last=last, least=1.0)


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize("taps", TAPS)
def test_the_usual_padding_halves_doubles_and_keeps_a_constant(taps, impl):
    x, edge = torch.full((1, 2, 17, 18), 3.0), len(taps)  # the border sees zeros
    down, up = (resample(x, taps, mode=mode, impl=impl) for mode in ("down", "up"))
    assert down.shape == (1, 2, 8, 9) and up.shape == (1, 2, 34, 36)
    up = torch.nn.functional.avg_pool2d(up, 2)  # where even and odd taps differ in their sum, so do pixels
    for inner in (down[:, :, 3:-3, 3:-3], up[:, :, edge:-edge, edge:-edge]):
        assert inner.numel() > 0
        torch.testing.assert_close(inner, torch.full_like(inner, 3.0))


@native
def test_other_layouts_give_the_same(nan_filled):
    x = picture(2, 16, 6, 8)
    for mode in MODES:
        y, dx = exact(x, (1, 3, 3, 1), mode, 1, torch.ones(exact(x, (1, 3, 3, 1), mode, 1)[0].shape))
        dy = torch.ones(()).expand(y.shape)  # what sum() hands back
        assert_near(run(x, (1, 3, 3, 1), mode, 1, dy), [y, dx])
        wide = torch.cat([x, x], 1)[:, ::2]  # channels two apart
        assert_near(run(wide, (1, 3, 3, 1), mode, 1), exact(wide, (1, 3, 3, 1), mode, 1))
        strided = picture(2, 16, y.shape[2], 2 * y.shape[3], seed=1)[..., ::2]
        assert_near(run(x, (1, 3, 3, 1), mode, 1, strided), exact(x, (1, 3, 3, 1), mode, 1, strided))
        other = strided.contiguous()  # dy in the other format
        assert_near(run(x, (1, 3, 3, 1), mode, 1, other), exact(x, (1, 3, 3, 1), mode, 1, strided))


@native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_threads_and_grad_mode_change_no_bit(mode, dtype):
    x = picture(5, 48, 33, 32, dtype=dtype)
    dy = torch.ones_like(resample(x, (1, 3, 3, 1), mode=mode, impl="native"))
    whole = run(x, (1, 3, 3, 1), mode, 1, dy)
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, whole, run(x, (1, 3, 3, 1), mode, 1, dy)))
    finally:
        torch.set_num_threads(1)
    part = run(x[2:4], (1, 3, 3, 1), mode, 1, dy[2:4])
    assert all(map(torch.equal, (v[2:4] for v in whole), part))
    with torch.no_grad():
        y = resample(x, (1, 3, 3, 1), mode=mode, impl="native")
    assert torch.equal(y, whole[0]) and y.grad_fn is None


@native
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """FASTAMBIENT_ISA lowers the choice; the other tests run what this machine has best."""
    code = (
        "import torch, test_kernels_resample as t\nfor mode in t.MODES:\n for taps in t.TAPS:\n"
        "  for dtype in (torch.float32, torch.bfloat16):\n"
        "   t.compare('native', (2, 37, 6, 9), taps, mode, len(taps) // 2 - 1, dtype=dtype)"
    )
    environment = os.environ | {"FASTAMBIENT_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resample(x, (1, 2, 4, 1), mode=mode), (x,))


@native
@pytest.mark.parametrize("last", [True, False])
def test_opcheck(last):
    x = picture(2, 6, 5, 4, last=last)
    for mode, height, width in (("down", 2, 2), ("up", 10, 8), ("filter", 4, 3)):
        arguments = (x, *operator.geometry((1.0, 3.0, 3.0, 1.0), mode, 1, 1.0), height, width)
        torch.library.opcheck(torch.ops.fastambient.resample_native.default, arguments)


@native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def step(x):
        y = resample(x, (1, 3, 3, 1), mode="down", impl="native")
        z = resample(y * y, (1, 3, 3, 1), mode="up", impl="native")
        return resample(z, (1, 3, 3, 1), mode="filter", pad=2, impl="native").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 8, 6, 8), (3, 8, 10, 4)) if dynamic else ((2, 8, 6, 8),):
        one, two = (picture(*shape).requires_grad_() for _ in range(2))
        a, b = step(one), compiled(two)
        a.backward()
        b.backward()
        assert torch.equal(a, b) and torch.equal(one.grad, two.grad)


def test_where_the_reference_is_taken(monkeypatch):
    for impl in ("native", "triton"):
        monkeypatch.setitem(operator._ops, impl, lambda *a: pytest.fail("a fast path was taken"))
    x = picture(1, 2, 4, 4)
    monkeypatch.setenv("FASTAMBIENT_IMPL", "native")
    assert resample(x.double(), (1, 1), mode="down").dtype == torch.float64
    monkeypatch.setenv("FASTAMBIENT_IMPL", "reference")
    assert resample(x, (1, 1), mode="down").shape == (1, 2, 2, 2)
    assert resample(x[:0], (1, 1), mode="up", impl="reference").shape == (0, 2, 8, 8)


@pytest.mark.parametrize(
    ("x", "keywords", "message"),
    [
        (torch.zeros(3, 4, 4), {}, r"x must be float \[N, C, H, W\]"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), {}, "x must be float"),
        (torch.zeros(1, 1, 4, 4), {"mode": "sideways"}, "mode must be one of down, up, filter, got 'sideways'"),
        (torch.zeros(1, 1, 4, 4), {"taps": (1, 2, 1)}, "taps must be an even number"),
        (torch.zeros(1, 1, 4, 4), {"taps": ()}, "taps must be an even number"),
        (torch.zeros(1, 1, 4, 4), {"taps": (1, -1)}, "with a positive sum"),
        (torch.zeros(1, 1, 4, 4), {"taps": (1, float("nan"))}, "finite weights"),
        (torch.zeros(1, 1, 4, 4), {"pad": 4}, r"pad must lie in 0 \.\. 3, got 4"),
        (torch.zeros(1, 1, 4, 4), {"pad": -1}, "pad must lie"),
        (torch.zeros(1, 1, 4, 1), {}, r"4 taps with pad 1 leave nothing of 4x1 pixels \(down\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.float16), {"impl": "native"}, "not available: fast paths compute in"),
        (torch.zeros(1, 2, 2**15, 2**15, device="meta"), {}, "values"),
    ],
)
def test_bad_input(x, keywords, message):
    arguments = {"taps": (1, 3, 3, 1), "mode": "down"} | keywords
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        resample(x, arguments.pop("taps"), **arguments)


@native
def test_the_operator_checks_what_it_is_given():
    x, y = picture(2, 6, 4, 4), picture(2, 6, 2, 2)
    call = torch.ops.fastambient_native.resample
    for bad, message in (
        ((x.double(), [0.5, 0.5], 1, 2, 0, y), "float32 or bfloat16"),
        ((x, [0.5, 0.5], 1, 2, 0, y.bfloat16()), "alike"),
        ((x, [0.5, 0.5], 1, 2, 0, y[:1]), "same samples and channels"),
        ((x, [0.5, 0.5], 1, 2, 0, y.contiguous()), "both be contiguous, or both channels-last"),
        ((x[:, :, ::2], [0.5, 0.5], 1, 2, 0, y), "both be contiguous, or both channels-last"),
        ((x, [0.5, 0.5], 3, 2, 0, y), "phases and stride must be 1 or 2"),
        ((x, [0.5, 0.5, 1.0], 2, 1, 0, y), "as many weights"),
        ((x, [], 1, 2, 0, y), "as many weights"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*bad)


FAULTS = {
    "taps the wrong way round": lambda g: g._replace(weights=g.weights[::-1]),
    "a pixel beside it": lambda g: g._replace(offset=g.offset + 1),
    "a factor": lambda g: g._replace(weights=[w * 1.001 for w in g.weights]),
}


@native
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", [False, True])
def test_a_fault_would_show(monkeypatch, mode, fault, backward):
    """In the forward pass or in the backward pass alone; the comparisons above must fail."""
    sound, calls = operator.geometry, []

    def planted(*arguments):
        calls.append(1)
        found = sound(*arguments)
        return FAULTS[fault](found) if len(calls) == 1 + backward else found

    monkeypatch.setattr(operator, "geometry", planted)
    with pytest.raises(AssertionError):
        compare("native", (2, 9, 8, 8), (1, 2, 4, 1), mode, 1)
    assert len(calls) == 2
