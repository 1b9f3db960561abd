"""Dropout by key: masks are a function of (run seed, position, layer, element) and of nothing else."""

from __future__ import annotations

import pytest
import torch

from fastambient.models import build
from fastambient.models.blocks import UNetBlock
from fastambient.models.layers import Dropout, drop_labels
from fastambient_kernels.dropout import keep_mask

CONFIG = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.3,
    "label_dim": 4,
    "label_dropout": 0.5,
}
SEED = 11


def network(**change):
    torch.manual_seed(0)
    net = build({**CONFIG, **change})
    with torch.no_grad():  # past the zero initialisation, so that masks show in the output
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return net


def batch(n=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=g), torch.linspace(-1, 1, n), torch.eye(4)[torch.arange(n) % 4]


def positions(n=6, start=2**40):
    return torch.arange(start, start + n)


@pytest.mark.parametrize("change", [{}, {"model_type": "DhariwalUNet", "model_channels": 64}], ids=["song", "adm"])
def test_batch_split_order_and_neighbours_do_not_matter(change):
    net, (x, c, labels), pos = network(**change), batch(), positions()
    whole = net(x, c, labels, None, (SEED, pos))
    close = {"rtol": 1e-4, "atol": 1e-5 * whole.abs().max().item()}
    parts = [net(x[s], c[s], labels[s], None, (SEED, pos[s])) for s in (slice(0, 1), slice(1, 5), slice(5, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, **close)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(net(x[order], c[order], labels[order], None, (SEED, pos[order])), whole[order], **close)
    # The tolerance is far below what one other mask does.
    assert (net(x, c, labels, None, (SEED, pos + 1)) - whole).abs().amax((1, 2, 3)).min() > 100 * close["atol"]


def test_what_is_kept_is_scaled_and_the_layout_does_not_matter():
    layer, key = Dropout(0.2, 1), (SEED, positions(2))
    x = torch.randn(2, 8, 6, 6) + 5
    y = layer(x, key)
    kept = keep_mask(key[1], 8 * 36, p=0.2, seed=SEED, layer=1).view(2, 6, 6, 8).movedim(3, 1)
    torch.testing.assert_close(y, torch.where(kept, x / 0.8, 0.0))
    last = layer(x.contiguous(memory_format=torch.channels_last), key)
    assert torch.equal(last, y) and last.is_contiguous(memory_format=torch.channels_last)
    assert layer(x.bfloat16(), key).dtype == torch.bfloat16


def test_every_block_has_a_layer_number_of_its_own():
    for config in (CONFIG, {**CONFIG, "model_type": "DhariwalUNet"}):
        blocks = [m for m in build(config).modules() if isinstance(m, UNetBlock)]
        assert sorted(b.dropout.layer for b in blocks) == list(range(1, len(blocks) + 1))


def test_evaluation_mode_is_off():
    net, (x, c, labels) = network().eval(), batch()
    plain = network(dropout=0.0, label_dropout=0.0)
    y = net(x, c, labels, None, (SEED, positions()))
    assert torch.equal(y, net(x, c, labels)) and torch.equal(y, plain(x, c, labels))
    assert not torch.allclose(y, net.train()(x, c, labels, None, (SEED, positions())))


def test_a_key_leaves_the_global_generator_alone_and_no_key_uses_it():
    net, (x, c, labels) = network(), batch()
    state = torch.get_rng_state()
    net(x, c, labels, None, (SEED, positions()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    y = net(x, c, labels)
    assert not torch.equal(net(x, c, labels), y)
    torch.manual_seed(3)
    assert torch.equal(net(x, c, labels), y)


def test_label_dropout_takes_the_whole_label_of_a_sample():
    net, (x, c, labels) = network(dropout=0.0), batch()
    key = (SEED, positions())
    kept = keep_mask(key[1], 1, p=0.5, seed=SEED, layer=0)
    assert 0 < kept.sum() < 6
    y = net(x, c, labels, None, key)
    net.eval()
    torch.testing.assert_close(y, torch.where(kept[:, :, None, None], net(x, c, labels), net(x, c)))


def test_label_dropout_rate():
    labels = torch.eye(4)[torch.arange(20_000) % 4]
    for key in ((SEED, torch.arange(20_000)), None):
        rows = drop_labels(labels, 0.1, key)
        kept = rows.sum(1)
        assert set(kept.tolist()) == {0.0, 1.0} and torch.equal(rows, labels * kept[:, None])
        assert kept.mean().item() == pytest.approx(0.9, abs=0.011)
