"""Audit pictures of any generator: are they copies of its training set, and how good are they?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastambient.console import progress, warn
from fastambient.data.archives import Folder
from fastambient.data.items import Source
from fastambient.data.pictures import Pictures
from fastambient.data.sources import open_source
from fastambient.data.store import Store, is_store
from fastambient.errors import InputError
from fastambient.evaluation.embedders import DEFAULT
from fastambient.evaluation.inputs import check_num, check_target
from fastambient.evaluation.metrics import check_sets, evaluate
from fastambient.evaluation.overviews import write_nearest
from fastambient.evaluation.report import RunReport, write_report
from fastambient.evaluation.run import Evaluated, open_embedder
from fastambient.files import write_json
from fastambient.pictures import GRID_NAME


def audit(
    samples: str,
    train: str,
    *,
    holdout: str | None = None,
    out: Path = Path("audit.json"),
    features: str = DEFAULT,
    weights: Path | None = None,
    preprocess: str = "standard",
    flips: bool = True,
    num: int | None = None,
    resolution: int | None = None,
    cache: Path | None = None,
    on_bad_image: str = "error",
    threshold: float = 1 / 3,
    bootstrap: int = 1000,
    seed: int = 0,
    device: str = "cpu",
) -> Evaluated:
    """Measure pictures against the images that their generator was trained on.

    Parameters
    ----------
    samples : SOURCE of the pictures, often a folder; a ``grid.png`` in its top folder is left out
    train : SOURCE or STORE of the training images
    holdout : SOURCE of images that never trained, or a STORE, whose held-out images they are; None: those of `train`
        where it is a store, else none, and what needs them is None
    out : where the metrics go; the report goes beside it as ``<stem>-report.html``, the list of pairs as
        ``<stem>-nearest.csv``
    features, weights, preprocess : the embedder, see `load_embedder`; "none" for no embedder
    flips : a mirrored training image counts as one, too: many generators were trained on both
    num : pictures to take, chosen by chance with `seed`; None for all
    resolution : pixels to which all pictures are cropped and resized
    cache : folder of features; None for none
    on_bad_image : "error", or "skip" to leave out pictures that cannot be read
    threshold, bootstrap, seed : as in `evaluate`

    Raises
    ------
    InputError : a source that cannot be read, sets of different sizes, too few pictures, a held-out image that trained
    """
    check_target(out, samples, train, holdout, features, weights)
    check_num(num)
    embedder = open_embedder(features, weights, preprocess, device=device)
    train_names: Sequence[str] | None
    pictures, own = _read(_open(samples, resolution, on_bad_image), samples)
    sets = {"--samples": pictures}
    if num is not None:
        check_num(num, of=len(own), samples=samples)
        # By chance: the first ones of a folder that is sorted by class would be of one class.
        chosen = np.sort(np.random.default_rng(seed).choice(len(own), num, replace=False))
        sets["--samples"], own = pictures[chosen], [own[i] for i in chosen]
    if is_store(train):
        store = _open_store(train, resolution)
        sets["--train"], train_names = _images(store, "train"), store.train.names
        if holdout is None and len(store.holdout):
            sets["--holdout"] = _images(store, "holdout")
    else:
        sets["--train"], train_names = _read(_open(train, resolution, on_bad_image), train)
    if holdout is not None:
        sets["--holdout"] = (
            _images(_open_store(holdout, resolution), "holdout") if is_store(holdout)
            else _read(_open(holdout, resolution, on_bad_image), holdout)[0]
        )  # fmt: skip
    sets = _alike(sets, {"--samples": samples, "--train": train, "--holdout": holdout or train}, resolution)
    check_sets(sets["--train"], sets.get("--holdout"), flips=flips)
    evaluation = evaluate(
        sets["--samples"], sets["--train"], sets.get("--holdout"), embedder=embedder, cache=cache, flips=flips,
        threshold=threshold, bootstrap=bootstrap, seed=seed, sample_names=own, train_names=train_names,
        settings={
            "samples": str(samples),
            "train": str(train),
            "holdout": str(holdout or train) if "--holdout" in sets else None,
            "resolution": sets["--train"].shape[-1],
            "num": num,
        },
    )  # fmt: skip
    write_json(out, evaluation.metrics)
    report = RunReport(Path(samples).resolve().name or str(samples), None, evaluation)
    page = out.with_name(f"{out.stem}-report.html")
    write_report(page, [report], title=f"fastambient audit: {report.name}")
    pairs = out.with_name(f"{out.stem}-nearest.csv")
    write_nearest(pairs, evaluation)
    return Evaluated(evaluation.metrics, report, out, page, pairs)


def _open(spec: str, resolution: int | None, on_bad_image: str) -> Source:
    """`open_source`, without the overview that `fastambient sample` writes beside its pictures."""
    if all((Path(spec) / name).is_file() for name in ("config.yaml", "noise_seed")):
        raise InputError(
            f"{spec} is a run folder, its pictures are drawings of the run: name the images that it trained on"
            f" ({spec}/store or data.source in its config.yaml), or what fastambient sample draws"
        )
    overviews = sorted(Path(spec).glob("grid-*.png")) if (Path(spec).parent / "config.yaml").is_file() else []
    if overviews and overviews == sorted(Path(spec).glob("*.*")):
        raise InputError(
            f"{spec} holds the overviews that a run drew of itself, many samples a picture; draw samples one by one:"
            f" fastambient sample {Path(spec).parent} --seeds 0-999 --out DIR"
        )
    if spec and (Path(spec) / GRID_NAME).is_file():
        files = Folder(Path(spec))
        files.names = [name for name in files.names if name != GRID_NAME]
        return Pictures(files, resolution, on_bad_image)
    return open_source(spec, resolution=resolution, on_bad_image=on_bad_image)


def _read(source: Source, spec: str) -> tuple[np.ndarray, list[str]]:
    """uint8 [N, C, H, W] of all pictures of a source, and their names."""
    images = np.empty((source.length, source.channels, source.resolution, source.resolution), np.uint8)
    names: list[str] = []
    with progress(f"reading {source.name}", source.length) as advance:
        for item in source.read():
            images[len(names)] = item.image
            names.append(item.name)
            advance(1)
    if not names:
        raise InputError(f"{spec} holds no picture that can be read, expected at least 2")
    return images[: len(names)], names


def _open_store(path: str, resolution: int | None) -> Store:
    store = Store.open(path, verify=False)
    if store.train.images is None or store.holdout.images is None:
        raise InputError(f"{path} was handed out: it holds no clean image to look for copies of; ask who made it")
    if resolution not in (None, store.resolution):
        raise InputError(
            f"--resolution {resolution}, but the store {path} holds images of {store.resolution} pixels; leave"
            " --resolution out, or name the pictures that it was made from"
        )
    return store


def _images(store: Store, side: str) -> np.ndarray:
    images = getattr(store, side).images
    if len(images) == 0:
        raise InputError(f"the store {store.path} holds no held-out image; prepare it with a larger --holdout")
    return np.asarray(images[:])


def _alike(sets: dict[str, np.ndarray], named: dict[str, str], resolution: int | None) -> dict[str, np.ndarray]:
    """The sets at one number of channels, or InputError where their sizes differ."""
    first = sets["--train"].shape[-2:]
    for option, images in sets.items():
        if images.shape[-2:] != first:
            size, wanted = (f"{w}x{h}" for h, w in (images.shape[-2:], first))
            stored = next((s for s in ("--train", "--holdout") if s in sets and is_store(named[s])), None)
            side = sets[stored].shape[-1] if stored else min(images.shape[-1], first[-1])  # a store has its size
            raise InputError(
                f"{option} {named[option]} has pictures of {size}, --train {named['--train']} of {wanted}; pass"
                f" --resolution {side} to bring all to one size"
            )
    channels = {images.shape[1] for images in sets.values()}
    if len(channels) == 1:
        return sets
    colour = [images for images in sets.values() if images.shape[1] == 3]
    if all(bool((images == images[:, :1]).all()) for images in colour):  # grey pictures, stored as RGB
        return {option: images[:, :1] for option, images in sets.items()}
    grey = ", ".join(option for option, images in sets.items() if images.shape[1] == 1)
    warn(f"{grey}: grey pictures are compared with colour ones, of which a grey version is no copy; convert one side")
    return {option: images.repeat(3 // images.shape[1], axis=1) for option, images in sets.items()}
