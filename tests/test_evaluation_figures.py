"""Figures of runs: what is drawn is what the models say, of the images that were asked for, and refusals say why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_run
from PIL import Image

from fastambient import cli
from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.errors import InputError
from fastambient.evaluation import figures
from fastambient.evaluation.figures_layout import Block, draw, wrapped
from fastambient.pictures import enlarge, grid, save_png, to_uint8
from fastambient.sampling import export, latents, load, sample
from fastambient.training.config import network_config
from fastambient.training.loop import build_network
from fastambient.training.run import RunFolder


def with_weights(run):
    """The run with random weights in the place of trained ones: an answer depends on the input, and no step is taken."""
    folder = RunFolder.existing(run)
    settings, store = folder.read_settings(), folder.open_store(verify=False)
    network = build_network(settings, store, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    state = {k: v + 0.05 * torch.randn(v.shape, generator=g) for k, v in network.state_dict().items()}
    told = {
        "network": network_config(settings, channels=store.channels, num_classes=store.num_classes),
        "sigma_data": settings.noise.sigma_data,
        "sampling": settings.tree()["sampling"] | {"steps": 4},
    }
    export(folder.weights, state, told)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An EDM and an ambient run on the same 100 digits, untrained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for name, sigma_tn in (("edm", 0), ("ambient", 0.2)):
        made.append(with_weights(make_run(folder / name, f"noise.sigma_tn={sigma_tn}", f"training.seed={len(made)}")))
    return made


@pytest.fixture
def drawn(monkeypatch):
    """The blocks that a figure hands to `draw`, which draws them as well."""
    blocks: list[Block] = []

    def record(path, given, **options):
        blocks.extend(given)
        draw(path, given, **options)

    monkeypatch.setattr(figures, "draw", record)
    return blocks


def keys(images):
    return {image.tobytes() for image in images}


def test_denoised_shows_each_model_s_answer_to_the_same_noise(runs, drawn, tmp_path):
    levels = [0.1, 0.7, 3.0]
    out = figures.denoised(runs, tmp_path / "f.png", images=2, sigmas=levels)
    models, store = [load(run) for run in runs], RunFolder.existing(runs[0]).open_store()
    train, holdout = keys(store.train.images[:]), keys(store.holdout.images[:])
    assert [b.title for b in drawn] == ["training image 0", "training image 1", "held-out image 0", "held-out image 1"]
    for k, block in enumerate(drawn):
        assert block.tiles.shape == (1 + 2, 1 + 3, 1, 8, 8)
        assert list(block.rows) == ["given to the models", "edm (EDM)", "ambient (σ_tn 0.2)"]
        image = block.tiles[0, 0]
        assert image.tobytes() in (train if k < 2 else holdout - train)
        assert all(np.array_equal(row[0], image) for row in block.tiles)
        x0 = torch.from_numpy(image).float()[None] / 127.5 - 1
        eps = latents([k], store.shape)
        for j, sigma in enumerate(levels):
            x = x0 + sigma * eps
            assert np.array_equal(block.tiles[0, 1 + j], to_uint8(x)[0])
            for r, model in enumerate(models):
                with torch.no_grad():
                    y = to_uint8(model(x, sigma))[0].numpy()
                assert np.abs(block.tiles[1 + r, 1 + j].astype(int) - y).max() <= 1
    assert list(drawn[0].columns) == ["image", "σ = 0.1", "σ = 0.7", "σ = 3"] and not drawn[1].columns
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 4 * 64 and picture.height > 12 * 64


def test_the_usual_levels_follow_the_resolution():
    assert figures._levels(64) == [0.38, 0.75, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0]
    assert figures._levels(8)[2] == pytest.approx(1.5 * 8 / 64, rel=0.05) and len(figures._levels(8)) == 8


def test_an_image_that_another_run_trained_on_is_not_called_held_out(runs, drawn, tmp_path):
    """Two splits of the digits: the shared training images, and those that neither trained on."""
    other = with_weights(make_run(tmp_path / "other", "data.split_seed=1"))
    figures.denoised([runs[0], other], tmp_path / "f.png", images=1, sigmas=[1.0])
    stores = [RunFolder.existing(run).open_store() for run in (runs[0], other)]
    sets = [keys(store.train.images[:]) for store in stores]
    trained, held = (block.tiles[0, 0].tobytes() for block in drawn)
    assert trained in sets[0] & sets[1] and held not in sets[0] | sets[1]
    ids = [set(store.train.ids.tolist()) for store in stores]
    places = figures._never_trained([runs[0], other], stores, 1500)
    assert not (ids[0] | ids[1]) & set(stores[0].holdout.ids[places].tolist()) and places != list(range(1500))
    shared = len(set(stores[0].train.ids.tolist()) & set(stores[1].train.ids.tolist()))
    with pytest.raises(InputError, match=f"share {shared} training images, expected {shared + 1}"):
        figures.denoised([runs[0], other], tmp_path / "f.png", images=shared + 1)


def test_a_conditional_model_is_told_the_class(drawn, tmp_path, monkeypatch):
    run = with_weights(make_run(tmp_path / "classes", "data.use_labels=true"))
    told = []

    def loaded(path, **options):
        denoiser = load(path, **options)
        forward = denoiser.forward
        denoiser.forward = lambda x, sigma, labels=None: (told.append(labels), forward(x, sigma, labels))[1]
        return denoiser

    monkeypatch.setattr(figures, "load", loaded)
    figures.denoised([run], tmp_path / "f.png", images=2, sigmas=[0.5, 1.0])
    store = RunFolder.existing(run).open_store()
    wanted = [*store.train.labels[:2].repeat(2), *store.holdout.labels[:2].repeat(2)]
    assert told[0].argmax(1).tolist() == wanted and told[0].shape == (8, 10)


def test_samples_are_each_run_s_at_the_same_seeds(runs, drawn, tmp_path):
    figures.samples(runs, range(6), tmp_path / "f.png")
    for run, block in zip(runs, drawn, strict=True):
        assert np.array_equal(block.tiles[0, 0], grid(sample(load(run), range(6)), 3))
    assert drawn[0].title == "edm (EDM): 6 samples"


@pytest.mark.parametrize(("n", "columns"), [(64, 8), (32, 8), (20, 5), (31, 6), (1, 1), (2, 2), (100, 10)])
def test_the_last_row_is_filled_where_it_can_be(n, columns):
    assert figures._columns(n) == columns


def test_neighbours_stand_under_their_sample_and_copies_are_named(drawn, tmp_path, runs):
    store = RunFolder.existing(runs[0]).open_store()
    train, holdout = store.train.images[:], store.holdout.images[:100]
    planted = [train[7], holdout[3], train[42]]
    for i, image in enumerate(planted):
        (tmp_path / "samples").mkdir(exist_ok=True)
        save_png(tmp_path / "samples" / f"{i}.png", image)
    figures.neighbours(runs[0], tmp_path / "f.png", samples=tmp_path / "samples")
    (block,) = drawn
    assert list(block.rows) == ["sample", "nearest training image", "nearest held-out image"]
    assert np.array_equal(block.tiles[0], planted)
    assert np.array_equal(block.tiles[1, [0, 2]], train[[7, 42]]) and np.array_equal(block.tiles[2, 1], holdout[3])
    assert block.columns[0] == "0.00 copy" and block.columns[2] == "0.00 copy" and "copy" not in block.columns[1]
    assert block.alarmed == {0, 2} and "2 of 3 samples are copies (d1/d2 < 0.333)" in block.title


def test_neighbours_of_a_run_with_flips_are_mirrored(drawn, tmp_path, runs):
    run = make_run(tmp_path / "flips", "data.xflip=true")
    store = RunFolder.existing(run).open_store()
    (tmp_path / "samples").mkdir()
    flipped = store.train.images[5:6][0][..., ::-1]
    save_png(tmp_path / "samples" / "0.png", flipped)
    figures.neighbours(run, tmp_path / "f.png", samples=tmp_path / "samples")
    assert np.array_equal(drawn[0].tiles[1, 0], flipped) and drawn[0].alarmed == {0}


def test_neighbours_without_held_out_images_show_the_training_images_alone(drawn, tmp_path):
    prepare(open_source("digits"), tmp_path / "store", train=100, holdout=0)
    run = with_weights(make_run(tmp_path / "run", data=str(tmp_path / "store")))
    figures.neighbours(run, tmp_path / "f.png", num=9)
    assert [len(block.rows) for block in drawn] == [2, 2] and drawn[1].tiles.shape[1] == 1 and not drawn[1].title
    with pytest.raises(InputError, match="holds 0 held-out images that none of the runs trained on, expected 1"):
        figures.denoised([run], tmp_path / "f.png")


def test_labels_break_between_folders_and_words():
    assert wrapped("pictures-16/ambient-0.375-seed0 (\u03c3_tn 0.375)").split("\n") == [
        "pictures-16/", "ambient-0.375-seed0", "(\u03c3_tn 0.375)",
    ]  # fmt: skip
    assert wrapped("a/edm-seed0 (EDM)") == "a/edm-seed0 (EDM)"
    assert all(len(line) <= 20 for line in wrapped("x" * 40).split("\n"))


def test_tiles_are_drawn_pixel_for_pixel(tmp_path):
    """In colour and in grey; labels stand around the tiles, not on them."""
    for channels in (1, 3):
        tiles = np.random.default_rng(0).integers(0, 256, (2, 3, channels, 8, 8), dtype=np.uint8)
        block = Block(
            "a title of several lines, " * channels,
            tiles,
            ["one", "a very long name of a model that is broken"],
            ["a", "b", "c"],
            frozenset([1]),
        )
        draw(tmp_path / "f.png", [block, block])
        with Image.open(tmp_path / "f.png") as picture:
            got = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        canvas = grid(enlarge(tiles.reshape(6, channels, 8, 8)), 3, scale=1)
        canvas = np.broadcast_to(canvas, (3, *canvas.shape[1:]))
        h, w = canvas.shape[1:]
        found = [
            (y, x)
            for y, x in np.argwhere((got[:, :, :] == canvas[:, :1, :1]).all(0))
            if np.array_equal(got[:, y : y + h, x : x + w], canvas)
        ]
        assert len(found) == 2 and found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r, t: figures.denoised([t / "none"]), "there is no run folder"),
        (lambda r, t: figures.denoised([]), "a figure of no run"),
        (lambda r, t: figures.denoised([t]), "holds no config.yaml"),
        (lambda r, t: figures.denoised(r, t / "f.jpg"), "name one that ends in .png"),
        (lambda r, t: figures.denoised(r, t / "no" / "f.png"), "there is no folder"),
        (lambda r, t: figures.denoised(r, images=0), "--images must be 1 or more"),
        (lambda r, t: figures.denoised(r, images=101), "share 100 training images, expected 101"),
        (lambda r, t: figures.denoised(r, sigmas=[0.1, -1]), "--sigmas must be finite numbers above 0"),
        (lambda r, t: figures.denoised(r, sigmas=[float("nan")]), "--sigmas must be finite numbers above 0"),
        (lambda r, t: figures.denoised([make_run(t / "new")]), "holds no model.safetensors"),
        (lambda r, t: figures.samples(r, []), "at 0 seeds"),
        (lambda r, t: figures.samples([t / "none"], [0]), "there is no run folder"),
        (lambda r, t: figures.neighbours(r[0], num=0), "--num must be 1 or more"),
        (lambda r, t: figures.neighbours(r[0], t / "f.png", samples=t / "none"), "does not exist"),
    ],
)
def test_what_cannot_be_drawn(ask, message, runs, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        ask(runs, tmp_path)
    assert "\n" not in str(error.value)


def test_hand_outs_and_other_sizes_are_refused(runs, tmp_path):
    prepare(open_source("digits"), tmp_path / "out", train=50, hand_out=True, sigma_tn=0.2, noisy="float16")
    run = make_run(tmp_path / "handed", "noise.regime=ambient", data=str(tmp_path / "out"), noise_seed=None)
    with pytest.raises(InputError, match="was handed out"):
        figures.denoised([run])
    with pytest.raises(InputError, match="was handed out"):
        figures.neighbours(run)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (30, 16, 16, 1), dtype=np.uint8))
    prepare(open_source(str(tmp_path / "x.npy")), tmp_path / "large", train=20, holdout=10)
    large = make_run(tmp_path / "big", data=str(tmp_path / "large"))
    with pytest.raises(InputError, match="expected runs on pictures of one size"):
        figures.denoised([runs[0], large], tmp_path / "f.png")


def test_the_command_line(runs, tmp_path, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["figure", *map(str, arguments), "--gpus", "0"])
        return stop.value.code, capsys.readouterr()

    code, said = call("denoised", *runs, "--sigmas", "0.1,1", "--out", tmp_path / "a.png")
    assert code == 0 and said.out == f"{tmp_path / 'a.png'}\n"
    assert call("samples", runs[0], "--seeds", "0-3")[0] == 0 and (runs[0] / "figure-samples.png").is_file()
    assert call("neighbours", runs[0], "--num", "2")[0] == 0 and (runs[0] / "figure-neighbours.png").is_file()
    code, said = call("denoised", runs[0], "--sigmas", "low")
    assert code == 2 and "--sigmas must be numbers" in said.err
