"""Weights files: what training exports, and the denoiser that they hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.errors import FastambientError, InputError, nearest_beside
from fastambient.files import write_bytes
from fastambient.sampling.settings import SamplingSettings, check_sampling

FORMAT = "fastambient-1"


def export(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write model.safetensors: EMA weights and buffers, and what is needed to load them (never the noise seed).

    The same weights and metadata give the same bytes.

    metadata : JSON values; ``network`` (arguments of `fastambient.models.build`) and ``sigma_data`` are required
    """
    header = {"format": FORMAT} | {k: json.dumps(v) for k, v in metadata.items()}
    try:
        write_bytes(path, _sorted_header(save({k: v.detach().cpu().contiguous() for k, v in state.items()}, header)))
    except OSError as error:
        raise FastambientError(f"cannot write {path}: {error}") from None


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their names; safetensors writes them in a random one.

    A file is the header's length (8 bytes, little-endian), the header in JSON, spaces up to a multiple of 8 bytes, and
    the tensors, whose offsets count from there and so stay as they are.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + memoryview(data)[end:]


def weights_file(path: Path) -> Path:
    """The weights of a run folder or of a checkpoint inside it, or the file itself."""
    if path.suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        raise InputError(
            f"{path}: pickled weights are never loaded, because loading them can run code; use .safetensors"
        )
    if (path / "state.safetensors").is_file():
        return path / "state.safetensors"
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise InputError(
                f"{path.parent} holds no model.safetensors: train it first, or wait for its first checkpoint"
                if (path.parent / "config.yaml").is_file()
                else f"{path.parent} is no run folder: it holds neither model.safetensors nor config.yaml"
            )
    if not path.is_file():
        raise InputError(f"there is no run or weights file {path}{nearest_beside(path)}")
    return path


def load(path: str | Path, *, device: str | torch.device = "cpu") -> EDMDenoiser:
    """The denoiser of a run folder, a checkpoint folder or a model.safetensors, in evaluation mode.

    Its weights are the run's EMA; its ``metadata`` says how it was made.

    Raises
    ------
    InputError : no such file, a pickle, a damaged file, a header that does not describe the tensors
    """
    file = weights_file(Path(path))
    try:
        with safe_open(file, "pt") as opened:
            names = {k: k for k in opened.keys()}  # noqa: SIM118
            if file.name == "state.safetensors":  # a checkpoint: EMA weights, and the buffers, which have no EMA
                metadata = json.loads((file.parent / "state.json").read_text())["weights_metadata"]
                ema = {k.removeprefix("ema."): k for k in names if k.startswith("ema.")}
                names = {k.removeprefix("model."): k for k in names if k.startswith("model.")} | ema
            else:
                header = opened.metadata() or {}
                if header.get("format") != FORMAT:
                    told = header.get("format")
                    raise InputError(f"{file} was not written by fastambient (format {told!r}, need {FORMAT!r})")
                metadata = {k: json.loads(v) for k, v in header.items() if k != "format"}
            shapes = {k: list(opened.get_slice(name).get_shape()) for k, name in names.items()}
            network = _empty_network(file, metadata, shapes)
            state = {k: opened.get_tensor(name) for k, name in names.items()}
            check_sampling(SamplingSettings(**metadata.get("sampling", {})))
            if lie := next((k for k, v in state.items() if not v.is_floating_point()), None):
                raise InputError(f"{file}: {lie} is {state[lie].dtype}, weights are floating-point numbers")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged or no safetensors file: {error}") from None
    network.load_state_dict(state, assign=True)
    denoiser = EDMDenoiser(network, sigma_data=metadata["sigma_data"], label_dim=metadata["network"]["label_dim"])
    denoiser.metadata = metadata
    # Channels-last, as in training: the layout in which convolutions and norms are fastest.
    return denoiser.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)


def _empty_network(file: Path, metadata: dict[str, Any], shapes: dict[str, list[int]]) -> nn.Module:
    """The network that the header describes, without memory, once its tensors are known to be the file's."""
    config, sigma_data = metadata.get("network"), metadata.get("sigma_data")
    if not isinstance(config, dict) or not isinstance(sigma_data, float) or not 0 < sigma_data < math.inf:
        raise InputError(f"{file}: the header lacks a usable network or sigma_data")
    try:
        if config["num_blocks"] > 64 or len(config["channel_mult"]) > 16:  # a lie that would build for hours
            raise ValueError("more blocks than any real network has")
        with torch.device("meta"):
            network = models.build(config)
    except (InputError, ValueError, TypeError, KeyError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{file}: the header describes no network that can be built ({error})") from None
    expected = {k: list(v.shape) for k, v in network.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            told, found = expected.get(name, "no such tensor"), shapes.get(name, "nothing")
            raise InputError(
                f"{file}: the header does not fit the tensors: {name} should be {told}, the file holds {found}"
            )
    return network
