"""Preparing a store: on several cores, after a kill, twice at once, in bounded memory, with text; and hand-outs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastambient.cli import app
from fastambient.data import Store, image_id, image_ids, open_source, preparation, prepare
from fastambient.data import decoding as decoding_module
from fastambient.data.handout import noised_by_system, system_normal
from fastambient.data.text import line_offsets, write_lines
from fastambient.errors import FastambientError, InputError
from fastambient.files import sha256_file
from fastambient.pictures import save_png

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (120, 3, 8, 8), dtype=np.uint8)


def content(store: Path) -> dict[str, str]:
    return {p.relative_to(store).as_posix(): sha256_file(p) for p in store.rglob("*") if p.is_file()}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(decoding_module, "_CHUNK_ROWS", (16, 16))


@pytest.fixture
def folder(tmp_path):
    """120 pictures in two classes, every third with a caption."""
    path = tmp_path / "photos"
    for i, image in enumerate(IMAGES):
        file = path / "ab"[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
        if i % 3 == 0:
            file.with_suffix(".txt").write_text(f"picture {i}: ünïcode\n", encoding="utf-8")
    return path


KILLED = """
import os, signal, sys
from fastambient.data import decoding, open_source, prepare, shards
import fastambient.data.preparation as preparation

decoding._CHUNK_ROWS = (16, 16)
module, name, calls = {where!r}.split(":")
module, seen = {{"decoding": decoding, "preparation": preparation}}[module], []
original = getattr(module, name)

def counted(*arguments, **keywords):
    seen.append(1)
    if len(seen) > int(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)

setattr(module, name, counted)
prepare(open_source({source!r}), {out!r}, sigma_tn=0.3, noisy="float16", shard_bytes=16 * 192, split_seed=4)
"""


@pytest.mark.parametrize("where", ["decoding:write_bytes:3", "preparation:write_npy:5", "preparation:write_npy:9"])
def test_goes_on_after_a_kill(tmp_path, folder, where, small_chunks, monkeypatch):
    """Killed in the middle of decoding, of images and of noised images: what is whole is not made again, and the store
    is the one that an undisturbed call makes, with one noise seed throughout."""
    out = tmp_path / "store"
    program = KILLED.format(where=where, source=str(folder), out=str(out))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = tmp_path / ".store.preparing"
    assert work.is_dir() and not out.exists()
    seed = (work / "noise_seed").read_text()
    chunks = {p.name: p.stat().st_mtime_ns for p in work.glob("chunk-*.npy") if p.with_suffix(".npz").exists()}
    assert chunks

    read = []
    original = type(open_source(folder)).read
    monkeypatch.setattr(type(open_source(folder)), "read", lambda self, *a: read.append(a) or original(self, *a))
    options = {"sigma_tn": 0.3, "noisy": "float16", "shard_bytes": 16 * 192, "split_seed": 4}
    store = prepare(open_source(folder), out, **options)
    assert len(read) == 8 - len(chunks)  # chunks of 16
    assert not work.exists() and (out / "noise_seed").read_text() == seed
    undisturbed = prepare(open_source(folder), tmp_path / "other", noise_seed=store.noise_seed, **options)
    assert content(store.path) == content(undisturbed.path)


def test_a_line_of_the_journal_that_a_kill_cut_off(tmp_path, folder, small_chunks, monkeypatch):
    """Cut off twice: what the second try appends must not continue the first one's half line."""
    out, options = tmp_path / "store", {"sigma_tn": 0.3, "noisy": "float16", "shard_bytes": 16 * 192, "split_seed": 4}
    for calls in (5, 8):
        program = KILLED.format(where=f"preparation:write_npy:{calls}", source=str(folder), out=str(out))
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
        journal = tmp_path / ".store.preparing" / "journal.jsonl"
        journal.write_text(journal.read_text() + '["train/images-0')
    store = prepare(open_source(folder), out, **options)
    undisturbed = prepare(open_source(folder), tmp_path / "other", noise_seed=store.noise_seed, **options)
    assert content(store.path) == content(undisturbed.path)


def test_another_request_after_a_kill_is_another_store(tmp_path, folder, small_chunks):
    out = tmp_path / "store"
    program = KILLED.format(where="preparation:write_npy:9", source=str(folder), out=str(out))
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    options = {"sigma_tn": 0.5, "noisy": "float32", "split_seed": 5, "noise_seed": 9}
    store = prepare(open_source(folder), out, **options)
    assert content(out) == content(prepare(open_source(folder), tmp_path / "other", **options).path)
    assert store.noise_seed == 9


def test_a_changed_picture_is_decoded_again_after_a_kill(tmp_path, folder, small_chunks):
    out = tmp_path / "store"
    program = KILLED.format(where="decoding:write_bytes:7", source=str(folder), out=str(out))
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    Image.fromarray(IMAGES[0].transpose(1, 2, 0) ^ 255).save(folder / "a" / "000.png")
    store = prepare(open_source(folder), out, holdout=0)
    assert image_id(IMAGES[0] ^ 255) in store.train.ids and image_id(IMAGES[0]) not in store.train.ids
    # And a scratch file that rotted is not believed.
    os.rename(out, tmp_path / "first")
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    chunk = tmp_path / ".store.preparing" / "chunk-000000000000.npy"
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    again = prepare(open_source(folder), out, holdout=0)
    assert np.array_equal(image_ids(again.train.images[:]).numpy(), store.train.ids)


def test_a_shard_that_rotted_after_a_kill_is_written_again(tmp_path, folder, small_chunks):
    out, options = tmp_path / "store", {"sigma_tn": 0.3, "noisy": "float16", "shard_bytes": 16 * 192, "split_seed": 4}
    program = KILLED.format(where="preparation:write_npy:9", source=str(folder), out=str(out))
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    shard = tmp_path / ".store.preparing" / "new" / "train" / "images-00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    store = prepare(open_source(folder), out, **options)
    assert np.array_equal(image_ids(store.train.images[:]).numpy(), store.train.ids)
    Store.open(out)


def test_a_store_made_by_somebody_else_meanwhile_stays(tmp_path, folder, monkeypatch):
    import fastambient.data.preparation as preparation

    original = preparation.decode

    def slow(*arguments, **keywords):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "theirs").write_text("kept")
        return original(*arguments, **keywords)

    monkeypatch.setattr(preparation, "decode", slow)
    with pytest.raises(InputError, match="exists and is not empty"):
        prepare(open_source(folder), tmp_path / "store")
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["theirs"]


def test_workers_make_the_same_store(tmp_path, folder, small_chunks, monkeypatch):
    monkeypatch.setattr(decoding_module, "_ALONE", 10)
    serial = prepare(open_source(folder), tmp_path / "serial", noise_seed=1, sigma_tn=0.1, noisy="float16")
    parallel = prepare(
        open_source(folder), tmp_path / "parallel", noise_seed=1, sigma_tn=0.1, noisy="float16", workers=2
    )
    assert content(serial.path) == content(parallel.path)


def test_a_bad_picture_in_a_worker_is_named(tmp_path, folder, small_chunks, monkeypatch, capsys):
    monkeypatch.setattr(decoding_module, "_ALONE", 10)
    bad = folder / "b" / "031.png"
    bad.write_bytes(bad.read_bytes()[:90])
    with pytest.raises(InputError, match=r"031\.png"):
        prepare(open_source(folder), tmp_path / "store", workers=2)
    assert not (tmp_path / "store").exists()
    store = prepare(open_source(folder, on_bad_image="skip"), tmp_path / "store", workers=2, holdout=20)
    assert (
        store.manifest["counts"] == {"images": 119, "skipped": 1}
        and "1 of 120 images were skipped" in capsys.readouterr().err
    )


def test_two_at_once(tmp_path, folder):
    program = f"""
import time, fastambient.data.preparation as preparation
from fastambient.data import open_source, prepare
original = preparation.decode
def slow(*arguments, **keywords):
    print("there", flush=True)
    time.sleep(60)
preparation.decode = slow
prepare(open_source({str(folder)!r}), {str(tmp_path / "store")!r})
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "there\n"
        with pytest.raises(InputError, match=r"another process is preparing .*store"):
            prepare(open_source(folder), tmp_path / "store")
    finally:
        other.kill()
        other.wait()
    assert len(prepare(open_source(folder), tmp_path / "store").train) == 108  # the lock went with its process


def test_a_full_disk_keeps_what_is_decoded_and_says_so(tmp_path, folder, small_chunks, monkeypatch):
    import fastambient.data.preparation as preparation

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding_module, "_WORTH_KEEPING", 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_npy", full)
        with pytest.raises(FastambientError, match="No space left on device; run the same command again to go on"):
            prepare(open_source(folder), tmp_path / "store")
    assert len(list((tmp_path / ".store.preparing").glob("chunk-*.npz"))) == 8
    prepare(open_source(folder), tmp_path / "store")
    assert not (tmp_path / ".store.preparing").exists()


def test_text_travels_with_its_picture(tmp_path, folder):
    store = prepare(open_source(folder), tmp_path / "store", holdout=20)
    by_id = {image_id(image): i for i, image in enumerate(IMAGES)}
    for side in (store.train, store.holdout):
        assert len(side.texts) == len(side)
        for row, id_ in enumerate(side.ids):
            i = by_id[id_]
            assert side.texts[row] == ({"txt": f"picture {i}: ünïcode\n"} if i % 3 == 0 else {})
    with pytest.raises(IndexError):
        store.train.texts[len(store.train)]
    without = prepare(open_source(folder), tmp_path / "without", captions=False)
    assert without.train.texts is None and not list(without.path.rglob("text*"))
    data = (store.path / "train/text.jsonl").read_bytes()
    (store.path / "train/text.jsonl").write_bytes(data.replace(b"{", b"[", 1))
    with pytest.raises(InputError, match=r"text\.jsonl: line 1 is damaged"):
        Store.open(store.path, verify=False).train.texts[0]


def test_every_image_keeps_its_name(tmp_path, folder):
    source = open_source(folder)
    called = {image_id(item.image): item.name for item in source.read()}
    store = prepare(source, tmp_path / "store", holdout=20)
    for side in (store.train, store.holdout):
        assert list(side.names) == [called[i] for i in side.ids.tolist()] and side.names[1:3] == list(side.names)[1:3]
    with pytest.raises(IndexError):
        store.train.names[len(store.train)]
    data = (store.path / "train/names.jsonl").read_bytes()
    (store.path / "train/names.jsonl").write_bytes(b"[" + data[1:-2] + b"]\n")
    with pytest.raises(InputError, match=r"names\.jsonl: line 1 is damaged .*; prepare the store again"):
        Store.open(store.path, verify=False).train.names[0]
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "names" not in name}
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    for file in store.path.rglob("names*"):
        file.unlink()
    assert Store.open(store.path).train.names is None, "a store of an older program"


def test_a_picture_in_two_classes_is_a_warning(tmp_path, capsys):
    for name in ("cats", "dogs"):
        (tmp_path / "p" / name).mkdir(parents=True)
    for i, image in enumerate(IMAGES[:12]):
        for name in ("cats", "dogs") if i in (3, 5) else ("cats",):
            save_png(tmp_path / "p" / name / f"{i}.png", image)
    prepare(open_source(tmp_path / "p"), tmp_path / "store", dedup="off")
    told = capsys.readouterr().err
    assert "2 pictures lie in more than one class, as copies of each other (cats/" in told and "and dogs/" in told
    shutil.copy(tmp_path / "p" / "cats" / "1.png", tmp_path / "p" / "cats" / "1 copy.png")
    for i in (3, 5):
        (tmp_path / "p" / "dogs" / f"{i}.png").unlink()
    save_png(tmp_path / "p" / "dogs" / "20.png", IMAGES[20])
    prepare(open_source(tmp_path / "p"), tmp_path / "one", dedup="off")
    assert "more than one class" not in capsys.readouterr().err


def test_offsets_are_where_lines_begin(tmp_path):
    lines = [{}, {"txt": "ü" * 5_000_000}, {"txt": "a\nb"}, {"txt": "x" * 9_000_000}]  # longer than a block together
    written = write_lines(tmp_path / "text.jsonl", lines)
    offsets = line_offsets(tmp_path / "text.jsonl")
    data = (tmp_path / "text.jsonl").read_bytes()
    assert offsets[0] == 0 and offsets[-1] == written.bytes == len(data) and len(offsets) == 5
    assert [json.loads(data[a:b]) for a, b in itertools.pairwise(offsets)] == lines
    assert all(data[end - 1 : end] == b"\n" for end in offsets[1:])


def test_a_shard_that_the_manifest_does_not_know(tmp_path, folder):
    store = prepare(open_source(folder), tmp_path / "store")
    np.save(store.path / "train" / "images-00001.npy", IMAGES[:3])
    with pytest.raises(InputError, match=r"images-00001\.npy is not in the store's manifest: it was added later"):
        Store.open(store.path, verify=False)


def test_check(tmp_path, folder):
    store = prepare(open_source(folder), tmp_path / "store")

    def check(*more):
        command = [sys.executable, "-m", "fastambient", "prepare", "--check", str(store.path), *more]
        return subprocess.run(command, capture_output=True, text=True)

    done = check()
    assert (
        done.returncode == 0
        and "108 training and 12 held-out images" in done.stdout
        and "2 classes" in done.stdout
        and "as the manifest says" in done.stdout
    )
    file = store.path / "train" / "images-00000.npy"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    done = check()
    assert done.returncode == 2 and "images-00000.npy has another checksum" in done.stderr and not done.stdout
    assert check("--out", "x").returncode == 2
    (store.path / "manifest.json").unlink()
    with pytest.raises(
        InputError, match=r"is no store: manifest\.json .*; name a folder that prepare made, or restore"
    ):
        Store.open(store.path)


def test_hand_out(tmp_path, folder):
    """x_n of the asked level with noise that nobody can make again, and nothing else of a picture but its class."""
    original = image_ids(IMAGES).tolist()
    store = prepare(open_source(folder), tmp_path / "store", hand_out=True, sigma_tn=0.5, noisy="float32")
    assert store.hand_out and store.train.images is None and store.train.texts is None and len(store.train) == 120
    assert not {int(i) for i in store.train.ids} & set(original) and len(set(store.train.ids.tolist())) == 120
    on_disk = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*") if p.is_file()}
    sides = {f"{side}/{name}.npy" for side in ("train", "holdout") for name in ("ids", "labels")}
    assert on_disk == {*sides, "train/noisy-00000.npy", "manifest.json"}
    assert "photos" not in json.dumps(store.manifest) and "seed" not in json.dumps(store.manifest)
    assert store.sigma_data == round(store.sigma_data, 2), "all digits are a sum over clean pixels"

    x_n = torch.from_numpy(store.train.noisy[:])
    x0 = torch.from_numpy(IMAGES).float() / 127.5 - 1
    nearest = torch.cdist(x_n.flatten(1).double(), x0.flatten(1).double()).argmin(1)
    in_the_source = [*range(0, 120, 2), *range(1, 120, 2)]  # its folders are a and b
    assert sorted(nearest.tolist()) == list(range(120)) and nearest.tolist() != in_the_source
    eps = (x_n - x0[nearest]) / 0.5
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.02
    labels = torch.tensor([i % 2 for i in range(120)])[nearest]
    assert torch.equal(torch.from_numpy(store.train.labels), labels)

    again = prepare(
        open_source(folder), tmp_path / "again", hand_out=True, sigma_tn=0.5, noisy="float32", captions=True
    )
    assert not set(again.train.ids.tolist()) & set(store.train.ids.tolist())
    assert not np.allclose(np.sort(again.train.noisy[:].ravel()), np.sort(store.train.noisy[:].ravel()))
    nearest = torch.cdist(torch.from_numpy(again.train.noisy[:]).flatten(1).double(), x0.flatten(1).double()).argmin(1)
    for row, i in enumerate(nearest.tolist()):
        assert again.train.texts[row] == ({} if i % 3 else {"txt": f"picture {i}: ünïcode\n"})


def test_a_hand_out_holds_one_of_each_picture(tmp_path):
    """Two noises on one picture are one of half the variance."""
    np.save(tmp_path / "set.npy", np.concatenate([IMAGES[:10], IMAGES[:4], IMAGES[:3, :, :, ::-1]]))
    store = prepare(open_source(tmp_path / "set.npy"), tmp_path / "store", hand_out=True, sigma_tn=0.5, noisy="float16")
    assert len(store.train) == 10
    fewer = prepare(
        open_source(tmp_path / "set.npy"), tmp_path / "fewer", hand_out=True, sigma_tn=0.5, noisy="float16", train=6
    )
    assert fewer.manifest["counts"] == {"images": 6}, "how many pictures there are beside these is nobody's business"


def test_the_last_bits_of_a_hand_out_say_nothing_of_a_pixel():
    """Summed in float32, what lies near 0 would be a multiple of 2^-24 where the pixel is bright or dark."""
    dark = noised_by_system(np.full((40, 1, 64, 64), 13, np.uint8), 0.5)
    near_zero = dark[np.abs(dark) < 2**-6].astype(np.float64)
    assert len(near_zero) > 100
    assert (near_zero * 2**24 % 1 == 0).mean() < 0.1


def test_what_a_hand_out_gives_away_is_told(tmp_path, folder, capsys):
    """Its class names, and what a second one would give away."""
    words = ["prepare", str(folder), "--out", str(tmp_path / "s"), "--hand-out", "--sigma-tn", "0.5"]
    app(args=words, standalone_mode=False)
    said = capsys.readouterr()
    assert "class labels are handed out, too: a, b" in said.out
    assert "warning: hand these pictures out once" in said.err and "average the two noises out" in said.err
    prepare(open_source(folder), tmp_path / "ordinary", sigma_tn=0.5, noisy="float16")
    assert "hand these pictures out" not in capsys.readouterr().err


def test_stopped_by_a_signal(tmp_path, folder, monkeypatch, capsys):
    """What is left behind is said, also where nothing is."""

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_write", stop)
    for kept, said in ((False, "nothing was left behind"), (True, "run the same command again to go on")):
        monkeypatch.setattr(preparation, "has_progress", lambda folder, kept=kept: kept)
        with pytest.raises(KeyboardInterrupt):
            prepare(open_source(folder), tmp_path / "store")
        assert said in capsys.readouterr().err and (tmp_path / ".store.preparing").exists() == kept


def test_check_looks_at_the_noise_seed(tmp_path, folder):
    """It has no checksum, since that would give it away: x_n says whether it is the one."""
    store = prepare(open_source(folder), tmp_path / "store", sigma_tn=0.5, noisy="float16", noise_seed=7)
    store.check_noise()
    (store.path / "noise_seed").write_text(f"{8:016x}\n")
    with pytest.raises(InputError, match="noise_seed is not the seed"):
        Store.open(store.path).check_noise()
    (store.path / "noise_seed").unlink()
    with pytest.raises(InputError, match="noise_seed cannot be read"):
        Store.open(store.path).check_noise()
    with pytest.raises(InputError, match="noise_seed cannot be read"):
        app(args=["prepare", "--check", str(store.path)], standalone_mode=False)
    hand_out = prepare(open_source(folder), tmp_path / "h", sigma_tn=0.5, noisy="float16", hand_out=True)
    hand_out.check_noise()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"noisy": "none"}, "pass --noisy float16"),
        ({"sigma_tn": 0.0}, "--sigma-tn S > 0"),
        ({"noise_seed": 5}, "drop --noise-seed"),
        ({"holdout": 5}, "drop --holdout 5"),
    ],
)
def test_what_a_hand_out_cannot_hold(tmp_path, folder, options, words):
    with pytest.raises(InputError, match=words):
        prepare(open_source(folder), tmp_path / "s", hand_out=True, **{"sigma_tn": 0.5, "noisy": "float16"} | options)


def test_system_noise_is_normal():
    z = system_normal((101, 999)).double()
    assert z.shape == (101, 999)
    assert abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.03 and abs((z**4).mean() - 3) < 0.15
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 0.02 and abs((z[1:] * z[:-1]).mean()) < 0.02
    assert not torch.equal(z, system_normal((101, 999)))


def test_preparing_does_without_triton():
    """It takes 90 MB of the 1 GB that `prepare` may take."""
    program = "import sys, fastambient.cli.training, fastambient.data.preparation as p; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


MEMORY = """
import sys
from fastambient.data import open_source, prepare
from fastambient.system import peak_resident

prepare(open_source(sys.argv[1]), sys.argv[2], sigma_tn=0.75, noisy="float32", force=True, dedup="off")
print(peak_resident() >> 20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path):
    """30,000 pictures are 92 MB, and 369 MB of float32 noised copies."""
    used = []
    for n in (2_000, 30_000):
        np.save(tmp_path / "set.npy", RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "set.npy"), str(tmp_path / "store")]
        used.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert used[1] < 1000 and used[1] - used[0] < 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """What is noised at once is bounded in values: 40 pictures of 512x512 at once would take 2 GB."""
    np.save(tmp_path / "set.npy", RNG.integers(0, 256, (48, 512, 512, 3), dtype=np.uint8))
    for more in ("", "hand_out=True, "):
        program = MEMORY.replace("sigma_tn=", f"{more}sigma_tn=").replace('"off"', '"keep"')
        command = [sys.executable, "-c", program, str(tmp_path / "set.npy"), str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) * 2**20 < 10**9


def test_pictures_that_are_enlarged_are_counted(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(((12, 20), (8, 20), (12, 12), (7, 7), (30, 30))):
        colour = tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())
        Image.new("RGB", size, colour).save(tmp_path / "photos" / f"{i}.png")
    for resolution, told in ((12, "2 of 5 images are smaller than 12 pixels and are enlarged"), (7, "")):
        source = open_source(tmp_path / "photos", resolution=resolution)
        prepare(source, tmp_path / f"{resolution}")
        err = capsys.readouterr().err
        assert told in err and ("enlarged" in err) == bool(told)
    assert (open_source("digits", resolution=9).enlarged, open_source("digits").enlarged) == (1797, 0)
