"""Weight storages of a shard: how a parameter keeps what its own dtype cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distadam.precision.counters import Counters
from distadam.precision.rounding import is_tame, join, split_, truncate_
from distadam.precision.storage import Allocate, Storage, StoredTensor, Temporary

Span = tuple[int, int]


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


class Weights(Storage, Protocol):
    """One shard's weights: a `Storage` that a parameter belongs to.

    Attributes:
        param_shard: The parameter's own storage, which the all-gather sends.
    """

    param_shard: Tensor

    def reload(self, written: Sequence[Span]) -> None:
        """Take the parameter's values, after somebody else may have written elements ``written`` of the shard."""
        ...


class OwnWeights:
    """The parameter's own storage is the weight: fp32 and fp64."""

    name = "own"
    stores = False
    looks = False

    def __init__(self, param_shard: Tensor) -> None:
        self.param_shard = param_shard
        self.direct: Tensor | None = param_shard

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Copy; see `Storage.load`."""
        out.copy_(self.param_shard[start:end])

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Copy; see `Storage.store`."""
        self.param_shard[start:end].copy_(value)

    def reload(self, written: Sequence[Span]) -> None:
        """Do nothing: there is one copy."""

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return nothing: all is in the parameter."""
        return {}


class MasterWeights:
    """An fp32 master beside a 16-bit parameter; stored by rounding to nearest even."""

    name = "fp32 master"
    stores = True
    looks = False

    def __init__(self, param_shard: Tensor, allocate: Allocate) -> None:
        self.param_shard = param_shard
        self.master = allocate("masters", param_shard.numel(), torch.float32, param_shard.device)
        self.master.copy_(param_shard)
        self.direct: Tensor | None = self.master

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Copy; see `Storage.load`."""
        out.copy_(self.master[start:end])

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Round the masters, which ``value`` is, into the parameter."""
        self.param_shard[start:end].copy_(value)

    def reload(self, written: Sequence[Span]) -> None:
        """Take over written elements; a master that still rounds to its parameter keeps its low bits."""
        kept = self.master.to(self.param_shard.dtype) == self.param_shard
        self.master.copy_(torch.where(kept, self.master, self.param_shard.float()))

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return the master."""
        return {"master": StoredTensor(self.master)}


class SplitWeights:
    """A bfloat16 parameter and the 16 bits that make it an exact fp32 master; see [Note: split weights]."""

    name = "split"
    stores = True
    looks = True
    direct: Tensor | None = None

    def __init__(self, param_shard: Tensor, allocate: Allocate) -> None:
        self.param_shard = param_shard
        self.remainder = allocate("masters", param_shard.numel(), torch.int16, param_shard.device).zero_()

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Join parameter and remainder."""
        join(self.param_shard[start:end], self.remainder[start:end], out, temporary)

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Split into parameter and remainder."""
        split_(value, self.param_shard[start:end], self.remainder[start:end], tame)

    def reload(self, written: Sequence[Span]) -> None:
        """Drop the low bits of what was written: nobody knows any more which elements have changed."""
        for start, end in written:
            self.remainder[start:end].zero_()

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return the remainder."""
        return {"remainder": StoredTensor(self.remainder)}


class StochasticWeights:
    """A bfloat16 parameter without a master, rounded stochastically; see [Note: stochastic rounding].

    Args:
        param_shard: The parameter's storage.
        counters: Where random bits come from.
    """

    name = "stochastic"
    stores = True
    looks = True
    direct: Tensor | None = None

    def __init__(self, param_shard: Tensor, counters: Counters) -> None:
        self.param_shard = param_shard
        self.counters = counters

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Widen the parameter."""
        out.copy_(self.param_shard[start:end])

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Round stochastically."""
        bits = value.view(torch.int32)
        tame = is_tame(value) if tame is None else tame
        before = None if tame else temporary(0, value.numel(), torch.int32).copy_(bits)
        self.counters.add_(bits, start, end, step, 1)
        truncate_(value, before, self.param_shard[start:end])

    def reload(self, written: Sequence[Span]) -> None:
        """Do nothing: there is one copy."""

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return nothing: all is in the parameter."""
        return {}


class RoundedWeights(OwnWeights):
    """A 16-bit parameter without a master, rounded to nearest even: updates below half its precision are lost."""

    name = "none"
    stores = True

    def __init__(self, param_shard: Tensor) -> None:
        super().__init__(param_shard)
        self.direct = None  # the update works on a wider copy
