"""Streaming: the order is a function of (seed, position), pictures are a source's, and servers may fail."""

import contextlib
import functools
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastambient.data import downloads, image_id, open_source, streaming
from fastambient.data.loaders import Share
from fastambient.data.shard_index import write_index
from fastambient.data.streaming import ShardStream
from fastambient.data.workers import WorkersLoader
from fastambient.errors import InputError

COUNTS = (7, 3, 11, 1, 5, 8, 2)


def picture(number: int, size: int = 16) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, entries) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def entries(first: int, count: int, labelled: bool = True, size: int = 16):
    for number in range(first, first + count):
        yield f"{number:05d}.png", picture(number, size)
        if labelled:
            yield f"{number:05d}.cls", str(number % 4).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def copied(stream: ShardStream) -> ShardStream:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(stream))  # noqa: S301 - made on the same line


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for i, count in enumerate(COUNTS):
        write_tar(folder / f"s-{i:02d}.tar", entries(first, count))
        first += count
    return folder


@pytest.fixture
def own_shards(tmp_path, shards):
    folder = tmp_path / "own"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


N = sum(COUNTS)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50])
def test_every_sample_once_an_epoch(shards, window):
    stream = ShardStream(shards, seed=5, window=window)
    rows = stream.index(torch.arange(3 * N))
    for epoch in range(3):
        assert torch.sort(rows[epoch * N : (epoch + 1) * N])[0].tolist() == list(range(N))
    assert not torch.equal(rows[:N], rows[N : 2 * N])
    assert not torch.equal(rows, ShardStream(shards, seed=6, window=window).index(torch.arange(3 * N)))


def test_a_window_holds_whole_shards_and_mixes_them(shards):
    rows = ShardStream(shards, seed=1, window=2).index(torch.arange(N))
    shard = np.repeat(np.arange(len(COUNTS)), COUNTS)[rows.numpy()]
    start = 0
    for _ in range(4):
        here = list(dict.fromkeys(shard[start:]))[:2]
        size = sum(COUNTS[s] for s in here)
        assert set(shard[start : start + size]) == set(here)
        start += size
    assert start == N
    assert (np.diff(shard) != 0).sum() > len(COUNTS)  # mixed, not one shard after the other


def test_shards_come_in_another_order_in_each_epoch(shards):
    rows = ShardStream(shards, seed=1, window=1).index(torch.arange(3 * N)).numpy()
    shard = np.repeat(np.arange(len(COUNTS)), COUNTS)[rows].reshape(3, N)
    orders = [tuple(dict.fromkeys(epoch.tolist())) for epoch in shard]
    assert len(set(orders)) == 3 and tuple(range(len(COUNTS))) not in orders
    of_one = [rows[epoch * N : (epoch + 1) * N][shard[epoch] == 2].tolist() for epoch in range(3)]
    assert of_one[0] != of_one[1] != of_one[2]


def test_windows_of_one_size_are_mixed_differently(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", entries(20 * i, 20, labelled=False))
    rows = ShardStream(tmp_path, seed=1, window=1).index(torch.arange(40)) % 20
    assert not torch.equal(rows[:20], rows[20:])


def test_one_shard_is_mixed_differently_in_each_epoch(tmp_path):
    write_tar(tmp_path / "s-00.tar", entries(0, 20))
    rows = ShardStream(tmp_path, seed=1, window=1).index(torch.arange(60)).view(3, 20)
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_order_is_pure(shards):
    """At odd positions, in any order, by any number of ranks, and in another process's copy."""
    every = ShardStream(shards, seed=9, window=3).index(torch.arange(5 * N))
    positions = torch.tensor([4 * N + 1, 3, 2 * N - 1, 2 * N, 0, 17, 3])
    assert torch.equal(ShardStream(shards, seed=9, window=3).index(positions), every[positions])
    stream = copied(ShardStream(shards, seed=9, window=3))
    batch = 12
    for ranks in (1, 4):
        streams = [stream, *(copied(stream) for _ in range(ranks - 1))]
        share = batch // ranks
        seen = [
            one.index(torch.arange(nimg + r * share, nimg + (r + 1) * share))
            for nimg in range(13, 13 + 8 * batch, batch)
            for r, one in enumerate(streams)
        ]
        assert torch.equal(torch.cat(seen), every[13 : 13 + 8 * batch])


def test_memory_of_the_order_is_two_windows(shards):
    stream = ShardStream(shards, seed=9, window=2)
    stream.fetch(stream.index(torch.arange(5 * N)).numpy())
    assert len(stream._windows) == len(stream._orders) == 2 and len(stream._tables) <= 4


@pytest.mark.parametrize("resolution", [None, 9])
def test_samples_are_those_of_a_source(shards, resolution):
    stream = ShardStream(f"{shards}/s-{{00..06}}.tar", seed=2, window=2, resolution=resolution)
    items = list(open_source(shards, resolution=resolution).read())
    index = stream.index(torch.arange(20, 41)).numpy()
    found = stream.fetch(index)
    assert stream.shape == items[0].image.shape and len(stream) == N == len(items)
    for k, row in enumerate(index.tolist()):
        assert np.array_equal(found["images"][k], items[row].image)
        assert found["labels"][k] == items[row].label and found["ids"][k] == image_id(items[row].image)
    assert [i.name for i in stream.read(6, 12)] == [i.name for i in items[6:12]]
    assert stream.fetch(np.zeros(0, np.int64))["images"].shape == (0, *stream.shape)


def test_a_shard_is_looked_through_once_on_a_machine(shards, monkeypatch):
    stream = ShardStream(shards, seed=2)
    expected = stream.fetch(np.arange(N))
    looked: list[Path] = []
    real = streaming.index_shard
    monkeypatch.setattr(streaming, "index_shard", lambda path, *rest: looked.append(path) or real(path, *rest))
    found = copied(stream).fetch(np.arange(N))
    assert not looked and all(np.array_equal(found[name], expected[name]) for name in expected)
    kept = sorted(stream._cache.folder.glob("*-index.npz"))
    assert len(kept) == len(COUNTS)
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(copied(stream).fetch(np.arange(N))["images"], expected["images"]) and len(looked) == 7


def test_without_labels_and_sizes(tmp_path):
    write_tar(tmp_path / "a.tar", [*entries(0, 3, labelled=False), *entries(3, 2, labelled=False, size=20)])
    listed = write_index([tmp_path / "a.tar"], tmp_path / "index.json")
    listed["shards"][0]["images"] += 1
    (tmp_path / "index.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"a.tar holds 5 images, 0 with a label, where its shards.json says 6 of 0"):
        ShardStream(tmp_path / "a.tar", seed=0, resolution=8, index=str(tmp_path / "index.json")).fetch(np.arange(5))
    with pytest.raises(InputError, match="not square or not of one size; pass --resolution R"):
        ShardStream(tmp_path / "a.tar", seed=0)
    stream = ShardStream(tmp_path / "a.tar", seed=0, resolution=8)
    assert set(stream.fetch(np.arange(5))) == {"images", "ids"} and stream.num_classes == 0


def break_picture(path, name: str) -> None:
    with tarfile.open(path) as tar:
        at = tar.getmember(name).offset_data
    data = bytearray(path.read_bytes())
    data[at : at + 64] = bytes(64)
    path.write_bytes(data)


def test_broken_pictures(own_shards, capsys):
    whole = ShardStream(own_shards, seed=3)
    items = list(whole.read())
    for name in ("00012.png", "00013.png", "00020.png"):  # rows 10 .. 20 are shard 2
        break_picture(own_shards / "s-02.tar", name)
    with pytest.raises(InputError, match=r"s-02.tar: 00012.png is no PNG.*--on-bad-image skip"):
        ShardStream(own_shards, seed=3).fetch(np.arange(N))
    stream = ShardStream(own_shards, seed=3, on_bad_image="skip")
    assert torch.equal(stream.index(torch.arange(N)), whole.index(torch.arange(N)))
    for index in (np.array([20, 12, 13, 5]), np.array([13]), np.array([12, 20])):  # alone and together alike
        found = stream.fetch(index)
        for k, row in enumerate(index.tolist()):
            expected = items[{12: 14, 13: 14, 20: 10}.get(row, row)]
            assert np.array_equal(found["images"][k], expected.image) and found["labels"][k] == expected.label
    assert sorted(stream.skipped) == [f"s-02.tar: {n:05d}.png" for n in (12, 13, 20)]
    said = capsys.readouterr().err
    assert said.count("00012.png") == 1 and said.count("00020.png") == 1


def test_a_shard_without_a_sound_picture(own_shards):
    break_picture(own_shards / "s-03.tar", "00021.png")
    with pytest.raises(InputError, match=r"none of the images of .*s-03.tar can be read"):
        ShardStream(own_shards, seed=3, on_bad_image="skip").fetch(np.array([21]))


def test_changed_shards(own_shards):
    ShardStream(own_shards, seed=0)
    listed = json.loads((own_shards / "shards.json").read_text())
    assert [shard["images"] for shard in listed["shards"]] == list(COUNTS) and listed["classes"] == 4
    path = own_shards / "s-04.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-700])
    with pytest.raises(InputError, match=r"s-04.tar has .* bytes, where its shards.json says"):
        ShardStream(own_shards, seed=0).fetch(np.arange(N))
    listed["shards"][4]["bytes"] = len(data) - 700 - 12000
    path.write_bytes(data[: len(data) - 700 - 12000])
    (own_shards / "shards.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"cut short|no tar file"):
        ShardStream(own_shards, seed=0).fetch(np.arange(N))
    path.write_bytes(data)
    listed["shards"][4] |= {"bytes": len(data), "images": 6}
    (own_shards / "shards.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"s-04.tar holds 5 images, 5 with a label, where its shards.json says 6"):
        ShardStream(own_shards, seed=0).fetch(np.arange(N))
    (own_shards / "s-07.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"shards.json does not list s-07.tar"):
        ShardStream(own_shards, seed=0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "no list of shards of this version"),
        ({"channels": 2}, "channels must be 1 or 3"),
        ({"resolution": "big"}, "resolution must be pixels or null"),
        ({"classes": -1}, "classes must be"),
        ({"shards": []}, "shards must be a list"),
        ({"shards": [{"name": "../s.tar", "images": 1, "bytes": 5}]}, "with a relative name"),
        ({"shards": [{"name": "s.tar", "images": True, "bytes": 5}]}, "a shard must be"),
        ({"shards": [{"name": "s.tar", "images": 1, "bytes": 5, "sha256": "x"}]}, "a shard must be"),
    ],
)
def test_broken_index(own_shards, change, expected):
    ShardStream(own_shards, seed=0)
    file = own_shards / "shards.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=expected):
        ShardStream(own_shards, seed=0)
    file.write_text("{")
    with pytest.raises(InputError, match="no valid JSON"):
        ShardStream(own_shards, seed=0)


def test_links_and_names_that_leave(tmp_path):
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        tar.addfile(link)
    with pytest.raises(InputError, match="a link to '/etc/passwd'"):
        ShardStream(tmp_path / "link.tar", seed=0)
    write_tar(tmp_path / "up.tar", [("../a.png", picture(0))])
    with pytest.raises(InputError, match="unsafe name"):
        ShardStream(tmp_path / "up.tar", seed=0)


@pytest.mark.parametrize("spec", ["file:///etc/s.tar", "pipe:cat s.tar", "ftp://host/s.tar", "s3://bucket/s.tar"])
def test_other_addresses(spec):
    with pytest.raises(InputError, match="only http:// and https:// addresses are streamed"):
        ShardStream(spec, seed=0)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"there is no \.tar in"):
        ShardStream(tmp_path, seed=0)
    with pytest.raises(InputError, match=r"b-1\.tar of the pattern .* does not exist"):
        ShardStream(tmp_path / "b-{1..3}.tar", seed=0)
    with pytest.raises(InputError, match="cannot be searched"):
        ShardStream("http://localhost/*.tar", seed=0)
    with pytest.raises(InputError, match="at least 1 shard"):
        ShardStream(tmp_path, seed=0, window=0)


@pytest.mark.slow
def test_by_processes(shards):
    """The workers loader gives what the stream says, from any position on and for any rank."""
    stream = ShardStream(shards, seed=7, window=2)
    for rank, ranks, nimg in ((0, 1, 5), (1, 2, 29)):
        share = Share(6, rank, ranks)
        loader = WorkersLoader(stream, share, seed=1, device="cpu", xflip=False, workers=2)
        for step in range(nimg, nimg + 24, 6):
            fields = loader.host(step)
            expected = stream.fetch(stream.index(share.positions(step)).numpy())
            assert all(np.array_equal(fields[name].numpy(), expected[name]) for name in expected)
        loader.close()


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults`: name -> what happens to the next requests of it, one each."""

    def __init__(self, folder) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.faults: dict[str, list] = {}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Drip(float):
    """A fault: seconds between the first bytes of a file, which does not end."""


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        if fault is None:
            return super().do_GET()
        if isinstance(fault, int):
            return self.send_error(fault)
        if isinstance(fault, str):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return None
        self.send_response(200)
        if isinstance(fault, Drip):
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has had enough
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(fault)
            return None
        if isinstance(fault, bytes):  # another file, served well
            self.send_header("Content-Length", str(len(fault)))
            self.end_headers()
            self.wfile.write(fault)
            return None
        data = fault(Path(self.translate_path(self.path)).read_bytes())
        self.send_header("Content-Length", str(os.path.getsize(self.translate_path(self.path))))
        self.end_headers()
        self.wfile.write(data)
        return None


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(downloads, "_PAUSE", 0.001)
    write_index(sorted(shards.glob("*.tar")), shards / "shards.json")
    with Server(shards) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def remote(server, tmp_path, **options) -> ShardStream:
    return ShardStream(server.address + "/s-{00..06}.tar", seed=4, window=2, cache=tmp_path / "cache", **options)


def test_urls(server, shards, tmp_path):
    stream = remote(server, tmp_path)
    local = ShardStream(shards, seed=4, window=2)
    index = stream.index(torch.arange(2 * N)).numpy()
    assert np.array_equal(index, local.index(torch.arange(2 * N)).numpy())
    found, expected = copied(stream).fetch(index), local.fetch(index)
    assert all(np.array_equal(found[name], expected[name]) for name in ("images", "ids", "labels"))
    stream._ahead.join()
    assert sorted(server.asked) == sorted(["shards.json", *(f"s-{i:02d}.tar" for i in range(7))])  # each once
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    assert remote(server, tmp_path).fingerprint(0, N) == stream.fingerprint(0, N)


def test_the_next_window_is_downloaded_ahead(server, tmp_path):
    stream = remote(server, tmp_path)
    stream.index(torch.tensor([0]))
    stream._ahead.join()
    assert len(server.asked) == 1 + 4


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]


@pytest.mark.parametrize("fault", [cut, flipped, 503, 429], ids=["cut", "flipped", "503", "429"])
def test_a_server_that_fails_for_a_while(server, shards, tmp_path, fault):
    server.faults["s-02.tar"] = [fault, fault]
    stream = remote(server, tmp_path)
    images = stream.fetch(np.arange(N))["images"]
    assert np.array_equal(images, ShardStream(shards, seed=4).fetch(np.arange(N))["images"])
    assert server.asked.count("s-02.tar") == 3


@pytest.mark.parametrize(
    ("fault", "expected", "tries"),
    [
        (cut, "cut off|came, expected|IncompleteRead", 5),
        (flipped, "its SHA-256 begins with", 5),
        (b"another file", r"12 bytes came, expected [\d,]+,", 5),
        (500, "answers 500 .*the last of 5 tries", 5),
        (404, "answers 404", 1),
        ("file:///etc/passwd", "'file:///etc/passwd' is not allowed", 1),
        ("ftp://127.0.0.1/x", "redirects to ftp:", 1),
    ],
    ids=["cut", "flipped", "shorter", "500", "404", "to-file", "to-ftp"],
)
def test_a_server_that_keeps_failing(server, tmp_path, fault, expected, tries):
    server.faults["s-02.tar"] = [fault] * 9
    with pytest.raises(InputError, match=rf"s-02.tar cannot be downloaded: .*({expected})"):
        remote(server, tmp_path).fetch(np.array([12]))
    assert server.asked.count("s-02.tar") == tries
    assert not list((tmp_path / "cache").glob("*s-02*")) and not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_server_that_drips(server, tmp_path, monkeypatch):
    """A byte now and then is within the time-out of a socket for ever: given up after twice that, not at the end."""
    for name, value in (("_TIMEOUT", 0.5), ("_TRIES", 2)):
        monkeypatch.setattr(downloads, name, value)
    server.faults["s-02.tar"] = [Drip(0.03), Drip(0.03)]
    with pytest.raises(InputError, match=r"s-02\.tar cannot .*: only \d\d? bytes came in \d s, the last of 2 tries"):
        remote(server, tmp_path).fetch(np.array([12]))
    assert server.asked.count("s-02.tar") == 2


def test_another_index(server, shards, tmp_path):
    """A file that is larger than its index says is not read on."""
    listed = json.loads((shards / "shards.json").read_text())
    listed["shards"][2]["bytes"] -= 1
    (tmp_path / "index.json").write_text(json.dumps(listed))
    stream = remote(server, tmp_path, index=str(tmp_path / "index.json"))
    with pytest.raises(InputError, match=r"s-02.tar cannot be downloaded: it has more than [\d,]+ bytes"):
        stream.fetch(np.array([12]))
    assert server.asked == ["s-02.tar"]
    with pytest.raises(InputError, match=r"nothing.json cannot be read"):
        remote(server, tmp_path, index=str(tmp_path / "nothing.json"))


def test_no_index_behind_an_address(server, tmp_path):
    server.faults["shards.json"] = [404]
    with pytest.raises(InputError, match=r"answers 404 .*; http.* is streamed by a list of its shards"):
        remote(server, tmp_path)


@pytest.mark.parametrize(
    "old, new, followed",
    [
        ("https://a/x", "https://b/x", True),
        ("http://a/x", "https://a/x", True),
        ("https://a/x", "http://a/x", False),
        ("http://a/x", "file:///etc/passwd", False),
        ("http://a/x", "ftp://a/x", False),
    ],
)
def test_redirections(old, new, followed):
    """Never to another kind of address, nor from an encrypted one to one that is not."""
    request = urllib.request.Request(old)
    if followed:
        assert downloads._Redirect().redirect_request(request, None, 302, "", {}, new).full_url == new
    else:
        with pytest.raises(downloads._Gone, match="not followed"):
            downloads._Redirect().redirect_request(request, None, 302, "", {}, new)


def test_bounded_cache(server, tmp_path):
    with pytest.raises(InputError, match=r"two windows of 2 shards take .* above the 1,000 of the cache"):
        remote(server, tmp_path, cache_bytes=1000)
    stream = remote(server, tmp_path)
    limit = sum(sorted((shard.bytes for shard in stream.shards), reverse=True)[:4])
    stream = remote(server, tmp_path, cache_bytes=limit)
    for start in range(0, 2 * N, 5):
        stream.fetch(stream.index(torch.arange(start, start + 5)).numpy())
        held = 0
        for path in list((tmp_path / "cache").glob("*.tar")):
            with contextlib.suppress(FileNotFoundError):  # the stream reads ahead and tidies meanwhile
                held += path.stat().st_size
        assert 0 < held <= limit
    assert len(server.asked) > 8


def test_leftovers_of_a_killed_process(server, tmp_path):
    stream = remote(server, tmp_path)
    path = stream._path(0)
    path.unlink()
    left = path.with_name(f".{path.name}.0123abcd.tmp")
    left.write_bytes(b"half")
    assert stream._path(0) == path and not left.exists()


def test_a_shard_that_is_tidied_away_before_it_is_opened(server, tmp_path, monkeypatch):
    """Another thread or process may need the room between a look and the opening: the shard is downloaded again."""
    stream = remote(server, tmp_path)
    original, gone = stream._path, []

    def tidied(number):
        path = original(number)
        if len(gone) < most:
            gone.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(stream, "_path", tidied)
    most = 3
    assert len(stream.fetch(np.arange(2))["images"]) == 2 and len(gone) == 3
    most = 100
    with pytest.raises(InputError, match="cannot be read"):
        stream.fetch(np.arange(2))
    assert len(gone) == 8  # given up, in the end
