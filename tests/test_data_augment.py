"""Augmentation: what is done, what the labels say of it, and what stays untouched."""

from __future__ import annotations

import math

import pytest
import torch

from fastambient.data.augment import LABEL_DIM, _inverse_matrix, _warp, augment
from fastambient_kernels.noise import normal, uniform


def smooth_images(n: int, size: int = 32) -> torch.Tensor:
    """Blobs that fade towards the border, so that resampling is accurate and padding does not show."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    centre = (torch.rand(n, 3, 3, 2, 1, 1, generator=generator) - 0.5) * 0.5
    blobs = torch.exp(-((x - centre[..., 0, :, :]) ** 2 + (y - centre[..., 1, :, :]) ** 2) / 0.08)
    return (blobs * (torch.rand(n, 3, 3, 1, 1, generator=generator) - 0.5)).sum(2)


def run(images, positions=None, *, p=1.0, seed=5, xflips=None, active=None):
    n = len(images)
    positions = torch.arange(n) if positions is None else positions
    xflips = torch.zeros(n, dtype=torch.bool) if xflips is None else xflips
    active = torch.ones(n, dtype=torch.bool) if active is None else active
    return augment(images, positions, p=p, seed=seed, xflips=xflips, active=active)


def test_p_zero_is_the_identity():
    images = torch.randn(8, 3, 16, 16)
    out, labels = run(images, p=0.0)
    assert torch.equal(out, images)
    assert labels.shape == (8, LABEL_DIM) and labels.dtype == torch.float32 and not labels.any()


def test_inactive_samples_are_untouched():
    images = torch.randn(40, 1, 8, 8)
    active, xflips = torch.arange(40) % 3 == 0, torch.arange(40) % 2 == 0
    out, labels = run(images, xflips=xflips, active=active)
    assert torch.equal(out[~active], images[~active])
    assert (out[active] != images[active]).flatten(1).any(1).all()
    assert torch.equal(labels[:, 0], xflips.float())  # of every sample
    assert not labels[~active, 1:].any() and labels[active, 1:].abs().sum(1).min() > 0
    everywhere, _ = run(images, xflips=xflips)
    assert torch.equal(out[active], everywhere[active])


def test_disabled_maps_leave_samples_bit_identical():
    images = torch.randn(300, 1, 8, 8)
    out, labels = run(images, p=0.15)
    none = ~labels.any(1)
    assert 60 < none.sum() < 240
    assert torch.equal(out[none], images[none])
    only_yflip = (labels[:, 1] == 1) & ~labels[:, 2:].any(1)
    assert only_yflip.any() and torch.equal(out[only_yflip], images[only_yflip].flip(2))


def test_batch_split_and_order_do_not_matter():
    images, positions = torch.randn(24, 3, 8, 8), torch.arange(100, 124)
    out, labels = run(images, positions, p=0.5)
    for size in (1, 7):
        parts = [run(i, p_, p=0.5) for i, p_ in zip(images.split(size), positions.split(size), strict=True)]
        assert torch.equal(torch.cat([part[0] for part in parts]), out)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    order = torch.randperm(24)
    shuffled, shuffled_labels = run(images[order], positions[order], p=0.5)
    assert torch.equal(shuffled, out[order]) and torch.equal(shuffled_labels, labels[order])
    assert not torch.equal(run(images, positions, p=0.5, seed=6)[1], labels)


def test_no_global_state():
    state = torch.get_rng_state()
    run(torch.zeros(4, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_the_documented_elements():
    """Elements 4-7 are normals, 8-16 uniforms; 0 is the loader's flip, which nothing here may share."""
    positions = torch.arange(200)
    _, labels = run(torch.zeros(200, 1, 4, 4), positions)
    z = normal(positions, 8, seed=5, stream=3)
    u = uniform(positions, 17, seed=5, stream=3)
    theta, phi = (2 * u[:, 14] - 1) * torch.pi, (2 * u[:, 15] - 1) * torch.pi * (u[:, 16] < 0.5)
    expected = [
        torch.zeros(200), (u[:, 13] < 0.5).float(), z[:, 4], theta.cos() - 1, theta.sin(), z[:, 5] * phi.cos(),
        z[:, 5] * phi.sin(), z[:, 6], z[:, 7],
    ]  # fmt: skip
    torch.testing.assert_close(labels, torch.stack(expected, dim=1))
    _, half = run(torch.zeros(200, 1, 4, 4), positions, p=0.5)
    assert torch.equal(half[:, 2] != 0, u[:, 9] < 0.5), "scale is enabled by element 9"


def test_label_statistics():
    """Probabilities and distributions of the paper's table, at p = 0.4."""
    n, p = 20_000, 0.4
    _, labels = run(torch.zeros(n, 1, 2, 2), p=p)
    tolerance = 4 * math.sqrt(0.25 / n)

    def share(mask):
        return float(mask.float().mean())

    assert abs(share(labels[:, 1] == 1) - p / 2) < tolerance  # enabled, then a coin
    assert set(labels[:, 1].unique().tolist()) == {0.0, 1.0}
    for columns in ([2], [3, 4], [5, 6], [7, 8]):
        assert abs(share(labels[:, columns].any(1)) - p) < tolerance
    for column in (2, 7, 8):
        values = labels[labels[:, column] != 0, column]
        assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 3:5].any(1)]
    assert abs(angle.std() - math.pi / math.sqrt(3)) < 0.05 and angle.min() < -3.1 and angle.max() > 3.1
    radius = torch.hypot(labels[:, 3] + 1, labels[:, 4])
    assert (radius - 1).abs().max() < 1e-6
    stretched = labels[labels[:, 5:7].any(1), 5:7]
    assert abs(share(stretched[:, 1] == 0) - 0.5) < 2 * tolerance  # half of them along the axes
    assert abs(stretched.square().sum(1).mean() - 1) < 0.08
    enabled = torch.stack([labels[:, c].any(1) for c in ([2], [3, 4], [5, 6], [7, 8])], dim=1).float()
    assert (torch.corrcoef(enabled.T) - torch.eye(4)).abs().max() < 0.04  # drawn independently


ZERO = torch.zeros(1)


def warp(images, *, c=0.0, theta=0.0, d=0.0, phi=0.0, tx=0.0, ty=0.0):
    values = [torch.full((len(images),), float(v)) for v in (c, theta, d, phi)]
    return _warp(images, _inverse_matrix(*values), torch.tensor([[tx, ty]]).expand(len(images), 2))


def test_directions():
    """A bright dot tells where each map moves it: counter-clockwise, to the right, downwards, outwards."""

    def centre(images):
        total = images.sum((2, 3))
        y, x = torch.meshgrid(*[torch.arange(33.0) - 16] * 2, indexing="ij")
        return [round(float((images * axis).sum() / total), 1) for axis in (x, y)]

    y, x = torch.meshgrid(*[torch.arange(33.0) - 16] * 2, indexing="ij")
    dot = torch.exp(-((x - 6) ** 2 + y**2) / 4)[None, None]  # 6 pixels to the right of the centre
    assert centre(dot) == [6, 0] and centre(warp(dot)) == [6, 0]
    assert centre(warp(dot, theta=math.pi / 2)) == [0, -6]  # up: y points down
    assert centre(warp(dot, tx=4 / 33, ty=-2 / 33)) == [10, -2]
    assert centre(warp(dot, c=2.0)) == [round(6 * 2**0.4, 1), 0]
    assert centre(warp(dot, d=2.0)) == [round(6 * 2**0.4, 1), 0]  # phi = 0: along x
    assert centre(warp(dot, d=2.0, phi=math.pi / 2)) == [round(6 * 2**-0.4, 1), 0]
    x_, y_ = centre(warp(dot, d=2.0, phi=math.pi / 4))  # stretched along the diagonal that rises to the right
    assert x_ > 6 and y_ < -1


def test_order_of_maps():
    """Rotation before stretch before translation, as the composition of single maps."""
    images = smooth_images(4)
    once = warp(images, c=-0.8, theta=0.7, d=0.6, phi=0.4, tx=0.06, ty=-0.05)
    steps = warp(images, c=-0.8)
    steps = warp(steps, theta=0.7)
    steps = warp(steps, d=0.6, phi=0.4)
    steps = warp(steps, tx=0.06, ty=-0.05)
    inner = (slice(None), slice(None), slice(8, 24), slice(8, 24))  # mirrors at the border do not compose
    assert (once - steps)[inner].abs().max() < 0.03 < 0.2 < (once - images)[inner].abs().max()


def test_warp_is_faithful():
    images = smooth_images(4)
    assert (warp(images) - images).abs().max() < 0.02
    assert (warp(images, theta=math.pi) - images.flip(2, 3)).abs().max() < 0.02
    assert (warp(images, theta=math.pi / 2) - images.rot90(1, (2, 3))).abs().max() < 0.02
    flat = torch.full((3, 1, 16, 16), 0.37)
    out, _ = run(flat)
    assert (out - 0.37).abs().max() < 1e-5  # beyond the border goes the mirror image, not black


def test_labels_of_flipped_samples_describe_the_flipped_picture():
    """EDM flips first, the operator last: what the network sees must be EDM's picture for these labels."""
    images = smooth_images(64)
    xflips = torch.arange(64) % 2 == 0
    out, labels = run(images, p=0.7, xflips=xflips)
    unflipped, plain = run(images, p=0.7)
    assert torch.equal(out, unflipped)  # augment never flips

    seen = torch.where(xflips.view(-1, 1, 1, 1), out.flip(3), out)
    start = torch.where(labels[:, 0].view(-1, 1, 1, 1) > 0, images.flip(3), images)
    start = torch.where(labels[:, 1].view(-1, 1, 1, 1) > 0, start.flip(2), start)
    theta = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    stretch, phi = torch.hypot(labels[:, 5], labels[:, 6]), torch.atan2(labels[:, 6], labels[:, 5])
    agrees = []
    for d, direction in ((stretch, phi), (-stretch, phi + math.pi)):  # one label, two maps: EDM's labels leave it open
        expected = _warp(start, _inverse_matrix(labels[:, 2], theta, d, direction), labels[:, 7:9] * 0.125)
        agrees.append((expected - seen).flatten(1).abs().amax(1) < 0.02)
    assert torch.stack(agrees).any(0).all() and not torch.stack(agrees).all()
    signs = torch.ones(64, LABEL_DIM)
    signs[xflips] = torch.tensor([1.0, 1, 1, 1, -1, 1, -1, -1, 1])
    plain[:, 0] = xflips.float()
    assert torch.equal(labels, plain * signs)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_bad_probabilities(p):
    with pytest.raises(ValueError, match="probability"):
        run(torch.zeros(1, 1, 4, 4), p=p)
