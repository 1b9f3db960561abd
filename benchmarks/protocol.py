"""How every benchmark here measures: correctness first, competitors interleaved, medians with their spread.

A claim is a ratio inside one run. Machines are shared and noisy, so competitors take turns in every round, and the
copy rate that is the floor of a streaming operator is measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastambient.nvml import Reading, open_gpu, summary
from fastambient.system import processor

Work = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
COMPETITORS = ("reference", "strong")


def arguments(parser: argparse.ArgumentParser, *, rounds: int, competitors: bool = True) -> None:
    """Add what every benchmark takes; `rounds` is the default. Read ``--competitors`` by `competitors_of`."""
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=device, help="cpu or cuda (default: a GPU if there is one)")
    add("--rounds", type=int, default=rounds, help=f"timed rounds, at least 5, as time allows (default {rounds})")
    add("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    add("--out", type=Path, metavar="DIR", default=RESULTS, help="folder of the rows (default benchmarks/results)")
    if competitors:
        add(
            "--competitors", type=_competitors,
            help="of reference,strong (default: both on a GPU, reference on a CPU, where compiling takes minutes)",
        )  # fmt: skip


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name}: not one of cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch finds no GPU here")
    return torch.device(name)


def _competitors(text: str) -> list[str]:
    names = text.split(",")
    if wrong := sorted(set(names) - set(COMPETITORS)):
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(COMPETITORS)}")
    return names


def competitors_of(arguments: argparse.Namespace) -> list[str]:
    """Names of the competitors; TF32 is switched off for all, as the reference has it."""
    if arguments.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return arguments.competitors or list(COMPETITORS[: 1 if arguments.device.type == "cpu" else 2])


@dataclass(frozen=True)
class Row:
    """One comparison; ratio = competitor's time over ours."""

    work: str
    competitor: str
    ratio: float
    ms: float  # ours, median
    ms_competitor: float
    spread: float  # (p80 - p20) / p50 of our times
    floor_fraction: (
        float | None
    )  # the floor of this run over our time; for an operator, its useful bytes at the copy rate
    agreement: float  # largest relative difference of the compared results
    size: str = ""
    gpu: dict[str, Any] | None = (
        None  # while ours was timed, as `fastambient.nvml.summary`; joules: of one call of ours
    )
    mfu: float | None = None  # ours: FLOP a second over that of the network's products alone in this run
    memory: dict[str, float] | None = None  # bytes of ours alone: predicted, measured
    rates: dict[str, float] | None = None  # of loaders: images a second, microseconds of CPU time an image; both sides'


class Times(dict[str, list[float]]):
    """Seconds of each work in each round, and what NVML said of the GPU right after each."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__({name: [] for name in names})
        self.readings: dict[str, list[Reading]] = {name: [] for name in self}

    def gpu(self, name: str) -> dict[str, Any] | None:
        """None without a GPU that can be read. Energy needs a second of work: the counter ticks some 10 times in it."""
        readings = self.readings[name]
        if not readings:
            return None
        joules = [r.joules for r in readings if r.joules is not None]
        whole = len(joules) == len(readings) and sum(self[name]) >= 1
        return summary(readings) | ({"joules": sum(joules) / len(joules)} if whole else {})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(works: dict[str, Work], *, rounds: int, device: torch.device, seconds: float = 60) -> Times:
    """Seconds of each work in each round, after one warm-up each; at least five rounds, then as time allows."""
    times, gpu = Times(works), open_gpu(device)
    for work in works.values():
        work()
    began = time.perf_counter()
    for k in range(max(5, rounds)):
        if k >= 5 and time.perf_counter() - began > seconds:
            break
        for name, work in works.items():
            synchronize(device)
            if gpu is not None:
                gpu.read()  # energy counts from here
            start = time.perf_counter()
            work()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
            if gpu is not None:
                times.readings[name].append(gpu.read())
    return times


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def copy_rate(device: torch.device, *, megabytes: int = 256, rounds: int = 9) -> float:
    """Bytes a second, read and written, of a plain tensor copy."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=rounds, device=device)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def rows_of(
    work: str,
    ours: str,
    times: Times,
    *,
    floor: float | None,
    agreement: dict[str, float],
    size: str,
) -> list[Row]:
    """One row for each competitor of `ours`; `floor` in seconds, None where none is measured. The ratio is the median of the rounds', against drift."""
    mine = times[ours]
    ms = statistics.median(mine) * 1e3
    spread = (percentile(mine, 0.8) - percentile(mine, 0.2)) / statistics.median(mine)
    rows = []
    for name, theirs in times.items():
        if name != ours:
            ratio = statistics.median(t / m for t, m in zip(theirs, mine, strict=True))
            their_ms = statistics.median(theirs) * 1e3
            rows.append(
                Row(
                    work,
                    name,
                    ratio,
                    ms,
                    their_ms,
                    spread,
                    None if floor is None else floor * 1e3 / ms,
                    agreement.get(name, 0.0),
                    size,
                    times.gpu(ours),
                )
            )
    return rows


def environment(device: torch.device) -> dict[str, object]:
    """What a result row must be read with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {_vector_units()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "fastambient"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, object] = {"device": name, "versions": versions, "date": str(date.today())}
    gpu = open_gpu(device)
    return found if gpu is None else found | {"gpu": gpu.describe()}


def _vector_units() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _plain(row: Row) -> dict[str, Any]:
    found = asdict(row)
    return {k: v for k, v in found.items() if k not in _OPTIONAL or v is not None}


_OPTIONAL = ("gpu", "mfu", "memory", "rates")


def write_json(file: Path, device: torch.device, rows: Sequence[Mapping[str, Any]], **more: Any) -> str:
    """Write rows with the `environment` they were measured in, and return the text."""
    text = json.dumps(environment(device) | more | {"rows": list(rows)}, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return text


def write(
    rows: list[Row], arguments: argparse.Namespace, *, results: str, more: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Print the table; write the rows, and `more` of another form, to ``DIR/results-device.json`` and, if asked for, to
    a file of the user's."""
    device = arguments.device
    text = write_json(arguments.out / f"{results}-{device.type}.json", device, [*map(_plain, rows), *more])
    if arguments.json is not None:
        arguments.json.write_text(text)
    found = json.loads(text)
    print(f"{found['device']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}")
    print(
        f"{'work':<36}{'size':<24}{'against':<24}{'ratio':>7}{'ms':>10}{'theirs':>10}{'spread':>8}{'of floor':>10}{'agreement':>11}"
    )
    for r in rows:
        print(
            f"{r.work:<36}{r.size:<24}{r.competitor:<24}{r.ratio:>6.2f}x{r.ms:>10.2f}{r.ms_competitor:>10.2f}"
            f"{r.spread:>8.0%}{'-' if r.floor_fraction is None else format(r.floor_fraction, '.2f'):>10}{r.agreement:>11.1e}"
        )
