"""Compile one case for one target, measure the machine code, and name the gates that it fails.

Gates: no stack, no spill, 128-bit global loads and stores on every streamed tensor, register and instruction budgets.
The rest is arithmetic on what the compiler returned: nothing is run, so a time here is a bound, no measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastambient_kernels.aot import AotCase, all_cases
from fastambient_kernels.aot_code import Code, is_wide, read_amd, read_nvidia
from fastambient_kernels.aot_flow import Access, accesses

WIDE = 128  # bits
BYTES_PER_NS = 3020  # 3.02 TB/s: what an H100 copies
WARP_INSTRUCTIONS_PER_NS = 132 * 4 * 1.755  # H100: multiprocessors * schedulers * GHz


@dataclass(frozen=True)
class Target:
    """A GPU and what bounds the warps (AMD: waves) that live on one of its multiprocessors at a time."""

    backend: str
    arch: int | str
    warp_size: int
    warps: int
    blocks: int  # AMD: of more than one wave
    shared: int  # bytes
    registers: int  # 32-bit, for each of four schedulers and each lane
    granule: int  # registers of a thread are allocated in multiples of this
    reserved: int = 0  # bytes of shared memory that the driver takes for each block
    instructions: float = 1.0  # budgets are NVIDIA's; gfx942 also counts scalar ones and rounds to bfloat16 in software


TARGETS = {
    "sm_80": Target("cuda", 80, 32, warps=64, blocks=32, shared=164 << 10, registers=512, granule=8, reserved=1024),
    "sm_90": Target("cuda", 90, 32, warps=64, blocks=32, shared=228 << 10, registers=512, granule=8, reserved=1024),
    "sm_100": Target("cuda", 100, 32, warps=64, blocks=32, shared=228 << 10, registers=512, granule=8, reserved=1024),
    "gfx942": Target(
        "hip", "gfx942", 64, warps=32, blocks=16, shared=64 << 10, registers=512, granule=8, instructions=1.5
    ),
}


@dataclass(frozen=True)
class Row:
    """What a case compiled to on a target."""

    case: str
    target: str
    instructions: int  # in the code, not executed: a loop's body counts once
    registers: int  # a thread
    shared: int  # bytes a program
    stack: int  # bytes a thread
    spills: int  # NVIDIA: instructions on local memory; AMD: spilled vector registers
    warps: int  # a program
    occupancy: float  # share of the multiprocessor's warps that registers, shared memory and blocks allow
    bytes: int  # useful, a program
    loads: str  # 128-bit ones of all global loads in the machine code, as "2/3"
    stores: str
    failures: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """The committed form: no failures, since they stop a commit."""
        return {key: value for key, value in asdict(self).items() if key != "failures"}


def occupancy(target: Target, *, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that can live at once, for programs of `warps` warps."""
    allocated = -(-max(registers, 1) // target.granule) * target.granule
    by_registers = target.registers // allocated * 4
    by_shared = target.shared // max(shared + target.reserved, 1)
    blocks = min(min(target.warps, by_registers) // warps, by_shared)
    if warps > 1 or target.backend == "cuda":  # a single AMD wave needs no barrier
        blocks = min(blocks, target.blocks)
    return blocks * warps / target.warps


def warps_on(case: AotCase, target: Target) -> int:
    return case.amd_warps if case.amd_warps and target.backend == "hip" else case.num_warps


def compile_case(case: AotCase, name: str) -> Any:
    """Triton's CompiledKernel of a case for the target `name`."""
    target = TARGETS[name]
    arguments = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs) | set(case.attrs)) - set(arguments)
    untyped = [a for a in arguments if a not in case.signature and a not in case.constexprs]
    if unknown or untyped:
        raise ValueError(f"{case.name}: arguments not in the kernel: {sorted(unknown)}, without a type: {untyped}")
    signature = {a: "constexpr" if a in case.constexprs else case.signature[a] for a in arguments}
    attrs = {(arguments.index(a),): [["tt.divisibility", by]] for a, by in case.attrs.items()}
    options = {"num_warps": warps_on(case, target), "num_stages": case.num_stages}
    if case.maxnreg and target.backend == "cuda":
        options["maxnreg"] = case.maxnreg
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def _narrow(case: AotCase, found: list[Access], code: Code) -> list[str]:
    """The gate of the 128-bit accesses: a line for each streamed tensor that fails it."""
    failures = []
    for name in case.streamed:
        mine = [access for access in found if name in access.roots]
        if not mine:
            failures.append(f"{name}: streamed, but no global access goes through it")
        for kind, ops in (("load", code.loads), ("store", code.stores)):
            widths = Counter(access.bits for access in mine if access.kind == kind)
            narrow = {bits: n for bits, n in sorted(widths.items()) if bits < WIDE}
            if narrow and (name not in case.tails or len(narrow) == len(widths)):
                listed = ", ".join(f"{n} of {bits} bits" for bits, n in narrow.items())
                failures.append(f"{name}: {kind}s narrower than {WIDE} bits: {listed}")
            elif widths and not any(map(is_wide, ops)):
                failures.append(f"{name}: {kind}s of {WIDE} bits in LLVM IR, none in the machine code")
    return failures


def measure(cases: Sequence[AotCase], name: str) -> list[Row]:
    """Compile, measure and judge cases on the target `name`, a key of TARGETS. Many at once are cheaper."""
    target = TARGETS[name]
    kernels = [compile_case(case, name) for case in cases]
    if target.backend == "cuda":
        codes = read_nvidia(kernels, int(target.arch))
    else:
        codes = [read_amd(kernel) for kernel in kernels]
    return [_judge(case, name, kernel, code) for case, kernel, code in zip(cases, kernels, codes, strict=True)]


def measure_named(names: Sequence[str], target: str) -> list[Row]:
    """`measure` for a process of a pool: kernels cannot be pickled, their names can."""
    cases = {case.name: case for case in all_cases()}
    return measure([cases[name] for name in names], target)


def _judge(case: AotCase, name: str, compiled: Any, code: Code) -> Row:
    target = TARGETS[name]
    arguments = [a for a in case.kernel.arg_names if a not in case.constexprs]
    failures = _narrow(case, accesses(compiled.asm["llir"], arguments), code)
    shared = compiled.metadata.shared
    warps = warps_on(case, target)
    share = occupancy(target, registers=code.registers, shared=shared, warps=warps)
    for what, value, most in (
        ("bytes of stack", code.stack, 0),
        ("spills", code.spills, 0),
        ("registers", code.registers, case.max_registers),
        ("instructions", code.instructions, int(case.max_instructions * target.instructions)),
    ):
        if value > most:
            failures.append(f"{value} {what}, at most {most} allowed")
    if not share:
        failures.append(
            f"no program fits on a multiprocessor: {code.registers} registers, {shared} bytes of shared memory"
        )
    return Row(
        case=case.name, target=name, instructions=code.instructions, registers=code.registers, shared=shared,
        stack=code.stack, spills=code.spills, warps=warps, occupancy=round(share, 4), bytes=case.elements,
        loads=f"{sum(map(is_wide, code.loads))}/{len(code.loads)}",
        stores=f"{sum(map(is_wide, code.stores))}/{len(code.stores)}",
        failures=tuple(failures),
    )  # fmt: skip
