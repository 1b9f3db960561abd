"""Read the machine code of compiled kernels: instructions, registers, stack, spills, global loads and stores.

NVIDIA: by nvdisasm and cuobjdump of triton's wheel. nvdisasm takes a third of a second to start, so it is given the
code of many kernels at once, and what it says is kept in triton's cache. AMD: the assembly that the compiler returns.
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_AMD_INSTRUCTION = re.compile(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_(?!nop)\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """Counts as in `aot_gates.Row`; loads and stores of global memory are mnemonics."""

    instructions: int
    registers: int
    stack: int
    spills: int
    loads: list[str]
    stores: list[str]


def is_wide(mnemonic: str) -> bool:
    """Whether a load or store moves 128 bits or more for each thread."""
    return bool(re.search(r"\.(128|256)\b|_dwordx4\b", mnemonic))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} does not occur in the compiler's output: another version of triton?")
    return int(found[1])


def _tool(name: str, data: bytes, *options: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


def _text(cubin: bytes) -> bytes:
    """The code sections of a 64-bit ELF file."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: offset of its name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = sections[names][4]
    code = [s[4:] for s in sections if cubin.startswith(b".text.", start + s[0])]
    return b"".join(cubin[offset : offset + length] for offset, length in code)


def _disassemble(cubins: Sequence[bytes], arch: int) -> list[list[str]]:
    """Mnemonics of each kernel, without the endless jump and the NOPs that fill its last cache line."""
    caches = [triton.runtime.cache.get_cache_manager(hashlib.sha256(b"sass" + cubin).hexdigest()) for cubin in cubins]
    missing = {i: _text(cubin) for i, cubin in enumerate(cubins) if caches[i].get_file("mnemonics") is None}
    if missing:
        lines = _tool("nvdisasm", b"".join(missing.values()), "-b", f"SM{arch}", "-ndf").splitlines()
        found = [(int(m[1], 16), m[2]) for m in map(_INSTRUCTION.match, lines) if m]
        begin = 0
        for i, text in missing.items():
            code = [mnemonic for at, mnemonic in found if begin <= at < begin + len(text)]
            begin += len(text)
            while code and code[-1] == "NOP":
                code.pop()
            if not code or code.pop() != "BRA":
                raise ValueError("a kernel does not end with a jump to itself: another version of triton?")
            caches[i].put("\n".join(code), "mnemonics", binary=False)
    return [Path(cache.get_file("mnemonics")).read_text().splitlines() for cache in caches]


def read_nvidia(kernels: Sequence[Any], arch: int) -> list[Code]:
    """Of triton's CompiledKernels for one architecture."""
    cubins = [kernel.asm["cubin"] for kernel in kernels]
    read = []
    for cubin, code in zip(cubins, _disassemble(cubins, arch), strict=True):
        usage = _tool("cuobjdump", cubin, "-res-usage")
        read.append(
            Code(
                instructions=len(code),
                registers=_number(r"\bREG:(\d+)", usage),
                stack=_number(r"\bSTACK:(\d+)", usage),
                spills=sum(op.startswith(("LDL", "STL")) for op in code),
                loads=[op for op in code if re.match(r"(LDG|LDGSTS|LD)\.", op)],
                stores=[op for op in code if re.match(r"(STG|REDG|ATOMG|ST)\.", op)],
            )
        )
    return read


def read_amd(kernel: Any) -> Code:
    """Of one of triton's CompiledKernels."""
    text = kernel.asm["amdgcn"]
    code = _AMD_INSTRUCTION.findall(text.split("\n.Lfunc_end", 1)[0])
    return Code(
        instructions=len(code),
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        stack=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text),
        loads=[op for op in code if re.match(r"(global|buffer|flat)_load", op)],
        stores=[op for op in code if re.match(r"(global|buffer|flat)_(store|atomic)", op)],
    )
