"""Compile every Triton kernel in use without a GPU, read the machine code, and fail where it is worse than it must be.

    python -m fastambient_kernels.aot [--arch 90] [--report] [--compare] [--json FILE]

A module ``*_triton.py`` (and triton_common.py) lists what it launches in a function ``aot_cases() -> list[AotCase]``:
one entry for each kernel and configuration. Each is compiled for sm_80, sm_90, sm_100 and gfx942 and must pass every
gate of `aot_gates.py`. The committed aot_report.json makes a change of the machine code show in review;
``--compare`` fails where instructions or registers grew by more than 10 % under the same triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastambient_kernels.aot_gates import Row

REPORT = Path(__file__).with_name("aot_report.json")
BATCH = 12  # cases that a process of the pool takes at a time
GROWTH = 1.10  # instructions and registers may grow to this factor of the committed report


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration, as the launcher would specialise it.

    Argument names are the kernel's. An argument that is neither in `signature` nor in `constexprs` is an error.
    """

    name: str  # unique, such as "group_norm_silu.forward bf16 nhwc"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # name -> triton type of each run-time argument: "*bf16", "i32", "fp32"
    constexprs: dict[str, Any]  # name -> value (None for an absent pointer)
    attrs: dict[str, int] = field(default_factory=dict)  # name -> 16 where the pointer or integer is divisible by 16
    num_warps: int = 4
    num_stages: int = 3
    streamed: tuple[str, ...] = ()
    """Arguments whose global loads and stores must all be 128 bits wide. "*table" means the tensors behind pointers
    that are loaded from the argument `table`."""
    elements: int = 0  # useful bytes that a program moves
    # What follows has defaults that fit most kernels.
    tails: tuple[str, ...] = ()  # streamed arguments that also have a masked tail with narrow accesses
    max_instructions: int = 4000  # in the code, on NVIDIA; half as many more on gfx942
    max_registers: int = 128  # a thread; 128 lets 16 warps live on a multiprocessor
    maxnreg: int | None = None  # passed to the compiler, as the launcher does
    amd_warps: int | None = None  # num_warps on AMD, if the launcher takes another there: its warps have 64 lanes
    targets: tuple[str, ...] = ()  # where it is used: names of aot_gates.TARGETS; empty is all


def launched(
    name: str, kernel: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any], **fields: Any
) -> AotCase:
    """The case of a launch with these arguments (tensors, numbers, None), specialised as Triton does for them."""
    types = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    constexprs = dict(constants)
    warps, signature, attrs, moved = constexprs.pop("num_warps"), {}, {}, 0
    for argument, value in zip(kernel.arg_names, arguments, strict=False):
        if value is None or (type(value) is int and value == 1):
            constexprs[argument] = value
        elif isinstance(value, torch.Tensor):
            signature[argument] = f"*{types[value.dtype]}"
            attrs[argument] = 16
            moved += value.nbytes
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
            if signature[argument] == "i32" and value % 16 == 0:
                attrs[argument] = 16
    return AotCase(
        name=name, kernel=kernel, signature=signature, constexprs=constexprs, attrs=attrs, num_warps=warps,
        elements=moved // programs, **fields,
    )  # fmt: skip


def all_cases() -> list[AotCase]:
    """Cases of every module of this package that holds Triton kernels, by name.

    Raises
    ------
    ValueError : two cases have one name; a module ``*_triton`` lists none
    """
    import fastambient_kernels

    cases: dict[str, AotCase] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(fastambient_kernels.__path__)):
        if not module.endswith("_triton") and module != "triton_common":
            continue
        listed = getattr(importlib.import_module(f"fastambient_kernels.{module}"), "aot_cases", list)()  # type: ignore
        if not listed:
            raise ValueError(f"{module} lists no aot_cases()")
        for case in listed:
            if case.name in cases:
                raise ValueError(f"two cases are named {case.name!r}")
            cases[case.name] = case
    return list(cases.values())


def measure_all(cases: Sequence[AotCase], targets: Sequence[str], jobs: int) -> list[Row]:
    """Rows of `cases` on `targets`, in that order; `jobs` above 1: from a pool of that many processes."""
    from fastambient_kernels.aot_gates import measure, measure_named

    batches = []
    for target in targets:
        used = [case for case in cases if target in (case.targets or targets)]
        batches += [(used[i : i + BATCH], target) for i in range(0, len(used), BATCH)]
    if jobs == 1:
        measured = [measure(*batch) for batch in batches]
    else:
        names = [[case.name for case in batch] for batch, _ in batches]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            measured = list(pool.map(measure_named, names, [target for _, target in batches]))
    rows = {(row.case, row.target): row for batch in measured for row in batch}
    return [rows[case.name, target] for case in cases for target in targets if (case.name, target) in rows]


def table(rows: Sequence[Row]) -> str:
    """The report as text. Times are those of one program on an H100 that has nothing else to do."""
    from fastambient_kernels.aot_gates import BYTES_PER_NS, WARP_INSTRUCTIONS_PER_NS

    head = ("case", "target", "instr", "regs", "shared", "stack", "spills", "warps", "occup", "bytes", "bytes ns",
            "issue ns", "128b loads", "stores", "gates")  # fmt: skip
    lines = [head]
    for row in rows:
        issue = f"{row.instructions * row.warps / WARP_INSTRUCTIONS_PER_NS:.2f}" if row.target == "sm_90" else "-"
        lines.append((
            row.case, row.target, str(row.instructions), str(row.registers), str(row.shared), str(row.stack),
            str(row.spills), str(row.warps), f"{row.occupancy:.0%}", str(row.bytes), f"{row.bytes / BYTES_PER_NS:.2f}",
            issue, row.loads, row.stores, "FAIL" if row.failures else "ok",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])] for line in lines]
    return "\n".join(map("  ".join, aligned))


def legend(targets: Sequence[str]) -> str:
    """What the columns of `table` mean, with the limits that occupancy is computed from."""
    from fastambient_kernels.aot_gates import TARGETS, WARP_INSTRUCTIONS_PER_NS

    lines = [
        "bytes ns: useful bytes at 3.02 TB/s.",
        f"issue ns: every instruction issued once by every warp, at {WARP_INSTRUCTIONS_PER_NS:.0f} a ns (132 "
        "multiprocessors x 4 schedulers x 1.755 GHz). Where it is above bytes ns, arithmetic bounds the kernel.",
        "occup: share of a multiprocessor's warps, from these limits:",
    ]
    for name in targets:
        t = TARGETS[name]
        lines.append(
            f"  {name}: {t.warps} warps of {t.warp_size}, {t.blocks} programs, 4 x {t.registers} registers a lane in "
            f"units of {t.granule}, {t.shared >> 10} KB of shared memory, {t.reserved} B of it lost to each program"
        )
    return "\n".join(lines)


def compare(rows: Sequence[Row], committed: dict[str, Any], version: str) -> tuple[list[str], list[str]]:
    """(regressions, notes) against a committed report, for the targets in `rows`.

    Another version of triton makes other code from the same kernel: then a growth is a note.
    """
    failures, notes = [], []
    same = committed["triton"] == version
    if not same:
        notes.append(f"committed with triton {committed['triton']}, this is {version}: growth is noted, not failed")
    old = {(row["case"], row["target"]): row for row in committed["rows"]}
    for row in rows:
        before = old.pop((row.case, row.target), None)
        if before is None:
            failures.append(f"{row.target} {row.case}: not in the committed report")
            continue
        for what in ("instructions", "registers"):
            was, now = before[what], getattr(row, what)
            if now > GROWTH * was:
                (failures if same else notes).append(f"{row.target} {row.case}: {what} grew from {was} to {now}")
    here = {row.target for row in rows}
    failures += [f"{target} {case}: in the committed report, but no case" for case, target in old if target in here]
    return failures, notes


def write_report(path: Path, rows: Sequence[Row], version: str) -> None:
    """One line a row, so that a review shows what changed."""
    listed = ",\n".join(json.dumps(row.json()) for row in rows)
    path.write_text(f'{{"triton": "{version}", "rows": [\n{listed}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 where a gate failed, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m fastambient_kernels.aot", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", nargs="+", metavar="A", default=[], help="80, 90, 100, gfx942; default all")
    parser.add_argument("--report", action="store_true", help="print the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--compare", action="store_true", help=f"fail on growth over {REPORT.name} of more than 10 %%")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)")
    asked = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("aot: TRITON_INTERPRET=1 replaces the compiler; unset it", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError:
        print("aot: the package triton is not installed", file=sys.stderr)
        return 2
    from fastambient_kernels.aot_gates import TARGETS

    targets = [a if a in TARGETS else f"sm_{a}" for a in asked.arch] or list(TARGETS)
    if unknown := [a for a in targets if a not in TARGETS]:
        parser.error(f"--arch knows {', '.join(TARGETS)}, not {', '.join(unknown)}")
    try:
        cases = all_cases()
    except ValueError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    rows = measure_all(cases, targets, asked.jobs)
    if asked.report:
        print(table(rows), legend(targets), sep="\n\n", end="\n\n")
    failures = [f"{row.target} {row.case}: {failure}" for row in rows for failure in row.failures]
    if asked.compare:
        grown, notes = compare(rows, json.loads(REPORT.read_text(encoding="utf-8")), triton.__version__)
        failures += grown
        for note in notes:
            print(f"note: {note}")
    for failure in failures:
        print(f"FAIL {failure}")
    if asked.json:
        write_report(asked.json, rows, triton.__version__)
    print(f"aot: triton {triton.__version__}, {len(rows)} rows on {len(targets)} targets, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
