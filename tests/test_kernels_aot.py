"""Ahead-of-time gates: every kernel passes them, and a planted fault for each shows that it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastambient_kernels import aot, aot_gates  # noqa: E402
from fastambient_kernels.aot import AotCase  # noqa: E402
from fastambient_kernels.aot_code import Code, _tool  # noqa: E402
from fastambient_kernels.aot_flow import Access, accesses  # noqa: E402

TARGETS = tuple(aot_gates.TARGETS)


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i + SHIFT, mask=i < n), mask=i < n)


@triton.jit
def random_normal(y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.randn(0, i))


@triton.jit
def sine(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.sin(tl.load(x + i)))


@triton.jit
def normalise(x, y, BLOCK: tl.constexpr):
    """Every value is needed again after the sum, so all stay in registers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(y + i, v / tl.sum(v))


@triton.jit
def through_table(table, x, y, n, BLOCK: tl.constexpr):
    p = tl.multiple_of(tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32)), 16)
    i = tl.arange(0, BLOCK)
    if n == BLOCK:
        tl.store(y + i, tl.load(p + i) + tl.load(x + i))
    else:
        tl.store(y + i, tl.load(p + i, mask=i < n) + tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def running(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(x + i)
        x += BLOCK
    tl.store(y + i, total)


def case(kernel, *, divisible=16, streamed=("x", "y"), BLOCK=2048, **fields) -> AotCase:
    names = [name for name in kernel.arg_names if name.islower()]
    signature = {"n": "i32", "table": "*i64"}
    constexprs = {name: {"BLOCK": BLOCK, "SHIFT": 0}[name] for name in kernel.arg_names if name.isupper()}
    return AotCase(
        name=kernel.__name__,
        kernel=kernel,
        signature={name: signature.get(name, "*fp32") for name in names},
        constexprs=constexprs | fields.pop("constexprs", {}),
        attrs=dict.fromkeys(names, divisible) if divisible else {},
        streamed=tuple(name for name in streamed if name.lstrip("*") in names),
        **fields,
    )


def measure(case: AotCase, target: str) -> aot_gates.Row:
    return aot_gates.measure([case], target)[0]


def failures(planted: AotCase, target: str = "sm_90") -> str:
    return "\n".join(measure(planted, target).failures)


def test_every_kernel_in_use_passes_every_gate_and_the_committed_report():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastambient_kernels.aot", "--report", "--compare"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in TARGETS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_kernel_passes(target):
    row = measure(case(scale, elements=8 * 2048), target)
    assert row.failures == ()
    assert row.stack == row.spills == 0 and 0 < row.registers <= 64 and 0 < row.instructions < 200
    wide, every = map(int, row.loads.split("/"))
    assert wide == every > 0 and row.stores == row.loads


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", [random_normal, sine])
def test_planted_stack(kernel, target):
    """The range reduction of a general sine keeps its digits on the stack."""
    assert "bytes of stack" in failures(case(kernel), target)


def test_planted_spill():
    planted = case(normalise, BLOCK=16384, max_registers=255)
    assert failures(planted) == ""
    assert "spills" in failures(dataclasses.replace(planted, maxnreg=64))


def test_planted_spill_on_amd():
    """1024 threads leave 128 registers each; 256 values must stay."""
    planted = case(normalise, BLOCK=16 * 64 * 256, num_warps=16, max_instructions=20000)
    found = failures(planted, "gfx942")
    assert "spills" in found and "bytes of stack" in found


@pytest.mark.parametrize("target", TARGETS)
def test_planted_narrow_access(target):
    """An unknown alignment, a mask that is not known to end at a multiple of 4, and an odd offset."""
    unaligned = failures(case(scale, divisible=None), target)
    assert "x: loads narrower than 128 bits" in unaligned and "y: stores narrower than 128 bits" in unaligned
    ragged = dataclasses.replace(case(scale), attrs={"x": 16, "y": 16})
    assert "x: loads narrower" in failures(ragged, target)
    shifted = failures(case(scale, constexprs={"SHIFT": 1}), target)
    assert "x: loads narrower" in shifted and "y:" not in shifted


def test_narrow_tails_must_be_declared():
    aligned = dict.fromkeys(("table", "x", "y"), 16)  # n is the length of a tail: any number
    planted = dataclasses.replace(case(through_table, streamed=("*table", "x", "y")), attrs=aligned)
    found = failures(planted)
    assert "*table: loads narrower" in found and "x: loads narrower" in found and "y: stores narrower" in found
    assert failures(dataclasses.replace(planted, tails=planted.streamed)) == ""
    # A declared tail excuses only what also has a wide path.
    unaligned = dataclasses.replace(planted, tails=planted.streamed, attrs={"table": 16})
    assert "x: loads narrower" in failures(unaligned) and "*table" not in failures(unaligned)


def test_a_streamed_name_must_be_accessed():
    assert "n: streamed, but no global access" in failures(case(scale, streamed=("n",)))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_code_of_many_kernels_is_told_apart(target, monkeypatch, tmp_path):
    """One raw listing of several kernels holds what nvdisasm says of each file by itself."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cases = [case(scale), case(running), case(through_table)]
    for row, one in zip(aot_gates.measure(cases, target), cases, strict=True):
        listing = _tool("nvdisasm", aot_gates.compile_case(one, target).asm["cubin"], "-c", "-ndf")
        code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
        assert row.instructions == len(code) - code.count("NOP") - 1  # and the jump to itself
        assert int(row.loads.split("/")[1]) == sum(op.startswith("LDG") for op in code)


def test_wide_accesses_must_also_stand_in_the_machine_code():
    """A later pass of the compiler could split what is wide in LLVM IR."""
    code = Code(10, 10, 0, 0, loads=["LDG.E.64"], stores=["STG.E.128"])
    found = [Access(frozenset(["x"]), "load", 128), Access(frozenset(["y"]), "store", 128)]
    assert aot_gates._narrow(case(scale), found, code) == ["x: loads of 128 bits in LLVM IR, none in the machine code"]


@pytest.mark.parametrize("target", TARGETS)
def test_planted_budgets(target):
    assert "registers, at most 4 allowed" in failures(case(scale, max_registers=4), target)
    allowed = 15 if target == "gfx942" else 10
    assert f"instructions, at most {allowed} allowed" in failures(case(scale, max_instructions=10), target)


def test_eight_normals_are_on_a_budget():
    """The one absolute figure; a library sine in its place breaks it."""
    cases = [c for c in aot.all_cases() if c.name.startswith("eight normals")]
    assert cases
    for normals in cases:
        assert normals.max_instructions <= 400
        assert normals.constexprs["ROWS"] * normals.constexprs["VECTOR"] == 8 * 32 * normals.num_warps
        assert measure(normals, "sm_90").instructions <= 400
    assert measure(case(random_normal, BLOCK=8 * 128), "sm_90").instructions > 400


def test_amd_may_take_other_warps():
    """Four warps of 64 lanes have two values each for a block of 512: half of what a wide store needs."""
    planted = case(scale, BLOCK=512)
    assert "y: stores narrower" in failures(planted, "gfx942")
    halved = dataclasses.replace(planted, amd_warps=2)
    assert failures(halved, "gfx942") == ""
    assert measure(halved, "gfx942").warps == 2 and measure(halved, "sm_90").warps == 4


def test_an_argument_without_a_type_is_an_error():
    with pytest.raises(ValueError, match="without a type: \\['n'\\]"):
        measure(dataclasses.replace(case(scale), signature={"x": "*fp32", "y": "*fp32"}), "sm_90")
    with pytest.raises(ValueError, match="not in the kernel: \\['z'\\]"):
        measure(dataclasses.replace(case(scale), attrs={"z": 16}), "sm_90")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_accesses_are_told_apart_by_argument(target):
    compiled = aot_gates.compile_case(case(through_table), target)
    found = accesses(compiled.asm["llir"], ["table", "x", "y", "n"])
    wide = {(*access.roots, access.kind) for access in found if access.bits >= 128}
    assert wide == {("*table", "load"), ("x", "load"), ("y", "store")}
    assert Access(frozenset(["table"]), "load", 64) in found
    assert all(len(access.roots) == 1 for access in found)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_pointer_that_moves_in_a_loop_keeps_its_argument(target):
    planted = case(running)
    assert failures(planted, target) == ""
    compiled = aot_gates.compile_case(planted, target)
    assert {a.roots for a in accesses(compiled.asm["llir"], ["x", "y", "n"])} == {frozenset(["x"]), frozenset(["y"])}


def test_a_pointer_that_changes_its_argument_in_a_loop_has_both():
    """The phi stands above the value that it takes from the loop's end."""
    llir = """
define ptx_kernel void @swap(ptr addrspace(1) %0, ptr addrspace(1) %1, i32 %2) local_unnamed_addr !dbg !4 {
  br label %3, !dbg !5
3:
  %4 = phi ptr addrspace(1) [ %0, %entry ], [ %6, %3 ]
  %5 = load <4 x float>, ptr addrspace(1) %4, align 16, !dbg !5
  %6 = getelementptr float, ptr addrspace(1) %1, i32 %2
  br label %3
}
"""
    assert accesses(llir, ["x", "y", "n"]) == [Access(frozenset(["x", "y"]), "load", 128)]


@pytest.mark.parametrize(
    "target, registers, shared, warps, expected",
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 64, 0, 4, 0.5),
        ("sm_90", 81, 0, 4, 20 / 64),  # allocated as 88: 5 warps a scheduler
        ("sm_90", 255, 0, 8, 0.125),
        ("sm_90", 32, 48 << 10, 4, 16 / 64),  # 49 KB each: 4 programs
        ("sm_80", 32, 48 << 10, 4, 12 / 64),
        ("sm_90", 32, 0, 1, 0.5),  # 32 programs of one warp
        ("sm_90", 32, 228 << 10, 4, 0.0),
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 16, 0, 1, 1.0),
        ("gfx942", 16, 32 << 10, 4, 0.25),
    ],
)
def test_occupancy(target, registers, shared, warps, expected):
    limits = aot_gates.TARGETS[target]
    assert aot_gates.occupancy(limits, registers=registers, shared=shared, warps=warps) == pytest.approx(expected)


def row(**fields) -> aot_gates.Row:
    values = {
        "case": "scale", "target": "sm_90", "instructions": 100, "registers": 40, "shared": 0, "stack": 0, "spills": 0,
        "warps": 4, "occupancy": 1.0, "bytes": 4096, "loads": "1/1", "stores": "1/1",
    }  # fmt: skip
    return aot_gates.Row(**(values | fields))


def test_growth_over_the_committed_report(tmp_path):
    aot.write_report(tmp_path / "report.json", [row(), row(target="sm_80")], "3.8.0")
    committed = json.loads((tmp_path / "report.json").read_text())
    assert committed["rows"][0] == row().json()
    assert aot.compare([row(instructions=110, registers=44)], committed, "3.8.0") == ([], [])
    assert aot.compare([row(instructions=111)], committed, "3.8.0")[0] == [
        "sm_90 scale: instructions grew from 100 to 111"
    ]
    assert aot.compare([row(registers=45)], committed, "3.8.0")[0] == ["sm_90 scale: registers grew from 40 to 45"]


def test_another_triton_compares_with_a_note():
    committed = {"triton": "3.7.0", "rows": [row().json()]}
    grown, notes = aot.compare([row(instructions=200)], committed, "3.8.0")
    assert grown == [] and len(notes) == 2 and "3.7.0" in notes[0] and "from 100 to 200" in notes[1]


def test_the_committed_report_holds_exactly_the_cases():
    committed = {"triton": "3.8.0", "rows": [row().json(), row(case="gone").json(), row(target="sm_80").json()]}
    grown, _ = aot.compare([row(), row(case="new")], committed, "3.8.0")
    assert grown == ["sm_90 new: not in the committed report", "sm_90 gone: in the committed report, but no case"]


def test_command_line(tmp_path, monkeypatch, capsys):
    """Exit 1 on growth; a table and a file for the asked target alone."""
    written = tmp_path / "now.json"
    assert aot.main(["--arch", "90", "--report", "--json", str(written), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "sm_90: 64 warps of 32" in printed and "sm_80" not in printed and triton.__version__ in printed
    report = json.loads(written.read_text())
    assert {entry["target"] for entry in report["rows"]} == {"sm_90"}
    for entry in report["rows"]:
        entry["instructions"] //= 2
    written.write_text(json.dumps(report))
    monkeypatch.setattr(aot, "REPORT", written)
    assert aot.main(["--arch", "90", "--compare", "--jobs", "1"]) == 1
    assert "instructions grew from" in capsys.readouterr().out


def test_kernels_that_list_no_cases_are_not_passed_over(monkeypatch, capsys):
    from fastambient_kernels import triton_common

    listed = triton_common.aot_cases()
    monkeypatch.setattr(triton_common, "aot_cases", lambda: [*listed, listed[0]])
    with pytest.raises(ValueError, match="two cases are named"):
        aot.all_cases()
    monkeypatch.delattr(triton_common, "aot_cases")
    assert aot.main([]) == 2
    assert "triton_common lists no aot_cases()" in capsys.readouterr().err


def test_command_line_refuses_the_interpreter_and_unknown_targets(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--arch", "75"])
    assert "not sm_75" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "unset it" in capsys.readouterr().err
