"""Small all-reduces between ranks of one host: each writes its part where the others read it.

Note [Small all-reduces]: what ranks agree on, a norm and a flag are a few bytes that a step waits for. gloo wakes
threads of its own on each rank for them, one after the other, which takes 1.6 to 2.2 ms on two cores; a token and a
read take 0.2. Every rank adds up all parts, in the order of ranks, so all have the same bits. Two buffers take turns:
starting one completes those that were started before, so who fills a buffer again has heard from every peer that it
has read what was in it. They have numbers of their own: when ranks agree they may have launched different numbers of
reductions. What hosts agree on and what is added up are two series, as they are two groups with gloo: neither waits for
the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distadam.comm.shared import SharedMemory

MOST_NBYTES = 1 << 20
"""Beyond that it is no longer the waking that takes the time, and all ranks read all parts."""

_HEADER_NBYTES = 8  # how many bytes follow
_COMBINE: dict[dist.ReduceOp.RedOpType, Callable[..., Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
}


class SmallAllReduces:
    """All-reduces of CPU tensors of at most `MOST_NBYTES`, by sum or maximum.

    Args:
        memory: where the others read.
        kind: of the tokens of this series (`comm.mesh`).
        timeout_s: seconds that a peer may be silent.
    """

    def __init__(self, memory: SharedMemory, kind: int, timeout_s: float) -> None:
        self._memory = memory
        self._kind = kind
        self._timeout_s = timeout_s
        self._buffers: list[Tensor | None] = [None, None]
        self._number = 0
        self._last: SmallAllReduce | None = None

    def scratch(self) -> list[Tensor]:
        """Return the buffers that are kept, for the memory report."""
        return [buffer for buffer in self._buffers if buffer is not None]

    def start(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> SmallAllReduce:
        """Begin to combine ``tensor`` over ranks, in place; the handle's `wait` ends it.

        Collective: every rank, in one order. Syncs: until what was started before is done.
        """
        if self._last is not None:
            self._last.wait()
        self._number += 1
        buffer = self._buffer(self._number % 2, _HEADER_NBYTES + tensor.nbytes)
        buffer[:_HEADER_NBYTES].view(torch.int64).fill_(tensor.nbytes)
        mine = _part(buffer, tensor).copy_(tensor)
        token = (self._kind, self._number)
        self._memory.mesh.tell(*token, self._memory.segment(buffer) or 0)
        self._last = SmallAllReduce(self._memory, token, tensor, mine, _COMBINE[op], self._timeout_s)
        return self._last

    def _buffer(self, turn: int, nbytes: int) -> Tensor:
        buffer = self._buffers[turn]
        if buffer is None or buffer.numel() < nbytes:
            if buffer is not None:
                self._memory.release(buffer)
            buffer = self._buffers[turn] = self._memory.empty(nbytes, torch.uint8)
        return buffer


def _part(buffer: Tensor, like: Tensor) -> Tensor:
    """Return what a buffer holds, in the shape and dtype of ``like``."""
    return buffer[_HEADER_NBYTES : _HEADER_NBYTES + like.nbytes].view(like.dtype).view(like.shape)


class SmallAllReduce:
    """One in flight: what torch.distributed calls a work. See `SmallAllReduces`."""

    def __init__(
        self,
        memory: SharedMemory,
        token: tuple[int, int],
        tensor: Tensor,
        mine: Tensor,
        combine: Callable[..., Tensor],
        timeout_s: float,
    ) -> None:
        self._memory = memory
        self._token = token
        self._tensors: tuple[Tensor, Tensor] | None = (tensor, mine)  # until it is done: they are the caller's
        self._segments: dict[int, int] = {}  # where peers have their parts, once they are there
        self._combine = combine
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # who starts the next may complete this one while another thread waits for it

    def is_completed(self) -> bool:
        """Say whether waiting would return at once: every peer's part is there."""
        return self._tensors is None or self._memory.mesh.arrived(*self._token)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Read the others' parts, once they are there.

        Raises:
            RuntimeError: names the peer that has ended, is silent, or has brought another number of bytes.
        """
        with self._lock:
            if self._tensors is not None:
                self._complete(*self._tensors)
        return True

    def _complete(self, tensor: Tensor, mine: Tensor) -> None:
        memory = self._memory
        self._segments = self._segments or memory.mesh.wait(*self._token, self._timeout_s)
        parts = {memory.mesh.rank: mine}
        for peer, segment in self._segments.items():
            nbytes = int(memory.view(peer, segment, torch.int64, 1))
            if nbytes != tensor.nbytes:
                raise RuntimeError(
                    f"expected {tensor.nbytes} bytes of every rank but got {nbytes} of {memory.mesh.name(peer)}"
                )
            parts[peer] = _part(memory.view(peer, segment, torch.uint8, _HEADER_NBYTES + nbytes), tensor)
        with torch.no_grad():
            tensor.copy_(parts[0])
            for rank in range(1, len(parts)):
                self._combine(tensor, parts[rank], out=tensor)
        self._tensors = None
