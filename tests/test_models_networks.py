"""The raw networks: published sizes, building blocks against their definitions, precision, layout, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastambient.errors import InputError
from fastambient.models import build
from fastambient.models.blocks import BlockStyle, UNetBlock, keep_joined, scaled_dot_product, with_bf16_weights
from fastambient.models.layers import Conv2d, GroupNorm, Init, PositionalEmbedding

DDPMPP = {
    "model_type": "SongUNet",
    "img_resolution": 16,
    "img_channels": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
NCSNPP = {
    **DDPMPP,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SKIP = {**DDPMPP, "encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]}
ADM = {**DDPMPP, "model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 2]}
ALL = {"ddpmpp": DDPMPP, "ncsnpp": NCSNPP, "skip": SKIP, "adm": ADM}


def random_network(config, seed=0):
    """Every parameter non-zero, so that each path carries something."""
    torch.manual_seed(seed)
    net = build(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.5 / math.sqrt(max(p[0].numel(), 4)))
    return net


def inputs(n=3, channels=3, resolution=16):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, resolution, resolution, generator=g), torch.linspace(-1.5, 1.0, n)


PUBLISHED_DDPMPP = {"model_type": "SongUNet", "img_channels": 3, "augment_dim": 9}
PUBLISHED_NCSNPP = {
    **PUBLISHED_DDPMPP,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({**PUBLISHED_DDPMPP, "img_resolution": 32, "channel_mult": [2, 2, 2]}, 55_733_891),
        ({**PUBLISHED_NCSNPP, "img_resolution": 32, "channel_mult": [2, 2, 2]}, 56_397_827),
        ({**PUBLISHED_DDPMPP, "img_resolution": 64}, 61_805_571),
        ({**PUBLISHED_NCSNPP, "img_resolution": 64}, 62_761_091),
        ({"model_type": "DhariwalUNet", "img_channels": 3, "img_resolution": 64, "label_dim": 1000}, 295_899_267),
    ],
    ids=["cifar10-ddpmpp", "cifar10-ncsnpp", "ffhq64-ddpmpp", "ffhq64-ncsnpp", "imagenet64-adm"],
)
def test_published_networks_have_the_published_size(config, parameters):
    with torch.device("meta"):
        net = build(config)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("resample_filter", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_resampling_equals_its_definition(kernel, resample_filter):
    """Zeros inserted or samples left out, around one explicit filter over the zero-extended picture."""
    taps = torch.tensor(resample_filter, dtype=torch.float64)
    f = (taps.outer(taps) / taps.sum() ** 2)[None, None].expand(4, -1, -1, -1)
    side, x = (len(taps) - 1) // 2, torch.randn(2, 4, 8, 8, dtype=torch.float64)
    layers = {}
    for resample in ("up", "down", "down_fused"):
        if kernel or resample != "down_fused":
            conv = Conv2d(
                4, 5, kernel, Init("xavier_uniform", bias=1.0), resample=resample, resample_filter=taps.tolist()
            )
            layers[resample] = conv.double()

    def convolve(layer, y):
        return F.conv2d(y, layer.weight, layer.bias, padding=kernel // 2) if kernel else y

    stuffed = torch.zeros(2, 4, 16, 16, dtype=torch.float64)
    stuffed[:, :, ::2, ::2] = x
    before = len(taps) - 1 - side
    padded = F.pad(stuffed, (before, len(taps) // 2 - 1, before, len(taps) // 2 - 1))
    up = F.conv2d(padded, 4 * f, groups=4)
    torch.testing.assert_close(layers["up"](x), convolve(layers["up"], up))

    down = F.conv2d(F.pad(x, (side,) * 4), f, groups=4)[:, :, ::2, ::2]
    torch.testing.assert_close(layers["down"](x), convolve(layers["down"], down))

    if kernel:
        layer = layers["down_fused"]
        wide = F.conv2d(F.pad(x, (side + kernel // 2,) * 4), layer.weight)
        f5 = f[:1].expand(5, -1, -1, -1)
        down = F.conv2d(wide, f5, groups=5)[:, :, ::2, ::2] + layer.bias[:, None, None]
        torch.testing.assert_close(layer(x), down)


@pytest.mark.parametrize("config", [DDPMPP, NCSNPP, ADM])
def test_bf16_weights_are_what_autocast_makes_of_them(config):
    """To the bit, also with classes; all other tensors are shared, and the network keeps its own."""
    torch.manual_seed(0)
    network = build(config | {"label_dim": 3}).eval().requires_grad_(False)
    for p in network.parameters():
        p.add_(0.1 * torch.randn_like(p))
    made = with_bf16_weights(network)
    keep_joined(made)
    size = config["img_resolution"]
    x, c_noise, labels = torch.randn(2, 3, size, size), torch.randn(2), torch.eye(3)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (f(x, c_noise, labels) for f in (network, made))
        assert torch.equal(expected, found)
    kinds = {name: p.dtype for name, p in made.named_parameters()}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    big = {name for name, p in network.named_parameters() if p.dim() > 1 and not name.startswith("map_")}
    assert big == {name for name, dtype in kinds.items() if dtype is torch.bfloat16}
    theirs = dict(network.named_parameters())
    assert all(p is theirs[name] for name, p in made.named_parameters() if name not in big)
    assert made.block_embeddings.joined[0].dtype is torch.bfloat16
    assert network.block_embeddings.joined is None


@pytest.mark.parametrize("config", [DDPMPP, NCSNPP, ADM])
def test_each_block_has_its_own_layer_of_the_embedding(config):
    """One product gives it what its layer alone would, and the layer the same gradients."""
    network = build(config).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    seen, blocks = {}, [m for m in network.modules() if isinstance(m, UNetBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda m, given: seen.update({m: given[1]}))
    network.block_embeddings.register_forward_pre_hook(lambda m, given: seen.update({m: given[0]}))
    size = config["img_resolution"]
    network(torch.randn(2, 3, size, size).double(), torch.randn(2).double())
    emb = seen.pop(network.block_embeddings)
    assert list(seen) == blocks
    for block, found in seen.items():
        right = block.affine(emb) + (0 if block.adaptive_scale else block.conv0.bias)
        torch.testing.assert_close(found, right)
        dy, leaves = torch.randn_like(right), (emb, block.affine.weight, block.affine.bias)
        for a, b in zip(*(torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (found, right)), strict=True):
            torch.testing.assert_close(a, b)
    first = None
    for _ in range(2):  # gradients that shared memory would be added to twice
        network(torch.ones(2, 3, size, size).double(), torch.zeros(2).double()).square().sum().backward()
        first = first or {p: p.grad.clone() for p in network.parameters()}
    for p, g in first.items():
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("pictures", [2, 16])  # the fused kernel, and products
@pytest.mark.parametrize("tokens", [16, 64, 65])
def test_attention_in_bfloat16_is_as_exact_as_its_rounding(tokens, pictures):
    """Under autocast, which must not bring few tokens back into bfloat16; gradients too."""
    make = torch.Generator().manual_seed(tokens)
    held = [torch.randn(pictures, 3, tokens, 32, generator=make).bfloat16() for _ in range(4)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = leaves = [t.to(dtype).requires_grad_() for t in held[:3]]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = scaled_dot_product(q, k, v)
        assert y.dtype is dtype
        found.append([y.detach(), *torch.autograd.grad(y, leaves, held[3].to(dtype))])
    for low, high in zip(*found, strict=True):
        error = (low.double() - high).norm() / high.norm()
        # One rounding on the way out where the arithmetic is float32's, several where it is bfloat16's.
        assert error < (2**-9 if tokens <= 64 else 2**-7), error


@pytest.mark.parametrize("pictures", [2, 16])
def test_attention_equals_its_definition_over_several_heads(pictures):
    style = BlockStyle(
        emb_channels=8, init=Init("xavier_uniform"), init_zero=Init("xavier_uniform"), init_attn=Init("xavier_uniform"),
        dropout=0.0, channels_per_head=16, adaptive_scale=True, resample_proj=False, skip_scale=1.0, eps=1e-5,
    )  # fmt: skip
    block = UNetBlock(48, 48, style, 1, attention=True).double()
    assert block.heads == 3
    x = torch.randn(pictures, 48, 4, 4, dtype=torch.float64)
    normed = F.group_norm(x, 12, eps=1e-5)
    q, k, v = F.conv2d(normed, block.qkv.weight).reshape(pictures, 3, 16, 3, 16).unbind(3)  # [N, head, channel, pixel]
    attention = torch.einsum("nhcq,nhck->nhqk", q, k / 4).softmax(dim=-1)
    mixed = torch.einsum("nhqk,nhck->nhcq", attention, v).reshape(pictures, 48, 4, 4)
    torch.testing.assert_close(block._attend(x), F.conv2d(mixed, block.proj.weight), rtol=1e-10, atol=1e-10)


def test_norm_has_its_own_epsilon_groups_and_modulation():
    norm = GroupNorm(24, 1e-6).double()
    assert norm.groups == 6 and GroupNorm(256, 1e-6).groups == 32
    x, add, scale, shift = (torch.randn(2, 24, *s, dtype=torch.float64) for s in ((4, 4), (), (), ()))
    y = (1e-3 * x + add[:, :, None, None]).reshape(2, 6, -1)
    y = ((y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + 1e-6).sqrt()).reshape(2, 24, 4, 4)
    y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(norm(1e-3 * x, add=add, scale=scale, shift=shift, silu=False), y)
    torch.testing.assert_close(norm(1e-3 * x, add=add, scale=scale, shift=shift), y * y.sigmoid())


def test_norm_works_in_float32_on_low_precision():
    """A mean of 64 with a deviation of 1: bfloat16 would keep steps of a quarter."""
    x, add = torch.randn(2, 8, 16, 16).bfloat16(), torch.full((2, 8), 64.0).bfloat16()
    norm = GroupNorm(8, 1e-6)
    y = norm(x, add=add, silu=False)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x.float(), add=add.float(), silu=False), rtol=2**-8, atol=1e-6)


def test_positional_embedding_runs_from_1_to_1_over_10000():
    t = torch.tensor([0.0, 2.0])
    e = PositionalEmbedding(8, endpoint=True)(t)
    assert torch.equal(e[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(e[1, [0, 3, 7]], torch.tensor([2.0, 2e-4, 2e-4 - math.pi / 2]).cos())
    torch.testing.assert_close(PositionalEmbedding(8, endpoint=False)(t)[1, 3], torch.tensor(2 * 10000**-0.75).cos())


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_gradient(name):
    net = random_network({**ALL[name], "label_dim": 4, "augment_dim": 9})
    x, c_noise = inputs()
    net(x, c_noise, torch.eye(4)[:3], torch.randn(3, 9)).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ALL)
def test_channels_last_equals_contiguous(name):
    net, (x, c_noise) = random_network(ALL[name]), inputs()
    y = net(x, c_noise)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c_noise)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_float64_is_float64_throughout(name):
    net, (x, c_noise) = random_network(ALL[name]), inputs()
    exact = copy.deepcopy(net).double()(x.double(), c_noise.double())
    assert exact.dtype == torch.float64
    assert (net(x, c_noise) - exact).abs().max() < 1e-5 * exact.abs().max()
    # The same arithmetic in another order: only float64 throughout agrees to this.
    one = copy.deepcopy(net).double()(x[:1].double(), c_noise[:1].double())
    assert (one - exact[:1]).abs().max() < 1e-12 * exact.abs().max()


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
def test_bf16_autocast_is_near(name):
    net, (x, c_noise) = (
        random_network({**ALL[name], "img_resolution": 8, "attn_resolutions": [4]}),
        inputs(resolution=8),
    )
    y = net(x, c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, c_noise)
    assert low.dtype == torch.bfloat16
    error = (low.float() - y).abs().max() / y.abs().max()
    assert 1e-5 < error < 0.1
    low.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_skip_decoder_sums_the_upsampled_pictures_of_all_levels():
    net = build({**DDPMPP, "decoder_type": "skip", "channel_mult": [1, 1, 1]})
    with torch.no_grad():
        for level, value in (("4x4", 1.0), ("8x8", 10.0), ("16x16", 100.0)):
            conv = net.dec[f"{level}_aux_conv"]
            conv.weight.zero_()
            conv.bias.fill_(value)
        assert torch.equal(net(*inputs()), torch.full((3, 3, 16, 16), 111.0))


def test_skip_encoder_shows_every_level_the_picture():
    net = random_network({**DDPMPP, "encoder_type": "skip", "channel_mult": [1, 1, 1]})
    assert {"enc.8x8_aux_skip.weight", "enc.4x4_aux_skip.weight"} <= set(net.state_dict())
    with torch.no_grad():
        before = net(*inputs())
        for key, p in net.named_parameters():
            if "16x16_conv" in key:
                p.zero_()
        x, c_noise = inputs()
        assert not torch.allclose(net(x, c_noise), net(2 * x, c_noise))
        assert not torch.allclose(net(x, c_noise), before)


def test_no_labels_are_zero_labels():
    x, c_noise = inputs()
    for config in (DDPMPP, ADM):
        net = random_network({**config, "label_dim": 4, "augment_dim": 9})
        plain = net(x, c_noise)
        assert torch.equal(plain, net(x, c_noise, torch.zeros(3, 4), torch.zeros(3, 9)))
        assert not torch.allclose(plain, net(x, c_noise, torch.eye(4)[:3]))
        assert not torch.allclose(plain, net(x, c_noise, None, torch.ones(3, 9)))
        with pytest.raises(ValueError, match=r"class_labels must be \[3, 4\], got \[3, 5\]"):
            net(x, c_noise, torch.zeros(3, 5))


def test_initialisation():
    torch.manual_seed(5)
    net = build({**DDPMPP, "model_channels": 64})
    torch.manual_seed(5)
    again = build({**DDPMPP, "model_channels": 64})
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))

    def bound(key, fan_in, fan_out, factor):
        weight = net.get_parameter(key)
        limit = factor * math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * limit < weight.abs().max() <= limit, key
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)

    block = "enc.8x8_block0"
    bound(f"{block}.conv0.weight", 64 * 9, 128 * 9, 1)
    bound(f"{block}.conv1.weight", 128 * 9, 128 * 9, 1e-5)
    bound(f"{block}.qkv.weight", 128, 384, math.sqrt(0.2))
    bound(f"{block}.proj.weight", 128, 128, 1e-5)
    bound(f"{block}.affine.weight", 256, 128, 1)
    bound("dec.16x16_aux_conv.weight", 64 * 9, 3 * 9, 1e-5)
    assert not any(p.any() for key, p in net.named_parameters() if key.endswith("bias"))

    adm = build({**ADM, "label_dim": 100, "augment_dim": 9})
    zero = {key for key, p in adm.named_parameters() if not p.any()}
    expected = [
        key
        for key, _ in adm.named_parameters()
        if "conv1." in key or "proj." in key or "out_conv." in key or ("norm" in key and key.endswith("bias"))
    ]
    assert zero == {*expected, "map_augment.weight"}
    limit = 1 / math.sqrt(64 * 9)  # sqrt(1/3) * sqrt(3/fan_in)
    conv0 = adm.enc["16x16_block0"].conv0
    assert 0.98 * limit < conv0.weight.abs().max() <= limit and 0.8 * limit < conv0.bias.abs().max() <= limit
    assert adm.map_label.weight.std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsnpp", "adm"])
def test_compiles_as_one_graph(name):
    net = random_network({**ALL[name], "dropout": 0.1, "label_dim": 4, "label_dropout": 0.2})
    x, c_noise = inputs()
    arguments = (x, c_noise, torch.eye(4)[:3], None, (7, torch.arange(3)))
    y = net(*arguments)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    compiled.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "UNet"}, "model_type must be one of SongUNet, DhariwalUNet, got 'UNet'"),
        ({"num_block": 2}, "SongUNet has no setting 'num_block'; nearest: num_blocks"),
        ({"embedding_type": "fourrier"}, "embedding_type must be one of positional, fourier, got 'fourrier'"),
        ({"encoder_type": "resdual"}, "encoder_type must be one of standard, skip, residual, got 'resdual'"),
        ({"decoder_type": "residual"}, "decoder_type must be one of standard, skip, got 'residual'"),
        ({"img_resolution": 15}, "resolution of 15 cannot be halved 1 times; choose a multiple of 2"),
        ({"model_channels": 18}, "18 channels, which norm groups cannot share equally"),
        ({"model_channels": 17}, "model_channels must be even"),
        ({"channel_mult_noise": 0}, "channel_mult_noise must be a whole number of 1 or more, got 0"),
        ({"model_channels": 0}, "model_channels must be a whole number of 4 or more, got 0"),
        ({"num_blocks": 1.5}, "num_blocks must be a whole number of 1 or more, got 1.5"),
        ({"channel_mult": []}, "channel_mult must hold one whole number"),
        ({"channel_mult": [1, 0]}, "channel_mult must hold one whole number"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"label_dropout": -0.1}, "label_dropout must be at least 0 and below 1"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter needs an even number of taps"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError) as caught:
        build({**DDPMPP, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_settings_are_named():
    with pytest.raises(InputError, match="SongUNet needs img_resolution"):
        build({"model_type": "SongUNet", "img_channels": 3})
    with pytest.raises(InputError, match="DhariwalUNet has no setting 'resample_filter'"):
        build({**ADM, "resample_filter": [1, 1]})
    with pytest.raises(InputError, match="3 attention heads cannot share 224 channels equally"):
        build({**ADM, "model_channels": 224, "channel_mult": [1], "img_resolution": 8})
