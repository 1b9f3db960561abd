"""The dali loader: NVIDIA DALI reads ahead, decodes JPEG files, and copies to the GPU.

The pipeline's source gathers rows in the run's order, a whole batch at a time. Memory-mapped rows are gathered by the
thread that runs the pipeline, which is copying alone; rows that cost computing are fetched by processes of DALI's own.
JPEG files go to DALI as they are. On a CPU its decoder gives Pillow's pixels, bit for bit (a test holds it); on a GPU
nvJPEG decodes, which may round some of them to a neighbour.

`nvidia.dali` is imported here alone, and not before it is used.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastambient.data.loaders import Fields, Share, StreamingLoader, cpus
from fastambient.data.rows import Rows
from fastambient.errors import FastambientError, InputError
from fastambient.nvml import driver_cuda
from fastambient.processes import end_with_parent

_DEPTH = 2  # batches that the pipeline has under way
_MACHINES = ("x86_64", "aarch64")
_TRANSFERRED = ("images", "x_n", "jpeg")  # what DALI brings to a GPU; the rest is a few bytes


def missing(device: torch.device) -> str | None:
    """Why DALI does not run here, with what to install, or None where it does."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return f"DALI runs on Linux on {' and '.join(_MACHINES)}, this is {sys.platform} on {platform.machine()}"
    try:
        built_for = int(str(_import().__cuda_version__)[:2])  # 13492 is 13.4.92
    except (ImportError, AttributeError) as error:
        return _what_to_install(error)
    if device.type == "cuda":
        driver = driver_cuda()
        if driver is not None and driver[0] < built_for:
            return (
                f"the DALI installed here is for CUDA {built_for} and the GPU's driver is for CUDA"
                f" {driver[0]}.{driver[1]}: pip uninstall nvidia-dali-cuda{built_for}0, then pip install"
                f" --force-reinstall nvidia-dali-cuda{driver[0]}0; or install a newer driver"
            )
    return None


def _import() -> Any:
    import nvidia.dali

    return nvidia.dali


def need_dali(device: torch.device) -> None:
    """InputError where DALI does not run."""
    reason = missing(device)
    if reason is not None:
        raise InputError(f"--loader dali: {reason}; or use --loader workers")


def _what_to_install(error: Exception) -> str:
    advice = (
        "pip install nvidia-dali-cuda130 (for drivers of CUDA 13, and for machines without a GPU) or"
        " nvidia-dali-cuda120 (CUDA 12)"
    )
    names = ("nvidia-dali", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    there = [name for name in names if _is_installed(name)]
    if there == ["nvidia-dali"]:
        return f"the package nvidia-dali that is installed here is an empty stand-in without DALI: {advice}"
    if there:
        return f"DALI is installed ({there[-1]}) but cannot be imported ({error}): install it anew, or {advice}"
    return f"DALI is not installed: {advice}"


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class DaliLoader(StreamingLoader):
    """Parameters as `Loader`'s.

    workers : processes that fetch rows; None: none for memory-mapped rows, else one for each processor that the rank
        has

    Raises
    ------
    InputError : DALI is not installed or does not run here
    """

    def __init__(self, rows: Rows, share: Share, *, workers: int | None = None, **common: Any) -> None:
        super().__init__(rows, share, **common)
        need_dali(self.device)
        self.names = list(rows.fetch(rows.index(torch.arange(1)).numpy()))
        self.threads = cpus(share.ranks)
        self.workers = (0 if getattr(rows, "memory_mapped", False) else self.threads) if workers is None else workers

    def stream(self, nimg: int) -> Iterator[Fields]:
        return _stream(_Source(self.rows, self.share, nimg, self.names), self.device, self.threads, self.workers)


class _Source:
    """DALI's source of whole batches: the number of an iteration in, a list of arrays out."""

    def __init__(self, rows: Rows, share: Share, nimg: int, names: list[str]) -> None:
        self.rows, self.share, self.nimg, self.names = rows, share, nimg, names

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process of DALI's, which would outlive a trainer that is killed, with all it holds."""
        vars(self).update(state)
        end_with_parent()

    def positions(self, iteration: int) -> Tensor:
        return self.share.positions(self.nimg + iteration * self.share.batch)

    def __call__(self, iteration: int) -> tuple[Any, ...]:
        found = self.rows.fetch(self.rows.index(self.positions(iteration)).numpy())
        if "jpeg" in found:
            found["jpeg"] = [np.frombuffer(data, np.uint8) for data in found["jpeg"]]
        return tuple(found[name] for name in self.names)


def _stream(source: _Source, device: torch.device, threads: int, workers: int) -> Iterator[Fields]:
    pipeline = _pipeline(source, device, threads, workers)
    names = ["images" if name == "jpeg" else name for name in source.names]
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for iteration in range(sys.maxsize):
        try:
            outputs = pipeline.run()
        except FastambientError:  # of the source, in this thread
            raise
        except Exception as error:  # of DALI itself, or with the text of what happened in one of its processes
            raise FastambientError(f"DALI: {_gist(error)}") from error
        fields = {"positions": source.positions(iteration)}
        for name, output in zip(names, outputs, strict=True):
            if name == "images":
                _check_shapes(output, source.rows.shape)
            fields[name] = _to_torch(output, device, side)
        yield fields


def _pipeline(source: _Source, device: torch.device, threads: int, workers: int) -> Any:
    """A built pipeline whose outputs are those of `source`, with images in the place of JPEG files."""
    dali: Any = _import()
    fn, types, on_gpu = dali.fn, dali.types, device.type == "cuda"

    @dali.pipeline_def(
        batch_size=source.share.size, num_threads=threads, device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=_DEPTH, py_num_workers=max(workers, 1), py_start_method="spawn", seed=0,
    )  # fmt: skip
    def define() -> tuple[Any, ...]:
        parallel = {"parallel": True, "prefetch_queue_depth": _DEPTH} if workers else {}
        fetched = fn.external_source(source=source, num_outputs=len(source.names), batch=True, **parallel)
        return tuple(made(name, data) for name, data in zip(source.names, fetched, strict=True))

    def made(name: str, data: Any) -> Any:
        if name == "jpeg":
            colours = types.GRAY if source.rows.shape[0] == 1 else types.RGB
            # Upsampling of colours as libjpeg's, which is Pillow's; DALI's own default is another on a GPU.
            image = fn.decoders.image(
                data, device="mixed" if on_gpu else "cpu", output_type=colours, jpeg_fancy_upsampling=True
            )
            return fn.transpose(image, perm=[2, 0, 1])
        return data.gpu() if on_gpu and name in _TRANSFERRED else data

    pipeline = define()
    pipeline.build()
    return pipeline


def _check_shapes(output: Any, shape: tuple[int, int, int]) -> None:
    shapes = output.shape()
    wrong = next((list(found) for found in shapes if tuple(found) != shape), None)
    if wrong is not None:
        raise InputError(f"an image decodes to {wrong}, expected {list(shape)}")


def _to_torch(output: Any, device: torch.device, side: torch.cuda.Stream | None) -> Tensor:
    """A copy: DALI writes the next batches into the same memory."""
    if side is None or "GPU" not in type(output).__name__:
        return torch.from_numpy(np.array(output.as_array()))
    from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

    dense = output.as_tensor()
    with torch.cuda.device(device), torch.cuda.stream(side):
        tensor = torch.empty(dense.shape(), dtype=to_torch_type[dense.dtype], device=device)
        feed_ndarray(dense, tensor, cuda_stream=side)
        side.synchronize()  # before DALI writes there again
    return tensor


def _gist(error: Exception) -> str:
    """The last line of a traceback's text, or the first of DALI's own message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        own = [line.split(": ", 1)[1] for line in lines if line.startswith("fastambient.errors.")]
        return own[-1] if own else lines[-1]
    return " ".join(lines[:3])
