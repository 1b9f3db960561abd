"""WebDataset: tars as they are packed, and every tar that must be refused by the error it gives."""

from __future__ import annotations

import gzip
import io
import tarfile

import numpy as np
import pytest
from source_checks import check_rows, encoded, error_of, make_folder, picture, png_header, touch

from fastambient.data import open_source, tars
from fastambient.data.shard_index import index_shards
from fastambient.errors import InputError


def make_tar(path, entries, **options):
    """`entries`: (name, bytes) or tarfile.TarInfo, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            name, data = entry
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


def special(name, kind, target="x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sample(i, *, label=True, text=True):
    entries = [(f"{i:06d}.png", encoded(picture(i)))]
    entries += [(f"{i:06d}.cls", f"{i % 3}\n".encode())] if label else []
    return entries + ([(f"{i:06d}.txt", f"picture {i}".encode())] if text else [])


def samples(*numbers, **options):
    return [entry for i in numbers for entry in sample(i, **options)]


def test_a_tar(tmp_path):
    path = make_tar(tmp_path / "x.tar", samples(4, 0, 2, 1, 3))
    source = open_source(path)
    assert (source.name, source.length, source.channels, source.resolution) == ("x.tar", 5, 3, 8)
    assert (source.num_classes, source.class_names, source.text_kinds) == (3, None, ("txt",))
    items = check_rows(source)
    assert [item.name for item in items] == [f"x.tar: {i:06d}.png" for i in (4, 0, 2, 1, 3)]  # the order of the tar
    assert [(item.label, item.text) for item in items] == [(i % 3, {"txt": f"picture {i}"}) for i in (4, 0, 2, 1, 3)]
    for i, item in zip((4, 0, 2, 1, 3), items, strict=True):
        assert np.array_equal(item.image, np.asarray(picture(i)).transpose(2, 0, 1))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_samples(tmp_path, form):
    deep = "/".join(["a" * 60] * 4)  # longer than any plain header holds
    png = encoded(picture(0))
    entries = [
        special("./", tarfile.DIRTYPE),
        ("./b/x.y.png", b"no picture: of the kind y.png"),
        ("./b/x.PNG", png),
        ("./b/x.json", b"{}"),
        ("./c/x.png", png),
        ("README.txt", b"no sample"),
        ("._x.png", b"resource fork"),
        ("c/.hidden/x.png", b"hidden"),
    ]
    entries += [(f"{deep}/z.jpg", encoded(picture(0), "JPEG")), (f"{deep}/z.caption", "ü".encode())]
    names = ["b/x.PNG", "c/x.png", f"{deep}/z.jpg"]
    if form == tarfile.USTAR_FORMAT:
        entries, names = entries[:-2], names[:-1]
    source = open_source(make_tar(tmp_path / "x.tar", entries, format=form))
    items = check_rows(source)
    assert [item.name for item in items] == [f"x.tar: {name}" for name in names]
    assert [item.text for item in items] == [{"json": "{}"}, {}, {"caption": "ü"}][: len(names)]
    assert source.num_classes == 0 and {item.label for item in items} == {-1}


def test_folders_and_patterns_of_shards(tmp_path):
    for shard in range(4):
        make_tar(tmp_path / f"set/s-{shard:04d}.tar", samples(2 * shard, 2 * shard + 1))
    folder = tmp_path / "set"
    whole = check_rows(open_source(folder))
    assert [item.name for item in whole][:3] == [
        "s-0000.tar: 000000.png",
        "s-0000.tar: 000001.png",
        "s-0001.tar: 000002.png",
    ]
    for pattern, rows in (
        ("s-{0000..0003}.tar", range(8)),
        ("s-*.tar", range(8)),
        ("s-000[12].tar", range(2, 6)),
        ("s-{0003,0001}.tar", [6, 7, 2, 3]),
        ("s-{0001..0002}.tar", range(2, 6)),
    ):
        items = list(open_source(f"{folder}/{pattern}").read())
        assert [item.image.tobytes() for item in items] == [whole[i].image.tobytes() for i in rows]
    assert "s-0004.tar of the pattern" in error_of(f"{folder}/s-{{0002..0005}}.tar")
    assert "t-*.tar of the pattern" in error_of(f"{folder}/t-*.tar")
    (folder / "notes.md").write_text("not an image")
    assert open_source(folder).length == 8 and "expected .tar or .parquet" in error_of(f"{folder}/*")

    source = open_source(folder)
    first, last = source.fingerprint(0, 2), source.fingerprint(2, 8)
    touch(folder / "s-0000.tar")
    assert source.fingerprint(0, 2) != first and source.fingerprint(2, 8) == last
    with pytest.raises(InputError, match=r"s-0000\.tar was changed"):
        next(source.read())
    assert next(source.read(2)).row == 2
    make_folder(folder, {"sub/a.png": encoded(picture(0))})
    message = error_of(folder)
    assert "several kinds of images" in message and "s-0000.tar" in message and "a.png" in message


def test_shards_of_one_name_in_two_folders(tmp_path):
    for side in "ab":
        make_tar(tmp_path / side / "0.tar", samples(0, 1))
    assert [item.name for item in open_source(f"{tmp_path}/*/0.tar").read()][1:3] == [
        "a/0.tar: 000001.png",
        "b/0.tar: 000000.png",
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (special("bad.png", tarfile.SYMTYPE, "/etc/passwd"), "bad.png is a link to '/etc/passwd'"),
        (special("bad.png", tarfile.LNKTYPE, "000000.png"), "bad.png is a link to '000000.png'"),
        (special("bad.png", tarfile.CHRTYPE), "bad.png is a device"),
        (special("bad.png", tarfile.GNUTYPE_SPARSE), "bad.png is a sparse file"),
        (special("bad.png", tarfile.FIFOTYPE), "bad.png is a device, a pipe"),
        (special("../bad", tarfile.DIRTYPE), "unsafe name '../bad'"),
        (("/bad.png", b""), "unsafe name '/bad.png'"),
        (("a/../../bad.png", b""), "unsafe name 'a/../../bad.png'"),
        (("C:\\bad.png", b""), "unsafe name"),
    ],
)
def test_unsafe_entries(tmp_path, entry, words):
    path = make_tar(tmp_path / "x.tar", [*samples(0), entry, *samples(1)])
    assert words in error_of(path) and str(path) in error_of(path)
    assert words in error_of(path, on_bad_image="skip")  # never skipped


def test_cut_short(tmp_path):
    whole = make_tar(tmp_path / "x.tar", samples(0, 1, 2)).read_bytes()
    ends = members(tmp_path / "x.tar")
    header = ends[-2].offset
    for size in (header, header + 100, header + 512, ends[-1].offset_data + 1, ends[-1].offset_data + 512):
        (tmp_path / "x.tar").write_bytes(whole[:size])
        message = error_of(tmp_path / "x.tar", on_bad_image="skip")
        assert "x.tar is cut short" in message and "download it again" in message
    (tmp_path / "x.tar").write_bytes(b"")
    assert "is no tar file" in error_of(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    assert "is no tar file" in error_of(tmp_path / "x.tar")


def test_a_damaged_header_is_no_end(tmp_path):
    path = make_tar(tmp_path / "x.tar", samples(0, 1, 2))
    at = members(path)[3].offset
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    assert f"a damaged header at byte {at:,}" in error_of(path)


def test_tars_written_one_after_the_other(tmp_path):
    path = make_tar(tmp_path / "x.tar", samples(0))
    path.write_bytes(path.read_bytes() * 2)
    assert "goes on after its end" in error_of(path)


@pytest.mark.parametrize("negative", [b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_a_negative_size(tmp_path, negative, kind):
    info = tarfile.TarInfo("x.png")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136] = negative
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(1024))
    assert "is no tar file, or a damaged one" in error_of(tmp_path / "x.tar")


@pytest.mark.parametrize("size", ["-1024", "-1536", "99999999999999", "x"])
def test_a_size_in_pax_records(tmp_path, size):
    """-1536 leads back to the start of the records, again and again."""
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {"size": size}
    make_tar(tmp_path / "x.tar", [*samples(0), info, *samples(1)], format=tarfile.PAX_FORMAT)
    if size == "x":  # tarfile ignores what is no number
        assert "x.png" in error_of(tmp_path / "x.tar", read=True)
    else:
        assert "damaged" in error_of(tmp_path / "x.tar") or "cut short" in error_of(tmp_path / "x.tar")


def test_extensions_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_MAX_EXTENSION", 1000)
    make_tar(tmp_path / "x.tar", [("a" * 2000 + ".png", encoded(picture(0)))], format=tarfile.GNU_FORMAT)
    assert "claims 2,005 bytes" in error_of(tmp_path / "x.tar")


def test_compressed_tars(tmp_path):
    data = make_tar(tmp_path / "plain.tar", samples(0)).read_bytes()
    (tmp_path / "x.tar").write_bytes(gzip.compress(data))
    assert "x.tar is compressed" in error_of(tmp_path / "x.tar")
    for name, tool in (
        ("x.tar.gz", "gunzip x.tar.gz"),
        ("x.tgz", "gunzip"),
        ("x.tar.xz", "unxz"),
        ("x.tar.bz2", "bunzip2"),
    ):
        make_folder(tmp_path / "set", {name: b""})
        assert f"unpack it to a plain .tar ({tool}" in error_of(tmp_path / "set" / name)
        assert f"unpack it to a plain .tar ({tool}" in error_of(tmp_path / "set")
        (tmp_path / "set" / name).unlink()


def test_a_corrupt_jpeg_in_the_middle(tmp_path, capsys):
    jpeg = encoded(picture(0, (64, 64)), "JPEG")
    pictures = [(f"{i}.jpg", encoded(picture(i, (64, 64)), "JPEG")) for i in range(9)]
    pictures[4] = ("4.jpg", jpeg[: len(jpeg) // 2])
    pictures[6] = ("6.jpg", b"no picture")
    make_tar(tmp_path / "s-0.tar", pictures[:3])
    make_tar(tmp_path / "s-1.tar", pictures[3:])
    assert "s-1.tar: 6.jpg is no PNG" in error_of(tmp_path)  # by its header, which is looked at
    source = open_source(tmp_path, on_bad_image="skip")
    assert source.length == 9 and [item.row for item in check_rows(source)] == [0, 1, 2, 3, 5, 7, 8]
    assert sorted(source.skipped) == ["s-1.tar: 4.jpg", "s-1.tar: 6.jpg"]
    assert capsys.readouterr().err.count("skipped: ") >= 2
    pictures[6] = pictures[5]
    make_tar(tmp_path / "s-1.tar", [*pictures[3:6], *pictures[7:]])
    message = error_of(tmp_path, read=True)
    assert "s-1.tar: 4.jpg cannot be read" in message and "--on-bad-image skip" in message


def test_large_pictures_and_entries(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "x.tar", [*samples(0, label=False), ("b.png", png_header(60_000, 60_000))])
    assert "b.png is above the limit of 64,000,000 pixels" in error_of(path)
    source = open_source(path, on_bad_image="skip")
    assert len(check_rows(source)) == 1 and list(source.skipped) == ["x.tar: b.png"]
    monkeypatch.setattr(tars, "MAX_ENTRY_BYTES", 100)
    assert "000000.png has" in error_of(path) and "above the limit of 100" in error_of(path)
    assert "000000.png has" in error_of(path, on_bad_image="skip")  # nothing else can be read either


def test_nothing_but_broken_images(tmp_path):
    path = make_tar(tmp_path / "x.tar", [("a.png", b"no"), ("b.png", b"no")])
    assert "none of the images of x.tar that were looked at" in error_of(path, on_bad_image="skip")
    assert "no image in x.tar" in error_of(make_tar(tmp_path / "x.tar", [("a.txt", b"no")]))
    assert "no image in x.tar" in error_of(make_tar(tmp_path / "x.tar", []))


def test_labels_of_tars(tmp_path):
    def error(*entries):
        return error_of(make_tar(tmp_path / "x.tar", list(entries)))

    assert "000001.png has no .cls beside it" in error(*samples(0), *samples(1, label=False))
    for text in (b"", b"cat", b"-1", b"1.5", b"1" * 65, b"0x1"):
        assert "000000.cls must be a class number" in error(*samples(0, label=False), ("000000.cls", text))
    for label in (b"1048576", b"9" * 60):
        message = error(*samples(0), *samples(1, label=False), ("000001.cls", label))
        assert "000001.png has a class label in its .cls above 1048575" in message


def test_samples_that_are_torn_apart(tmp_path):
    def error(*entries):
        return error_of(make_tar(tmp_path / "x.tar", list(entries)))

    png = encoded(picture(0))
    assert "x.tar: b.cls has no image next to it" in error(
        ("a.png", png), ("b.cls", b"1"), ("b.txt", b""), ("a.cls", b"1")
    )
    assert "holds a key twice" in error(("a.png", png), ("b.png", png), ("a.txt", b"a"), ("b.txt", b"b"))
    assert "holds a key twice" in error(("a.png", png), ("b.png", png), ("a.png", png))
    assert "a.jpg is a second image of one sample, beside a.png" in error(("a.png", png), ("a.jpg", png))


def test_grey_colour_and_size(tmp_path, monkeypatch):
    grey, colour = encoded(picture(0, mode="L")), encoded(picture(1))
    path = make_tar(tmp_path / "x.tar", [("a.png", grey), ("b.png", grey)])
    assert open_source(path).channels == 1
    make_tar(path, [("a.png", grey), ("b.png", grey), ("c.png", colour)])
    assert {item.image.shape for item in check_rows(open_source(path))} == {(3, 8, 8)}
    monkeypatch.setattr(tars, "LOOK_AT", 1)  # the coloured one is met when it is read
    assert open_source(path).channels == 1
    assert "c.png is in colour, but the images looked at" in error_of(path, read=True)
    source = open_source(path, on_bad_image="skip")
    assert [item.name for item in check_rows(source)] == ["x.tar: a.png", "x.tar: b.png"] and len(source.skipped) == 1
    make_tar(path, [("a.png", grey), ("b.png", encoded(picture(1, (6, 6), "L")))])
    assert "b.png is 6 x 6 pixels" in error_of(path, read=True, on_bad_image="skip")
    assert len(check_rows(open_source(path, resolution=6))) == 2


def test_a_large_index_is_small(tmp_path):
    """Bytes a sample of the index: what two million samples would take."""
    n = 2000
    jpeg = encoded(picture(0), "JPEG")
    entries = [
        entry for i in range(n) for entry in ((f"{i:09d}.jpg", jpeg), (f"{i:09d}.cls", b"1"), (f"{i:09d}.txt", b"t"))
    ]
    source = open_source(make_tar(tmp_path / "x.tar", entries))
    (shard,) = source._shards
    arrays = [shard.labels, shard.name_ends, *shard.images, *(a for places in shard.texts.values() for a in places)]
    assert source.length == n and (sum(a.nbytes for a in arrays) + len(shard.names)) / n < 60


def test_pictures_of_other_kinds_are_counted(tmp_path, capsys):
    for number in range(2):
        others = [("x.gif", b"GIF89a"), ("y.HEIC", b"x"), (".z.gif", b"hidden")]
        make_tar(tmp_path / f"{number}.tar", [*samples(2 * number, 2 * number + 1), *others])
    assert open_source(tmp_path).length == 4
    assert "pictures that are not read (2 .gif, 2 .heic)" in capsys.readouterr().err
    index_shards(str(tmp_path))
    assert "pictures that are not read (2 .gif, 2 .heic)" in capsys.readouterr().err
