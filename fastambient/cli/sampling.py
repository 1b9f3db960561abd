"""``sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastambient.cli.options import Force, Precision, Sampler, choose_device, option


def sample(
    model: Annotated[Path, typer.Argument(help="run folder or model.safetensors", metavar="RUN|FILE")],
    seeds: Annotated[str, option("sample seeds, such as 0-63,100", metavar="LIST")],
    out: Annotated[Path, option("new folder for PNGs and a grid, or one .npz file", metavar="DIR")],
    class_index: Annotated[
        str | None,
        option(
            "class of all pictures (conditional models): its name, or its number from 0",
            "--class",
            metavar="C",
            default="drawn from each seed",
        ),
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
            "away from the pictures of no class (conditional models trained with label dropout) or of --autoguidance;"
            " 1: none, more: further",
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

    device = choose_device(gpus)
    written = write_samples(
        model, parse_seeds(seeds), out, class_index=class_index, steps=steps, batch=batch, device=device, force=force,
        sampler=sampler and sampler.value, S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise,
        guidance=guidance, autoguidance=autoguidance, precision=precision and precision.value,
        guidance_interval=None if guidance_interval is None else parse_interval(guidance_interval),
    )  # fmt: skip
    print(written)
