"""Where the time of a step goes: torch.profiler's operators, each with its own time (not that of what it calls).

On a GPU an operator's time is that of the kernels it launches, cuDNN's changes of layout with its convolutions; on a
CPU it is the time of the calling thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import protocol
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_TOP = 10
_CONVOLUTION = re.compile(r"conv(ol|[123]d|_depthwise|_weight)|fprop|dgrad|wgrad", re.IGNORECASE)


def operator_times(step: Callable[[], object], device: torch.device, *, steps: int = 3) -> dict[str, tuple[float, int]]:
    """Seconds and calls a step of each operator; what no operator launched stands under its kernel's name."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    step()
    protocol.synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        protocol.synchronize(device)
    operators: dict[str, tuple[float, int]] = {}
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if device.type == "cpu":
            microseconds, into = event.self_cpu_time_total, operators
        else:
            microseconds = event.self_device_time_total
            if event.device_type != DeviceType.CPU and event.is_user_annotation:
                continue  # a span on the device's time line, such as an optimizer's step, and no kernel
            into = operators if event.device_type == DeviceType.CPU else kernels
        if microseconds > 0:
            into[event.key] = (microseconds * 1e-6 / steps, max(1, round(event.count / steps)))
    # A replayed CUDA graph, for one, launches kernels without operators.
    named, launched = (sum(t for t, _ in found.values()) for found in (operators, kernels))
    return operators if named >= 0.5 * launched else kernels


def shares(times: Mapping[str, tuple[float, int]], seconds: float) -> dict[str, Any]:
    """The profile of a step that takes `seconds` when nobody looks: top operators and the share of all convolutions.

    Shares are of the whole step: they sum to less than 1 where the device waits for the host. A profiled step may be
    slower than `seconds`, and shares are then of its own length.
    """
    busy = sum(t for t, _ in times.values())
    whole = max(busy, seconds)
    top = sorted(times.items(), key=lambda item: -item[1][0])[:_TOP]
    return {
        "step_ms": seconds * 1e3,
        "busy_ms": busy * 1e3,
        "convolution_share": sum(t for name, (t, _) in times.items() if _CONVOLUTION.search(name)) / whole,
        "operators": [
            {"operator": name, "share": t / whole, "ms": t * 1e3, "calls": calls} for name, (t, calls) in top
        ],
    }


def write(file: Path, device: torch.device, work: str, size: str, found: Mapping[str, Any]) -> None:
    """Print the profile and write it as rows, one an operator."""
    print(f"profile: convolutions {found['convolution_share']:.0%} of the step, {found['busy_ms']:.1f} ms in operators")
    for row in found["operators"]:
        print(f"  {row['share']:>6.1%}{row['ms']:>10.2f} ms{row['calls']:>6} x {row['operator'][:90]}")
    told = {k: v for k, v in found.items() if k != "operators"}
    rows = [{"work": f"profile {work}", "size": size} | row for row in found["operators"]]
    protocol.write_json(file, device, rows, work=work, size=size, **told)
