"""CUDA graphs: kernels that are launched together, by replaying a capture. The denoiser as one captured step.

A sampler calls the same network on the same sizes again and again, and a small network or batch is done sooner than
its several hundred kernels are launched one by one. A training step is captured in `training/graph.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fastambient.console import warn
from fastambient.diffusion.guidance import ClassDenoiser

Replayed = tuple[Callable[[], object], Tensor]  # (replay, output); a replay writes the output anew, in place
Capture = Callable[[Callable[[], Tensor], torch.device], Replayed]


def warmed_up_capture(function: Callable[[], Tensor], device: torch.device) -> Replayed:
    """`cuda_capture` of a function that may be called once more: handles, workspaces and kernels are made on first use,
    which a capture cannot hold."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
            torch.cuda.current_stream().wait_stream(side)
    return cuda_capture(function, device)


def cuda_capture(function: Callable[[], Tensor], device: torch.device) -> Replayed:
    """A CUDA graph of `function`, which reads tensors that stay where they are on `device`. Nothing is computed yet."""
    if device.type != "cuda":
        raise RuntimeError(f"a {device.type} has none")
    # The stream is set to what it is, because torch leaves a failed capture with the capture's own stream as current.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: readers allocate device and pinned memory in others meanwhile (data/loaders.py).
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = function()
    return graph.replay, output


def try_capture(
    function: Callable[[], Tensor], device: torch.device, *, capture: Capture, name: str
) -> Replayed | None:
    """What `capture` gives, or None where it raises RuntimeError, which one line says; `name`: of the function."""
    try:
        return capture(function, device)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        warn(f"no CUDA graph of the {name} ({reason}); its kernels are launched one by one, maybe slower")
        return None


class GraphedDenoiser:
    """D(x, sigma, class_labels), captured on the first call of each kind and replayed on the later ones.

    Parameters
    ----------
    denoiser : called as ``denoiser(x, sigma, class_labels)``, all tensors on one device; must read nothing back from it
    batches : the batch sizes worth a capture; others, such as a last smaller one, call the denoiser as it is
    capture : called as `warmed_up_capture`; where it raises RuntimeError the denoiser is called as it is from then on,
        which is said once
    """

    def __init__(
        self,
        denoiser: ClassDenoiser,
        batches: Collection[int],
        *,
        capture: Capture = warmed_up_capture,
    ) -> None:
        self.denoiser, self.batches, self.capture = denoiser, batches, capture
        self._captured: dict[object, tuple[list[Tensor | None], Replayed]] = {}

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As the denoiser's; the result is the caller's own."""
        if len(x) not in self.batches:
            return self.denoiser(x, sigma, class_labels)
        inputs = (x, sigma, class_labels)
        kind = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs)
        if kind not in self._captured:
            # A graph reads and writes the memory that it was captured with.
            static = [None if t is None else t.clone() for t in inputs]
            function = lambda: self.denoiser(*static)  # type: ignore[arg-type]  # noqa: E731
            captured = try_capture(function, x.device, capture=self.capture, name="network")
            if captured is None:
                self.batches = ()
                return self.denoiser(x, sigma, class_labels)
            self._captured[kind] = static, captured
        static, (replay, output) = self._captured[kind]
        for kept, new in zip(static, inputs, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        replay()
        return output.clone()
