"""What commands share: choices, numbers in text, options with computed defaults."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastambient.errors import InputError


class Noisy(str, Enum):
    none, float16, float32 = "none", "float16", "float32"


class OnBadImage(str, Enum):
    error, skip = "error", "skip"


class Dedup(str, Enum):
    off, keep, drop = "off", "keep", "drop"


class Precision(str, Enum):
    fp32, bf16 = "fp32", "bf16"


class Sampler(str, Enum):
    heun, dpmpp_2m = "heun", "dpmpp-2m"


class Weighting(str, Enum):
    paper, unit = "paper", "unit"


class NoiseMode(str, Enum):
    fixed, fresh = "fixed", "fresh"


class LoaderName(str, Enum):
    auto, resident, dali, workers = "auto", "resident", "dali", "workers"


class Regime(str, Enum):
    both, ambient = "both", "ambient"


class AugmentAmbient(str, Enum):
    none, reference = "none", "reference"


class Preprocessing(str, Enum):
    standard, paper = "standard", "paper"


def parse_batch(text: str) -> int:
    """The number of ``--batch``."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batch must be a whole number or auto, got {text!r}") from None


def parse_sigma_tn(text: str) -> float:
    """The number of ``train --sigma-tn``."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sigma-tn must be a number or auto, got {text!r}") from None


def parse_numbers(name: str, text: str) -> list[float]:
    """``"0,0.1"`` -> [0.0, 0.1]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} must be numbers such as 0,0.1,0.2, got {text!r}") from None


def choose_device(gpus: int | None) -> str:
    """The device of ``--gpus``, "cuda" or "cpu", with a warning where operators are slower there than they could be."""
    from fastambient.console import warn
    from fastambient.system import slow_operators
    from fastambient.training.distributed import choose_ranks

    _, device = choose_ranks(gpus, None)
    if slow := slow_operators(device):
        warn(slow)
    return device


def option(help: str, *names: str, metavar: str | None = None, default: str | None = None) -> Any:
    """An option whose help ends with its default, also where that is computed."""
    text = help if default is None else f"{help} [default: {default}]"
    return typer.Option(*names, help=text, metavar=metavar, show_default=default is None)


SOURCE_HELP = (
    "digits (1,797 built-in 8x8 images), a folder of images (PNG, JPEG, WebP, BMP; recursive), an EDM data set zip, an"
    " .npy/.npz of uint8 images, WebDataset .tar files (one, a folder, or a quoted pattern like 's-{000..099}.tar'), or"
    " a Hugging Face data set (.parquet files, a folder of them, or one by save_to_disk)"
)
Force = Annotated[bool, option("replace what is there", "--force")]
FEATURES_HELP = (
    "embedder of similarity and quality: pixel, efficientnet-lite0, inception, dinov2-vits14, dinov2-vitb14,"
    " dinov2-vitl14, dinov2-vitg14, clip-vit-l-14, a TorchScript module PATH.pt, or none"
)
Features = Annotated[str | None, option(FEATURES_HELP, metavar="NAME", default="efficientnet-lite0")]
Weights = Annotated[
    Path | None, option("its weights, safetensors or TorchScript", metavar="PATH", default="looked for in caches")
]
Preprocess = Annotated[
    Preprocessing | None,
    option("standard: the network's usual one; paper: DINOv2 at native size, in [0, 1]", default="standard"),
]
