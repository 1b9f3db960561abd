"""A whole training step as one CUDA graph: noise, network, backward pass and optimizer are launched by one call.

The step reads static memory alone (`TrainingStep.iteration`), which is filled before each replay. What is read back to
the host waits for the device, and so lies after the replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastambient.sampling.graph import Capture, Replayed, cuda_capture, try_capture
from fastambient.training.config import TrainingSettings
from fastambient.training.distributed import World


def why_no_graph(settings: TrainingSettings, world: World) -> str | None:
    """Why a run's steps are not captured, or None where they are."""
    if settings.cuda_graph == "off":
        return "training.cuda_graph is off"
    if world.device.type != "cuda":
        return f"a {world.device.type} has none"
    if world.size > 1:
        return f"{world.size} ranks meet within a step"
    if settings.optimizer == "apex":
        return "apex's optimizer reads from the device within a step"
    return None


class GraphedIteration:
    """Calls `iteration` as it is the first time, and from the second time on replays its capture.

    Parameters
    ----------
    iteration : reads tensors that stay where they are on `device`, and reads nothing back; may be cut off anywhere and
        called again. Its first call makes what a capture cannot: kernels, handles, the optimizer's state
    capture : called as `cuda_capture`; where it raises RuntimeError the iteration is called as it is from then on,
        which is said once
    """

    def __init__(
        self, iteration: Callable[[], Tensor], device: torch.device, *, capture: Capture = cuda_capture
    ) -> None:
        self.iteration, self.device, self.capture = iteration, device, capture
        self.calls = 0
        self.replayed: Replayed | None = None

    def __call__(self) -> Tensor:
        """As the iteration's; the next call writes over the result."""
        self.calls += 1
        if self.calls == 2:
            self.replayed = try_capture(self.iteration, self.device, capture=self.capture, name="training step")
        if self.replayed is None:
            return self.iteration()
        replay, output = self.replayed
        replay()
        return output
