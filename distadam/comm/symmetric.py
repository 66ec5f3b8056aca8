"""Collectives of ranks on one host whose buffers lie on CUDA devices: they read each other's memory.

Note [Symmetric]: hosts tell each other nothing here. Each rank gives its device copies, sums and barriers in the order
of launching, which is the same on all ranks, on one stream beside the current one (`Lane`): no host waits, and a
device waits for its peers' in a barrier. Hosts agree once a step (Note [Agreement]), but a device may lag behind its
host by as much as a step, so what a host knows never allows a device to overwrite anything. Devices say so themselves:

- One barrier stands before peers are read: what they read has been written. It stands after the copy to the staging
  buffer, or after what the current stream wrote, which the lane waits for.
- One barrier stands after: all have read. The next copy to the staging buffer follows it on the lane, and the current
  stream, which waits for the end of a gather before it goes on, writes no parameter that a peer still reads: neither
  in `step` nor by hand. A gather that nobody has waited for (`prefetch`) lies on the lane before the reduction that the
  next update of the bucket waits for.

So a buffer is its owner's again after `wait`, as with NCCL. Each barrier is needed: tests/test_symmetric.py takes them
out one by one.

Note [Staged]: parameters lie in symmetric memory and are read where they are. Gradients are copied to a staging buffer
first, a part of the bucket at a time. Which of its pool's buffers a rank fills depends on its own backward, and a pool
may grow on one rank alone, while symmetric memory is made by all ranks together and read at addresses that a host knows
when it launches. The copy stays on the device, which writes a bucket faster than its peers read it over their links,
and the pool gets its buffer back once it is copied.

A sum is taken in the order of `Exchange` in float32 (float64 for float64), so with its bits. A barrier that waits
longer than the timeout stops the device with an error, which CUDA reports with some later call; so does that of a
reduction that not all ranks have launched before the optimizer went.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distadam.comm.device_memory import DeviceMemory, Handle
from distadam.comm.hosts import machine_identity
from distadam.comm.streams import Work
from distadam.comm.tree import TreeSum

STAGE_NBYTES = 64 << 20
"""Bytes of the staging buffer, which all ranks' parts of a bucket pass through."""

_SUM_NUMEL = 1 << 20  # elements for one launch of an addition
_CHANNEL = 0


class Symmetric:
    """Collectives between ranks of one host on one device each.

    Args:
        memory: makes buffers that peers map.
        rank: this rank of the group.
        num_ranks: of the group.
        timeout_s: seconds that a peer may be late.

    Collective: every rank of the group.

    Raises:
        RuntimeError: ranks cannot map each other's memory.
    """

    def __init__(self, memory: DeviceMemory, rank: int, num_ranks: int, timeout_s: float) -> None:
        self._memory = memory
        self._rank = rank
        self._ranks = [(rank + distance) % num_ranks for distance in range(num_ranks)]  # begins with this one
        self._timeout_ms = max(1, round(1000 * timeout_s))
        self._lane = memory.lane()
        self._tree = TreeSum(num_ranks, memory.device, _SUM_NUMEL)
        self._stage, self._stage_handle = memory.empty(STAGE_NBYTES, torch.uint8)
        self._buffers: dict[int, tuple[Tensor, Handle]] = {}  # by address

    def probe(self) -> None:
        """Read every peer's memory once.

        Collective: every rank of the group. Syncs: the host waits.

        Raises:
            RuntimeError: something else is there than what peers have written.
        """
        ranks = torch.empty(len(self._ranks), dtype=torch.int64, device=self._memory.device)
        self.all_gather(ranks, torch.full((1,), self._rank, dtype=torch.int64, device=self._memory.device)).wait()
        found = ranks.tolist()
        if found != sorted(self._ranks):
            raise RuntimeError(f"rank {self._rank} wrote its number and read {found} of its peers' memory")

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialised 1-D memory that peers can map.

        Collective: every rank of the group, in one order. Syncs: until all have made theirs.
        """
        tensor, handle = self._memory.empty(max(1, numel), dtype)
        self._buffers[tensor.data_ptr()] = (tensor, handle)
        return tensor[:numel]

    def release(self, tensor: Tensor) -> None:
        """Forget memory from `empty`."""
        self._buffers.pop(tensor.data_ptr(), None)

    def scratch(self) -> list[Tensor]:
        """Return the buffers that are kept, for the memory report."""
        return [self._stage, *self._tree.scratch]

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Work:
        """Sum ``full`` over ranks into this rank's ``shard``, which may be wider; both are contiguous.

        Collective: every rank of the group. Syncs: never.
        """
        rows = full.view(len(self._ranks), shard.numel())
        for start, end in self._parts(shard.numel(), len(self._ranks) * full.element_size()):
            copied = self._lane.run(partial(self._fill, rows[:, start:end]))
            done = self._lane.run(partial(self._add, shard[start:end], full.dtype))
        return _Reduction(done, copied)

    def all_gather(self, full: Tensor, shard: Tensor) -> Work:
        """Collect every rank's ``shard`` in ``full``; ``shard`` may be this rank's part of it.

        ``full`` begins memory from `empty` on all ranks or on none.

        Collective: every rank of the group. Syncs: never.
        """
        parts = torch.split(full, shard.numel())
        if parts[self._rank].data_ptr() != shard.data_ptr():
            parts[self._rank].copy_(shard)
        found = self._buffers.get(full.data_ptr())
        if found is not None:
            return self._lane.run(partial(self._copy, parts, found[1]))
        for start, end in self._parts(shard.numel(), full.element_size()):
            done = self._lane.run(partial(self._pass_on, [part[start:end] for part in parts]))
        return done

    @staticmethod
    def _parts(numel: int, nbytes: int) -> list[tuple[int, int]]:
        """Cut ``numel`` elements of ``nbytes`` each so that every part fits in the staging buffer."""
        most = STAGE_NBYTES // nbytes
        return [(start, min(start + most, numel)) for start in range(0, numel, most)]

    # What follows runs on the lane.

    def _fill(self, rows: Tensor) -> None:
        self._stage.view(rows.dtype)[: rows.numel()].view(rows.shape).copy_(rows)

    def _add(self, target: Tensor, dtype: torch.dtype) -> None:
        """Add up every rank's row for this one."""
        numel = target.numel()
        self._barrier()
        rows = [
            self._stage_handle.get_buffer(rank, (numel,), dtype, self._rank * numel) for rank in sorted(self._ranks)
        ]
        self._tree.add(target, rows)
        self._barrier()

    def _copy(self, parts: Sequence[Tensor], handle: Handle) -> None:
        """Copy every peer's part out of its own buffer."""
        self._barrier()
        for peer in self._ranks[1:]:
            part = parts[peer]
            part.copy_(handle.get_buffer(peer, part.shape, part.dtype, peer * parts[0].numel()))
        self._barrier()

    def _pass_on(self, parts: Sequence[Tensor]) -> None:
        """Copy this rank's part to the staging buffer and every peer's out of its one."""
        mine = parts[self._rank]
        self._stage.view(mine.dtype)[: mine.numel()].copy_(mine)
        self._barrier()
        for peer in self._ranks[1:]:
            parts[peer].copy_(self._stage_handle.get_buffer(peer, mine.shape, mine.dtype, 0))
        self._barrier()

    def _barrier(self) -> None:
        # One buffer's for all: there is one lane, and a barrier orders everything before it.
        self._stage_handle.barrier(_CHANNEL, self._timeout_ms)


class _Reduction:
    """A reduce-scatter.

    Args:
        done: the sum is there, and all have read what this rank sent.
        released: the part after which this rank may overwrite its buffer: it has been copied.
    """

    def __init__(self, done: Work, released: Work) -> None:
        self._done = done
        self.released = released

    def is_completed(self) -> bool:
        """Say whether waiting would return at once."""
        return self._done.is_completed()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Make the current stream wait."""
        return self._done.wait(timeout)


def meet_on_device(
    memory: DeviceMemory, group: ProcessGroup, timeout_s: float, swap: Callable[[Any], Sequence[Any]]
) -> Symmetric | str:
    """Return collectives of a group's devices, or on all ranks the first reason why there are none.

    Collective: every rank of the group, through ``swap``, which returns every rank's value, by rank.
    """
    answers = swap((machine_identity(), memory.obstacle()))
    if len({identity for identity, _ in answers}) > 1:
        return "they are processes of several hosts"
    reasons = [f"rank {rank}: {obstacle}" for rank, (_, obstacle) in enumerate(answers) if obstacle]
    if reasons:
        return reasons[0]
    found: list[Symmetric] = []

    def build() -> None:
        found.append(Symmetric(memory, group.rank(), group.size(), timeout_s))

    def probe() -> None:
        found[0].probe()  # once all have mapped all: a device whose peers do not come waits until the timeout

    for attempt in (build, probe):
        reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(swap(_failure(attempt))) if reason]
        if reasons:
            return reasons[0]
    return found[0]


def _failure(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except (RuntimeError, TypeError, AttributeError) as error:  # private: what it takes and has may change
        return f"{type(error).__name__}: {error}"
    return ""
