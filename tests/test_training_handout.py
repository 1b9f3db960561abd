"""Training on a hand-out: the ambient regime alone, or both with a clean store; and what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fastambient.data import open_source, prepare
from fastambient.data.mixed import HandOutRows
from fastambient.diffusion.edm import draw_sigma
from fastambient.errors import InputError
from fastambient.evaluation.run import evaluate_run
from fastambient.sampling import load, write_samples
from fastambient.sampling.plan import chosen_settings
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run, start

SIGMA_TN = 0.3
TINY = {
    "model": {"model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": ()},
    "training": {"device": "cpu", "batch": 32, "kimg": 0.128, "augment": 0.0, "checkpoint_kimg": 1.0},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores")
    source = open_source("digits")
    options = {"sigma_tn": SIGMA_TN, "train": 200, "noisy": "float32"}
    handed = prepare(source, path / "handed", hand_out=True, **options)
    clean = prepare(source, path / "clean", train=20, holdout=30, split_seed=1, noise_seed=5)
    return handed, clean


def rows_of(stores, *, clean=True, seed=3):
    handed, own = stores
    return HandOutRows(
        handed.train, own.train if clean else None, seed=seed, sigma_tn=SIGMA_TN, noise_seed=5, labelled=True,
        sigma_of=partial(draw_sigma, seed=seed),
    )  # fmt: skip


def run_of(tmp_path, stores, *, clean=True, name="run", **noise):
    handed, own = stores
    data = {"clean": str(own.path)} if clean else {}
    options = TINY | {"data": data, "noise": {} if clean else {"regime": "ambient"}}
    options["noise"] = options["noise"] | noise
    request = TrainRequest(data=str(handed.path), preset="digits", options=options)
    return create_run(plan(request), tmp_path / name)


def test_regimes_draw_what_they_may_see(stores):
    handed, own = stores
    rows, positions = rows_of(stores), torch.arange(4000)
    assert len(rows) == 220
    index, sigma = rows.index(positions), draw_sigma(positions, seed=3)
    ambient = sigma >= SIGMA_TN
    assert (index[~ambient] >= 200).all() and len(index[~ambient].unique()) == 20
    assert len(index[ambient].unique()) == 220 and 0.05 < (index[ambient] >= 200).float().mean() < 0.13  # 20 of 220
    assert torch.equal(index[1000:1010], rows.index(torch.arange(1000, 1010)))

    found = rows.fetch(np.array([0, 199, 200, 219, 7]))
    assert found["clean"].tolist() == [False, False, True, True, False]
    assert not found["images"][[0, 1, 4]].any() and np.array_equal(found["images"][2:4], own.train.images[[0, 19]])
    assert np.array_equal(found["x_n"][[0, 1, 4]], handed.train.noisy[[0, 199, 7]])
    copy = prepare(open_source("digits"), own.path.parent / "noised", train=20, holdout=30, split_seed=1, noise_seed=5, sigma_tn=SIGMA_TN, noisy="float32", force=True)  # fmt: skip
    assert np.allclose(found["x_n"][2:4], copy.train.noisy[[0, 19]], atol=1e-6)
    assert np.array_equal(found["labels"][:2], handed.train.labels[[0, 199]])
    assert np.array_equal(found["ids"][2:4], own.train.ids[[0, 19]])


def test_sigma_above_sigma_tn_is_the_conditional_distribution():
    positions = torch.arange(200_000)
    given = draw_sigma(positions, seed=1, above=0.4)
    free = draw_sigma(positions, seed=2)
    free = free[free >= 0.4]
    assert given.min() >= 0.4 and given.dtype == torch.float32
    for q in (0.1, 0.5, 0.9, 0.99):
        assert given.quantile(q) == pytest.approx(free.quantile(q).item(), rel=0.03)


@pytest.mark.parametrize("loader", ["resident", "workers"])
def test_no_clean_image_of_a_hand_out_is_ever_used(tmp_path, stores, loader, monkeypatch):
    """The loss and the network's input are the same whatever stands where a hand-out has no image."""
    trainer = Trainer(RunFolder(run_of(tmp_path, stores)), World(device=torch.device("cpu")))
    step, positions = trainer.step, torch.arange(300)
    batch = step.loader.at(positions)
    assert 100 < int((~batch.clean).sum()) < 299
    with torch.no_grad():
        sigma, loss = step.forward(batch)
        batch.images[~batch.clean] = 77
        again = step.forward(batch)[1]
    assert (sigma[~batch.clean] >= SIGMA_TN).all() and (sigma < SIGMA_TN).any()
    assert torch.equal(loss, again)
    batch.images[batch.clean] = 77
    with torch.no_grad():
        assert not torch.equal(loss, step.forward(batch)[1])


def test_a_sigma_that_the_host_rounds_in_another_way(tmp_path, stores):
    trainer = Trainer(RunFolder(run_of(tmp_path, stores)), World(device=torch.device("cpu")))
    batch = trainer.step.loader.at(torch.arange(64))
    batch.clean[:] = False
    with torch.no_grad():
        assert (trainer.step.forward(batch)[0] >= SIGMA_TN).all()


def test_both_regimes_train(tmp_path, stores):
    path = run_of(tmp_path, stores)
    start(path)
    assert len(load(path / "model.safetensors").metadata["noise"]) and RunFolder(path).read_noise_seed() == 5
    with pytest.raises(InputError, match="was handed out: it holds no clean training image"):
        evaluate_run(path)
    start(path, resume=True)
    prepare(open_source("digits"), stores[1].path, train=20, holdout=30, split_seed=2, force=True)
    try:
        with pytest.raises(InputError, match="is not the store that"):
            RunFolder(path).open_clean()
    finally:
        prepare(open_source("digits"), stores[1].path, train=20, holdout=30, split_seed=1, noise_seed=5, force=True)


def test_the_ambient_regime_alone(tmp_path, stores):
    path = run_of(tmp_path, stores, clean=False)
    trainer = Trainer(RunFolder(path), World(device=torch.device("cpu")))
    sigma, _ = trainer.step.forward(trainer.step.loader.at(torch.arange(100)))
    assert (sigma >= SIGMA_TN).all()
    start(path)
    model = load(path / "model.safetensors")
    assert chosen_settings(model).sigma_min == SIGMA_TN  # samples stop where nothing was learnt
    assert chosen_settings(model, sigma_min=0.5).sigma_min == 0.5


@pytest.mark.parametrize(
    "which, options, words",
    [
        (
            "handed",
            {},
            r"was handed out: it holds images noised at sigma_tn 0\.3 alone.*--clean STORE.*--regime ambient",
        ),
        ("handed", {"noise": {"sigma_tn": 0.5}}, "--sigma-tn 0.5: the noised copy"),
        ("handed", {"noise": {"mode": "fresh", "regime": "ambient"}}, "noise.mode fresh"),
        ("handed", {"data": {"clean": "handed"}}, "was handed out, too"),
        ("handed", {"data": {"clean": "clean"}, "noise": {"regime": "ambient"}}, "leave --clean out"),
        ("clean", {"data": {"clean": "clean"}}, "holds clean images itself"),
        ("clean", {"noise": {"regime": "ambient"}}, "holds clean images: leave it out"),
        ("digits", {"noise": {"regime": "ambient"}}, "are for a store that was handed out"),
    ],
)
def test_what_is_refused(stores, which, options, words):
    handed, clean = stores
    paths = {"handed": str(handed.path), "clean": str(clean.path)}
    options = {k: dict(v) for k, v in (TINY | options).items()}
    if "clean" in options.get("data", {}):
        options["data"]["clean"] = paths[options["data"]["clean"]]
    with pytest.raises(InputError, match=words):
        plan(TrainRequest(data=paths.get(which, which), preset="digits", options=options))


def test_a_noise_seed_and_other_shapes(tmp_path, stores):
    handed, _ = stores
    with pytest.raises(InputError, match="its noise has no seed"):
        plan(TrainRequest(data=str(handed.path), preset="digits", options=TINY, noise_seed=4))
    other = prepare(open_source("digits", resolution=16), tmp_path / "other", train=20)
    options = TINY | {"data": {"clean": str(other.path)}}
    with pytest.raises(InputError, match=r"the clean images are \[1, 16, 16\], those handed out \[1, 8, 8\]"):
        plan(TrainRequest(data=str(handed.path), preset="digits", options=options))


def test_classes_must_mean_the_same(tmp_path, stores):
    handed, own = stores
    images = np.concatenate([own.train.images[:], own.holdout.images[:]])
    np.savez(tmp_path / "set.npz", images=images[:, 0], labels=np.arange(50) % 3)
    other = prepare(open_source(tmp_path / "set.npz"), tmp_path / "other")
    options = TINY | {"data": {"clean": str(other.path), "use_labels": True}}
    with pytest.raises(InputError, match=r"have classes 0, 1, .*those of .*other 0\.\.2; a class number must mean"):
        plan(TrainRequest(data=str(handed.path), preset="digits", options=options))


def test_what_an_ambient_run_says_of_its_draws(tmp_path, stores, capsys):
    start(run_of(tmp_path, stores, clean=False))
    err = capsys.readouterr().err
    assert "all draws are in the ambient regime, as asked for" in err
    told = "on alone: its samples stop at that level and are denoised once from there"
    assert told in err.splitlines()[-2] and "held-out images" not in err
    run = next(path for path in tmp_path.iterdir() if (path / "model.safetensors").is_file())
    write_samples(run, [0], tmp_path / "x.npz")
    assert told in capsys.readouterr().err
