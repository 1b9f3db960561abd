"""The operators against the readable loss, the recorded reference and their own contracts."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import read_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from fastambient.diffusion.ambient import two_regime_loss
from fastambient_kernels import Stream, ambient_loss, ambient_noise, coefficients, normal

SEEDS = {"noise_seed": 2**63 + 5, "run_seed": 7}
SIGMA = torch.tensor([0.002, 0.05, 0.3999, 0.4, 0.4001, 0.41, 1.0, 80.0])


def batch(n=8, dtype=torch.uint8, seed=0, size=6):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    if dtype != torch.uint8:
        images = images.to(dtype) / 127.5 - 1
    ids = torch.randint(-(2**62), 2**62, (n,), generator=g)
    return images, ids, torch.arange(n) % 2 == 1, torch.arange(100, 100 + n), SIGMA[:n]


def parts(images, ids, flips, positions, sigma, sigma_tn, work=torch.float64):
    """x0, x_n and eps of a batch, flipped, written out from the contract."""
    x0 = images.to(work) / 127.5 - 1 if images.dtype == torch.uint8 else images.to(work)
    shape = x0.shape
    fixed = normal(ids, x0[0].numel(), seed=SEEDS["noise_seed"], stream=Stream.FIXED, dtype=work).view(shape)
    eps = normal(positions, x0[0].numel(), seed=SEEDS["run_seed"], stream=Stream.FRESH, dtype=work).view(shape)
    x_n = x0 + (sigma_tn if math.isfinite(sigma_tn) else 0) * fixed
    return [torch.stack([v.flip(-1) if f else v for v, f in zip(t, flips, strict=True)]) for t in (x0, x_n, eps)]


@pytest.mark.parametrize("weighting", ["paper", "unit"])
@pytest.mark.parametrize("sigma_tn", [0.0, 0.1, 0.4, 1.5, math.inf])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_operators_equal_the_readable_form(sigma_tn, weighting, dtype):
    data = batch(dtype=dtype)
    impl = "reference" if dtype == torch.float64 else "auto"
    sigma_tn = torch.tensor(sigma_tn).item()  # operators use sigma_tn in sigma's precision, here float32
    sigma = data[4].double()
    x0, x_n, eps = parts(*data, sigma_tn)
    noised = ambient_noise(*data, sigma_tn=sigma_tn, sigma_data=0.5, impl=impl, **SEEDS)
    ambient = (sigma >= sigma_tn) & (sigma_tn > 0)
    column = sigma.view(-1, 1, 1, 1)
    tn = sigma_tn if math.isfinite(sigma_tn) else 0
    q = ((column - tn) * (column + tn)).clamp(min=0).sqrt()
    x = torch.where(ambient.view(-1, 1, 1, 1), x_n + q * eps, x0 + column * eps)
    expected = x / (column**2 + 0.25).sqrt()
    error = (noised.net_input - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    assert error.max() < 2e-6
    assert torch.equal(noised.coefficients.tau > 0, ambient)

    F = normal(torch.arange(8), x0[0].numel(), seed=1, stream=9, dtype=torch.float64).view_as(x0)
    F32 = F.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True).requires_grad_()
    loss = ambient_loss(F32, *data, sigma_tn=sigma_tn, sigma_data=0.5, weighting=weighting, impl=impl, **SEEDS)
    F64 = F.detach().clone().requires_grad_()
    reference = two_regime_loss(F64, x0, x_n, eps, sigma, sigma_tn=sigma_tn, weighting=weighting).flatten(1).sum(1)
    exact = dtype == torch.float64
    torch.testing.assert_close(loss.double(), reference, rtol=1e-11 if exact else 5e-6, atol=1e-9)
    scale = torch.arange(1, 9.0)
    (loss * scale).sum().backward()
    (reference * scale).sum().backward()
    difference = (F32.grad.double() - F64.grad).abs().amax((1, 2, 3))
    assert (difference <= 5e-6 * F64.grad.abs().amax((1, 2, 3)) + 1e-9).all()


@pytest.mark.parametrize("name", ["loss_0.safetensors", "loss_1.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_the_recorded_reference(name, dtype):
    t, _ = read_safetensors(name)
    sigma_tn = t["in.sigma_tn"].item()
    t = {key: value.to(dtype) for key, value in t.items()}
    sigma, x0, D = t["in.sigma"], t["in.clean"], t["in.denoised"]
    column = sigma.view(-1, 1, 1, 1)
    ambient = column >= sigma_tn
    x_n = x0 + t["in.fixed_noise_scaled"]
    # eps_low drives the clean regime, eps_high the ambient one
    eps = torch.where(ambient, t["in.eps_high"], t["in.eps_low"])
    x = torch.where(
        ambient, x_n + ((column - sigma_tn) * (column + sigma_tn)).clamp(min=0).sqrt() * eps, x0 + column * eps
    )
    close_to_boundary = (sigma / sigma_tn >= 1) & (sigma / sigma_tn < 1.01)
    per_sample = lambda v: v.abs().amax((1, 2, 3))  # noqa: E731
    assert (per_sample(x - t["out.net_input_x"]) / per_sample(x)).max() < 1e-6

    h = (column**2 + 0.25).sqrt()
    c_skip, c_out = 0.25 / h**2, column * 0.5 / h
    F = ((D - c_skip * x) / c_out).requires_grad_()
    loss = two_regime_loss(F, x0, x_n, eps, sigma, sigma_tn=sigma_tn)
    loss.sum().div(len(sigma)).backward()
    grad_denoised = F.grad / c_out  # F = (D - c_skip x)/c_out
    tolerance = torch.where(close_to_boundary, 5e-5, 2e-6)
    for got, recorded in ((loss.detach(), t["out.loss"]), (grad_denoised, t["out.grad_denoised"])):
        error = per_sample(got - recorded) / per_sample(recorded).clamp(min=1e-30)
        assert (error <= tolerance).all(), (sigma / sigma_tn, error)


@pytest.mark.parametrize("sigma_tn", [0.0, math.inf])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_zero_and_infinite_sigma_tn_are_edm_exactly(sigma_tn, impl):
    images, ids, flips, positions, sigma = batch()
    keywords = {"sigma_data": 0.5, "impl": impl, **SEEDS}
    net_input, _ = ambient_noise(images, ids, flips, positions, sigma, sigma_tn=sigma_tn, **keywords)
    # EDM as it stands, in float32 with the same draws: not one bit may differ in the reference
    x0 = images.float() / 127.5 - 1
    eps = normal(positions, x0[0].numel(), seed=7, stream=Stream.FRESH).view_as(x0)
    s = sigma.view(-1, 1, 1, 1)
    h = (s * s + 0.25).sqrt()
    expected = (1 / h) * (x0 + s * eps)
    expected = torch.where(flips.view(-1, 1, 1, 1), expected.flip(3), expected)
    if impl == "reference":
        assert torch.equal(net_input, expected)
    else:  # draws that agree to rounding
        torch.testing.assert_close(net_input, expected, rtol=2e-6, atol=2e-6)
    F = torch.zeros_like(x0)
    other_ids = ambient_loss(F, images, ids + 1, flips, positions, sigma, sigma_tn=sigma_tn, **keywords)
    loss = ambient_loss(F, images, ids, flips, positions, sigma, sigma_tn=sigma_tn, **keywords)
    edm = ((s / 0.5 * x0 - 0.5 * eps) / h).square().flatten(1).sum(1)
    torch.testing.assert_close(loss, edm, rtol=2e-6, atol=0)
    assert torch.equal(loss, other_ids), "the fixed noise must not matter in plain EDM"
    zero = ambient_loss(F, images, ids, flips, positions, sigma, sigma_tn=0.0, **keywords)
    assert torch.equal(loss, zero)


def test_weightings_differ_by_a_squared_and_the_buffer():
    """Residual identity: paper = a^2 * unit outside the buffer, unit = 0 inside."""
    sigma_tn = 0.4
    sigma = sigma_tn * torch.tensor([0.5, 1.0, 1.1, 1.1546, 1.1548, 2.0, 10.0, 200.0], dtype=torch.float64)
    images, ids, flips, positions, _ = batch(dtype=torch.float64)
    F = normal(positions, images[0].numel(), seed=3, stream=9, dtype=torch.float64).view_as(images)
    keywords = {"sigma_tn": sigma_tn, "sigma_data": 0.5, "impl": "reference", **SEEDS}
    paper, unit = (
        ambient_loss(F, images, ids, flips, positions, sigma, weighting=w, **keywords) for w in ("paper", "unit")
    )
    a = 1 - (sigma_tn / sigma) ** 2
    assert paper[0] == unit[0] and paper[0] > 0
    assert (unit[1:4] == 0).all() and (paper[2:4] > 0).all()
    assert paper[1] == 0  # at sigma_tn itself the prediction is x_n, whatever the network says
    torch.testing.assert_close(paper[4:], a[4:] ** 2 * unit[4:], rtol=1e-10, atol=0)
    # the readable form has the same buffer
    x0, x_n, eps = parts(images, ids, flips, positions, sigma, sigma_tn)
    readable = two_regime_loss(F, x0, x_n, eps, sigma, sigma_tn=sigma_tn, weighting="unit").flatten(1).sum(1)
    torch.testing.assert_close(readable, unit, rtol=1e-11, atol=0)
    # and both are what the definition says: lambda * (a*D + (1-a)*x - x_n)^2
    s = sigma.view(-1, 1, 1, 1)[4:]
    x = x_n[4:] + (s**2 - sigma_tn**2).sqrt() * eps[4:]
    h = (s**2 + 0.25).sqrt()
    D = 0.25 / h**2 * x + s * 0.5 / h * F[4:]
    prediction = a[4:].view(-1, 1, 1, 1) * D + (1 - a[4:]).view(-1, 1, 1, 1) * x
    direct = ((h / (s * 0.5)) ** 2 * (prediction - x_n[4:]) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(paper[4:], direct, rtol=1e-9, atol=0)


@pytest.mark.parametrize("ratio", [1 + 2e-7, 1 + 1e-6, 1 + 1e-4])
def test_just_above_sigma_tn_nothing_cancels(ratio):
    """s^2 - sigma_tn^2 in float32 is off by 2.6 % at a ratio of 1 + 1e-6."""
    tau = torch.tensor(0.4)
    sigma = (tau * ratio)[None]
    s, t = sigma.item(), tau.item()
    a = (s - t) * (s + t) / s**2
    c = coefficients(sigma, sigma_tn=t, sigma_data=0.5)
    assert c.A.item() == pytest.approx(a, rel=1e-6) and c.q.item() == pytest.approx(s * a**0.5, rel=1e-6)
    F = torch.full((1, 1), 1e4, requires_grad=True)  # the gradient is 2a(a*F - U), next to which U vanishes
    zero = torch.zeros(1, 1)
    two_regime_loss(F, zero, zero, zero, sigma, sigma_tn=t).sum().backward()
    assert F.grad.item() == pytest.approx(2e4 * a**2, rel=1e-6)


def test_the_clean_target_is_exact_at_the_lowest_noise():
    """T = (s/sd*x0 - sd*eps)/h. The ambient form at sigma_tn = 0 is equal on paper, and off by 1e-5 at s = 0.002."""
    s, sd = torch.tensor([0.002]), 0.75
    s64 = s.double().item()
    c = coefficients(s, sigma_tn=0.0, sigma_data=sd)
    h = math.sqrt(s64**2 + sd**2)
    assert c.alpha.item() == pytest.approx(s64 / (sd * h), rel=3e-7)
    assert c.beta.item() == pytest.approx(-sd / h, rel=3e-7)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss = two_regime_loss(zero, one, zero, zero, s, sigma_tn=0.0, sigma_data=sd)
    assert loss.item() == pytest.approx((s64 / (sd * h)) ** 2, rel=1e-6)


def test_nan_in_the_unused_regime_reaches_nothing():
    images, ids, flips, positions, sigma = batch(dtype=torch.float32)
    x_n = torch.randn_like(images)
    ambient = sigma >= 0.4
    x_n[~ambient] = math.nan
    images[ambient] = math.nan
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, "x_n": x_n, **SEEDS}
    noised = ambient_noise(images, ids, flips, positions, sigma, **keywords)
    assert noised.net_input.isfinite().all()
    F = torch.randn_like(images).requires_grad_()
    loss = ambient_loss(F, images, ids, flips, positions, sigma, **keywords)
    loss.sum().backward()
    assert loss.isfinite().all() and F.grad.isfinite().all() and (F.grad != 0).any()
    # the readable form, too
    F.grad = None
    readable = two_regime_loss(F, images, x_n, torch.randn_like(F), sigma, sigma_tn=0.4)
    readable.sum().backward()
    assert readable.isfinite().all() and F.grad.isfinite().all()


def test_target_of_the_ambient_regime_is_never_the_clean_image():
    """With x_n given, an ambient sample's input and loss do not depend on x0 at all."""
    images, ids, flips, positions, sigma = batch(dtype=torch.float32)
    x_n, F = torch.randn_like(images), torch.randn_like(images)
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, "x_n": x_n, **SEEDS}
    one = ambient_loss(F, images, ids, flips, positions, sigma, **keywords)
    two = ambient_loss(F, -images, ids, flips, positions, sigma, **keywords)
    ambient = sigma >= 0.4
    assert torch.equal(one[ambient], two[ambient]) and (one[~ambient] != two[~ambient]).all()


def test_a_picture_and_its_flip_share_their_noise():
    """The noise moves with the image: unflipping a flipped sample gives the same picture, so their difference holds
    nothing; a separate noise for the flip would average out, a fixed one in place would cancel."""
    images, ids, _, positions, _ = batch(n=4)
    sigma = torch.full((4,), 0.4)  # exactly sigma_tn: no fresh noise, the input is x_n itself
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS}
    straight = ambient_noise(images, ids, torch.zeros(4, dtype=torch.bool), positions, sigma, **keywords).net_input
    flipped = ambient_noise(images, ids, torch.ones(4, dtype=torch.bool), positions + 50, sigma, **keywords).net_input
    assert torch.equal(straight, flipped.flip(3))
    # The reference's way, x0 + n and flip(x0) + n, would give this noise-free difference:
    x0 = images.float() / 127.5 - 1
    noise_free = x0 - x0.flip(3)
    c_in = 1 / math.sqrt(0.4**2 + 0.25)
    assert ((straight - flipped) / c_in - noise_free).abs().mean() > 0.2


def test_fixed_and_fresh_noise_are_two_regressions():
    """Five points on a line. With fixed noise the best prediction of x_n at sigma = sigma_tn is x_n itself, so the
    denoised minimiser lands on the noisy set; with fresh noise the mean over draws is the clean point."""
    points = torch.linspace(-1, 1, 5).view(5, 1, 1, 1)
    ids, sigma = torch.arange(5), torch.full((5,), 2.0)
    keywords = {"sigma_tn": 0.5, "sigma_data": 0.5, "run_seed": 3}

    def mean_target(fresh: bool) -> torch.Tensor:
        """Least-squares constant per point of what the loss regresses on: argmin of the mean loss over draws."""
        total = torch.zeros(5)
        draws = 400
        for k in range(draws):
            positions = torch.arange(5) + 5 * k
            c = coefficients(sigma, sigma_tn=0.5, sigma_data=0.5)
            zero = torch.zeros(5, 1, 1, 1, requires_grad=True)
            seed, key = (3, positions) if fresh else (11, ids)
            loss = ambient_loss(zero, points, key, None, positions, sigma, noise_seed=seed, **keywords)
            loss.sum().backward()
            total += (-zero.grad.flatten() / (2 * c.A)) / c.alpha  # Y/alpha = y + (beta/alpha) eps
        return total / draws

    x_n = points.flatten() + 0.5 * normal(ids, 1, seed=11, stream=Stream.FIXED)[:, 0]
    c = coefficients(sigma[:1], sigma_tn=0.5, sigma_data=0.5)
    spread = 4 * (c.beta / c.alpha).abs().item() / math.sqrt(400)  # of the mean over fresh eps
    assert (mean_target(fresh=False) - x_n).abs().max() < spread
    fresh = mean_target(fresh=True)
    assert (fresh - points.flatten()).abs().max() < spread + 4 * 0.5 / math.sqrt(400)
    assert (x_n - points.flatten()).abs().max() > 2 * spread, "the toy must be able to tell them apart"


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 7), order=st.permutations(range(8)), sigma_tn=st.sampled_from([0.0, 0.1, 0.4, 2.0]))
def test_noise_is_equal_over_batch_split_and_order(cut, order, sigma_tn):
    data = batch()
    keywords = {"sigma_tn": sigma_tn, "sigma_data": 0.5, **SEEDS}
    whole = ambient_noise(*data, **keywords).net_input
    for part in (slice(0, cut), slice(cut, 8), list(order)):
        assert torch.equal(ambient_noise(*(v[part] for v in data), **keywords).net_input, whole[part])


def test_layouts_and_dtypes():
    data = batch()
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS}
    plain = ambient_noise(*data, **keywords)
    nhwc = ambient_noise(*data, memory_format=torch.channels_last, out_dtype=torch.bfloat16, **keywords)
    assert nhwc.net_input.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nhwc.net_input, plain.net_input.bfloat16())
    F = torch.randn(8, 3, 6, 6).bfloat16().requires_grad_()
    loss = ambient_loss(F, *data, **keywords)
    assert loss.dtype == torch.float32
    loss.sum().backward()  # an expanded gradient
    assert F.grad.dtype == torch.bfloat16
    F32 = F.detach().float().requires_grad_()
    same = ambient_loss(F32, *data, **keywords)
    same.sum().backward()
    assert torch.equal(loss, same) and torch.equal(F.grad, F32.grad.bfloat16())


def test_precomputed_copy_gives_the_same_step():
    images, ids, flips, positions, sigma = batch()
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS}
    x_n = images.float() / 127.5 - 1 + 0.4 * normal(ids, 108, seed=SEEDS["noise_seed"], stream=0).view(8, 3, 6, 6)
    for copy, tolerance in ((x_n, 1e-6), (x_n.half(), 1e-3)):
        a = ambient_noise(images, ids, flips, positions, sigma, x_n=copy, **keywords).net_input
        b = ambient_noise(images, ids, flips, positions, sigma, **keywords).net_input
        assert (a - b).abs().max() < tolerance * 8


def test_gradcheck():
    data = batch(n=4, dtype=torch.float64, size=2)
    sigma = torch.tensor([0.1, 0.4, 0.5, 3.0], dtype=torch.float64)
    F = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    for weighting in ("paper", "unit"):
        assert torch.autograd.gradcheck(
            lambda f, w=weighting: ambient_loss(
                f, *data[:4], sigma, sigma_tn=0.4, sigma_data=0.5, weighting=w, impl="reference", **SEEDS
            ),
            (F,),
        )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"images": torch.zeros(8, 3, 6, 6, dtype=torch.int32)}, "images must be uint8 or float"),
        ({"ids": torch.arange(7)}, r"ids must be \[8\]"),
        ({"ids": torch.arange(8.0)}, "int64"),
        ({"ids": torch.arange(8, device="meta")}, "ids must be on the images' device, cpu, not on meta"),
        ({"flips": torch.zeros(8)}, "flips must be bool"),
        ({"sigma": torch.ones(8, dtype=torch.int64)}, "sigma must be float"),
        ({"sigma": torch.ones(8, dtype=torch.complex64)}, "sigma must be float"),
        ({"x_n": torch.zeros(8, 3, 5, 5)}, r"x_n must be \[8, 3, 6, 6\], got \[8, 3, 5, 5\]"),
        ({"x_n": torch.zeros(8, 3, 6, 6, dtype=torch.uint8)}, "x_n must be float, got torch.uint8"),
        ({"out_dtype": torch.int32}, "out_dtype must be a float dtype"),
        ({"memory_format": torch.channels_last_3d}, "memory_format must be"),
        ({"run_seed": 1.5}, "a seed must be an integer, got 1.5"),
        ({"sigma_tn": -1.0}, "sigma_tn must be 0 or more"),
        ({"sigma_tn": math.nan}, "sigma_tn must be 0 or more"),
        ({"sigma_data": 0.0}, "sigma_data must be above 0"),
        ({"sigma_data": math.inf}, "sigma_data must be above 0 and finite"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_errors_name_the_value(change, error):
    names = ("images", "ids", "flips", "positions", "sigma")
    arguments = dict(zip(names, batch(), strict=True)) | {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS} | change
    with pytest.raises((TypeError, ValueError), match=error):
        ambient_noise(**arguments)


def test_errors_of_the_loss():
    data, keywords = batch(), {"sigma_tn": 0.4, "sigma_data": 0.5, **SEEDS}
    for F, error, text in (
        (torch.zeros(8, 3, 6, 5), TypeError, "F must be float"),
        (torch.zeros(8, 3, 6, 6, dtype=torch.int64), TypeError, "F must be float"),
        (torch.zeros(8, 3, 6, 6, device="meta"), ValueError, "F must be on the images' device"),
    ):
        with pytest.raises(error, match=text):
            ambient_loss(F, *data, **keywords)
    with pytest.raises(ValueError, match="weighting must be one of paper, unit"):
        ambient_loss(torch.zeros(8, 3, 6, 6), *data, weighting="a", **keywords)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_what_has_no_derivative_says_so(impl):
    """F alone has a gradient; a second derivative is refused, also where the incoming gradient needs none."""
    images, ids, flips, positions, sigma = batch(dtype=torch.float32)
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, "impl": impl, **SEEDS}
    leaves = (images.requires_grad_(), ids, flips, positions, sigma.clone().requires_grad_())
    assert not ambient_noise(*leaves, **keywords).net_input.requires_grad
    F = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = ambient_loss(F, *leaves, **keywords)
    (dF,) = torch.autograd.grad(loss.sum(), F, create_graph=True)
    penalty = loss.sum() + dF.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty.backward()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(lambda f: ambient_loss(f, *leaves, **keywords))(torch.zeros(2, 8, 3, 6, 6))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_level_that_is_no_number_stays_in_its_sample(impl, bad):
    images, ids, flips, positions, sigma = batch()
    keywords = {"sigma_tn": 0.4, "sigma_data": 0.5, "impl": impl, **SEEDS}
    F = torch.ones(8, 3, 6, 6)
    expected = ambient_loss(F, images, ids, flips, positions, sigma, **keywords)
    sigma = sigma.clone()
    sigma[3] = bad
    losses = ambient_loss(F, images, ids, flips, positions, sigma, **keywords)
    x = ambient_noise(images, ids, flips, positions, sigma, **keywords).net_input
    others = torch.arange(8) != 3
    assert losses[3].isnan() and torch.equal(losses[others], expected[others])
    assert x[3].isnan().all() and x[others].isfinite().all()
