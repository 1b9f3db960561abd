"""`fastambient info`: what is here, and for each operator what is available or why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastambient import system
from fastambient.system import information
from fastambient.training.config import resolve
from fastambient.training.notes import notes
from fastambient_kernels import _native

OPERATORS = ["ambient_noise", "ambient_loss", "group_norm_silu", "adam_ema", "dropout", "random_words", "conv2d",
             "residual", "resample"]  # fmt: skip


def elsewhere(**environment: str) -> dict[str, dict[str, object]]:
    """`information` in a process of its own: libraries are loaded at import."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTAMBIENT_", "TRITON_"))}
    code = "import json; from fastambient.system import information; print(json.dumps(information()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert not done.stderr
    return json.loads(done.stdout)


def test_sections_are_json_and_name_each_operator():
    found = information()
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["versions", "devices", "operators", "native", "cuda", "triton"]
    for section in ("operators", "native", "triton"):
        assert list(found[section]) == OPERATORS
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["devices"]["cpu_count"] == os.cpu_count()


def test_native_says_what_the_library_holds():
    found = information()["native"]
    for name in OPERATORS:
        reason = _native.missing(name)
        assert found[name] == (f"not available: {reason}" if reason else "available")
        assert (found[name] == "available") == (name in _native.OPERATORS)


@pytest.mark.skipif(
    sys.platform != "linux"
    or not all(map(shutil.which, ("cmake", "c++")))
    or os.environ.get("FASTAMBIENT_NATIVE") == "off",
    reason="needs Linux, CMake, a compiler, and FASTAMBIENT_NATIVE not off",
)
def test_where_a_compiler_is_the_library_is_there():
    """Tests of native code skip without it: this one does not."""
    found = elsewhere()["native"]
    assert found == dict.fromkeys(OPERATORS, "available")


def test_without_the_library_auto_is_the_reference_and_the_reason_is_told():
    found = elsewhere(FASTAMBIENT_NATIVE="off", FASTAMBIENT_CUDA="off", CUDA_VISIBLE_DEVICES="")
    for name in OPERATORS:
        assert found["native"][name] == "not available: switched off by FASTAMBIENT_NATIVE=off"
        assert found["operators"][name] == "reference"
    assert found["cuda"] == {"adam_ema": "not available: switched off by FASTAMBIENT_CUDA=off"}


def test_auto_follows_what_is_available_and_the_environment():
    found = elsewhere(CUDA_VISIBLE_DEVICES="")
    for name in OPERATORS:
        assert found["operators"][name] == ("native" if found["native"][name] == "available" else "reference")
    asked = elsewhere(CUDA_VISIBLE_DEVICES="", FASTAMBIENT_IMPL="reference", FASTAMBIENT_CUDA="on")
    assert set(asked["operators"].values()) == {"reference"}
    assert "FASTAMBIENT_CUDA=on: there is no CUDA device" in asked["cuda"]["adam_ema"]


def test_slow_operators_are_one_line_with_the_reason(monkeypatch):
    monkeypatch.delenv("FASTAMBIENT_IMPL", raising=False)
    why = {"conv2d": "no compiler", "residual": "no compiler", "dropout": "another reason"}
    monkeypatch.setattr(system._native, "missing", lambda name, device="cpu": why.get(name))
    assert system.slow_operators("cpu") == (
        "these operators run in plain torch, which is slower: dropout (another reason); conv2d, residual (no compiler)"
    )
    monkeypatch.setattr(system, "_triton_missing", lambda name, device: "no Triton")
    monkeypatch.setattr(system, "_cuda_missing", lambda: None)
    told = system.slow_operators("cuda")
    assert told.endswith("(no Triton)") and "residual" in told
    assert "conv2d" not in told and "adam_ema" not in told, "they have other fast paths on a GPU"
    monkeypatch.setenv("FASTAMBIENT_IMPL", "reference")
    assert system.slow_operators("cpu") == ""


@pytest.mark.parametrize(
    ("flags", "there"),
    [({"avx512f"}, False), ({"avx512f", "avx512_bf16"}, True), ({"amx_bf16"}, True), ({"bf16"}, True), (set(), False)],
)
def test_bf16_needs_the_instructions(flags, there, monkeypatch):
    monkeypatch.setattr(system, "_cpu_flags", lambda: flags)
    settings = resolve(resolution=8, assignments=["training.precision=bf16"])
    data = SimpleNamespace(mirrored_pairs=0)
    for device in ("cpu", "cuda"):
        warned = any("no bfloat16 units" in note for note in notes(settings, data, device))
        assert warned == (device == "cpu" and not there)
    assert system.bf16_on_cpu() == there


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    found = elsewhere(CUDA_VISIBLE_DEVICES="")["triton"]
    assert found["ambient_noise"].startswith("not available: Triton kernels run on GPUs")
    assert elsewhere(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")["triton"]["ambient_noise"] == "available"
    monkeypatch.setitem(system._OPERATORS, "ambient_noise", "no_such_triton")
    assert information()["triton"]["ambient_noise"] == "not available: there is no Triton kernel of ambient_noise"


def test_auto_takes_the_next_best_on_a_gpu(monkeypatch):
    monkeypatch.delenv("FASTAMBIENT_IMPL", raising=False)
    here, away = "available", "not available: no"
    assert system._auto({"triton": here, "native": here}) == "triton"
    assert system._auto({"triton": away, "native": here}) == "native"
    assert system._auto({"triton": away, "native": ""}) == "reference"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own figure is taken as it is")
def test_peak_memory_is_this_process_own():
    held = b"1" * (1 << 30)  # of a process that starts another one: getrusage counts it for both
    code = "from fastambient.system import peak_resident; a = b'1' * (200 << 20); del a; print(peak_resident())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120).stdout)
    assert 200 << 20 < peak < len(held) < system.peak_resident()
