"""Folders that are whole or absent, and what stands in their way."""

from __future__ import annotations

import os
import stat
import subprocess

import pytest
from conftest import make_run, train_here

from fastambient.data import open_source, prepare
from fastambient.errors import InputError
from fastambient.files import check_parent, new_folder, write_bytes
from fastambient.sampling import write_samples


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


def test_stores_runs_and_samples_are_not_committed_by_accident(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "core.excludesFile="]
    subprocess.run([*git, "init", "-q"], check=True)
    prepare(open_source("digits"), tmp_path / "store", sigma_tn=0.3, train=10, holdout=2)
    run = make_run(tmp_path / "run", "training.kimg=0.008", "training.checkpoint_kimg=0.008")
    train_here(run)
    write_samples(run, [0], tmp_path / "samples")
    seen = subprocess.run([*git, "status", "--porcelain", "-uall"], check=True, capture_output=True, text=True).stdout
    assert seen == ""
    prepare(open_source("digits"), tmp_path / "handout", sigma_tn=0.3, noisy="float16", hand_out=True)
    seen = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    assert seen == "?? handout/\n", "what is made to be handed out may be"


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    """``--out /dev/null`` by root would leave a file there, for every program."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="exists and is no file"):
        write_bytes(tmp_path / "pipe", b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
