"""Sum of squares and number of non-finite values of a gradient, in one pass over it.

Two stages, so that the sum depends on the number of elements alone and not on the order in which programs end: each
program adds the squares of its blocks in float64 (contract: Precision of norms in engine/norms.py), lane by lane, then
one program adds the programs' sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distadam.errors import UsageError
from distadam.kernels.triton_launch import GRADIENT_DTYPES, Launch, define, describe
from distadam.kernels.triton_storage import bits_of, widen

BLOCK = 2048
MAX_PROGRAMS = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def partial_norms(values, partials, numel, BLOCK: tl.constexpr):
    """Write each program's sum of squares and number of NaN and Inf."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    squares = tl.zeros([BLOCK], tl.float64)
    nonfinite = tl.zeros([BLOCK], tl.int32)
    for block in range(program, tl.cdiv(numel, BLOCK), programs):
        inside = tl.arange(0, BLOCK)
        offset = tl.cast(block, tl.int64) * BLOCK + inside
        value = widen(tl.load(values + offset, mask=offset < numel, other=0.0))
        nonfinite += ((bits_of(value) & 0x7F800000) == 0x7F800000).to(tl.int32)
        wide = value.to(tl.float64)
        squares += wide * wide
    tl.store(partials + program, tl.sum(squares))
    tl.store(partials + programs + program, tl.sum(nonfinite).to(tl.float64))


@triton.jit
def total_norm(partials, total, nonfinite, num_programs, PROGRAMS: tl.constexpr):
    """Add the programs' sums."""
    program = tl.arange(0, PROGRAMS)
    squares = tl.load(partials + program, mask=program < num_programs, other=0.0)
    tl.store(total, tl.sum(squares))
    if nonfinite is not None:
        counts = tl.load(partials + num_programs + program, mask=program < num_programs, other=0.0)
        tl.store(nonfinite, tl.sum(counts).to(tl.float32))


def launches(values: Tensor, partials: Tensor, total: Tensor, nonfinite: Tensor | None) -> list[Launch]:
    """Return the two launches."""
    programs = num_programs(values.numel())
    first = {"values": values, "partials": partials, "numel": values.numel(), "BLOCK": BLOCK}
    second = {"partials": partials, "total": total, "nonfinite": nonfinite, "num_programs": programs}
    return [
        Launch(partial_norms, programs, first, OPTIONS),
        Launch(total_norm, 1, {**second, "PROGRAMS": MAX_PROGRAMS}, OPTIONS),
    ]


def num_programs(numel: int) -> int:
    """Return how many programs share a gradient."""
    return max(1, min(MAX_PROGRAMS, -(-numel // BLOCK)))


def _check(values: Tensor, partials: Tensor, total: Tensor, nonfinite: Tensor | None) -> None:
    """Check what the kernels take for granted; on the meta device this is all that runs."""
    if values.dim() != 1 or not values.is_contiguous() or values.dtype not in GRADIENT_DTYPES:
        raise UsageError(f"triton norm: expected a 1-D contiguous gradient but got {describe(values)}")
    if partials.dtype != torch.float64 or partials.numel() < 2 * num_programs(values.numel()):
        raise UsageError(
            f"triton norm: expected {2 * num_programs(values.numel())} float64 partial sums but got "
            f"{describe(partials)}"
        )
    if total.dtype != torch.float64 or total.numel() != 1:
        raise UsageError(f"triton norm: expected a float64 total but got {describe(total)}")
    if nonfinite is not None and (nonfinite.dtype != torch.float32 or nonfinite.numel() != 1):
        raise UsageError(f"triton norm: expected a float32 count but got {describe(nonfinite)}")


sum_of_squares = define(
    "sum_of_squares(Tensor values, Tensor(a!) partials, Tensor(b!) total, Tensor(c!)? nonfinite) -> ()",
    _check,
    launches,
)
"""Write the float64 sum of squares of a 1-D gradient to total, and its number of NaN and Inf to nonfinite."""
