"""Named settings: the published recipes, and small networks that a 2-core CPU can train.

Each preset maps sections of the settings tree to values. Times are in kimg (1000 images seen).
Published: Karras et al. 2022 (EDM), Table 7. `paper-ffhq64-300`: the script of Shah et al. 2025, without weight decay.
"""

from __future__ import annotations

from typing import Any

from fastambient.errors import InputError

Section = dict[str, Any]

_SONG: Section = {
    "model_type": "SongUNet",
    "channel_mult_emb": 4,
    "decoder_type": "standard",
    "label_dropout": 0.0,
}
_DDPMPP: Section = {
    **_SONG,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
_NCSNPP: Section = {
    **_SONG,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
_CIFAR10: Section = {
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.13,
}
_FFHQ64: Section = {**_CIFAR10, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
_ADM: Section = {
    "model_type": "DhariwalUNet",
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
    "label_dropout": 0.0,
}
_DIGITS: Section = {
    "model_channels": 24,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
}
_SMALL: Section = {"model_channels": 32, "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.05}

_NOISE: Section = {"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}

_CIFAR10_TRAINING: Section = {
    "batch": 512,
    "kimg": 200_000,
    "lr": 1e-3,
    "lr_rampup_kimg": 10_000,
    "ema_halflife_kimg": 500,
    "ema_rampup_ratio": 0.05,
    "augment": 0.12,
    "precision": "fp32",
}
_FFHQ64_TRAINING: Section = {**_CIFAR10_TRAINING, "batch": 256, "lr": 2e-4, "augment": 0.15}
_ADM_TRAINING: Section = {
    **_CIFAR10_TRAINING,
    "batch": 4096,
    "kimg": 2_500_000,
    "lr": 1e-4,
    "ema_halflife_kimg": 50_000,
    "augment": 0.0,
    "precision": "bf16",
}
_DIGITS_TRAINING: Section = {
    "batch": 64,
    "kimg": 64,
    "lr": 1e-3,
    "lr_rampup_kimg": 0,
    "ema_halflife_kimg": 50,
    "ema_rampup_ratio": 0.05,
    "augment": 0.0,
    "precision": "fp32",
}
_SMALL_TRAINING: Section = {**_DIGITS_TRAINING, "kimg": 500, "lr_rampup_kimg": 10}


def _preset(
    model: Section, training: Section, steps: int, *, noise: Section | None = None, use_labels: bool = False
) -> dict[str, Section]:
    return {
        "data": {"use_labels": use_labels},
        "model": model,
        "noise": noise or {},  # without sigma_data: measured from the training images
        "training": training,
        "sampling": {"steps": steps},
    }


PRESETS: dict[str, dict[str, Section]] = {
    "digits": _preset({**_DDPMPP, **_DIGITS}, _DIGITS_TRAINING, 18),
    "small16": _preset({**_DDPMPP, **_SMALL, "channel_mult": [1, 2, 2]}, _SMALL_TRAINING, 18),
    "small32": _preset({**_DDPMPP, **_SMALL, "channel_mult": [1, 2, 3]}, {**_SMALL_TRAINING, "kimg": 400}, 18),
    "small64": _preset(
        {**_DDPMPP, **_SMALL, "channel_mult": [1, 2, 3, 4]},
        {**_SMALL_TRAINING, "batch": 32, "kimg": 200, "lr": 5e-4},
        40,
    ),
    "cifar10-ddpmpp": _preset({**_DDPMPP, **_CIFAR10}, _CIFAR10_TRAINING, 18, noise=_NOISE),
    "cifar10-ncsnpp": _preset({**_NCSNPP, **_CIFAR10}, _CIFAR10_TRAINING, 18, noise=_NOISE),
    "ffhq64-ddpmpp": _preset({**_DDPMPP, **_FFHQ64}, _FFHQ64_TRAINING, 40, noise=_NOISE),
    "ffhq64-ncsnpp": _preset({**_NCSNPP, **_FFHQ64}, _FFHQ64_TRAINING, 40, noise=_NOISE),
    "imagenet64-adm": _preset(_ADM, _ADM_TRAINING, 40, noise=_NOISE, use_labels=True),
    "paper-ffhq64-300": _preset(
        {**_NCSNPP, **_FFHQ64}, {**_FFHQ64_TRAINING, "kimg": 30_000, "lr": 1e-4}, 40, noise=_NOISE
    ),
}

_BY_RESOLUTION = {8: "digits", 16: "small16", 32: "small32", 64: "small64"}


def default_preset(resolution: int) -> str:
    """The preset of a run that names none.

    Raises
    ------
    InputError : no preset is made for this resolution; names those that there are
    """
    if resolution not in _BY_RESOLUTION:
        fitting = ", ".join(f"{pixels} ({name})" for pixels, name in _BY_RESOLUTION.items())
        raise InputError(
            f"no default preset fits {resolution}x{resolution} images; prepare them at --resolution {fitting}, "
            f"or name a preset: {', '.join(PRESETS)}"
        )
    return _BY_RESOLUTION[resolution]
