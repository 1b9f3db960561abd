"""The work of a network, counted on the meta device without computing anything: FLOPs, bytes, operator calls.

FLOPs are 2 per multiply-add of convolutions, matrix products and attention; bytes are what every other operator reads
and writes, resampling filters included, each operator a pass of its own; activations are what autograd keeps.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fastambient_kernels.flops  # noqa: F401  # so that ours are counted
from fastambient import models
from fastambient.models.blocks import UNetBlock, recompute_levels


@dataclass(frozen=True)
class Pass:
    """Work of a forward pass alone, or of forward and backward."""

    convolution: float  # FLOP an image
    product: float  # FLOP an image of matrix products and attention
    bytes: float  # an image, read and written by all other operators
    fixed_bytes: float  # a micro-batch, whatever its size
    calls: int  # operators that do something, a micro-batch

    @property
    def flops(self) -> float:
        return self.convolution + self.product


@dataclass(frozen=True)
class Counts:
    parameters: int
    forward: Pass
    step: Pass  # forward and backward
    activations: float  # bytes an image that are kept for the backward pass
    joined: int  # parameters of the blocks' embedding layers, of which a step makes one more tensor
    convolution_shape: tuple[tuple[int, ...], tuple[int, ...]]  # [C, H, W], [O, C, k, k] of the one with most FLOPs


class _OneAttention(TorchFunctionMode):
    """Attention as one operator, as GPUs and CPUs run it, where the meta device would write its matrix out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape)


_FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_NO_WORK = {torch.ops.aten.detach, torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like}


class _Meter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = self.product = self.bytes = 0.0
        self.calls = 0
        self.shapes: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, packet = func(*args, **kwargs), func._overloadpacket
        if func.is_view or packet in _NO_WORK:
            return out
        self.calls += 1
        if packet not in _FLOPS:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            return out
        flops = _FLOPS[packet](*args, **kwargs, out_val=out)
        if packet in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            self.convolution += flops
            if (
                packet is torch.ops.aten.convolution and not args[6] and args[8] == 1
            ):  # neither transposed nor depthwise
                self.shapes[tuple(args[0].shape[1:]), tuple(args[1].shape)] += flops
        else:
            self.product += flops
        return out

    def numbers(self) -> tuple[float, float, float, int]:
        return self.convolution, self.product, self.bytes, self.calls


def count(config: Mapping[str, Any], *, bf16: bool = False, checkpoint_levels: int = 0) -> Counts:
    """Count the network that `models.build(config)` makes.

    bf16 : as if all of it computed in bfloat16
    checkpoint_levels : as of `training`. The activations are then the blocks' inputs and, of the blocks that are
        computed anew, the largest one's own; the work is counted without what is computed anew
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.device("meta"):
        network = models.build(dict(config)).to(dtype).to(memory_format=torch.channels_last).train()
    recompute_levels(network, checkpoint_levels)
    chosen = [m for m in network.modules() if isinstance(m, UNetBlock) and m.recompute]
    recompute_levels(network, 0)  # the meta device cannot: its cost is worked out below

    def measure(images: int) -> tuple[Any, Any, float, _Meter]:
        make = functools.partial(torch.zeros, device="meta", dtype=dtype)
        size = config["img_resolution"]
        x = make(images, config["img_channels"], size, size).to(memory_format=torch.channels_last)
        labels = make(images, config["label_dim"]) if config.get("label_dim") else None
        augment = make(images, config["augment_dim"]) if config.get("augment_dim") else None
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage  # kept, so that no later one gets its address
            return tensor

        # With checkpointing, the chosen blocks' inputs stay in place of what they save themselves, and while the
        # backward pass is at one of them, its own is there as well.
        inputs: dict[int, torch.UntypedStorage] = {}
        own: list[set[int]] = []

        def enter(_: Any, arguments: tuple[Any, ...]) -> None:
            inputs.update((t.untyped_storage()._cdata, t.untyped_storage()) for t in arguments if isinstance(t, Tensor))
            own.append(set(saved))

        def leave(*_: Any) -> None:
            own[-1] = set(saved) - own[-1]

        hooks = [h for m in chosen for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
        meter = _Meter()
        with _OneAttention(), meter, torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
            out = network(x, make(images), labels, augment)
            forward = meter.numbers()
            out.backward(torch.empty_like(out))
        network.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
        size = {name: storage.nbytes() for name, storage in (saved | inputs).items()}
        stay = (set(saved) - set().union(*own)) | set(inputs)  # weights as well, once a micro-batch
        kept = sum(size[name] for name in stay) + max((sum(size[name] for name in names) for names in own), default=0)
        return forward, meter.numbers(), float(kept), meter

    (*one, kept, meter), (*two, kept_two, _) = measure(1), measure(2)  # what both have is paid once a micro-batch
    forward, step = (
        Pass(conv2 - conv, product2 - product, moved2 - moved, 2 * moved - moved2, calls)
        for (conv, product, moved, calls), (conv2, product2, moved2, _) in zip(one, two, strict=True)
    )
    shape = meter.shapes.most_common(1)[0][0] if meter.shapes else ((1, 1, 1), (1, 1, 1, 1))
    joined = sum(m.affine.weight.numel() for m in network.modules() if isinstance(m, UNetBlock))
    return Counts(sum(p.numel() for p in network.parameters()), forward, step, kept_two - kept, joined, shape)
