"""``plan`` and ``info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from fastambient.cli.options import Precision, option


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
