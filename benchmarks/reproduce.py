"""Quality against copying over sigma_tn, with every baseline and three seeds: the measured part of docs/results.md.

    python benchmarks/reproduce.py --out runs/reproduce --source pictures.zip --table docs/results.md

Parts, each also alone (--part): digits (8x8, 30, 100 and 300 training images: digits-30 ...), pictures (--source
at 16x16 and 32x32, 300 training images: pictures-16, pictures-32; 100 at 16x16, a third of the time: pictures-16-100,
with twice the audits in a network's features: pictures-16-100-audited, and that with other training images for
each seed: pictures-16-100-splits),
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
from dataclasses import dataclass, replace
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
DIGITS_SIGMA_TN = (0.0, 0.1, 0.2, 0.4)
SCALES = (0.0, 0.5, 1.0, 2.0)  # of pictures' sigma_tn, times 1.5*R/64
COMPARED = ("fresh-noise", "weight-decay", "early-stop")
# Small batches, large steps, no dropout: by the presets' own settings 300 pictures of 16x16 had copied nothing after 84
# kimg; by these, 100 pictures begin to after 360 passes. Distances are a network's, where photographs are told apart.
PICTURES_SET = ("training.batch=32", "training.lr=2e-3", "model.dropout=0.0")
PICTURES_FEATURES, PICTURES_HOLDOUT = "efficientnet-lite0", 1000
IN_FEATURES = ("evaluation.audit_num=512", "evaluation.audit_features=efficientnet-lite0")
TINY = ["model.model_channels=8", "model.channel_mult=[1,2]", "model.attn_resolutions=[4]", "model.num_blocks=1",
        "training.batch=8", "sampling.steps=2", "evaluation.audit_num=8", "evaluation.features=none"]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One sweep.

    images : that train
    kimg : of a run; 640 to 960 epochs
    resolution : 8 are the built-in digits, others --source
    every : kimg between audits of every run; None for those that the rule may stop alone. Where few images are copied
        before quality has come, early stopping costs most
    settings : further assignments
    sigma_tn : None for the usual levels
    many : the figures' first row, a run on much data: training images, kimg (None: as long as the others)
    splits : each seed has training and held-out images of its own, those of the split of this seed; 0's are all parts'
    rehearsed : by --tiny; of each group one is enough
    """

    images: int
    kimg: float
    resolution: int = 8
    every: float | None = None
    settings: tuple[str, ...] = ()
    sigma_tn: tuple[float, ...] | None = None
    baselines: tuple[str, ...] = COMPARED
    many: tuple[int, float | None] | None = (1500, None)
    splits: bool = False
    rehearsed: bool = False


def _pictures(resolution: int, images: int, kimg: float, every: float, **more: Any) -> Part:
    """Of pictures, with the baseline that stops the ambient model, too."""
    usual: dict[str, Any] = {"baselines": (*COMPARED, "ambient-stop"), "many": (10_000, 72.0)}
    return Part(images, kimg, resolution, every, **(usual | more))


# quality against copying while they train: few runs, many samples
_AUDITED = _pictures(
    16,
    100,
    84.0,
    6.0,
    settings=IN_FEATURES,
    sigma_tn=(0.0, default_sigma_tn(16)),
    baselines=("fresh-noise",),
    many=None,
)
PARTS = {
    "digits-100": Part(100, 64.0, rehearsed=True),
    "digits-300": Part(300, 192.0, every=16.0),
    "digits-30": Part(30, 24.0, every=2.0, settings=IN_FEATURES[:1]),
    "pictures-16": _pictures(16, 300, 288.0, 24.0, rehearsed=True),
    "pictures-32": _pictures(32, 300, 288.0, 24.0),
    "pictures-16-100": _pictures(16, 100, 96.0, 12.0),
    "pictures-16-100-audited": _AUDITED,
    "pictures-16-100-splits": replace(_AUDITED, baselines=(), splits=True),
}
GROUPS = ("digits", "pictures", "figures")


def fastest_precision(gpus: int) -> str:
    """bf16 takes half the time of float32, or less, but on a CPU without units for it many times as long."""
    return "bf16" if gpus or bf16_on_cpu() else "fp32"


def requests(arguments: argparse.Namespace) -> dict[str, SweepRequest]:
    """The sweeps of the parts asked for by the folder's name, NAME or, where each seed has a split of its own,
    NAME/seedN; with figures, the runs on much data as well."""
    a = arguments
    found: dict[str, SweepRequest] = {}
    for name, part in PARTS.items():
        group, pictures = name.partition("-")[0], part.resolution > 8
        if not {name, group} & set(a.part) or (pictures and not a.source):
            continue
        if a.tiny and group in a.part and not part.rehearsed:
            continue
        request = _request(part, a)
        if part.splits:
            for seed in request.seeds:
                own = [*request.assignments, f"data.split_seed={seed}"]
                found[f"{name}/seed{seed}"] = replace(request, seeds=(seed,), assignments=own)
            continue
        found[name] = request
        if "figures" in a.part and part.many is not None:
            count, length = (30, None) if a.tiny and pictures else part.many
            more = [x if not x.startswith("data.train=") else f"data.train={count}" for x in request.assignments]
            found[f"{name}-many"] = replace(
                request, seeds=a.seeds[:1], sigma_tn=(0.0,), baselines=(), audit_every=None, assignments=more,
                kimg=a.kimg or length or request.kimg,
            )  # fmt: skip
    return found


def _request(part: Part, a: argparse.Namespace) -> SweepRequest:
    pictures = part.resolution > 8
    scales = (0.0, SCALES[2]) if a.tiny else SCALES
    levels = tuple(x * default_sigma_tn(part.resolution) for x in scales) if pictures else DIGITS_SIGMA_TN
    if part.sigma_tn is not None:
        levels = part.sigma_tn
    elif a.tiny and not pictures:
        levels = (levels[0], levels[2])
    settings = [*TINY] if a.tiny else []
    if pictures:
        train, holdout = (20, 10) if a.tiny else (part.images, PICTURES_HOLDOUT)
        settings += [f"data.resolution={part.resolution}", f"data.train={train}", f"data.holdout={holdout}"]
        if not a.tiny:
            settings += [*PICTURES_SET, f"training.precision={fastest_precision(a.gpus)}"]
    else:
        settings.append(f"data.train={part.images}")
    if not a.tiny:
        settings += part.settings
    return SweepRequest(
        data=a.source if pictures else "digits", sigma_tn=levels, baselines=part.baselines, assignments=settings,
        kimg=a.kimg or (0.016 if a.tiny else part.kimg), audit_every=None if a.tiny else part.every,
        features=PICTURES_FEATURES if pictures and not a.tiny else None, seeds=a.seeds, num=12 if a.tiny else NUM,
        parallel=a.parallel, gpus=a.gpus, noise_seed=a.noise_seed,
    )  # fmt: skip


def draw_figures(out: Path, page: Path | None) -> None:
    """Denoised images over noise levels, for each sweep in `out` that has a run on much data beside it."""
    for folder in sorted(p.parent for p in out.glob("*/sweep.json") if not p.parent.name.endswith("-many")):
        summary = json.loads((folder / "sweep.json").read_text())
        seed = summary["settings"]["seeds"][0]
        if folder.name in PARTS and PARTS[folder.name].many is None:
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
        default=list(GROUPS),
        help=f"of {','.join((*GROUPS, *PARTS))} (default all)",
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
    add("--noise-seed", type=int, default=1000, help="each cell's fixed noise is made of it and the cell's name")
    add("--parallel", type=int, help="cells at once (default: one a GPU; without one, one a CPU core)")
    add("--gpus", type=int, default=gpus, help="GPUs to spread the cells over; 0 is the CPU (default: all)")
    add("--tiny", action="store_true", help="a rehearsal of minutes with tiny networks; measures nothing")
    arguments = parser.parse_args(argv)
    if wrong := sorted(set(arguments.part) - {*GROUPS, *PARTS}):
        parser.error(f"--part {','.join(wrong)}: not one of {', '.join((*GROUPS, *PARTS))}")
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
            file = rows / f"sweep-{name.partition('/')[0]}.json"
            merge(file, summary, **_measured_here(request, arguments.out / name / "machine.json"))
    if "figures" in arguments.part:
        draw_figures(arguments.out, page)
    if page is None:
        print(document(rows))
    else:
        write_page(rows, page)
        say(f"{page}")


if __name__ == "__main__":
    main()
