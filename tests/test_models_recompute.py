"""Activation checkpointing: gradients bit for bit, with fewer bytes kept."""

from __future__ import annotations

import pytest
import torch
from conftest import make_run, read_stats, train_here
from test_models_dropout import batch, network, positions

from fastambient.errors import InputError
from fastambient.models.blocks import UNetBlock, recompute_levels

NETWORKS = {
    "ddpmpp": {},
    "ncsnpp": {"encoder_type": "residual", "embedding_type": "fourier", "resample_filter": [1, 3, 3, 1]},
    "adm": {"model_type": "DhariwalUNet", "model_channels": 64},
}


def passes(net, *, key=(11, positions())):
    """(output, gradients of weights and input, bytes kept for the backward pass)"""
    x, c, labels = batch()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        out = net(x, c, labels, None, key)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    size = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    size -= net.block_embeddings.join()[0].nbytes  # weights, too
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad.clone() for p in net.parameters())], size


@pytest.mark.parametrize("change", NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_the_same_and_less_is_kept(change):
    net = network(**change).to(memory_format=torch.channels_last)
    plain, gradients, whole = passes(net)
    sizes = [whole]
    for levels in (1, 2):
        recompute_levels(net, levels)
        out, found, size = passes(net)
        assert torch.equal(out, plain)
        for a, b in zip(gradients, found, strict=True):
            assert torch.equal(a, b) and a.abs().max() > 0
        sizes.append(size)
    assert sizes[1] < 0.7 * sizes[0] and sizes[2] < 0.9 * sizes[1]
    recompute_levels(net, 0)
    assert passes(net)[2] == whole


def test_levels_are_the_highest_resolutions():
    net = network(img_resolution=16, channel_mult=[1, 1, 2])
    recompute_levels(net, 2)
    on = {name for name, block in net.named_modules() if isinstance(block, UNetBlock) and block.recompute}
    assert on == {n for n, b in net.named_modules() if isinstance(b, UNetBlock) and ".4x4_" not in f".{n}"}
    assert {"enc.16x16_block0", "dec.8x8_up"} <= on and "enc.8x8_down" in on and "dec.4x4_in0" not in on


def test_masks_of_torchs_own_generator_are_kept_too():
    net = network()
    found = []
    for levels in (0, 2):
        recompute_levels(net, levels)
        torch.manual_seed(5)
        found.append(passes(net, key=None)[1])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_run_is_the_same_with_and_without(tmp_path):
    for levels in (0, 2):
        train_here(make_run(tmp_path / f"{levels}", f"training.checkpoint_levels={levels}", "model.dropout=0.2"))
    assert read_stats(tmp_path / "0") == read_stats(tmp_path / "2")
    with pytest.raises(InputError, match=r"training.checkpoint_levels must be between 0 and 2.*got 3"):
        make_run(tmp_path / "3", "training.checkpoint_levels=3")
