"""The settings tree: layers, types, ranges, and errors that name the nearest word."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import yaml

from fastambient.errors import InputError
from fastambient.models.presets import PRESETS
from fastambient.training.config import Settings, check, network_config, read_yaml, resolve


def test_layers_override_in_order(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("training: {lr: 2e-4, batch: 32}\nmodel: {channel_mult: [1, 3]}\n")
    layers = [(str(file), read_yaml(file)), ("command line", {"training": {"batch": 16}})]
    settings = resolve(resolution=8, layers=layers, assignments=["training.seed=7", "training.lr=3e-4"])
    assert settings.training.lr == 3e-4, "--set wins over the file"
    assert settings.training.batch == 16, "the command line wins over the file"
    assert settings.model.channel_mult == (1, 3) and settings.training.seed == 7
    assert settings.model.model_channels == PRESETS["digits"]["model"]["model_channels"], "from the preset"
    assert settings.model.preset == "digits" and settings.data.resolution == 8
    assert resolve(resolution=8, layers=[("f", {"model": {"preset": "small16"}})]).model.preset == "small16"
    assert (
        resolve(resolution=8, preset="small32", layers=[("f", {"model": {"preset": "small16"}})]).model.preset
        == "small32"
    )
    named = resolve(resolution=8, preset="small32", assignments=["model.preset=small16"])
    assert named.model.preset == "small16"
    assert named.model.model_channels == PRESETS["small16"]["model"]["model_channels"], "--set takes the whole preset"


def test_open_settings_are_filled_in():
    settings = resolve(resolution=64)
    assert settings.noise.sigma_tn == 1.5
    assert settings.training.checkpoint_kimg == min(settings.training.kimg / 10, 500)
    assert settings.training.sample_kimg == settings.training.checkpoint_kimg
    assert resolve(resolution=16).noise.sigma_tn == 0.375
    assert resolve(resolution=8, assignments=["noise.sigma_tn=0"]).noise.sigma_tn == 0


def test_tree_survives_yaml():
    settings = resolve(resolution=32, preset="cifar10-ncsnpp")
    text = yaml.safe_dump(settings.tree())
    assert Settings().with_values(yaml.safe_load(text), where="file") == settings


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_speak_of_this_tree(name):
    settings = resolve(resolution=64, preset=name)
    paper = not name.startswith(("small", "digits"))
    assert settings.noise.sigma_data == (0.5 if paper else None)
    assert network_config(settings, channels=3, num_classes=1000)["augment_dim"] == (
        9 if settings.training.augment else 0
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.lrr=1", "unknown setting training.lrr; nearest: lr"),
        ("trainin.lr=1", "unknown section 'trainin'; nearest: training"),
        ("training.lr", "expected section.name=value"),
        ("training.lr=fast", "training.lr must be a number, got 'fast'"),
        ("training.batch=1.5", "training.batch must be a whole number"),
        ("training.batch=true", "training.batch must be a whole number"),
        ("data.xflip=1", "data.xflip must be true or false"),
        ("model.channel_mult=2", "must be a list"),
        ("training.precision=fp16", "must be one of fp32, bf16"),
        ("training.lr=[", "the value is no YAML"),
        ("training.lr=-1", "training.lr must be above 0"),
        ("training.lr=.nan", "training.lr must be above 0"),
        ("training.kimg=0", "training.kimg must be 0.001 (one image) or more"),
        ("training.kimg=1e-4", "training.kimg must be 0.001 (one image) or more"),
        ("training.kimg=.nan", "training.kimg must be"),
        ("training.ema_halflife_kimg=-1", "ema_halflife_kimg must be 0 or more"),
        ("training.augment=1.5", "a probability"),
        ("model.dropout=1", "a probability"),
        ("sampling.steps=1", "one step is no sampler"),
        ("sampling.sigma_min=100", "between 0 and sigma_max"),
        ("model.preset=smal16", "unknown preset 'smal16'; nearest: small16"),
        ("sampling.rho=0", "sampling.rho must be above 0"),
        ("sampling.sigma_max=.inf", "sampling.sigma_max must be above 0"),
        ("sampling.S_churn=-1", "sampling.S_churn must be 0 or more"),
        ("sampling.S_max=.nan", "sampling.S_max must be"),
        ("sampling.S_noise=.nan", "sampling.S_noise must be"),
        ("sampling.batch=0", "sampling.batch must be 1 or more"),
        ("evaluation.bootstrap=0", "evaluation.bootstrap must be 1 or more"),
        ("evaluation.seed=-5", "evaluation.seed must be 0 or more"),
        ("data.split_seed=18446744073709551616", "data.split_seed must be a 64-bit integer"),
        ("noise.sigma_tn=-0.1", "sigma_tn must lie between 0"),
        ("noise.sigma_tn=.nan", "sigma_tn must lie between 0"),
        ("noise.sigma_tn=.inf", "sigma_tn must lie between 0"),
        ("noise.sigma_tn=80.5", "sigma_max = 80"),
        ("noise.sigma_data=0", "noise.sigma_data must be above 0"),
        ("evaluation.threshold=1", "evaluation.threshold must be between"),
        ("training.seed=18446744073709551616", "64-bit"),
    ],
)
def test_bad_settings_are_named(assignment, message):
    with pytest.raises(InputError) as error:
        resolve(resolution=8, assignments=[assignment])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "s.yaml"
    with pytest.raises(InputError, match="cannot read the settings file"):
        read_yaml(file)
    for text, message in (
        ("a: [", "no valid YAML"),
        ("- 1", "expected sections"),
        ("!!python/object:os.x {}", "no valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_yaml(file)
    with pytest.raises(InputError, match="unknown preset 'digit'; nearest: digits"):
        resolve(resolution=8, preset="digit")
    with pytest.raises(InputError, match="resolution"):
        resolve(resolution=11)


def test_every_setting_has_a_type_that_files_can_hold():
    for section in dataclasses.fields(Settings):
        for kind in typing.get_type_hints(type(getattr(Settings(), section.name))).values():
            assert "Any" not in str(kind)
    check(resolve(resolution=8))
