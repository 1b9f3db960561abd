"""The operators against what people write without them, in one run.

    python benchmarks/kernels.py [--quick | --tiny] [--device cpu|cuda] [--rounds N] [--json FILE] [--out DIR]

Competitors: ``eager`` (the formulas as one writes them), ``fused-torch`` (torch's own fused pieces), ``compile``
(torch.compile of eager; not with --quick or --tiny). A competitor whose result differs by more than the tolerance ends the
benchmark: no time is reported for a wrong answer. ``of floor`` is useful bytes a second over the copy rate of the run;
for a convolution with its gradients, three times the faster forward pass of the run over its time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import protocol
import torch
import torch.nn.functional as F
from baselines import FusedAdam, PerTensorAdam, two_regime_loss
from torch import Tensor

from fastambient_kernels import AdamEMA, ambient_loss, ambient_noise, conv2d, group_norm_silu, resample, residual

SIGMA_TN, SIGMA_DATA = 1.5, 0.5


def need(agreement: float, tolerance: float, what: str) -> float:
    if not agreement <= tolerance:
        raise SystemExit(f"{what}: results differ by {agreement:.2e}, allowed {tolerance:.0e}; no time is reported")
    return agreement


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def noise_loss(
    device: torch.device, rate: float, shape: tuple[int, ...], *, rounds: int, compiled: bool
) -> list[protocol.Row]:
    g = torch.Generator().manual_seed(0)
    n = shape[0]
    images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(device)
    ids = torch.randint(-(2**62), 2**62, (n,), generator=g).to(device)
    positions, flips = torch.arange(n, device=device), (torch.arange(n) % 2 == 0).to(device)
    sigma = torch.exp(torch.randn(n, generator=g) * 1.2 - 1.2).to(device)
    sigma[: n // 4] = SIGMA_TN * (1.1 + torch.arange(n // 4, device=device))  # both regimes, away from the boundary
    raw = torch.randn(shape, generator=g).to(device).requires_grad_()  # stands for the network's output
    data = (images, ids, flips, positions, sigma)
    constants = {"sigma_tn": SIGMA_TN, "sigma_data": SIGMA_DATA}
    keywords = constants | {"noise_seed": 1, "run_seed": 2}

    def ours() -> Tensor:
        raw.grad = None
        ambient_noise(*data, **keywords)
        loss = ambient_loss(raw, *data, **keywords)
        loss.sum().backward()
        return loss

    def eager(noises: list[Tensor] | None = None) -> Tensor:
        raw.grad = None
        loss = two_regime_loss(images, flips, sigma, lambda x, c: raw, noises=noises, **constants)
        loss.sum().backward()
        return loss

    from fastambient_kernels.noise import Stream, normal

    flip = lambda z: torch.where(flips[:, None, None, None], z.flip(3), z)  # noqa: E731
    numel = images[0].numel()
    noises = [
        flip(normal(i, numel, seed=seed, stream=stream).view(shape))
        for i, seed, stream in ((ids, 1, Stream.FIXED), (positions, 2, Stream.FRESH))
    ]
    mine, grad = ours().detach(), raw.grad.clone()
    theirs = eager(noises).detach()
    per_sample = ((mine - theirs).abs() / theirs).max().item()
    agreement = need(max(per_sample, difference(grad, raw.grad)), 1e-3, "noise+loss")
    works: dict[str, protocol.Work] = {"ours": ours, "eager": eager}
    if compiled:
        fast = torch.compile(lambda: two_regime_loss(images, flips, sigma, lambda x, c: raw, **constants))

        def compiled_work() -> None:
            raw.grad = None
            fast().sum().backward()

        works["compile"] = compiled_work
    times = protocol.interleave(works, rounds=rounds, device=device)
    useful = images.numel() * (1 + 4 + 1 + 4 + 4)  # image in, input out; image and F in, dF out
    size = "x".join(map(str, shape))
    return protocol.rows_of(
        "noise+loss",
        "ours",
        times,
        floor=useful / rate,
        agreement=dict.fromkeys(works, agreement),
        size=size,
    )


def norms(
    device: torch.device, rate: float, shape: tuple[int, ...], dtype: torch.dtype, *, rounds: int, compiled: bool
) -> list[protocol.Row]:
    g = torch.Generator().manual_seed(0)
    channels, groups = shape[1], min(32, shape[1] // 4)
    make = lambda: torch.randn(shape, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, dy = make().requires_grad_(), make()
    weight = (1 + 0.1 * torch.randn(channels, generator=g)).to(device).requires_grad_()
    bias = (0.1 * torch.randn(channels, generator=g)).to(device).requires_grad_()
    leaves = (x, weight, bias)

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def ours() -> Tensor:
        clear()
        y = group_norm_silu(x, weight, bias, groups=groups)
        y.backward(dy)
        return y

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-5))

    def eager(f: Callable[..., Tensor] = plain) -> Tensor:
        clear()
        y = f(x, weight, bias)
        y.backward(dy)
        return y

    mine = [ours().detach(), *(leaf.grad.clone() for leaf in leaves)]
    theirs = [eager().detach(), *(leaf.grad.clone() for leaf in leaves)]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    agreement = need(max(difference(a, b) for a, b in zip(mine, theirs, strict=True)), tolerance, "group_norm_silu")
    works: dict[str, protocol.Work] = {"ours": ours, "eager": eager}
    if compiled:
        fast = torch.compile(plain)
        works["compile"] = lambda: eager(fast)
    times = protocol.interleave(works, rounds=rounds, device=device)
    useful = 5 * x.numel() * x.element_size()  # x in, y out; x and dy in, dx out
    name = f"group_norm_silu-{'fp32' if dtype == torch.float32 else 'bf16'}"
    size = "x".join(map(str, shape))
    return protocol.rows_of(
        name, "ours", times, floor=useful / rate, agreement=dict.fromkeys(works, agreement), size=size
    )


def residuals(
    device: torch.device, rate: float, shape: tuple[int, ...], dtype: torch.dtype, *, rounds: int, compiled: bool
) -> list[protocol.Row]:
    """Forward and backward of the end of a residual branch; the competitors add the bias in a pass of its own."""
    g = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(shape, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last)  # noqa: E731
    y, x, dy = make().requires_grad_(), make().requires_grad_(), make()
    bias = torch.randn(shape[1], generator=g).to(device).requires_grad_()
    leaves, scale = (y, x, bias), 0.5**0.5

    def plain(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return ((y + bias.to(y.dtype)[:, None, None]) + x) * scale

    def ours(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return residual(y, x, bias, scale)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        out = f(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dy)]

    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    pairs = zip(run(ours), run(plain), strict=True)
    agreement = need(max(difference(a, b) for a, b in pairs), tolerance, "residual")
    works: dict[str, protocol.Work] = {"ours": lambda: run(ours), "eager": lambda: run(plain)}
    if compiled:
        fast = torch.compile(plain)
        works["compile"] = lambda: run(fast)
    times = protocol.interleave(works, rounds=rounds, device=device)
    useful = 5 * y.numel() * y.element_size()  # y and x in, the sum out; dy in, d out
    name, size = f"residual-{'fp32' if dtype == torch.float32 else 'bf16'}", "x".join(map(str, shape))
    return protocol.rows_of(
        name, "ours", times, floor=useful / rate, agreement=dict.fromkeys(works, agreement), size=size
    )


def resampling(
    device: torch.device, rate: float, shape: tuple[int, ...], dtype: torch.dtype, *, rounds: int, compiled: bool
) -> list[protocol.Row]:
    """Forward and backward of NCSN++'s filter, to half the resolution and back, by depthwise convolutions or in one."""
    g = torch.Generator().manual_seed(0)
    channels, taps = shape[1], (1, 3, 3, 1)
    make = lambda: torch.randn(shape, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, dy = make().requires_grad_(), make()
    row = torch.tensor(taps, dtype=torch.float32, device=device)
    depthwise = (row.outer(row) / row.sum() ** 2).to(dtype).expand(channels, 1, -1, -1)

    def plain(x: Tensor) -> Tensor:
        y = F.conv2d(x, depthwise, stride=2, padding=1, groups=channels)
        return F.conv_transpose2d(y, 4 * depthwise, stride=2, padding=1, groups=channels)

    def run(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = f(x)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    fused = lambda x: resample(resample(x, taps, mode="down"), taps, mode="up")  # noqa: E731
    name = f"resample-{'fp32' if dtype == torch.float32 else 'bf16'}"
    pairs = zip(run(fused), run(plain), strict=True)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    agreement = need(max(difference(a, b) for a, b in pairs), tolerance, name)
    works: dict[str, protocol.Work] = {"ours": lambda: run(fused), "eager": lambda: run(plain)}
    if compiled:
        fast = torch.compile(plain)
        works["compile"] = lambda: run(fast)
    times = protocol.interleave(works, rounds=rounds, device=device)
    useful = 5 * x.numel() * x.element_size()  # x in, y out, dy in, dx out; a quarter of it four times between
    size = "x".join(map(str, shape))
    return protocol.rows_of(
        name, "ours", times, floor=useful / rate, agreement=dict.fromkeys(works, agreement), size=size
    )


def convolutions(device: torch.device, shape: tuple[int, ...], *, rounds: int, compiled: bool) -> list[protocol.Row]:
    """Forward and backward of a 3x3 convolution with as many outputs as inputs."""
    g = torch.Generator().manual_seed(0)
    channels = shape[1]
    make = lambda *s: torch.randn(*s, generator=g).to(device).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, dy = make(*shape).requires_grad_(), make(*shape)
    weight = (make(channels, channels, 3, 3) / (9 * channels) ** 0.5).requires_grad_()
    bias = torch.zeros(channels, device=device, requires_grad=True)
    leaves = (x, weight, bias)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def forward(f: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return f(*leaves)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    pairs = zip(run(conv2d), run(plain), strict=True)
    agreement = need(max(difference(a, b) for a, b in pairs), 1e-4, "conv2d")
    works: dict[str, protocol.Work] = {
        "ours": lambda: run(conv2d), "eager": lambda: run(plain),
        "forward": lambda: forward(plain), "our forward": lambda: forward(conv2d),
    }  # fmt: skip
    if compiled:
        fast = torch.compile(plain)
        works["compile"] = lambda: run(fast)
    times = protocol.interleave(works, rounds=rounds, device=device)
    floor = 3 * min(statistics.median(times.pop(name)) for name in ("forward", "our forward"))
    size = "x".join(map(str, shape))
    return protocol.rows_of(
        "conv2d-fp32", "ours", times, floor=floor, agreement=dict.fromkeys(works, agreement), size=size
    )


def parameter_sizes(total: int, tensors: int) -> list[int]:
    """A network's mix: mostly vectors, and matrices that hold nearly all of the weights."""
    vectors = tensors * 3 // 5
    sizes = [256] * vectors
    matrices = tensors - vectors
    each = (total - sum(sizes)) // matrices
    sizes += [each] * (matrices - 1)
    return [*sizes, total - sum(sizes)]


def adam(device: torch.device, rate: float, total: int, tensors: int, *, rounds: int) -> list[protocol.Row]:
    g = torch.Generator().manual_seed(0)
    sizes = parameter_sizes(total, tensors)
    start = [torch.randn(n, generator=g).to(device) for n in sizes]
    gradients = [0.01 * torch.randn(n, generator=g).to(device) for n in sizes]
    beta = 0.999

    def parameters() -> list[Tensor]:
        made = [p.clone().requires_grad_() for p in start]
        for p, grad in zip(made, gradients, strict=True):
            p.grad = grad
        return made

    mine, plain, fused = parameters(), parameters(), parameters()
    optimizer = AdamEMA(mine, lr=1e-3, emas=1)
    per_tensor, foreach = PerTensorAdam(plain, lr=1e-3), FusedAdam(fused, lr=1e-3)
    works: dict[str, protocol.Work] = {
        "ours": lambda: optimizer.step(ema_betas=(beta,)),
        "eager": lambda: per_tensor.step(beta),
        "fused-torch": lambda: foreach.step(beta),
    }
    for work in works.values():
        for _ in range(2):
            work()
    pairs = [*zip(mine, plain, strict=True), *zip(optimizer.emas[0], per_tensor.ema, strict=True)]
    agreement = need(max(difference(a.detach(), b.detach()) for a, b in pairs), 2e-6, "adam_ema")
    times = protocol.interleave(works, rounds=rounds, device=device)
    size = f"{total / 1e6:.1f}M/{tensors}"
    return protocol.rows_of(
        "adam_ema",
        "ours",
        times,
        floor=36 * total / rate,
        agreement=dict.fromkeys(works, agreement),
        size=size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="the paper's sizes only, without compile: under 50 s on 2 cores"
    )
    size.add_argument("--tiny", action="store_true", help="the digits' sizes only, without compile: a rehearsal")
    protocol.arguments(parser, rounds=9, competitors=False)
    arguments = parser.parse_args()
    device, rounds = arguments.device, arguments.rounds
    rate = protocol.copy_rate(device)
    print(f"copy rate {rate / 1e9:.1f} GB/s (read + written)")
    chosen = slice(0, 1) if arguments.tiny else slice(-1, None) if arguments.quick else slice(None)
    compiled = not (arguments.quick or arguments.tiny)
    rows = []
    for shape in ((64, 1, 8, 8), (64, 3, 32, 32), (64, 3, 64, 64))[chosen]:
        rows += noise_loss(device, rate, shape, rounds=rounds, compiled=compiled)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((64, 24, 8, 8), (64, 128, 16, 16), (64, 256, 32, 32))[chosen]:
            rows += norms(device, rate, shape, dtype, rounds=rounds, compiled=compiled)
            rows += residuals(device, rate, shape, dtype, rounds=rounds, compiled=compiled)
        for shape in ((64, 24, 8, 8), (4, 256, 32, 32), (4, 128, 64, 64))[chosen]:
            rows += resampling(device, rate, shape, dtype, rounds=rounds, compiled=compiled)
    if device.type == "cpu":  # a GPU's convolutions are its library's, with us and without
        for shape in ((64, 24, 8, 8), (64, 48, 4, 4), (4, 256, 16, 16), (4, 256, 32, 32))[chosen]:
            rows += convolutions(device, shape, rounds=rounds, compiled=compiled)
    for total, tensors in ((422_353, 119), (62_800_000, 547))[chosen]:
        rows += adam(device, rate, total, tensors, rounds=rounds)
    scale = "-tiny" if arguments.tiny else "-quick" if arguments.quick else ""
    protocol.write(rows, arguments, results=f"kernels{scale}")


if __name__ == "__main__":
    main()
