"""Loads and stores of the storages in `distadam.precision`, as Triton device functions.

[Note: conversions by bits]
    bfloat16 is widened and rounded in integers: the same code then runs under Triton's interpreter, whose own
    conversion does not round to nearest even.
"""

from __future__ import annotations

import triton
import triton.language as tl

WEIGHTS = ("own", "master", "split", "stochastic")
MOMENTS = ("fp32", "bf16", "8bit")

WIDTH = tl.constexpr(256)
"""Elements of a block that shares a scale and a key (`precision.counters.BLOCK`); a warp holds one, 8 a thread."""


@triton.jit
def bits_of(value):
    """Return a float32's bits as int32."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    """Return the float32 with these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(value):
    """Return a float32, bfloat16 or float16 as float32."""
    if value.dtype == tl.bfloat16:
        return from_bits(value.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round a float32 to nearest even."""
    if dtype == tl.bfloat16:
        bits = bits_of(value)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(value == value, rounded, 0x7FC00000)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def load_gradient(grad, chunk):
    """Return the summed gradient in float32."""
    return widen(tl.load(grad + chunk[0], mask=chunk[1], other=0.0))


@triton.jit
def load_weight(param, extra, chunk, WEIGHTS: tl.constexpr):
    """Return the weights in float32."""
    offset, mask = chunk[0], chunk[1]
    if WEIGHTS == "master":
        weight = tl.load(extra + offset, mask=mask, other=0.0)
    elif WEIGHTS == "split":
        high = tl.load(param + offset, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        weight = from_bits((high << 16) + tl.load(extra + offset, mask=mask, other=0).to(tl.int32))
    else:
        weight = widen(tl.load(param + offset, mask=mask, other=0.0))
    return weight


@triton.jit
def store_weight(param, extra, keys, lanes, chunk, row, weight, WEIGHTS: tl.constexpr):
    """Write the weights, and the parameter in its own dtype."""
    offset, mask = chunk[0], chunk[1]
    if WEIGHTS == "master":
        tl.store(extra + offset, weight, mask=mask)
        tl.store(param + offset, narrow(weight, param.dtype.element_ty), mask=mask)
    elif WEIGHTS == "split":
        bits = bits_of(weight)
        high = (bits + 0x8000) >> 16
        tl.store(param + offset, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(extra + offset, (bits - (high << 16)).to(tl.int16), mask=mask)
    else:
        tl.store(param + offset, weight, mask=mask)


@triton.jit
def load_moment(moment, scale, chunk, SIGNED: tl.constexpr, MOMENTS: tl.constexpr):
    """Return a moment in float32."""
    return widen(tl.load(moment + chunk[0], mask=chunk[1], other=0.0))


@triton.jit
def store_moment(moment, scale, keys, lanes, chunk, row, value, SIGNED: tl.constexpr, MOMENTS: tl.constexpr):
    """Write a moment in its storage's dtype."""
    tl.store(moment + chunk[0], narrow(value, moment.dtype.element_ty), mask=chunk[1])
