"""The store: round trips, splits, the noise contract, permissions, corruption, and failures that leave nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from fastambient.data import Store, image_id, image_ids, is_store, open_source, prepare
from fastambient.data.order import permutation
from fastambient.data.shards import ShardedArray, write_npy
from fastambient.errors import FastambientError, InputError
from fastambient.evaluation import evaluate
from fastambient.files import sha256_file
from fastambient_kernels.ambient import ambient_noise
from fastambient_kernels.noise import Stream, normal

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
LABELS = RNG.integers(0, 5, 60)
LABELS[0] = 4


@pytest.fixture
def source(tmp_path):
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=LABELS)
    return open_source(tmp_path / "set.npz")


def array_source(tmp_path, images, name="other"):
    np.save(tmp_path / f"{name}.npy", images)
    return open_source(tmp_path / f"{name}.npy")


def test_round_trip(tmp_path, source):
    out = tmp_path / "deep" / "store"
    made = prepare(source, out, sigma_tn=0.2, noise_seed=7, train=40, holdout=15)
    for store in (made, Store.open(out), Store.open(str(out), verify=False)):
        assert (store.path, store.shape, store.channels, store.resolution) == (out, (3, 8, 8), 3, 8)
        assert (store.num_classes, store.class_names, store.sigma_tn, store.noise_seed) == (5, None, 0.2, 7)
        assert (len(store.train), len(store.holdout)) == (40, 15)
        by_id = {image_id(image): (image, label) for image, label in zip(IMAGES, LABELS, strict=True)}
        for split in (store.train, store.holdout):
            assert split.ids.dtype == split.labels.dtype == np.int64 and split.noisy is None
            assert np.array_equal(image_ids(split.images[:]).numpy(), split.ids)
            for image, id_, label in zip(split.images[:], split.ids, split.labels, strict=True):
                assert np.array_equal(by_id[id_][0], image) and by_id[id_][1] == label
    assert is_store(out) and not is_store(tmp_path) and not is_store(out / "train")


def test_manifest(tmp_path, source):
    store = prepare(source, tmp_path / "store", sigma_tn=0.2, noise_seed=0xABCDEF0123456789, split_seed=3)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest == store.manifest
    assert manifest["format"] == "fastambient-store" and manifest["version"] == 1 and manifest["source"] == "set.npz"
    assert manifest["shape"] == [3, 8, 8] and manifest["labels"] == {"num_classes": 5, "names": None}
    assert manifest["counts"] == {"images": 60, "skipped": 0}
    assert manifest["split"] == {"seed": 3, "train": 54, "holdout": 6, "duplicates": 0, "mirrored_pairs": 0}
    on_disk = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*") if p.is_file()}
    files = ("images-00000.npy", "ids.npy", "labels.npy", "names.jsonl", "names_offsets.npy")
    sides = {f"{side}/{name}" for side in ("train", "holdout") for name in files}
    assert set(manifest["files"]) == sides and on_disk == {
        *sides,
        "manifest.json",
        "noise_seed",
        "noise_levels",
        ".gitignore",
    }
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (store.path / name).stat().st_size, "sha256": sha256_file(store.path / name)}


def test_sigma_data_is_that_of_the_training_images(tmp_path, source):
    store = prepare(source, tmp_path / "store", train=50, shard_bytes=7 * 192)
    values = store.train.images[:].astype(np.float64) / 127.5 - 1
    assert store.sigma_data == pytest.approx(values.std(), rel=1e-12)


def test_images_of_one_colour(tmp_path):
    flat = array_source(tmp_path, np.full((5, 4, 4), 7, np.uint8))
    with pytest.raises(InputError, match="one colour"):
        prepare(flat, tmp_path / "store", train=5)
    assert not (tmp_path / "store").exists()


def test_digits_defaults(tmp_path):
    store = prepare(open_source("digits"), tmp_path / "store")
    assert (len(store.train), len(store.holdout)) == (100, 1697)
    assert store.class_names == [str(i) for i in range(10)] and store.sigma_tn is None
    assert store.sigma_data == pytest.approx(0.75, abs=0.02)
    smaller = prepare(open_source("digits"), tmp_path / "other", train=30, holdout=50)
    assert (len(smaller.train), len(smaller.holdout)) == (30, 50)
    assert set(smaller.train.ids) <= set(store.train.ids)  # smaller training sets are nested


def test_noise_seed_is_kept_apart(tmp_path, source):
    seed = 0xFEDCBA9876543210
    store = prepare(source, tmp_path / "store", sigma_tn=0.5, noise_seed=seed, noisy="float32")
    file = store.path / "noise_seed"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for other in store.path.rglob("*"):
        if other.is_file() and other != file:
            data = other.read_bytes()
            assert str(seed).encode() not in data and f"{seed:x}".encode() not in data.lower()
            assert sha256_file(file).encode() not in data
    assert "noise_seed" not in json.dumps(store.manifest)
    file.unlink()
    opened = Store.open(store.path)  # everything but the seed still reads
    with pytest.raises(InputError, match="noise_seed cannot be read"):
        _ = opened.noise_seed
    file.write_text("7\n")
    with pytest.raises(InputError, match="16 hex digits"):
        _ = Store.open(store.path).noise_seed


def test_the_noise_seed_is_its_owners_from_the_first_byte(tmp_path, source, monkeypatch):
    """Rights that are taken away after the file was opened come too late for who opened it, too."""
    original, modes = os.open, {}

    def opened(path, flags, *arguments, **keywords):
        fd = original(path, flags, *arguments, **keywords)
        modes[Path(path).name] = stat.S_IMODE(os.fstat(fd).st_mode)
        return fd

    monkeypatch.setattr(os, "open", opened)
    before = os.umask(0)
    try:
        prepare(source, tmp_path / "store")
    finally:
        os.umask(before)
    written = [mode for name, mode in modes.items() if name.lstrip(".").startswith("noise_seed")]
    assert written and set(written) == {0o600}


def test_noise_seeds(tmp_path, source):
    drawn = set()
    for name in ("a", "b"):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        drawn.add(prepare(source, tmp_path / name).noise_seed)
    assert len(drawn) == 2, "a secret comes from the system, not from a generator that anybody can seed"
    assert max(drawn) > 2**40
    assert prepare(source, tmp_path / "c", noise_seed=2**64 - 1).noise_seed == 2**64 - 1
    for bad in (2**64 + 12345, -12345):
        with pytest.raises(InputError, match="--noise-seed must be a 64-bit integer") as caught:
            prepare(source, tmp_path / "d", noise_seed=bad)
        assert "12345" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-4)])
def test_noised_copy_is_the_regenerated_one(tmp_path, source, dtype, tolerance):
    store = prepare(source, tmp_path / "store", sigma_tn=1.5, noise_seed=7, noisy=dtype, shard_bytes=7 * 192)
    x_n = store.train.noisy[:]
    assert x_n.dtype == dtype and x_n.shape == store.train.images.shape and store.holdout.noisy is None
    ids, images = torch.from_numpy(store.train.ids), torch.from_numpy(store.train.images[:])
    noise = normal(ids, 192, seed=7, stream=Stream.FIXED).view(-1, 3, 8, 8)
    expected = images / 127.5 - 1 + 1.5 * noise
    scale = expected.abs().clamp(min=1)
    assert ((torch.from_numpy(x_n) - expected).abs() / scale).max() < tolerance
    # and what the training step makes of it: at sigma = sigma_tn there is no fresh noise
    step = {"sigma_tn": 1.5, "sigma_data": 0.5, "noise_seed": store.noise_seed, "run_seed": 0}
    batch = (images, ids, None, torch.arange(len(ids)), torch.full((len(ids),), 1.5))
    made, read = (ambient_noise(*batch, x_n=x, **step).net_input for x in (None, torch.from_numpy(x_n)))
    assert ((made - read).abs() * (1.5**2 + 0.5**2) ** 0.5 / scale).max() < tolerance
    assert abs(float((x_n - (store.train.images[:] / 127.5 - 1)).std()) - 1.5) < 0.05


def test_noise_belongs_to_the_picture(tmp_path, source):
    """The same x_n whatever the order, the subset, the split and the shards."""
    options = {"sigma_tn": 0.7, "noise_seed": 3, "noisy": "float32"}
    shuffled = array_source(tmp_path, IMAGES[::-1].copy())
    stores = [
        prepare(source, tmp_path / "a", **options),
        prepare(shuffled, tmp_path / "b", shard_bytes=500, **options),
        prepare(source, tmp_path / "c", train=20, split_seed=5, **options),
    ]
    seen: dict[int, np.ndarray] = {}
    for store in stores:
        for id_, x_n in zip(store.train.ids.tolist(), store.train.noisy[:], strict=True):
            assert np.array_equal(seen.setdefault(id_, x_n), x_n)
    assert len(seen) < sum(len(store.train) for store in stores)
    other = prepare(source, tmp_path / "d", **{**options, "noise_seed": 4})
    assert not np.array_equal(other.train.noisy[:1], seen[int(other.train.ids[0])][None])


def test_split_depends_on_pictures_not_on_their_order(tmp_path, source):
    a = prepare(source, tmp_path / "a", train=20, holdout=20)
    b = prepare(array_source(tmp_path, IMAGES[RNG.permutation(60)]), tmp_path / "b", train=20, holdout=20)
    assert set(a.train.ids) == set(b.train.ids) and set(a.holdout.ids) == set(b.holdout.ids)
    c = prepare(source, tmp_path / "c", train=20, holdout=20, split_seed=1)
    assert set(a.train.ids) != set(c.train.ids)


def test_duplicates_never_straddle(tmp_path):
    copies = np.array([1, 1, 1, 2, 5, 3] * 5)
    images = np.repeat(IMAGES[:30], copies, axis=0)
    images = images[RNG.permutation(len(images))]
    n = len(images)
    source = array_source(tmp_path, images)
    for i, (train, holdout) in enumerate([(None, None), (n // 2, n // 4), (n - 9, 9), (1, 1), (n, 0)]):
        store = prepare(source, tmp_path / f"s{i}", train=train, holdout=holdout, split_seed=i)
        assert not set(store.train.ids) & set(store.holdout.ids)
        assert store.manifest["split"]["duplicates"] == n - 30
        if train is not None:
            assert (len(store.train), len(store.holdout)) == (train, holdout)
        for split in (store.train, store.holdout):  # copies are kept
            unique, counts = np.unique(split.ids, return_counts=True)
            for id_, count in zip(unique, counts, strict=True):
                assert count == (image_ids(images).numpy() == id_).sum()
    assert len(Store.open(tmp_path / "s0").train) + len(Store.open(tmp_path / "s0").holdout) == n


def test_counts_that_duplicates_forbid(tmp_path):
    pairs = array_source(tmp_path, np.repeat(IMAGES[:10], 2, axis=0))
    with pytest.raises(
        InputError, match=r"train 7 would put copies .* 20 images of 10 distinct pictures; pass --train 6 "
    ):
        prepare(pairs, tmp_path / "store", train=7)
    store = prepare(pairs, tmp_path / "store")
    assert (len(store.train), len(store.holdout)) == (18, 2)
    copies = array_source(tmp_path, np.repeat(IMAGES[:1], 4, axis=0), "copies")
    with pytest.raises(InputError, match="4 images of 1 distinct pictures; pass --train 4 "):
        prepare(copies, tmp_path / "copies")
    assert len(prepare(copies, tmp_path / "copies", train=4).train) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": 61}, "60 images, too few for --train 61 (train: --set data.train=61): at least"),
        ({"holdout": 60}, "60 images, too few for --holdout 60 (train: --set data.holdout=60): at least"),
        ({"holdout": 148}, "60 images, too few for --holdout 148 (train: --set data.holdout=148): at least"),
        (
            {"train": 40, "holdout": 21},
            "60 images, too few for --train 40 (train: --set data.train=40) and --holdout 21",
        ),
        ({"split_seed": -1}, "--split-seed must be a 64-bit integer, 0 to 2^64 - 1, got -1"),
        ({"train": 0}, "--train must be 1 or more, got 0"),
        ({"holdout": -1}, "--holdout must be 0 or more, got -1"),
        ({"sigma_tn": -0.1}, "--sigma-tn must be a finite number, 0 or more, got -0.1"),
        ({"sigma_tn": float("nan")}, "got nan"),
        ({"sigma_tn": float("inf")}, "got inf"),
        ({"sigma_tn": 1.0, "noisy": "float64"}, "none, float16, float32, got 'float64'"),
        ({"noisy": "float32"}, "pass --sigma-tn"),
    ],
)
def test_bad_numbers(tmp_path, source, options, words):
    with pytest.raises(InputError) as caught:
        prepare(source, tmp_path / "store", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_few_images_hold_out_what_an_evaluation_needs_or_say_that_they_cannot(tmp_path, capsys):
    for number, sides in {1: (1, 0), 3: (3, 0), 4: (2, 2), 12: (10, 2), 29: (27, 2), 30: (27, 3)}.items():
        store = prepare(array_source(tmp_path, IMAGES[:number]), tmp_path / f"{number}")
        assert (len(store.train), len(store.holdout)) == sides and store.holdout.images[:].shape == (sides[1], 3, 8, 8)
        verb = "is" if sides[1] == 1 else "are"
        warning = f"{sides[0]} train and {sides[1]} {verb} held out, copies counted once; evaluate needs 2 of each"
        assert (warning in capsys.readouterr().err) == (min(sides) < 2)
        if min(sides) >= 2:
            evaluate(IMAGES, store.train.images[:], store.holdout.images[:], bootstrap=1, settings={})
    prepare(array_source(tmp_path, IMAGES[:12]), tmp_path / "asked", holdout=1)
    assert "11 train and 1 is held out, copies counted once" in capsys.readouterr().err


def test_mirror_images_stay_on_one_side_and_are_counted(tmp_path):
    """A run with x-flips would train on a held-out image, and see two noised observations of one picture."""
    twins = np.concatenate([IMAGES[:20], IMAGES[:20, :, :, ::-1], IMAGES[20:30]])
    source = array_source(tmp_path, twins[RNG.permutation(50)])
    for seed in range(3):
        store = prepare(source, tmp_path / f"{seed}", split_seed=seed, train=30)
        mirrored = image_ids(np.ascontiguousarray(store.train.images[:][..., ::-1])).numpy()
        assert not set(mirrored) & set(store.holdout.ids)
        assert store.manifest["split"]["mirrored_pairs"] == np.isin(mirrored, store.train.ids).sum() / 2 > 0
        assert store.manifest["split"]["duplicates"] == 0
    plain, alike = (IMAGES[:30], np.concatenate([IMAGES[:5, ..., :4], IMAGES[:5, ..., 3::-1]], axis=3))
    both = prepare(array_source(tmp_path, alike, "alike"), tmp_path / "alike")
    assert both.manifest["split"]["mirrored_pairs"] == 0, "a symmetric image is no pair"
    before = prepare(array_source(tmp_path, plain, "plain"), tmp_path / "plain", train=10)
    assert set(before.train.ids) == set(np.sort(image_ids(plain).numpy())[permutation(30, seed=0).numpy()[:10]])


def test_existing_folders(tmp_path, source):
    prepare(source, tmp_path / "store", train=10)
    with pytest.raises(InputError, match="--force"):
        prepare(source, tmp_path / "store", train=11)
    assert len(Store.open(tmp_path / "store").train) == 10
    prepare(source, tmp_path / "store", train=11, force=True)
    assert len(Store.open(tmp_path / "store").train) == 11
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "wedding.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="no store"):
        prepare(source, precious, force=True)
    assert (precious / "wedding.jpg").exists()


def test_an_unreadable_image_leaves_nothing(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(IMAGES[i].transpose(1, 2, 0)).resize((64, 64)).save(folder / f"{i}.png")
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"2\.png"):
        prepare(open_source(folder), tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    store = prepare(open_source(folder, on_bad_image="skip"), tmp_path / "store", holdout=1)
    assert (len(store.train), len(store.holdout)) == (1, 1)
    assert store.manifest["counts"] == {"images": 2, "skipped": 1}


def test_a_full_disk_leaves_nothing_and_keeps_the_old_store(tmp_path, source, monkeypatch):
    prepare(source, tmp_path / "store", train=10)
    written = []

    def full(path, *arguments):
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return write_npy(path, *arguments)

    monkeypatch.setattr("fastambient.data.preparation.write_npy", full)
    for out, force in (("new", False), ("store", True)):
        written.clear()
        with pytest.raises(FastambientError, match="No space left on device") as caught:
            prepare(source, tmp_path / out, force=force)
        assert caught.value.exit_code == 1 and len(written) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["set.npz", "store"]
    assert len(Store.open(tmp_path / "store").train) == 10


def test_a_real_write_failure_leaves_nothing(tmp_path, source):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the images are 11,520 bytes
    try:
        with pytest.raises(FastambientError, match="could not be written: File too large"):
            prepare(source, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def edit_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_stores(tmp_path, source):
    good = prepare(source, tmp_path / "good", train=30, shard_bytes=20 * 192).path
    assert (good / "train" / "images-00001.npy").exists()

    def fails(words, damage, *, verify=True):
        copy = tmp_path / "copy"
        shutil.copytree(good, copy)
        damage(copy)
        with pytest.raises(InputError) as caught:
            Store.open(copy, verify=verify)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        shutil.rmtree(copy)

    def flip_bit(path):
        data = bytearray((path / "holdout" / "images-00000.npy").read_bytes())
        data[-1] ^= 1
        (path / "holdout" / "images-00000.npy").write_bytes(data)

    def cut(path):
        data = (path / "train" / "ids.npy").read_bytes()
        (path / "train" / "ids.npy").write_bytes(data[:-8])

    def set_key(*keys, value):
        def change(manifest):
            for key in keys[:-1]:
                manifest = manifest[key]
            manifest[keys[-1]] = value

        return lambda path: edit_manifest(path, change)

    fails("holdout/images-00000.npy has another checksum", flip_bit)
    fails("train/images-00001.npy is missing", lambda path: (path / "train" / "images-00001.npy").unlink())
    fails("bytes instead of", cut)
    fails("bytes instead of", cut, verify=False)
    fails("format version 2, this program reads version 1", set_key("version", value=2))
    fails("no store's manifest", set_key("format", value="other"))
    fails("no store's manifest", lambda path: (path / "manifest.json").write_text("{"))
    fails("no store's manifest", lambda path: (path / "manifest.json").write_text("[]"))
    fails("is no store: manifest.json cannot be read", lambda path: (path / "manifest.json").unlink())
    entry = {"bytes": 1, "sha256": ""}
    for name in ("../up.npy", "/etc/passwd", "train/../../up", "C:\\x", "train\\..\\x"):
        fails("unsafe name", set_key("files", name, value=entry))
    fails("is damaged", set_key("files", value=[1]))
    fails("is damaged", set_key("sigma_data", value=None))
    fails("is damaged", set_key("sigma_data", value=-1))
    fails("is damaged", set_key("noisy", value="float8"))
    fails("is damaged", lambda path: edit_manifest(path, lambda manifest: manifest.pop("split")))
    fails("does not fit the manifest's", set_key("shape", value=[3, 8, 9]))
    fails("holds 30 rows where the manifest says 31", set_key("split", "train", value=31))
    assert len(Store.open(good).train) == 30


def test_a_changed_file_passes_without_verify_only(tmp_path, source):
    store = prepare(source, tmp_path / "store")
    file = store.path / "train" / "images-00000.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    Store.open(store.path, verify=False)
    with pytest.raises(InputError, match="checksum"):
        Store.open(store.path)


def test_no_pickle_in_a_store(tmp_path, source):
    store = prepare(source, tmp_path / "store")
    file = store.path / "train" / "ids.npy"
    np.save(file, np.array([{}] * 54, dtype=object), allow_pickle=True)
    entry = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    edit_manifest(store.path, lambda manifest: manifest["files"].update({"train/ids.npy": entry}))
    with pytest.raises(InputError, match="cannot be read"):
        Store.open(store.path)


def test_sharded_array_indexing(tmp_path):
    whole = np.arange(40, dtype=np.int64).reshape(20, 2)
    paths = []
    for i, part in enumerate(np.split(whole, [7, 7, 13])):
        paths.append(tmp_path / f"x-{i}.npy")
        write_npy(paths[-1], part.shape, part.dtype, [part])
    array = ShardedArray(paths, (20, 2), np.dtype(np.int64))
    assert len(array) == 20 and array.nbytes == 320
    for rows in (
        slice(None),
        slice(5, 15),
        slice(18, 2, -3),
        [0, 19, 7, 6, 7, -1],
        np.array([13, 12]),
        [],
        slice(9, 9),
    ):
        assert np.array_equal(array[rows], whole[rows if len(np.shape(rows)) == 0 or len(rows) else slice(0)])
    array[:1][0] = 99  # a copy
    assert array[:1].tolist() == [[0, 1]]
    for rows in ([20], [-21], np.zeros(20, bool), [0.5], [[1]]):
        with pytest.raises(IndexError):
            array[rows]


def test_a_bounded_number_of_shards_is_mapped(tmp_path):
    """The least recently read ones go, what is read stays the same, and a shard that is another one is told."""
    rows = np.arange(20)
    paths = [tmp_path / f"x-{i}.npy" for i in range(10)]
    for i, path in enumerate(paths):
        write_npy(path, (2,), np.int64, [rows[2 * i : 2 * i + 2]])
    for most in (0, 1, 3, 10, 99):
        array = ShardedArray(paths, (20,), np.dtype(np.int64), maps=most)
        for index in ([0, 19, 7], [3, 3], rows[::-1], [0], [4, 5]):
            assert np.array_equal(array[index], index)
            assert len(array._maps) <= most
    array = ShardedArray(paths, (20,), np.dtype(np.int64), maps=3)
    for row in (0, 2, 4, 0, 6):  # the last but one keeps shard 0
        array[[row]]
    assert list(array._maps) == [2, 0, 3]
    write_npy(paths[9], (1,), np.int64, [rows[:1]])
    with pytest.raises(InputError, match="is another one since the store was opened"):
        array[[19]]


def test_real_zip(tmp_path):
    """An EDM data set zip with JPEGs, as made by its tool."""
    import io
    import zipfile

    from PIL import Image

    path = tmp_path / "cifar.zip"
    entries = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(12):
            name, buffer = f"{i // 5:05d}/img{i:08d}.jpg", io.BytesIO()
            Image.fromarray(IMAGES[i].transpose(1, 2, 0)).resize((32, 32)).save(buffer, "JPEG", quality=95)
            archive.writestr(name, buffer.getvalue())
            entries.append([name, int(LABELS[i])])
        archive.writestr("dataset.json", json.dumps({"labels": entries}))
    store = prepare(open_source(path), tmp_path / "store", train=8, sigma_tn=0.75, noisy="float16")
    assert store.shape == (3, 32, 32) and (len(store.train), len(store.holdout)) == (8, 2)
    assert store.num_classes == 5 and store.train.noisy.dtype == np.float16
    assert Store.open(store.path).manifest == store.manifest
