"""Weight storages of a shard: load() is the tensor that the update works on, store() brings it to the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Allocate = Callable[[str, int, torch.dtype, torch.device], Tensor]
"""``(kind, numel, dtype, device)`` to a 1-D tensor that the memory report knows."""


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


class Weights(Protocol):
    """One shard's weights."""

    name: str

    def load(self) -> Tensor:
        """Return the weights in the compute dtype; the update writes them in place."""
        ...

    def store(self, spans: list[tuple[int, int]]) -> None:
        """Bring elements [start, end) of the shard to the parameter's storage."""
        ...

    def reload(self) -> None:
        """Take the parameter's values, after somebody else wrote them."""
        ...


class OwnWeights:
    """The parameter's own storage is the weight: fp32 and fp64."""

    name = "own"

    def __init__(self, param_shard: Tensor) -> None:
        self._param_shard = param_shard

    def load(self) -> Tensor:
        """Return the parameter shard itself."""
        return self._param_shard

    def store(self, spans: list[tuple[int, int]]) -> None:
        """Do nothing: the update wrote the parameter."""

    def reload(self) -> None:
        """Do nothing: there is one copy."""


class MasterWeights:
    """An fp32 master beside a 16-bit parameter; stored by rounding to nearest even."""

    name = "fp32 master"

    def __init__(self, param_shard: Tensor, allocate: Allocate) -> None:
        self._param_shard = param_shard
        self._master = allocate("masters", param_shard.numel(), torch.float32, param_shard.device)
        self._master.copy_(param_shard)

    def load(self) -> Tensor:
        """Return the master."""
        return self._master

    def store(self, spans: list[tuple[int, int]]) -> None:
        """Round the masters of ``spans`` into the parameter shard."""
        for start, end in spans:
            self._param_shard[start:end].copy_(self._master[start:end])

    def reload(self) -> None:
        """Take over written elements; a master that still rounds to its parameter keeps its low bits."""
        kept = self._master.to(self._param_shard.dtype) == self._param_shard
        self._master.copy_(torch.where(kept, self._master, self._param_shard.float()))


def select_weights(param_shard: Tensor, allocate: Allocate) -> Weights:
    """Return the storage for a parameter shard: masters for 16-bit dtypes."""
    if param_shard.dtype == compute_dtype(param_shard.dtype):
        return OwnWeights(param_shard)
    return MasterWeights(param_shard, allocate)
