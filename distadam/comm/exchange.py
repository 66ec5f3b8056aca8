"""Reduce-scatter and all-gather by pairwise sends and a local sum.

Note [Exchange]: each rank sends every other rank that one's part and adds what it receives: (n-1)/n of the buffer is
sent, the least there is, where gloo's own reduce-scatter is an all-reduce. What is received is added in float32
(float64 for float64), in the order of a fixed binary tree over ranks, so a sum depends neither on arrival nor on
buckets.

Note [Worker]: gloo's handle of a send or receive cannot be polled, and a wait with a timeout closes the connection. So
a thread of each optimizer waits: it takes jobs in the order in which they were launched, which is the same on all
ranks, posts a chunk's sends and receives before it adds up the chunk before, and thereby never needs more than two
chunks of memory.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from distadam.comm.tree import TreeSum

SCRATCH_NBYTES = 16 << 20
"""Bytes of receive buffers that one optimizer takes at most, whatever it sends."""

_ALIGN = 64
_MAX_TAG = 1 << 15  # MPI promises no more; so many chunks are never in flight

_next_tag: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


class Job:
    """A collective in flight: what torch.distributed calls a work."""

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._running.acquire()
        self._error: Exception | None = None
        self._listeners: list[Callable[[], object]] = []

    def is_completed(self) -> bool:
        """Say whether waiting would return at once."""
        return not self._running.locked()

    def when_done(self, call: Callable[[], object]) -> None:
        """Have ``call`` called by the thread that finishes the job; here and now as well if it just has."""
        self._listeners.append(call)
        if self.is_completed():
            call()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the result is there. The timeout is that of each send and receive, which the worker waits for.

        Raises:
            RuntimeError: names the peer that did not send or receive.
        """
        with self._running:
            pass
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error
        return True

    def finish(self, error: Exception | None = None) -> None:
        """Let `wait` return, or raise."""
        self._error = error
        self._running.release()
        for call in self._listeners:
            call()


Peers = Sequence[tuple[int, Tensor]]


class _Chunk:
    """A part of a job: sends and receives, then what to do with what has come.

    Args:
        job: whose part it is.
        tag: what its messages are matched by.
        sends: returns (peer, tensor), once receives are posted.
        receives: returns (peer, tensor), when the chunk before the last one is done.
        then: what to do with received tensors by peer.
        last: whether the job is done then.
        alone: whether the chunk before must be done first.
    """

    def __init__(
        self,
        job: Job,
        tag: int,
        sends: Callable[[], Peers],
        receives: Callable[[], Peers],
        then: Callable[[dict[int, Tensor]], None] | None = None,
        *,
        last: bool = True,
        alone: bool = False,
    ) -> None:
        self.job = job
        self.last = last
        self.alone = alone
        self._tag = tag
        self._sends = sends
        self._receives = receives
        self._then = then
        self._received: dict[int, Tensor] = {}
        self._sent: Peers = ()
        self._works: list[tuple[str, int, Any]] = []

    def post(self, group: ProcessGroup) -> None:
        """Start all sends and receives."""
        self._received = dict(self._receives())
        for peer, tensor in self._received.items():
            if tensor.numel():
                self._works.append(("comes from", peer, group.recv([tensor], peer, self._tag)))
        self._sent = self._sends()
        for peer, tensor in self._sent:
            if tensor.numel():
                self._works.append(("goes to", peer, group.send([tensor], peer, self._tag)))

    def finish(self, group: ProcessGroup, timeout: timedelta | None) -> None:
        """Wait for the receives, use what came, wait for the sends."""
        incoming = [work for work in self._works if work[0] == "comes from"]
        outgoing = [work for work in self._works if work[0] == "goes to"]
        for works, then in ((incoming, self._then), (outgoing, None)):
            for direction, peer, work in works:
                try:
                    work.wait() if timeout is None else work.wait(timeout)
                except RuntimeError as error:
                    place = dist.get_global_rank(group, peer)
                    raise RuntimeError(f"nothing {direction} rank {place}: {error}") from error
            if then is not None:
                then(self._received)


class Exchange:
    """Collectives of CPU tensors over one group, by point-to-point messages.

    Args:
        group: any backend with ``send`` and ``recv`` on CPU tensors that are matched by tag; every rank makes the same
            calls in the same order.
        timeout_s: seconds that a message may take; None is the group's own timeout.
    """

    def __init__(self, group: ProcessGroup, timeout_s: float | None) -> None:
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._buffers: list[Tensor] = []
        self._turn = 0
        self._tree = TreeSum(self._num_ranks)
        self._worker = _Worker(group, None if timeout_s is None else timedelta(seconds=timeout_s))
        thread = threading.Thread(target=self._worker.run, name="distadam exchange", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._worker, thread)

    def scratch(self) -> list[Tensor]:
        """Return the buffers that are kept, for the memory report."""
        return [*self._buffers, *self._tree.scratch]

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Job:
        """Sum ``full`` over ranks into this rank's ``shard``, which may be wider; both are contiguous.

        Collective: every rank of the group. Syncs: never (waiting for the handle does).
        """
        return self._reduce(shard, torch.split(full, shard.numel()))

    def all_gather(self, full: Tensor, shard: Tensor) -> Job:
        """Collect every rank's ``shard`` in ``full``; ``shard`` may be this rank's part of it.

        Collective: every rank of the group. Syncs: never (waiting for the handle does).
        """
        parts = torch.split(full, shard.numel())
        if parts[self._rank].data_ptr() != shard.data_ptr():
            parts[self._rank].copy_(shard)
        return self._gather(parts)

    def all_reduce(self, tensor: Tensor) -> Job:
        """Sum ``tensor`` over ranks, in place: a reduce-scatter and an all-gather of its parts.

        Collective: every rank of the group. Syncs: never (waiting for the handle does).
        """
        size = -(-tensor.numel() // (self._num_ranks * _ALIGN)) * _ALIGN
        cuts = [min(rank * size, tensor.numel()) for rank in range(self._num_ranks + 1)]
        parts = [tensor[start:end] for start, end in pairwise(cuts)]
        self._reduce(parts[self._rank], parts)
        return self._gather(parts, alone=True)

    def _peers(self) -> list[int]:
        """Other ranks, each rank beginning with the next one, so that not all send to the same."""
        return [(self._rank + distance) % self._num_ranks for distance in range(1, self._num_ranks)]

    def _gather(self, parts: Sequence[Tensor], alone: bool = False) -> Job:
        job = Job()
        peers = self._peers()
        sends = [(peer, parts[self._rank]) for peer in peers]
        receives = [(peer, parts[peer]) for peer in peers]
        self.put(job, lambda: sends, lambda: receives, alone=alone)
        return job

    def put(
        self,
        job: Job,
        sends: Callable[[], Peers],
        receives: Callable[[], Peers],
        then: Callable[[dict[int, Tensor]], None] | None = None,
        *,
        last: bool = True,
        alone: bool = False,
    ) -> None:
        """Have the worker carry out a part of a job behind what was put before; for the arguments see `_Chunk`."""
        self._worker.chunks.put(_Chunk(job, _tag(self._group), sends, receives, then, last=last, alone=alone))

    def _reduce(self, out: Tensor, parts: Sequence[Tensor]) -> Job:
        job, longest = Job(), parts[0].numel()
        self._tree.reserve(out.dtype)
        numel = self.reserve(longest, (self._num_ranks - 1) * parts[0].element_size())
        for start in range(0, max(1, longest), numel):
            chunk = [part[start : start + numel] for part in parts]
            self._put_reduce(job, out[start : start + numel], chunk, last=start + numel >= longest)
        return job

    def _put_reduce(self, job: Job, target: Tensor, chunk: Sequence[Tensor], last: bool) -> None:
        peers, mine = self._peers(), chunk[self._rank]

        def receive() -> Peers:
            buffer, size = self.next_buffer(mine.dtype), mine.numel()
            return [(peer, buffer[place * size : (place + 1) * size]) for place, peer in enumerate(peers)]

        def add(received: dict[int, Tensor]) -> None:
            received[self._rank] = mine
            self._tree.add(target, [received[rank] for rank in range(self._num_ranks)])

        sends = [(peer, chunk[peer]) for peer in peers]
        self.put(job, lambda: sends, receive, add, last=last)

    def reserve(self, longest: int, nbytes_each: int) -> int:
        """Make buffers for chunks of jobs over ``longest`` elements; return how many elements a chunk has at most.

        Args:
            longest: elements.
            nbytes_each: bytes of a chunk's buffer for an element.
        """
        most = max(_ALIGN, SCRATCH_NBYTES // (2 * nbytes_each) // _ALIGN * _ALIGN)
        numel = min(most, longest)
        if not self._buffers or self._buffers[0].numel() < numel * nbytes_each:
            self._buffers = [torch.empty(numel * nbytes_each, dtype=torch.uint8) for _ in range(2)]
        return max(1, numel)

    def next_buffer(self, dtype: torch.dtype) -> Tensor:
        """Return the buffer of the chunk that is being posted: two take turns."""
        self._turn = 1 - self._turn
        return self._buffers[self._turn].view(dtype)


def _tag(group: ProcessGroup) -> int:
    """Return the number of this rank's next chunk on ``group``, the same on all ranks."""
    tag = _next_tag.get(group, 0)
    _next_tag[group] = (tag + 1) % _MAX_TAG
    return tag


class _Worker:
    """Carries out chunks in order; after an error every later job fails with it. It does not know its `Exchange`."""

    def __init__(self, group: ProcessGroup, timeout: timedelta | None) -> None:
        self.chunks: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._group = group
        self._timeout = timeout
        self._error: Exception | None = None
        self._posted: _Chunk | None = None

    def run(self) -> None:
        """Work until None comes."""
        with torch.no_grad():
            while self._take():
                pass

    def _take(self) -> bool:
        try:
            chunk = self.chunks.get(block=self._posted is None)
        except queue.Empty:
            self._finish()
            return True
        if chunk is None or chunk.alone:
            self._finish()
        if chunk is not None:
            self._carry_out(lambda: chunk.post(self._group))
            self._finish()
            self._posted = chunk
        return chunk is not None

    def _finish(self) -> None:
        chunk, self._posted = self._posted, None
        if chunk is not None:
            self._carry_out(lambda: chunk.finish(self._group, self._timeout))
            if chunk.last:
                chunk.job.finish(self._error)

    def _carry_out(self, action: Callable[[], None]) -> None:
        if self._error is None:
            try:
                action()
            except Exception as error:
                self._error = error


def _stop(worker: _Worker, thread: threading.Thread) -> None:
    """End the worker after what has been launched; a peer that never answers is not waited for."""
    worker.chunks.put(None)
    if thread is not threading.current_thread():  # which may have held the last reference
        thread.join(1.0)
