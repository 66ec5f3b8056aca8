"""Buffers that hold the full gradient of a bucket, and the pool that lends them."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict

import torch
from torch import Tensor

from distadam.comm import DONE, Pending
from distadam.engine.ledger import Ledger
from distadam.layout import Bucket

Key = tuple[object, ...]
PATIENCE_S = 1.0


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
    that full gradients take no more than ``depth`` of the largest buckets while reductions keep up (stage 2). It waits
    for `PATIENCE_S` only: a peer may itself be waiting for this rank, in backward (SyncBatchNorm) or in `step` (a
    parameter that it did not use holds up its launches). Then the pool grows, and does not wait again until some
    reduction has finished. The depth that it has then is that of every rank from the next agreement on (`deepen`):
    ranks that read each other's memory wait for peers to have read, and a peer with a buffer more would not read before
    it is in `step`. With ``depth=None`` each bucket has buffers of its own and they stay (stage 1, one rank,
    ``no_sync``).
    """

    def __init__(self, ledger: Ledger, kind: str, depth: int | None) -> None:
        self.depth = depth
        self._ledger = ledger
        self._kind = kind
        self._free: dict[Key, list[FullBuffer]] = defaultdict(list)
        self._num_buffers: dict[Key, int] = defaultdict(int)
        self._stalled = False
        self._num_users: dict[Key, int] = defaultdict(int)
        self._most_numel: dict[Key, int] = defaultdict(int)

    def expect(self, bucket: Bucket, dtype: torch.dtype, device: torch.device) -> None:
        """Say that one more bucket will ask: no more buffers than buckets are made ahead of need, and all fit it."""
        self._num_users[dtype, device] += 1
        self._most_numel[dtype, device] = max(self._most_numel[dtype, device], bucket.numel)

    def deepen(self, depth: int) -> None:
        """Take over the depth of the rank that has the most; it never falls."""
        if self.depth is not None:
            self.depth = max(self.depth, depth)

    def acquire(self, bucket: Bucket, dtype: torch.dtype, device: torch.device) -> FullBuffer:
        """Return a buffer for ``bucket`` whose former content nobody reads any more."""
        key: Key = (dtype, device) if self.depth is not None else (bucket.index, dtype, device)
        free = self._free[key]
        full = self.depth is None or self._num_buffers[key] >= min(self.depth, self._num_users[key])
        # Reductions end in the order of their launch, so no other is asked: asking may do the work early.
        oldest = next((buffer for buffer in free if buffer.pending is DONE), free[0]) if full and free else None
        deadline, poll_s = time.monotonic() + PATIENCE_S, 0.0
        while oldest is not None:
            if oldest.pending.ready(poll_s):
                free.remove(oldest)
                oldest.pending.wait()
                self._stalled = False
                if oldest.flat.numel() >= bucket.numel:
                    return oldest
                self._drop(oldest)  # a larger bucket has come since it was made
                break
            if self._stalled:
                break
            self._stalled, poll_s = time.monotonic() > deadline, 0.001
        self._num_buffers[key] += 1
        self.deepen(self._num_buffers[key])
        numel = max(bucket.numel, self._most_numel.get(key, 0))
        return FullBuffer(self._ledger.empty(self._kind, numel, dtype, device), key, self)

    def release(self, buffer: FullBuffer, pending: Pending = DONE) -> None:
        """Take a buffer back; ``pending`` still reads it."""
        buffer.pending = pending
        self._free[buffer.key].append(buffer)

    def _drop(self, buffer: FullBuffer) -> None:
        self._ledger.release(buffer.flat)
        self._num_buffers[buffer.key] -= 1
