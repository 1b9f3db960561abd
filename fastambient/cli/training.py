"""``prepare``, ``train`` and ``quickstart``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastambient.cli.options import (
    SOURCE_HELP,
    AugmentAmbient,
    Dedup,
    Force,
    LoaderName,
    NoiseMode,
    Noisy,
    OnBadImage,
    Precision,
    Regime,
    Weighting,
    choose_device,
    option,
    parse_batch,
    parse_sigma_tn,
)
from fastambient.console import say
from fastambient.errors import InputError


def prepare(
    source: Annotated[str | None, typer.Argument(help=SOURCE_HELP, metavar="SOURCE")] = None,
    out: Annotated[Path | None, option("folder of the new store", metavar="STORE")] = None,
    resolution: Annotated[
        int | None, option("centre-crop and resize to RxR pixels", metavar="R", default="as they are")
    ] = None,
    sigma_tn: Annotated[
        float | None,
        option(
            "noise level of the training set, in units of pixels in [-1, 1]",
            "--sigma-tn",
            metavar="S",
            default="1.5*R/64",
        ),
    ] = None,
    noise_seed: Annotated[
        int | None,
        option(
            "64-bit seed of the fixed noise: a secret", "--noise-seed", metavar="K", default="from the operating system"
        ),
    ] = None,
    train: Annotated[
        int | None, option("training images", metavar="N", default="all that are not held out; digits: 100")
    ] = None,
    holdout: Annotated[
        int | None,
        option(
            "held-out images",
            metavar="N",
            default="10 %, at least the 2 that evaluate needs, at most 10,000; digits: the rest",
        ),
    ] = None,
    split_seed: Annotated[int, option("seed of the split", "--split-seed", metavar="K")] = 0,
    noisy: Annotated[Noisy, option("also store the noised images, in this dtype")] = Noisy.none,
    on_bad_image: Annotated[
        OnBadImage, option("what to do with an image that cannot be read", "--on-bad-image")
    ] = OnBadImage.error,
    dedup: Annotated[
        Dedup | None,
        option(
            "near-duplicates by perceptual hash: keep them on one side of the split, or drop all but one",
            default="keep from 32 pixels on, off below",
        ),
    ] = None,
    hand_out: Annotated[
        bool, option("noised images alone, for others to train on: no clean image, no seed, no captions", "--hand-out")
    ] = False,
    captions: Annotated[
        bool | None,
        option("store the text beside the images", "--captions/--no-captions", default="yes; in a hand-out no"),
    ] = None,
    workers: Annotated[int | None, option("processes that decode", metavar="N", default="all cores")] = None,
    index: Annotated[
        str | None,
        option("look through tar shards and write shards.json beside them, for train --stream", metavar="SHARDS"),
    ] = None,
    check: Annotated[Path | None, option("verify every checksum of a store instead", metavar="STORE")] = None,
    force: Force = False,
) -> None:
    """Prepare a data set: decode, resize, split, and noise it once.

    What was cut off goes on when the same command is run again.
    """
    from fastambient.data.preparation import prepare as prepare_store
    from fastambient.data.shard_index import index_shards
    from fastambient.data.sources import open_source
    from fastambient.data.store import Store
    from fastambient.diffusion.ambient import default_sigma_tn
    from fastambient.evaluation.inputs import ENOUGH_HELD_OUT
    from fastambient.files import refuse_existing
    from fastambient.training.config import check_sigma_tn

    if (check is not None or index is not None) and (source is not None or out is not None):
        raise InputError("--check and --index work on what is there: they take no SOURCE and no --out")
    if index is not None:
        file, found = index_shards(index)
        print(f"{file}: {len(found['shards']):,} shards")
        return
    if check is not None:
        store = Store.open(check)
        store.check_noise()
        print(f"{check}: {store.summary()}; {len(store.manifest['files'])} files as the manifest says")
        return
    if source is None or out is None:
        raise InputError("prepare needs a SOURCE and --out STORE; see fastambient prepare --help")
    refuse_existing(out, force=force)
    if sigma_tn is not None:
        check_sigma_tn(sigma_tn)
    if workers is not None and workers < 1:
        raise InputError(f"--workers must be 1 or more, got {workers}")
    opened = open_source(source, resolution=resolution, on_bad_image=on_bad_image.value)
    if hand_out and noisy is Noisy.none:
        noisy = Noisy.float16
    if sigma_tn is None and noisy is not Noisy.none:
        sigma_tn = default_sigma_tn(opened.resolution)
    if noisy is not Noisy.none:
        choose_device(0)  # says what is slow
    store = prepare_store(
        opened, out, sigma_tn=sigma_tn, noise_seed=noise_seed, train=train, holdout=holdout, split_seed=split_seed,
        noisy=noisy.value, dedup=dedup and dedup.value, hand_out=hand_out, captions=captions, force=force,
        workers=workers or os.cpu_count() or 1,
    )  # fmt: skip
    print(f"{out}: {store.summary()}")
    if holdout is None and 0 < len(store.holdout) < ENOUGH_HELD_OUT:
        say(f"few images are held out: {ENOUGH_HELD_OUT} or more tell copying from chance (--holdout)")
    if hand_out and store.num_classes:
        names = ", ".join(store.class_names or []) or f"0 to {store.num_classes - 1}"
        print(f"its class labels are handed out, too: {names}")


def train(
    data: Annotated[
        str | None,
        option(
            f"SOURCE or STORE to train on. SOURCE: {SOURCE_HELP}. STORE: a folder made by prepare",
            metavar="SOURCE|STORE",
            default="digits",
        ),
    ] = None,
    out: Annotated[Path | None, option("run folder", metavar="RUN", default="a new folder under runs/")] = None,
    preset: Annotated[
        str | None,
        option("named settings", metavar="NAME", default="by resolution: digits (8), small16, small32, small64"),
    ] = None,
    config: Annotated[Path | None, option("settings tree to start from", metavar="FILE.yaml")] = None,
    sigma_tn: Annotated[
        str | None,
        option(
            "noise level of the training set, in units of pixels in [-1, 1]; 0 is plain EDM; auto: where a pilot run of"
            " plain EDM, a quarter as long, denoises held-out images worst beside training images, or 1.5*R/64 where it"
            " memorizes nothing yet",
            "--sigma-tn",
            metavar="S|auto",
            default="the store's, else 1.5*R/64 for RxR pixels",
        ),
    ] = None,
    gpus: Annotated[int | None, option("GPUs to train on; 0 is the CPU", metavar="N", default="all visible")] = None,
    processes: Annotated[int | None, option("CPU processes to train with, instead of GPUs", metavar="N")] = None,
    kimg: Annotated[
        float | None, option("length of the run in thousands of images", metavar="K", default="the preset's")
    ] = None,
    batch: Annotated[
        str | None,
        option(
            "images an optimizer step, over all ranks; auto: the preset's, as many of them at once as fit in memory",
            metavar="B|auto",
            default="the preset's",
        ),
    ] = None,
    seed: Annotated[
        int | None, option("64-bit seed of weights, order and fresh noise", metavar="K", default="0")
    ] = None,
    noise_seed: Annotated[
        int | None,
        option(
            "64-bit seed of the fixed noise: a secret",
            "--noise-seed",
            metavar="K",
            default="from the operating system, or the store's",
        ),
    ] = None,
    precision: Annotated[
        Precision | None, option("of the network; weights, statistics and loss stay float32", default="the preset's")
    ] = None,
    checkpoint_kimg: Annotated[
        float | None,
        option(
            "checkpoint this often, in thousands of images",
            "--checkpoint-kimg",
            metavar="K",
            default="a tenth of the run, at most 500",
        ),
    ] = None,
    checkpoint_levels: Annotated[
        int | None,
        option(
            "keep no activations of the network's N highest resolutions, compute them anew in the backward pass: less"
            " memory, more time, the same numbers",
            "--checkpoint-levels",
            metavar="N",
            default="0",
        ),
    ] = None,
    weighting: Annotated[Weighting | None, option("weighting of the ambient loss", default="paper")] = None,
    noise: Annotated[
        NoiseMode | None, option("fresh: an ablation, new noise at every draw undoes the method", default="fixed")
    ] = None,
    augment_ambient: Annotated[
        AugmentAmbient | None,
        option(
            "reference: augment ambient draws as the reference does, which leaks", "--augment-ambient", default="none"
        ),
    ] = None,
    clean: Annotated[
        str | None, option("clean images beside a --data that was handed out", metavar="STORE", default="none")
    ] = None,
    regime: Annotated[
        Regime | None,
        option("ambient: the levels from sigma_tn on alone, for a hand-out without --clean", default="both"),
    ] = None,
    audit_every: Annotated[
        float | None,
        option(
            "measure copying and quality of the EMA weights this often, and at the end, in thousands of images (256"
            " samples, --set evaluation.audit_num); rows in audits.jsonl, curves in audits.png; 0: never",
            "--audit-every",
            metavar="KIMG",
            default="never; with --stop-when-copying a tenth of the run",
        ),
    ] = None,
    audit_features: Annotated[
        str | None,
        option(
            "embedder of the audits' Frechet distance, one of evaluate's --features; a network tells photographs apart"
            " better than pixels do, and takes longer",
            "--audit-features",
            metavar="NAME",
            default="pixel",
        ),
    ] = None,
    stop_when_copying: Annotated[
        float | None,
        option(
            "stop when an audit's copy rate exceeds that of the held-out control by more than RATE, a share of the"
            " samples such as 0.05, and keep the weights of the last audit that does not",
            "--stop-when-copying",
            metavar="RATE",
            default="never",
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        option(
            "train from the tar shards that --data names, as they are: a folder, a pattern or http(s) addresses such as"
            " https://host/shards-{0000..0099}.tar; nothing is prepared, split or evaluated",
            "--stream",
        ),
    ] = None,
    loader: Annotated[
        LoaderName | None,
        option(
            "how images get to the device: resident (the set in its memory), dali (NVIDIA DALI reads ahead), workers"
            " (processes read ahead); all give the same images in the same order. auto: resident where the set takes at"
            " most half of the memory that is free on the GPU, or available to a rank on a CPU; else dali where it is"
            " installed, else workers",
            default="auto",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None, option("any setting of the tree; may be repeated", "--set", metavar="section.name=value")
    ] = None,
    resume: Annotated[
        Path | None,
        option("continue this run; everything is taken from it, but --kimg may give it a new length", metavar="RUN"),
    ] = None,
    dry_run: Annotated[
        bool, option("print the settings with parameter count, memory and time estimates; train nothing", "--dry-run")
    ] = False,
    force: Force = False,
) -> None:
    """Train a model: EDM (--sigma-tn 0) or ambient diffusion."""
    from fastambient.training import start
    from fastambient.training.distributed import choose_ranks
    from fastambient.training.request import TrainRequest, describe

    if resume is not None:
        given = {
            "--data": data, "--out": out, "--preset": preset, "--config": config, "--sigma-tn": sigma_tn,
            "--batch": batch, "--seed": seed, "--noise-seed": noise_seed, "--precision": precision,
            "--set": assignments, "--checkpoint-kimg": checkpoint_kimg, "--checkpoint-levels": checkpoint_levels,
            "--weighting": weighting, "--noise": noise, "--augment-ambient": augment_ambient, "--clean": clean,
            "--regime": regime, "--stream": stream, "--loader": loader, "--audit-every": audit_every,
            "--audit-features": audit_features, "--stop-when-copying": stop_when_copying,
            "--dry-run": dry_run or None, "--force": force or None,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and value != []:
                raise InputError(f"--resume takes everything from the run; leave out {name}")
        ranks, device = choose_ranks(gpus, processes) if gpus is not None or processes is not None else (None, None)
        start.resume(resume, ranks=ranks, device=device, kimg=kimg)
        return
    ranks, device = choose_ranks(gpus, processes)
    fit, auto = batch == "auto", sigma_tn == "auto"
    options: dict[str, dict[str, Any]] = {
        "data": {"loader": loader and loader.value, "clean": clean, "stream": stream},
        "noise": {
            "sigma_tn": None if auto or sigma_tn is None else parse_sigma_tn(sigma_tn),
            "weighting": weighting and weighting.value, "mode": noise and noise.value,
            "regime": regime and regime.value,
        },
        "training": {
            "kimg": kimg, "batch": None if fit or batch is None else parse_batch(batch), "seed": seed,
            "precision": precision and precision.value, "ranks": ranks, "device": device,
            "checkpoint_kimg": checkpoint_kimg, "checkpoint_levels": checkpoint_levels,
            "augment_ambient": augment_ambient and augment_ambient.value,
            "audit_kimg": audit_every, "stop_when_copying": stop_when_copying,
        },
        "evaluation": {"audit_features": audit_features},
    }  # fmt: skip
    request = TrainRequest(
        data=data, preset=preset, config=config, assignments=assignments or [], noise_seed=noise_seed, fit=fit,
        auto_sigma_tn=auto,
        options={s: {k: v for k, v in values.items() if v is not None} for s, values in options.items()},
    )  # fmt: skip
    if dry_run:
        print(describe(request))
        return
    start.new(request, out, force=force)


def quickstart(
    out: Annotated[Path, option("folder for both runs and the report", metavar="DIR")] = Path("runs/quickstart"),
    force: Force = False,
) -> None:
    """Train EDM and the ambient model on 100 digits, measure both, print one table (under 5 minutes on 2 cores)."""
    from fastambient.quickstart import quickstart as run_quickstart

    choose_device(0)
    run_quickstart(out, force=force)
