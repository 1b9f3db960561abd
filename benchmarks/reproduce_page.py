"""docs/results.md and its curves from the rows of sweeps: what reproduce.py measured, here or elsewhere, in one page.

    python benchmarks/reproduce_page.py      writes it anew from benchmarks/results, as `make tables` does

A sweep's rows are a file sweep-NAME.json of `merge`; the page is made of these files alone, so that a part that was
not measured is not in it, and one that was measured on another day or machine is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fastambient.console import duration, warn
from fastambient.files import write_bytes, write_json
from fastambient.sweep import BASELINES, TARGET
from fastambient.sweep.plot import plot_pareto, plot_training
from fastambient.sweep.results import KINDS, STOPPED, WITHIN, over_seeds, summarize, table

READING = ("<!-- reading: begin -->", "<!-- reading: end -->")
_GROWS = ("seeds", "sigma_tn", "baselines")  # settings of the sweep, not of its cells: more of them may come later


def differences(summary: dict[str, Any], *, at: str | None = None) -> list[dict[str, Any]]:
    """Each ambient model against each baseline, seed by seed: mean differences with Student's 95 % intervals.

    at : "best", of each run's best audit instead of its end, or "passing", where its copying passes the target: copying is
        at most the target there, or equal, and distance alone counts
    clear : better in copies or in FD, the interval without 0, and not so worse in the other
    """
    cells = [c | c[at] for c in summary["cells"] if c.get(at)] if at else summary["cells"]
    left_out = STOPPED if at else ("ambient-stop",)
    baselines = ("edm", *(k for k in KINDS if k in BASELINES and k not in left_out))
    deciding = ("fd",) if at else ("excess", "fd")

    def seeds_of(kind: str, sigma_tn: float) -> dict[int, dict[str, Any]]:
        return {c["seed"]: c for c in cells if c["kind"] == kind and c["sigma_tn"] == sigma_tn}

    rows = []
    pairs = [(level, "ambient", kind) for level in _levels(cells, "ambient") for kind in baselines]
    if not at:  # like against like, both where the rule ended them
        pairs += [(level, "ambient-stop", "early-stop") for level in _levels(cells, "ambient-stop")]
    for sigma_tn, own, kind in pairs:
        ours = seeds_of(own, sigma_tn)
        theirs = seeds_of(kind, sigma_tn if kind == "fresh-noise" else 0.0)
        both = sorted(ours.keys() & theirs.keys())
        if not both:
            continue
        row: dict[str, Any] = {"sigma_tn": sigma_tn, "ours": own, "against": kind, "seeds": len(both)}
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


def _levels(cells: list[dict[str, Any]], kind: str) -> list[float]:
    return sorted({c["sigma_tn"] for c in cells if c["kind"] == kind})


def _signed(found: dict[str, Any], scale: float, form: str) -> str:
    interval = found["interval"]
    text = format(scale * found["mean"], form)
    return text if interval is None else f"{text} ({scale * interval[0]:{form}} to {scale * interval[1]:{form}})"


def _times(found: dict[str, Any]) -> str:
    """Machines and days that the rows are of."""
    days: dict[str, list[str]] = {}
    for row in found["rows"]:
        seen = days.setdefault(row["device"], [])
        if row["date"] not in seen:
            seen.append(row["date"])
    return "; ".join(f"on {device}, measured {' and '.join(sorted(dates))}" for device, dates in days.items())


def section(name: str, found: dict[str, Any], figure: str | None = None) -> list[str]:
    """The page's part about one sweep.

    found : content of its file of rows
    figure : file name of its denoised images, beside the page
    """
    s, cells = found["settings"], found["rows"]
    summary = summarize(cells, target=TARGET, within=WITHIN)
    spent = sum(c["seconds"] for c in cells)
    overrides = [x for x in s["assignments"] if not x.startswith("data.")]
    rows = differences(summary)
    lines = [
        f"## {name}",
        "",
        f"{s['train']:,} training and {s['holdout']:,} held-out images of {s['resolution']}x{s['resolution']}"
        f" ({Path(s['data']).name}), {s['kimg']:g} kimg a run, {s['num']:,} samples, seeds {s['seeds']}; weight decay"
        f" {s['weight_decay']:g} (AdamW), early stop at {100 * s['stop_rate']:g} %"
        f"{'; ' + ', '.join(overrides) if overrides else ''}. {len(cells)} runs, {duration(spent)} of training in all,"
        f" {_times(found)}.",
        "",
        table(summary).rstrip(),
        "",
        f"![Frechet distance against copies, {name}](pareto-{name}.svg)",
        "",
        *(
            [f"![Copies and Frechet distance over images seen, {name}](training-{name}.svg)", ""]
            if _audited(cells)
            else []
        ),
        *_comparison("Ambient less the baseline, seed by seed", rows),
    ]
    clear = {
        k: [r["sigma_tn"] for r in rows if r["against"] == k and r["clear"] and r["ours"] == "ambient"]
        for k in ("edm", "early-stop")
    }
    both = [f"{x:g}" for x in clear["edm"] if x in clear["early-stop"]]
    lines += [
        f"Better than EDM and than early stopping, clear of the noise between seeds, at sigma_tn {', '.join(both)}."
        if both
        else "One seed: nothing is claimed."
        if all(r["seeds"] < 2 for r in rows)
        else "At no sigma_tn is the gain over EDM and over early stopping clear of the noise between seeds here.",
        "",
    ]
    if stopped := [r for r in rows if r["ours"] == "ambient-stop" and r["seeds"] > 1]:
        better = ", ".join(f"{r['sigma_tn']:g}" for r in stopped if r["clear"])
        lines += [
            f"Both stopped by the same rule, the ambient model is better than EDM, clear of the noise, at sigma_tn {better}."
            if better
            else "Both stopped by the same rule, ambient models and EDM are not told apart.",
            "",
        ]
    if best := differences(summary, at="best"):
        lines += _comparison("The same where each run is best, so that EDM is EDM stopped early", best)
    if equal := differences(summary, at="passing"):
        lines += _comparison(
            f"The same where copying passes {100 * TARGET:g} %, so that both copy alike; a run that never does is not here",
            equal,
        )
    if figure is not None:
        lines += [
            "Denoised images, columns: noise levels; rows, from the top: EDM on much data, EDM and the ambient model on"
            " the training set above (Fig. 3 of Shah et al. 2025):",
            "",
            f"![Denoised images over noise levels, {name}]({figure})",
            "",
        ]
    return lines


def _audited(cells: list[dict[str, Any]]) -> bool:
    """Whether runs that went on to their end were audited on the way: then there are curves over training."""
    return any(len(c.get("audits") or ()) > 1 for c in cells if c["kind"] not in STOPPED)


def _comparison(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of `differences`."""
    return [
        f"{title} (below 0 is better), with 95 % intervals, each by itself (of twenty where nothing differs, one is clear):",
        "",
        "| sigma_tn | against | seeds | copies less the control, in points | FD | |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['sigma_tn']:g}{', stopped' * (r['ours'] in STOPPED)} | {KINDS[r['against']]} | {r['seeds']} |"
            f" {_signed(r['excess'], 100, '+.1f')} | {_signed(r['fd'], 1, '+.3g')} | {r['found']} |"
            for r in rows
        ),
        "",
    ]


def merge(file: Path, summary: dict[str, Any], *, device: str, date: str) -> None:
    """Put a sweep's cells among the rows of `file`: {"settings", "rows"}, a row a run with its device and date.

    A cell that is there already is replaced, further seeds, levels and baselines are added. Rows of other settings (data,
    length, number of samples ...) are another experiment: they are dropped, and it is said.
    """
    settings = dict(summary["settings"])
    settings["data"] = Path(settings["data"]).name  # wherever it lies
    rows = {c["name"]: c | {"device": device, "date": date} for c in summary["cells"]}
    if file.is_file():
        there = json.loads(file.read_text())
        before = there["settings"]
        if other := [k for k in settings if k not in _GROWS and before.get(k) != settings[k]]:
            what = ", ".join(f"{k} {before.get(k)}, now {settings[k]}" for k in other)
            warn(f"{file}: its rows were measured with other settings ({what}) and are replaced")
        else:
            rows = {row["name"]: row for row in there["rows"]} | rows
            for key in _GROWS:
                more = dict.fromkeys([*before[key], *settings[key]])
                settings[key] = list(more) if key == "baselines" else sorted(more)
    ordered = sorted(rows.values(), key=lambda r: (r["seed"], list(KINDS).index(r["kind"]), r["sigma_tn"]))
    write_json(file, {"settings": settings, "rows": ordered})


def row_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a sweep: content of its file of rows; the order is the names', digits by their numbers."""
    files = {p.stem.removeprefix("sweep-"): p for p in folder.glob("sweep-*.json")}

    def order(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split("-")]

    return {name: json.loads(files[name].read_text()) for name in sorted(files, key=order)}


def denoised(name: str) -> str:
    return f"denoised-{name}.png"


def document(rows: Path, page: Path | None = None) -> str:
    """The page from every file of rows in `rows`. What stands between the marks of `page`, as it was, is people's reading
    of the numbers and is kept; figures that lie beside it are shown."""
    there_already = page.read_text() if page is not None and page.is_file() else ""
    _, marked, rest = there_already.partition(READING[0])
    reading = rest.partition(READING[1])[0].strip() if marked else ""
    lines = [
        "# Results: quality against copying",
        "",
        "`make reproduce` writes this page from its rows (benchmarks/reproduce.py); every row was measured. EMA weights;"
        " copies by gap ratio d1/d2 < 1/3 in pixel space, the control searches equally many held-out images; baselines:"
        " EDM, fresh noise, weight decay, early stopping.",
        "",
        READING[0],
        *([reading] if reading else []),
        READING[1],
        "",
    ]
    there = row_files(rows)
    for name, found in there.items():
        drawn = page is not None and (page.parent / denoised(name)).is_file()
        lines += section(name, found, denoised(name) if drawn else None)
    if not there:
        lines += ["Nothing is measured yet.", ""]
    lines += [
        "What this does not show: other data, sizes and lengths; that a lower copy rate is privacy (it is not); copies"
        " that are near in meaning and not in pixels. With three seeds an interval is wide, and a difference that is not"
        " clear may still be there.",
        "",
    ]
    return "\n".join(lines)


def write_page(rows: Path, page: Path) -> None:
    """The page, and beside it the curves of each file of rows."""
    write_bytes(page, document(rows, page).encode())
    for name, found in row_files(rows).items():
        with tempfile.TemporaryDirectory() as folder:
            summary = summarize(found["rows"], target=TARGET, within=WITHIN)
            plot_pareto(Path(folder) / "pareto", summary)
            plot_training(Path(folder) / "training", summary)
            for drawn in Path(folder).glob("*.svg"):
                write_bytes(page.parent / f"{drawn.stem}-{name}.svg", drawn.read_bytes())


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    write_page(root / "benchmarks" / "results", root / "docs" / "results.md")
