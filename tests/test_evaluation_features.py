"""The feature cache: what has changed misses it, what has not hits it, and a damaged file is never believed."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch

from fastambient.errors import InputError
from fastambient.evaluation import features as module
from fastambient.evaluation.embedders import Embedder
from fastambient.evaluation.features import default_cache, features


class Counting(Embedder):
    """Means of channels, and how many pictures it was asked for."""

    def __init__(self, weights="w", preprocess="p", factor=1.0):
        self.pictures = 0
        super().__init__("counting", self.means, preprocess=preprocess, weights=weights, label="counting")
        self.factor = factor

    def means(self, x):
        self.pictures += len(x)
        return x.float().mean((2, 3)) * self.factor


def images(n=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 6), dtype=np.uint8)


def test_what_has_not_changed_hits(tmp_path):
    embedder, done = Counting(), []
    first = features(images(), embedder, cache=tmp_path / "a" / "b", batch=2, on_batch=done.append)
    assert done == [2, 2, 1] and embedder.pictures == 5 and first.dtype == np.float32
    again = Counting()
    found = features(images(), again, cache=tmp_path / "a" / "b", on_batch=done.append)
    assert again.pictures == 0 and np.array_equal(found, first) and done[3:] == [5] and found.flags.writeable
    np.testing.assert_allclose(first, images().mean((2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "embedder"),
    [
        (
            lambda x: np.bitwise_xor(x, np.uint8(1), where=np.arange(x.size).reshape(x.shape) == 77, out=x.copy()),
            Counting(),
        ),
        (lambda x: x[::-1], Counting()),
        (lambda x: x.reshape(5, 3, 6, 4), Counting()),
        (lambda x: x[:4], Counting()),
        (lambda x: x, Counting(weights="v")),
        (lambda x: x, Counting(preprocess="q")),
    ],
    ids=["one pixel", "order", "shape", "fewer", "weights", "preprocessing"],
)
def test_what_has_changed_misses(changed, embedder, tmp_path):
    features(images(), Counting(), cache=tmp_path)
    x = changed(images())
    found = features(x, embedder, cache=tmp_path)
    assert embedder.pictures == len(x)
    np.testing.assert_allclose(found, x.mean((2, 3)), rtol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_view_in_another_layout_is_the_same_pictures(tmp_path):
    features(images(), Counting(), cache=tmp_path)
    embedder = Counting()
    features(np.asfortranarray(images()), embedder, cache=tmp_path)
    assert embedder.pictures == 0


def damage(data: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "cut":
        return data[:-3]
    if how == "bit":
        return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    return b"no such format"


@pytest.mark.parametrize("how", ["empty", "cut", "bit", "text", "folder", "renamed", "rows"])
def test_a_damaged_file_is_computed_anew_and_replaced(how, tmp_path):
    first = features(images(), Counting(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if how == "renamed":
        features(images(seed=1), Counting(), cache=tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        file.write_bytes(other.read_bytes())
    elif how == "rows":
        module._write(file, first[:4])
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(damage(whole, how))
    embedder = Counting()
    assert np.array_equal(features(images(), embedder, cache=tmp_path), first) and embedder.pictures == 5
    if how != "folder":
        assert file.read_bytes() == whole


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path):
    results: list[np.ndarray] = []

    def work():
        results.append(features(images(), Counting(), cache=tmp_path))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(np.array_equal(x, results[0]) for x in results)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        features(images(), Counting(), cache=tmp_path / "file")
    assert capsys.readouterr().err.count("features are not kept") == 1


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path, monkeypatch):
    import os

    for seed in range(3):
        features(images(seed=seed), Counting(), cache=tmp_path)
    files = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    for age, file in enumerate(files):
        os.utime(file, (1000 + age, 1000 + age))
    mine = tmp_path / "mine.safetensors"
    mine.write_text("somebody's")
    features(images(seed=0), Counting(), cache=tmp_path)  # used again
    monkeypatch.setattr(module, "LIMIT", 3 * files[0].stat().st_size)
    features(images(seed=3), Counting(), cache=tmp_path)
    asked = []
    for seed in (0, 2, 3, 1):
        embedder = Counting()
        features(images(seed=seed), embedder, cache=tmp_path)
        asked.append(embedder.pictures)
    assert asked == [0, 0, 0, 5] and mine.read_text() == "somebody's"


def test_a_read_only_array_in_a_file_is_read_without_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", images())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = features(x, Counting(), batch=5)
    np.testing.assert_allclose(found, images().mean((2, 3)), rtol=1e-6)


def test_bad_input_is_refused():
    for x, message in ((images()[:0], "0 pictures"), (images().astype(np.float32), "expected uint8")):
        with pytest.raises(InputError, match=message):
            features(x, Counting())
    with pytest.raises(InputError, match="batch is 0"):
        features(images(), Counting(), batch=0)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTAMBIENT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "own" / "features"
    monkeypatch.delenv("FASTAMBIENT_CACHE")
    assert default_cache() == tmp_path / "xdg" / "fastambient" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "fastambient" / "features"


def test_gradients_are_not_kept():
    embedder = Counting(factor=torch.ones(3, requires_grad=True))
    assert isinstance(features(images(), embedder), np.ndarray)
