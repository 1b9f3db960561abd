"""The raw networks F: DDPM++ and NCSN++ (`SongUNet`), ADM (`DhariwalUNet`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastambient.errors import InputError, did_you_mean
from fastambient.models.adm_unet import DhariwalUNet
from fastambient.models.song_unet import SongUNet

__all__ = ["MODEL_TYPES", "DhariwalUNet", "SongUNet", "build"]

MODEL_TYPES: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def build(config: Mapping[str, Any]) -> nn.Module:
    """A new network from EDM's constructor arguments.

    Parameters
    ----------
    config : "model_type" ("SongUNet" or "DhariwalUNet"), "img_resolution", "img_channels", and any other argument of
        that class. New weights come from torch's generator.

    Raises
    ------
    InputError : an unknown or missing name, or a value out of range
    """
    settings = dict(config)
    model_type = settings.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise InputError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    network = MODEL_TYPES[model_type]
    arguments = inspect.signature(network).parameters
    for name in settings:
        if name not in arguments:
            raise InputError(f"{model_type} has no setting {name!r}{did_you_mean(name, arguments)}")
    for name, argument in arguments.items():
        if argument.default is argument.empty and name not in settings:
            raise InputError(f"{model_type} needs {name}; add it to the settings of the model")
    return network(**settings)
