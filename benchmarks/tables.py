"""The tables of docs/performance.md, from the rows under benchmarks/results: no number on that page is typed.

    python benchmarks/tables.py [--results DIR] [--page FILE]

A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` and takes up every row file in the folder and
in its subfolders. A row's target is the one of `TARGETS` that fits its device, work, size and competitor.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
Row = Mapping[str, Any]  # a row of a file, with the file's device and date


@dataclass(frozen=True)
class Target:
    """What was aimed at: `value` of the column `field`, or more. Patterns are of the whole text; "" fits any."""

    device: str  # stands in the device's name
    work: str
    field: str  # ratio, floor_fraction, mfu, share, working or headroom
    value: float
    competitor: str = ""
    size: str = ""

    def fits(self, row: Row) -> bool:
        patterns = ((self.work, "work"), (self.competitor, "competitor"), (self.size, "size"))
        told = all(not p or re.fullmatch(p, str(row.get(name, ""))) for p, name in patterns)
        return told and re.search(self.device, row["device"]) is not None and row.get(self.field) is not None


_CPU = r"cores, \d+ threads"
_STREAMING = r"noise\+loss|group_norm_silu-.*|residual-.*|adam_ema"
TARGETS = (
    Target("H100", "train ffhq64-ncsnpp .*", "ratio", 5.0, "reference", "batch 64"),
    Target("H100", "train ffhq64-ncsnpp .*", "ratio", 1.25, "strong", "batch 64"),
    Target("H100", "train cifar10-ddpmpp .*", "ratio", 1.5, "strong", "batch 64"),
    Target("H100", "train cifar10-ddpmpp .*", "mfu", 0.45, "", "batch 64"),
    Target("H100", "profile train ffhq64-ncsnpp .*", "share", 0.70, "", "batch 64"),
    Target("H100", _STREAMING, "floor_fraction", 0.85),
    Target("H100", _STREAMING, "ratio", 1.0, "compile"),
    Target(_CPU, "train digits fp32", "ratio", 1.8, "reference", "batch 64"),
    Target(_CPU, "train cifar10-ddpmpp bf16", "ratio", 2.1, "reference"),
    Target(_CPU, "train cifar10-ddpmpp bf16", "floor_fraction", 1 / 1.2),
    Target(_CPU, "train ffhq64-ncsnpp bf16", "ratio", 1.9, "reference"),
    Target(_CPU, "train ffhq64-ncsnpp bf16", "floor_fraction", 1 / 1.3),
    Target(_CPU, "train cifar10-ddpmpp fp32", "ratio", 1.12, "reference"),
    Target(_CPU, "train cifar10-ddpmpp fp32", "floor_fraction", 1 / 1.12),
    Target(_CPU, "sample digits 18 64", "ratio", 2.0, "reference"),
    Target(_CPU, "sample cifar10-ddpmpp 18 1( bf16)?", "ratio", 2.0, "reference"),
    Target(_CPU, r"noise\+loss", "ratio", 6.0, "eager", "64x3x64x64"),
    Target(_CPU, "group_norm_silu-fp32", "ratio", 3.0, "eager", "64x256x32x32"),
    Target(_CPU, "group_norm_silu-bf16", "ratio", 5.0, "eager", "64x256x32x32"),
    Target(_CPU, "adam_ema", "ratio", 3.0, "eager", "62.8M/547"),
    Target(_CPU, "adam_ema", "ratio", 1.4, "fused-torch", "62.8M/547"),
    Target(_CPU, "adam_ema", "floor_fraction", 1.2, "", "62.8M/547"),
    Target(_CPU, "load 64 dali", "ratio", 10.0, "reference-loader"),
    Target(_CPU, "gather 64", "floor_fraction", 0.60, "", "batch 512, .*"),
    Target(_CPU, "wait cifar10-ddpmpp .*", "working", 0.99),
    Target(_CPU, "nearest 10000 50000|audit 300", "headroom", 1.0),
)


def read_rows(folder: Path) -> list[Row]:
    """Rows of every JSON file in `folder` and below that have a work; one more, `convolutions`, for each profile."""
    rows: list[Row] = []
    for file in sorted(folder.rglob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        told = {name: document.get(name, "") for name in ("device", "date")}
        if "convolution_share" in document:
            work, share = f"profile {document['work']}", document["convolution_share"]
            rows.append(told | {"work": work, "size": document["size"], "operator": "all convolutions", "share": share,
                                "ms": share * max(document["step_ms"], document["busy_ms"])})  # fmt: skip
        rows += [told | row for row in document.get("rows", []) if "work" in row]
    return rows


def aimed_at(row: Row, fields: Sequence[str]) -> str:
    """The row's targets in words, such as ``1.8x missed``; a dash without one."""
    said = []
    for target in (t for t in TARGETS if t.field in fields and t.fits(row)):
        value = f"{target.value:g}x" if target.field == "ratio" else f"{_NAMES[target.field]} {target.value:.0%}"
        value = "60 s" if target.field == "headroom" else value  # audit_time.py's: how many times it fits
        said.append(f"{value} {'reached' if row[target.field] >= target.value else 'missed'}")
    return ", ".join(said) or "-"


_NAMES = {"floor_fraction": "floor", "mfu": "MFU", "share": "share", "working": "working", "headroom": "60 s"}
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "work": lambda r: r["work"],
    "size": lambda r: r.get("size", ""),
    "against": lambda r: r.get("competitor", "-"),
    "ratio": lambda r: f"{r['ratio']:.2f}x" if "ratio" in r else "-",
    "target": lambda r: aimed_at(r, ("ratio", "floor_fraction", "mfu", "share", "working", "headroom")),
    "ours, ms": lambda r: f"{r['ms']:.4g}",
    "theirs, ms": lambda r: f"{r['ms_competitor']:.4g}" if "ms_competitor" in r else "-",
    "spread": lambda r: f"{r['spread']:.0%}",
    "floor / ours": lambda r: f"{r['floor_fraction']:.0%}",
    "MFU": lambda r: "-" if r.get("mfu") is None else f"{r['mfu']:.0%}",
    "memory / planned, GiB": lambda r: _memory(r.get("memory")),
    "agreement": lambda r: f"{r['agreement']:.1e}",
    "operator": lambda r: f"`{r['operator']}`",
    "share": lambda r: f"{r['share']:.1%}",
    "ms": lambda r: f"{r['ms']:.4g}",
    "ours from reference": lambda r: f"{r['deviation']:.1e}",
    "two seeds": lambda r: f"{r['band']:.1e}",
    "over the band": lambda r: f"{r['deviation_over_band']:.2g}",
    "inside": lambda r: "yes" if r["inside"] else "no",
    "images/s": lambda r: _rate(r, "images_per_second"),
    "theirs, images/s": lambda r: _rate(r, "reference_images_per_second"),
    "CPU us/image": lambda r: _rate(r, "cpu_us"),
    "theirs, CPU us/image": lambda r: _rate(r, "reference_cpu_us"),
    "waiting": lambda r: f"{r['share']:.2%}",
    "agree to 1e-3": lambda r: f"{r['steps_within_1e-3']} steps",
}
_TIMES = ("against", "ratio", "target", "ours, ms", "theirs, ms", "spread", "floor / ours")
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {  # name: pattern of the work, columns
    "step": ("train .*", ("work", "size", *_TIMES, "MFU", "memory / planned, GiB", "agreement")),
    "parts": ("part .*", ("work", "size", "against", "ratio", "ours, ms", "theirs, ms", "spread", "agreement")),
    "profile": ("profile .*", ("work", "size", "operator", "share", "target", "ms")),
    "sampling": ("sample .*", ("work", "size", *_TIMES, "MFU", "agreement")),
    "loading": (
        "(load|gather) .*",
        ("work", "size", *_TIMES, "images/s", "theirs, images/s", "CPU us/image", "theirs, CPU us/image"),
    ),
    "waiting": ("wait .*", ("work", "size", "waiting", "target", "ms")),
    "audits": (
        "(nearest|audit) .*",
        ("work", "size", "against", "ratio", "target", "ours, ms", "theirs, ms", "spread"),
    ),
    "kernels": (f"{_STREAMING}|resample-.*|conv2d-fp32", ("work", "size", *_TIMES, "agreement")),
    "loss": (
        "loss .*",
        ("work", "size", "ours from reference", "two seeds", "over the band", "inside", "agree to 1e-3"),
    ),
}


def _memory(memory: Mapping[str, float] | None) -> str:
    return "-" if memory is None else " / ".join(f"{memory[k] / 2**30:.2f}" for k in ("measured", "predicted"))


def _rate(row: Row, name: str) -> str:
    rates = row.get("rates")
    return "-" if rates is None else f"{rates[name]:,.0f}" if rates[name] >= 100 else f"{rates[name]:.3g}"


def table(name: str, rows: Iterable[Row]) -> str:
    """The Markdown of one of `TABLES`, a table for each device and date; a line where nothing is measured yet."""
    pattern, columns = TABLES[name]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if re.fullmatch(pattern, row["work"]):
            groups.setdefault((row["device"], row["date"]), []).append(row)
    parts = []
    for (device, date), found in groups.items():
        lines = [f"{device}, {date}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_COLUMNS[column](row) for column in columns)} |" for row in found]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Nothing is measured yet."


def render(text: str, rows: Sequence[Row]) -> str:
    """`text` with every table between markers written anew.

    Raises
    ------
    ValueError : markers that name no table, or one that does not end
    """
    wanted = re.findall(r"<!-- (\S+): begin -->", text)
    for name in wanted:
        if name not in TABLES:
            raise ValueError(f"{name}: not one of {', '.join(TABLES)}")
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{name}: {end} is missing")
        text = f"{before}{begin}\n{table(name, rows)}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default benchmarks/results)")
    parser.add_argument("--page", type=Path, default=PAGE, help="default docs/performance.md")
    arguments = parser.parse_args()
    text = arguments.page.read_text(encoding="utf-8")
    try:
        arguments.page.write_text(render(text, read_rows(arguments.results)), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"{arguments.page}: {error}")


if __name__ == "__main__":
    main()
