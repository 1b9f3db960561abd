"""What the driver says of a GPU: utilisation, memory, power, clocks, throttling, energy.

Read through NVML, NVIDIA's management library (module `pynvml` of the distribution nvidia-ml-py). Monitoring is never
a condition of a run: where library, driver or GPU are missing there is no `Gpu`, and what one device cannot tell is
absent from its readings while the rest is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

# NVML's bits of what holds the clocks below their maximum (nvml.h, nvmlClocksEventReason*).
_THROTTLE = (
    (0x001, "idle"),
    (0x002, "application clocks"),
    (0x004, "power cap"),
    (0x008, "hardware slowdown"),
    (0x010, "sync boost"),
    (0x020, "thermal slowdown"),
    (0x040, "hardware thermal slowdown"),
    (0x080, "power brake"),
    (0x100, "display clocks"),
)


@dataclass(frozen=True)
class Reading:
    """One look at a GPU; None is what it cannot tell."""

    util: float | None  # percent of the last sample period (up to a second) in which a kernel ran
    memory: float | None  # bytes in use, by every process
    power: float | None  # watts
    clock: float | None  # MHz of the multiprocessors
    memory_clock: float | None  # MHz
    throttle: int | None  # NVML's bits, see `throttle_words`
    joules: float | None  # since the reading before; None at the first


class Gpu:
    """One device, by its NVML handle; `nvml` is the module `pynvml`, initialised."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._before: tuple[float | None, float | None, float] | None = None  # energy counter, power, time

    def _ask(self, *names: str, arguments: tuple[Any, ...] = ()) -> Any:
        """The answer to the first of `names` that library, driver and device know, or None."""
        for name in names:
            try:
                return getattr(self._nvml, name)(self._handle, *arguments)
            except (AttributeError, self._nvml.NVMLError):
                continue
        return None

    def read(self) -> Reading:
        """A few driver calls, some 10 us to 1 ms each, and no wait for the work on the device."""
        nvml = self._nvml
        util, memory = self._ask("nvmlDeviceGetUtilizationRates"), self._ask("nvmlDeviceGetMemoryInfo")
        power = _scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3)
        return Reading(
            util=None if util is None else float(util.gpu),
            memory=None if memory is None else float(memory.used),
            power=power,
            clock=_scaled(self._ask("nvmlDeviceGetClockInfo", arguments=(nvml.NVML_CLOCK_SM,)), 1.0),
            memory_clock=_scaled(self._ask("nvmlDeviceGetClockInfo", arguments=(nvml.NVML_CLOCK_MEM,)), 1.0),
            throttle=self._ask(  # the second is the name of drivers before 535
                "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
            ),
            joules=self._joules(power),
        )

    def _joules(self, power: float | None) -> float | None:
        """Of the energy counter (Volta and later) where there is one, else the mean of two powers times the time."""
        counter = _scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3)
        now = (counter, power, time.monotonic())
        before, self._before = self._before, now
        if before is None:
            return None
        if counter is not None and before[0] is not None:
            return counter - before[0] if counter >= before[0] else None  # the driver was loaded again: it starts at 0
        if power is not None and before[1] is not None:
            return (power + before[1]) / 2 * (now[2] - before[2])
        return None

    def describe(self) -> dict[str, Any]:
        """What a measurement on this device must be read with: driver, power limit (W) and the highest clocks (MHz)."""
        nvml = self._nvml
        try:
            driver = nvml.nvmlSystemGetDriverVersion()
        except (AttributeError, nvml.NVMLError):
            driver = None
        found = {
            "driver": driver,
            "power_limit_w": _scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "max_clock_mhz": _scaled(self._ask("nvmlDeviceGetMaxClockInfo", arguments=(nvml.NVML_CLOCK_SM,)), 1.0),
            "max_memory_clock_mhz": _scaled(
                self._ask("nvmlDeviceGetMaxClockInfo", arguments=(nvml.NVML_CLOCK_MEM,)), 1.0
            ),
        }
        return {name: value for name, value in found.items() if value is not None}


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def throttle_words(bits: int) -> list[str]:
    """NVML's reasons in words; a bit that has none yet is given in hexadecimal."""
    words = [word for bit, word in _THROTTLE if bits & bit]
    rest = bits & ~sum(bit for bit, _ in _THROTTLE)
    return [*words, f"reason {rest:#x}"] if rest else words


def open_gpu(device: torch.device) -> Gpu | None:
    """The GPU behind a torch device, whatever ``CUDA_VISIBLE_DEVICES`` made of the numbering; None where NVML, its
    driver or the device is not there."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    handle = _find(pynvml, torch.cuda.get_device_properties(index), index)
    return None if handle is None else Gpu(pynvml, handle)


def _find(nvml: Any, properties: Any, index: int) -> Any:
    """The handle by identity, not by number: UUID, then PCI bus. None for an instance of a GPU in MIG mode that cannot
    be told from its neighbours: the whole GPU's power and memory are not the instance's."""
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-").removeprefix("MIG-")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    named = visible[index].strip() if index < len(visible) else ""
    names = [named] if named.startswith("MIG-") else []
    names += [f"MIG-{uuid}", f"GPU-{uuid}"] if uuid else []
    asked = [(nvml.nvmlDeviceGetHandleByUUID, name) for name in names]
    if hasattr(properties, "pci_bus_id"):
        bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        asked.append((nvml.nvmlDeviceGetHandleByPciBusId, bus))
    for ask, name in asked:
        try:
            handle = ask(name)
        except nvml.NVMLError:
            continue
        return handle if name.startswith("MIG-") or not _mig_mode(nvml, handle) else None
    return None


def _mig_mode(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (AttributeError, nvml.NVMLError):
        return False  # a GPU without it


def summary(readings: Iterable[Reading], *, images: int | None = None) -> dict[str, Any]:
    """The JSON fields of one or more GPUs' readings, without those that no GPU could tell.

    gpu_util, gpu_power_w, gpu_clock_mhz, gpu_memory_clock_mhz : means over the GPUs; percent, watts, MHz
    gpu_memory_gb : of the fullest GPU, in 10^9 bytes
    gpu_throttle : what held any of them back, in words; [] is nothing
    joules_per_image : energy of all GPUs since their last readings over `images` of all ranks; only if all could tell
    """
    readings = list(readings)

    def known(name: str) -> list[Any]:
        return [value for reading in readings if (value := getattr(reading, name)) is not None]

    found: dict[str, Any] = {}
    fields = {
        "gpu_util": "util",
        "gpu_power_w": "power",
        "gpu_clock_mhz": "clock",
        "gpu_memory_clock_mhz": "memory_clock",
    }
    for field, name in fields.items():
        if values := known(name):
            found[field] = sum(values) / len(values)
    if values := known("memory"):
        found["gpu_memory_gb"] = max(values) / 1e9
    if values := known("throttle"):
        bits = 0
        for value in values:
            bits |= int(value)
        found["gpu_throttle"] = throttle_words(bits)
    if images and readings and len(values := known("joules")) == len(readings):
        found["joules_per_image"] = sum(values) / images
    return found


def driver_cuda() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the driver runs, or None where NVML or a driver is not there."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except (pynvml.NVMLError, AttributeError):
        return None
    return version // 1000, version % 1000 // 10
