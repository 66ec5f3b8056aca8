"""What storing may change: the distance between neighbouring numbers of each storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distadam.engine.flat_bucket import FlatBucket

_BITS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126), torch.float64: (53, -1022)}
"""Significant bits, and the exponent of the smallest normal number."""

_CODE_BITS = 4  # [Note: 8-bit moments]: 8 levels an octave
_SIGNED_FLOOR, _UNSIGNED_FLOOR = 1.25 * 2.0**-16, 1.25 * 2.0**-32
"""The first level that is not 0, and the second of those that have no 0, as shares of the scale."""


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of ``dtype`` at ``value``, float64."""
    bits, smallest = _BITS[dtype]
    exponent = torch.frexp(value.double().abs())[1].double() - 1
    return torch.exp2(exponent.clamp_min(smallest) - (bits - 1))


def weight_slack(flat: FlatBucket, exact: Tensor) -> Tensor | float:
    """Return how far a stored weight may be from what the update computed."""
    if flat.choice.weights == "stochastic":
        return spacing(exact, flat.dtype)
    if flat.choice.weights == "none":
        return spacing(exact, flat.dtype) / 2
    return 0.0


def state_slack(flat: FlatBucket, name: str, exact: Tensor, where: Tensor) -> Tensor | float:
    """Return how far stored elements ``where`` of the shard's state may be from what the update computed."""
    if flat.choice.moments == "bf16":
        return spacing(exact, torch.bfloat16) / 2
    if flat.choice.moments != "8bit":
        return 0.0
    parts = flat.states[name].stored()
    scale = parts["_scale"].tensor[where // parts["_scale"].block].double()
    floor = scale * (_UNSIGNED_FLOOR if "sq" in name else _SIGNED_FLOOR)
    exponent = torch.frexp(exact.abs())[1].double() - 1
    return torch.maximum(torch.exp2(exponent - (_CODE_BITS - 1)), floor)


def bits_lost(stored: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Return how many of the compute dtype's bits storing has cost, by the median relative error; 0 for none."""
    there = (exact != 0) & exact.isfinite() & stored.isfinite()
    if not bool(there.any()):
        return 0.0
    median = float(((stored - exact).abs() / exact.abs())[there].median())
    # Rounding to p bits errs by 0.35 x 2^-p on the median of numbers that are spread over an octave.
    return max(0.0, math.log2(median / (0.35 * 2.0 ** -_BITS[dtype][0]))) if median else 0.0
