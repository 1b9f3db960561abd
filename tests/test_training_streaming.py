"""Training from tar shards without a store: the run, its resume, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import train_here
from PIL import Image
from sklearn.datasets import load_digits

from fastambient.data import open_source, prepare
from fastambient.data.streaming import read_journal
from fastambient.errors import InputError
from fastambient.evaluation.run import evaluate_run
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run, start

TINY = {
    "model": {"model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": ()},
    "training": {"device": "cpu", "batch": 32, "kimg": 0.256, "augment": 0.0, "checkpoint_kimg": 0.096},
}


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Four tars of 25 real digits each, with their classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    data, folder = load_digits(), tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        with tarfile.open(folder / f"digits-{number:04d}.tar", "w") as tar:
            for i in range(25 * number, 25 * number + 25):
                picture, buffer = np.rint(data.images[i] * (255 / 16)).astype(np.uint8), io.BytesIO()
                Image.fromarray(picture).save(buffer, "PNG")
                for name, content in ((f"{i:05d}.png", buffer.getvalue()), (f"{i:05d}.cls", b"%d" % data.target[i])):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def run_of(tmp_path, shards, name="run", **data):
    options = TINY | {"data": {"stream": True, "window": 2} | data}
    request = TrainRequest(
        data=str(shards / "digits-{0000..0003}.tar"), preset="digits", options=options, noise_seed=7,
        assignments=["noise.sigma_tn=0.3"],
    )  # fmt: skip
    return create_run(plan(request), tmp_path / name)


def losses(path):
    return [json.loads(line)["loss"] for line in (path / "stats.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_loaders_give_the_same_run(tmp_path, shards):
    paths = [run_of(tmp_path, shards, name, loader=name) for name in ("workers", "auto")]
    for path in paths:
        start(path)
    assert losses(paths[0]) == losses(paths[1])
    settings = RunFolder(paths[0]).read_settings()
    assert (settings.data.train, settings.data.holdout) == (100, 0)
    # All 100 of them are the first of the order: what is measured is what a store says.
    store = prepare(open_source(shards), tmp_path / "store", holdout=0)
    assert settings.noise.sigma_data == pytest.approx(store.sigma_data, rel=1e-12)
    with pytest.raises(InputError, match="streams its images: nothing was held out"):
        evaluate_run(paths[0])
    start(paths[0], resume=True)  # finished: said, not an error


@pytest.mark.slow
def test_goes_on_in_the_middle_of_an_epoch(tmp_path, shards):
    """An epoch is 100 images, a step 32: the run is cut off within the second epoch, and ends like one that was not."""
    whole = run_of(tmp_path, shards, "whole")
    start(whole)
    cut = run_of(tmp_path, shards, "cut")
    program = f"""
import os, signal
import torch
from fastambient.training import loop
torch.set_num_threads({torch.get_num_threads()})
from fastambient.training.start import start
original = loop.TrainingStep.__call__
def step(self, nimg, **keywords):
    if nimg == 160:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, nimg, **keywords)
loop.TrainingStep.__call__ = step
if __name__ == "__main__":
    from pathlib import Path
    start(Path({str(cut)!r}))
"""
    (tmp_path / "killed.py").write_text(program)
    assert subprocess.run([sys.executable, str(tmp_path / "killed.py")], capture_output=True).returncode == -9
    start(cut, resume=True)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_other_shards_than_before(tmp_path, shards):
    path = run_of(tmp_path, shards)
    (shards / "shards.json").unlink()
    (shards / "digits-0003.tar").write_bytes((shards / "digits-0002.tar").read_bytes() + bytes(512))
    with pytest.raises(InputError, match=r"are not those that .* was started on"):
        start(path)


@pytest.mark.parametrize(
    "data, words",
    [
        ({"train": 50}, "data.train 50: a stream is not split"),
        ({"noisy": "float16"}, "data.noisy float16: a stream stores nothing"),
        ({"loader": "resident"}, "--loader resident: a stream cannot be held in memory"),
        ({"window": 0}, "window"),
        ({"clean": "x"}, "are for a store that was handed out"),
    ],
)
def test_what_is_refused(tmp_path, shards, data, words):
    with pytest.raises(InputError, match=words):
        run_of(tmp_path, shards, **data)


def test_a_store_is_no_stream(tmp_path, shards):
    store = prepare(open_source("digits"), tmp_path / "store")
    with pytest.raises(InputError, match="is a store: leave --stream out"):
        plan(TrainRequest(data=str(store.path), preset="digits", options=TINY | {"data": {"stream": True}}))


def test_index_command(shards):
    command = [sys.executable, "-m", "fastambient", "prepare", "--index", str(shards)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"{shards / 'shards.json'}: 4 shards"
    assert json.loads((shards / "shards.json").read_text())["shards"][0]["images"] == 25
    done = subprocess.run([*command[:-1], "https://host/a.tar"], capture_output=True, text=True)
    assert done.returncode == 2 and "where they lie on a disk" in done.stderr


def test_streamed_noise_is_the_contracts(tmp_path, shards):
    """The same picture has the same id, and so the same noise, in a stream and in a store."""
    stream = RunFolder(run_of(tmp_path, shards)).open_stream()
    found = stream.fetch(stream.index(torch.arange(100)).numpy())
    store = prepare(open_source(shards), tmp_path / "store", holdout=0)
    assert sorted(found["ids"].tolist()) == sorted(store.train.ids.tolist())


def test_skipped_images_are_counted_once_over_all_processes(tmp_path, shards):
    """A broken image that several processes meet is one; what a kill cut off is no error."""
    run = RunFolder(run_of(tmp_path, broken(shards), on_bad_image="skip"))
    for stream in (run.open_stream(), copy.deepcopy(run.open_stream())):
        for _ in range(2):
            stream.fetch(np.arange(50))
    lines = run.skipped.read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == ["digits-0000.tar: 00000.png"] * 2
    with open(run.skipped, "a") as torn:
        torn.write('["cut o\n')
    assert list(read_journal(run.skipped)) == ["digits-0000.tar: 00000.png"]


@pytest.mark.slow
def test_a_run_says_how_many_images_it_skipped(tmp_path, shards, capsys):
    path = run_of(tmp_path, broken(shards), on_bad_image="skip", loader="workers", workers=1)
    train_here(path)
    assert f"warning: 1 image(s) could not be read and were skipped: {path}" in capsys.readouterr().err


def broken(shards):
    """The first image of the first shard cannot be read."""
    file = shards / "digits-0000.tar"
    data = bytearray(file.read_bytes())
    data[512:544] = bytes(32)
    file.write_bytes(data)
    return shards
