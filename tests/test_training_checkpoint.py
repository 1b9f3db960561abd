"""Checkpoints: whole, checked, the last K kept; a corrupt one is passed over, a full disk loses nothing."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from fastambient.errors import FastambientError, InputError
from fastambient.training import checkpoint

TENSORS = {"model.w": torch.arange(6.0).view(2, 3), "optimizer.step.w": torch.tensor(3.0)}


def test_round_trip_and_the_last_k_are_kept(tmp_path):
    for nimg in (100, 200, 300, 1000):
        checkpoint.save(tmp_path / "c", nimg, TENSORS, {"seconds": nimg / 2}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "c")] == ["nimg-000000000300", "nimg-000000001000"]
    tensors, state = checkpoint.load_latest(tmp_path / "c")
    assert state["nimg"] == 1000 and state["seconds"] == 500
    assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())
    assert checkpoint.load_latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_corrupt_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, name, damage):
    for nimg in (100, 200):
        checkpoint.save(tmp_path, nimg, TENSORS, {}, keep=3)
    file = checkpoint.checkpoints(tmp_path)[-1] / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    _, state = checkpoint.load_latest(tmp_path)
    assert state["nimg"] == 100
    said = capsys.readouterr().err
    assert "nimg-000000000200 is corrupt" in said and "the one before" in said


def test_all_corrupt_is_an_error(tmp_path):
    path = checkpoint.save(tmp_path, 100, TENSORS, {}, keep=1)
    (path / "state.json").write_text("{}")
    with pytest.raises(FastambientError, match=r"every checkpoint in .* is corrupt"):
        checkpoint.load_latest(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 100, TENSORS, {}, keep=1)
    state = json.loads((path / "state.json").read_text()) | {"format_version": 99}
    (path / "state.json").write_text(json.dumps(state))
    lines = [f"{checkpoint.sha256_file(path / n)}  {n}\n" for n in ("state.safetensors", "state.json")]
    (path / "SHA256SUMS").write_text("".join(lines))
    with pytest.raises(InputError, match="checkpoint format 99"):
        checkpoint.load_latest(tmp_path)


def test_full_disk_keeps_the_last_good_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 100, TENSORS, {}, keep=3)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FastambientError, match=r"No space left.*the last good checkpoint is .*nimg-000000000100"):
        checkpoint.save(tmp_path, 200, TENSORS, {}, keep=3)
    assert [p.name for p in tmp_path.iterdir()] == ["nimg-000000000100"], "nothing half-written is left"
    assert checkpoint.load_latest(tmp_path)[1]["nimg"] == 100
