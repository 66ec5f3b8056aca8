"""Read an optimizer's shards by parameter: weights and states in the compute dtype, elements by their index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distadam.engine.access import Access
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.votes import Purpose, pack_floats
from distadam.optimizer import ShardedOptimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part of a parameter that lies in this rank's shard of a bucket.

    Attributes:
        flat: the bucket.
        slot: the parameter's place in it.
        start, end: elements of the shard.
        first: the element of the parameter that ``start`` is, in the order in which it lies in memory.
        group: index of its parameter group.
    """

    flat: FlatBucket
    slot: int
    start: int
    end: int
    first: int
    group: int

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.flat.names[self.slot]


def access_of(optimizer: ShardedOptimizer, *arguments: float) -> Access:
    """Return what diagnostics read of an optimizer.

    Args:
        optimizer: not built yet raises, as does anything else than a sharded optimizer.
        arguments: up to three numbers that all ranks must have passed; what differs is named.

    Collective: agrees with the other ranks that all of them make this call.
    """
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(f"expected an optimizer of distadam but got {type(optimizer).__module__}.{type(optimizer)!r}.")
    access = optimizer.checkpoint_access()
    access.announce(Purpose.DIAGNOSE, pack_floats(*arguments))
    return access


def parts_of(flat: FlatBucket) -> Iterator[Part]:
    """Yield the parts of parameters that this rank's shard of a bucket holds, in order."""
    for piece in flat.pieces:
        yield Part(
            flat=flat,
            slot=piece.slot,
            start=piece.start,
            end=piece.end,
            first=piece.param_start,
            group=flat.bucket.slots[piece.slot].group,
        )


def read_weights(flat: FlatBucket) -> Tensor:
    """Return the shard's weights in the compute dtype: masters where there are any. New memory unless it is theirs."""
    if flat.weights.direct is not None:
        return flat.weights.direct
    out = torch.empty(flat.bucket.shard_numel, dtype=flat.compute_dtype, device=flat.device)
    flat.weights.load(
        0, out.numel(), out, lambda index, numel, dtype: torch.empty(numel, dtype=dtype, device=flat.device)
    )
    return out


def read_state(flat: FlatBucket, name: str) -> Tensor:
    """Return the shard's state of a name in the compute dtype; zeros where it has none yet."""
    moment = flat.states.get(name)
    if moment is None:
        return torch.zeros(flat.bucket.shard_numel, dtype=flat.compute_dtype, device=flat.device)
    return moment.read(0, flat.bucket.shard_numel)


def index_of(shape: Sequence[int], strides: Sequence[int], offset: int) -> tuple[int, ...]:
    """Return the index of the element at ``offset`` in memory of a dense tensor: (1, 2) is ``param[1, 2]``."""
    index = [0] * len(shape)
    for dim in sorted((dim for dim in range(len(shape)) if shape[dim] > 1), key=lambda dim: -strides[dim]):
        index[dim], offset = divmod(offset, strides[dim])
    return tuple(index)


def row_major_index(shape: Sequence[int], position: int) -> tuple[int, ...]:
    """Return the index of element ``position`` of a tensor in row-major order."""
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(position), tuple(shape)))


def element(flat: FlatBucket, slot: int, offset: int) -> tuple[int, ...]:
    """Return the index in a parameter of the element at ``offset`` in memory."""
    return index_of(*flat.views[slot], offset)


def spell(name: str, index: Sequence[int] | None) -> str:
    """Return how a message names an element: ``block.weight[1, 2]``."""
    return name if index is None else f"{name}[{', '.join(map(str, index))}]"


def in_memory_order(value: Tensor, strides: Sequence[int]) -> Tensor:
    """Return ``value`` as 1-D in the order in which a parameter of its shape and these strides lies in memory."""
    dense = torch.empty_strided(value.shape, tuple(strides), dtype=value.dtype, device=value.device)
    dense.copy_(value)
    return dense.as_strided((value.numel(),), (1,))
