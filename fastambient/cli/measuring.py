"""``evaluate``, ``audit``, ``figure`` and ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastambient.cli.options import (
    SOURCE_HELP,
    Features,
    OnBadImage,
    Preprocess,
    Weights,
    choose_device,
    option,
    parse_numbers,
)


def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")],
    data: Annotated[
        Path | None, option("the store that it was trained on, if it was moved", metavar="STORE", default="the run's")
    ] = None,
    samples: Annotated[
        Path | None, option("folder of PNGs or .npz to measure instead of sampling", metavar="DIR")
    ] = None,
    num: Annotated[
        int | None,
        option(
            "samples to draw (seeds 0 to N-1), or the first of --samples",
            metavar="N",
            default="the run's evaluation.num, 1000",
        ),
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
    from fastambient.evaluation.run import evaluate_run
    from fastambient.evaluation.table import print_found

    device = choose_device(gpus)
    found = evaluate_run(
        run, data=data, samples=samples, num=num, out=out, device=device, features=features, weights=weights,
        preprocess=preprocess and preprocess.value,
    )  # fmt: skip
    print_found(found)


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
    flips: Annotated[bool, option("also look for copies of mirrored images", "--flips/--no-flips")] = True,
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
    from fastambient.evaluation.features import default_cache
    from fastambient.evaluation.table import print_found

    device = choose_device(gpus)
    found = audit_pictures(
        samples, train, holdout=holdout, out=out, weights=weights, flips=flips, num=num, resolution=resolution,
        features=features or "efficientnet-lite0", preprocess=preprocess.value if preprocess else "standard",
        cache=None if cache == "none" else Path(cache) if cache else default_cache(),
        on_bad_image=on_bad_image.value, device=device,
    )  # fmt: skip
    print_found(found)


figure = typer.Typer(help="Draw figures of runs.", no_args_is_help=True, rich_markup_mode=None)
RUNS = typer.Argument(help="run folders", metavar="RUN...")
GPUS = option("0: the CPU, 1: a GPU", metavar="N", default="a GPU if there is one")


@figure.command("denoised")
def figure_denoised(
    runs: Annotated[list[Path], RUNS],
    images: Annotated[int, option("training images, and as many held-out ones", metavar="N")] = 1,
    sigmas: Annotated[
        str | None,
        option("noise levels, in units of pixels in [-1, 1]", metavar="S,S,...", default="1.5*R/64 times 1/4 to 32"),
    ] = None,
    out: Annotated[Path | None, option("PNG to write", metavar="FILE", default="RUN/figure-denoised.png")] = None,
    gpus: Annotated[int | None, GPUS] = None,
) -> None:
    """What each model makes of the same noised images: rows are models, columns noise levels."""
    from fastambient.evaluation.figures import denoised

    levels = None if sigmas is None else parse_numbers("--sigmas", sigmas)
    print(denoised(runs, out, images=images, sigmas=levels, device=choose_device(gpus)))


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

    print(samples(runs, parse_seeds(seeds), out, device=choose_device(gpus)))


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

    print(neighbours(run, out, samples=samples, num=num, device=choose_device(gpus)))


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
            " copies), ambient-stop (each level, stopped by the same rule)",
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
            "embedder of the evaluation and of the FD in the table and the plot",
            metavar="NAME",
            default="evaluation.features, efficientnet-lite0; below 16 pixels pixel",
        ),
    ] = None,
    audit_every: Annotated[
        float | None,
        option(
            "audit every run while it trains, and compare them where each is best, and where they pass --target: early"
            " stopping for all; distances in pixels, or --set evaluation.audit_features=NAME",
            "--audit-every",
            metavar="KIMG",
            default="those that may stop alone",
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
        option(
            "--stop-when-copying of the early-stop and ambient-stop baselines, a share of the samples",
            "--stop-rate",
            metavar="RATE",
        ),
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
        audit_every=audit_every,        assignments=assignments or [], gpus=ranks if device == "cuda" else 0,
    )  # fmt: skip
    run_sweep(request, out)
