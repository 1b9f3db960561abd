"""What our operators cost, for torch's FlopCounterMode: import this module before one counts.

It stands alone because torch's counter brings Triton along, 90 MB that a process which only reads or noises pictures
does without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fastambient_kernels.convolution  # noqa: F401  # defines the operators


@register_flop_formula(torch.ops.fastambient.convolution_native)  # type: ignore[untyped-decorator]
def _convolution(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


@register_flop_formula(torch.ops.fastambient.conv_weight_native)  # type: ignore[untyped-decorator]
def _conv_weight(x: torch.Size, dy: torch.Size, kernel: int, *_: Any, **__: Any) -> int:
    n, channels, height, width = x
    return 2 * n * height * width * channels * dy[1] * kernel**2
