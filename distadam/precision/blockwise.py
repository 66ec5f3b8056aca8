"""8-bit numbers in blocks of 256 that share a scale.

[Note: 8-bit moments]
    A block is 256 elements of one parameter, padding counting as 0. First every magnitude is rounded to 4 significant
    bits; in units of 2^20 of the 32 bits of a float, bits(), with ">>" arithmetic:

        y = (min(bits(x) & 0x7fffffff, 0x7fc00000) + d) >> 20

    d is 16 times the element's 16 random bits ([Note: random bits], the stream of the state's name) in an update, and
    0x80000 (to nearest) where a full state is loaded. Then, with a the largest y of the block, its scale is

        0                                              if a = 0
        NaN                                            if a > 2032: NaN, Inf, or more than 2^127
        float(s << 20),  s = max((a + 7) & ~7, 256)    otherwise: the smallest power of two, of 2^-95 and more, that
                                                       is at least every rounded magnitude

    and codes count y down from the scale in 255 or 127 steps, 8 an octave; with s = bits(scale) >> 20 as stored:

        unsigned (squares)   base = max(s - 255, 0)    code = max(y - base, 0)
                             x    = float((code + base) << 20)
        signed (the others)  base = max(s - 127, 0)    code = max(y - base, 0) | (0x80 if x has its sign bit set)
                             x    = the sign bit | ((code & 0x7f) + base) << 20, or that bit alone if code & 0x7f = 0

    Every element of a block whose scale is NaN reads as NaN and its codes mean nothing: what was not finite shows.
    What was loaded is stored again unchanged, scale included, whatever d is: a level has nothing below bit 20.

    Signed codes span 16 octaves below the scale and have a zero: what is smaller becomes 0, which is no update.
    Unsigned codes span 32 and have no zero in a block that is not all zero: a second moment that is rounded to 0 beside
    a first moment that is not would make an update of m / eps.

    Rounding is stochastic because averages move by less than the distance of two levels (9% on the mean): exp_avg_sq by
    1 - beta2 a step, exp_avg by 1 - beta1 of its distance from the gradient. Rounded to nearest they would stay where
    they are until some gradient is large enough to lift them, and never fall. Measured, validation loss of a GPT
    against fp32 moments (2 seeds, 400 steps): exp_avg_sq to nearest +1.5% with beta2 = 0.98 and -0.8% with 0.999, an
    effect of a wrong step size. As it is here, both stochastically: +0.00% ± 0.03 (5 seeds, 300 steps,
    benchmarks/results).

The host counts in int16, half the memory: levels, and where they are read the upper 16 bits, 16 times a level.

Source: https://arxiv.org/abs/2110.02861 (block-wise scales, and why codes must reach small magnitudes).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from distadam.precision.constants import constant
from distadam.precision.counters import BLOCK
from distadam.precision.rounding import is_tame
from distadam.precision.storage import Temporary

SIGNED_LEVELS = 127
UNSIGNED_LEVELS = 255
NEAREST = 0x80000
"""d of [Note: 8-bit moments] that rounds to nearest, away from zero in ties."""

_WORK, _SIGNS, _BLOCKS = 0, 1, 2
"""Scratch indices."""

_UNITS = 2048
"""Values of y."""


@cache
def _scales(device: torch.device) -> Tensor:
    """Return the scale of a block for every a, its largest y: float32, shape (2048,); see [Note: 8-bit moments]."""
    largest = torch.arange(_UNITS, dtype=torch.int32)
    units = (((largest + 7) & ~7).clamp_(min=256) * largest.clamp(max=1)).masked_fill_(largest > 2032, 0x7FC)
    return (units << 20).view(torch.float32).to(device)


@cache
def _bases(levels: int, factor: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``factor`` times the base for every s, shape (2048,)."""
    return ((torch.arange(_UNITS) - levels).clamp_(min=0) * factor).to(dtype).to(device)


def _bases_of(scales: Tensor, levels: int, factor: int, temporary: Temporary, dtype: torch.dtype) -> Tensor:
    """Return ``factor`` times the base of each block, shape (blocks, 1)."""
    units = temporary(_BLOCKS, scales.numel(), torch.int32)
    torch.bitwise_right_shift(scales.view(torch.int32), constant(20, torch.int32), out=units)
    units.bitwise_and_(constant(_UNITS - 1, torch.int32))
    table = _bases(levels, factor, dtype, scales.device)
    return torch.index_select(table, 0, units, out=temporary(_BLOCKS + 1, scales.numel(), dtype)).view(-1, 1)


def prepare_(value: Tensor, tame: bool | None = None) -> Tensor:
    """Return the bits of ``value``, to which d may be added without overflow.

    Args:
        value: float32, shape (n,).
        tame: Whether no number can be NaN; None where nobody has looked.
    """
    if not (is_tame(value) if tame is None else tame):
        value.masked_fill_(torch.isnan(value), math.nan)
    return value.view(torch.int32)


def encode(bits: Tensor, levels: int, codes: Tensor, scales: Tensor, temporary: Temporary) -> None:
    """Store numbers in 8 bits; see [Note: 8-bit moments].

    Args:
        bits: int32, shape (256 k,): the numbers' bits with d added; overwritten.
        levels: `SIGNED_LEVELS` or `UNSIGNED_LEVELS`.
        codes: uint8, shape (256 k,).
        scales: float32, shape (k,).
        temporary: Lends scratch.
    """
    numel, num_blocks = bits.numel(), scales.numel()
    work = temporary(_WORK, numel, torch.int16).copy_(bits.bitwise_right_shift_(constant(20, torch.int32)))
    if levels == SIGNED_LEVELS:
        signs = temporary(_SIGNS, numel, torch.int16)
        torch.bitwise_right_shift(work, constant(15, torch.int16), out=signs)  # 0 or -1
    work.bitwise_and_(constant(_UNITS - 1, torch.int16))
    blocks = work.view(-1, BLOCK)
    largest = torch.amax(blocks, 1, out=temporary(_BLOCKS, num_blocks, torch.int16))
    units = temporary(_BLOCKS, num_blocks, torch.int32).copy_(largest)
    torch.index_select(_scales(scales.device), 0, units, out=scales)
    blocks.sub_(_bases_of(scales, levels, 1, temporary, torch.int16)).clamp_(min=0)
    if levels == SIGNED_LEVELS:
        work.add_(signs, alpha=-0x80)
    codes.copy_(work)


def decode(codes: Tensor, scales: Tensor, levels: int, out: Tensor, temporary: Temporary) -> None:
    """Write the numbers of codes to ``out``, float32; other arguments as `encode`."""
    numel = out.numel()
    if levels == SIGNED_LEVELS:
        # As int8 a code is its level less 128 if it is negative, and 0xf87f leaves the level less 2048: 16 times that
        # has a sign bit where the upper half of a float has it.
        work = temporary(_WORK, numel, torch.int16).copy_(codes.view(torch.int8))
        bases = torch.bitwise_and(work, constant(0x7F, torch.int16), out=temporary(_SIGNS, numel, torch.int16))
        bases.clamp_(max=1).view(-1, BLOCK).mul_(_bases_of(scales, levels, 16, temporary, torch.int16))
        work.bitwise_and_(constant(0xF87F - 0x10000, torch.int16))
        out.copy_(bases.add_(work, alpha=16).view(torch.bfloat16))
    else:
        blocks = out.view(torch.int32).copy_(codes).view(-1, BLOCK)
        bases = _bases_of(scales, levels, 1 << 20, temporary, torch.int32)
        torch.add(bases, blocks, alpha=1 << 20, out=blocks)
    if scales.device.type != "cpu" or not math.isfinite(scales.sum()):
        out.view(-1, BLOCK).masked_fill_(torch.isnan(scales).view(-1, 1), math.nan)
