"""The table of addresses that the fast implementations of `adam_ema` work from, and the launchers of the compiled ones.

One row of the table is one parameter: addresses of p, g, exp_avg, exp_avg_sq and step, its number of elements, its
group, whether g is bfloat16, the address of its leaf or 0, and one for each moving average. Its columns are compared at
each step, and what has changed is written again. On a GPU a list of chunks (row, first element) lies beside it; chunks
that are full and whose tensors are all 16-byte aligned come first, since they need no masks. Numbers that may change at
each step (lr, betas, decays) lie in a float64 tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

COLUMNS = 9  # before the addresses of the averages; the order stands in adam_ema_op.cpp, too
SETTINGS = 6  # of a group: lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay
COEFFICIENTS = 9  # of a row, float32, what a GPU's kernel needs of its group and step: see adam_ema_triton.py
CUDA_CHUNK = 8192  # elements of a block of adam_ema.cu
_GRAD, _NUMEL, _BF16, _LEAF = 1, 5, 7, 8


class Tensors(NamedTuple):
    """Parameters that have a gradient, in their order, with everything that belongs to each."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    groups: list[int]
    leaves: list[Tensor | None]  # bfloat16, what the model computes with in the parameter's place
    emas: list[list[Tensor]]  # a list for each average


class Launch(NamedTuple):
    """Chunks of one kind: chunks[first : first + chunks]."""

    first: int
    chunks: int
    bf16: bool  # their gradients
    full: bool  # `chunk` elements each, all tensors aligned to 16 bytes


def layout(t: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have any: equal for tensors whose elements lie in the same order."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def settle(tensors: Tensors, device: torch.device, *, dense: bool = False) -> None:
    """Bring state and averages to their parameters' device and layout, where a later `to` or `load_state_dict` left
    others; `dense`: refuse parameters that are not one piece of memory."""
    for i, p in enumerate(tensors.params):
        if p.device != device:
            raise RuntimeError(f"AdamEMA: all parameters must be on one device, got {device} and {p.device}")
        wanted = p.detach() if p.is_contiguous() else torch.empty_like(p, device="meta")
        if dense and layout(wanted) != layout(p):
            raise RuntimeError(
                f"adam_ema: a parameter of shape {list(p.shape)} has strides {list(p.stride())}, with gaps or overlaps"
                ": make it contiguous, or use impl='reference'"
            )
        for t in (tensors.exp_avgs[i], tensors.exp_avg_sqs[i], *(copies[i] for copies in tensors.emas)):
            if t.device != device or (t.stride() != wanted.stride() and layout(t) != layout(wanted)):
                t.data = torch.empty_like(wanted, dtype=t.dtype, device=device).copy_(t)
        if tensors.steps[i].device != device:
            tensors.steps[i].data = tensors.steps[i].to(device)
        check_leaf(p, tensors.leaves[i])


def check_leaf(p: Tensor, leaf: Tensor | None) -> None:
    """RuntimeError for a leaf that kernels cannot write as they read its parameter."""
    if leaf is None:
        return
    kinds = [(t.device, t.shape, layout(t)) for t in (p, leaf)]
    if leaf.dtype is not torch.bfloat16 or p.dtype is not torch.float32 or kinds[0] != kinds[1]:
        raise RuntimeError(
            "AdamEMA: a leaf is bfloat16 and its parameter float32, both on one device, of one shape and memory layout,"
            f" got {leaf.dtype} {list(leaf.shape)} on {leaf.device} for {p.dtype} {list(p.shape)} on {p.device}"
        )


class Table:
    """See the file's docstring; `chunk`: elements of a chunk, 0 where the implementation cuts its own."""

    def __init__(self, device: torch.device, groups: int, emas: int, chunk: int) -> None:
        self.shape = (device, groups, emas, chunk)
        self.device, self.chunk, self.width = device, chunk, COLUMNS + emas
        numbers = groups * SETTINGS
        self._numbers = torch.zeros(numbers + emas, dtype=torch.float64, device=device)
        self.groups, self.betas = self._numbers[:numbers].view(groups, SETTINGS), self._numbers[numbers:]
        self._known_numbers: list[float | None] = [None] * len(self._numbers)
        self._columns: list[list[int]] = []
        self._host = torch.empty(0, self.width, dtype=torch.int64)
        self._kinds: Tensor | None = None
        self._host_chunks = torch.empty(0, 2, dtype=torch.int64)
        self._held: list[
            Any
        ] = []  # dtype and strides of each gradient, has it a leaf, strides and shape of its parameter
        self._unusable: list[int] = []  # gradients that must be copied
        self._grads: list[Tensor] = []  # copies of gradients, alive until the next step
        self._pinned: Tensor | None = None
        self.rows = self._host.to(device)
        self.chunks = self._host_chunks.to(device)
        self.launches: list[Launch] = []

    def reserve(self, parameters: Sequence[Tensor]) -> None:
        """Take the host memory that `fill` will copy from while a graph is captured, and keep it for the graph."""
        size = len(parameters) * self.width + 2 * sum(-(-p.numel() // self.chunk) for p in parameters)
        self._pinned = torch.empty(size, dtype=torch.int64, pin_memory=True)

    def fill(self, tensors: Tensors, settle: Callable[[], None]) -> None:
        """Make the table right; `settle` is called first where other tensors than gradients have changed."""
        columns = self._columns_of(tensors)
        changed = self._changed(columns)
        if not changed <= {_GRAD, _BF16}:
            settle()
            columns = self._columns_of(tensors)
            changed = self._changed(columns)
        if not changed:
            return
        if len(self._host) != len(tensors.params):
            self._host = torch.empty(len(tensors.params), self.width, dtype=torch.int64)
        for j in changed:
            self._host[:, j] = torch.tensor(columns[j])
        self._columns = columns
        if not self.chunk:
            self.rows = self._host
            return
        aligned = (self._host[:, [0, 1, 2, 3, _LEAF, *range(COLUMNS, self.width)]] % 16 == 0).all(dim=1)
        kinds = torch.stack([self._host[:, _NUMEL], self._host[:, _BF16], aligned.long()])
        if self._kinds is None or not torch.equal(kinds, self._kinds):
            self._kinds = kinds
            self._host_chunks, self.launches = _cut(*kinds, chunk=self.chunk)
        # Chunks first: 16 bytes each, so that both parts are aligned.
        memory = self._upload(torch.cat([self._host_chunks.flatten(), self._host.flatten()]))
        self.chunks = memory[: self._host_chunks.numel()].view(-1, 2)
        self.rows = memory[self._host_chunks.numel() :].view(-1, self.width)

    def _columns_of(self, tensors: Tensors) -> list[list[int]]:
        grads = self._usable(tensors)
        return [
            *(
                [t.data_ptr() for t in column]
                for column in (tensors.params, grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps)
            ),
            [p.numel() for p in tensors.params],
            tensors.groups,
            [g.dtype is torch.bfloat16 for g in grads],
            [0 if leaf is None else leaf.data_ptr() for leaf in tensors.leaves],
            *([ema.data_ptr() for ema in copies] for copies in tensors.emas),
        ]

    def _changed(self, columns: list[list[int]]) -> set[int]:
        if not self._columns or len(columns[0]) != len(self._columns[0]):
            return set(range(self.width))
        return {j for j in range(self.width) if columns[j] != self._columns[j]}

    def _usable(self, tensors: Tensors) -> list[Tensor]:
        """Gradients in their parameters' layouts, in a type that the kernels read."""
        params, grads = tensors.params, tensors.grads
        held = [
            (g.dtype, leaf is None, g.stride(), p.stride(), p.shape)
            for g, leaf, p in zip(grads, tensors.leaves, params, strict=True)
        ]
        if held != self._held:  # the same from step to step: what they say is worked out once
            for g, leaf in zip(grads, tensors.leaves, strict=True):
                if leaf is not None and g.dtype is not leaf.dtype:
                    raise RuntimeError(f"adam_ema: the gradient of a leaf must be bfloat16, got {g.dtype}")
            known = (torch.float32, torch.bfloat16)
            self._held = held
            self._unusable = [
                i
                for i, (g, p) in enumerate(zip(grads, params, strict=True))
                if g.dtype not in known or layout(g) != layout(p)
            ]
        if not self._unusable:
            return grads
        usable = list(grads)
        for i in self._unusable:
            g, p = grads[i], params[i]
            dtype = torch.bfloat16 if g.dtype is torch.bfloat16 else torch.float32
            usable[i] = torch.empty_like(p, dtype=dtype).copy_(g)
        self._grads = usable
        return usable

    def _upload(self, host: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return host.to(self.device)
        if self._pinned is None:
            return host.pin_memory().to(self.device, non_blocking=True)
        return self._pinned[: len(host)].copy_(host).to(self.device, non_blocking=True)

    def set_numbers(self, groups: Sequence[Mapping[str, Any]], ema_betas: Sequence[float | Tensor]) -> None:
        """Write what has changed; a tensor's value is copied on its device, nothing waits."""
        values: list[float | Tensor] = []
        for group in groups:
            values += group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["decoupled_weight_decay"]
        values += ema_betas
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                self._numbers[i].copy_(value.reshape(()), non_blocking=True)
                self._known_numbers[i] = None
            elif value != self._known_numbers[i]:
                self._numbers[i].fill_(float(value))
                self._known_numbers[i] = value


def _cut(numel: Tensor, bf16: Tensor, aligned: Tensor, *, chunk: int) -> tuple[Tensor, list[Launch]]:
    """Chunks [m, 2] of (row, first element), sorted by kind, and where each kind lies."""
    every = -(-numel // chunk)
    full = torch.where(aligned.bool(), numel // chunk, 0)
    parts, launches, first = [], [], 0
    for kind in (0, 1):
        mine = bf16 == kind
        for is_full, start, count in ((True, torch.zeros_like(full), full), (False, full, every - full)):
            count = torch.where(mine, count, 0)
            row = torch.repeat_interleave(count)
            nth = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + start[row]
            if len(row):
                launches.append(Launch(first, len(row), bool(kind), is_full))
                first += len(row)
            parts.append(torch.stack([row, nth * chunk], dim=1))
    return torch.cat(parts), launches


def run_native(table: Table, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """The step by libfastambient_cpu.so; (norm, nonfinite) as `adam_ema_reference` returns them."""
    norm, nonfinite = torch.empty((), dtype=torch.float64), torch.empty((), dtype=torch.int64)
    limit = math.inf if max_norm is None else max_norm
    torch.ops.fastambient_native.adam_ema(table.rows, table.groups, table.betas, limit, norm, nonfinite)
    return norm, nonfinite


def run_gpu(
    table: Table, max_norm: float | None, *, norm: Callable[..., None], update: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    """The step by two passes of kernels: ``norm(table, squares, counts)``, only to clip, and ``update(table, squares,
    counts, clip)``, which fills squares and counts where clip is None."""
    squares = torch.empty(len(table.chunks), dtype=torch.float64, device=table.device)
    counts = torch.empty(len(table.chunks), dtype=torch.int64, device=table.device)
    clip = None
    if max_norm is not None:
        norm(table, squares, counts)
        clip = (max_norm / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0).float()
    update(table, squares, counts, clip)
    return squares.sum().sqrt(), counts.sum()


def run_cuda(table: Table, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """The step by libfastambient_cuda.so, on the current stream."""
    launches = [int(number) for launch in table.launches for number in launch]
    operators = torch.ops.fastambient_native

    def norm(table: Table, squares: Tensor, counts: Tensor) -> None:
        operators.adam_ema_cuda_norm(table.rows, table.chunks, launches, squares, counts, stream)

    def update(table: Table, squares: Tensor, counts: Tensor, clip: Tensor | None) -> None:
        coefficients = torch.empty(len(table.rows), COEFFICIENTS, dtype=torch.float32, device=table.device)
        operators.adam_ema_cuda_update(
            table.rows, table.groups, table.betas, table.chunks, launches, clip, coefficients, squares, counts, stream
        )

    with torch.cuda.device(table.device):
        stream = torch.cuda.current_stream(table.device).cuda_stream
        return run_gpu(table, max_norm, norm=norm, update=update)
