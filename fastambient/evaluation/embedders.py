"""Embedders: pictures to the vectors in which quality and similarity are measured.

| name | features | weights |
|---|---|---|
| pixel | pixels in [-1, 1] | none |
| efficientnet-lite0 | 1,280 pooled, before the classifier | in the package that is installed along |
| inception | 2,048 pooled, of TensorFlow's Inception-v3 (the F of FID) | ``--weights``, or torch hub's cache |
| dinov2-vits14, -vitb14, -vitl14, -vitg14 | class token, 384 to 1,536 | ``--weights``, or Hugging Face's cache |
| clip-vit-l-14 | 768, image side of OpenAI's CLIP | ``--weights``, or torch hub's cache |
| PATH.pt | what the TorchScript module gives | in the file |

Nothing is downloaded: where weights are absent, the error says which file to fetch and where to put it. Weights are
safetensors or TorchScript; pickles are refused, because loading one can run code. A TorchScript *module* (PATH.pt) is
run, by torch's own interpreter: take it from whom you trust.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastambient.errors import InputError, did_you_mean

NAMES = (
    "pixel", "efficientnet-lite0", "inception",
    "dinov2-vits14", "dinov2-vitb14", "dinov2-vitl14", "dinov2-vitg14", "clip-vit-l-14",
)  # fmt: skip
DEFAULT = "efficientnet-lite0"
LABELS = {
    "pixel": "pixels",
    "efficientnet-lite0": "EfficientNet-Lite0",
    "inception": "Inception-v3",
    "dinov2-vits14": "DINOv2 ViT-S/14",
    "dinov2-vitb14": "DINOv2 ViT-B/14",
    "dinov2-vitl14": "DINOv2 ViT-L/14",
    "dinov2-vitg14": "DINOv2 ViT-g/14",
    "clip-vit-l-14": "CLIP ViT-L/14",
}


class Embedder:
    """A function from pictures to features that knows its name and how to tell its features from others'.

    name : as asked for; of PATH.pt the file's name
    label : for figures and pages
    preprocess : what happens to a picture before the network, in words
    dimensions : D; of pixel and PATH.pt 0 until the first call, because it depends on the pictures
    identity : hex SHA-256 of the kind, the weights and the preprocessing: equal where features are comparable
    device : where the features are
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        *,
        preprocess: str,
        weights: str,
        dimensions: int = 0,
        device: torch.device | str = "cpu",
        label: str | None = None,
        grey: bool = False,
        at_once: int | None = None,
    ) -> None:
        """
        function : uint8 [B, 3, H, W] on `device` -> float32 [B, D], for eval and without gradients
        weights : hex SHA-256 of kind and weights
        grey : `function` takes pictures of one channel as well; otherwise the channel is repeated to three
        at_once : pictures a call of `function`; None for as many as are given
        """
        self.name, self.label = name, label or LABELS[name]
        self.preprocess, self.dimensions = preprocess, dimensions
        self.device = torch.device(device)
        self.identity = hashlib.sha256(f"{weights}\n{preprocess}".encode()).hexdigest()
        self._function, self._grey, self._at_once = function, grey, at_once

    def __call__(self, images: Tensor) -> Tensor:
        """Features of pictures.

        Parameters
        ----------
        images: uint8 [B, C, H, W], B >= 1, C of 1 or 3, on any device. Each picture's features are its own: they do
            not depend on the others of the batch (beyond float32's rounding, which may).

        Returns
        -------
        float32 [B, D] on the embedder's device

        Raises
        ------
        InputError
            Another dtype or shape, or features that are no finite [B, D].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise InputError(
                f"pictures for {self.label} are {images.dtype} {list(images.shape)},"
                " expected uint8 [N, C, H, W] with 1 or 3 channels and at least one picture"
            )
        images = images.to(self.device)
        if images.shape[1] == 1 and not self._grey:
            images = images.expand(-1, 3, -1, -1)
        with torch.no_grad():
            parts = [self._function(part) for part in images.split(self._at_once or len(images))]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        if x.ndim != 2 or len(x) != len(images) or x.shape[1] == 0 or not x.is_floating_point():
            raise InputError(
                f"{self.name} gives {x.dtype} {list(x.shape)} for {len(images)} pictures of {list(images.shape[1:])},"
                f" expected floats [{len(images)}, D] with D from 1 on"
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{self.name} gives NaN or infinity; its weights are damaged, get them again")
        self.dimensions = x.shape[1]
        return x.to(torch.float32)


def load_embedder(
    name: str = DEFAULT,
    *,
    weights: Path | None = None,
    preprocess: Literal["standard", "paper"] = "standard",
    device: torch.device | str = "cpu",
) -> Embedder:
    """The embedder of that name.

    Parameters
    ----------
    name: one of `NAMES`, or the path of a TorchScript module ``PATH.pt``. That gets float32 [B, 3, H, W] in [0, 1] at
        the pictures' own size (grey is repeated to three channels), and must return floats [B, D].
    weights: safetensors or TorchScript with the network's weights, instead of the file in a cache. Names of tensors
        are the source's: timm's for DINOv2, torch-fidelity's for Inception, OpenAI's for CLIP.
    preprocess: "standard" is each network's usual one: for DINOv2 bicubic to 224x224 and ImageNet's mean and standard
        deviation. "paper" (DINOv2 alone) is that of Shah et al. (2025): native size, reflected at its borders up to a
        multiple of 14, values in [0, 1], no mean and standard deviation. The paper does not say on which side: here
        half on each, the odd pixel at the right and bottom. Where a picture is smaller than the padding on a side, it
        is reflected repeatedly (``numpy.pad``); a single row or column is repeated.
    device: where it runs.

    Raises
    ------
    InputError
        No such embedder or device, weights that are absent (with where to get them), a pickle, or those of another
        network, a package that is not installed, "paper" for another network than DINOv2.
    """
    # Networks are imported where they are built: timm alone takes seconds.
    from fastambient.evaluation import embedders_networks as networks
    from fastambient.evaluation.embedders_weights import check_module_path, script_bytes

    if preprocess not in ("standard", "paper"):
        raise InputError(f"preprocess is {preprocess!r}, expected standard or paper")
    if preprocess == "paper" and name not in networks.DINOV2:
        raise InputError(f"--preprocess paper is DINOv2's, and {name} has its own; leave it out")
    place = _device(device)
    if name == "pixel":
        if weights is not None:
            raise InputError(f"--weights {weights}: pixels have no weights; leave it out or choose another embedder")
        return Embedder(
            "pixel", lambda x: (x.to(torch.float32) / 127.5 - 1).flatten(1),
            preprocess="pixels / 127.5 - 1", weights="pixel-1", device=place, grey=True,
        )  # fmt: skip
    if name == "efficientnet-lite0":
        return networks.efficientnet(name, weights, place)
    if name == "inception":
        return networks.inception(name, weights, place)
    if name in networks.DINOV2:
        return networks.dinov2(name, weights, place, preprocess)
    if name == "clip-vit-l-14":
        return networks.clip(name, weights, place)
    path = Path(name)
    if not (path.suffix or path.exists()) or "\n" in name:
        raise InputError(f"there is no embedder {name!r}{did_you_mean(name, NAMES)}, or a TorchScript file PATH.pt")
    check_module_path(path)
    if path.name in NAMES:
        raise InputError(f"{path} is called like the embedder {path.name}, which it is not; give the file another name")
    if weights is not None:
        raise InputError(f"--weights {weights}: {path} holds its own weights; leave it out")
    module, digest = script_bytes(path, place)
    return Embedder(
        path.name, lambda x: networks.call_module(module, path, x.to(torch.float32) / 255), label=path.name,
        preprocess="native size, [0, 1]", weights=f"torchscript-1 {digest}", device=place,
    )  # fmt: skip


def reflected(images: Tensor, multiple: int = 14) -> Tensor:
    """Pictures [B, C, H, W] with reflected borders, so that H and W are multiples; see `load_embedder`."""
    h, w = (torch.from_numpy(_reflection(n, multiple)).to(images.device) for n in images.shape[2:])
    return images[:, :, h][..., w]


def _reflection(n: int, multiple: int) -> np.ndarray:
    """int64 [n'] positions: 0 .. n-1 and what is reflected on both sides."""
    extra = -n % multiple
    return np.pad(np.arange(n), (extra // 2, extra - extra // 2), mode="reflect")


def _device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {device} cannot be used: {' '.join(str(error).split())[:120]}") from None
    return place
