"""GPU monitoring against a stand-in for NVML: units, names, what a device cannot tell, and which device it is."""

from __future__ import annotations

import builtins
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_run, read_stats

from fastambient import nvml
from fastambient.nvml import Gpu, open_gpu, summary, throttle_words
from fastambient.training import loop
from fastambient.training.distributed import World
from fastambient.training.monitor import gpu_fields

UUID = "11111111-2222-3333-4444-555555555555"
BUS = "00000001:3b:00.0"


class FakeNVML:
    """NVML's functions over a handle that is a dictionary of answers; a missing one is not supported."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, handles, *, driver=True):
        self.handles, self.driver = handles, driver

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def _get(self, table, key):
        if key not in table:
            raise self.NVMLError("Not Found")
        return table[key]

    def nvmlDeviceGetHandleByUUID(self, name):
        return self._get(self.handles, name)

    nvmlDeviceGetHandleByPciBusId = nvmlDeviceGetHandleByUUID

    def nvmlDeviceGetMigMode(self, handle):
        return self._get(handle, "mig"), 0

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self._get(handle, "util"), memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self._get(handle, "memory"), total=85 * 10**9)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._get(handle, "milliwatts")

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._get(handle, {1: "sm", 2: "mem"}[kind])

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._get(handle, "throttle")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._get(handle, "millijoules")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlSystemGetDriverVersion(self):
        return "580.1"


def h100(**changed):
    busy = {"util": 97, "memory": 24 * 10**9, "milliwatts": 650_000, "sm": 1755, "mem": 2619, "throttle": 0x4}
    return busy | {"millijoules": 5_000_000, "mig": 0} | changed


@pytest.fixture
def machine(monkeypatch):
    """install(handles) puts the stand-in in NVML's place and a torch device of UUID and BUS in front of it."""

    def install(handles, **keywords):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(handles, **keywords))

    properties = SimpleNamespace(uuid=UUID, pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def test_units_names_and_energy(machine):
    handle = h100()
    machine({f"GPU-{UUID}": handle})
    gpu = open_gpu(torch.device("cuda:0"))
    first = summary([gpu.read()], images=10)
    assert first == {
        "gpu_util": 97.0, "gpu_power_w": 650.0, "gpu_clock_mhz": 1755.0, "gpu_memory_clock_mhz": 2619.0,
        "gpu_memory_gb": 24.0, "gpu_throttle": ["power cap"],
    }  # fmt: skip
    handle["millijoules"] += 3_000_000
    assert summary([gpu.read()], images=1000)["joules_per_image"] == pytest.approx(3.0)
    handle["millijoules"] = 1000  # the driver was loaded again
    assert "joules_per_image" not in summary([gpu.read()], images=1000)
    assert gpu.describe() == {
        "driver": "580.1", "power_limit_w": 700.0, "max_clock_mhz": 1980.0, "max_memory_clock_mhz": 2619.0
    }  # fmt: skip


def test_power_is_integrated_where_there_is_no_energy_counter(machine, monkeypatch):
    handle = h100()
    del handle["millijoules"]
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(nvml.time, "monotonic", lambda: next(clock))
    gpu = Gpu(FakeNVML({}), handle)
    assert gpu.read().joules is None
    handle["milliwatts"] = 350_000
    assert gpu.read().joules == pytest.approx(4 * 500)


@pytest.mark.parametrize(
    ("missing", "fields"),
    [
        ("util", {"gpu_util"}),
        ("memory", {"gpu_memory_gb"}),
        ("milliwatts", {"gpu_power_w"}),
        ("sm", {"gpu_clock_mhz"}),
        ("mem", {"gpu_memory_clock_mhz"}),
        ("throttle", {"gpu_throttle"}),
        ("millijoules", set()),  # power is there
    ],
)
def test_what_a_device_does_not_support_is_absent_and_the_rest_is_there(missing, fields):
    handle = h100()
    gpu = Gpu(FakeNVML({}), handle)
    gpu.read()
    whole = summary([gpu.read()], images=1)
    del handle[missing]
    gpu.read()
    assert whole.keys() - summary([gpu.read()], images=1).keys() == fields


def test_drivers_that_know_the_older_name_of_throttle_reasons():
    class Older(FakeNVML):
        nvmlDeviceGetCurrentClocksEventReasons = property()  # AttributeError

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
            return 0x60

    assert summary([Gpu(Older({}), h100()).read()])["gpu_throttle"] == ["thermal slowdown", "hardware thermal slowdown"]


def test_throttle_reasons_in_words():
    assert throttle_words(0) == []
    assert throttle_words(0x1 | 0x80) == ["idle", "power brake"]
    assert throttle_words(0x4 | 0x1000) == ["power cap", "reason 0x1000"]


def test_no_library_no_driver_no_gpu_is_silence(machine, monkeypatch, capfd):
    machine({f"GPU-{UUID}": h100()})
    assert open_gpu(torch.device("cpu")) is None
    machine({})  # a device that NVML does not know
    assert open_gpu(torch.device("cuda:0")) is None
    machine({f"GPU-{UUID}": h100()}, driver=False)
    assert open_gpu(torch.device("cuda:0")) is None
    monkeypatch.delitem(sys.modules, "pynvml")
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert open_gpu(torch.device("cuda:0")) is None
    assert gpu_fields(None, World(), images=8) == {}
    assert capfd.readouterr() == ("", "")


def opened(device="cuda:0"):
    gpu = open_gpu(torch.device(device))
    return None if gpu is None else gpu.read().util


def test_the_device_is_found_by_identity_not_by_number(machine, monkeypatch):
    machine({f"GPU-{UUID}": h100(util=1), "GPU-other": h100(util=2), BUS: h100(util=3)})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"5,GPU-{UUID[:8]}")  # numbers and short UUIDs are torch's to resolve
    assert opened("cuda:1") == 1
    machine({"GPU-other": h100(util=2), BUS: h100(util=3)})
    assert opened() == 3, "by the PCI bus where the UUID is unknown"


def test_an_instance_of_a_gpu_is_not_taken_for_the_whole(machine, monkeypatch):
    whole, instance = h100(mig=1, util=9), {"memory": 5 * 10**9}  # NVML tells little of an instance
    machine({f"GPU-{UUID}": whole, BUS: whole})
    assert open_gpu(torch.device("cuda:0")) is None
    machine({f"GPU-{UUID}": whole, BUS: whole, "MIG-abc": instance})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-abc")
    assert summary([open_gpu(torch.device("cuda:0")).read()], images=1) == {"gpu_memory_gb": 5.0}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine({f"GPU-{UUID}": whole, f"MIG-{UUID}": instance})  # torch names the instance itself
    assert summary([open_gpu(torch.device("cuda:0")).read()]) == {"gpu_memory_gb": 5.0}


def test_ranks_are_brought_together(monkeypatch):
    """Two ranks: means, the fullest, every reason, the sum of energies; the second cannot tell its clock."""
    tables = []
    monkeypatch.setattr(World, "sum", lambda self, values: tables.append(values) or sum(tables))
    gpus = [Gpu(FakeNVML({}), handle) for handle in (h100(), h100(util=51, memory=10**9, throttle=0x20))]
    del gpus[1]._handle["sm"]
    for gpu in gpus:
        gpu.read()
        gpu._handle["millijoules"] += 700_000
    for rank, gpu in enumerate(gpus):
        found = gpu_fields(gpu, World(rank, 2), images=100)
    assert found["gpu_util"] == 74 and found["gpu_memory_gb"] == 24 and found["gpu_clock_mhz"] == 1755
    assert found["gpu_throttle"] == ["power cap", "thermal slowdown"]
    assert found["joules_per_image"] == pytest.approx(14.0)
    tables.clear()
    gpu_fields(gpus[0], World(0, 2), images=100)
    assert "joules_per_image" not in gpu_fields(None, World(1, 2), images=100), "half of the energy is not the energy"


def test_a_run_logs_its_gpu(tmp_path, monkeypatch, capsys):
    """At the console line alone, with the energy of the images since the last one."""
    handle, reads = h100(millijoules=0), []

    class Spy(Gpu):
        def read(self):
            reads.append(1)
            handle["millijoules"] += 160_000
            return super().read()

    monkeypatch.setattr(loop, "open_gpu", lambda device: Spy(FakeNVML({}), handle))
    monkeypatch.setattr("fastambient.training.monitor._LINE_EVERY_SECONDS", 1e9)
    path = make_run(tmp_path / "run")  # 20 steps of 8 images, a line at every tenth
    loop.train(path, World(), resume=False)
    rows = read_stats(path)
    assert [row["nimg"] for row in rows if "gpu_util" in row] == [80, 160] and len(reads) == 3
    assert rows[9]["joules_per_image"] == pytest.approx(2.0) and rows[19]["gpu_throttle"] == ["power cap"]
    assert "GPU 97 %, 650 W, 1755 MHz, 2 J/image, power cap" in capsys.readouterr().err
    assert json.dumps(rows[9]["gpu_power_w"]) == "650.0"


def test_a_line_is_due_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("fastambient.training.monitor._LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(loop, "open_gpu", lambda device: Gpu(FakeNVML({}), h100()))
    path = make_run(tmp_path / "run", "training.kimg=0.04")
    loop.train(path, World(), resume=False)
    assert all("gpu_clock_mhz" in row and "line" not in row for row in read_stats(path))
