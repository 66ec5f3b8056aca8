"""How numbers are stored: load() gives what the update computes in, store() brings the result back to memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distadam.precision.choice import GROUP_KEYS, StorageChoice, check_rule, choose
from distadam.precision.counters import WEIGHT_STREAM, Counters, Run, start_of, stream_of
from distadam.precision.moments import UNSIGNED, BlockwiseMoment, Moment, PlainMoment
from distadam.precision.rounding import is_tame
from distadam.precision.storage import Allocate, Storage, StoredTensor, Temporary
from distadam.precision.weights import (
    MasterWeights,
    OwnWeights,
    RoundedWeights,
    SplitWeights,
    StochasticWeights,
    Weights,
    compute_dtype,
)

__all__ = [
    "GROUP_KEYS",
    "BlockwiseMoment",
    "Counters",
    "MasterWeights",
    "Moment",
    "OwnWeights",
    "PlainMoment",
    "RoundedWeights",
    "Run",
    "SplitWeights",
    "StochasticWeights",
    "Storage",
    "StorageChoice",
    "StoredTensor",
    "Temporary",
    "Weights",
    "check_rule",
    "choose",
    "compute_dtype",
    "is_tame",
    "make_moment",
    "make_weights",
    "start_of",
]


def make_weights(
    choice: StorageChoice, param_shard: Tensor, runs: Sequence[Run], seed: int, allocate: Allocate
) -> Weights:
    """Return the weight storage of a parameter shard.

    Args:
        choice: Which.
        param_shard: This rank's part of the flat parameters.
        runs: The shard's parameters, for random bits.
        seed: Of random bits.
        allocate: Allocates masters.
    """
    if choice.weights == "own":
        return OwnWeights(param_shard)
    if choice.weights == "fp32":
        return MasterWeights(param_shard, allocate)
    if choice.weights == "split":
        return SplitWeights(param_shard, allocate)
    if choice.weights == "stochastic":
        return StochasticWeights(param_shard, Counters(seed, runs, WEIGHT_STREAM, param_shard.device))
    return RoundedWeights(param_shard)


def make_moment(
    choice: StorageChoice, name: str, param_shard: Tensor, runs: Sequence[Run], seed: int, allocate: Allocate
) -> Moment:
    """Return the storage of the state ``name``, zeros; arguments as `make_weights`."""
    numel, device = param_shard.numel(), param_shard.device
    wide = compute_dtype(param_shard.dtype)
    if choice.moments == "8bit":
        counters = Counters(seed, runs, stream_of(name), device)
        return BlockwiseMoment(numel, name not in UNSIGNED, counters, device, allocate)
    return PlainMoment(numel, torch.bfloat16 if choice.moments == "bf16" else wide, wide, device, allocate)
