"""Near-duplicates: found where they were planted, not where pictures merely have the same layout; and in `prepare`."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastambient.data import decoding, open_source, prepare
from fastambient.data.near_duplicates import (
    _near_pairs,
    join_groups,
    near_duplicate_groups,
    perceptual_hash,
)
from fastambient.errors import InputError


def scene(seed: int, size: int = 48) -> np.ndarray:
    """A picture with shapes, as photographs have: uint8 [3, size, size]."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(7):
        x, y, w, h = rng.integers(-8, size, 2).tolist() + rng.integers(8, size, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), colour)
    return np.asarray(image).transpose(2, 0, 1).copy()


def changed(image: np.ndarray, how: str) -> np.ndarray:
    picture = Image.fromarray(image.transpose(1, 2, 0))
    if how == "jpeg":
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=60)
        picture = Image.open(buffer)
    elif how == "scaled":
        picture = picture.resize((40, 40), Image.Resampling.LANCZOS).resize(picture.size, Image.Resampling.LANCZOS)
    else:
        picture = picture.point(lambda level: min(255, int(level * 1.04)))
    return np.asarray(picture).transpose(2, 0, 1).copy()


def groups_of(images: np.ndarray) -> np.ndarray:
    return near_duplicate_groups(np.array([perceptual_hash(image) for image in images], np.uint64), images)


def test_planted_near_duplicates():
    originals = [scene(seed) for seed in range(60)]
    planted = [changed(originals[i], how) for i, how in ((3, "jpeg"), (3, "scaled"), (10, "brighter"), (59, "jpeg"))]
    groups = groups_of(np.stack(originals + planted))
    assert groups[:60].tolist() == list(range(60)) and groups[60:].tolist() == [3, 3, 10, 59]


def test_the_same_layout_is_not_the_same_picture():
    """Pictures with one hash that differ in what the hash does not see."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (6, 1, 32, 32), dtype=np.uint8)
    same_hash = np.zeros(7, np.uint64)
    images = np.concatenate([noise, noise[2:3] // 2 + 60])
    assert near_duplicate_groups(same_hash, images).tolist() == [0, 1, 2, 3, 4, 5, 2]
    flat = np.stack([np.full((1, 32, 32), level, np.uint8) for level in (10, 11, 200)])
    assert near_duplicate_groups(np.zeros(3, np.uint64), flat).tolist() == [0, 0, 2]


def test_pairs_are_those_of_comparing_all():
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2**63, 300, dtype=np.uint64)
    flips = np.array([np.bitwise_or.reduce([np.uint64(1) << np.uint64(b) for b in rng.choice(64, k, replace=False)]) for k in rng.integers(1, 9, 300)])  # fmt: skip
    hashes = np.unique(np.concatenate([base, base ^ flips]))
    distance = np.array([[(int(a) ^ int(b)).bit_count() for b in hashes] for a in hashes])
    expected = np.argwhere(np.triu(distance <= 4, 1))
    assert len(expected) > 100 and np.array_equal(_near_pairs(hashes), expected)


def test_join_groups():
    assert join_groups(np.array([5, 5, 7, 8, 9]), np.array([0, 1, 1, 3, 3])).tolist() == [5, 5, 5, 8, 8]
    assert join_groups(np.arange(3) * -2, np.array([4, 5, 6])).tolist() == [0, -2, -4]


def test_the_split_does_not_depend_on_the_order_of_files(tmp_path):
    """And near-duplicates are no mirror images: x-flips do not concern them."""
    images = [scene(seed) for seed in range(30)] + [changed(scene(seed), "jpeg") for seed in range(8)]
    stores = []
    for name, order in (("a", range(38)), ("b", np.random.default_rng(0).permutation(38))):
        (tmp_path / name).mkdir()
        source = open_source(folder_of(tmp_path / name, [images[i] for i in order]))
        stores.append(prepare(source, tmp_path / f"store-{name}", train=15, holdout=10))
    for side in ("train", "holdout"):
        assert set(getattr(stores[0], side).ids) == set(getattr(stores[1], side).ids)
    assert stores[0].manifest["split"]["mirrored_pairs"] == 0


@pytest.mark.slow
def test_many(monkeypatch):
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 2**63, 1_000_000, dtype=np.uint64)
    hashes[500_000:] = hashes[:500_000] ^ np.uint64(3)
    start = time.monotonic()
    pairs = _near_pairs(np.unique(hashes))
    assert 499_000 < len(pairs) < 501_000 and time.monotonic() - start < 120


def folder_of(tmp_path, images):
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{i:03d}.png")
    return tmp_path


def test_prepare(tmp_path, capsys):
    """They lie on one side of the split, are listed, and dropped where that is asked for."""
    images = [scene(seed) for seed in range(40)] + [changed(scene(seed), "jpeg") for seed in range(0, 40, 2)]
    (tmp_path / "photos").mkdir()
    source = open_source(folder_of(tmp_path / "photos", images))
    for seed in range(3):
        kept = prepare(source, tmp_path / f"kept{seed}", split_seed=seed, holdout=30, train=30)
        ids = [{int(i) for i in side.ids} for side in (kept.train, kept.holdout)]
        originals = prepare(source, tmp_path / f"off{seed}", dedup="off", holdout=0, split_seed=seed).train.ids
        for i in range(20):
            pair = {int(originals[2 * i]), int(originals[40 + i])}
            assert pair <= ids[0] or pair <= ids[1] or not pair & (ids[0] | ids[1])
    listed = json.loads((kept.path / "near_duplicates.json").read_text())
    assert listed["images"] == 40
    assert listed["groups"] == [[f"{2 * i:03d}.png", f"{40 + i:03d}.png"] for i in range(20)]
    assert "40 images in 20 groups of near-duplicates, each on one side of the split" in capsys.readouterr().err
    assert "near_duplicates.json" in kept.manifest["files"]

    dropped = prepare(source, tmp_path / "dropped", dedup="drop", holdout=0)
    assert len(dropped.train) == 40 and set(dropped.train.ids) == set(originals[:40])
    assert dropped.manifest["counts"] == {"images": 60, "skipped": 0, "dropped": 20}
    assert "all but the first of each dropped" in capsys.readouterr().err
    off = prepare(source, tmp_path / "off", dedup="off")
    assert not (off.path / "near_duplicates.json").exists()
    with pytest.raises(InputError, match="--dedup must be one of off, keep, drop, got 'some'"):
        prepare(source, tmp_path / "x", dedup="some")


def test_small_pictures_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "perceptual_hash", None)  # not asked
    assert len(prepare(open_source("digits"), tmp_path / "store").train) == 100
