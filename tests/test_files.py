"""Folders that are whole or absent, and what stands in their way."""

from __future__ import annotations

import pytest

from fastambient.errors import InputError
from fastambient.files import check_parent, new_folder


def make(path, **options):
    with new_folder(path, **options) as folder:
        (folder / "made").write_text("yes")


def test_a_link_leads_to_the_folder_that_is_made(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("link", tmp_path / "disk"), ("dangling", tmp_path / "later")):
        (tmp_path / name).symlink_to(target)
        make(tmp_path / name)
        assert (tmp_path / name).is_symlink() and (target / "made").read_text() == "yes"
    make(tmp_path / "link", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "disk", "later", "link"]


@pytest.mark.parametrize("name", ["file", "file/below", ".", "..", "here/.."])
def test_nothing_is_replaced_that_is_no_folder_of_ours(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "here" / name
    for where in (path, path.relative_to(tmp_path / "here")):
        with pytest.raises(InputError):
            make(where, force=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["here", "file"]
    assert (tmp_path / "here" / "file").read_text() == "mine"


def test_where_no_file_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    check_parent(tmp_path / "file")  # may be replaced
    check_parent(tmp_path / "new" / "folders" / "x.npz")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.npz", f"{tmp_path / 'file'} is a file")):
        with pytest.raises(InputError, match=message):
            check_parent(path)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # the rights of root say nothing
    with pytest.raises(InputError, match=f"{tmp_path} is not writable"):
        check_parent(tmp_path / "new" / "x.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
