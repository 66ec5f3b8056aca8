"""Load -> update -> store, a chunk at a time, so that what is loaded is still in the cache when it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distadam.kernels.update import GroupRanges, ShardUpdate
from distadam.precision import Moment, Weights, is_tame
from distadam.rules import Scratch

_WEIGHT = 16
_GRAD = 17
_STATE = 18
_TEMPORARY = 32
_KEPT = 48
"""Scratch indices; rules count theirs from 0."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a range, in the compute dtype: what an update writes in place.

    Attributes:
        index: Of the range.
        weight: Shape (n,).
        grad: Shape (n,).
        state: By name, each of shape (n,).
    """

    index: int
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]


class Chunks:
    """Walks over ranges; between two chunks the last one is stored.

    Args:
        scratch: Where loaded numbers and the storages' temporaries lie.
        cpu_size: Elements of a chunk on the CPU, a multiple of 256.
        device_size: Elsewhere, where it bounds memory.
    """

    def __init__(self, scratch: Scratch, cpu_size: int, device_size: int) -> None:
        self._scratch = scratch
        self._cpu_size = cpu_size
        self._device_size = device_size
        self._device = torch.device("cpu")

    def walk(
        self, update: ShardUpdate, ranges: GroupRanges, names: Sequence[str], skip: Tensor | None
    ) -> Iterator[Chunk]:
        """Yield the chunks of a group's ranges, loaded; what was done to one is stored when the next is asked for.

        Args:
            update: Where the storages are.
            ranges: Which ranges.
            names: Which states.
            skip: None, or a 0-D bool on the device: where true, what is stored keeps its bits.
        """
        self._device = update.device
        size = self._cpu_size if self._device.type == "cpu" else self._device_size
        zero_padding = ranges.padding if ranges.group.get("eps") == 0 else ()
        storages: list[Weights | Moment] = [update.weights, *(update.states[name] for name in names)]
        looks = any(storage.looks for storage in storages)
        for index, (first, last) in enumerate(ranges.spans):
            for start in range(first, last, size):
                end = min(start + size, last)
                loaded = [self._load(update, storage, i, start, end) for i, storage in enumerate(storages)]
                grad = self._grad(update, start, end)
                kept = self._keep(update, storages, start, end) if skip is not None else []
                yield Chunk(index, loaded[0], grad, dict(zip(names, loaded[1:], strict=True)))
                for begin, stop in zero_padding:
                    low, high = max(begin, start), min(stop, end)
                    if low < high:
                        torch._foreach_zero_([value[low - start : high - start] for value in loaded])
                tame = is_tame(loaded[0]) if looks else None
                for storage, value in zip(storages, loaded, strict=True):
                    if storage.stores:
                        storage.store(start, end, value, ranges.steps[index], self.temporary, tame)
                for before, now in kept:
                    torch.where(skip, before, now, out=now)  # type: ignore[arg-type]

    def temporary(self, index: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Lend scratch to a storage; see `distadam.precision.Temporary`."""
        return self._scratch.get(_TEMPORARY + index, numel, dtype, self._device)

    def _load(self, update: ShardUpdate, storage: Weights | Moment, index: int, start: int, end: int) -> Tensor:
        if storage.direct is not None:
            return storage.direct[start:end]
        slot = _WEIGHT if index == 0 else _STATE + index
        out = self._scratch.get(slot, end - start, update.compute_dtype, self._device)
        storage.load(start, end, out, self.temporary)
        return out

    def _grad(self, update: ShardUpdate, start: int, end: int) -> Tensor:
        grad = update.grad[start - update.start : end - update.start]
        if grad.dtype == update.compute_dtype:
            return grad
        return self._scratch.get(_GRAD, end - start, update.compute_dtype, self._device).copy_(grad)

    def _keep(
        self, update: ShardUpdate, storages: Sequence[Weights | Moment], start: int, end: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return copies of what `store` is going to write, each with where it lies."""
        parts = [update.weights.param_shard[start:end]]
        for storage in storages:
            if storage.stores and storage.direct is None:
                parts += [part.tensor[start // part.block : end // part.block] for part in storage.stored().values()]
        scratch = self._scratch
        return [
            (scratch.get(_KEPT + i, part.numel(), part.dtype, self._device).copy_(part), part)
            for i, part in enumerate(parts)
        ]
