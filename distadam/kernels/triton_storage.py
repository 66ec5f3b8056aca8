"""Loads and stores of the storages in `distadam.precision`, as Triton device functions.

[Note: conversions by bits]
    bfloat16 is widened and rounded in integers: the same code then runs under Triton's interpreter, whose own
    conversion does not round to nearest even.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distadam.kernels.triton_math import COUNT

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
def _mix(x):
    """Return lowbias32 of uint32; see [Note: random bits] in precision/counters.py."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(keys, lanes, chunk, count):
    """Return each element's 16 random bits as int32; see [Note: random bits] in precision/counters.py."""
    block, mask = chunk[2], chunk[3]
    key = tl.load(keys + block, mask=mask, other=0).to(tl.uint32, bitcast=True)
    lane = tl.load(lanes + block, mask=mask, other=0)
    offset = _mix((key ^ count.to(tl.int32).to(tl.uint32, bitcast=True)) + 0x9E3779B9) & 0xFFFF
    x = (lane + offset.to(tl.int32, bitcast=True) + tl.arange(0, WIDTH)[None, :]) & 0xFFFF
    x = ((x ^ (x >> 7)) * 0x2993) & 0xFFFF
    x = ((x ^ (x >> 5)) * 0xE877) & 0xFFFF
    x = ((x ^ (x >> 9)) * 0x0235) & 0xFFFF
    return x ^ (x >> 10)


@triton.jit
def load_weight(param, extra, chunk, WEIGHTS: tl.constexpr):
    """Return the weights in float32."""
    offset, mask = chunk[0], chunk[1]
    if WEIGHTS == "fp32":
        weight = tl.load(extra + offset, mask=mask, other=0.0)
    elif WEIGHTS == "split":
        high = tl.load(param + offset, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        weight = from_bits((high << 16) + tl.load(extra + offset, mask=mask, other=0).to(tl.int32))
    else:
        weight = widen(tl.load(param + offset, mask=mask, other=0.0))
    return weight


@triton.jit
def _bfloat16(high):
    """Return the bfloat16 whose bits are the low 16 of an int32."""
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _split(weight):
    """Return parameter and remainder; see [Note: split weights] in precision/rounding.py."""
    bits = bits_of(weight)
    high = (bits + 0x8000) >> 16
    high = tl.where(weight != weight, ((bits >> 16) & 0x8000) | 0x7FC0, high)
    return _bfloat16(high), bits.to(tl.int16)


@triton.jit
def _round_stochastically(weight, random):
    """Return bfloat16; see [Note: stochastic rounding] in precision/rounding.py."""
    bits = bits_of(weight)
    magnitude = bits & 0x7FFFFFFF
    before, high = bits >> 16, (bits + random) >> 16
    high = tl.where((high & 0x7F80) == 0x7F80, (before & 0x8000) | 0x7F7F, high)
    kept = tl.where(magnitude > 0x7F800000, before | 0x0040, before)
    return _bfloat16(tl.where(magnitude >= 0x7F800000, kept, high))


@triton.jit
def store_weight(param, extra, keys, lanes, chunk, row, weight, WEIGHTS: tl.constexpr):
    """Write the weights, and the parameter in its own dtype."""
    offset, mask = chunk[0], chunk[1]
    if WEIGHTS == "split":
        high, remainder = _split(weight)
        tl.store(param + offset, high, mask=mask)
        tl.store(extra + offset, remainder, mask=mask)
    elif WEIGHTS == "stochastic":
        rounded = _round_stochastically(weight, random_bits(keys, lanes, chunk, row[COUNT]))
        tl.store(param + offset, rounded, mask=mask)
    else:
        if WEIGHTS == "fp32":
            tl.store(extra + offset, weight, mask=mask)
        tl.store(param + offset, narrow(weight, param.dtype.element_ty), mask=mask)


@triton.jit
def _base(scale, LEVELS: tl.constexpr):
    """Return the number of the lowest level of a block; see [Note: 8-bit moments] in precision/blockwise.py."""
    return tl.maximum((bits_of(scale) >> 20) - LEVELS, 0)


@triton.jit
def _scale(largest):
    """Return the scale of blocks by their largest rounded magnitudes."""
    units = tl.where(largest == 0, 0, tl.maximum((largest + 7) & ~7, 256))
    return from_bits(tl.where(largest > 2032, 0x7FC00000, units << 20))


@triton.jit
def _decode(code, scale, SIGNED: tl.constexpr):
    code = code.to(tl.int32)
    if SIGNED:
        magnitude = code & 0x7F
        bits = tl.where(magnitude != 0, (magnitude + _base(scale, 127)) << 20, 0)
        value = from_bits(bits | ((code & 0x80) << 24))
    else:
        value = from_bits((code + _base(scale, 255)) << 20)
    return tl.where(scale != scale, scale, value)


@triton.jit
def load_moment(moment, scale, chunk, SIGNED: tl.constexpr, MOMENTS: tl.constexpr):
    """Return a moment in float32."""
    if MOMENTS == "8bit":
        scales = tl.load(scale + chunk[2], mask=chunk[3], other=0.0)
        value = _decode(tl.load(moment + chunk[0], mask=chunk[1], other=0), scales, SIGNED)
    else:
        value = widen(tl.load(moment + chunk[0], mask=chunk[1], other=0.0))
    return value


@triton.jit
def store_moment(moment, scale, keys, lanes, chunk, row, value, SIGNED: tl.constexpr, MOMENTS: tl.constexpr):
    """Write a moment in its storage's dtype."""
    if MOMENTS == "8bit":
        bits = bits_of(value)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7FC00000)
        rounded = (magnitude + 16 * random_bits(keys, lanes, chunk, row[COUNT])) >> 20
        scales = _scale(tl.max(rounded, axis=1, keep_dims=True))
        if SIGNED:
            code = tl.maximum(rounded - _base(scales, 127), 0) | ((bits >> 24) & 0x80)
        else:
            code = tl.maximum(rounded - _base(scales, 255), 0)
        tl.store(scale + chunk[2], scales, mask=chunk[3])
        tl.store(moment + chunk[0], code.to(tl.uint8), mask=chunk[1])
    else:
        tl.store(moment + chunk[0], narrow(value, moment.dtype.element_ty), mask=chunk[1])
