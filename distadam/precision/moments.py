"""Storages of the optimizer's state: exp_avg, exp_avg_sq, momentum_buffer and their like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from distadam.precision import blockwise
from distadam.precision.counters import BLOCK, Counters
from distadam.precision.storage import Allocate, Storage, StoredTensor, Temporary

UNSIGNED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg"})
"""States that are averages or maxima of squares."""


class Moment(Storage, Protocol):
    """One shard's state of one name: a `Storage` that can be read and written as plain numbers, off the hot path."""

    def read(self, start: int, end: int) -> Tensor:
        """Return elements [start, end) of the shard in the compute dtype, new memory unless `direct`."""
        ...

    def write(self, start: int, end: int, values: Tensor) -> None:
        """Store the elements of one parameter's part of the shard, [start, end); what pads them becomes 0."""
        ...


class PlainMoment:
    """A state in the compute dtype, or in bfloat16 rounded to nearest even."""

    looks = False

    def __init__(
        self, numel: int, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device, allocate: Allocate
    ):
        self.tensor = allocate("moments", numel, dtype, device).zero_()
        self.direct: Tensor | None = self.tensor if dtype == compute_dtype else None
        self.stores = self.direct is None
        self.name = str(dtype).removeprefix("torch.")

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Widen."""
        out.copy_(self.tensor[start:end])

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Round to nearest even."""
        self.tensor[start:end].copy_(value)

    def read(self, start: int, end: int) -> Tensor:
        """Return the elements; see `Moment.read`."""
        part = self.tensor[start:end]
        return part if self.direct is not None else part.float()

    def write(self, start: int, end: int, values: Tensor) -> None:
        """Store elements; see `Moment.write`."""
        self.tensor[start:end].copy_(values)

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return the tensor."""
        return {"": StoredTensor(self.tensor)}


class BlockwiseMoment:
    """A state in 8 bits, 256 elements of a parameter to a scale; see [Note: 8-bit moments].

    Args:
        numel: Elements of the shard, a multiple of 256.
        signed: False for averages and maxima of squares.
        counters: Random bits.
        device: Where it lies.
        allocate: Allocates.
    """

    name = "8bit"
    direct: Tensor | None = None
    stores = True
    looks = True

    def __init__(self, numel: int, signed: bool, counters: Counters, device: torch.device, allocate: Allocate) -> None:
        self.codes = allocate("moments", numel, torch.uint8, device).zero_()
        self.scales = allocate("moments", numel // BLOCK, torch.float32, device).zero_()
        self.levels = blockwise.SIGNED_LEVELS if signed else blockwise.UNSIGNED_LEVELS
        self.counters = counters

    def _part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self.codes[start:end], self.scales[start // BLOCK : end // BLOCK]

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Decode."""
        blockwise.decode(*self._part(start, end), self.levels, out, temporary)

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Round stochastically and encode."""
        bits = blockwise.prepare_(value, tame)
        self.counters.add_(bits, start, end, step, 16)
        blockwise.encode(bits, self.levels, *self._part(start, end), temporary)

    def read(self, start: int, end: int) -> Tensor:
        """Return the elements; see `Moment.read`."""
        stop = -(-end // BLOCK) * BLOCK
        out = torch.empty(stop - start, dtype=torch.float32, device=self.codes.device)
        self.load(start, stop, out, self._fresh)
        return out[: end - start]

    def write(self, start: int, end: int, values: Tensor) -> None:
        """Store elements, to nearest; see `Moment.write`."""
        stop = -(-end // BLOCK) * BLOCK
        padded = torch.zeros(stop - start, dtype=torch.float32, device=self.codes.device)
        padded[: end - start].copy_(values)
        bits = blockwise.prepare_(padded).add_(blockwise.NEAREST)
        blockwise.encode(bits, self.levels, *self._part(start, stop), self._fresh)

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return codes and scales."""
        return {"": StoredTensor(self.codes), "_scale": StoredTensor(self.scales, BLOCK)}

    def _fresh(self, index: int, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.codes.device)
