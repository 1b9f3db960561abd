"""docs/results.md and its curves from the rows of sweeps: what reproduce.py measured, here or elsewhere, in one page.

    python benchmarks/reproduce_page.py      writes it anew from benchmarks/results, as `make tables` does

A sweep's rows are a file sweep-NAME.json of `merge`; the page is made of these files alone, so that a part that was
not measured is not in it, and one that was measured on another day or machine is.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from fastambient.console import duration, warn
from fastambient.files import write_bytes, write_json
from fastambient.sweep import BASELINES, TARGET
from fastambient.sweep.audited import log_odds, passing
from fastambient.sweep.plot import plot_pareto, plot_training
from fastambient.sweep.results import KINDS, STOPPED, WITHIN, over_seeds, summarize, table

READING = ("<!-- reading: begin -->", "<!-- reading: end -->")
SHARES = (0.02, 0.05, 0.1, 0.2)  # of copies, at which distances are compared
_GROWS = ("seeds", "sigma_tn", "baselines")  # settings of the sweep, not of its cells: more of them may come later
_OF_A_ROW = ("training.precision=", "data.split_seed=")  # assignments that may differ from seed to seed


def differences(summary: dict[str, Any], *, at: str | None = None, against_edm: bool = False) -> list[dict[str, Any]]:
    """Each ambient model against each baseline, seed by seed: mean differences with Student's 95 % intervals.

    at : "best", of each run's best audit instead of its end, or "passing", where its copying passes the target: copying is
        at most the target there, or equal, and distance alone counts
    against_edm : the baselines against EDM instead
    clear : better in copies or in FD, the interval without 0, and in the other not worse by what the rule that chooses a
        sigma_tn would mind: TARGET, or WITHIN of the other's FD
    """
    ended = summary["cells"]
    cells = [c | c[at] for c in ended if c.get(at)] if at else ended
    left_out = STOPPED if at else ("ambient-stop",)
    baselines = [k for k in KINDS if k in BASELINES and k not in left_out]
    if against_edm:
        pairs = [(level, kind, "edm") for kind in baselines for level in _levels(cells, kind)]
    else:
        pairs = [(level, "ambient", kind) for level in _levels(cells, "ambient") for kind in ("edm", *baselines)]
        if not at:  # like against like, both where the rule ended them
            pairs += [(level, "ambient-stop", "early-stop") for level in _levels(cells, "ambient-stop")]
    rows = []
    for sigma_tn, own, kind in pairs:
        level = sigma_tn if kind == "fresh-noise" else 0.0
        ours, theirs = _by_seed(cells, own, sigma_tn), _by_seed(cells, kind, level)
        both = sorted(ours.keys() & theirs.keys())
        if not both:
            continue
        row: dict[str, Any] = {"sigma_tn": sigma_tn, "ours": own, "against": kind, "seeds": len(both), "at": at}
        for key in ("excess", "fd"):
            known = _known([(ours[s], theirs[s]) for s in both]) if at == "passing" and key == "fd" else None
            row[key] = over_seeds([ours[s][key] - theirs[s][key] for s in both], known)
        minds = {"excess": TARGET, "fd": WITHIN * over_seeds([theirs[s]["fd"] for s in both])["mean"]}
        row["found"] = _found(row, minds, deciding=("fd",) if at else ("excess", "fd"))
        if at == "passing" and len(both) < len(_by_seed(ended, own, sigma_tn).keys() & _by_seed(ended, kind, level)):
            row["found"] = "not all come to it: no claim"  # those that are missing are the runs that copied least
        row["clear"] = row["found"] == "better"
        rows.append(row)
    return rows


def _found(row: dict[str, Any], minds: dict[str, float], *, deciding: tuple[str, ...]) -> str:
    """In words, what a row's intervals say."""
    sides = {key: row[key]["interval"] for key in deciding}
    if row["seeds"] < 2:  # no interval: nothing can be claimed
        return "one seed: no claim"
    better = [key for key, (_, high) in sides.items() if high < 0]
    worse = [key for key, (low, _) in sides.items() if low > 0]
    unsettled = [key for key, (low, high) in sides.items() if low <= 0 and high > minds[key]]
    words = {"excess": "copies", "fd": "FD"}
    if better and worse:
        return "a trade"
    if better and unsettled:
        return f"better in {words[better[0]]}, {words[unsettled[0]]} open"
    return "better" if better else "worse" if worse else "no clear difference"


def _known(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    """Of each difference of two distances, the standard deviation that the audits' counts alone give it."""
    return [math.hypot(a["fd_sd"], b["fd_sd"]) for a, b in pairs]


def _by_seed(cells: list[dict[str, Any]], kind: str, sigma_tn: float) -> dict[int, dict[str, Any]]:
    return {c["seed"]: c for c in cells if c["kind"] == kind and c["sigma_tn"] == sigma_tn}


def _levels(cells: list[dict[str, Any]], kind: str) -> list[float]:
    return sorted({c["sigma_tn"] for c in cells if c["kind"] == kind})


def _signed(found: dict[str, Any], scale: float, form: str) -> str:
    """With its interval, but where seeds agree in all that is shown: that is no certainty."""
    mean, *ends = (format(scale * x, form) for x in (found["mean"], *(found["interval"] or ())))
    return mean if set(ends) <= {mean} else f"{mean} ({ends[0]} to {ends[1]})"


def _times(found: dict[str, Any]) -> str:
    """Machines, precisions and days that the rows are of."""
    days: dict[str, list[str]] = {}
    for row in found["rows"]:
        where = row["device"] + (f", {p}" if (p := row.get("precision")) else "")
        seen = days.setdefault(where, [])
        if row["date"] not in seen:
            seen.append(row["date"])
    return "; ".join(f"on {where}, measured {' and '.join(sorted(dates))}" for where, dates in days.items())


_SPLITS = (
    " Each seed has training and held-out images of its own, so that the intervals hold for sets drawn as these were."
)


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
    own = {
        "weight-decay": f"weight decay {s['weight_decay']:g} (AdamW)",
        "early-stop": f"early stop at {100 * s['stop_rate']:g} %",
    }
    lines = [
        f"## {name}",
        "",
        f"{s['train']:,} training and {s['holdout']:,} held-out images of {s['resolution']}x{s['resolution']}"
        f" ({Path(s['data']).name}), {s['kimg']:g} kimg a run, {s['num']:,} samples, seeds {s['seeds']}"
        f"{''.join('; ' + text for kind, text in own.items() if kind in {c['kind'] for c in cells})}"
        f"{'; ' + ', '.join(overrides) if overrides else ''}. {len(cells)} runs, {duration(spent)} of training in all,"
        f" {_times(found)}.{_SPLITS if len({c.get('split_seed', 0) for c in cells}) > 1 else ''}",
        "",
        table(summary).rstrip(),
        "",
        f"![Frechet distance against copies, {name}](pareto-{name}.svg)",
        "",
        *(
            [
                "Over training, and, below, distance over copies along it (means of seeds at equal kimg; dotted:"
                f" {100 * TARGET:g} % copies):",
                "",
                f"![Copies and Frechet distance over images seen, and over each other, {name}](training-{name}.svg)",
                "",
            ]
            if _audited(cells)
            else []
        ),
        *_comparison("Ambient less the baseline, seed by seed", rows),
    ]
    if plain := differences(summary, against_edm=True):
        lines += _comparison("The baselines themselves less EDM, seed by seed", plain, named="ours")
    clear = {
        k: [r["sigma_tn"] for r in rows if r["against"] == k and r["clear"] and r["ours"] == "ambient"]
        for k in ("edm", "early-stop")
    }
    both = [f"{x:g}" for x in clear["edm"] if x in clear["early-stop"]]
    if all(r["seeds"] < 2 for r in rows):
        lines += ["One seed: nothing is claimed.", ""]
    elif both:
        levels = ", ".join(both)
        lines += [
            f"Better than EDM and than early stopping, clear of the noise between seeds, at sigma_tn {levels}.",
            "",
        ]
    elif any(r["against"] == "early-stop" for r in rows):
        what = "At no sigma_tn is the gain over EDM and over early stopping clear of the noise between seeds here."
        lines += [what, ""]
    if stopped := [r for r in rows if r["ours"] == "ambient-stop" and r["seeds"] > 1]:
        better = ", ".join(f"{r['sigma_tn']:g}" for r in stopped if r["clear"])
        half = ", ".join(f"{r['sigma_tn']:g} ({r['found']})" for r in stopped if r["found"].startswith("better in"))
        lines += [
            f"Both stopped by the same rule, the ambient model is better than EDM, clear of the noise, at sigma_tn {better}."
            if better
            else f"Both stopped by the same rule, the ambient model gains in part, at sigma_tn {half}."
            if half
            else "Both stopped by the same rule, ambient models and EDM are not told apart.",
            "",
        ]
    if best := differences(summary, at="best"):
        lines += _comparison("The same where each run is best, so that EDM is EDM stopped early", best)
    if equal := differences(summary, at="passing"):
        lines += _comparison(
            f"The same where copying passes {100 * TARGET:g} %, so that both copy alike",
            equal,
        )
        lines += _at_shares(cells)
    if figure is not None:
        lines += [
            "Denoised images, columns: noise levels; rows, from the top: EDM on much data, EDM and the ambient model on"
            " the training set above (Fig. 3 of Shah et al. 2025):",
            "",
            f"![Denoised images over noise levels, {name}]({figure})",
            "",
        ]
    return lines


def _at_shares(cells: list[dict[str, Any]]) -> list[str]:
    """What differs from EDM at other shares of copies, and by how much it hangs on the way between two audits: a table of
    the configurations whose runs all pass a share, as EDM's do, in two seeds or more."""
    scales = (log_odds, lambda rates, samples: rates)
    kinds = dict.fromkeys((c["kind"], c["sigma_tn"]) for c in cells if c["kind"] in ("ambient", "fresh-noise"))
    rows = []
    for kind, level in kinds:
        ours, theirs = _by_seed(cells, kind, level), _by_seed(cells, "edm", 0.0)
        both = sorted(ours.keys() & theirs.keys())
        for share in SHARES:
            told = []
            for scale in scales:
                pairs = [[passing(side[s]["audits"], share, scale=scale) for side in (ours, theirs)] for s in both]
                there = [(a, b) for a, b in pairs if a and b]
                if len(pairs) > 1 and len(there) == len(pairs):
                    told.append(_signed(over_seeds([a["fd"] - b["fd"] for a, b in there], _known(there)), 1, "+.3g"))
            if told:
                rows.append(f"| {KINDS[kind]} | {level:g} | {len(both)} | {100 * share:g} % | {' | '.join(told)} |")
    if not rows:
        return []
    return [
        "FD less EDM's where copying passes other shares, by the log-odds of the rates between two audits as above, and by"
        " the rates themselves:",
        "",
        "| model | sigma_tn | seeds | copies | by log-odds | by rates |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _audited(cells: list[dict[str, Any]]) -> bool:
    """Whether runs that went on to their end were audited on the way: then there are curves over training."""
    return any(len(c.get("audits") or ()) > 1 for c in cells if c["kind"] not in STOPPED)


def _comparison(title: str, rows: list[dict[str, Any]], *, named: str = "against") -> list[str]:
    """A Markdown table of `differences`; its second column is what each row differs in. Copies are left out where they are
    equal by construction."""
    alike = all(r["at"] == "passing" for r in rows)
    heads = ["sigma_tn", "against" if named == "against" else "baseline", "seeds"]
    heads += [*([] if alike else ["copies less the control, in points"]), "FD", ""]
    lines = [
        f"{title} (below 0 is better), with 95 % intervals, each by itself (of twenty where nothing differs, one is clear):",
        "",
        f"| {' | '.join(heads)} |".replace("|  |", "| |"),
        "|---" * len(heads) + "|",
    ]
    for r in rows:
        copies = [] if alike else [_signed(r["excess"], 100, "+.1f")]
        level = f"{r['sigma_tn']:g}{', stopped' * (r['ours'] == 'ambient-stop')}"
        told = [level, KINDS[r[named]], str(r["seeds"]), *copies, _signed(r["fd"], 1, "+.3g"), r["found"]]
        lines.append(f"| {' | '.join(told)} |")
    return [*lines, ""]


def merge(file: Path, summary: dict[str, Any], *, device: str, date: str) -> None:
    """Put a sweep's cells among the rows of `file`: {"settings", "rows"}, a row a run with its device and date.

    A cell that is there already is replaced, further seeds, levels and baselines are added. Rows of other settings (data,
    length, number of samples ...) are another experiment: they are dropped, and it is said. Two settings are each row's:
    its precision, which is the machine's choice, as its kernels are, and the seed of its split.
    """
    settings = dict(summary["settings"])
    settings["data"] = Path(settings["data"]).name  # wherever it lies
    splits = [int(x.partition("=")[2]) for x in settings["assignments"] if x.startswith("data.split_seed=")]
    own = {"device": device, "date": date} | ({"split_seed": splits[-1]} if splits else {})
    settings["assignments"] = [x for x in settings["assignments"] if not x.startswith(_OF_A_ROW)]
    rows = {c["name"]: c | own for c in summary["cells"]}
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
        " EDM, fresh noise, weight decay, early stopping. A seed is one of training and noise: where a part does not say"
        " otherwise, all of its runs have the same training images, so that intervals over seeds say nothing of other"
        ' ones. "Better" in a comparison: the'
        " interval of copies or of FD lies below 0, and the other one below a loss that the rule which chooses a sigma_tn"
        f" would mind, {100 * TARGET:g} points of copies or {100 * WITHIN:g} % of FD; where distances alone are compared,"
        " theirs lies below 0.",
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
