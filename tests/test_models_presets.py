"""Presets: every one builds, says only what the settings know, and holds the published recipe."""

from __future__ import annotations

import pytest
import torch

from fastambient.errors import InputError
from fastambient.models import build
from fastambient.models.presets import PRESETS, default_preset

RESOLUTION = {"digits": 8, "small16": 16, "small32": 32, "cifar10-ddpmpp": 32, "cifar10-ncsnpp": 32}
SECTIONS = {
    "data": {"use_labels"},
    "model": {
        "model_type", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout",
        "label_dropout", "embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter",
    },
    "noise": {"sigma_data", "P_mean", "P_std"},
    "training": {
        "batch", "kimg", "lr", "lr_rampup_kimg", "ema_halflife_kimg", "ema_rampup_ratio", "augment", "precision",
    },
    "sampling": {"steps"},
}  # fmt: skip
SIZES = {
    "digits": 422_353,
    "cifar10-ddpmpp": 55_733_891,
    "cifar10-ncsnpp": 56_397_827,
    "ffhq64-ddpmpp": 61_805_571,
    "ffhq64-ncsnpp": 62_761_091,
    "paper-ffhq64-300": 62_761_091,
    "imagenet64-adm": 295_899_267,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_are_valid(name):
    preset = PRESETS[name]
    assert set(preset) == set(SECTIONS)
    for section, settings in preset.items():
        assert set(settings) <= SECTIONS[section]
    training = preset["training"]
    assert training["batch"] > 0 and training["kimg"] * 1000 >= training["batch"] and 0 < training["lr"] <= 1e-3
    assert 0 <= training["lr_rampup_kimg"] < training["kimg"] and training["ema_halflife_kimg"] > 0
    assert 0 <= training["augment"] < 1 and training["precision"] in ("fp32", "bf16")
    assert preset["sampling"]["steps"] >= 2
    published = "small" not in name and name != "digits"
    assert preset["noise"].get("sigma_data") == (0.5 if published else None)

    shape = {"img_resolution": RESOLUTION.get(name, 64), "img_channels": 1 if name == "digits" else 3}
    labels = {"label_dim": 1000 if preset["data"]["use_labels"] else 0, "augment_dim": 9 if training["augment"] else 0}
    with torch.device("meta"):
        net = build({**preset["model"], **shape, **labels})
    parameters = sum(p.numel() for p in net.parameters())
    if published or name == "digits":
        assert parameters == SIZES[name]
    else:
        assert 1e6 < parameters < 5e6


def test_published_recipes():
    def recipe(name):
        t, m = PRESETS[name]["training"], PRESETS[name]["model"]
        return (
            t["batch"], t["kimg"], t["lr"], t["lr_rampup_kimg"], t["ema_halflife_kimg"], t["ema_rampup_ratio"],
            m["dropout"], t["augment"],
        )  # fmt: skip

    for net in ("ddpmpp", "ncsnpp"):
        assert recipe(f"cifar10-{net}") == (512, 200_000, 1e-3, 10_000, 500, 0.05, 0.13, 0.12)
        assert recipe(f"ffhq64-{net}") == (256, 200_000, 2e-4, 10_000, 500, 0.05, 0.05, 0.15)
    assert recipe("imagenet64-adm") == (4096, 2_500_000, 1e-4, 10_000, 50_000, 0.05, 0.10, 0.0)
    assert recipe("paper-ffhq64-300") == (256, 30_000, 1e-4, 10_000, 500, 0.05, 0.05, 0.15)
    assert recipe("digits") == (64, 64, 1e-3, 0, 50, 0.05, 0.0, 0.0)


def test_the_default_preset_follows_the_resolution():
    assert [default_preset(r) for r in (8, 16, 32, 64)] == ["digits", "small16", "small32", "small64"]
    with pytest.raises(
        InputError,
        match=r"fits 48x48 .* prepare them at --resolution 8 \(digits\), 16 \(small16\), 32 \(small32\), 64 \(small64\)",
    ):
        default_preset(48)
