"""fp32 bits in 16 and 16 bits, and stochastic rounding to bfloat16.

[Note: split weights]
    With b the 32 bits of an fp32 weight:  p = (b + 0x8000) >> 16, a bfloat16 rounded to nearest with ties away from
    zero, and remainder = the low 16 bits of b as a signed number, so that (p << 16) + remainder = b. Ties away is the
    only rounding to nearest that 16 more bits invert (ties to even rounds 0x8000 down after an even p and up after an
    odd one, and the remainder +0x8000 would be needed too). Every finite value and Inf comes back exactly. NaN does
    not survive the addition (0x7fffffff + 0x8000 is a negative zero), so there p is the quiet NaN 0x7fc0 with b's sign;
    loading adds the remainder to it as to any other, which gives a NaN, and storing that changes nothing.

[Note: stochastic rounding]
    16 random bits are added to b and the low 16 bits of the sum dropped: with x between two neighbouring bfloat16s,
    the upper is taken with the probability that makes the mean x. Of Inf and NaN the upper 16 bits are kept (of NaN
    with 0x0040 set, else 0x7f800001 would become Inf), and a finite value that would become Inf becomes the largest
    finite one, 0x7f7f, of its sign.

[Note: passes that are vectorised on the CPU]
    What costs time is not the number of bytes but whether torch's loop is vectorised. Measured, ns an element, AMD
    EPYC, 1 thread: strided views such as high halves of words, comparisons and `where` 0.5 to 0.8; lookups 0.7; shifts,
    sums, products and conversions of contiguous numbers, integers too, 0.05 to 0.15. So words are shifted and converted
    (int32 to int16 keeps the low half, int16 to uint8 the low byte) where every number is finite, and halves of words
    are strided int16 views, [0::2] the low and [1::2] the high one, where some number is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distadam.precision.constants import constant
from distadam.precision.storage import Temporary

_HIGH = 0
"""Scratch index."""


def halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low int16 halves of 32-bit words, as views."""
    view = words.view(torch.int16)
    return view[1::2], view[0::2]


def is_tame(value: Tensor) -> bool:
    """Say whether the host can tell, in one pass, that every number is finite and far from the largest one.

    [Note: one look at a chunk]
        It is asked of the new weights, once, and answers for the states too, of which only a NaN must be known: a rule
        moves a weight by a multiple of its states, so a NaN in one of them is a NaN in the weight.
    """
    return value.device.type == "cpu" and math.isfinite(torch.dot(value, value))


def join(param: Tensor, remainder: Tensor, out: Tensor, temporary: Temporary) -> None:
    """Write the fp32 weights whose parts are ``param`` and ``remainder``; see [Note: split weights].

    Args:
        param: bfloat16, shape (n,).
        remainder: int16, shape (n,).
        out: float32, shape (n,).
        temporary: Lends scratch.
    """
    high = temporary(_HIGH, out.numel(), torch.int32).copy_(param.view(torch.int16))
    out.view(torch.int32).copy_(remainder).add_(high, alpha=0x10000)


def split_(value: Tensor, param: Tensor, remainder: Tensor, tame: bool | None = None) -> None:
    """Store fp32 weights as ``param`` and ``remainder``; see [Note: split weights].

    Args:
        value: float32, shape (n,), overwritten.
        param: bfloat16, shape (n,).
        remainder: int16, shape (n,).
        tame: What `is_tame` says of ``value``; None where nobody has looked.
    """
    bits = value.view(torch.int32)
    remainder.copy_(bits)
    if is_tame(value) if tame is None else tame:
        bits.add_(constant(0x8000, torch.int32)).bitwise_right_shift_(constant(16, torch.int32))
        param.view(torch.int16).copy_(bits)
        return
    high = halves(value)[0]
    quiet = (high & -0x8000) | 0x7FC0
    is_nan = torch.isnan(value)
    bits.add_(0x8000)
    param.view(torch.int16).copy_(torch.where(is_nan, quiet, high))


def truncate_(value: Tensor, bits_before: Tensor | None, param: Tensor) -> None:
    """Drop the low 16 bits of sums with random bits; see [Note: stochastic rounding].

    Args:
        value: float32, shape (n,): the weight's bits plus 16 random ones.
        bits_before: int32, shape (n,): the weight's own bits; None where `is_tame`.
        param: bfloat16, shape (n,).
    """
    if bits_before is None:
        param.view(torch.int16).copy_(value.view(torch.int32).bitwise_right_shift_(constant(16, torch.int32)))
        return
    high = halves(value)[0]
    magnitude = bits_before & 0x7FFFFFFF
    before = halves(bits_before)[0]
    largest = (before & -0x8000) | 0x7F7F
    kept = torch.where(magnitude > 0x7F800000, before | 0x0040, before)
    rounded = torch.where((high & 0x7F80) == 0x7F80, largest, high)
    param.view(torch.int16).copy_(torch.where(magnitude >= 0x7F800000, kept, rounded))
