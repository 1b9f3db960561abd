"""Which kernel argument does each global load and store belong to, and how wide is it? Read from compiled LLVM IR.

Machine code no longer says through which argument an address came, Triton's LLVM IR (in SSA form, after optimisation)
does: a pointer's roots are the pointer arguments that its operands come from. A value loaded through argument `t` has
the root ``*t``, so tensors behind a table of pointers can be told from the table itself. PTX instructions stand in the
IR as inline assembly, and ptxas and LLVM's AMD backend keep their widths; `aot_gates.py` also counts wide accesses in
the machine code.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Access(NamedTuple):
    roots: frozenset[str]  # arguments that the address comes from
    kind: str  # "load" or "store" (an atomic is a store)
    bits: int  # moved by one thread in one instruction


_VALUE = re.compile(r"%[\w.$-]+")
_GLOBAL = re.compile(r"ptr addrspace\([18]\)[^,%]*(%[\w.$-]+)")  # 1 is global memory, 8 an AMD buffer resource over it
_PTX = re.compile(r"(?<![a-zA-Z.])(ld|st|atom|red)((?:\.[\w:]+)*\.global(?:\.[\w:]+)*)")
_PTX_ASYNC = re.compile(r"(?<![a-zA-Z.])cp\.async\.\w+\.shared\S*\.global\S* [^,]*, [^,]*, (0x[0-9a-f]+|\d+)")
_LOAD = re.compile(r"\bload (?:volatile |atomic )*(<[^>]*>|\w+), ptr addrspace\(1\)[^,%]*(%[\w.$-]+)")
_STORE = re.compile(r"\bstore (?:volatile |atomic )*(<[^>]*>|\w+) .*, ptr addrspace\(1\)[^,%]*(%[\w.$-]+)")
_BUFFER = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(\w+)(?:\.\w+)*?\.((?:v\d+)?(?:bf|f|i)\d+)\(")
_ATOMIC = re.compile(r"\b(?:atomicrmw|cmpxchg) .*ptr addrspace\(1\)[^,%]*(%[\w.$-]+)")


def _bits(type_: str) -> int:
    """Width of an LLVM type: ``<4 x i32>``, ``v4f32``, ``bfloat``, ``ptr``."""
    if vector := re.fullmatch(r"<(\d+) x (.+)>", type_):
        return int(vector[1]) * _bits(vector[2])
    if named := {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}.get(type_):
        return named
    number = re.fullmatch(r"(?:v(\d+))?(?:bf|f|i)(\d+)", type_)
    return int(number[1] or 1) * int(number[2]) if number else 0


def _ptx_bits(modifiers: str) -> int:
    count = re.search(r"\.v(\d)", modifiers)
    width = re.search(r"\.[bufs](\d+)(?:x\d)?\b", modifiers)
    return int(count[1] if count else 1) * int(width[1] if width else 0)


def _accesses(body: str) -> list[tuple[str, int, str]]:
    """(kind, bits, pointer) of the global accesses in one instruction."""
    pointers = _GLOBAL.findall(body)
    if not pointers:
        return []
    if " asm " in body:
        found = [("load" if op == "ld" else "store", _ptx_bits(rest)) for op, rest in _PTX.findall(body)]
        found += [("load", 8 * int(size, 0)) for size in _PTX_ASYNC.findall(body)]
        return [(kind, bits, pointers[min(i, len(pointers) - 1)]) for i, (kind, bits) in enumerate(found)]
    if buffer := _BUFFER.search(body):
        return [("load" if buffer[1] == "load" else "store", _bits(buffer[2]), pointers[0])]
    if load := _LOAD.search(body):
        return [("load", _bits(load[1]), load[2])]
    if store := _STORE.search(body):
        return [("store", _bits(store[1]), store[2])]
    if atomic := _ATOMIC.search(body):
        return [("store", 0, atomic[1])]
    return []


def accesses(llir: str, arguments: list[str]) -> list[Access]:
    """Global accesses of the kernel in `llir`; `arguments` are its run-time arguments in order.

    Raises
    ------
    ValueError : the text holds no kernel
    """
    start = re.search(r"^define .*?_kernel .*?@[^(]*\(([^\n]*)", llir, re.MULTILINE)
    if start is None:
        raise ValueError("no kernel in this LLVM IR")
    lines = llir[start.end() : llir.index("\n}", start.end())].splitlines()
    roots: dict[str, frozenset[str]] = {}
    # Scratch pointers that the compiler appends have no name; integer arguments are no roots.
    parameters = re.findall(r"(ptr addrspace\(1\)|\b\w+)(?: [^,%]*?)? (%[\w.$-]+)", start[1])
    for name, (type_, value) in zip(arguments, parameters, strict=False):
        if type_.startswith("ptr"):
            roots[value] = frozenset([name])
    parsed = []
    for line in lines:
        result, equals, body = line.split(", !dbg", 1)[0].strip().partition(" = ")
        if not equals:
            result, body = "", result
        parsed.append((result, body, _VALUE.findall(body), _accesses(body)))
    changed = True
    while changed:  # a second round only where a phi refers to what stands below it
        changed = False
        for result, _, operands, found in parsed:
            if not result:
                continue
            if loads := [pointer for kind, _, pointer in found if kind == "load"]:
                new = frozenset("*" + root for pointer in loads for root in roots.get(pointer, ()) if root[:2] != "**")
            else:
                new = frozenset().union(*(roots.get(operand, frozenset()) for operand in operands))
            if not new <= roots.get(result, frozenset()):
                roots[result] = roots.get(result, frozenset()) | new
                changed = True
    return [
        Access(roots.get(pointer, frozenset()), kind, bits)
        for _, _, _, found in parsed
        for kind, bits, pointer in found
    ]
