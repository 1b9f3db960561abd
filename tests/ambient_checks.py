"""What the tests of every implementation of noise and loss share: inputs, the comparison with float64, tolerances."""

from __future__ import annotations

from typing import Any

import torch

from fastambient_kernels import ambient_loss, ambient_noise, normal

SEEDS = {"noise_seed": 2**64 - 3, "run_seed": 11}
KEYS = {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS}
# float32, relative to a sample's largest value, to the loss and to a sample's largest dF: docs/numerics.md
LIMITS = NOISE, LOSS, DF = 1e-6, 3e-6, 2e-6
ANY_SIZE = 1e-6, 5e-6, 3e-6
FEW_VALUES = 1e-4, 1e-3, 1e-4  # below 32 values a lone one may cancel and has no larger neighbour
GPU = 1e-5, 3e-5, 2e-5  # fast sine and cosine
COEFFICIENTS = {"native": {"rtol": 3e-7, "atol": 1e-12}, "triton": {"rtol": 1e-6, "atol": 2e-7}}


def batch(n=8, channels=3, height=6, width=6, *, dtype=torch.uint8, seed=0):
    """(images, ids, flips, positions, sigma) with a sample on the boundary and one in the clean regime."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, height, width), generator=g, dtype=torch.uint8)
    if dtype != torch.uint8:
        images = images.to(dtype) / 127.5 - 1
    sigma = torch.exp(torch.randn(n, generator=g) * 1.5 - 0.8)
    sigma[0] = torch.tensor(0.4)  # the boundary
    if n > 1:
        sigma[1] = 0.1  # clean
    ids = torch.randint(-(2**62), 2**62, (n,), generator=g)
    return images, ids, torch.arange(n) % 3 == 0, torch.arange(n) + 2**40, sigma


def compare(
    impl: str, data, keywords: dict[str, Any], *, F_dtype=torch.float32, layout=torch.contiguous_format,
    weighting="paper", x_n=None, device="cpu",
):  # fmt: skip
    """(noise error, loss error, dF error) of `impl` on `device` against the reference in float64 on the CPU."""
    wide = (data[0] if data[0].dtype == torch.uint8 else data[0].double(), *data[1:4], data[4].double())
    exact = {k: torch.tensor(v).item() if k.startswith("sigma") else v for k, v in keywords.items()}  # as float32
    there = tuple(None if t is None else t.to(device) for t in data)
    keywords = keywords | {"impl": impl, "x_n": None if x_n is None else x_n.to(device)}
    got = ambient_noise(*there, **keywords, out_dtype=F_dtype, memory_format=layout)
    reference = ambient_noise(*wide, impl="reference", x_n=x_n, **exact)
    assert got.net_input.dtype == F_dtype and got.net_input.is_contiguous(memory_format=layout)
    for name, a, b in zip(got.coefficients._fields, got.coefficients, reference.coefficients, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, **COEFFICIENTS[impl], msg=lambda m, name=name: f"{name}: {m}")

    F = normal(data[3], data[0][0].numel(), seed=5, stream=9).view(data[0].shape).to(F_dtype)
    F64 = F.double().requires_grad_()
    F = F.to(device).contiguous(memory_format=layout).requires_grad_()
    loss = ambient_loss(F, *there, weighting=weighting, **keywords)
    exact_loss = ambient_loss(F64, *wide, impl="reference", weighting=weighting, x_n=x_n, **exact)
    scale = torch.linspace(0.5, 2, len(loss))
    (loss * scale.to(device)).sum().backward()
    (exact_loss * scale).sum().backward()
    assert loss.dtype == torch.float32 and F.grad.dtype == F_dtype and F.grad.stride() == F.stride()

    relative = (loss.cpu().double() - exact_loss).abs() / (exact_loss.abs() + 1e-9)
    return _worst(got.net_input, reference.net_input, 1e-9), relative.max().item(), _worst(F.grad, F64.grad, 1e-6)


def _worst(got, exact, floor):
    """Largest difference over the largest value, per sample."""
    got, exact = got.detach().cpu().double().flatten(1), exact.detach().flatten(1)
    return ((got - exact).abs().amax(1) / exact.abs().amax(1).clamp(min=floor)).max().item()


def assert_uniforms_of_zero(impl: str):
    """Two ids whose words hold a uniform of 0, where the logarithm is that of 1e-7: 1 in 2^24, and never a NaN."""
    ids, keywords = torch.tensor([1224113, 5680941]), KEYS | {"sigma_tn": 1.0, "noise_seed": 0}
    got = ambient_noise(torch.zeros(2, 1, 1, 4), ids, None, ids, torch.ones(2), impl=impl, **keywords)
    z = got.net_input / got.coefficients.c_in.view(-1, 1, 1, 1)
    exact = normal(ids, 4, seed=0, stream=0, dtype=torch.float64).view_as(z)
    assert exact.abs().max() > 5 and (z - exact).abs().max() < 1e-5, (z, exact)


def assert_rounds_to_nearest_even(impl: str):
    """c_in = 1 and a noise of 1e-30 leave a float image as it is, so that its bits can be chosen: ties, and others."""
    bits = torch.randint(0x3000, 0x4000, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.int32) << 16
    bits += torch.tensor([0x8000, 0x7FFF, 0x8001, 0], dtype=torch.int32).repeat(1024)
    images, ids = bits.view(torch.float32).view(1, 1, 64, 64), torch.tensor([3])
    keywords = KEYS | {"sigma_tn": 0.0, "sigma_data": 1.0, "out_dtype": torch.bfloat16}
    x = ambient_noise(images, ids, None, ids, torch.full((1,), 1e-30), impl=impl, **keywords).net_input
    assert torch.equal(x, images.bfloat16())


def assert_within(errors, limits=LIMITS, *, F_dtype=torch.float32):
    """Hold what `compare` returned to the tolerances."""
    noise, loss, dF = errors
    rounding = 2.0**-8 if F_dtype == torch.bfloat16 else 0.0
    assert noise < limits[0] + rounding and loss < limits[1], errors
    # dF is rounded when it is written and once more when backward scales it
    assert dF < limits[2] + 2 * rounding, errors


def assert_seen(errors):
    """A planted fault leaves the tolerances of the loss or of its gradient."""
    _, loss, dF = errors
    assert loss > LOSS or dF > DF, errors
