"""Weights of embedders: found, read without ever unpickling, and held to the network that they are for."""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastambient.errors import InputError
from fastambient.files import sha256_file

_PICKLES = (".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".tar")
_NO_PICKLE = "a pickle, which is never loaded, because loading one can run code"


def hub_folder() -> Path:
    """Where torch hub keeps what it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def hugging_face_file(repository: str, file: str) -> Path | None:
    """A file of a repository that lies in the Hugging Face hub's cache, or None. Asks no network."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def absent(label: str, url: str, places: str) -> InputError:
    """What to say where weights are absent. places : what to do with them, so that they are found."""
    return InputError(
        f"the weights of {label} are not here, and nothing is downloaded: fetch {url} and {places}, or name the file by"
        " --weights PATH (in a run's settings evaluation.weights)"
    )


def need_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"--weights {path}: there is no such file")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or TorchScript file, on the CPU. No code of the file is run.

    Raises
    ------
    InputError : absent, a pickle, damaged
    """
    need_file(path)
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is damaged or no safetensors file: {_brief(error)}") from None
    _check_script(path)
    return dict(_script(path, torch.device("cpu")).state_dict())


def read_known_pickle(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a published .pth whose hash is known, by torch's reader that builds tensors alone.

    sha256 : the first digits of the file's hash, as torch hub puts them into its name

    Raises
    ------
    InputError : another file than the published one, or one that holds more than tensors
    """
    need_file(path)
    found = sha256_file(path)
    if not found.startswith(sha256):
        raise InputError(
            f"{path} has the SHA-256 {found[:16]}..., expected {sha256}...; it is damaged or another file,"
            f" and {_NO_PICKLE}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive raises
        raise InputError(f"{path} cannot be read as a file of weights: {_brief(error)}") from None
    return dict(state)


def is_pickle(path: Path) -> bool:
    return path.suffix.lower() in _PICKLES


def check_module_path(path: Path) -> None:
    """InputError where `path` is no file that could be a TorchScript module, with the reason."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        raise InputError(
            f"{path} holds weights without an architecture; name the embedder that they are for, with --weights {path},"
            " or save the module by torch.jit.save(torch.jit.script(module), 'PATH.pt')"
        )
    if suffix in _PICKLES:
        raise InputError(
            f"{path} is {_NO_PICKLE}; save the module by torch.jit.save(torch.jit.script(module), 'PATH.pt')"
        )
    if not path.is_file():
        raise InputError(f"there is no file {path}; expected an embedder's name or a TorchScript module PATH.pt")
    _check_script(path)


def script_bytes(path: Path, device: torch.device) -> tuple[torch.jit.ScriptModule, str]:
    """A TorchScript module for evaluation on `device`, and the hex SHA-256 of the very bytes it was made from."""
    data = path.read_bytes()
    module = _script(path, device, data)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval(), hashlib.sha256(data).hexdigest()


def _script(path: Path, device: torch.device, data: bytes | None = None) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls TorchScript old
            return torch.jit.load(str(path) if data is None else io.BytesIO(data), map_location=device)
    except Exception as error:  # RuntimeError, ValueError, EOFError ... by what is damaged
        raise InputError(f"{path} is damaged or no TorchScript file: {_brief(error)}") from None


def _check_script(path: Path) -> None:
    """A TorchScript archive holds code; what torch.save writes is a pickle alone, and may have the same suffix."""
    if path.suffix.lower() in _PICKLES:
        raise InputError(f"{path} is {_NO_PICKLE}; convert it to safetensors")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        raise InputError(f"{path} is neither safetensors (by its suffix) nor a TorchScript file") from None
    if not any("/code/" in name for name in names) or not any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"{path} is no TorchScript file but, it seems, {_NO_PICKLE}; convert it to safetensors")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of tensors: their names, dtypes, shapes and bytes, whatever file they come from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fit(network: nn.Module, state: Mapping[str, Tensor], source: Path | str, label: str, naming: str) -> None:
    """InputError where `state` is not exactly what `network` has: a name or a shape that does not fit.

    Batch norm's counters of batches may be absent: no feature depends on them.
    """
    expected = {k: list(v.shape) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {k: list(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]
    if wrong:
        k = next((k for k in wrong if k in expected), wrong[0])
        raise InputError(
            f"{source} does not hold the weights of {label}: {k} should be {expected.get(k, 'no tensor of it')} and is"
            f" {found.get(k, 'absent')} ({len(wrong)} of {len(expected.keys() | found.keys())} tensors differ);"
            f" expected {naming}"
        )
    if lie := next((k for k in found if not state[k].is_floating_point()), None):
        raise InputError(f"{source}: {lie} is {state[lie].dtype}, weights of {label} are floating-point numbers")


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
