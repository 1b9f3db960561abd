"""Quality against copying over sigma_tn, with every baseline and three seeds: the measured part of docs/results.md.

    python benchmarks/reproduce.py --out runs/reproduce --source pictures.zip --table docs/results.md

Parts, each also alone (--part): digits (8x8, 30, 100 and 300 training images: digits-30 ...), pictures (--source
at 16x16 and 32x32, 300 training images: pictures-16, pictures-32), figures (denoised images over noise levels: much data, little data by EDM, little data ambient).
Everything is resumable: the same command goes on, finished cells are kept. Hours on 2 cores, minutes on a GPU.
The document is made of what is on disk alone, so a part that was not measured is not in it.
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

from fastambient.console import duration, say, warn
from fastambient.diffusion.ambient import default_sigma_tn
from fastambient.files import write_bytes, write_json
from fastambient.sweep import BASELINES, SweepRequest, sweep
from fastambient.sweep_results import KINDS, over_seeds, table

SEEDS = (0, 1, 2)
NUM = 1000
DIGITS = {100: 64.0, 300: 192.0, 30: 24.0}  # training images: kimg, 640 to 800 epochs
# kimg between audits of every run: where few images are copied before quality has come, early stopping costs most.
AUDITED = {"digits-30": (2.0, "evaluation.audit_num=512")}
DIGITS_SIGMA_TN = (0.0, 0.1, 0.2, 0.4)
PICTURES = {16: 100.0, 32: 100.0}  # resolution: kimg
PICTURES_TRAIN, PICTURES_HOLDOUT = 300, 1000
SCALES = (0.0, 0.5, 1.0, 2.0)  # of 1.5*R/64
MANY = {"digits": 1500, "pictures": 10_000}  # training images of the figures' first row
PARTS = ("digits", *(f"digits-{n}" for n in DIGITS), "pictures", *(f"pictures-{n}" for n in PICTURES), "figures")
READING = ("<!-- reading: begin -->", "<!-- reading: end -->")
TINY = ["model.model_channels=8", "model.channel_mult=[1,2]", "model.attn_resolutions=[4]", "model.num_blocks=1",
        "training.batch=8", "sampling.steps=2", "evaluation.audit_num=8", "evaluation.features=none"]  # fmt: skip


def requests(arguments: argparse.Namespace) -> dict[str, SweepRequest]:
    """The sweeps of the parts asked for by the folder's name; with figures, the runs on much data as well."""
    a = arguments
    common: dict[str, Any] = {
        "seeds": tuple(range(a.seeds)), "num": 12 if a.tiny else NUM, "parallel": a.parallel, "gpus": a.gpus,
        "noise_seed": a.noise_seed,
    }  # fmt: skip
    own = TINY if a.tiny else []
    found: dict[str, SweepRequest] = {}

    def add(name: str, data: str, sigma_tn: tuple[float, ...], kimg: float, *assignments: str, many: str) -> None:
        group = name.partition("-")[0]
        first = name in (f"digits-{next(iter(DIGITS))}", f"pictures-{next(iter(PICTURES))}")
        if not {name, group} & set(a.part) or (a.tiny and group in a.part and not first):  # one is rehearsal enough
            return
        kimg = a.kimg or (0.016 if a.tiny else kimg)
        sigma_tn = (0.0, sigma_tn[2]) if a.tiny else sigma_tn
        every, *more = AUDITED.get(name, (None,))
        set_here = [*own, *assignments, *([] if a.tiny else more)]
        found[name] = SweepRequest(
            data=data, sigma_tn=sigma_tn, baselines=BASELINES, kimg=kimg, assignments=set_here, audit_every=every,
            **common,
        )  # fmt: skip
        if "figures" in a.part:
            other = [x if not x.startswith("data.train=") else f"data.train={many}" for x in set_here]
            much = {"seeds": (0,), "sigma_tn": (0.0,)}
            found[f"{name}-many"] = SweepRequest(data=data, kimg=kimg, assignments=other, **(common | much))

    for images, kimg in DIGITS.items():
        add(f"digits-{images}", "digits", DIGITS_SIGMA_TN, kimg, f"data.train={images}", many=str(MANY["digits"]))
    if a.source:
        for pixels, kimg in PICTURES.items():
            train, holdout, many = (20, 10, 30) if a.tiny else (PICTURES_TRAIN, PICTURES_HOLDOUT, MANY["pictures"])
            levels = tuple(scale * default_sigma_tn(pixels) for scale in SCALES)
            add(
                f"pictures-{pixels}", a.source, levels, kimg, f"data.resolution={pixels}", f"data.train={train}",
                f"data.holdout={holdout}", many=str(many),
            )  # fmt: skip
    return found


def differences(summary: dict[str, Any], *, at_best: bool = False) -> list[dict[str, Any]]:
    """Each ambient model against each baseline, seed by seed: mean differences with Student's 95 % intervals.

    at_best : of each run's best audit instead of its end; copying is at most the target there, and distance alone counts
    clear : better in copies or in FD, the interval without 0, and not so worse in the other
    """
    cells = [c | (c["best"] or {}) for c in summary["cells"] if c.get("best")] if at_best else summary["cells"]
    baselines = ("edm", *(k for k in KINDS if k in BASELINES and not (at_best and k == "early-stop")))
    deciding = ("fd",) if at_best else ("excess", "fd")

    def seeds_of(kind: str, sigma_tn: float) -> dict[int, dict[str, Any]]:
        return {c["seed"]: c for c in cells if c["kind"] == kind and c["sigma_tn"] == sigma_tn}

    rows = []
    for sigma_tn in sorted({c["sigma_tn"] for c in cells if c["kind"] == "ambient"}):
        ours = seeds_of("ambient", sigma_tn)
        for kind in baselines:
            theirs = seeds_of(kind, sigma_tn if kind == "fresh-noise" else 0.0)
            both = sorted(ours.keys() & theirs.keys())
            if not both:
                continue
            row: dict[str, Any] = {"sigma_tn": sigma_tn, "against": kind, "seeds": len(both)}
            better, worse = [], []
            for key in ("excess", "fd"):
                row[key] = over_seeds([ours[s][key] - theirs[s][key] for s in both])
                interval = row[key]["interval"] or [-1e9, 1e9]
                if key in deciding:
                    better += [key] * (interval[1] < 0)
                    worse += [key] * (interval[0] > 0)
            row["clear"] = bool(better) and not worse
            alone = len(both) < 2  # no interval: nothing can be claimed
            if alone:
                row["found"] = "one seed: no claim"
            elif better and worse:
                row["found"] = "a trade"
            else:
                row["found"] = "better" if better else "worse" if worse else "no clear difference"
            rows.append(row)
    return rows


def _signed(found: dict[str, Any], scale: float, form: str) -> str:
    interval = found["interval"]
    text = format(scale * found["mean"], form)
    return text if interval is None else f"{text} ({scale * interval[0]:{form}} to {scale * interval[1]:{form}})"


def section(name: str, folder: Path) -> list[str]:
    """The document's part about one sweep."""
    summary = json.loads((folder / "sweep.json").read_text())
    machine = json.loads((folder / "machine.json").read_text())
    s, cells = summary["settings"], summary["cells"]
    spent = sum(c["seconds"] for c in cells)
    overrides = [x for x in s["assignments"] if not x.startswith("data.")]
    rows = differences(summary)
    lines = [
        f"## {name}",
        "",
        f"{s['train']:,} training and {s['holdout']:,} held-out images of {s['resolution']}x{s['resolution']}"
        f" ({Path(s['data']).name}), {s['kimg']:g} kimg a run, {s['num']:,} samples, seeds {s['seeds']}; weight decay"
        f" {s['weight_decay']:g} (AdamW), early stop at {100 * s['stop_rate']:g} %"
        f"{'; ' + ', '.join(overrides) if overrides else ''}. {len(cells)} runs, {duration(spent)} of training in all, on"
        f" {machine['machine']}, measured {machine['date']}.",
        "",
        table(summary).rstrip(),
        "",
        f"![Frechet distance against copies, {name}](pareto-{name}.svg)",
        "",
        *_comparison("Ambient less the baseline, seed by seed", rows),
    ]
    clear = {k: [r["sigma_tn"] for r in rows if r["against"] == k and r["clear"]] for k in ("edm", "early-stop")}
    both = [f"{x:g}" for x in clear["edm"] if x in clear["early-stop"]]
    lines += [
        f"Better than EDM and than early stopping, clear of the noise between seeds, at sigma_tn {', '.join(both)}."
        if both
        else "One seed: nothing is claimed."
        if all(r["seeds"] < 2 for r in rows)
        else "At no sigma_tn is the gain over EDM and over early stopping clear of the noise between seeds here.",
        "",
    ]
    if best := differences(summary, at_best=True):
        lines += _comparison("The same where each run is best, so that EDM is EDM stopped early", best)
    return lines


def _comparison(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of `differences`."""
    return [
        f"{title} (below 0 is better), with 95 % intervals:",
        "",
        "| sigma_tn | against | seeds | copies less the control, in points | FD | |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['sigma_tn']:g} | {KINDS[r['against']]} | {r['seeds']} | {_signed(r['excess'], 100, '+.1f')} |"
            f" {_signed(r['fd'], 1, '+.3g')} | {r['found']} |"
            for r in rows
        ),
        "",
    ]


def result_rows(folder: Path) -> dict[str, Any]:
    """A sweep in the form of the other benchmarks' files; a row a run."""
    machine, summary = (json.loads((folder / name).read_text()) for name in ("machine.json", "sweep.json"))
    return {"device": machine["machine"], "date": machine["date"], "settings": summary["settings"],
            "chosen": summary["chosen"], "rows": summary["cells"]}  # fmt: skip


def sweeps(out: Path) -> list[str]:
    """Names of the finished ones in `out`, without those of the figures."""
    finished = (p.parent.name for p in sorted(out.glob("*/machine.json")))
    return [name for name in finished if not name.endswith("-many")]


def document(out: Path, there_already: str = "") -> str:
    """docs/results.md from every sweep in `out`. What stands between the marks of `there_already`, the page as it was,
    is people's reading of the numbers and is kept."""
    _, found, rest = there_already.partition(READING[0])
    reading = rest.partition(READING[1])[0].strip() if found else ""
    lines = [
        "# Results: quality against copying",
        "",
        "`make reproduce` writes this page from its runs (benchmarks/reproduce.py); every row was measured. EMA weights;"
        " copies by gap ratio d1/d2 < 1/3 in pixel space, the control searches equally many held-out images; baselines:"
        " EDM, fresh noise, weight decay, early stopping.",
        "",
        READING[0],
        *([reading] if reading else []),
        READING[1],
        "",
    ]
    there = sweeps(out)
    for name in there:
        lines += section(name, out / name)
    if not there:
        lines += ["Nothing is measured yet.", ""]
    lines += [
        "What this does not show: other data, sizes and lengths; that a lower copy rate is privacy (it is not); copies"
        " that are near in meaning and not in pixels. With three seeds an interval is wide, and a difference that is not"
        " clear may still be there.",
        "",
    ]
    return "\n".join(lines)


def draw_figures(out: Path, names: list[str]) -> None:
    """Denoised images over noise levels, for each sweep that has a run on much data beside it."""
    for name in names:
        folder, many = out / name, out / f"{name}-many" / "edm-seed0"
        if not (folder / "sweep.json").is_file() or not many.is_dir():
            warn(f"{folder} is not swept yet, or its run on much data is not there: no figure")
            continue
        summary = json.loads((folder / "sweep.json").read_text())
        levels = sorted(c["sigma_tn"] for c in summary["cells"] if c["kind"] == "ambient" and c["seed"] == 0)
        level = summary["chosen"]["sigma_tn"] or levels[len(levels) // 2]
        runs = [many, folder / "edm-seed0", folder / f"ambient-{level:g}-seed0"]
        command = [sys.executable, "-m", "fastambient", "figure", "denoised", *map(str, runs), "--out"]
        done = subprocess.run([*command, str(out / f"denoised-{name}.png")], check=False)
        if done.returncode:
            warn(f"figure denoised of {name} failed with exit code {done.returncode}")


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
    add("--rows", type=Path, help="folder that gets each sweep's numbers as sweep-NAME.json, benchmarks/results")
    add("--kimg", type=float, help="length of every run (default: each part's own)")
    add("--seeds", type=int, default=len(SEEDS), help="number of seeds (default 3)")
    add("--noise-seed", type=int, default=1000, help="of the first cell's fixed noise, the others count on")
    add("--parallel", type=int, help="cells at once (default: one a GPU; without one, one a CPU core)")
    add("--gpus", type=int, default=gpus, help="GPUs to spread the cells over; 0 is the CPU (default: all)")
    add("--tiny", action="store_true", help="a rehearsal of minutes with tiny networks; measures nothing")
    arguments = parser.parse_args(argv)
    if wrong := sorted(set(arguments.part) - set(PARTS)):
        parser.error(f"--part {','.join(wrong)}: not one of {', '.join(PARTS)}")
    if not arguments.source and any(part.startswith("pictures") for part in arguments.part):
        warn("--source names no pictures: the part on pictures is left out")
    if arguments.part == ["figures"]:  # of whatever there is
        draw_figures(arguments.out, sweeps(arguments.out))
        return
    for folder in (arguments.rows, arguments.table and arguments.table.parent):  # now, not after hours
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, request in requests(arguments).items():
        say(f"{name}")
        sweep(request, arguments.out / name)
        machine = arguments.out / name / "machine.json"
        if not machine.is_file():  # the sweep was finished here, so its cells were trained here
            found = protocol.environment(torch.device("cuda" if request.gpus else "cpu"))
            words = f"{found['device']}, torch {torch.__version__}"
            write_json(machine, {"machine": words, "date": str(date.today())})
        if not name.endswith("-many"):
            names.append(name)
        if arguments.rows:
            write_json(arguments.rows / f"sweep-{name}.json", result_rows(arguments.out / name))
    if "figures" in arguments.part:
        draw_figures(arguments.out, names)
    page = arguments.table
    text = document(arguments.out, page.read_text() if page and page.is_file() else "")
    print(text)
    if page:
        write_bytes(page, text.encode())
        for name in sweeps(arguments.out):
            write_bytes(page.parent / f"pareto-{name}.svg", (arguments.out / name / "pareto.svg").read_bytes())


if __name__ == "__main__":
    main()
