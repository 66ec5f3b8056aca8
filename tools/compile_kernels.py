"""Compile every Triton kernel for compute capability 8.0, 9.0 and 10.0, without a GPU, and write docs/kernels.md.

    python tools/compile_kernels.py [--out docs/kernels.md] [--representative]

The launches are those of `distadam.kernels.triton_update`, with meta tensors for arguments: what is compiled here is
what a GPU would run. Figures come from the compiler's own output: registers, spills and shared memory from
`cuobjdump -res-usage`, instructions and the width of each global access from the disassembly.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
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

from distadam.kernels.triton_kernels import BLOCK
from distadam.kernels.triton_launch import Launch
from distadam.kernels.triton_math import OPTIONS as math_options
from distadam.kernels.triton_norm import launches as norm_kernel_launches
from distadam.kernels.triton_update import EXTRA_DTYPES, MOMENT_DTYPES, RULES, update_launches

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
    """Yield the instructions up to EXIT; the slow paths of division and square root come after it."""
    for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*);", code):
        yield match[2]
        if match[2].strip() == "EXIT" and match[1] is None:
            return


def _widths(lines: list[str], operation: str) -> Counter[int]:
    """Count global accesses by bits."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    widths: Counter[int] = Counter()
    for line in lines:
        name = line.split()[0].split(".")
        if name[0] == operation:
            widths[next((sizes[part] for part in name[1:] if part in sizes), 32)] += 1
    return widths


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One compilation of an update kernel."""

    rule: str
    flags: tuple[bool, bool, bool]
    weights: str
    moments: str
    param: torch.dtype = BF16
    grad: torch.dtype = BF16

    @property
    def states(self) -> list[str]:
        """Names of the states that the flags ask for."""
        on = dict(zip(RULES[self.rule].flags, self.flags, strict=True))
        return [name for name, flag in RULES[self.rule].states if flag is None or on[flag]]

    @property
    def name(self) -> str:
        """For people."""
        options = [flag.lower() for flag, on in zip(RULES[self.rule].flags, self.flags, strict=True) if on]
        name = "adamw" if "decoupled" in options else self.rule
        return " ".join([name, *[option for option in options if option != "decoupled"]])

    @property
    def has_keys(self) -> list[bool]:
        """Whether weights, then each state, have random bits."""
        return [self.weights == "stochastic", *[self.moments == "8bit"] * len(self.states)]

    def launch(self) -> Launch:
        """The launch, with the factors of data-parallel training with clipping."""
        extra, moment = EXTRA_DTYPES.get(self.weights), MOMENT_DTYPES[self.moments]
        keys = [_meta(torch.int32) if has else None for has in self.has_keys]
        return update_launches(
            _meta(self.grad),
            _meta(self.param),
            None if extra is None else _meta(extra),
            [_meta(moment) for _ in self.states],
            [_meta(FP32) for _ in self.states] if self.moments == "8bit" else [],
            [_meta(torch.int32), *keys] if any(self.has_keys) else [],
            _meta(torch.int32, 4, 3),
            _meta(torch.int32, 4, 2),
            _meta(torch.float64, 2, 8),
            _meta(FP32),
            _meta(FP32, 4, 8),
            _meta(FP32),
            _meta(FP32),
            None,
            None,
            None,
            self.rule,
            self.weights,
            self.moments,
            list(self.flags),
        )[1]

    @property
    def minimum(self) -> tuple[float, float]:
        """Bytes an element that must move: in tensors of all elements, and in tables of blocks of 256."""
        extra = EXTRA_DTYPES[self.weights].itemsize if self.weights in EXTRA_DTYPES else 0
        reads_param = self.weights != "fp32"
        weight = self.param.itemsize * (1 + reads_param) + 2 * extra
        states = len(self.states) * 2 * MOMENT_DTYPES[self.moments].itemsize
        scales = len(self.states) * 8 if self.moments == "8bit" else 0
        keys = 4 * sum(self.has_keys) + 4 * any(self.has_keys)
        return self.grad.itemsize + weight + states, (scales + keys) / 256

    @property
    def narrow(self) -> int:
        """Loads of single numbers that a thread may do: the chunk, the row, two factors, scales, keys and lanes."""
        blocks = len(self.states) * (self.moments == "8bit") + 2 * sum(self.has_keys)
        return 3 + 8 + 2 + blocks


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape or (1024,), dtype=dtype, device="meta")


ADAM = {"adam": (False, False, False), "adamw": (True, False, False), "adamw amsgrad": (True, True, False)}
STRUCTURES = [
    *[("adam", flags) for flags in ADAM.values()],
    ("sgd", (False, False, False)),
    ("sgd", (True, False, False)),
    ("sgd", (True, True, True)),
    ("rmsprop", (False, False, False)),
    ("rmsprop", (True, False, False)),
]


def variants() -> list[Variant]:
    """Every storage under AdamW, and every rule under the three that use every device function."""
    found = []
    for moments in MOMENT_DTYPES:
        for weights in ("fp32", "split", "stochastic", "none"):
            found.append(Variant(rule="adam", flags=ADAM["adamw"], weights=weights, moments=moments))
        own = {"weights": "own", "param": FP32, "grad": FP32}
        found.append(Variant(rule="adam", flags=ADAM["adamw"], moments=moments, **own))
    for grad in (FP32, FP16):
        param = FP16 if grad == FP16 else BF16
        flags = ADAM["adamw"]
        found.append(Variant(rule="adam", flags=flags, weights="fp32", moments="fp32", param=param, grad=grad))
    for rule, flags in STRUCTURES:
        found.append(Variant(rule=rule, flags=flags, weights="own", moments="fp32", param=FP32, grad=FP32))
        found.append(Variant(rule=rule, flags=flags, weights="split", moments="bf16"))
        found.append(Variant(rule=rule, flags=flags, weights="stochastic", moments="8bit"))
    flags = (True, True, False)
    found.append(Variant(rule="rmsprop", flags=flags, weights="own", moments="fp32", param=FP32, grad=FP32))
    return list(dict.fromkeys(found))


REPRESENTATIVE = [
    Variant(rule="adam", flags=ADAM["adamw"], weights="fp32", moments="fp32"),
    Variant(rule="adam", flags=ADAM["adamw"], weights="split", moments="fp32"),
    Variant(rule="adam", flags=ADAM["adamw"], weights="split", moments="bf16"),
    Variant(rule="adam", flags=ADAM["adamw"], weights="split", moments="8bit"),
    Variant(rule="adam", flags=ADAM["adamw"], weights="stochastic", moments="8bit"),
]
"""What the issue of bytes is about; the test compiles these, at every capability."""


def norm_launches() -> list[tuple[str, Launch]]:
    """The norm's two stages, and the kernels that compute coefficients."""
    found = []
    for dtype in (FP32, BF16, FP16):
        stages = norm_kernel_launches(_meta(dtype, 2**20), _meta(torch.float64), _meta(torch.float64), _meta(FP32))
        found.append((f"norm of {str(dtype).removeprefix('torch.')}", stages[0]))
    found.append(("norm, second stage", stages[1]))
    for rule, flags in (("adam", ADAM["adamw"]), ("sgd", (True, False, False)), ("rmsprop", (False, False, False))):
        spec = RULES[rule]
        options = dict(zip(spec.flags, flags, strict=True))
        arguments = {
            "coefficients": _meta(FP32, 4, 8),
            "rows": _meta(torch.int32, 4, 2),
            "hyper": _meta(torch.float64, 2, 8),
            "steps": _meta(FP32),
            **{flag: options[flag] for flag in spec.shared},
        }
        found.append((f"coefficients of {rule}", Launch(spec.coefficients, 1, arguments, math_options)))
    return found


def faults(variant: Variant, compiled: Compiled) -> list[str]:
    """Return what contradicts the plan."""
    per_thread = BLOCK // compiled.threads
    expected, _ = variant.minimum
    found = []
    if compiled.spilled:
        found.append(f"{compiled.spilled} bytes spilled")
    if compiled.fused:
        found.append(f"{compiled.fused} fused multiply-adds")
    moved = (compiled.wide(compiled.loads, 64) + compiled.wide(compiled.stores, 64)) / per_thread
    if moved != expected:
        found.append(f"{moved} bytes an element in wide accesses instead of {expected}")
    has_bytes = variant.moments == "8bit"
    half = 2 * len(variant.states) if has_bytes else 0
    if compiled.loads[64] + compiled.stores[64] != half:
        found.append(f"{compiled.loads[64] + compiled.stores[64]} accesses of 64 bits instead of {half}")
    narrow = sum(count for width, count in compiled.loads.items() if width < 64)
    if narrow > variant.narrow:
        found.append(f"{narrow} loads of single numbers instead of at most {variant.narrow}")
    stored = sum(count for width, count in compiled.stores.items() if width < 64)
    if stored > len(variant.states) * has_bytes:
        found.append(f"{stored} stores of single numbers")
    if compiled.registers > MAX_REGISTERS:
        found.append(f"{compiled.registers} registers instead of at most {MAX_REGISTERS}")
    return found


MAX_REGISTERS = 96
"""5 blocks of 128 threads of the 16 that a multiprocessor has room for: 40 KiB of loads in flight at 8 bytes or more an
element, where about 32 KiB cover the latency of memory (H100: 3.35 TB/s / 132 x 600 ns = 15 KiB; twice that for slack).
"""


def row(variant: Variant, compiled: Compiled) -> list[str]:
    """Return a line of the table."""
    per_thread = BLOCK // compiled.threads
    tensors, tables = variant.minimum
    moved = (compiled.wide(compiled.loads, 64) + compiled.wide(compiled.stores, 64)) / per_thread
    names = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
    return [
        variant.name,
        names[variant.grad],
        names[variant.param],
        variant.weights,
        variant.moments,
        f"{compiled.capability / 10:.1f}",
        str(compiled.registers),
        str(compiled.spilled),
        str(compiled.shared),
        _accesses(compiled.loads),
        _accesses(compiled.stores),
        f"{compiled.instructions / per_thread:.0f}",
        f"{moved + tables:.2f}",
        f"{tensors + tables:.2f}",
        f"{compiled.occupancy:.0%}",
    ]


def _accesses(widths: Counter[int]) -> str:
    return " + ".join(f"{widths[width]} x {width}" for width in sorted(widths, reverse=True)) or "-"


HEADER = (
    "rule | gradient | parameter | weights | moments | cc | registers | spilled | shared | loads | stores | "
    "instr/elem | bytes/elem | minimum | occupancy"
)

TEXT = """# Triton kernels, compiled

Written by `make kernels` (Triton {version}, ptxas of its wheel). No GPU took part: these are properties of the machine
code, not measurements of time; for those run `benchmarks/gpu_step.py` on a machine with a GPU.

- **loads, stores**: global accesses of a thread, number x bits, in the machine code. A thread holds {per_thread}
  elements. Tensors move in 128-bit accesses (64 bits for 1-byte storages); 32-bit ones are single numbers: the chunk,
  the row of coefficients, factors, and per block of 256 elements scale, key and lane.
- **bytes/elem**: the wide accesses, plus tables of blocks of 256 (scales, keys and lanes of random bits).
  **minimum**: every stored number read once and written once. Chunk and row add 44 bytes per {block} elements, from
  cache.
- **instr/elem**: instructions up to EXIT by elements of a thread. The calls to the slow paths of IEEE division and
  square root, which only numbers near the ends of the range take, are counted, the slow paths themselves are not. A
  multiprocessor issues 128 a cycle: on an H100 (132 of them at 1.7 GHz, 3.35 TB/s) that is {issue:.1f} for each byte
  that memory delivers, so a kernel with more than that an element and byte is bound by instructions.
- **spilled**: bytes of local memory, plus accesses to it. **shared**: bytes (float32 stored next to 16-bit types
  changes hands between threads, so that each store writes whole sectors). **occupancy**: theoretical, {warps} warps a
  block.
- Every kernel is free of fused multiply-adds in float32 (checked): the results are the reference's.

## Updates

{updates}

## Norm and coefficients

{others}
"""


def report(capabilities: tuple[int, ...], chosen: list[Variant]) -> tuple[str, list[str]]:
    """Compile everything; return the page and what contradicts the plan."""
    lines, found = [f"| {HEADER} |", "|" + "---|" * len(HEADER.split("|"))], []
    warps = 0
    for variant in chosen:
        for capability in capabilities:
            compiled = compile_launch(variant.launch(), capability)
            warps = compiled.threads // 32
            lines.append("| " + " | ".join(row(variant, compiled)) + " |")
            label = f"{variant.name}, {variant.weights} weights, {variant.moments} moments, {capability}"
            found += [f"{label}: {fault}" for fault in faults(variant, compiled)]
    others = ["| kernel | cc | registers | spilled | shared | loads | stores | occupancy |", "|" + "---|" * 8]
    for name, launch in norm_launches():
        for capability in capabilities:
            compiled = compile_launch(launch, capability)
            cells = [name, f"{capability / 10:.1f}", compiled.registers, compiled.spilled, compiled.shared]
            cells += [_accesses(compiled.loads), _accesses(compiled.stores), f"{compiled.occupancy:.0%}"]
            others.append("| " + " | ".join(map(str, cells)) + " |")
            if compiled.spilled:
                found.append(f"{name}, {capability}: {compiled.spilled} bytes spilled")
    page = TEXT.format(
        version=triton.__version__,
        per_thread=BLOCK // (32 * warps),
        block=BLOCK,
        warps=warps,
        issue=128 * 132 * 1.7e9 / 3.35e12,
        updates="\n".join(lines),
        others="\n".join(others),
    )
    return page, found


def main() -> int:
    """Compile, write the page, and fail if something contradicts the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the page goes; without it only the check is made")
    parser.add_argument("--representative", action="store_true", help="the five storages that the test compiles")
    arguments = parser.parse_args()
    page, found = report(CAPABILITIES, REPRESENTATIVE if arguments.representative else variants())
    if arguments.out is not None:
        arguments.out.write_text(page)
    sys.stdout.write("".join(f"{fault}\n" for fault in found) or "every kernel is as planned\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
