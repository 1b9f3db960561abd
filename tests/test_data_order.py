"""Image ids and permutations: pure functions, pinned by known answers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fastambient.data import dataset_indices, image_id, image_ids, permutation
from fastambient_kernels.noise import Stream, random_words


def test_image_id_is_the_documented_hash():
    image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    digest = hashlib.sha256(bytes([3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, *range(12)])).digest()
    assert image_id(image) == int.from_bytes(digest[:8], "little", signed=True) == 5589672891920871315
    assert image_id(np.asfortranarray(image)) == image_id(image)
    assert image_id(image.reshape(3, 1, 4)) != image_id(image)  # the shape counts


def test_image_ids_of_tensors_and_arrays():
    images = torch.randint(0, 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ids = image_ids(images)
    assert ids.dtype == torch.int64 and ids.shape == (5,)
    assert torch.equal(ids, image_ids(images.numpy()))
    assert ids.tolist() == [image_id(image.numpy()) for image in images]
    assert image_ids(images[:0]).shape == (0,)


@pytest.mark.parametrize("image", [np.zeros((1, 2, 2), np.float32), np.zeros((2, 2), np.uint8)])
def test_image_id_refuses_other_arrays(image):
    with pytest.raises(TypeError, match="uint8"):
        image_id(image)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100, 4096])
def test_permutations_are_permutations(n):
    for seed, epoch in ((0, 0), (0, 1), (2**64 - 1, 5)):
        assert torch.equal(permutation(n, seed=seed, epoch=epoch).sort().values, torch.arange(n))


def test_permutations_are_pinned():
    # Recorded once: another answer would silently change the order and the split of every run.
    assert permutation(10, seed=0).tolist() == [4, 1, 2, 9, 6, 7, 0, 5, 8, 3]
    assert permutation(10, seed=1, epoch=3).tolist() == [5, 4, 1, 8, 3, 6, 2, 9, 0, 7]


def test_permutation_sorts_unsigned_words():
    words = random_words(torch.tensor([4]), 200, seed=9, stream=Stream.ORDER)[0].tolist()
    keys = [words[2 * i] + (words[2 * i + 1] << 32) for i in range(100)]
    assert permutation(100, seed=9, epoch=4).tolist() == sorted(range(100), key=keys.__getitem__)


def test_permutations_differ_and_are_uniform():
    assert not torch.equal(permutation(50, seed=0), permutation(50, seed=1))
    assert not torch.equal(permutation(50, seed=0), permutation(50, seed=0, epoch=1))
    first = torch.bincount(torch.stack([permutation(5, seed=3, epoch=e)[0] for e in range(2000)]), minlength=5)
    assert (first - 400).abs().max() < 4 * 18  # four standard deviations of a binomial(2000, 1/5)


def test_dataset_indices_cover_every_epoch_once():
    n = 7
    indices = dataset_indices(torch.arange(5 * n), n, seed=2)
    for epoch in range(5):
        assert torch.equal(indices[epoch * n : (epoch + 1) * n], permutation(n, seed=2, epoch=epoch))


def test_dataset_indices_do_not_depend_on_the_batch():
    positions = torch.arange(3, 40)
    whole = dataset_indices(positions, 10, seed=5)
    assert torch.equal(whole, torch.cat([dataset_indices(part, 10, seed=5) for part in positions.split(4)]))
    shuffled = torch.randperm(len(positions), generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole[shuffled], dataset_indices(positions[shuffled], 10, seed=5))
    assert torch.equal(dataset_indices(torch.tensor([10**12]), 10, seed=5), permutation(10, seed=5, epoch=10**11)[:1])


def test_dataset_indices_refuse_an_empty_set():
    with pytest.raises(ValueError, match="at least one"):
        dataset_indices(torch.arange(3), 0, seed=0)
