"""What a run trains on: a store, a hand-out and perhaps a clean store, or shards that are streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastambient.console import progress, warn
from fastambient.data.mixed import HandOutRows
from fastambient.data.rows import Rows, StoreRows
from fastambient.data.store import Store
from fastambient.data.streaming import ShardStream
from fastambient.diffusion.edm import draw_sigma
from fastambient.errors import InputError
from fastambient.training.config import Settings


def check_hand_out(settings: Settings, store: Store) -> None:
    """InputError where these settings cannot train on this store."""
    d, n = settings.data, settings.noise
    if not store.hand_out:
        if d.clean is not None:
            raise InputError(f"--clean {d.clean}: {store.path} holds clean images itself; leave --clean out")
        if n.regime == "ambient":
            raise InputError(
                f"--regime ambient is for a store that was handed out; {store.path} holds clean images: leave it out"
            )
        return
    if d.clean is None and n.regime == "both":
        raise InputError(
            f"{store.path} was handed out: it holds images noised at sigma_tn {store.sigma_tn:g} alone, and below that"
            " level a model is trained on clean ones. Pass --clean STORE with clean images of your own, or --regime"
            " ambient to train the levels from sigma_tn on alone (its samples stop at sigma_tn)"
        )
    if d.clean is not None and n.regime == "ambient":
        raise InputError("--regime ambient trains no level that needs clean images: leave --clean out, or --regime")
    if n.mode != "fixed":
        raise InputError(f"noise.mode {n.mode}: the noise of a hand-out is in its images")
    if settings.training.augment_ambient != "none":
        raise InputError("training.augment_ambient reference needs clean images, which a hand-out has not")


def open_clean(settings: Settings, *, verify: bool = True) -> Store | None:
    """The store of clean images beside a hand-out. InputError where it is none."""
    if settings.data.clean is None:
        return None
    clean = Store.open(settings.data.clean, verify=verify)
    if clean.hand_out:
        raise InputError(f"--clean {clean.path} was handed out, too: it holds no clean image")
    return clean


@dataclass(frozen=True)
class TrainingSet:
    """What a run trains on, wherever its images lie.

    Attributes
    ----------
    rows : what its loader draws from
    images : how many there are
    num_classes, class_names : 0 and None without labels
    mirrored_pairs : training images that are there mirrored, too; 0 where that is not known
    """

    rows: Rows
    images: int
    channels: int
    resolution: int
    num_classes: int
    class_names: list[str] | None
    mirrored_pairs: int = 0


def _classes(store: Store) -> str:
    return f"0..{store.num_classes - 1}" if store.class_names is None else ", ".join(store.class_names)


def store_set(settings: Settings, store: Store, clean: Store | None, noise_seed: int) -> TrainingSet:
    """The training side of a store, or of a hand-out and a clean store.

    Raises
    ------
    InputError : a noised copy that is not there, or clean images unlike those handed out
    """
    n, seed = settings.noise, settings.training.seed
    rows: Rows
    if not store.hand_out:
        rows = StoreRows(store.train, seed=seed, use_noisy=settings.data.noisy != "none" and n.mode == "fixed")
    else:
        assert n.sigma_tn is not None
        if clean is not None and settings.data.use_labels:
            classes = [(s.num_classes, s.class_names) for s in (store, clean)]
            if classes[0] != classes[1]:
                raise InputError(
                    f"the images handed out have classes {_classes(store)}, those of {clean.path} {_classes(clean)};"
                    " a class number must mean one thing; prepare both with the same classes"
                )
        rows = HandOutRows(
            store.train, None if clean is None else clean.train, seed=seed, sigma_tn=n.sigma_tn, noise_seed=noise_seed,
            sigma_of=partial(draw_sigma, seed=seed, P_mean=n.P_mean, P_std=n.P_std), labelled=settings.data.use_labels,
        )  # fmt: skip
    return TrainingSet(
        rows, len(store.train) + (0 if clean is None else len(clean.train)), store.channels, store.resolution,
        store.num_classes, store.class_names,
        store.manifest["split"].get("mirrored_pairs", 0),  # older stores did not count
    )  # fmt: skip


def open_stream(settings: Settings) -> ShardStream:
    """Shards that are streamed (``data.stream``). InputError where they cannot be."""
    d = settings.data
    return ShardStream(
        d.source, seed=settings.training.seed, resolution=d.resolution, window=d.window, on_bad_image=d.on_bad_image,
        index=d.shard_index, cache=None if d.cache is None else Path(d.cache), cache_bytes=round(d.cache_gb * 1e9),
    )  # fmt: skip


def stream_set(stream: ShardStream) -> TrainingSet:
    return TrainingSet(
        stream, stream.length, stream.channels, stream.resolution, stream.num_classes, stream.class_names
    )


def measure_sigma_data(stream: ShardStream, images: int = 10_000) -> float:
    """Standard deviation in [-1, 1] of the first `images` of a stream's order: there is no manifest to say it."""
    total, squares, n = 0, 0, 0
    count = min(images, stream.length)
    with progress("measuring sigma_data", count) as advance:
        for start in range(0, count, 256):
            index = stream.index(torch.arange(start, min(start + 256, count))).numpy()
            pixels = stream.fetch(index)["images"].astype(np.int64)
            total, squares, n = total + int(pixels.sum()), squares + int((pixels**2).sum()), n + pixels.size
            advance(len(index))
    deviation = math.sqrt((n * squares - total**2) / n**2) / 127.5
    if not deviation > 1e-6:
        raise InputError(f"the first {count:,} images of {stream.name} are all of one colour")
    return deviation


def use_noise(store: Store, settings: Settings) -> None:
    """Put the level of a run that trains with the store's own noise seed on record; a warning where it is not the only
    one, or where nobody knows."""
    n = settings.noise
    if n.mode != "fixed" or not n.sigma_tn:
        return
    others = store.use_noise_at(n.sigma_tn)
    if others is None and n.sigma_tn == store.sigma_tn:
        return  # of an older program, at the level that it was prepared for
    if others or others is None:
        told = "may have noised" if others is None else "has noised"
        levels = "another sigma_tn" if others is None else ", ".join(f"{level:g}" for level in others)
        warn(
            f"the noise seed of {store.path} {told} its images at {levels}, too, and who has an image noised at"
            f" {n.sigma_tn:g} and at another level has the image: give runs at several levels a --noise-seed each (64"
            " random bits), or a store each"
        )
