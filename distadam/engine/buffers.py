"""Buffers that hold the full gradient of a bucket, and the pool that lends them."""

from __future__ import annotations

import operator
import time
import weakref
from bisect import insort
from collections import defaultdict

import torch
from torch import Tensor

from distadam.comm import DONE, Pending
from distadam.engine.ledger import Ledger
from distadam.layout import Bucket

Key = tuple[object, ...]
PATIENCE_S = 2.0
"""Seconds to wait for a buffer before one more is made; ranks of a busy machine are a second apart now and then."""


class FullBuffer:
    """A flat buffer that can hold one bucket's full gradient; views of its slots are made once a bucket."""

    __slots__ = ("_views", "flat", "key", "pending", "pool")

    def __init__(self, flat: Tensor, key: Key, pool: BufferPool) -> None:
        self.flat = flat
        self.pool: BufferPool = weakref.proxy(pool)  # which holds this: no cycle keeps a dropped optimizer's memory
        self.key = key
        self.pending: Pending = DONE
        self._views: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def tensor(self, bucket: Bucket) -> Tensor:
        """Return the 1-D part that ``bucket`` fills."""
        return self.flat if self.flat.numel() == bucket.numel else self.flat[: bucket.numel]

    def views(self, bucket: Bucket, strides: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Tensor]:
        """Return a view for each slot with its parameter's (shape, strides)."""
        return self._cached(bucket, strides)[0]

    def padding(self, bucket: Bucket, strides: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Tensor]:
        """Return views of what belongs to no parameter."""
        return self._cached(bucket, strides)[1]

    def _cached(
        self, bucket: Bucket, strides: list[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        cached = self._views.get(bucket.index)
        if cached is None:
            views = [
                self.flat.as_strided(shape, stride, self.flat.storage_offset() + slot.offset)
                for slot, (shape, stride) in zip(bucket.slots, strides, strict=True)
            ]
            padding = [self.flat[slot.end : slot.padded_end] for slot in bucket.slots if slot.end < slot.padded_end]
            last = bucket.slots[-1].padded_end
            if last < bucket.numel:
                padding.append(self.flat[last : bucket.numel])
            cached = self._views[bucket.index] = (views, padding)
        return cached


class BufferPool:
    """Lends full-gradient buffers and takes them back when their reduction is launched.

    Note [Bounded pool]: with ``depth`` buffers out there the pool does not grow but waits for the oldest reduction, so
    that full gradients take no more than the ``depth`` largest buckets while reductions keep up (stage 2). It waits for
    `PATIENCE_S` only: a peer may itself be waiting for this rank, in backward (SyncBatchNorm) or in `step` (a parameter
    that it did not use holds up its launches). Then the pool grows, and does not wait again until some reduction has
    finished. The depth that it has then is that of every rank from the next agreement on (`deepen`): ranks that read
    each other's memory wait for peers to have read, and a peer with a buffer more would not read before it is in
    `step`. For the same reason buffers have the sizes of the largest buckets, not of those that asked first. With
    ``depth=None`` each bucket has buffers of its own and they stay (stage 1, one rank, ``no_sync``).
    """

    def __init__(self, ledger: Ledger, kind: str, depth: int | None) -> None:
        self.depth = depth
        self._ledger = ledger
        self._kind = kind
        self._free: dict[Key, list[FullBuffer]] = defaultdict(list)
        self._num_buffers: dict[Key, int] = defaultdict(int)
        self._stalled = False
        self._sizes: dict[Key, list[int]] = defaultdict(list)

    def expect(self, bucket: Bucket, dtype: torch.dtype, device: torch.device) -> None:
        """Say that one more bucket will ask: no more buffers than buckets are made ahead of need."""
        insort(self._sizes[dtype, device], bucket.numel, key=operator.neg)

    def deepen(self, depth: int) -> None:
        """Take over the depth of the rank that has the most; it never falls."""
        if self.depth is not None:
            self.depth = max(self.depth, depth)

    def acquire(self, bucket: Bucket, dtype: torch.dtype, device: torch.device) -> FullBuffer:
        """Return a buffer for ``bucket`` whose former content nobody reads any more."""
        if self.depth is None:
            key: Key = (bucket.index, dtype, device)
            full, numel = True, bucket.numel
        else:
            key = (dtype, device)
            made, sizes = self._num_buffers[key], self._sizes[key]
            next_numel = sizes[made] if made < len(sizes) else 0
            full = made >= self.depth or next_numel < bucket.numel
            numel = max(next_numel, bucket.numel)
        free = self._free[key]
        fitting = [buffer for buffer in free if buffer.flat.numel() >= bucket.numel] if full else []
        # Reductions end in the order of their launch, so no other is asked: asking may do the work early.
        oldest = next((buffer for buffer in fitting if buffer.pending is DONE), fitting[0]) if fitting else None
        deadline, poll_s = time.monotonic() + PATIENCE_S, 0.0
        while oldest is not None:
            if oldest.pending.ready(poll_s):
                free.remove(oldest)
                oldest.pending.wait()
                self._stalled = False
                return oldest
            if self._stalled:
                break
            self._stalled, poll_s = time.monotonic() > deadline, 0.001
        if full and free and free[0].flat.numel() < bucket.numel and free[0].pending.ready(0.0):
            self._drop(free.pop(0))  # larger buckets have come since it was made
        self._num_buffers[key] += 1
        self.deepen(self._num_buffers[key])
        return FullBuffer(self._ledger.empty(self._kind, numel, dtype, device), key, self)

    def release(self, buffer: FullBuffer, pending: Pending = DONE) -> None:
        """Take a buffer back; ``pending`` still reads it."""
        buffer.pending = pending
        self._free[buffer.key].append(buffer)

    def _drop(self, buffer: FullBuffer) -> None:
        buffer.pending.wait()
        self._ledger.release(buffer.flat)
        self._num_buffers[buffer.key] -= 1
