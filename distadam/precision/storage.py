"""What a storage is: how a shard's numbers lie in memory, beside what the update computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Allocate: TypeAlias = Callable[[str, int, torch.dtype, torch.device], Tensor]
"""``(kind, numel, dtype, device)`` to a 1-D tensor that the memory report knows."""

Temporary: TypeAlias = Callable[[int, int, torch.dtype], Tensor]
"""``(index, numel, dtype)`` to a 1-D scratch tensor on the storage's device; contents undefined."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in memory between steps, and must be saved.

    Attributes:
        tensor: 1-D; element k stands for elements [k * block, (k + 1) * block) of the shard.
        block: Elements of the shard that one element of ``tensor`` stands for: 1, or 256 for the scales of blocks.
    """

    tensor: Tensor
    block: int = 1


class Storage(Protocol):
    """Numbers of one shard: weights, or one state.

    Attributes:
        name: For reports.
        direct: The shard in the compute dtype where it lies in memory like that: the update writes it in place and
            `load` is not called. None where elements are loaded and stored.
        stores: Whether `store` must be called after an update.
        looks: Whether `store` is quicker where it is told that the numbers are tame.
    """

    name: str
    direct: Tensor | None
    stores: bool
    looks: bool

    def load(self, start: int, end: int, out: Tensor, temporary: Temporary) -> None:
        """Write elements [start, end) of the shard, multiples of its alignment, to ``out`` in the compute dtype.

        Syncs: never.
        """
        ...

    def store(
        self, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary, tame: bool | None = None
    ) -> None:
        """Store ``value`` as elements [start, end) of the shard; its memory may be overwritten unless it is `direct`.

        Args:
            start: First element, a multiple of the alignment.
            end: First element after, likewise.
            value: Shape (end - start,), compute dtype.
            step: 0-D float32 step count of these elements, on the device; stochastic rounding depends on it.
            temporary: Lends scratch.
            tame: What `is_tame` says of the weights that belong to ``value`` (see [Note: one look at a chunk]); None
                where nobody has looked.

        Syncs: never.
        """
        ...

    def stored(self) -> Mapping[str, StoredTensor]:
        """Return what lies in memory beside the parameter, by suffix of its name ("" is the name itself)."""
        ...
