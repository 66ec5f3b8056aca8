"""A bucket: parameters of one dtype and device that are reduced, updated and gathered together.

Note [Alignment]: slots start at multiples of 64 elements and so do shard boundaries (256 where a storage keeps scales
or random counters for blocks of 256 elements of one parameter: no block is cut or shared then). A flat buffer that is
cut at multiples of 64 gives torch's fused CPU kernels the same bits however it is cut; at other cuts their scalar tails
round differently. Padding after a slot belongs to no parameter: it is zero in gradients, never counted in a norm, and
what an update writes there is never read.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter's place in a bucket: elements [offset, offset + numel) of the flat buffer."""

    param: int
    group: int
    offset: int
    numel: int
    padded_numel: int

    @property
    def end(self) -> int:
        """First element after the parameter."""
        return self.offset + self.numel

    @property
    def padded_end(self) -> int:
        """First element after the parameter's padding: where the next slot starts."""
        return self.offset + self.padded_numel


@dataclass(frozen=True, slots=True)
class GroupRange:
    """Elements [start, end) of a bucket, slots ``first`` to ``last`` (exclusive), all of one parameter group."""

    group: int
    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a slot that lies in one shard.

    Elements [start, end) of the shard are elements [param_start, param_start + end - start) of the parameter;
    ``padded_end`` is where its padding inside the shard ends.
    """

    slot: int
    param: int
    start: int
    end: int
    padded_end: int
    param_start: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Slots of one dtype and device, ordered by parameter group, padded so that every shard has the same size."""

    index: int
    dtype: str
    device: str
    itemsize: int
    num_shards: int
    numel: int
    slots: tuple[Slot, ...]
    ranges: tuple[GroupRange, ...]

    @property
    def shard_numel(self) -> int:
        """Elements of one rank's shard."""
        return self.numel // self.num_shards

    @property
    def nbytes(self) -> int:
        """Bytes of the flat parameter buffer."""
        return self.numel * self.itemsize

    @property
    def padding(self) -> int:
        """Elements that belong to no parameter."""
        return self.numel - sum(slot.numel for slot in self.slots)

    def pieces(self, shard: int) -> tuple[Piece, ...]:
        """Return the parts of slots that shard ``shard`` holds, in order; empty parts are left out."""
        start, end = shard * self.shard_numel, (shard + 1) * self.shard_numel
        pieces = []
        first = max(0, bisect_right(self.slots, start, key=lambda slot: slot.offset) - 1)
        for position in range(first, len(self.slots)):
            slot = self.slots[position]
            if slot.offset >= end:
                break
            lo, hi = max(start, slot.offset), min(end, slot.end)
            padded = min(end, slot.padded_end)
            if lo < hi:
                pieces.append(Piece(position, slot.param, lo - start, hi - start, padded - start, lo - slot.offset))
        return tuple(pieces)
