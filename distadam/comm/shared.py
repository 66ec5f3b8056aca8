"""Collectives of ranks on one host: they read each other's buffers.

Note [Shared]: buffers that travel (flat parameters, flat gradients) lie in memory that every rank of the group maps. A
reduction reads this rank's slice of every peer's buffer once and adds, in the order of `Exchange`, so with its bits; a
gather copies each slice out of its owner's buffer. What is sent is a token: "my buffer is ready", which says where it
is, and "I have read yours". Tokens are messages of the group, so memory is ordered on every processor, timeouts name
the peer, and nobody polls.

Note [Nothing is left behind]: memory is an anonymous file without a name (memfd), which peers open through
``/proc/<pid>/fd`` and which its owner closes when all have mapped it. It goes with the last process that maps it,
killed or not, and does not depend on the size of ``/dev/shm``.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distadam.comm.exchange import Exchange, Job, Peers


def machine_identity() -> str:
    """Return what ranks share that can open each other's memory: kernel boot and process namespace, no host name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"
    except OSError:
        return secrets.token_hex(16)  # shares with nobody


def _map(path: str, nbytes: int) -> Tensor:
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


class SharedMemory:
    """This rank's memory that peers can read, and theirs. ``pids`` are their processes, by rank."""

    def __init__(self) -> None:
        self.pids: Sequence[int] = []
        self._segments: dict[int, tuple[Tensor, Tensor]] = {}  # by address: the tensor, kept alive, and its token
        self._descriptors: dict[int, int] = {}
        self._mapped: dict[tuple[int, int], Tensor] = {}
        self._next = 0
        weakref.finalize(self, _close_all, self._descriptors)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialised 1-D host memory that peers can map."""
        nbytes = max(1, numel) * dtype.itemsize
        descriptor = os.memfd_create("distadam", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, nbytes)
        tensor = _map(f"/proc/self/fd/{descriptor}", nbytes).view(dtype)[:numel]
        segment, self._next = self._next, self._next + 1
        self._descriptors[segment] = descriptor
        self._segments[tensor.data_ptr()] = (tensor, torch.tensor([segment, descriptor, nbytes]))
        return tensor

    def release(self, tensor: Tensor) -> None:
        """Forget memory from `empty`; it goes when nobody maps it any more."""
        found = self._segments.pop(tensor.data_ptr(), None)
        if found is not None:
            self.mapped_by_all(found[1])

    def token(self, tensor: Tensor) -> Tensor | None:
        """Return what tells peers where the memory is that ``tensor`` begins, or None if it is not from `empty`."""
        found = self._segments.get(tensor.data_ptr())
        return None if found is None else found[1]

    @property
    def mapped(self) -> list[Tensor]:
        """Peers' memory as it is mapped here: theirs, so not in the memory report."""
        return list(self._mapped.values())

    def view(self, peer: int, token: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
        """Return the first ``numel`` elements of the peer's memory that its token names."""
        segment, descriptor, nbytes = token.tolist()
        key = (peer, segment)
        if key not in self._mapped:
            self._mapped[key] = _map(f"/proc/{self.pids[peer]}/fd/{descriptor}", nbytes)
        return self._mapped[key][: numel * dtype.itemsize].view(dtype)

    def forget_peers(self) -> None:
        """Unmap what peers have shown."""
        self._mapped.clear()

    def mapped_by_all(self, token: Tensor) -> None:
        """Close what all peers have mapped, or never will: the memory then goes with the last mapping."""
        descriptor = self._descriptors.pop(int(token[0]), None)
        if descriptor is not None:
            os.close(descriptor)


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def meet(identity: str, swap: Callable[[Any], Sequence[Any]]) -> SharedMemory | None:
    """Return memory that all ranks can read, or None on all of them.

    Args:
        identity: this rank's `machine_identity`.
        swap: returns every rank's value, by rank.

    Collective: every rank of the group, through ``swap``.
    """
    try:
        memory = SharedMemory()
        probe = memory.empty(8, torch.uint8)
        written = probe.copy_(torch.frombuffer(bytearray(secrets.token_bytes(8)), dtype=torch.uint8)).tolist()
        mine = (identity, os.getpid(), memory.token(probe), written)
    except (OSError, RuntimeError, AttributeError):  # no memfd, no /proc
        memory, mine = SharedMemory(), None
    answers = swap(mine)
    readable = False
    if None not in answers and len({answer[0] for answer in answers}) == 1:
        memory.pids = [answer[1] for answer in answers]
        try:
            readable = all(
                memory.view(peer, token, torch.uint8, 8).tolist() == written
                for peer, (_, _, token, written) in enumerate(answers)
            )
        except (OSError, RuntimeError):
            readable = False
    if not all(swap(readable)):
        return None
    memory.release(probe)
    memory.forget_peers()
    return memory


class Shared(Exchange):
    """`Exchange` between ranks of one host; buffers outside of `SharedMemory` are exchanged by messages."""

    def __init__(self, group: ProcessGroup, timeout_s: float | None, memory: SharedMemory) -> None:
        super().__init__(group, timeout_s)
        self._memory = memory

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Job:
        """Sum ``full`` over ranks into this rank's ``shard``, which may be wider; both are contiguous."""
        token = self._memory.token(full)
        if token is None:
            return super().reduce_scatter(shard, full)
        self._reserve(0, shard, full.dtype)
        start, numel = self._rank * shard.numel(), shard.numel()

        def add(tokens: dict[int, Tensor]) -> None:
            buffers = {peer: self._memory.view(peer, told, full.dtype, full.numel()) for peer, told in tokens.items()}
            buffers[self._rank] = full
            self._add(shard, [buffers[rank][start : start + numel] for rank in range(self._num_ranks)])

        return self._read(token, add)

    def all_gather(self, full: Tensor, shard: Tensor) -> Job:
        """Collect every rank's ``shard`` in ``full``; ``shard`` may be this rank's part of it."""
        token = self._memory.token(full)
        if token is None:
            return super().all_gather(full, shard)
        numel = shard.numel()
        mine = full[self._rank * numel : (self._rank + 1) * numel]
        if mine.data_ptr() != shard.data_ptr():
            mine.copy_(shard)

        def copy(tokens: dict[int, Tensor]) -> None:
            for peer, told in tokens.items():
                theirs = self._memory.view(peer, told, full.dtype, full.numel())
                part = slice(peer * numel, (peer + 1) * numel)
                full[part].copy_(theirs[part])

        return self._read(token, copy)

    def _read(self, token: Tensor, use: Callable[[dict[int, Tensor]], None]) -> Job:
        """Say that the buffer is ready, use those of all peers, say so and hear it from them."""
        job, peers = Job(), self._peers()
        sends = [(peer, token) for peer in peers]

        def receives() -> Peers:
            return [(peer, torch.empty_like(token)) for peer in peers]

        def read_by_all(_: dict[int, Tensor]) -> None:
            self._memory.mapped_by_all(token)

        self._put(job, sends, receives, use, last=False)
        self._put(job, sends, receives, read_by_all, alone=True)
        return job
