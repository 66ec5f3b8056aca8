"""Random bits for stochastic rounding, from counters: no state, the same for every layout.

[Note: random bits]
    The 16 bits for an element are a function of (seed, stream, element id, step), so neither ranks, buckets, stages
    nor chunks change them, and a resumed run goes on where it stopped. All arithmetic is on unsigned 32-bit words,
    modulo 2^32 (">>" is logical), and mix() is the lowbias32 mixer:

        mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

    Element id, 64 bits: the parameter's start plus the element's offset in the order in which the parameter lies in
    memory (row-major if it is contiguous). The start is the first 6 bytes, big-endian, of SHA-256 of the parameter's
    name in UTF-8, times 2^16: it depends on the name alone, not on groups, order or what else is trained. (Two
    parameters whose ranges overlap would share random bits; for 10,000 parameters of 2^30 elements the odds are 1 in
    170, and nothing would be wrong.)

    Segments: ids that agree above the lowest 16 bits. A segment's key does not depend on the step:

        key = 0;  for word in (seed, stream, id >> 48, (id >> 16) & 0xffffffff):  key = mix((key ^ word) + 0x9e3779b9)

    and in each step the segment walks through one fixed permutation of the 16-bit numbers from another place:

        offset  = mix((key ^ step) + 0x9e3779b9) & 0xffff         step: the parameter's count, this step included
        bits(id) = permute((id + offset) & 0xffff)

        permute(x), on 16 bits:  x ^= x >> 7;  x *= 0x2993;  x ^= x >> 5;  x *= 0xe877;  x ^= x >> 9;  x *= 0x0235;
                                 x ^= x >> 10;  x &= 0xffff after each product

    Because permute() is a permutation the bits of a segment are uniform exactly, and on the CPU a segment is a slice
    of one table: random bits cost one addition an element. A hash of every element would cost eight operations, which
    is as much as the update itself.

    Streams: 0 is the weight; a state's is the first 4 bytes, big-endian, of SHA-256 of its name.

Source: https://github.com/skeeto/hash-prospector (lowbias32, hash16_xm3).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
WEIGHT_STREAM = 0
SEGMENT = 65_536
"""Elements of a segment; the last 16 bits of an id."""

BLOCK = 256
"""Shards that need counters are cut at multiples of this many elements of a parameter, so that a block of them lies in
one parameter and one segment."""


def mix(x: int) -> int:
    """Return lowbias32 of a 32-bit word; see [Note: random bits]."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def start_of(name: str) -> int:
    """Return the element id of a parameter's first element."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") << 16


def stream_of(state_name: str) -> int:
    """Return the stream of a state's random bits."""
    return int.from_bytes(hashlib.sha256(state_name.encode()).digest()[:4], "big")


def key_of(seed: int, stream: int, element: int) -> int:
    """Return the key of the segment that an element id lies in."""
    key = 0
    for word in (seed, stream, element >> 48, (element >> 16) & 0xFFFFFFFF):
        key = mix(((key ^ word) + GOLDEN) & 0xFFFFFFFF)
    return key


def offset_of(key: int, step: int) -> int:
    """Return where a segment starts in the permutation in this step."""
    return mix(((key ^ step) + GOLDEN) & 0xFFFFFFFF) & 0xFFFF


def permutation() -> Tensor:
    """Return permute(0), ..., permute(65535) as int32."""
    x = torch.arange(SEGMENT, dtype=torch.int32)
    for shift, factor in ((7, 0x2993), (5, 0xE877), (9, 0x0235)):
        x = ((x ^ (x >> shift)).long() * factor & 0xFFFF).int()
    return x ^ (x >> 10)


@cache
def permutation_twice(device: torch.device, factor: int) -> Tensor:
    """Return the permutation times ``factor``, two times over: any walk of 65,536 numbers is one slice of it."""
    return (permutation() * factor).repeat(2).to(device)


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, end) of a shard, padding included, that lie in one parameter.

    Attributes:
        start: First element, a multiple of 256.
        end: First element after, likewise.
        first_id: Element id of the first.
    """

    start: int
    end: int
    first_id: int


class Counters:
    """Random bits for the elements of one shard.

    Args:
        seed: Of the policy, 32 bits.
        runs: The shard's parameters, in order.
        stream: See [Note: random bits].
        device: Where the bits are wanted.
    """

    def __init__(self, seed: int, runs: Sequence[Run], stream: int, device: torch.device) -> None:
        self.device = device
        self._segments = [
            (start, end, first_id & 0xFFFF, key_of(seed, stream, first_id))
            for run in runs
            for start, end, first_id in _segments(run)
        ]
        self._starts = [segment[0] for segment in self._segments]
        self._tables: tuple[Tensor, Tensor] | None = None

    def add_(self, bits: Tensor, start: int, end: int, step: Tensor, factor: int) -> None:
        """Add ``factor`` times the elements' 16 random bits to ``bits``.

        Args:
            bits: int32, shape (end - start,).
            start: First element of the shard, a multiple of 256.
            end: First element after, likewise.
            step: 0-D float32, the elements' step count.
            factor: 1 or 16.

        Syncs: never (the host reads a step that lies on the host).
        """
        if self.device.type == "cpu":
            self._add_slices_(bits, start, end, int(step), factor)
        else:
            self._add_blocks_(bits, start, end, step, factor)

    def _add_slices_(self, bits: Tensor, start: int, end: int, step: int, factor: int) -> None:
        table = permutation_twice(self.device, factor)
        first = max(0, bisect_right(self._starts, start) - 1)
        for begin, stop, lane, key in self._segments[first:]:
            if begin >= end:
                break
            low, high = max(begin, start), min(stop, end)
            if low < high:
                place = ((lane + low - begin) + offset_of(key, step)) & 0xFFFF
                bits[low - start : high - start].add_(table[place : place + high - low])

    def _add_blocks_(self, bits: Tensor, start: int, end: int, step: Tensor, factor: int) -> None:
        keys, lanes = self.tables()
        blocks = slice(start // BLOCK, end // BLOCK)
        offset = _mix_words(((keys[blocks] ^ step.long()) + GOLDEN) & 0xFFFFFFFF)
        first = (lanes[blocks] + offset) & 0xFFFF
        index = first[:, None] + torch.arange(BLOCK, device=self.device)
        bits.add_(permutation_twice(self.device, factor)[index.view(-1)])

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return for each block of 256 elements of the shard its segment's key and the low 16 bits of its first id.

        Returns:
            Two int64 tensors of shape (shard elements / 256,) on the device, both at least 0; zeros where a block
            belongs to no parameter. Made at the first call.
        """
        if self._tables is None:
            keys, lanes = self.host_tables()
            self._tables = (keys.to(self.device), lanes.to(self.device))
        return self._tables

    def host_tables(self) -> tuple[Tensor, Tensor]:
        """Return what `tables` returns on the CPU, made anew."""
        num_blocks = self._segments[-1][1] // BLOCK if self._segments else 0
        keys, lanes = torch.zeros(num_blocks, dtype=torch.int64), torch.zeros(num_blocks, dtype=torch.int64)
        for begin, stop, lane, key in self._segments:
            first, last = begin // BLOCK, stop // BLOCK
            keys[first:last] = key
            lanes[first:last] = torch.arange(lane, lane + stop - begin, BLOCK)
        return keys, lanes


def _segments(run: Run) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first id) of the parts of a run that lie in one segment each."""
    start, first_id = run.start, run.first_id
    while start < run.end:
        end = min(run.end, start + SEGMENT - (first_id & 0xFFFF))
        yield start, end, first_id
        first_id += end - start
        start = end


def _mix_words(x: Tensor) -> Tensor:
    """Return lowbias32 of 32-bit words in int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
