"""EDM's networks: its constructor arguments and parameter names in, a denoiser out.

Tensors come in as a dictionary (from a safetensors file, say); nothing here reads a pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import InputError
from fastambient.models import build as build_network

_PREFIX = "model."
# Arguments of EDM's preconditioning that do not change D: the precision and the range that its sampler asks for.
_WITHOUT_EFFECT = ("use_fp16", "sigma_min", "sigma_max")


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> EDMDenoiser:
    """An EDM network with given weights.

    Parameters
    ----------
    config : EDM's constructor arguments: "model_type" ("SongUNet" or "DhariwalUNet"), "img_resolution", "img_channels",
        "label_dim", "sigma_data" (default 0.5) and the arguments of the network
    state : EDM's parameters and buffers by EDM's names, all of them, with the prefix "model."; any float dtype

    Returns
    -------
    The denoiser D(x, sigma, class_labels=None, augment_labels=None) in float32 on the CPU, in evaluation mode.

    Raises
    ------
    InputError : unknown settings; missing, unexpected or mis-shaped entries, by name
    """
    settings = {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT}
    sigma_data = settings.pop("sigma_data", 0.5)
    network = build_network(settings)
    own = network.state_dict()
    given = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    _refuse("lacks", [_PREFIX + name for name in own if name not in given])
    _refuse("has unexpected", [n for n in state if not n.startswith(_PREFIX) or n.removeprefix(_PREFIX) not in own])
    misfits = [n for n, t in own.items() if given[n].shape != t.shape]
    _refuse(
        "does not fit its settings at",
        [f"{_PREFIX}{n} {list(given[n].shape)} (expected {list(own[n].shape)})" for n in misfits],
    )
    # The fast paths go by the settings' filter, so the state's must be the same one.
    filters = [n for n in own if n.endswith("resample_filter")]
    _refuse(
        "holds another filter than its settings at",
        [_PREFIX + n for n in filters if not torch.allclose(given[n].to(own[n]), own[n])],
    )
    network.load_state_dict(given, strict=True)
    return EDMDenoiser(network, sigma_data=sigma_data, label_dim=settings.get("label_dim", 0)).eval()


def _refuse(problem: str, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"the EDM state {problem} {', '.join(names[:3])}{more}; give the weights that belong to these settings"
        )
