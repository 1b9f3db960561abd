"""The command line: parse, call one function, print. No logic lives here.

Long, because every option of every command is declared here with its help.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fastambient.errors import FastambientError, InputError

app = typer.Typer(
    name="fastambient",
    help="Train diffusion models that copy their training set less, and measure by how much.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class Noisy(str, Enum):
    none, float16, float32 = "none", "float16", "float32"


class OnBadImage(str, Enum):
    error, skip = "error", "skip"


class Dedup(str, Enum):
    off, keep, drop = "off", "keep", "drop"


class Precision(str, Enum):
    fp32, bf16 = "fp32", "bf16"


class Sampler(str, Enum):
    heun, dpmpp_2m = "heun", "dpmpp-2m"


class Weighting(str, Enum):
    paper, unit = "paper", "unit"


class NoiseMode(str, Enum):
    fixed, fresh = "fixed", "fresh"


class LoaderName(str, Enum):
    auto, resident, dali, workers = "auto", "resident", "dali", "workers"


class Regime(str, Enum):
    both, ambient = "both", "ambient"


class AugmentAmbient(str, Enum):
    none, reference = "none", "reference"


class Preprocessing(str, Enum):
    standard, paper = "standard", "paper"


def parse_batch(text: str) -> int:
    """The number of ``--batch``."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batch must be a whole number or auto, got {text!r}") from None


def parse_sigma_tn(text: str) -> float:
    """The number of ``train --sigma-tn``."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sigma-tn must be a number or auto, got {text!r}") from None


def parse_numbers(name: str, text: str) -> list[float]:
    """``"0,0.1"`` -> [0.0, 0.1]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} must be numbers such as 0,0.1,0.2, got {text!r}") from None


def option(help: str, *names: str, metavar: str | None = None, default: str | None = None) -> Any:
    """An option whose help ends with its default, also where that is computed."""
    text = help if default is None else f"{help} [default: {default}]"
    return typer.Option(*names, help=text, metavar=metavar, show_default=default is None)


SOURCE_HELP = (
    "digits (1,797 built-in 8x8 images), a folder of images (PNG, JPEG, WebP, BMP; recursive), an EDM data set zip, an"
    " .npy/.npz of uint8 images, WebDataset .tar files (one, a folder, or a quoted pattern like 's-{000..099}.tar'), or a"
    " Hugging Face data set (.parquet files, a folder of them, or one by save_to_disk)"
)
Force = Annotated[bool, option("replace what is there", "--force")]
FEATURES_HELP = (
    "embedder of similarity and quality: pixel, efficientnet-lite0, inception, dinov2-vits14, dinov2-vitb14,"
    " dinov2-vitl14, dinov2-vitg14, clip-vit-l-14, a TorchScript module PATH.pt, or none"
)
Features = Annotated[str | None, option(FEATURES_HELP, metavar="NAME", default="efficientnet-lite0")]
Weights = Annotated[
    Path | None, option("its weights, safetensors or TorchScript", metavar="PATH", default="looked for in caches")
]
Preprocess = Annotated[
    Preprocessing | None,
    option("standard: the network's usual one; paper: DINOv2 at native size, in [0, 1]", default="standard"),
]


@app.command()
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
    store = prepare_store(
        opened, out, sigma_tn=sigma_tn, noise_seed=noise_seed, train=train, holdout=holdout, split_seed=split_seed,
        noisy=noisy.value, dedup=dedup and dedup.value, hand_out=hand_out, captions=captions, force=force,
        workers=workers or os.cpu_count() or 1,
    )  # fmt: skip
    print(f"{out}: {store.summary()}")
    if hand_out and store.num_classes:
        names = ", ".join(store.class_names or []) or f"0 to {store.num_classes - 1}"
        print(f"its class labels are handed out, too: {names}")


@app.command()
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
            " plain EDM, a quarter as long, denoises held-out images worst beside training images",
            "--sigma-tn",
            metavar="S|auto",
            default="1.5*R/64 for RxR pixels",
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
    resume: Annotated[Path | None, option("continue this run; everything is taken from it", metavar="RUN")] = None,
    dry_run: Annotated[
        bool, option("print the settings with parameter count, memory and time estimates; train nothing", "--dry-run")
    ] = False,
    force: Force = False,
) -> None:
    """Train a model: EDM (--sigma-tn 0) or ambient diffusion."""
    from fastambient.training import start
    from fastambient.training.distributed import choose_ranks

    if resume is not None:
        given = {"--data": data, "--out": out, "--preset": preset, "--config": config, "--sigma-tn": sigma_tn, "--kimg": kimg, "--batch": batch, "--seed": seed,
                 "--noise-seed": noise_seed, "--precision": precision, "--set": assignments, "--checkpoint-kimg": checkpoint_kimg, "--checkpoint-levels": checkpoint_levels, "--weighting": weighting,
                 "--noise": noise, "--augment-ambient": augment_ambient, "--clean": clean, "--regime": regime, "--stream": stream, "--loader": loader, "--audit-every": audit_every, "--stop-when-copying": stop_when_copying, "--dry-run": dry_run or None, "--force": force or None}  # fmt: skip
        for name, value in given.items():
            if value is not None and value != []:
                raise InputError(f"--resume takes everything from the run; leave out {name}")
        ranks, device = choose_ranks(gpus, processes) if gpus is not None or processes is not None else (None, None)
        start.resume(resume, ranks=ranks, device=device)
        return
    ranks, device = choose_ranks(gpus, processes)
    fit, auto = batch == "auto", sigma_tn == "auto"
    options: dict[str, dict[str, Any]] = {
        "data": {"loader": loader and loader.value, "clean": clean, "stream": stream},
        "noise": {"sigma_tn": None if auto or sigma_tn is None else parse_sigma_tn(sigma_tn), "weighting": weighting and weighting.value, "mode": noise and noise.value, "regime": regime and regime.value},
        "training": {
            "kimg": kimg, "batch": None if fit or batch is None else parse_batch(batch), "seed": seed, "precision": precision and precision.value, "ranks": ranks, "device": device,
            "checkpoint_kimg": checkpoint_kimg, "checkpoint_levels": checkpoint_levels, "augment_ambient": augment_ambient and augment_ambient.value,
            "audit_kimg": audit_every, "stop_when_copying": stop_when_copying,
        },
    }  # fmt: skip
    request = start.TrainRequest(
        data=data, preset=preset, config=config, assignments=assignments or [], noise_seed=noise_seed, fit=fit, auto_sigma_tn=auto,
        options={s: {k: v for k, v in values.items() if v is not None} for s, values in options.items()},
    )  # fmt: skip
    if dry_run:
        print(start.describe(request))
        return
    start.new(request, out, force=force)


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="run folder or model.safetensors", metavar="RUN|FILE")],
    seeds: Annotated[str, option("sample seeds, such as 0-63,100", metavar="LIST")],
    out: Annotated[Path, option("new folder for PNGs and a grid, or one .npz file", metavar="DIR")],
    class_index: Annotated[
        int | None,
        option("class of all pictures (conditional models)", "--class", metavar="C", default="drawn from each seed"),
    ] = None,
    steps: Annotated[
        int | None,
        option(
            "noise levels, at least 2: 2*N - 1 evaluations of the network with heun, N with dpmpp-2m",
            metavar="N",
            default="the model's",
        ),
    ] = None,
    sampler: Annotated[
        Sampler | None, option("heun: EDM's; dpmpp-2m: DPM-Solver++(2M)", default="the model's, or else heun")
    ] = None,
    S_churn: Annotated[
        float | None,
        option(
            "fresh noise added over all steps (heun only); 0: none", "--S-churn", metavar="X", default="the model's"
        ),
    ] = None,
    S_min: Annotated[
        float | None, option("lowest sigma that churn is added at", "--S-min", metavar="X", default="the model's")
    ] = None,
    S_max: Annotated[
        float | None,
        option("highest sigma that churn is added at; inf: no limit", "--S-max", metavar="X", default="the model's"),
    ] = None,
    S_noise: Annotated[
        float | None, option("scale of churn's noise", "--S-noise", metavar="X", default="the model's")
    ] = None,
    guidance: Annotated[
        float | None,
        option(
            "away from the pictures of no class (conditional models trained with label dropout) or of --autoguidance; 1:"
            " none, more: further",
            metavar="W",
            default="1; with --autoguidance 2",
        ),
    ] = None,
    autoguidance: Annotated[
        Path | None,
        option("worse model of the same pictures to guide away from: smaller, or trained less", metavar="RUN|FILE"),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        option("guide at these sigmas only", "--guidance-interval", metavar="LOW,HIGH", default="at all"),
    ] = None,
    precision: Annotated[
        Precision | None,
        option(
            "of the network; the sampler's state stays float32", default="fp32; on a GPU what the model was trained in"
        ),
    ] = None,
    batch: Annotated[
        int | None, option("pictures at once; changes no picture", metavar="B", default="the model's")
    ] = None,
    gpus: Annotated[int | None, option("0: the CPU, 1: a GPU", metavar="N", default="a GPU if there is one")] = None,
    force: Force = False,
) -> None:
    """Sample pictures from a trained model."""
    from fastambient.sampling import parse_interval, parse_seeds, write_samples
    from fastambient.training.distributed import choose_ranks

    _, device = choose_ranks(gpus, None)
    written = write_samples(
        model, parse_seeds(seeds), out, class_index=class_index, steps=steps, batch=batch, device=device, force=force,
        sampler=sampler and sampler.value, S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise,
        guidance=guidance, autoguidance=autoguidance, precision=precision and precision.value,
        guidance_interval=None if guidance_interval is None else parse_interval(guidance_interval),
    )  # fmt: skip
    print(written)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")],
    samples: Annotated[
        Path | None, option("folder of PNGs or .npz to measure instead of sampling", metavar="DIR")
    ] = None,
    num: Annotated[
        int | None,
        option("samples to draw (seeds 0 to N-1), or to read", metavar="N", default="the run's evaluation.num, 1000"),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "where the metrics go; pictures and report beside it, with its name in front",
            metavar="FILE",
            default="RUN/metrics.json",
        ),
    ] = None,
    features: Features = None,
    weights: Weights = None,
    preprocess: Preprocess = None,
    gpus: Annotated[int | None, option("0: the CPU, 1: a GPU", metavar="N", default="a GPU if there is one")] = None,
) -> None:
    """Measure quality and copying, each against held-out images; writes metrics, pictures and report.html."""
    from fastambient.evaluation.run import evaluate_run, print_table
    from fastambient.training.distributed import choose_ranks

    _, device = choose_ranks(gpus, None)
    found = evaluate_run(
        run, samples=samples, num=num, out=out, device=device, features=features, weights=weights,
        preprocess=preprocess and preprocess.value,
    )  # fmt: skip
    print_table([found])


@app.command()
def audit(
    samples: Annotated[
        str, option("pictures of any generator: a folder (PNG, JPEG, WebP, BMP), .npz, .npy, zip, ...", metavar="DIR")
    ],
    train: Annotated[
        str,
        option(
            "images that the generator was trained on: a SOURCE as prepare takes it, or a STORE, whose held-out images"
            " then are the control",
            metavar="SOURCE|STORE",
        ),
    ],
    holdout: Annotated[
        str | None,
        option(
            "images that never trained, from where the training images come; without them there is no control",
            metavar="SOURCE|STORE",
            default="a --train STORE's",
        ),
    ] = None,
    features: Features = None,
    weights: Weights = None,
    preprocess: Preprocess = None,
    flips: Annotated[bool, option("mirrored training images count as well", "--flips")] = False,
    num: Annotated[int | None, option("pictures to take, chosen by chance", metavar="N", default="all")] = None,
    resolution: Annotated[
        int | None, option("centre-crop and resize all pictures to RxR pixels", metavar="R", default="as they are")
    ] = None,
    cache: Annotated[
        str | None,
        option("folder for features, which are made once, or none", metavar="DIR|none", default="the user's cache"),
    ] = None,
    on_bad_image: Annotated[
        OnBadImage, option("what to do with pictures that cannot be read", "--on-bad-image")
    ] = OnBadImage.error,
    out: Annotated[
        Path, option("where the metrics go; the report beside it as <name>-report.html", metavar="FILE")
    ] = Path("audit.json"),
    gpus: Annotated[int | None, option("0: the CPU, 1: a GPU", metavar="N", default="a GPU if there is one")] = None,
) -> None:
    """Are pictures of any generator copies of its training images? Against held-out images, with a report."""
    from fastambient.evaluation.audit import audit as audit_pictures
    from fastambient.evaluation.audit import sentence
    from fastambient.evaluation.features import default_cache
    from fastambient.evaluation.table import print_table
    from fastambient.training.distributed import choose_ranks

    _, device = choose_ranks(gpus, None)
    found = audit_pictures(
        samples, train, holdout=holdout, out=out, weights=weights, flips=flips, num=num, resolution=resolution,
        features=features or "efficientnet-lite0", preprocess=preprocess.value if preprocess else "standard",
        cache=None if cache == "none" else Path(cache) if cache else default_cache(),
        on_bad_image=on_bad_image.value, device=device,
    )  # fmt: skip
    print_table([found])
    print(sentence(found.metrics))


figure = typer.Typer(help="Draw figures of runs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(figure, name="figure")
RUNS = typer.Argument(help="run folders", metavar="RUN...")
GPUS = option("0: the CPU, 1: a GPU", metavar="N", default="a GPU if there is one")


@figure.command("denoised")
def figure_denoised(
    runs: Annotated[list[Path], RUNS],
    images: Annotated[int, option("training images, and as many held-out ones", metavar="N")] = 1,
    sigmas: Annotated[str | None, option("noise levels", metavar="S,S,...", default="1.5*R/64 times 1/4 to 32")] = None,
    out: Annotated[Path | None, option("PNG to write", metavar="FILE", default="RUN/figure-denoised.png")] = None,
    gpus: Annotated[int | None, GPUS] = None,
) -> None:
    """What each model makes of the same noised images: rows are models, columns noise levels."""
    from fastambient.evaluation.figures import denoised
    from fastambient.training.distributed import choose_ranks

    levels = None if sigmas is None else parse_numbers("--sigmas", sigmas)
    print(denoised(runs, out, images=images, sigmas=levels, device=choose_ranks(gpus, None)[1]))


@figure.command("samples")
def figure_samples(
    runs: Annotated[list[Path], RUNS],
    seeds: Annotated[str, option("one picture a seed, the same for all runs", metavar="LIST")] = "0-63",
    out: Annotated[Path | None, option("PNG to write", metavar="FILE", default="RUN/figure-samples.png")] = None,
    gpus: Annotated[int | None, GPUS] = None,
) -> None:
    """Samples of each run at the same seeds."""
    from fastambient.evaluation.figures import samples
    from fastambient.sampling import parse_seeds
    from fastambient.training.distributed import choose_ranks

    print(samples(runs, parse_seeds(seeds), out, device=choose_ranks(gpus, None)[1]))


@figure.command("neighbours")
def figure_neighbours(
    run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")],
    samples: Annotated[Path | None, option("folder of PNGs or .npz to show instead of sampling", metavar="DIR")] = None,
    num: Annotated[int, option("samples to show: seeds 0 to N-1, or the first N", metavar="N")] = 16,
    out: Annotated[Path | None, option("PNG to write", metavar="FILE", default="RUN/figure-neighbours.png")] = None,
    gpus: Annotated[int | None, GPUS] = None,
) -> None:
    """Samples beside their nearest training and held-out images, with the gap ratio."""
    from fastambient.evaluation.figures import neighbours
    from fastambient.training.distributed import choose_ranks

    print(neighbours(run, out, samples=samples, num=num, device=choose_ranks(gpus, None)[1]))


@app.command()
def sweep(
    data: Annotated[str, option(f"SOURCE or STORE. SOURCE: {SOURCE_HELP}", metavar="SOURCE|STORE")] = "digits",
    out: Annotated[Path, option("folder of the sweep; the same command goes on in it", metavar="DIR")] = Path(
        "runs/sweep"
    ),
    sigma_tn: Annotated[
        str,
        option(
            "noise levels of the training set, in units of pixels in [-1, 1]; 0 is EDM", "--sigma-tn", metavar="LIST"
        ),
    ] = "0,0.1,0.2,0.4",
    seeds: Annotated[str, option("training seeds, each of every cell", metavar="LIST")] = "0,1,2",
    baselines: Annotated[
        str | None,
        option(
            "of fresh-noise (new noise at every draw), weight-decay (EDM by AdamW), early-stop (EDM, stopped when it"
            " copies)",
            metavar="LIST",
            default="none",
        ),
    ] = None,
    kimg: Annotated[
        float | None, option("length of each run in thousands of images", metavar="K", default="the preset's")
    ] = None,
    preset: Annotated[str | None, option("named settings", metavar="NAME", default="by resolution")] = None,
    num: Annotated[int, option("samples of each run's evaluation", metavar="N")] = 1000,
    features: Annotated[
        str | None,
        option(
            "embedder of the evaluation and its FD",
            metavar="NAME",
            default="evaluate's, below 16 pixels pixel; FD in pixels",
        ),
    ] = None,
    parallel: Annotated[
        int | None, option("cells at once", metavar="N", default="one a GPU; without one, one a CPU core")
    ] = None,
    target: Annotated[
        float,
        option("the chosen sigma_tn copies at most this share of the samples more than the control", metavar="RATE"),
    ] = 0.05,
    stop_rate: Annotated[
        float,
        option("--stop-when-copying of the early-stop baseline, a share of the samples", "--stop-rate", metavar="RATE"),
    ] = 0.05,
    weight_decay: Annotated[
        float, option("of the weight-decay baseline, decoupled", "--weight-decay", metavar="X")
    ] = 0.05,
    assignments: Annotated[
        list[str] | None,
        option("any setting, for every cell; may be repeated", "--set", metavar="section.name=value"),
    ] = None,
    gpus: Annotated[
        int | None, option("GPUs to spread cells over; 0 is the CPU", metavar="N", default="all visible")
    ] = None,
) -> None:
    """Train over sigma_tn, seeds and baselines, measure all, draw quality against copying and choose a sigma_tn."""
    from fastambient.sampling import parse_seeds
    from fastambient.sweep import SweepRequest
    from fastambient.sweep import sweep as run_sweep
    from fastambient.training.distributed import choose_ranks

    ranks, device = choose_ranks(gpus, None)
    request = SweepRequest(
        data=data, sigma_tn=parse_numbers("--sigma-tn", sigma_tn), seeds=parse_seeds(seeds),
        baselines=[b.strip() for b in (baselines or "").split(",") if b.strip()], kimg=kimg, preset=preset, num=num,
        features=features, parallel=parallel, target=target, stop_rate=stop_rate, weight_decay=weight_decay,
        assignments=assignments or [], gpus=ranks if device == "cuda" else 0,
    )  # fmt: skip
    run_sweep(request, out)


@app.command()
def plan(
    preset: Annotated[str, option("network and settings", metavar="NAME")] = "cifar10-ddpmpp",
    device: Annotated[
        str, option("h100, h200 or a100 (SXM), or cpu: this one, its rates measured now", metavar="NAME")
    ] = "h100",
    gpus: Annotated[int, option("devices, up to 1024", metavar="N")] = 1,
    batch: Annotated[
        int | None, option("images an optimizer step, over all devices", metavar="B", default="the preset's")
    ] = None,
    kimg: Annotated[
        float | None, option("length of the run in thousands of images", metavar="K", default="the preset's")
    ] = None,
    precision: Annotated[Precision | None, option("of the network", default="the preset's")] = None,
    resolution: Annotated[int | None, option("images of RxR pixels", metavar="R", default="the preset's own")] = None,
    assignments: Annotated[
        list[str] | None, option("any setting of the tree; may be repeated", "--set", metavar="section.name=value")
    ] = None,
    check: Annotated[
        Path | None, option("compare plans with the measured rows (JSON) of this folder instead", metavar="DIR")
    ] = None,
) -> None:
    """What a run would cost on other machines: memory, time, energy, traffic, each rate with its source."""
    from fastambient import planning

    if check is not None:
        print(planning.check(check))
        return
    given = {"batch": batch, "kimg": kimg, "precision": precision and precision.value}
    options = {"training": {name: value for name, value in given.items() if value is not None}}
    settings = planning.preset_settings(preset, resolution, options=options, assignments=assignments or ())
    print(planning.describe(settings, device=device, ranks=gpus))


@app.command()
def info(
    as_json: Annotated[bool, option("print JSON", "--json")] = False,
) -> None:
    """Versions, devices and which implementation each operator has here."""
    from fastambient.system import information

    found = information()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for section, values in found.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<20} {value}")


@app.command()
def quickstart(
    out: Annotated[Path, option("folder for both runs and the report", metavar="DIR")] = Path("runs/quickstart"),
    force: Force = False,
) -> None:
    """Train EDM and the ambient model on 100 digits, measure both, print one table (under 5 minutes on 2 cores)."""
    from fastambient.quickstart import quickstart as run_quickstart

    run_quickstart(out, force=force)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM outside the training loop unwinds like Ctrl-C, so that temporary folders vanish."""
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors are one line on stderr; exit code 2 for bad input, 1 for a failure, 130/143 for a signal."""
    signal.signal(signal.SIGTERM, _terminate)
    _wait_politely()
    try:
        code = app(args=arguments, standalone_mode=False)
    except FastambientError as error:
        _complain(str(error), plain=error.exit_code > 2)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        _complain(f"{error.filename or ''}{': ' if error.filename else ''}{error.strerror or error}")
        code = 1
    except Exception as error:
        if hasattr(error, "format_message"):
            _complain(error.format_message())  # the parser's own: unknown option, missing argument, bad number
            code = 2
        elif "FASTAMBIENT_TRACEBACK" in os.environ:
            raise
        else:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            _complain(f"unexpected {what}; please report it, with what FASTAMBIENT_TRACEBACK=1 shows")
            code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _wait_politely() -> None:
    """Where other programs want the CPUs, OpenMP's waiting threads should sleep: spinning, they take the time that the
    thread they wait for needs, and a step takes ten times as long beside one other job. With the CPUs to itself a run
    is faster spinning. Read when torch loads OpenMP, so before the first import of torch."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > cpus / 4 and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100")


def _complain(message: str, *, plain: bool = False) -> None:
    text = " ".join(message.split())
    print(text if plain else f"error: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
