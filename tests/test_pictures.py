"""Pictures: rounding, PNG files, grids, and every bad input that a folder or an .npz of samples can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastambient.errors import FastambientError, InputError
from fastambient.pictures import GAP_VALUE, GRID_NAME, grid, load_pictures, save_png, to_uint8


def _pictures(n: int, c: int = 3, h: int = 5, w: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, c, h, w), np.uint8)


def test_to_uint8_rounds_clamps_and_inverts_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    x = torch.tensor([-7.0, -1.0, 0.0, 0.49 / 127.5, 0.51 / 127.5, 1.0, 7.0, float("inf"), float("-inf")])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 128, 255, 255, 255, 0]
    assert to_uint8(torch.tensor([10.4, 10.6]) / 127.5 - 1).tolist() == [10, 11]


def test_to_uint8_computes_half_precision_in_float32():
    x = torch.linspace(-1, 1, 999).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def test_to_uint8_refuses_nan():
    with pytest.raises(FastambientError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_come_back_in_the_order_of_their_names(tmp_path, channels):
    pictures = _pictures(12, channels)
    for i in reversed(range(12)):
        save_png(tmp_path / f"{i:06d}.png", torch.from_numpy(pictures[i]) if i % 2 else pictures[i])
    save_png(tmp_path / GRID_NAME, grid(pictures))
    (tmp_path / "notes.txt").write_text("not a picture")
    assert np.array_equal(load_pictures(tmp_path), pictures)


def test_npz_comes_back(tmp_path):
    pictures = _pictures(3, 1)
    np.savez_compressed(tmp_path / "samples.npz", images=pictures)
    assert np.array_equal(load_pictures(tmp_path / "samples.npz"), pictures)


def test_grid_places_pictures_row_by_row_with_gaps():
    pictures = _pictures(5, 1, 4, 4)
    whole = grid(torch.from_numpy(pictures), columns=3, scale=2)
    assert whole.shape == (1, 2 * 8 + 2, 3 * 8 + 2 * 2) and whole.dtype == np.uint8
    for i in range(5):
        y, x = i // 3 * 10, i % 3 * 10
        assert np.array_equal(whole[:, y : y + 8 : 2, x + 1 : x + 8 : 2], pictures[i])
    assert (whole[:, 8:10] == GAP_VALUE).all() and (whole[:, 10:, 20:] == GAP_VALUE).all()


def test_grid_enlarges_small_pictures_only_and_is_about_square():
    assert grid(_pictures(1, 1, 8, 8)).shape == (1, 64, 64)
    assert grid(_pictures(1, 3, 64, 64)).shape == (3, 64, 64)
    assert grid(_pictures(9, 3, 8, 8)).shape == (3, 3 * 64 + 4, 3 * 64 + 4)
    assert grid(_pictures(2, 3, 8, 8)).shape == (3, 64, 2 * 64 + 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: grid(_pictures(0)),
        lambda: grid(_pictures(2), columns=0),
        lambda: grid(_pictures(2), scale=0),
        lambda: grid(_pictures(2).astype(np.float32)),
        lambda: grid(_pictures(2)[0]),
        lambda: grid(_pictures(2, c=4)),
    ],
)
def test_grid_refuses_what_it_cannot_show(call):
    with pytest.raises(InputError, match="expected"):
        call()


def _bad_folders(path):
    good = _pictures(1)[0]
    save_png(path / "a.png", good)

    def truncated():
        data = (path / "a.png").read_bytes()
        (path / "b.png").write_bytes(data[: len(data) // 2])

    def other_mode(mode):
        return lambda: Image.new(mode, (7, 5)).save(path / "b.png")

    return {
        "truncated": (truncated, "b.png cannot be read"),
        "text": (lambda: (path / "b.png").write_text("hello"), "b.png cannot be read"),
        "empty file": (lambda: (path / "b.png").touch(), "b.png cannot be read"),
        "jpeg in disguise": (lambda: Image.new("RGB", (7, 5)).save(path / "b.png", "JPEG"), "b.png cannot be read"),
        "sizes": (lambda: save_png(path / "b.png", _pictures(1, 3, 6, 7)[0]), "7x6 with 3 channels but a.png is 7x5"),
        "channels": (lambda: save_png(path / "b.png", good[:1]), "7x5 with 1 channel but"),
        "RGBA": (other_mode("RGBA"), "mode RGBA"),
        "palette": (other_mode("P"), "mode P"),
        "16 bit": (other_mode("I;16"), "mode I;16"),
        "nothing": (lambda: (path / "a.png").unlink(), "holds no PNG"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "truncated",
        "text",
        "empty file",
        "jpeg in disguise",
        "sizes",
        "channels",
        "RGBA",
        "palette",
        "16 bit",
        "nothing",
    ],
)
def test_bad_folder_is_one_clear_line(tmp_path, case):
    spoil, message = _bad_folders(tmp_path)[case]
    spoil()
    with pytest.raises(InputError, match=message) as caught:
        load_pictures(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_bad_npz_is_one_clear_line(tmp_path):
    path = tmp_path / "samples.npz"

    def message() -> str:
        with pytest.raises(InputError) as caught:
            load_pictures(path)
        assert "\n" not in str(caught.value) and "samples.npz" in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message()
    path.write_bytes(b"no zip")
    assert "cannot be read" in message()
    np.savez(path, pictures=_pictures(2))
    assert "no array `images`" in message()
    np.savez(path, images=_pictures(2).astype(np.float32))
    assert "float32" in message()
    np.savez(path, images=_pictures(2).transpose(0, 2, 3, 1))
    assert "[2, 5, 7, 3]" in message()
    np.savez(path, images=_pictures(0))
    assert "0 pictures" in message()
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    assert "cannot be read" in message()
    np.savez(path, images=_pictures(50))
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be read" in message()
    with open(path, "wb") as file:
        np.save(file, _pictures(2))
    assert "images" in message()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"x")
    with pytest.raises(InputError, match="neither a folder"):
        load_pictures(tmp_path / "model.pkl")
