"""Sources: real image files in every mode, and every bad input by the error it must give."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from source_checks import (
    check_rows,
    encoded,
    error_of,
    make_folder,
    make_zip,
    picture,
    png_header,
    read_all,
    touch,
)  # fmt: skip

from fastambient.data import is_store, open_source, prepare
from fastambient.errors import InputError
from fastambient.training.run import RunFolder


def test_digits():
    source = open_source("digits")
    items = read_all(source)
    assert (source.name, source.channels, source.resolution, source.length) == ("digits", 1, 8, 1797)
    assert source.class_names == [str(i) for i in range(10)] and source.num_classes == 10 and not source.skipped
    assert len(items) == 1797 and {label for _, _, label in items} == set(range(10))
    first = items[0][1]
    assert first[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16, times 255/16, rounded
    assert max(int(image.max()) for _, image, _ in items) == 255


def test_digits_resize():
    assert open_source("digits", resolution=4).resolution == 4
    assert next(open_source("digits", resolution=4).read()).image.shape == (1, 4, 4)


def test_folder_is_recursive_sorted_and_lossless(tmp_path):
    images = {name: picture(i) for i, name in enumerate(["b.png", "a.BMP", "sub/deep/c.webp", "z.jpg"])}
    make_folder(
        tmp_path,
        {
            "b.png": encoded(images["b.png"]),
            "a.BMP": encoded(images["a.BMP"], "BMP"),
            "sub/deep/c.webp": encoded(images["sub/deep/c.webp"], "WEBP", lossless=True),
            "z.jpg": encoded(images["z.jpg"], "JPEG"),
            "notes.txt": b"not an image",
            "._b.png": b"resource fork",
            ".cache/x.png": b"hidden",
        },
    )
    source = open_source(tmp_path)
    items = read_all(source)
    assert [name for name, _, _ in items] == ["a.BMP", "b.png", "sub/deep/c.webp", "z.jpg"]
    assert source.length == 4 and source.channels == 3 and source.num_classes == 0 and source.class_names is None
    for name, image, label in items[:3]:
        assert np.array_equal(image, np.asarray(images[name]).transpose(2, 0, 1)) and label == -1
    assert [item.name for item in source.read()] == [name for name, _, _ in items]  # can be read again


def test_one_picture_beside_the_folders_takes_their_classes_and_is_named(tmp_path, capsys):
    png = encoded(picture(0))
    make_folder(tmp_path, {"dog/1.png": png, "cat/1.png": png, "top.png": png})
    assert open_source(tmp_path).class_names is None
    err = capsys.readouterr().err
    assert "its 2 folders are no classes, because 1 of 3 images lie beside them, top.png for one" in err
    (tmp_path / "top.png").unlink()
    assert open_source(tmp_path).class_names == ["cat", "dog"] and "no classes" not in capsys.readouterr().err


def test_labels_from_sub_folders(tmp_path):
    png = encoded(picture(0))
    make_folder(tmp_path, {"dog/1.png": png, "cat/x/2.png": png, "cat/1.png": png})
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"] and source.num_classes == 2
    assert [(item.name, item.label) for item in source.read()] == [
        ("cat/1.png", 0),
        ("cat/x/2.png", 0),
        ("dog/1.png", 1),
    ]
    make_folder(tmp_path, {"loose.png": png})
    assert open_source(tmp_path).num_classes == 0  # an image outside of the classes: no class folders, then


def test_one_sub_folder_is_no_class(tmp_path):
    make_folder(tmp_path, {"pictures/1.png": encoded(picture(0)), "pictures/2.png": encoded(picture(1))})
    assert open_source(tmp_path).num_classes == 0


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_classes_below_one_folder(tmp_path, kind):
    """A zip of the folder photos begins with photos/: the classes are the same as the folder's."""
    png, names = encoded(picture(0)), ("photos/my/dog/1.png", "photos/my/cat/1.png", "photos/my/doe/1.png")
    files = dict.fromkeys(names, png) | {"photos/notes/read.txt": b"no image"}
    made = make_folder(tmp_path / "x", files) if kind == "folder" else make_zip(tmp_path / "x.zip", files)
    source = open_source(made)
    assert source.class_names == ["cat", "doe", "dog"]
    assert [(item.name, item.label) for item in source.read()] == [(n, i) for i, n in enumerate(sorted(names))]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_of_other_kinds_are_named(tmp_path, kind, capsys):
    """What is not read is no secret; a picture of a kind that nobody knows is no picture."""
    files = {
        "a.png": encoded(picture(0)),
        "b.TIF": b"x",
        "d/c.tif": b"x",
        "e.heic": b"x",
        ".f.gif": b"x",
        "g.xyz": b"x",
    }

    def make(name, files):
        return make_folder(tmp_path / name, files) if kind == "folder" else make_zip(tmp_path / f"{name}.zip", files)

    made = make("some", files)
    assert open_source(made).length == 1
    assert f"{made} also holds pictures that are not read (1 .heic, 2 .tif): convert" in capsys.readouterr().err
    open_source(make("none", {name: files[name] for name in ("a.png", ".f.gif", "g.xyz")}))
    assert "not read" not in capsys.readouterr().err
    del files["a.png"]
    assert "there are .heic, .tif files: convert them to PNG" in error_of(make("all", files))


def dataset(labels) -> bytes:
    return json.dumps({"labels": labels}).encode()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_dataset_json(tmp_path, kind):
    names = ["00000/img00000000.png", "00001/img00000001.png", "00001/img00000002.png"]
    files = {name: encoded(picture(i)) for i, name in enumerate(names)}

    def make(labels):
        content = {**files, "dataset.json": dataset(labels)}
        if kind == "folder":
            return make_folder(tmp_path / "data", content)
        return make_zip(tmp_path / "data.zip", content)

    source = open_source(make([[names[2], 0], [names[0], 6], [names[1], 2]]))
    assert source.num_classes == 7 and source.class_names is None
    assert [(name, label) for name, _, label in read_all(source)] == list(zip(names, [6, 2, 0], strict=True))
    assert open_source(make(None)).num_classes == 0  # null: no labels, whatever the folders

    assert f"no label for {names[1]}" in error_of(make([[names[0], 1], [names[2], 1]]))
    assert "gone.png, which is not there" in error_of(make([[name, 0] for name in [*names, "gone.png"]]))
    assert "got [" in error_of(make([[names[0], 1.5]]))
    assert "got [" in error_of(make([[names[0], True]]))
    assert "got [" in error_of(make([[names[0], "six"]]))
    assert "got {" in error_of(make({names[0]: 1}))
    assert "-3" in error_of(make([[names[0], -3], [names[1], 0], [names[2], 0]]))
    assert str(10**12) in error_of(make([[names[0], 10**12], [names[1], 0], [names[2], 0]]))
    assert "two labels, 1 and 2" in error_of(make([[names[0], 1], [names[0], 2]]))


def test_dataset_json_that_is_none(tmp_path):
    make_folder(tmp_path, {"a.png": encoded(picture(0)), "dataset.json": b"{labels"})
    assert "dataset.json is no valid JSON" in error_of(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b"[1, 2]")
    assert "dataset.json: expected" in error_of(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b"[" * 100_000)
    assert "dataset.json is no valid JSON" in error_of(tmp_path)


def test_zip_equals_folder(tmp_path):
    files = {f"{i:05d}/img{i}.png": encoded(picture(i)) for i in range(3)}
    folder = read_all(open_source(make_folder(tmp_path / "data", files)))
    zipped = read_all(open_source(make_zip(tmp_path / "data.zip", files, zipfile.ZIP_DEFLATED)))
    for (name, image, label), (other_name, other, other_label) in zip(folder, zipped, strict=True):
        assert name == other_name and label == other_label and np.array_equal(image, other)


def single(tmp_path, data: bytes, name="x.png", **options) -> np.ndarray:
    make_folder(tmp_path, {name: data})
    return read_all(open_source(tmp_path, **options))[0][1]


def test_grey_sets_have_one_channel(tmp_path):
    image = picture(0, mode="L")
    assert np.array_equal(single(tmp_path, encoded(image)), np.asarray(image)[None])
    make_folder(tmp_path, {"y.png": encoded(picture(1))})  # a colour picture turns the whole set to RGB
    mixed = read_all(open_source(tmp_path))
    assert [array.shape for _, array, _ in mixed] == [(3, 8, 8)] * 2
    assert np.array_equal(mixed[0][1], np.repeat(np.asarray(image)[None], 3, axis=0))


def test_16_bit_grey(tmp_path):
    values = np.array([[0, 257], [65535, 128]], np.uint16)
    assert single(tmp_path, encoded(Image.fromarray(values))).tolist() == [[[0, 1], [255, 0]]]
    values = np.array([[129, 255 * 257 - 128], [32767, 32768]], np.uint16)
    assert single(tmp_path, encoded(Image.fromarray(values))).tolist() == [[[1, 255], [127, 128]]]


def test_one_bit(tmp_path):
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert single(tmp_path, encoded(bits)).tolist() == [[[0, 255], [255, 0]]]


def test_alpha_is_composited_over_white(tmp_path):
    rgba = Image.frombytes("RGBA", (2, 2), bytes([10, 20, 30, 255, 10, 20, 30, 0, 0, 0, 0, 128, 255, 0, 0, 51]))
    array = single(tmp_path, encoded(rgba))
    assert array[:, 0, 0].tolist() == [10, 20, 30] and array[:, 0, 1].tolist() == [255, 255, 255]
    assert array[:, 1, 0].tolist() == [127, 127, 127] and array[:, 1, 1].tolist() == [255, 204, 204]


def test_grey_with_alpha_stays_grey(tmp_path):
    la = Image.frombytes("LA", (2, 2), bytes([10, 255, 10, 0, 0, 128, 100, 255]))
    assert single(tmp_path, encoded(la)).tolist() == [[[10, 255], [127, 100]]]


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (2, 2))
    palette.putdata([0, 1, 2, 1])
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert single(tmp_path, encoded(palette)).transpose(1, 2, 0).tolist() == [
        [[255, 0, 0], [0, 255, 0]],
        [[0, 0, 255], [0, 255, 0]],
    ]
    array = single(tmp_path, encoded(palette, transparency=1))
    assert array[:, 0, 1].tolist() == [255, 255, 255] and array[:, 0, 0].tolist() == [255, 0, 0]


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    array = single(tmp_path, encoded(image, "JPEG", quality=95), "x.jpg")
    assert array.shape == (3, 8, 8) and array[0].min() > 250 and array[1:].max() < 5


def test_exif_orientation_is_applied(tmp_path):
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    array = single(tmp_path, encoded(image, exif=exif))
    assert np.array_equal(array, np.rot90(np.asarray(image), k=-1).transpose(2, 0, 1))


def test_content_decides_not_the_suffix(tmp_path):
    image = picture(4)
    assert np.array_equal(single(tmp_path, encoded(image, "BMP"), "x.png"), np.asarray(image).transpose(2, 0, 1))


def test_resolution_crops_the_centre_and_resizes(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the centred square is one grey
    wide[:, :8], wide[:, 16:] = (255, 0, 0), (0, 0, 255)
    assert np.array_equal(
        single(tmp_path, encoded(Image.fromarray(wide)), resolution=4), np.full((3, 4, 4), 200, np.uint8)
    )
    tall = encoded(Image.fromarray(np.ascontiguousarray(wide.transpose(1, 0, 2))))
    assert np.array_equal(single(tmp_path, tall, resolution=8), np.full((3, 8, 8), 200, np.uint8))


def test_large_reduction_averages(tmp_path):
    noise = picture(5, (512, 512), "L")
    array = single(tmp_path, encoded(noise), resolution=4)
    assert np.abs(array.astype(float) - 127.5).max() < 5  # 16384 pixels each: a filter of few taps would show noise


def test_sizes_without_resolution(tmp_path):
    make_folder(tmp_path, {"a.png": encoded(picture(0)), "b.png": encoded(picture(1, (8, 6)))})
    message = error_of(tmp_path)
    assert "b.png is 8 x 6" in message and "first is 8 x 8" in message
    assert "pass --resolution R (train: --set data.resolution=R) to" in message
    (tmp_path / "b.png").write_bytes(encoded(picture(1, (16, 16))))
    assert "b.png is 16 x 16" in error_of(tmp_path)
    assert len(read_all(open_source(tmp_path, resolution=8))) == 2
    (tmp_path / "a.png").write_bytes(encoded(picture(1, (5, 4))))
    assert "a.png is 5 x 4" in error_of(tmp_path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP"])
def test_truncated_images(tmp_path, format):
    data = encoded(picture(0, (64, 64)), format)
    make_folder(tmp_path, {"good.png": encoded(picture(1, (64, 64))), "torn.png": data[: len(data) // 2]})
    message = error_of(tmp_path, read=True)
    assert "torn.png" in message and "--on-bad-image skip" in message


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_skipping_counts_and_names(tmp_path, kind, capsys):
    torn = encoded(picture(0, (64, 64)))[:6000]
    files = {"a.png": b"no image at all", "b.png": b"", "c.png": torn, "d.png": encoded(picture(1, (64, 64)))}
    path = make_folder(tmp_path / "d", files) if kind == "folder" else make_zip(tmp_path / "d.zip", files)
    source = open_source(path, on_bad_image="skip")
    assert [name for name, _, _ in read_all(source)] == ["d.png"]
    assert sorted(source.skipped) == ["a.png", "b.png", "c.png"] and all(source.skipped.values())
    assert len(list(source.read())) == 1 and len(source.skipped) == 3  # read again: still counted once
    stderr = capsys.readouterr().err
    assert stderr.count("skipped: ") == 3 and "a.png" in stderr and "c.png" in stderr
    with pytest.raises(InputError, match=r"a\.png"):
        open_source(path)


def test_nothing_but_broken_images(tmp_path):
    make_folder(tmp_path, {"a.png": b"no", "b.jpg": b"no"})
    assert "none of the 2 images" in error_of(tmp_path, on_bad_image="skip")


def test_empty_folders(tmp_path):
    assert "no image" in error_of(tmp_path)
    make_folder(tmp_path, {"notes.txt": b"x"})
    assert "no image" in error_of(tmp_path)
    assert "no image" in error_of(make_zip(tmp_path / "empty.zip", {}))


def test_what_a_folder_without_images_was_meant_as(tmp_path):
    """As the Hugging Face hub lays parquet files out; and a store without its manifest."""
    make_folder(tmp_path / "hub", {"README.md": b"x", "plain_text/train-00000-of-00001.parquet": b"x"})
    assert "there is plain_text/train-00000-of-00001.parquet: name the folder that it lies in" in error_of(
        tmp_path / "hub"
    )
    make_folder(tmp_path / "store", {"train/ids.npy": b"x", "train/images-00000.npy": b"x"})
    assert "a store that has lost its manifest.json: restore that" in error_of(tmp_path / "store")


def test_unknown_sources(tmp_path):
    assert "nearest: digits" in error_of("digtis")
    assert "no such file" in error_of(str(tmp_path / "gone"))
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(picture(0)))
    assert "expected a folder" in error_of(file)
    hub = error_of("someone/some-photos")
    assert "hf download someone/some-photos --repo-type dataset --local-dir some-photos" in hub
    assert "hf download" not in error_of(str(tmp_path / "gone"))
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"x")
    assert "name the folder that save_to_disk made" in error_of(tmp_path / "data-00000-of-00001.arrow")
    assert "expected 1 to 8000" in error_of("digits", resolution=0)
    assert "expected 1 to 8000" in error_of("digits", resolution=10**6)
    assert "error, skip" in error_of("digits", on_bad_image="ignore")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_no_pickle_is_loaded(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in error_of(tmp_path / "x.pkl")
    objects = np.array([Bomb()], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    assert "Python objects" in error_of(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 4, 4), np.uint8), labels=objects)
    assert "Python objects" in error_of(tmp_path / "x.npz")


def test_a_zip_that_is_none(tmp_path):
    file = tmp_path / "data.zip"
    file.write_bytes(b"PK but not really")
    assert "data.zip is no zip file" in error_of(file)
    whole = make_zip(tmp_path / "whole.zip", {"a.png": encoded(picture(0))}).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "data.zip is no zip file" in error_of(file)


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png", "\\a.png", "x\\..\\a.png", "C:\\a.png"])
def test_unsafe_zip_names(tmp_path, name):
    path = make_zip(tmp_path / "data.zip", {"good.png": encoded(picture(0)), name: encoded(picture(1))})
    message = error_of(path)
    assert "unsafe name" in message and repr(name) in message
    assert "unsafe name" in error_of(path, on_bad_image="skip")  # never skipped


def test_damaged_zip_entry(tmp_path):
    path = make_zip(tmp_path / "data.zip", {"a.png": encoded(picture(0)), "b.bmp": encoded(picture(1), "BMP")})
    data = bytearray(path.read_bytes())
    at = data.find(b"BM", data.find(b"b.bmp")) + 100
    data[at] ^= 0xFF  # one pixel: the BMP decodes, the zip's CRC does not match
    path.write_bytes(data)
    assert "b.bmp" in error_of(path, read=True)


def test_decompression_bombs(tmp_path):
    make_folder(tmp_path, {"bomb.png": png_header(8001, 8000)})
    assert "bomb.png is 8001 x 8000, above the limit of 64,000,000 pixels" in error_of(tmp_path)
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    assert "bomb.png is above the limit" in error_of(tmp_path)
    bmp = encoded(Image.new("L", (5000, 5000)), "BMP")  # 25 MB of zeros in 25 kB
    path = make_zip(tmp_path / "bomb.zip", {"a.bmp": bmp}, zipfile.ZIP_DEFLATED)
    assert "a.bmp unpacks to" in error_of(path) and "decompression bomb" in error_of(path)


def test_encrypted_zip_entry(tmp_path):
    path = make_zip(tmp_path / "data.zip", {"a.png": encoded(picture(0))})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1
    path.write_bytes(data)
    assert "encrypted" in error_of(path)


ARRAYS = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (ARRAYS, ARRAYS.transpose(0, 3, 1, 2)),
        (ARRAYS.transpose(0, 3, 1, 2).copy(), ARRAYS.transpose(0, 3, 1, 2)),
        (ARRAYS[..., 0].copy(), ARRAYS[..., 0][:, None]),
        (ARRAYS[..., :1].copy(), ARRAYS[..., 0][:, None]),
        (ARRAYS[:, None, :, :, 0].copy(), ARRAYS[..., 0][:, None]),
    ],
    ids=["nhwc", "nchw", "nhw", "nhw1", "n1hw"],
)
def test_array_layouts(tmp_path, array, expected, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, whatever=array)
    source = open_source(path)
    assert source.length == 3 and source.num_classes == 0
    assert np.array_equal(np.stack([image for _, image, _ in read_all(source)]), expected)


def test_npz_labels(tmp_path):
    np.savez(tmp_path / "x.npz", images=ARRAYS, labels=np.array([4, 0, 2]), other=np.zeros(3))
    source = open_source(tmp_path / "x.npz", resolution=4)
    assert source.num_classes == 5 and [label for _, _, label in read_all(source)] == [4, 0, 2]
    for labels, words in (
        (np.array([0, 1]), "labels must be 3 integers"),
        (np.array([0.0, 1.0, 2.0]), "labels must be 3 integers"),
        (np.eye(3, dtype=np.int64), "labels must be 3 integers"),
        (np.array([0, -1, 2]), "got -1"),
    ):
        np.savez(tmp_path / "x.npz", images=ARRAYS, labels=labels)
        assert words in error_of(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=ARRAYS, b=ARRAYS)
    assert "it holds a, b" in error_of(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (ARRAYS.astype(np.float32), "is float32; images must be uint8"),
        (ARRAYS.astype(np.int64), "is int64; images must be uint8"),
        (ARRAYS[0], "is 5 x 3 pixels"),  # [5, 5, 3] reads as five grey pictures
        (ARRAYS[0, 0], "has the shape [5, 3]"),
        (np.zeros((2, 4, 4, 2), np.uint8), "has the shape [2, 4, 4, 2]"),
        (np.zeros((2, 4, 6, 3), np.uint8), "is 6 x 4 pixels"),
        (np.zeros((0, 4, 4), np.uint8), "no image"),
        (np.array(7, np.uint8), "has the shape []"),
        (np.asfortranarray(ARRAYS), "Fortran order"),
    ],
)
def test_bad_arrays(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    assert words in error_of(tmp_path / "x.npy").replace("3 x 5", "5 x 3")


def test_damaged_arrays(tmp_path):
    np.save(tmp_path / "x.npy", ARRAYS)
    whole = (tmp_path / "x.npy").read_bytes()
    for data in (whole[:-10], whole[:40], whole[:3], b"", b"not an array" * 20):
        (tmp_path / "x.npy").write_bytes(data)
        assert "x.npy is" in error_of(tmp_path / "x.npy")
    (tmp_path / "x.npz").write_bytes(whole)
    assert "x.npz is no zip file" in error_of(tmp_path / "x.npz")
    make_zip(tmp_path / "x.npz", {"images.npy": whole[:-10]})
    assert "truncated" in error_of(tmp_path / "x.npz")
    make_zip(tmp_path / "x.npz", {"images.png": encoded(picture(0))})
    assert "no .npz of arrays" in error_of(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=ARRAYS)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[data.find(b"NUMPY") + 200] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(data)
    assert "damaged" in error_of(tmp_path / "x.npz", read=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    folder = make_folder(tmp_path / "set", {"a.png": encoded(picture(0))})
    os.mkfifo(folder / "b.png")
    os.mkfifo(folder / "notes")  # never opened, so never in the way
    assert f"{folder / 'b.png'} is no regular file" in error_of(folder)
    assert open_source(folder, on_bad_image="skip").length == 1
    (folder / "b.png").unlink()
    os.mkfifo(folder / "dataset.json")
    assert f"{folder / 'dataset.json'} is no" in error_of(folder)
    os.mkfifo(folder / "manifest.json")
    assert not is_store(folder)
    for name in ("x.zip", "x.npy", "x.npz", "x"):
        os.mkfifo(tmp_path / name)
        assert f"{tmp_path / name} is no regular file" in error_of(tmp_path / name)
    assert "/dev/null is no regular file" in error_of("/dev/null")
    for name in ("tars/x.tar", "tables/x.parquet"):
        (tmp_path / name).parent.mkdir()
        os.mkfifo(tmp_path / name)
        assert f"{tmp_path / name} is no regular file" in error_of((tmp_path / name).parent)
        assert f"{tmp_path / name} is no regular file" in error_of(f"{(tmp_path / name).parent}/*")


def test_an_empty_source_is_not_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path, {"a.png": encoded(picture(0)), "b.png": encoded(picture(1))}))
    assert open_source(".").length == 2
    assert error_of("").startswith("the source is empty; expected a folder")
    prepare(open_source("."), tmp_path / "store")
    monkeypatch.chdir(tmp_path / "store")
    assert is_store(".") and not is_store("")


def test_rows_of_digits_and_arrays(tmp_path):
    check_rows(open_source("digits", resolution=4))
    labels = np.array([4, 0, 2])
    np.save(tmp_path / "x.npy", ARRAYS)
    np.savez(tmp_path / "stored.npz", images=ARRAYS, labels=labels)
    np.savez_compressed(tmp_path / "packed.npz", images=ARRAYS, labels=labels)
    for name in ("x.npy", "stored.npz", "packed.npz"):
        source = open_source(tmp_path / name)
        items = check_rows(source)
        assert np.array_equal(np.stack([item.image for item in items]), ARRAYS.transpose(0, 3, 1, 2))
        assert [item.label for item in items] == ([-1] * 3 if name == "x.npy" else [4, 0, 2])
        before = source.fingerprint(0, 1)
        touch(tmp_path / name)
        assert source.fingerprint(0, 1) != before
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match="cannot be read"):
            next(source.read(2, 3))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_rows_and_sidecar_text(tmp_path, kind):
    files = {f"{side}/{i}.png": encoded(picture(i)) for i, side in enumerate("abbab")}
    texts = {
        "a/0.txt": "ein Hündchen\n".encode(),
        "a/0.caption": b"",
        "a/3.json": b'{"a": 1}',
        "b/1.txt": b"\xef\xbb\xbfcat",
    }
    texts |= {"b/9.caption": b"of no image", "b/2.TXT": b"x", "b/2.md": b"x"}
    content = {**files, **texts}
    path = make_folder(tmp_path / "d", content) if kind == "folder" else make_zip(tmp_path / "d.zip", content)
    source = open_source(path)
    assert source.text_kinds == ("txt", "caption", "json") and source.num_classes == 2
    assert {item.name: item.text for item in check_rows(source)} == {
        "a/0.png": {"txt": "ein Hündchen\n", "caption": ""},
        "a/3.png": {"json": '{"a": 1}'},
        "b/1.png": {"txt": "cat"},
        "b/2.png": {},
        "b/4.png": {},
    }
    first, last = source.fingerprint(0, 1), source.fingerprint(4, 5)
    touch(path / "a/0.txt" if kind == "folder" else path)
    assert source.fingerprint(0, 1) != first
    assert (source.fingerprint(4, 5) != last) == (kind == "zip")


def test_no_sidecars_no_text(tmp_path):
    make_folder(tmp_path, {"dataset.png": encoded(picture(0)), "dataset.json": dataset(None)})
    source = open_source(tmp_path)
    assert source.text_kinds == () and [item.text for item in source.read()] == [{}]  # dataset.json is no sidecar


@pytest.mark.parametrize(
    ("text", "words"), [(b"\xff\xfe", "is no UTF-8"), (b"x" * (2**20 + 1), "more than 1,048,576 bytes")]
)
def test_bad_sidecars(tmp_path, text, words):
    make_folder(tmp_path, {"a.png": encoded(picture(0)), "a.txt": text, "b.png": encoded(picture(1))})
    message = error_of(tmp_path, read=True)
    assert "a.png has the text a.txt" in message and words in message
    source = open_source(tmp_path, on_bad_image="skip")
    assert [(item.row, item.name) for item in check_rows(source)] == [(1, "b.png")] and list(source.skipped) == [
        "a.png"
    ]


def test_fingerprints_see_what_is_outside_of_the_rows(tmp_path):
    make_folder(tmp_path, {"a.png": encoded(picture(0, mode="L")), "b.png": encoded(picture(1, mode="L"))})
    grey = open_source(tmp_path).fingerprint(0, 1)
    assert open_source(tmp_path).fingerprint(0, 1) == grey != open_source(tmp_path, resolution=4).fingerprint(0, 1)
    make_folder(tmp_path, {"c.png": encoded(picture(2))})  # now all are RGB
    assert open_source(tmp_path).fingerprint(0, 1) != grey
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        source.fingerprint(0, 1)


def test_a_mistyped_name_gets_the_nearest_that_is_there(tmp_path):
    for name in ("photos", "photos-2", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"'.*photo' is no built-in .* exists; nearest: .*/photos, .*/photos-2$"):
        open_source(tmp_path / "photo")
    with pytest.raises(InputError, match=r"there is no run folder .*othr; nearest: .*/other$"):
        RunFolder.existing(tmp_path / "othr")
    with pytest.raises(InputError, match=r"there is no run folder .*zzz$"):
        RunFolder.existing(tmp_path / "zzz")
    with pytest.raises(InputError, match="known: digits"):
        open_source(tmp_path / "nowhere" / "zzz")
