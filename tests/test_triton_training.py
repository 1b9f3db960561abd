"""A training whose every operator is an interpreted Triton kernel."""

from __future__ import annotations

import json
import os
from importlib import import_module

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: see `make test`", allow_module_level=True)
pytest.importorskip("triton")

from conftest import make_run, train_here
from safetensors.torch import load_file

from fastambient_kernels import _registration


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps_follow_the_reference(tmp_path, monkeypatch, precision):
    """Two steps with gradients from the second on (the last layer starts at zero) give the same losses and weights."""
    taken: set[tuple[str, str]] = set()
    choose = _registration.choose

    def recorded(operator, *args):
        impl = choose(operator, *args)
        taken.add((operator, impl))
        return impl

    for module in ("ambient", "group_norm_silu", "adam_ema"):
        monkeypatch.setattr(import_module(f"fastambient_kernels.{module}"), "choose", recorded)
    ended = {}
    for impl in ("reference", "triton"):
        monkeypatch.setenv("FASTAMBIENT_IMPL", impl)
        path = make_run(
            tmp_path / impl, "training.kimg=0.004", "training.batch=2", "model.num_blocks=1", "noise.sigma_tn=0.2", "training.lr_rampup_kimg=0.002",
            f"training.precision={precision}", "model.dropout=0.1",
        )  # fmt: skip
        train_here(path)
        steps = [json.loads(line) for line in (path / "stats.jsonl").read_text().splitlines()]
        ended[impl] = [(s["loss"], s["grad_norm"]) for s in steps], load_file(path / "model.safetensors")
    assert taken == {(o, i) for o in ("ambient_noise", "ambient_loss", "group_norm_silu", "adam_ema") for i in ended}
    (losses, weights), (expected, exact) = ended["triton"], ended["reference"]
    assert len(losses) == 2
    for got, wanted in zip(losses, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 2e-2)
    # Adam's first updates are lr * sign(g), so that a gradient near 0 may move by lr in either direction.
    far = sum(int(((weights[k] - exact[k]).abs() > 1e-5).sum()) for k in exact)
    assert far <= 0.01 * sum(v.numel() for v in exact.values())
