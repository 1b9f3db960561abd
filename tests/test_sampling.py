"""Seeds to pictures: purity, exported weights, and files that lie."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.samplers import heun
from fastambient.errors import InputError
from fastambient.pictures import to_uint8
from fastambient.sampling import draw_classes, export, latents, load, parse_seeds, sample, write_samples
from fastambient_kernels.noise import normal, random_words

CONFIG = {
    "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "label_dim": 0, "augment_dim": 0,
    "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
}  # fmt: skip


def weights(path, **changes):
    """A model.safetensors of a small network with random, non-zero weights."""
    config = CONFIG | changes
    torch.manual_seed(0)
    network = models.build(config)
    state = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    export(path, state, {"network": config, "sigma_data": 0.5, "sampling": {"steps": 4}})
    return path


def test_seed_ranges():
    assert parse_seeds("0-3,100") == [0, 1, 2, 3, 100]
    assert parse_seeds(" 7 ") == [7]
    for bad in ("", "a", "3-1", "1,1", "0-2,1", "-1", "1-", "1--2", "0-999999999999"):
        with pytest.raises(InputError, match="--seeds"):
            parse_seeds(bad)


def test_latents_are_pure_and_unit_variance():
    z = latents(range(500), (1, 8, 8))
    assert torch.equal(latents([499, 3], (1, 8, 8)), z[[499, 3]])
    assert z.mean() == pytest.approx(0, abs=0.03) and z.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(z[7].flatten(), normal(torch.tensor([7]), 64, seed=0, stream=5)[0]), "the contract's stream"
    classes = draw_classes(range(1000), 10)
    assert torch.equal(classes[5:7], draw_classes([5, 6], 10))
    words = random_words(torch.arange(1000), 1, seed=1, stream=5)[:, 0]  # seed 0 would tie the class to the latent
    assert torch.equal(classes, words * 10 >> 32)
    assert torch.bincount(classes, minlength=10).min() > 60


def test_a_seed_gives_the_same_picture_in_any_batch(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors"))
    whole = sample(denoiser, range(10), batch=10)
    assert whole.dtype == torch.uint8 and whole.shape == (10, 1, 8, 8)
    assert whole.float().std() > 5, "the pictures must not be trivial"
    parts = sample(denoiser, [9, 2, 4], batch=2)
    # another batch may round a value to the neighbouring level
    assert (parts.int() - whole[[9, 2, 4]].int()).abs().max() <= 1
    assert len({p.numpy().tobytes() for p in whole}) == 10


def test_the_sampler_takes_what_the_file_says(tmp_path):
    """Every parameter, and churn from streams of its own: seeds 0 and 1 of stream 5 are latents and classes."""
    denoiser = load(weights(tmp_path / "model.safetensors"))
    told = {
        "sigma_min": 0.01,
        "sigma_max": 20.0,
        "rho": 5.0,
        "S_churn": 3.0,
        "S_min": 0.05,
        "S_max": 10.0,
        "S_noise": 1.1,
    }
    denoiser.metadata["sampling"] = {"steps": 6, "batch": 1} | told

    def churn(i):
        return normal(torch.tensor([3, 9]), 64, seed=i + 2, stream=5).view(2, 1, 8, 8)

    expected = to_uint8(heun(denoiser, latents([3, 9], (1, 8, 8)), 6, **told, randn=churn))
    assert (sample(denoiser, [3, 9]).int() - expected.int()).abs().max() <= 1
    for name, other in {
        "sigma_min": 0.2,
        "sigma_max": 30.0,
        "rho": 7.0,
        "S_churn": 0.0,
        "S_min": 5.0,
        "S_max": 1.0,
        "S_noise": 1.0,
    }.items():
        changed = to_uint8(heun(denoiser, latents([3, 9], (1, 8, 8)), 6, **(told | {name: other}), randn=churn))
        assert (changed.int() - expected.int()).abs().max() > 1, f"{name} shows in no picture"


def test_classes(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors", label_dim=3))
    one, two = (sample(denoiser, range(4), class_index=c) for c in (0, 2))
    assert not torch.equal(one, two)
    drawn = sample(denoiser, range(4))
    for i, c in enumerate(draw_classes(range(4), 3).tolist()):
        assert (drawn[i].int() - sample(denoiser, [i], class_index=c)[0].int()).abs().max() <= 1
    with pytest.raises(InputError, match=r"a class in 0\.\.2, got 3"):
        sample(denoiser, [0], class_index=3)
    with pytest.raises(InputError, match="unconditional"):
        sample(load(weights(tmp_path / "u.safetensors")), [0], class_index=0)


def test_files_and_refusals(tmp_path):
    model = weights(tmp_path / "model.safetensors")
    out = write_samples(tmp_path, [0, 5], tmp_path / "s")  # a folder with model.safetensors is enough
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "seed000000000.png", "seed000000005.png"]
    with pytest.raises(InputError, match="not empty"):
        write_samples(model, [0], tmp_path / "s")
    write_samples(model, [3], tmp_path / "s", force=True)
    assert len(list(out.iterdir())) == 2, "--force replaces the folder"
    npz = write_samples(model, [0, 5], tmp_path / "x.npz")
    with np.load(npz, allow_pickle=False) as file:
        assert file["images"].shape == (2, 1, 8, 8) and file["seeds"].tolist() == [0, 5]
    with pytest.raises(InputError, match="exists"):
        write_samples(model, [0], npz)
    for arguments, message in (
        ({"steps": 1}, "one step is no sampler"),
        ({"steps": 10**10}, "2 to 10,000"),
        ({"batch": 0}, "--batch"),
        ({"class_index": 1}, "class"),
    ):
        with pytest.raises(InputError, match=message):
            write_samples(model, [0], tmp_path / "bad", **arguments)
    assert not (tmp_path / "bad").exists(), "an error leaves nothing behind"


@pytest.mark.parametrize("out", ["file/x.npz", "file/x", "folder.npz"])
def test_a_place_that_cannot_be_written_is_found_before_sampling(out, tmp_path, monkeypatch):
    model = weights(tmp_path / "model.safetensors")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.setattr("fastambient.sampling.sample", lambda *a, **k: pytest.fail("sampled first"))
    with pytest.raises(InputError, match=r"is a file|is a folder"):
        write_samples(model, [0], tmp_path / out, force=True)


def test_pickles_are_refused_unread(tmp_path):
    for suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        file = tmp_path / f"model{suffix}"
        file.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
        with pytest.raises(InputError, match="never loaded"):
            load(file)
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load(tmp_path)
    with pytest.raises(InputError, match="no run or weights file"):
        load(tmp_path / "none.safetensors")


def test_lying_headers_are_refused(tmp_path):
    model = weights(tmp_path / "model.safetensors")
    tensors = load_file(model)
    good = {"network": json.dumps(CONFIG), "sigma_data": "0.5", "format": "fastambient-1"}
    lies = [
        ({"format": "other"}, "not written by fastambient"),
        ({"network": "{"}, "damaged"),
        ({"network": "[]"}, "usable network"),
        ({"sigma_data": "-1.0"}, "sigma_data"),
        ({"sigma_data": '"x"'}, "sigma_data"),
        ({"network": json.dumps(CONFIG | {"model_channels": 16})}, "does not fit the tensors"),
        ({"network": json.dumps(CONFIG | {"model_channels": 4096 * 1024})}, "does not fit|cannot be built|no network"),
        ({"network": json.dumps(CONFIG | {"num_blocks": 10**9})}, "no network"),
        ({"network": json.dumps(CONFIG | {"num_blocks": "x"})}, "no network"),
        ({"network": json.dumps(CONFIG | {"evil": 1})}, "no network"),
        ({"network": json.dumps({"model_type": "SongUNet"})}, "no network"),
        ({"network": "[" * 100_000}, "damaged"),
        ({"sampling": '"x"'}, "damaged"),
        ({"sampling": '{"evil": 1}'}, "damaged"),
        ({"sampling": '{"steps": "x"}'}, "damaged"),
        ({"sampling": '{"rho": 0.0}'}, r"sampling\.rho must be above 0"),
    ]
    for change, message in lies:
        save_file(tensors, tmp_path / "lie.safetensors", good | change)
        with pytest.raises(InputError, match=message):
            load(tmp_path / "lie.safetensors")
    save_file({k: v.to(torch.int32) for k, v in tensors.items()}, tmp_path / "lie.safetensors", good)
    with pytest.raises(InputError, match="floating-point"):
        load(tmp_path / "lie.safetensors")
    missing = {k: v for k, v in tensors.items() if k != "map_layer0.bias"}
    save_file(missing, tmp_path / "lie.safetensors", good)
    with pytest.raises(InputError, match=r"map_layer0\.bias"):
        load(tmp_path / "lie.safetensors")
    data = model.read_bytes()
    for cut in (data[:4], data[: len(data) // 2], b"\xff" * 16 + data[16:], b""):
        (tmp_path / "cut.safetensors").write_bytes(cut)
        with pytest.raises(InputError, match="damaged or no safetensors"):
            load(tmp_path / "cut.safetensors")
    assert math.isfinite(load(model).sigma_data)


class SomebodysNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        return self.conv(x)


def test_a_denoiser_of_ones_own_needs_a_shape():
    denoiser = EDMDenoiser(SomebodysNetwork())
    with pytest.raises(InputError, match=r"needs shape=\(C, H, W\)"):
        sample(denoiser, [0])
    assert sample(denoiser, [0], shape=(1, 4, 4), steps=2).shape == (1, 1, 4, 4)
