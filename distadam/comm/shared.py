"""Collectives of ranks on one host: they read each other's buffers.

Note [Shared]: buffers that travel (flat parameters, flat gradients) lie in memory that every rank of the group maps. A
reduction reads this rank's slice of every peer's buffer once and adds, in the order of `Exchange`, so with its bits; a
gather copies each slice out of its owner's buffer. Launching says "my buffer is ready" (`comm.mesh`); the work itself
is done by the thread that waits for the result, when it waits: a CPU rank has no other processor to do it on, and a sum
that is taken as the update reads it never goes to memory (`Reduction.pieces`).

Note [Nothing is left behind]: memory is an anonymous file without a name (memfd), whose descriptor goes to the peers
with the first message about it and is closed when it is mapped. It goes with the last process that maps it, killed or
not, and does not depend on the size of ``/dev/shm``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from distadam import native
from distadam.comm.exchange import Exchange, Job
from distadam.comm.mesh import MAP, READ, READY, UNMAP, Mesh, connect
from distadam.comm.tree import BLOCK_NUMEL, TreeSum

_STAGGER_NBYTES, _STAGGERED_ABOVE, _NUM_STAGGERS = 5 * mmap.PAGESIZE, 4 << 20, 16
_libc: Any = None


def stagger_nbytes(index: int, nbytes: int) -> int:
    """Return how far into its memory the ``index``-th large buffer begins.

    Note [Stagger]: buffers that one pass reads together must not lie a multiple of 128 MiB apart, or their cache sets
    collide: 28.7 GB/s fall to 20.0, at 256 MiB 30.5 to 13.8. Large buffers begin at different multiples of 20 KiB.
    """
    return _STAGGER_NBYTES * (index % _NUM_STAGGERS) if nbytes >= _STAGGERED_ABOVE else 0


def _map(descriptor: int, nbytes: int) -> Tensor:
    """Map a file; the memory is unmapped with the last tensor.

    Not ``torch.from_file``, whose tensors cannot be sent to other processes, nor ``mmap.mmap``, which keeps a file
    descriptor for every mapping.
    """
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
        _libc.mmap.restype = ctypes.c_void_p
        _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        _libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes")
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, nbytes).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


class SharedMemory:
    """This rank's memory that peers can read, and theirs."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._segments: dict[int, tuple[Tensor, int]] = {}  # by address: the tensor, kept alive, and its number
        self._mapped: dict[tuple[int, int], Tensor] = {}
        self._common: dict[int, Tensor] = {}
        self._num_segments = 0
        self._num_collectives = 0
        mapped = self._mapped  # not self: the mesh would keep this object, and its memory, alive
        mesh.on_map = lambda *message: _map_peer(mapped, *message)
        mesh.on_unmap = lambda peer, segment: mapped.pop((peer, segment), None)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialised 1-D host memory that peers can map."""
        nbytes = max(1, numel) * dtype.itemsize
        segment, self._num_segments = self._num_segments, self._num_segments + 1
        skipped = stagger_nbytes(segment, nbytes)
        descriptor = os.memfd_create("distadam", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, skipped + nbytes)
            tensor = _map(descriptor, skipped + nbytes)[skipped:].view(dtype)[:numel]
            self.mesh.tell(MAP, skipped, segment, skipped + nbytes, descriptor)
        finally:
            os.close(descriptor)
        self._segments[tensor.data_ptr()] = (tensor, segment)
        return tensor

    def common(self, numel: int, dtype: torch.dtype, timeout_s: float) -> Tensor:
        """Return 1-D host memory that is the same on all ranks: the first rank's.

        Collective: every rank, in one order. Syncs: until the first rank has made it.
        """
        tensor = self.empty(numel, dtype)
        number = self.next_number()
        self.mesh.tell(READY, number, self._segments[tensor.data_ptr()][1])
        segments = self.mesh.wait(READY, number, timeout_s)
        if self.mesh.rank != 0:
            self.release(tensor)
            tensor = self.view(0, segments[0], dtype, numel)
        self._common[tensor.data_ptr()] = tensor
        return tensor

    def is_common(self, tensor: Tensor) -> bool:
        """Say whether ``tensor`` begins memory from `common`."""
        return tensor.data_ptr() in self._common

    def release(self, tensor: Tensor) -> None:
        """Forget memory from `empty` that no peer is still to read; it goes when nobody maps it any more."""
        found = self._segments.pop(tensor.data_ptr(), None)
        if found is not None:
            self.mesh.tell(UNMAP, 0, found[1])

    def segment(self, tensor: Tensor) -> int | None:
        """Return the number of the memory that ``tensor`` begins, or None if it is not from `empty`."""
        found = self._segments.get(tensor.data_ptr())
        return None if found is None else found[1]

    @property
    def mapped(self) -> list[Tensor]:
        """Peers' memory as it is mapped here: theirs, so not in the memory report."""
        return list(self._mapped.values())

    def view(self, peer: int, segment: int, dtype: torch.dtype, numel: int) -> Tensor:
        """Return the first ``numel`` elements of a peer's memory."""
        return self._mapped[peer, segment][: numel * dtype.itemsize].view(dtype)

    def next_number(self) -> int:
        """Return the number of the next collective: ranks launch them in one order."""
        self._num_collectives += 1
        return self._num_collectives


def _map_peer(
    mapped: dict[tuple[int, int], Tensor], peer: int, segment: int, descriptor: int, skipped: int, nbytes: int
) -> None:
    try:
        mapped[peer, segment] = _map(descriptor, nbytes)[skipped:]
    finally:
        os.close(descriptor)


def meet(
    names: Sequence[str], rank: int, local: Sequence[int], swap: Callable[[Any], Sequence[Any]]
) -> SharedMemory | None:
    """Return memory that a group's ranks on this host can read, or None on all of the group.

    Args:
        names: what to call each rank in errors.
        rank: this rank's place in the group.
        local: the group's ranks on this host.
        swap: returns every rank's value, by rank.

    Collective: every rank of the group, through ``swap``.
    """
    mesh = connect(names, rank, local, swap)
    if mesh is None:
        return None
    memory = SharedMemory(mesh)
    works = False
    try:
        probe = memory.empty(1, torch.int64).fill_(mesh.rank)
        number = memory.next_number()
        mesh.tell(READY, number, memory.segment(probe) or 0)
        segments = mesh.wait(READY, number, 30.0)
        works = all(memory.view(peer, segment, torch.int64, 1).item() == peer for peer, segment in segments.items())
    except (OSError, RuntimeError, AttributeError, KeyError):  # no memfd, no mmap, a peer without
        pass
    if not all(swap(works)):
        return None
    memory.release(probe)
    return memory


class Shared:
    """Collectives between ranks of one host; buffers outside of `SharedMemory` are exchanged by messages.

    Args:
        memory: where buffers lie.
        exchange: makes what sends other buffers, when first needed.
        timeout_s: seconds that a peer may be silent.
    """

    def __init__(self, memory: SharedMemory, exchange: Callable[[], Exchange], timeout_s: float) -> None:
        self.memory = memory
        self.mesh = memory.mesh
        self.timeout_s = timeout_s
        self.tree = TreeSum(len(self.mesh.peers) + 1)
        self._make_exchange = exchange
        self._exchange: Exchange | None = None
        self._pieces: dict[torch.dtype, Tensor] = {}

    def scratch(self) -> list[Tensor]:
        """Return the buffers that are kept, for the memory report."""
        sent = [] if self._exchange is None else self._exchange.scratch()
        return [*sent, *self.tree.scratch, *self._pieces.values()]

    def piece(self, dtype: torch.dtype) -> Tensor:
        """Return the buffer for one piece of a sum."""
        if dtype not in self._pieces:
            self._pieces[dtype] = torch.empty(BLOCK_NUMEL, dtype=dtype)
        return self._pieces[dtype]

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Reduction | Job:
        """Sum ``full`` over ranks into this rank's ``shard``, which may be wider; both are contiguous."""
        segment = self.memory.segment(full)
        if segment is None:
            return self._messages().reduce_scatter(shard, full)
        return Reduction(self, segment, shard, full)

    def all_gather(self, full: Tensor, shard: Tensor) -> Gather | Job:
        """Collect every rank's ``shard`` in ``full``; ``shard`` may be this rank's part of it."""
        common = self.memory.is_common(full)
        segment = self.memory.segment(full)
        if segment is None and not common:
            return self._messages().all_gather(full, shard)
        numel = shard.numel()
        mine = full[self.mesh.rank * numel : (self.mesh.rank + 1) * numel]
        if mine.data_ptr() != shard.data_ptr():
            mine.copy_(shard)
        return Gather(self, segment or 0, None if common else full, numel)

    def all_reduce(self, tensor: Tensor) -> Job:
        """Sum ``tensor`` over ranks, in place, by messages."""
        return self._messages().all_reduce(tensor)

    def _messages(self) -> Exchange:
        if self._exchange is None:
            self._exchange = self._make_exchange()
        return self._exchange


class _Reading:
    """Work that this rank does by reading its peers' memory, when it waits for it.

    Args:
        over: the group.
        segment: where this rank's buffer is.
    """

    on_demand = True

    def __init__(self, over: Shared, segment: int) -> None:
        self._over = over
        self._number = over.memory.next_number()
        self._segments: dict[int, int] = {}
        self.done = False
        over.mesh.tell(READY, self._number, segment)

    def is_completed(self) -> bool:
        """Say whether waiting would take no longer than the work itself: every peer's buffer is ready."""
        return self.done or self._over.mesh.arrived(READY, self._number)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Do the work, once every peer's buffer is ready.

        Raises:
            RuntimeError: names the peer that has ended or is silent.
        """
        if not self.done:
            self._meet()
            self._read()
            self._finish()
        return True

    def _meet(self) -> None:
        self._segments = self._over.mesh.wait(READY, self._number, self._over.timeout_s)

    def _read(self) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        self.done = True


class _Released:
    """Every peer has read this rank's buffer."""

    def __init__(self, reading: Reduction, over: Shared, number: int) -> None:
        self._reading = reading
        self._over = over
        self._number = number
        self._done = False

    def is_completed(self) -> bool:
        """Say whether waiting would not wait for a peer. Does this rank's own reading if it can: peers wait for it."""
        if not self._done and self._reading.is_completed():
            self._reading.wait()
            return self._over.mesh.arrived(READ, self._number)
        return self._done

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until all have read it.

        Raises:
            RuntimeError: names the peer that is silent. One that has ended reads nothing more.
        """
        if not self._done:
            self._reading.wait()
            self._over.mesh.wait(READ, self._number, self._over.timeout_s)
            self._done = True
        return True


class Reduction(_Reading):
    """A reduce-scatter; see `Shared.reduce_scatter`."""

    def __init__(self, over: Shared, segment: int, shard: Tensor, full: Tensor) -> None:
        over.tree.reserve(shard.dtype)
        self._piece = over.piece(shard.dtype)
        self._shard, self._full = shard, full
        super().__init__(over, segment)

    def pieces(self) -> Iterator[Tensor]:
        """Yield the sum in pieces, in one buffer that each overwrites; ``shard`` stays as it is.

        The pieces are in order and together as long as the shard; the caller must take them all.
        """
        self._meet()
        leaves = self._leaves()
        size = self._piece.numel()
        for start in range(0, self._shard.numel(), size):
            parts = [leaf[start : start + size] for leaf in leaves]
            piece = self._piece[: parts[0].numel()]
            self._over.tree.add(piece, parts)
            yield piece
        self._finish()

    def leaves(self) -> Iterator[list[Tensor]]:
        """Yield every rank's part, by rank, once, to be added up in place of `pieces` while they are asked for."""
        self._meet()
        yield self._leaves()
        self._finish()

    @property
    def released(self) -> _Released:
        """The part after which this rank may overwrite its buffer: all peers have read it."""
        return _Released(self, self._over, self._number)

    def _read(self) -> None:
        self._over.tree.add(self._shard, self._leaves())

    def _finish(self) -> None:
        super()._finish()
        self._over.mesh.tell(READ, self._number)

    def _leaves(self) -> list[Tensor]:
        full, rank, numel = self._full, self._over.mesh.rank, self._shard.numel()
        buffers = {rank: full}
        for peer, segment in self._segments.items():
            buffers[peer] = self._over.memory.view(peer, segment, full.dtype, full.numel())
        return [buffers[index][rank * numel : (rank + 1) * numel] for index in range(len(buffers))]


class Gather(_Reading):
    """An all-gather; see `Shared.all_gather`. ``full`` is None where all ranks have the same memory.

    No rank says that it has read: `step` overwrites shards after all ranks have agreed on it, and each has waited by
    then for every parameter that it has used. What it has not used it gathers again before it does.
    """

    def __init__(self, over: Shared, segment: int, full: Tensor | None, shard_numel: int) -> None:
        self._full, self._numel = full, shard_numel
        super().__init__(over, segment)

    def _read(self) -> None:
        if self._full is None:
            return
        for peer, segment in self._segments.items():
            part = slice(peer * self._numel, (peer + 1) * self._numel)
            theirs = self._over.memory.view(peer, segment, self._full.dtype, self._full.numel())
            native.copy(self._full[part], theirs[part])
