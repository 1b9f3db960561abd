"""What our operators cost, for torch's FlopCounterMode: import this module before one counts.

It stands alone because torch's counter brings Triton along, 90 MB that a process which only reads or noises pictures
does without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fastambient_kernels.convolution  # noqa: F401  # defines the operator


@register_flop_formula(torch.ops.fastambient.conv_weight_native)  # type: ignore[untyped-decorator]
def _conv_weight(x: torch.Size, dy: torch.Size, kernel: int, *_: Any, **__: Any) -> int:
    n, channels, height, width = x
    return 2 * n * height * width * channels * dy[1] * kernel**2
