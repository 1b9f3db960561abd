"""The floor of a network's step: what its convolutions and matrix products alone take in this run, and the bytes.

Every convolution, matrix product and attention of one forward pass is recorded with its shapes, and each distinct one
is timed by itself, forward and backward, at the rate that this machine has today; a convolution by torch and by
`fastambient_kernels.conv2d`, of which the faster counts. To that come the bytes that no
arrangement avoids: the input of each group norm written and read once forward and once backward, and 36 bytes a
parameter for the optimizer, at the copy rate of the run.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import protocol
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastambient_kernels.flops  # noqa: F401  # so that our operators are counted
from fastambient.models import layers
from fastambient_kernels import conv2d
from fastambient_kernels.convolution import reference


@dataclass(frozen=True)
class Floor:
    flops: float  # of forward and, when training, backward
    products: float  # seconds in convolutions, matrix products and attention
    bytes: float  # seconds for the bytes

    @property
    def seconds(self) -> float:
        return self.products + self.bytes

    @property
    def rate(self) -> float:
        """FLOP a second of the products alone: what 100 % of model FLOP utilisation means in this run."""
        return self.flops / self.products


@dataclass(frozen=True)
class _Call:
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    options: tuple[Any, ...] = ()
    input_grad: bool = True  # the picture itself needs none


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[_Call] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d or func is torch.conv2d:
            x, weight = args[:2]
            if kwargs.get("groups", 1) == 1:  # depthwise filters are bytes
                options = (kwargs.get("stride", 1), kwargs.get("padding", 0))
                self.calls[_Call("conv2d", (tuple(x.shape), tuple(weight.shape)), options, x.requires_grad)] += 1
        elif func is F.linear:
            x, weight = args[:2]
            if x.dim() == 3:  # those of the embedding are small
                self.calls[_Call("linear", (tuple(x.shape), tuple(weight.shape)))] += 1
        elif func is F.scaled_dot_product_attention:
            self.calls[_Call("attention", tuple(tuple(t.shape) for t in args[:3]))] += 1
        return func(*args, **kwargs)


def measure(
    network: nn.Module, x: Tensor, *, dtype: torch.dtype, rate: float, train: bool = True, rounds: int = 7
) -> Floor:
    """The floor of one pass of `network` over x [N, C, H, W]; `rate` is the copy rate in bytes a second."""
    device = x.device
    norm_elements = 0

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal norm_elements
        norm_elements += arguments[0].numel()

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, layers.GroupNorm)]
    recorder = _Recorder()
    c_noise = torch.zeros(len(x), device=device)
    # In the precision of the step: what fits there must fit here.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    # The recorder sees torch's functions, and a native convolution is none.
    plain = mock.patch.object(layers, "conv2d", reference)
    with plain, recorder, torch.enable_grad(), autocast:
        network(x, c_noise)
    for hook in hooks:
        hook.remove()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        with autocast:
            out = network(x, c_noise)
        if train:
            out.sum().backward()
    network.zero_grad(set_to_none=True)

    products = sum(n * _seconds(call, device, dtype, train, rounds) for call, n in recorder.calls.items())
    size = torch.empty((), dtype=dtype).element_size()
    moved = norm_elements * size * (4 if train else 2)
    moved += 36 * sum(p.numel() for p in network.parameters()) if train else 0
    return Floor(float(counter.get_total_flops()), products, moved / rate)


def _seconds(call: _Call, device: torch.device, dtype: torch.dtype, train: bool, rounds: int) -> float:
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in call.shapes]
    if call.kind == "conv2d":
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        stride, padding = call.options
        torchs = _time(call, lambda x, w: F.conv2d(x, w, stride=stride, padding=padding), tensors, train, rounds)
        if stride != 1 or padding != call.shapes[1][-1] // 2:
            return torchs
        return min(torchs, _time(call, conv2d, tensors, train, rounds))
    return _time(call, F.linear if call.kind == "linear" else F.scaled_dot_product_attention, tensors, train, rounds)


def _time(call: _Call, run: Callable[..., Tensor], tensors: list[Tensor], train: bool, rounds: int) -> float:
    device = tensors[0].device
    tensors = [t.detach() for t in tensors]
    wanted = [t.requires_grad_() for i, t in enumerate(tensors) if train and (i > 0 or call.input_grad)]
    with torch.set_grad_enabled(train):
        dy = torch.randn_like(run(*tensors))
    times = []
    for _ in range(rounds):
        protocol.synchronize(device)
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            y = run(*tensors)
            if train:
                torch.autograd.grad(y, wanted, dy)
        protocol.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
