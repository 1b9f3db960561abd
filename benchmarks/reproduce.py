"""Quality against copying over sigma_tn, with every baseline and three seeds: the measured part of docs/results.md.

    python benchmarks/reproduce.py --out runs/reproduce --source pictures.zip --table docs/results.md

Parts, each also alone (--part): digits (8x8, 30, 100 and 300 training images: digits-30 ...), pictures (--source
at 16x16 and 32x32, 300 training images: pictures-16, pictures-32; 100 at 16x16, a third of the time: pictures-16-100,
and with twice the audits in a network's features: pictures-16-100-audited),
figures (denoised images over noise levels: much data, little data by EDM, little data ambient).
Everything is resumable: the same command goes on, finished cells are kept. Hours on 2 cores, minutes on a GPU. A part's
seeds may be measured one after the other, on other days or machines (--seeds 2): each sweep's cells join those that
--rows has of it, and the page (reproduce_page.py) is made of all of these.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import protocol
import torch
from reproduce_page import denoised, document, merge, write_page

from fastambient.console import say, warn
from fastambient.diffusion.ambient import default_sigma_tn
from fastambient.files import write_bytes, write_json
from fastambient.sweep import SweepRequest, sweep
from fastambient.system import bf16_on_cpu

SEEDS = (0, 1, 2)
NUM = 1000
DIGITS = {100: 64.0, 300: 192.0, 30: 24.0}  # training images: kimg, 640 to 800 epochs
# kimg between audits of every run: where few images are copied before quality has come, early stopping costs most.
AUDITED = {
    "digits-30": (2.0, "evaluation.audit_num=512"), "digits-300": (16.0,),
    "pictures-16-100-audited": (6.0, "evaluation.audit_num=512", "evaluation.audit_features=efficientnet-lite0"),
}  # fmt: skip
DIGITS_SIGMA_TN = (0.0, 0.1, 0.2, 0.4)
COMPARED = ("fresh-noise", "weight-decay", "early-stop")
PICTURES = {  # resolution, training images, kimg, kimg between audits
    "pictures-16": (16, 300, 288.0, 24.0), "pictures-32": (32, 300, 288.0, 24.0),
    "pictures-16-100": (16, 100, 96.0, 12.0), "pictures-16-100-audited": (16, 100, 84.0, 6.0),
}  # fmt: skip
# Small batches, large steps, no dropout: by the presets' own settings 300 pictures of 16x16 had copied nothing after 84
# kimg; by these, 100 pictures begin to after 360 passes. Distances are a network's, where photographs are told apart.
PICTURES_SET = ("training.batch=32", "training.lr=2e-3", "model.dropout=0.0")
PICTURES_FEATURES, PICTURES_HOLDOUT = "efficientnet-lite0", 1000
SCALES = (0.0, 0.5, 1.0, 2.0)  # of 1.5*R/64
# Of the figures' first row: training images, kimg (None: the part's).
MANY: dict[str, tuple[int, float | None]] = {"digits": (1500, None), "pictures": (10_000, 72.0)}
PARTS = ("digits", *(f"digits-{n}" for n in DIGITS), "pictures", *PICTURES, "figures")
TINY = ["model.model_channels=8", "model.channel_mult=[1,2]", "model.attn_resolutions=[4]", "model.num_blocks=1",
        "training.batch=8", "sampling.steps=2", "evaluation.audit_num=8", "evaluation.features=none"]  # fmt: skip


def fastest_precision(gpus: int) -> str:
    """bf16 takes half the time of float32, or less, but on a CPU without units for it many times as long."""
    return "bf16" if gpus or bf16_on_cpu() else "fp32"


def requests(arguments: argparse.Namespace) -> dict[str, SweepRequest]:
    """The sweeps of the parts asked for by the folder's name; with figures, the runs on much data as well."""
    a = arguments
    common: dict[str, Any] = {
        "seeds": a.seeds, "num": 12 if a.tiny else NUM, "parallel": a.parallel, "gpus": a.gpus,
        "noise_seed": a.noise_seed,
    }  # fmt: skip
    own = TINY if a.tiny else []
    found: dict[str, SweepRequest] = {}

    def add(
        name: str, data: str, sigma_tn: tuple[float, ...], kimg: float, *assignments: str, many: tuple[int, float | None] | None,
        every: float | None = None, features: str | None = None, baselines: tuple[str, ...] = COMPARED,
    ) -> None:  # fmt: skip
        group = name.partition("-")[0]
        first = name in (f"digits-{next(iter(DIGITS))}", next(iter(PICTURES)))
        if not {name, group} & set(a.part) or (a.tiny and group in a.part and not first):  # one is rehearsal enough
            return
        kimg = a.kimg or (0.016 if a.tiny else kimg)
        sigma_tn = (0.0, sigma_tn[2]) if a.tiny else sigma_tn
        every, *more = AUDITED.get(name, (every,))
        set_here = [*own, *assignments, *([] if a.tiny else more)]
        found[name] = SweepRequest(
            data=data, sigma_tn=sigma_tn, baselines=baselines, kimg=kimg, assignments=set_here, audit_every=every,
            features=features, **common,
        )  # fmt: skip
        if "figures" in a.part and many is not None:
            count, length = many
            other = [x if not x.startswith("data.train=") else f"data.train={count}" for x in set_here]
            much = {"seeds": a.seeds[:1], "sigma_tn": (0.0,)}
            found[f"{name}-many"] = SweepRequest(
                data=data, kimg=a.kimg or length or kimg, assignments=other, features=features, **(common | much)
            )  # fmt: skip

    for images, kimg in DIGITS.items():
        add(f"digits-{images}", "digits", DIGITS_SIGMA_TN, kimg, f"data.train={images}", many=MANY["digits"])
    if a.source:
        for name, (pixels, images, kimg, every) in PICTURES.items():
            train, holdout, many = (20, 10, (30, None)) if a.tiny else (images, PICTURES_HOLDOUT, MANY["pictures"])
            settings = [] if a.tiny else [*PICTURES_SET, f"training.precision={fastest_precision(a.gpus)}"]
            curve = name in AUDITED  # of quality against copying while they train: few runs, many samples
            scales = (0.0, 1.0) if curve and not a.tiny else SCALES
            levels = tuple(scale * default_sigma_tn(pixels) for scale in scales)
            add(
                name, a.source, levels, kimg, f"data.resolution={pixels}", f"data.train={train}",
                f"data.holdout={holdout}", *settings, many=None if curve else many,
                every=None if a.tiny else every, features=None if a.tiny else PICTURES_FEATURES,
                baselines=("fresh-noise",) if curve else (*COMPARED, "ambient-stop"),
            )  # fmt: skip
    return found


def draw_figures(out: Path, page: Path | None) -> None:
    """Denoised images over noise levels, for each sweep in `out` that has a run on much data beside it."""
    for folder in sorted(p.parent for p in out.glob("*/sweep.json") if not p.parent.name.endswith("-many")):
        summary = json.loads((folder / "sweep.json").read_text())
        seed = summary["settings"]["seeds"][0]
        if folder.name in AUDITED and folder.name in PICTURES:
            continue  # the same pictures as another part's
        many = out / f"{folder.name}-many" / f"edm-seed{seed}"
        if not (many / "metrics.json").is_file():
            warn(f"{folder}: its run on much data is not there: no figure")
            continue
        levels = sorted(c["sigma_tn"] for c in summary["cells"] if c["kind"] == "ambient" and c["seed"] == seed)
        level = summary["chosen"]["sigma_tn"] or levels[len(levels) // 2]
        runs = [many, folder / f"edm-seed{seed}", folder / f"ambient-{level:g}-seed{seed}"]
        drawn = out / denoised(folder.name)
        command = [sys.executable, "-m", "fastambient", "figure", "denoised", *map(str, runs), "--out", str(drawn)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            warn(f"figure denoised of {folder.name} failed with exit code {done.returncode}")
        elif page is not None:
            write_bytes(page.parent / drawn.name, drawn.read_bytes())


def _measured_here(request: SweepRequest, file: Path) -> dict[str, str]:
    """{"device", "date"} of a sweep that has just been finished, or was when `file` was written."""
    if not file.is_file():
        found = protocol.environment(torch.device("cuda" if request.gpus else "cpu"))
        write_json(file, {"device": f"{found['device']}, torch {torch.__version__}", "date": str(date.today())})
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/reproduce"), help="folder of the sweeps")
    add(
        "--part",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"of {','.join(PARTS)} (default all)",
    )
    add("--source", help="pictures for the second part: a folder, an EDM zip, or any other SOURCE")
    add("--table", type=Path, help="Markdown file to write, docs/results.md (default: print only)")
    add(
        "--rows",
        type=Path,
        help="folder of each sweep's rows, sweep-NAME.json; cells join those there (default: --out)",
    )
    add("--kimg", type=float, help="length of every run (default: each part's own)")
    add("--seeds", type=_seeds, default=SEEDS, help="comma-separated (default 0,1,2)")
    add("--noise-seed", type=int, default=1000, help="of fixed noise: the first cell's, others count on")
    add("--parallel", type=int, help="cells at once (default: one a GPU; without one, one a CPU core)")
    add("--gpus", type=int, default=gpus, help="GPUs to spread the cells over; 0 is the CPU (default: all)")
    add("--tiny", action="store_true", help="a rehearsal of minutes with tiny networks; measures nothing")
    arguments = parser.parse_args(argv)
    if wrong := sorted(set(arguments.part) - set(PARTS)):
        parser.error(f"--part {','.join(wrong)}: not one of {', '.join(PARTS)}")
    if not arguments.source and any(part.startswith("pictures") for part in arguments.part):
        warn("--source names no pictures: the part on pictures is left out")
    rows, page = arguments.rows or arguments.out, arguments.table
    for folder in (rows, page and page.parent):  # now, not after hours
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    for name, request in {} if arguments.part == ["figures"] else requests(arguments).items():
        say(f"{name}")
        summary = sweep(request, arguments.out / name)
        if not name.endswith("-many"):
            merge(
                rows / f"sweep-{name}.json", summary, **_measured_here(request, arguments.out / name / "machine.json")
            )
    if "figures" in arguments.part:
        draw_figures(arguments.out, page)
    if page is None:
        print(document(rows))
    else:
        write_page(rows, page)
        say(f"{page}")


if __name__ == "__main__":
    main()
