"""The resident loader: batches are functions of the positions alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastambient.data import ResidentLoader, Share, StoreRows, dataset_indices, image_ids, open_source, prepare
from fastambient.errors import InputError
from fastambient_kernels.noise import Stream, uniform

RNG = np.random.default_rng(2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("resident")
    images = RNG.integers(0, 256, (30, 1, 6, 6), dtype=np.uint8)
    np.savez(path / "set.npz", images=images, labels=RNG.integers(0, 3, 30))
    return prepare(
        open_source(path / "set.npz"), path / "store", train=25, sigma_tn=0.3, noisy="float16", shard_bytes=8 * 36
    )


def loader(store, **options):
    options = {"seed": 11, "device": "cpu", "xflip": True, "use_noisy": True, **options}
    rows = StoreRows(store.train, seed=options["seed"], use_noisy=options.pop("use_noisy"))
    return ResidentLoader(rows, Share(10), **options)


def test_a_batch(store):
    positions = torch.arange(10, 70)
    batch = loader(store).at(positions)
    index = dataset_indices(positions, 25, seed=11).numpy()
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (60, 1, 6, 6)
    assert np.array_equal(batch.images.numpy(), store.train.images[index])
    assert np.array_equal(batch.ids.numpy(), store.train.ids[index])
    assert torch.equal(batch.ids, image_ids(batch.images))
    assert np.array_equal(batch.labels.numpy(), store.train.labels[index]) and batch.labels.dtype == torch.int64
    assert np.array_equal(batch.x_n.numpy(), store.train.noisy[index]) and batch.x_n.dtype == torch.float16
    assert torch.equal(batch.positions, positions)
    assert torch.equal(batch.flips, uniform(positions, 1, seed=11, stream=Stream.AUGMENT)[:, 0] < 0.5)


def test_batches_do_not_depend_on_the_split_into_micro_batches(store):
    positions = torch.arange(17, 17 + 48)
    whole = loader(store).at(positions)
    for size in (1, 7, 16):
        other = loader(store)
        parts = [other.at(part) for part in positions.split(size)]
        for name in ("images", "ids", "flips", "labels", "positions", "x_n"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_batches_leave_the_global_generators_alone(store):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader(store).at(torch.arange(40))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_seeds_and_flips(store):
    positions = torch.arange(2000)
    batch = loader(store).at(positions)
    assert abs(batch.flips.float().mean() - 0.5) < 0.05
    assert not torch.equal(batch.flips, loader(store, seed=12).at(positions).flips)
    assert not torch.equal(batch.ids, loader(store, seed=12).at(positions).ids)
    plain = loader(store, xflip=False).at(positions)
    assert plain.flips.dtype == torch.bool and not plain.flips.any()
    assert torch.equal(plain.ids, batch.ids)  # the order does not depend on the flips


def test_sets_without_labels_or_noise(store, tmp_path):
    np.save(tmp_path / "set.npy", RNG.integers(0, 256, (9, 5, 5, 3), dtype=np.uint8))
    plain = prepare(open_source(tmp_path / "set.npy"), tmp_path / "store", holdout=0)
    batch = loader(plain, use_noisy=False).at(torch.arange(9))
    assert batch.labels is None and batch.x_n is None and batch.images.shape == (9, 3, 5, 5)
    with pytest.raises(InputError, match="--noisy"):
        loader(plain)
    assert loader(store, use_noisy=False).at(torch.arange(4)).x_n is None


def test_nbytes(store):
    assert loader(store).nbytes == 25 * (36 + 2 * 36 + 8 + 8)
    assert loader(store, use_noisy=False).nbytes == 25 * (36 + 8 + 8)


@pytest.mark.gpu
def test_batches_are_equal_on_a_gpu(store):
    positions = torch.arange(90)
    cpu, gpu = loader(store).at(positions), loader(store, device="cuda").at(positions)
    for name in ("images", "ids", "flips", "labels", "positions", "x_n"):
        value = getattr(gpu, name)
        assert value.is_cuda and torch.equal(value.cpu(), getattr(cpu, name)), name
