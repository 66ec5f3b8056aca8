"""Collectives of a group on several hosts with equally many ranks: by memory on a host, by messages between hosts.

Note [Mixed]: ranks that have the same place on their hosts exchange messages, and no others do. A reduction adds up, on
each host and from its ranks' buffers, the parts of the peers that this rank writes to: one partial sum for each host,
which is sent there; what comes is added up over hosts. A gather receives the peers' shards, then copies the rest from
the ranks of its own host, each of which has received others. Per host so many bytes cross its link as if it were one
rank, where `Exchange` sends them once for each rank.

Note [Partial sums]: they are sent as they were added up, in float32 (float64 for float64). Where each host's ranks are
a power of two that follow each other in the group, adding up host by host is the binary tree over ranks, so the result
has the bits of `Exchange` whatever travels. A host has two ranks at least, so a float32 partial sum is no more than
what they would send each in 16 bits. Where ranks lie otherwise sums are taken by messages alone (`Hosts.unaligned`).

Note [Who waits]: the thread of `Exchange` does all of it, in the order of launching. A chunk that needs its peers'
buffers goes alone: while it waits for a peer to launch, no job before it is held up, else that peer might wait for one
of these. A job is done once the ranks of this host have read from this one's buffer, so it may be overwritten then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distadam import native
from distadam.comm.exchange import Exchange, Job, Peers
from distadam.comm.hosts import Hosts
from distadam.comm.mesh import READ, READY
from distadam.comm.shared import SharedMemory
from distadam.comm.tree import TreeSum


class MixedJob(Job):
    """A job of `Mixed`.

    Args:
        payload_nbytes: bytes that this rank sends to other hosts.
    """

    def __init__(self, payload_nbytes: int) -> None:
        super().__init__()
        self.payload_nbytes = payload_nbytes


class Mixed:
    """Collectives of CPU tensors over one group; buffers outside of ``memory`` are exchanged by messages alone.

    Args:
        memory: of the ranks on this host.
        exchange: sends messages between all ranks of the group.
        hosts: the group's, with equally many ranks each.
        rank: this rank of the group.
        timeout_s: seconds that a peer on this host may be silent.
    """

    def __init__(self, memory: SharedMemory, exchange: Exchange, hosts: Hosts, rank: int, timeout_s: float) -> None:
        self.memory = memory
        self.exchange = exchange
        self._aligned = not hosts.unaligned
        self.timeout_s = timeout_s
        self.rank = rank
        self.columns = [hosts.across(other) for other in hosts.local(rank)]  # by place: one rank of each host
        self.across = hosts.across(rank)
        host = self.across.index(rank)
        self.peers = [*self.across[host + 1 :], *self.across[:host]]  # each begins with the next host
        self.tree_of_ranks = TreeSum(len(self.columns))
        self.tree_of_hosts = TreeSum(len(self.across))

    def scratch(self) -> list[Tensor]:
        """Return the buffers that are kept, for the memory report."""
        return [*self.exchange.scratch(), *self.tree_of_ranks.scratch, *self.tree_of_hosts.scratch]

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Job:
        """Sum ``full`` over ranks into this rank's ``shard``, which may be wider; both are contiguous.

        Collective: every rank of the group. Syncs: never (waiting for the handle does).
        """
        segment = self.memory.segment(full)
        if segment is None or not self._aligned:
            return self.exchange.reduce_scatter(shard, full)
        job = MixedJob(len(self.peers) * shard.nbytes)
        self.tree_of_ranks.reserve(shard.dtype)
        self.tree_of_hosts.reserve(shard.dtype)
        longest = shard.numel()
        numel = self.exchange.reserve(longest, 2 * len(self.peers) * shard.element_size())
        reading = _Reading(self, segment, full)
        for start in range(0, longest, numel):
            part = _PartOfSum(reading, shard, start, min(start + numel, longest))
            self.exchange.put(job, part.sends, part.receives, part.add, last=part.last, alone=start == 0)
        return job

    def all_gather(self, full: Tensor, shard: Tensor) -> Job:
        """Collect every rank's ``shard`` in ``full``; ``shard`` may be this rank's part of it.

        Collective: every rank of the group. Syncs: never (waiting for the handle does).
        """
        segment = self.memory.segment(full)
        if segment is None:
            return self.exchange.all_gather(full, shard)
        parts = torch.split(full, shard.numel())
        if parts[self.rank].data_ptr() != shard.data_ptr():
            parts[self.rank].copy_(shard)
        job, number = MixedJob(len(self.peers) * shard.nbytes), self.memory.next_number()
        sends = [(peer, parts[self.rank]) for peer in self.peers]
        receives = [(peer, parts[peer]) for peer in self.peers]

        def copy(_: dict[int, Tensor]) -> None:
            self.memory.mesh.tell(READY, number, segment)
            for place, theirs in self.look(number, full).items():
                for rank in self.columns[place]:
                    native.copy(parts[rank], torch.split(theirs, shard.numel())[rank])
            self.memory.mesh.tell(READ, number)
            self.memory.mesh.wait(READ, number, self.timeout_s)

        self.exchange.put(job, lambda: sends, lambda: receives, copy)
        return job

    def all_reduce(self, tensor: Tensor) -> Job:
        """Sum ``tensor`` over ranks, in place, by messages."""
        return self.exchange.all_reduce(tensor)

    def look(self, number: int, full: Tensor) -> dict[int, Tensor]:
        """Wait for the buffers of the other ranks on this host, which are like ``full``; return them by place."""
        segments = self.memory.mesh.wait(READY, number, self.timeout_s)
        return {
            place: self.memory.view(place, segment, full.dtype, full.numel()) for place, segment in segments.items()
        }


class _Reading:
    """The buffers that a sum reads on this host."""

    def __init__(self, over: Mixed, segment: int, full: Tensor) -> None:
        self.over = over
        self.number = over.memory.next_number()
        self.full = full
        self._buffers: list[Tensor] = []
        over.memory.mesh.tell(READY, self.number, segment)

    def buffers(self) -> Sequence[Tensor]:
        """Return them by place on the host; the first call waits for the peers to launch."""
        if not self._buffers:
            found = {self.over.memory.mesh.rank: self.full, **self.over.look(self.number, self.full)}
            self._buffers = [found[place] for place in range(len(found))]
        return self._buffers


class _PartOfSum:
    """Elements ``start`` to ``end`` of the shards in a reduce-scatter."""

    def __init__(self, reading: _Reading, shard: Tensor, start: int, end: int) -> None:
        self._reading = reading
        self._over = reading.over
        self._shard_numel = shard.numel()
        self._start = start
        self._target = shard[start:end]
        self._outgoing: Sequence[Tensor] = ()
        self.last = end == shard.numel()

    def receives(self) -> Peers:
        """Return where the peers' partial sums go to."""
        numel, peers = self._target.numel(), self._over.peers
        buffer = self._over.exchange.next_buffer(self._target.dtype)[: 2 * len(peers) * numel]
        parts = torch.split(buffer, numel)
        self._outgoing = parts[len(peers) :]
        return list(zip(peers, parts, strict=False))

    def sends(self) -> Peers:
        """Add up this host's ranks: this rank's own part, and one for each peer."""
        over = self._over
        buffers = self._reading.buffers()
        sends = list(zip(over.peers, self._outgoing, strict=True))
        for rank, target in [*sends, (over.rank, self._target)]:
            start = rank * self._shard_numel + self._start
            over.tree_of_ranks.add(target, [buffer[start : start + target.numel()] for buffer in buffers])
        if self.last:
            over.memory.mesh.tell(READ, self._reading.number)
        return sends

    def add(self, received: dict[int, Tensor]) -> None:
        """Add up hosts."""
        over = self._over
        received[over.rank] = self._target
        over.tree_of_hosts.add(self._target, [received[rank] for rank in over.across])
        if self.last:
            over.memory.mesh.wait(READ, self._reading.number, over.timeout_s)
