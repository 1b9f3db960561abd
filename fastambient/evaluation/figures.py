"""Figures of runs: denoised images over noise levels (Shah et al., 2025, Fig. 3), samples, and nearest neighbours.

Pictures are enlarged by whole factors and drawn pixel for pixel, so nothing in them is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastambient.console import progress
from fastambient.data.store import Store
from fastambient.errors import InputError
from fastambient.evaluation.figures_layout import Block, draw
from fastambient.evaluation.nearest_pictures import nearest_pictures
from fastambient.files import check_parent
from fastambient.pictures import grid, load_pictures, to_uint8
from fastambient.sampling import latents, load, sample
from fastambient.training.run import RunFolder

_COLUMNS = 8  # pairs a row of `neighbours`


def denoised(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    images: int = 1,
    sigmas: Sequence[float] | None = None,
    device: str = "cpu",
) -> Path:
    """What each model makes of the same noised images: rows are models, columns noise levels.

    `images` training images that all runs share, then as many held-out images that none of them trained on, a block
    each. The first column is the image itself, the first row what the models are given: x0 + sigma*eps, with one eps
    for all levels and models. Above the noise at which x0 can still be seen, a model that returns a training image has
    memorized it. Class-conditional models are told the image's class.

    Parameters
    ----------
    runs : run folders
    out : PNG; None for figure-denoised.png in the first run
    sigmas : noise levels; None for 1.5*R/64 (R the resolution) times 1/4, 1/2 ... 32

    Raises
    ------
    InputError : no run, a run without weights, a stream, a hand-out, pictures of different sizes, no shared training
        image, no held-out image
    """
    if not runs:
        raise InputError("a figure of no run, expected at least one run folder")
    if images < 1:
        raise InputError(f"--images must be 1 or more, got {images}")
    target = _target(out, runs[0] / "figure-denoised.png")
    stores = [_store(run) for run in runs]
    first = stores[0]
    for run, store in zip(runs, stores, strict=True):
        if store.shape != first.shape:
            raise InputError(
                f"{run} has pictures of {list(store.shape)} (C, H, W) and {runs[0]} of {list(first.shape)}; expected"
                " runs on pictures of one size"
            )
    levels = list(sigmas) if sigmas is not None else _levels(first.resolution)
    if not levels or not all(math.isfinite(s) and s > 0 for s in levels):
        raise InputError(f"--sigmas must be finite numbers above 0, got {levels}")
    seen = [(f"training image {i}", "train", i) for i in _shared(runs, stores, images)]
    seen += [(f"held-out image {i}", "holdout", i) for i in _never_trained(runs, stores, images)]

    names, rows = _names(runs), []
    pictures = np.stack([getattr(first, side).images[i : i + 1][0] for _, side, i in seen])
    x0 = torch.from_numpy(pictures).float().div(127.5).sub(1)
    eps = latents(range(len(seen)), first.shape)
    noised = x0[:, None] + torch.tensor(levels).view(1, -1, 1, 1, 1) * eps[:, None]  # [images, levels, C, H, W]
    rows.append(to_uint8(noised))
    sigma = torch.tensor(levels).repeat(len(seen)).to(device)
    with progress("denoising", len(runs), "models") as advance:
        for run in runs:
            denoiser = load(run, device=device)
            told = None
            if denoiser.label_dim and first.num_classes == denoiser.label_dim:
                index = torch.tensor([int(getattr(first, side).labels[i]) for _, side, i in seen])
                told = torch.nn.functional.one_hot(index.repeat_interleave(len(levels)), denoiser.label_dim)
                told = told.float().to(device)
            with torch.no_grad():
                y = denoiser(noised.flatten(0, 1).to(device), sigma, told)
            rows.append(to_uint8(y.cpu()).view(noised.shape))
            advance(1)
    blocks = []
    for k, (title, _, _) in enumerate(seen):
        table = np.stack([np.concatenate([pictures[k : k + 1], row[k].numpy()]) for row in rows])
        columns = ["image", *(f"σ = {s:.3g}" for s in levels)] if k == 0 else []
        blocks.append(Block(title, table, ["given to the models", *names], columns))
    draw(target, blocks)
    return target


def samples(runs: Sequence[Path], seeds: Sequence[int], out: Path | None = None, *, device: str = "cpu") -> Path:
    """Samples of each run at the same seeds, unselected, a block each.

    out : PNG; None for figure-samples.png in the first run

    Raises
    ------
    InputError : no run, no seed, a run without weights
    """
    if not runs or not seeds:
        raise InputError(f"a figure of {len(runs)} runs at {len(seeds)} seeds, expected at least one of each")
    for run in runs:
        RunFolder.existing(run)
    target = _target(out, runs[0] / "figure-samples.png")
    blocks = []
    with progress("sampling", len(runs) * len(seeds)) as advance:
        for run, name in zip(runs, _names(runs), strict=True):
            pictures = sample(load(run, device=device), seeds, on_batch=advance).numpy()
            blocks.append(Block(f"{name}: {len(seeds)} samples", grid(pictures, _columns(len(seeds)))[None, None]))
    draw(target, blocks, enlarged=False)
    return target


def neighbours(
    run: Path, out: Path | None = None, *, samples: Path | None = None, num: int = 16, device: str = "cpu"
) -> Path:
    """Samples above their nearest training image and, where images were held out, their nearest held-out image.

    Nearest is by L2 over pixels, among mirror images, too, where the run was trained with flips (a mirrored image is
    drawn mirrored). Below stands the gap ratio d1/d2 to the training images; below the run's threshold (1/3) it is a
    copy. The samples are unselected, in the order of their seeds or file names. Held-out images are as many as the
    training images, or all there are: the nearest of more images lies nearer.

    Parameters
    ----------
    out : PNG; None for figure-neighbours.png in the run
    samples : folder of PNG files or .npz; None samples seeds 0 .. num - 1
    num : pairs, the first of them

    Raises
    ------
    InputError : no such run, a stream, a hand-out, no weights, samples that do not fit
    """
    if num < 1:
        raise InputError(f"--num must be 1 or more, got {num}")
    store = _store(run)
    assert store.train.images is not None and store.holdout.images is not None
    settings = RunFolder.existing(run).read_settings()
    flips = settings.evaluation.flips or settings.data.xflip
    target = _target(out, run / "figure-neighbours.png")
    train = store.train.images[:]
    if samples is not None:
        pictures = load_pictures(samples)[:num]
    else:
        denoiser = load(run, device=device)
        with progress("sampling", num) as advance:
            pictures = sample(denoiser, range(num), on_batch=advance).numpy()
    found = nearest_pictures(pictures, train, flips=flips)
    sides = [pictures, _mirrored(train[found.index[:, 0]], found.flipped)]
    rows = ["sample", "nearest training image"]
    searched = min(len(store.holdout), len(train))
    if searched >= 2:
        holdout = store.holdout.images[:searched]
        control = nearest_pictures(pictures, holdout, flips=flips)
        sides.append(_mirrored(holdout[control.index[:, 0]], control.flipped))
        rows.append("nearest held-out image")
    threshold = settings.evaluation.threshold
    copies = found.copies(threshold)
    blocks = []
    for start in range(0, len(pictures), _COLUMNS):
        some = range(start, min(start + _COLUMNS, len(pictures)))
        labels = [f"{found.ratio[i]:.2f}" + (" copy" if copies[i] else "") for i in some]
        title = (
            f"{run.resolve().name}: {int(copies.sum())} of {len(pictures)} samples are copies (d1/d2 < {threshold:.3g})"
        )
        tiles = np.stack([side[some.start : some.stop] for side in sides])
        alarmed = frozenset(i - start for i in some if copies[i])
        blocks.append(Block(title if start == 0 else "", tiles, rows, labels, alarmed))
    draw(target, blocks)
    return target


def _store(path: Path) -> Store:
    """The store of a run, with clean images; InputError where it has none."""
    run = RunFolder.existing(path)
    if run.read_settings().data.stream:
        raise InputError(f"{path} streams its images: no store says what it trained on, so there is none to draw")
    store = run.open_store(verify=False)
    if store.train.images is None or store.holdout.images is None:
        raise InputError(
            f"{run.store_path} was handed out: it holds no clean image to draw; who made it can draw this run"
        )
    return store


def _shared(runs: Sequence[Path], stores: Sequence[Store], count: int) -> list[int]:
    """The first places in the first store's training images that every run trained on."""
    shared = set.intersection(*(set(store.train.ids.tolist()) for store in stores))
    places = [i for i, key in enumerate(stores[0].train.ids.tolist()) if key in shared][:count]
    if len(places) < count:
        raise InputError(
            f"{', '.join(map(str, runs))} share {len(places)} training images, expected {count}; give runs on the same"
            " images, or fewer --images"
        )
    return places


def _never_trained(runs: Sequence[Path], stores: Sequence[Store], count: int) -> list[int]:
    """The first places in the first store's held-out images that no run trained on."""
    trained = set.union(*(set(store.train.ids.tolist()) for store in stores))
    places = [i for i, key in enumerate(stores[0].holdout.ids.tolist()) if key not in trained][:count]
    if len(places) < count:
        raise InputError(
            f"{stores[0].path} holds {len(places)} held-out images that none of the runs trained on, expected {count};"
            " prepare it with a larger --holdout, or ask for fewer --images"
        )
    return places


def _levels(resolution: int) -> list[float]:
    """Eight noise levels by factors of two, from well below the default sigma_tn, which grows with the resolution."""
    return [float(f"{1.5 * resolution / 64 * 2.0**k:.2g}") for k in range(-2, 6)]


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names with sigma_tn, and as many of their parents as tell them apart."""
    paths = [run.resolve() for run in runs]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    told = []
    for run, path in zip(runs, paths, strict=True):
        sigma_tn = RunFolder.existing(run).read_settings().noise.sigma_tn or 0.0
        told.append(f"{'/'.join(path.parts[-depth:])} (" + (f"σ_tn {sigma_tn:g})" if sigma_tn else "EDM)"))
    return told


def _columns(n: int) -> int:
    """About as many columns as rows, or up to twice as many where that fills the last row."""
    side = math.isqrt(n - 1) + 1
    return next((c for c in range(side, 2 * side + 1) if n % c == 0), side)


def _target(out: Path | None, usual: Path) -> Path:
    """The file to write; found now, not after the work."""
    target = out or usual
    if target.suffix.lower() != ".png":
        raise InputError(f"--out {target}: figures are PNG files; name one that ends in .png")
    if not usual.parent.is_dir():
        raise InputError(f"there is no run folder {usual.parent}")
    check_parent(target)
    if not target.parent.is_dir():
        raise InputError(f"--out {target} cannot be made: there is no folder {target.parent}")
    return target


def _mirrored(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[which] = images[which][..., ::-1]
    return images
