"""Shared fixtures. Nothing here needs a network, a GPU or anything outside this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and TRITON_INTERPRET unset"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are tiny: a thread pool costs more than it gives, and sums stay the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Features that tests make go to no user's cache; all tests share one, as runs do."""
    monkeypatch.setenv("FASTAMBIENT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def nan_filled(monkeypatch):
    """Memory that nobody has written holds NaN: an element that a kernel forgets is seen."""

    def filled(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def read_safetensors(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a recorded file in tests/data."""
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


TINY = ["model.model_channels=8", "model.channel_mult=[1,2]", "model.attn_resolutions=[4]"]


def make_run(path: Path, *assignments: str, **options: Any) -> Path:
    """Create (not train) a run on 100 digits with a network of some ten thousand weights; 8 images a step.

    options : `data` for another source, `noise_seed`
    """
    from fastambient.training.request import TrainRequest, plan
    from fastambient.training.start import create_run

    defaults = ["training.batch=8", "training.kimg=0.16", "training.sample_kimg=0", "training.checkpoint_kimg=0.08"]
    defaults.append("evaluation.features=none")  # a network that looks at pictures takes 30 ms each
    request = TrainRequest(
        data=options.pop("data", None),
        noise_seed=options.pop("noise_seed", 12345),
        assignments=[*TINY, *defaults, *assignments],
    )
    assert not options
    return create_run(plan(request), path)


def train_here(path: Path, *, resume: bool = False) -> None:
    """Train a run in this process, on one CPU rank."""
    from fastambient.training.distributed import World
    from fastambient.training.loop import train

    train(path, World(), resume=resume)


def read_stats(path: Path, *, timing: bool = False) -> list[dict[str, Any]]:
    """stats.jsonl, without what a clock says unless asked for."""
    rows = [json.loads(line) for line in (path / "stats.jsonl").read_text().splitlines()]
    clock = () if timing else ("images_per_second", "tflops", "mfu", "data_wait")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def cli(*arguments: str, check: int | None = 0, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; `check` is the exit code that is expected."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | popen.pop("env", {})
    done = subprocess.run(
        [sys.executable, "-m", "fastambient", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300, **popen,
    )  # fmt: skip
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
