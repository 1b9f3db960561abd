"""The denoiser as one captured step: its kernels are launched together, by replaying a CUDA graph.

A sampler calls the same network on the same sizes again and again, and a small network or batch is done sooner than
its several hundred kernels are launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fastambient.console import warn
from fastambient.diffusion.guidance import ClassDenoiser

Replayed = tuple[Callable[[], None], Tensor]  # (replay, output); a replay writes the output anew, in place


def cuda_capture(function: Callable[[], Tensor], device: torch.device) -> Replayed:
    """A CUDA graph of `function`, which reads tensors that stay where they are on `device`."""
    if device.type != "cuda":
        raise RuntimeError(f"a {device.type} has none")
    # The stream is set to what it is, because torch leaves a failed capture with the capture's own stream as current.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # handles, workspaces and kernels that are made on first use
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function()
    return graph.replay, output


class GraphedDenoiser:
    """D(x, sigma, class_labels), captured on the first call of each kind and replayed on the later ones.

    Parameters
    ----------
    denoiser : called as ``denoiser(x, sigma, class_labels)``, all tensors on one device; must read nothing back from it
    batches : the batch sizes worth a capture; others, such as a last smaller one, call the denoiser as it is
    capture : called as `cuda_capture`; where it raises RuntimeError the denoiser is called as it is from then on, which
        is said once
    """

    def __init__(
        self,
        denoiser: ClassDenoiser,
        batches: Collection[int],
        *,
        capture: Callable[[Callable[[], Tensor], torch.device], Replayed] = cuda_capture,
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
            try:
                captured = self.capture(lambda: self.denoiser(*static), x.device)  # type: ignore[arg-type]
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                warn(f"no CUDA graph of the network ({reason}); its kernels are launched one by one, maybe slower")
                self.batches = ()
                return self.denoiser(x, sigma, class_labels)
            self._captured[kind] = static, captured
        static, (replay, output) = self._captured[kind]
        for kept, new in zip(static, inputs, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        replay()
        return output.clone()
