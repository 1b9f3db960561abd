"""The three loaders: the same samples in the same order, on any ranks, after any resume; and what goes wrong."""

from __future__ import annotations

import gc
import importlib.metadata
import io
import os
import pickle
import platform
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cli, make_run, read_stats, train_here
from PIL import Image

from fastambient.data import Share, StoreRows, choose, dali, loaders, make_loader, open_source, prepare
from fastambient.data.loaders import ReadError
from fastambient.data.rows import fetch_decoded
from fastambient.data.store import Store
from fastambient.errors import InputError
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.monitor import Monitor
from fastambient.training.run import RunFolder

CPU = torch.device("cpu")
NAMES = ("images", "ids", "flips", "labels", "positions", "x_n")
N = 25

no_dali = dali.missing(CPU)
needs_dali = pytest.mark.skipif(no_dali is not None, reason=f"{no_dali}")
STREAMING = [pytest.param("dali", marks=needs_dali), "workers"]
NAMES_OF_LOADERS = ("resident", "dali", "workers")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("loaders"), np.random.default_rng(2)
    np.savez(path / "set.npz", images=rng.integers(0, 256, (30, 3, 6, 6), dtype=np.uint8), labels=np.arange(30) % 3)
    return prepare(
        open_source(path / "set.npz"), path / "store", train=N, sigma_tn=0.3, noisy="float16", shard_bytes=8 * 108
    )


def rows_of(store):
    return StoreRows(store.train, seed=11, use_noisy=True)


def loader(kind, rows, share, **options):
    options = {"seed": 11, "device": CPU, "xflip": True, "workers": 1 if kind == "workers" else None, **options}
    return make_loader(kind, rows, share, **options)


@pytest.fixture
def expected(store):
    """The samples at positions, from one resident loader."""
    reference = loader("resident", rows_of(store), Share(8))
    return lambda first, count: reference.at(torch.arange(first, first + count))


def assert_same(batch, other):
    for name in NAMES:
        one, two = getattr(batch, name), getattr(other, name)
        assert one.dtype == two.dtype and torch.equal(one, two), name


def taken(made, nimg, micro):
    """The batch of a step, through static memory and in micro-batches, as `TrainingStep` takes it."""
    static = made.static()
    made.fill(static, made.host(nimg))
    return [made.batch(static, slice(k, k + micro)) for k in range(0, made.share.size, micro)]


ORDERS = {
    "from the start": (0, 8, 16, 24, 32, 40, 48),
    "as after a resume": (7, 15, 23, 31),
    "anew": (24, 1003, 1011, 8),
}


def kinds_and_orders():
    """All of them; the processes of `workers` take seconds to start, so two of its orders are slow."""
    for kind in NAMES_OF_LOADERS:
        for order in ORDERS:
            slow = kind == "workers" and order != "as after a resume"
            marks = [needs_dali] if kind == "dali" else [pytest.mark.slow] if slow else []
            yield pytest.param(kind, order, marks=marks)


@pytest.mark.parametrize(("kind", "order"), kinds_and_orders())
def test_the_same_samples_in_the_same_order(store, expected, kind, order):
    """Over the borders of epochs, in micro-batches, at an odd position, with requests that nobody could foresee; no
    global generator is touched, and no thread is left behind."""
    state, numpy_state, there = torch.get_rng_state(), np.random.get_state()[1].copy(), set(threading.enumerate())  # noqa: NPY002
    made = loader(kind, rows_of(store), Share(8))
    for nimg in ORDERS[order]:
        for k, batch in enumerate(taken(made, nimg, 4)):
            assert_same(batch, expected(nimg + 4 * k, 4))
    held = [made.host(nimg) for nimg in range(nimg + 8, nimg + 80, 8)]  # nothing that follows is written over them
    for k, fields in enumerate(held):
        assert_same(made.batch(fields), expected(nimg + 8 + 8 * k, 8))
    assert_same(made.at(torch.arange(90, 97)), expected(90, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    if order == "anew":
        made.close()
        assert_same(taken(made, 16, 8)[0], expected(16, 8))  # a closed loader may be used again
    del made  # nobody has to close it
    gc.collect()
    deadline = time.monotonic() + 60  # threads of torch's queues end by themselves; a busy machine starts workers late
    while (left := set(threading.enumerate()) - there) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left  # one of an earlier test may end meanwhile: what counts is whether one came and stayed


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["resident", STREAMING[0], pytest.param("workers", marks=pytest.mark.slow)])
def test_ranks_divide_a_batch_and_share_nothing(store, expected, kind, ranks):
    parts = [loader(kind, rows_of(store), Share(12, rank, ranks)) for rank in range(ranks)]
    for nimg in (0, 12, 24, 511):
        shares = [taken(made, nimg, 12 // ranks)[0] for made in parts]
        positions = torch.cat([batch.positions for batch in shares])
        assert positions.tolist() == list(range(nimg, nimg + 12))
        for k, batch in enumerate(shares):
            assert_same(batch, expected(nimg + k * (12 // ranks), 12 // ranks))
    for made in parts:
        made.close()


def test_batches_are_read_ahead_and_in_order(store):
    class Counted(StoreRows):
        asked = []

        def fetch(self, index):
            self.asked.append(index)
            return super().fetch(index)

    class Loader(loaders.StreamingLoader):
        def stream(self, nimg, read=None):
            rows, share = self.rows, self.share
            return ({"positions": share.positions(k), **fetch_decoded(rows, rows.index(share.positions(k)).numpy())}
                    for k in range(nimg, 10**6, share.batch))  # fmt: skip

    rows = Counted(store.train, seed=11, use_noisy=False)
    made = Loader(rows, Share(8), seed=11, device=CPU, xflip=False)
    made.host(0)
    until = time.monotonic() + 10
    while len(rows.asked) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(rows.asked) == 4, "one handed out, two ready, one waiting for room"
    time.sleep(0.05)
    assert len(rows.asked) == 4
    for k, index in enumerate(rows.asked):
        assert index.tolist() == rows.index(torch.arange(8 * k, 8 * k + 8)).tolist()
    made.close()


def test_rows_are_opened_anew_from_a_pickle(store):
    rows = rows_of(store)
    text = pickle.dumps(rows)
    assert len(text) < rows.nbytes, "pixels were pickled"
    again, index = pickle.loads(text), np.arange(N)[::-1]  # noqa: S301
    for name, values in rows.fetch(index).items():
        assert np.array_equal(again.fetch(index)[name], values), name
    assert rows.nbytes == N * (108 + 216 + 8 + 8) and len(rows) == N and rows.shape == (3, 6, 6)


# Faults.


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_killed_process_is_an_error_and_no_hang(store):
    made = loader("workers", rows_of(store), Share(8), workers=2)
    made.host(0)
    children = Path(f"/proc/self/task/{made._reader.thread.native_id}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(ReadError, match=r"a reading process ended .*data\.workers"):
        for nimg in range(8, 80000, 8):
            made.host(nimg)
    with pytest.raises(ReadError, match="a reading process ended"):  # asked again it does not hang either
        made.host(made._reader.nimg)
    made.close()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param("dali", "short", marks=needs_dali),
        pytest.param("dali", "gone", marks=needs_dali),
        ("workers", "short"),
    ],
)
def test_a_shard_that_is_cut_short_while_it_is_read(store, tmp_path, kind, fault):
    """Beyond the end of a mapped file the process would be ended by a bus error."""
    path = shutil.copytree(store.path, tmp_path / "store")
    made = loader(kind, rows_of(Store.open(path)), Share(8))
    made.host(0)
    shard = path / "train" / "images-00001.npy"
    if fault == "short":
        os.truncate(shard, 200)
    else:
        shard.unlink()
    expected = "images-00001.npy was cut short.* 200 bytes of 992" if fault == "short" else "cannot be read any more"
    with pytest.raises(ReadError, match=expected):
        for nimg in range(8, 800, 8):
            made.host(nimg)
    made.close()


@needs_dali
def test_dali_with_processes_of_its_own(store, expected, tmp_path):
    """The same samples; and an error in a process is named as it is where there are none."""
    path = shutil.copytree(store.path, tmp_path / "store")
    made = loader("dali", rows_of(Store.open(path)), Share(8), workers=1)
    for nimg in (5, 13, 21, 29):
        assert_same(taken(made, nimg, 8)[0], expected(nimg, 8))
    os.truncate(path / "train" / "images-00000.npy", 200)
    with pytest.raises(ReadError, match=r"DALI: /\S+images-00000\.npy was cut short"):
        for nimg in range(37, 800, 8):
            made.host(nimg)
    made.close()


# JPEG rows.


class JpegRows:
    """Encoded pictures of several kinds; `bad` stands in the place of row 5."""

    def __init__(self, channels=3, bad=None):
        rng, (y, x) = np.random.default_rng(0), np.mgrid[:37, :53]
        self.shape, self.encoded = (channels, 37, 53), []
        for k in range(9):
            waves = np.stack([np.sin(x / (4 + c + k)) * np.cos(y / 7 - c) for c in range(3)], -1) * 100 + 128
            picture = Image.fromarray((waves + rng.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8))
            file, colours = io.BytesIO(), {"subsampling": k % 3} if channels == 3 else {}
            picture.convert("RGB" if channels == 3 else "L").save(file, "JPEG", quality=30 + 8 * k, **colours)
            self.encoded.append(file.getvalue())
        if bad is not None:
            self.encoded[5] = bad

    def index(self, positions):
        return positions * 7 % 9

    def fetch(self, index):
        return {"jpeg": [self.encoded[k] for k in index], "ids": np.asarray(index) + 100}


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_dali_decodes_jpeg_as_pillow_does(channels):
    """Bit for bit on a CPU, for every subsampling of colours; so the loaders give the same samples here, too."""
    rows = JpegRows(channels)
    made = loader("dali", rows, Share(9), workers=0)
    fields, read = made.host(18), made.read(torch.arange(18, 27))
    assert sorted(fields) == ["ids", "images", "positions"]
    for k, row in enumerate(fields["ids"].tolist()):
        picture = np.asarray(Image.open(io.BytesIO(rows.encoded[row - 100]))).reshape(37, 53, channels)
        assert np.array_equal(fields["images"][k].numpy(), picture.transpose(2, 0, 1))
    assert all(torch.equal(fields[name], read[name]) for name in fields)
    made.close()


SMALL = JpegRows().encoded[0][:300]
OTHER = io.BytesIO()
Image.new("RGB", (53, 36)).save(OTHER, "JPEG")


@needs_dali
@pytest.mark.parametrize(("bad", "said"), [(SMALL[:2] + b"not a picture", "DALI"), (OTHER.getvalue(), r"decodes to \[3, 36, 53\]")])  # fmt: skip
def test_bad_jpeg(bad, said):
    made = loader("dali", JpegRows(bad=bad), Share(9), workers=0)
    with pytest.raises(ReadError, match=said):
        made.host(0)
    made.close()
    with pytest.raises(InputError, match=r"cannot be decoded|decodes to"):
        fetch_decoded(JpegRows(bad=bad), np.arange(9))


# Choice and installation.


def test_auto_is_resident_where_the_set_fits(store, monkeypatch):
    rows = rows_of(store)
    for memory, ranks, expected in ((2 * rows.nbytes, 1, "resident"), (2 * rows.nbytes - 2, 1, "dali"), (2 * rows.nbytes, 2, "dali")):  # fmt: skip
        monkeypatch.setattr(loaders, "available_memory", lambda memory=memory: memory)
        monkeypatch.setattr(dali, "missing", lambda device: None)
        kind, reason = choose("auto", rows.nbytes, CPU, ranks=ranks)
        assert kind == expected and "GiB" in reason
    monkeypatch.setattr(dali, "missing", lambda device: "DALI is not installed")
    kind, reason = choose("auto", rows.nbytes, CPU, ranks=2)
    assert kind == "workers" and "DALI is not installed" in reason
    assert choose("auto", None, CPU)[0] == "workers", "what has no size is streamed"
    assert choose("dali", rows.nbytes, CPU)[0] == "dali"
    with pytest.raises(InputError, match="streamed"):
        loader("resident", JpegRows(), Share(8))


def installed(monkeypatch, *names, error="No module named 'nvidia.dali'"):
    def no_module():
        raise ModuleNotFoundError(error)

    def version(name):
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(dali, "_import", no_module)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.parametrize(("names", "said"), [
    ((), "DALI is not installed: pip install nvidia-dali-cuda130"),
    (("nvidia-dali",), "nvidia-dali that is installed here is an empty stand-in .* pip install nvidia-dali-cuda130 .* nvidia-dali-cuda120"),
    (("nvidia-dali", "nvidia-dali-cuda130"), r"installed \(nvidia-dali-cuda130\) but cannot be imported \(No module"),
])  # fmt: skip
def test_what_to_install(monkeypatch, names, said):
    installed(monkeypatch, *names)
    with pytest.raises(InputError, match=f"--loader dali: .*{said}.*--loader workers"):
        loader("dali", JpegRows(), Share(8))


def test_a_run_that_asks_for_dali_in_vain_writes_nothing(monkeypatch, tmp_path):
    installed(monkeypatch)
    with pytest.raises(InputError, match="DALI is not installed"):
        make_run(tmp_path / "run", "data.loader=dali")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "linux on riscv64" in dali.missing(CPU)


@pytest.mark.parametrize(("built", "driver", "fits"), [
    (13492, (12, 8), False), (13492, (13, 0), True), (12900, (12, 2), True), (12900, (13, 0), True), (13492, None, True),
])  # fmt: skip
def test_dali_for_another_driver(monkeypatch, built, driver, fits):
    class Module:
        __cuda_version__ = built

    installed(monkeypatch)
    monkeypatch.setattr(dali, "_import", lambda: Module)
    monkeypatch.setattr(dali, "driver_cuda", lambda: driver)
    said = dali.missing(torch.device("cuda"))
    assert (said is None) == fits
    if not fits:
        assert (
            "for CUDA 13 and the GPU's driver is for CUDA 12.8" in said
            and "--force-reinstall nvidia-dali-cuda120" in said
        )
    assert dali.missing(CPU) is None, "without a GPU no driver is needed"


# Training.


def losses(path):
    return [row["loss"] for row in read_stats(path)]


@pytest.mark.parametrize("kind", STREAMING)
def test_a_run_does_not_depend_on_the_loader(tmp_path, kind, capsys):
    """Stopped after a checkpoint at an odd image and resumed by another loader."""
    common = (
        "training.batch=9",
        "training.kimg=0.108",
        "training.checkpoint_kimg=0.054",
        "data.xflip=true",
        "data.workers=1",
    )
    for name in ("resident", kind):
        train_here(make_run(tmp_path / name, *common, f"data.loader={name}"))
        assert f"loader {name}: as asked for" in capsys.readouterr().err
    assert losses(tmp_path / "resident") == losses(tmp_path / kind) and len(losses(tmp_path / kind)) == 12
    again = tmp_path / kind
    shutil.rmtree(again / "checkpoints" / "nimg-000000000108")
    config = (again / "config.yaml").read_text()
    (again / "config.yaml").write_text(config.replace(f"loader: {kind}", "loader: auto"))
    train_here(again, resume=True)
    assert "loader resident: the set takes" in capsys.readouterr().err
    assert losses(again) == losses(tmp_path / "resident")


@pytest.mark.slow
@pytest.mark.skipif(no_dali is not None, reason=f"{no_dali}")
def test_the_command_line_trains_the_same_with_every_loader(tmp_path):
    """100 steps on a store: alike to the last bit; with DALI on two ranks within what another order of sums leaves."""
    cli("prepare", "digits", "--out", tmp_path / "store")
    tiny = ["model.model_channels=8", "model.channel_mult=[1,2]", "model.attn_resolutions=[4]", "data.workers=2",
            "training.sample_kimg=0", "training.checkpoint_kimg=0.8"]  # fmt: skip
    common = ["--gpus", 0, "--kimg", 0.8, "--batch", 8, "--noise-seed", 5, *(w for t in tiny for w in ("--set", t))]
    for name in ("resident", "dali", "workers"):
        done = cli("train", "--data", tmp_path / "store", "--out", tmp_path / name, "--loader", name, *common)
        assert f"loader {name}: as asked for" in done.stderr
    found = {name: losses(tmp_path / name) for name in ("resident", "dali", "workers")}
    assert len(found["dali"]) == 100
    assert found["resident"] == found["dali"] == found["workers"]
    two = [a for a in common if a not in ("--gpus", 0)]
    cli("train", "--data", tmp_path / "store", "--out", tmp_path / "two", "--loader", "dali", "--processes", 2, *two)
    assert losses(tmp_path / "two") == pytest.approx(found["dali"], rel=1e-5)


@needs_dali
def test_a_reader_that_fails_says_how_to_go_on(tmp_path):
    run = make_run(tmp_path / "run", "data.loader=dali", "training.kimg=80")

    def cut():
        until = time.monotonic() + 60
        while not (run / "stats.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.truncate(run / "store" / "train" / "images-00000.npy", 300)

    beside = threading.Thread(target=cut)
    beside.start()
    with pytest.raises(ReadError, match=r"was cut short.*resume with: .*train --resume"):
        train_here(run)
    beside.join()


def test_waiting_for_data_is_measured(tmp_path):
    """The time of preparing the next batch, and of a batch that nobody prepared; in stats.jsonl as a share."""
    trainer = Trainer(RunFolder(make_run(tmp_path / "run", "training.kimg=0.08")), World())
    host, delays = trainer.loader.host, iter([0.0, 0.0, 0.3, 0.0, 0.2, 0.4, *[0.0] * 20])
    trainer.loader.host = lambda nimg: time.sleep(next(delays)) or host(nimg)
    waits = [trainer.step(nimg).data_wait for nimg in (0, 8, 16, 800)]
    assert 0 < waits[0] < 0.3 and 0.3 <= waits[1] < 0.5 and 0 < waits[2] < 0.2 and 0.6 <= waits[3] < 0.9
    trainer.train()
    rows = read_stats(tmp_path / "run", timing=True)
    assert len(rows) == 10 and all(0 < row["data_wait"] < 1 for row in rows)


def test_much_waiting_is_said_once(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    monitor = Monitor(folder, nimg=0, total_nimg=1000, device=CPU, sizes={})
    for number, share in enumerate((0.5, 0.05, 0.11, 0.5)):  # the first line's steps had to wait for readers to start
        for k in (-1, 1):
            monitor.step({"nimg": 8 * number + 8, "loss": 1.0, "ambient_share": 0.5, "nonfinite_grads": 0, "tflops": 1.0,
                          "data_wait": share + k * 0.04})  # fmt: skip
        monitor.line()
    monitor.close()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "waiting for data" in line]
    assert "warning: 11% of the last steps' time" in said and "data.workers" in said
