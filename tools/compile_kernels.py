"""Compile every Triton kernel for compute capability 8.0, 9.0 and 10.0, without a GPU, and write docs/kernels.md.

    python tools/compile_kernels.py [--out docs/kernels.md] [--check]

The launches are those of `distadam.kernels.triton_ops`, with meta tensors for arguments: what is compiled here is what
a GPU would run. Figures come from the compiler's own output: registers, spills and shared memory from
`cuobjdump -res-usage`, instructions and the width of each global access from the disassembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distadam.kernels.triton_launch import Launch

CAPABILITIES = (80, 90, 100)
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
DIVISIBLE = [["tt.divisibility", 16]]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Machine:
    """What limits the threads of one multiprocessor (CUDA C++ Programming Guide, table "Technical Specifications")."""

    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared: int = 0
    register_granularity: int = 256


MACHINES = {80: Machine(shared=164 * 1024), 90: Machine(shared=228 * 1024), 100: Machine(shared=228 * 1024)}
RESERVED_SHARED = 1024
"""Bytes that CUDA keeps for itself in each block from compute capability 8.0 on."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel costs."""

    capability: int
    registers: int
    spilled: int
    shared: int
    threads: int
    instructions: int
    calls: int
    loads: Counter[int]
    stores: Counter[int]
    fused: int

    def wide(self, accesses: Counter[int], bits: int) -> int:
        """Bytes that a thread moves in accesses of at least this width."""
        return sum(count * width // 8 for width, count in accesses.items() if width >= bits)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that can be resident at once."""
        machine, warps = MACHINES[self.capability], self.threads // 32
        per_warp = -(-self.registers * 32 // machine.register_granularity) * machine.register_granularity
        by_registers = machine.registers // per_warp // warps
        by_shared = machine.shared // (self.shared + RESERVED_SHARED)
        blocks = min(by_registers, by_shared, machine.blocks, machine.threads // self.threads)
        return blocks * self.threads / machine.threads


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Return what Triton's runtime would infer from the arguments: types, constants, divisibility."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: dict[tuple[int, ...], Any] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name] = TYPES[value.dtype]
        else:
            types[parameter.name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible[(parameter.num,)] = DIVISIBLE
    return types, constants, divisible


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile one launch and read its cost from the machine code."""
    source = ASTSource(launch.kernel, *signature(launch))
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("cuobjdump", "-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = list(_instructions(code))
    spills = sum(line.startswith(("LDL", "STL")) for line in lines)
    return Compiled(
        capability=capability,
        registers=numbers["REG"],
        spilled=numbers["LOCAL"] + spills,
        shared=result.metadata.shared,
        threads=32 * result.metadata.num_warps,
        instructions=len(lines),
        calls=sum(line.startswith("CALL") for line in lines),
        loads=_widths(lines, "LDG"),
        stores=_widths(lines, "STG"),
        fused=len(re.findall(r"\bfma\.rn\.f32\b", result.asm["ptx"])),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> Iterator[str]:
    """Yield the instructions on the straight path: up to EXIT, without the slow paths of division and square root."""
    for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", code):
        yield match[1]


def _widths(lines: list[str], operation: str) -> Counter[int]:
    """Count global accesses by bits."""
    widths: Counter[int] = Counter()
    for line in lines:
        name = line.split()[0].split(".")
        if name[0] == operation:
            sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
            widths[next((sizes[part] for part in name[1:] if part in sizes), 32)] += 1
    return widths
