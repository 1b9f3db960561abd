"""Parquet files and save_to_disk folders, written here with pyarrow as `datasets` writes them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from source_checks import check_rows, encoded, error_of, make_folder, picture, png_header, touch

from fastambient.data import open_source
from fastambient.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
tables = pytest.importorskip("fastambient.data.tables")
table_files = pytest.importorskip("fastambient.data.table_files")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "newt"], "_type": "ClassLabel"},
    "caption": {"dtype": "string", "_type": "Value"},
    "id": {"dtype": "int64", "_type": "Value"},
}


def make_table(numbers, *, features=FEATURES, **columns):
    numbers = list(numbers)
    values = {
        "id": pa.array(numbers, pa.int64()),
        "image": pa.array([{"bytes": encoded(picture(i)), "path": f"{i}.png"} for i in numbers], IMAGE),
        "label": pa.array([i % 3 for i in numbers], pa.int64()),
        "caption": pa.array([None if i == 1 else f"picture {i} ü" for i in numbers], pa.string()),
    } | columns
    table = pa.table({name: column for name, column in values.items() if column is not None})
    metadata = None if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


def make_parquet(path, table, rows=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def make_stream(path, table, rows=3, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def make_saved(path, *parts, features=FEATURES, **options):
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        make_stream(path / name, part, **options)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text(json.dumps({"features": features}))
    return path


def make(kind, path, table, rows=3):
    """A set of one file."""
    if kind == "parquet":
        return make_parquet(path / "x.parquet", table, rows)
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b'{"info": {"features": null}}'))
    return make_saved(path / "saved", table, features=features["info"]["features"], rows=rows)


KINDS = pytest.mark.parametrize("kind", ["parquet", "saved"])


@KINDS
def test_a_hugging_face_set(tmp_path, kind):
    source = open_source(make(kind, tmp_path, make_table(range(8))))
    assert (source.length, source.channels, source.resolution) == (8, 3, 8)
    assert (source.num_classes, source.class_names, source.text_kinds) == (3, ["cat", "dog", "newt"], ("caption",))
    items = check_rows(source)
    file = "x.parquet" if kind == "parquet" else "data-00000-of-00001.arrow"
    assert [item.name for item in items] == [f"{file}: row {i}" for i in range(8)]
    for i, item in enumerate(items):
        assert np.array_equal(item.image, np.asarray(picture(i)).transpose(2, 0, 1))
        assert item.label == i % 3 and item.text == ({} if i == 1 else {"caption": f"picture {i} ü"})


def test_several_files(tmp_path):
    for i, numbers in enumerate((range(4), [], range(4, 9))):
        make_parquet(tmp_path / f"a/data/train-{i:05d}-of-00003.parquet", make_table(numbers))
    source = open_source(tmp_path / "a")
    items = check_rows(source)
    assert source.name == "a" and [item.text.get("caption") for item in items][2:] == [
        f"picture {i} ü" for i in range(2, 9)
    ]
    assert [item.name for item in items][3:5] == [
        f"train-0000{f}-of-00003.parquet: row {r}" for f, r in ((0, 3), (2, 0))
    ]
    saved = open_source(make_saved(tmp_path / "b", make_table(range(4)), make_table([]), make_table(range(4, 9))))
    assert [item.image.tobytes() for item in check_rows(saved)] == [item.image.tobytes() for item in items]

    first, last = source.fingerprint(0, 4), source.fingerprint(4, 9)
    touch(tmp_path / "a/data/train-00000-of-00003.parquet")
    assert source.fingerprint(0, 4) != first and source.fingerprint(4, 9) == last
    with pytest.raises(InputError, match=r"train-00000-of-00003\.parquet was changed"):
        next(source.read())
    assert next(source.read(4)).row == 4
    (tmp_path / "a/data/train-00001-of-00003.parquet").unlink()
    assert "lacks train-00001-of-00003.parquet" in error_of(tmp_path / "a")
    assert open_source(tmp_path / "a/data/train-00002-of-00003.parquet").length == 5  # a part that is asked for
    (tmp_path / "b/data-00002-of-00003.arrow").unlink()
    assert "data-00002-of-00003.arrow is missing" in error_of(tmp_path / "b")


def test_splits_of_parquet(tmp_path, capsys):
    for split, count in (("train", 4), ("test", 2)):
        make_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", make_table(range(count)))
    assert open_source(tmp_path).length == 4
    assert "holds test, train: reading train" in capsys.readouterr().err
    assert open_source(f"{tmp_path}/data/test-*.parquet").length == 2 and not capsys.readouterr().err
    (tmp_path / "data/train-00000-of-00001.parquet").rename(tmp_path / "data/dev-00000-of-00001.parquet")
    message = error_of(tmp_path)
    assert "several sets of parquet files (dev, test)" in message and f"{tmp_path}/data/NAME-*.parquet" in message
    for name in ("0.parquet", "1.parquet"):
        make_parquet(tmp_path / "plain" / name, make_table(range(3)))
    assert open_source(tmp_path / "plain").length == 6
    make_folder(tmp_path / "plain", {"logo.png": encoded(picture(0))})
    assert "several kinds of images" in error_of(tmp_path / "plain")
    assert open_source(f"{tmp_path}/plain/*.parquet").length == 6


def test_files_that_do_not_fit_together(tmp_path):
    make_parquet(tmp_path / "0.parquet", make_table(range(3)))
    make_parquet(tmp_path / "1.parquet", make_table(range(3), caption=None))
    assert "1.parquet has the column caption missing, expected string" in error_of(tmp_path)
    make_parquet(tmp_path / "1.parquet", make_table(range(3), label=pa.array(["a", "b", "c"])))
    assert "1.parquet has the column label as string, expected int64 as in 0.parquet" in error_of(tmp_path)
    table = make_table(range(3))
    make_parquet(tmp_path / "0.parquet", table.append_column("image", table["image"]))
    assert "two columns of one name" in error_of(tmp_path)


def test_splits_of_save_to_disk(tmp_path, capsys):
    make_saved(tmp_path / "d/train", make_table(range(4)))
    make_saved(tmp_path / "d/test", make_table(range(2)))
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_source(tmp_path / "d")
    assert source.length == 4 and "holds test, train: reading train" in capsys.readouterr().err
    assert open_source(tmp_path / "d/test").length == 2
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["test"]}')
    assert "no train" in error_of(tmp_path / "d")


@KINDS
def test_columns_without_metadata(tmp_path, kind):
    def opened(table):
        return open_source(make(kind, tmp_path, table))

    source = opened(make_table(range(5), features=None))
    assert source.num_classes == 3 and source.class_names is None and source.text_kinds == ("caption",)
    check_rows(source)
    source = opened(make_table(range(5), features=None, label=None, caption=None))
    assert source.num_classes == 0 and source.text_kinds == () and {item.label for item in check_rows(source)} == {-1}
    images = [item.image.tobytes() for item in source.read()]
    plain = pa.array([encoded(picture(i)) for i in range(5)], pa.large_binary())
    source = opened(make_table(range(5), features=None, image=plain))
    assert [item.image.tobytes() for item in check_rows(source)] == images
    for label, words in (
        ([0, 1, -1], "got -1"),
        ([0, 2**40, 1], "got 1099511627776"),
        ([0, None, 1], "without a label"),
    ):
        assert words in error_of(
            make(kind, tmp_path, make_table(range(3), features=None, label=pa.array(label, pa.int64())))
        )


@KINDS
def test_which_column(tmp_path, kind, capsys):
    def made(table):
        return make(kind, tmp_path, table)

    image = make_table(range(3))["image"]
    mask = FEATURES | {"mask": {"_type": "Image"}}
    assert open_source(made(make_table(range(3), features=mask, mask=image))).length == 3  # the one called image
    two = {"front": {"_type": "Image"}, "back": {"_type": "Image"}}
    message = error_of(made(make_table(range(3), features=two, image=None, front=image, back=image)))
    assert "must have one column of images" in message and "found front, back" in message
    assert "none among id, label, caption" in error_of(made(make_table(range(3), features=None, image=None)))
    assert "must have one column" in error_of(made(make_table(range(3), image=pa.array(["a", "b", "c"]))))
    coarse = FEATURES | {"coarse": {"names": ["x"], "_type": "ClassLabel"}}
    assert open_source(made(make_table(range(3), features=coarse, coarse=pa.array([0, 0, 0])))).num_classes == 3
    assert "coarse" in (said := capsys.readouterr().err) and "taking label" in said
    assert "are string; expected integers" in error_of(made(make_table(range(3), label=pa.array(["a", "b", "c"]))))
    for label in ([0, 1, 3], [0, 1, -1], [0, None, 1]):
        message = error_of(made(make_table(range(3), label=pa.array(label, pa.int64()))), read=True)
        assert "label is" in message and "expected 0 to 2" in message
    bad_names = FEATURES | {"label": {"names": [1, 2], "_type": "ClassLabel"}}
    assert "class names of label" in error_of(made(make_table(range(3), features=bad_names)))


@KINDS
def test_broken_images(tmp_path, kind, capsys):
    jpegs = [encoded(picture(i, (64, 64)), "JPEG") for i in range(9)]
    jpegs[4] = jpegs[4][: len(jpegs[4]) // 2]
    jpegs[6], jpegs[7] = png_header(60_000, 60_000), None
    path = make(
        kind, tmp_path, make_table(range(9), image=pa.array([{"bytes": b, "path": None} for b in jpegs], IMAGE))
    )
    name = "x.parquet" if kind == "parquet" else "data-00000-of-00001.arrow"
    assert f"{name}: row 6 is above the limit of 64,000,000 pixels" in error_of(path)
    source = open_source(path, on_bad_image="skip")
    assert [item.row for item in check_rows(source)] == [0, 1, 2, 3, 5, 8]
    assert (
        source.skipped.keys() == {f"{name}: row {i}" for i in (4, 6, 7)}
        and source.skipped[f"{name}: row 7"] == "has no image"
    )
    assert capsys.readouterr().err.count("skipped: ") >= 3
    table = make_table(range(6), image=pa.array([{"bytes": b, "path": None} for b in jpegs[:6]], IMAGE))
    message = error_of(make(kind, tmp_path, table), read=True)
    assert f"{name}: row 4 cannot be read" in message and "--on-bad-image skip" in message


@KINDS
def test_paths_without_bytes(tmp_path, kind):
    images = pa.array([{"bytes": None, "path": "/data/1.png"}], IMAGE)
    path = make(kind, tmp_path, make_table([0], image=images))
    message = error_of(path, on_bad_image="skip")
    assert "holds only the path '/data/1.png' of its image" in message and "save_to_disk" in message


@KINDS
def test_limits(tmp_path, kind, monkeypatch):
    path = make(kind, tmp_path, make_table(range(3), caption=pa.array(["a", "x" * (2**20 + 1), "b"])))
    assert "row 1 has the text caption of more than" in error_of(path, read=True)
    assert [item.row for item in check_rows(open_source(path, on_bad_image="skip"))] == [0, 2]
    monkeypatch.setattr(tables, "MAX_ENTRY_BYTES", 100)
    assert "above the limit of 100" in error_of(path)


def test_a_table_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "_BATCH_BYTES", 500)
    source = open_source(make_parquet(tmp_path / "x.parquet", make_table(range(50)), rows=40))
    batches = list(source._files[0].batches(0, ["image"]))
    assert max(batch.num_rows for batch in batches) <= 2 and sum(batch.num_rows for batch in batches) == 40
    assert len(check_rows(source)) == 50


def test_a_decompression_bomb(tmp_path):
    image = pa.array([{"bytes": bytes(2**20), "path": None}] * 40, IMAGE)
    table = pa.table({"image": image})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    assert "refused as a decompression bomb" in error_of(tmp_path / "x.parquet")


@KINDS
def test_damaged_files(tmp_path, kind):
    path = make(kind, tmp_path, make_table(range(9)))
    file = path if kind == "parquet" else path / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:20], b"", b"no table" * 100):
        file.write_bytes(data)
        message = error_of(path)
        assert file.name in message and "cut short" in message
    rng = np.random.default_rng(0)
    for _ in range(100):  # flipped bytes: the same rows, or an error of ours
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        try:
            list(open_source(path, on_bad_image="skip").read())
        except InputError as error:
            assert "\n" not in str(error)


def test_an_arrow_stream_that_ends_between_batches(tmp_path):
    path = make_saved(tmp_path / "s", make_table(range(9)))
    file = path / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert "lacks the end of an Arrow stream" in error_of(path)
    assert "compressed or dictionary" in error_of(
        make_saved(tmp_path / "c", make_table(range(3)), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    )
    coded = make_table(range(3), caption=pa.array(["a", "b", "a"]).dictionary_encode())
    assert "compressed or dictionary" in error_of(make_saved(tmp_path / "c", coded))


def test_offsets_that_point_outside(tmp_path):
    values = pa.array([encoded(picture(i)) for i in range(3)], pa.binary())
    offsets = np.frombuffer(values.buffers()[1], np.int32).copy()
    offsets[2] = 2**30
    table = pa.table(
        {"image": pa.Array.from_buffers(pa.binary(), 3, [None, pa.py_buffer(offsets), values.buffers()[2]])}
    )
    assert "data-00000-of-00001.arrow is cut short, damaged" in error_of(
        make_saved(tmp_path / "s", table, features=None)
    )


def test_damaged_state(tmp_path):
    path = make_saved(tmp_path / "s", make_table(range(3)))
    for text, words in (
        ("{", "cannot be read"),
        ("[]", "no object"),
        ("{}", "lists no files"),
        ('{"_data_files": [{"filename": "../x"}]}', "unsafe name"),
    ):
        (path / "state.json").write_text(text)
        assert words in error_of(path)
    table = make_table(range(3)).replace_schema_metadata({"huggingface": "{"})
    assert "Hugging Face metadata is damaged" in error_of(make_parquet(tmp_path / "x.parquet", table))


def test_without_pyarrow(tmp_path, monkeypatch):
    path = make_parquet(tmp_path / "x.parquet", make_table(range(3)))
    monkeypatch.delitem(sys.modules, "fastambient.data.tables")
    monkeypatch.delitem(sys.modules, "fastambient.data.table_files")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "python -m pip install pyarrow" in error_of(path)
