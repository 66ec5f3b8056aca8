"""A world in one process whose collectives happen as late, and in as odd an order, as recorded waits allow.

Each rank is a thread. A collective takes effect (every rank's input is read, every rank's output is written) at one
moment after all ranks have launched it: at a random one, or only when some rank waits for it, and in any order among
those in flight (gloo runs several at a time; NCCL's order is one of those allowed here). With ``one_by_one`` each rank
reads its peers' buffers at a moment of its own, as ranks that share memory do, so an owner that overwrites a buffer too
early shows too. A wait that is missing in the engine shows as a wrong result within few schedules. `World.dropped`
names wait sites that do nothing: the proof that the double can fail.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import distadam.optimizer
from distadam.comm import CollectiveStats, Groups, Streams
from distadam.engine import buffers

PATIENCE_S = 60.0
_local = threading.local()


class Operation:
    """One collective: what every rank brought, and whether it has happened."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts: dict[int, tuple[Tensor, ...]] = {}
        self.done: set[int] = set()


class World:
    """Ranks in threads and the collectives between them."""

    def __init__(
        self, num_ranks: int, seed: int, dropped: frozenset[str] = frozenset(), one_by_one: bool = False
    ) -> None:
        self.num_ranks = num_ranks
        self.one_by_one = one_by_one
        self.dropped = dropped
        self.sites: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._eagerness = self._random.choice([0.0, 0.1, 0.5])
        self._condition = threading.Condition()
        self._operations: list[Operation] = []
        self._launched = [0] * num_ranks
        self._meetings: list[dict[int, Any]] = []
        self._met = [0] * num_ranks
        self.failed = False

    def launch(self, rank: int, name: str, *tensors: Tensor) -> LatePending:
        with self._condition:
            index = self._launched[rank]
            self._launched[rank] += 1
            if index == len(self._operations):
                self._operations.append(Operation(name))
            operation = self._operations[index]
            assert operation.name == name, f"rank {rank} launches {name} where another rank launched {operation.name}"
            operation.parts[rank] = tensors
            for candidate in self._random.sample(self._operations, len(self._operations)):
                if self._random.random() < self._eagerness:
                    self._happen(candidate, self._random.randrange(self.num_ranks))
            self._condition.notify_all()
        return LatePending(self, operation, rank)

    def read_by_all(self, operation: Operation, rank: int) -> bool:
        """Read for ``rank`` if everything is there; say whether all ranks have."""
        with self._condition:
            self._happen(operation, rank)
            return len(operation.done) == self.num_ranks

    def wait_read_by_all(self, operation: Operation) -> None:
        with self._condition:
            arrived = self._condition.wait_for(
                lambda: self.failed or len(operation.done) == self.num_ranks, timeout=PATIENCE_S
            )
            assert arrived, f"hang: {operation.name} was read by ranks {sorted(operation.done)} only"
            assert not self.failed, "another rank failed"

    def wait(self, operation: Operation, rank: int) -> None:
        with self._condition:
            arrived = self._condition.wait_for(
                lambda: self.failed or len(operation.parts) == self.num_ranks, timeout=PATIENCE_S
            )
            assert arrived, f"hang: {operation.name} was launched by ranks {sorted(operation.parts)} only"
            assert not self.failed, "another rank failed"
            self._happen(operation, rank)

    def meet(self, rank: int, value: Any) -> list[Any]:
        """Exchange values between hosts."""
        with self._condition:
            index = self._met[rank]
            self._met[rank] += 1
            if index == len(self._meetings):
                self._meetings.append({})
            meeting = self._meetings[index]
            meeting[rank] = value
            self._condition.notify_all()
            arrived = self._condition.wait_for(lambda: self.failed or len(meeting) == self.num_ranks, PATIENCE_S)
            assert arrived, "hang: not all hosts meet"
            assert not self.failed, "another rank failed"
            return [meeting[other] for other in range(self.num_ranks)]

    def fail(self) -> None:
        with self._condition:
            self.failed = True
            self._condition.notify_all()

    def _happen(self, operation: Operation, rank: int) -> None:
        if rank in operation.done or len(operation.parts) < self.num_ranks:
            return
        parts = [operation.parts[rank] for rank in range(self.num_ranks)]
        kind = operation.name.split(" ", 1)[0]
        if self.one_by_one and kind in ("reduce_scatter", "all_gather"):
            operation.done.add(rank)
            self._read(kind, parts, rank)
            self._condition.notify_all()
            return
        operation.done.update(range(self.num_ranks))
        if kind == "reduce_scatter":
            total = sum(full.clone() for _, full in parts)
            for rank, (shard, _) in enumerate(parts):
                shard.copy_(total.view(self.num_ranks, -1)[rank])
        elif kind == "all_gather":
            whole = torch.cat([shard.clone() for _, shard in parts])
            for full, _ in parts:
                full.copy_(whole)
        elif kind in ("sum", "max"):
            stacked = torch.stack([tensor.clone() for (tensor,) in parts])
            for (tensor,) in parts:
                tensor.copy_(stacked.sum(0) if kind == "sum" else stacked.amax(0))
        else:
            raise AssertionError(kind)

    def _read(self, kind: str, parts: list[tuple[Tensor, ...]], rank: int) -> None:
        """Let one rank read its peers' buffers as they are now."""
        if kind == "reduce_scatter":
            numel = parts[rank][0].numel()
            parts[rank][0].copy_(sum(full[rank * numel : (rank + 1) * numel] for _, full in parts))
        else:
            for other, (_, shard) in enumerate(parts):
                parts[rank][0].view(self.num_ranks, -1)[other].copy_(shard)


class LatePending:
    """Stands for `distadam.comm.Pending`; a dropped site's wait does nothing."""

    def __init__(self, world: World, operation: Operation, rank: int) -> None:
        self._world = world
        self._operation = operation
        self._rank = rank

    @property
    def reading(self) -> LatePending:
        return LateReading(self._world, self._operation, self._rank) if self._world.one_by_one else self

    def ready(self, within_s: float) -> bool:
        return within_s > 0 or self._rank in self._operation.done

    def pieces(self) -> Iterator[Tensor] | None:
        """Sums as they are read, where ranks read one by one."""
        if not self._world.one_by_one or self._rank in self._operation.done:
            return None
        return self._take()

    def leaves(self) -> Iterator[list[Tensor]] | None:
        """One part that is the sum, where ranks read one by one."""
        if not self._world.one_by_one or self._rank in self._operation.done:
            return None
        return self._take_whole()

    def _take_whole(self) -> Iterator[list[Tensor]]:
        self._world.wait(self._operation, self._rank)
        yield [self._operation.parts[self._rank][0].clone()]

    def _take(self) -> Iterator[Tensor]:
        self._world.wait(self._operation, self._rank)
        whole = self._operation.parts[self._rank][0].clone()
        piece = torch.empty(64)
        for part in whole.split(64):
            yield piece.copy_(part)

    def wait(self) -> None:
        site = wait_site()
        self._world.sites[site] += 1
        if site not in self._world.dropped:
            self._world.wait(self._operation, self._rank)


class LateReading(LatePending):
    """The part after which the input may be overwritten."""

    def ready(self, within_s: float) -> bool:
        dropped = "read by all: " + wait_site() in self._world.dropped
        return dropped or self._world.read_by_all(self._operation, self._rank)

    def wait(self) -> None:
        site = "read by all: " + wait_site()
        self._world.sites[site] += 1
        if site not in self._world.dropped:
            self._world.wait(self._operation, self._rank)
            self._world.wait_read_by_all(self._operation)


def wait_site() -> str:
    """Return the two innermost engine frames that lead to a wait, as ``caller > waiter``."""
    frames = []
    frame = sys._getframe(2)
    while frame is not None and len(frames) < 2:
        path = Path(frame.f_code.co_filename)
        if "distadam" in path.parts:
            frames.append(f"{path.stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(frames))


class LateCollectives:
    """Stands for `distadam.comm.Collectives` in a `World`."""

    memory = None
    on_one_host = False
    unshared = "a test"

    def __init__(self, groups: Groups, streams: Streams, *_: Any) -> None:
        self.groups = groups
        self.streams = streams
        self.stats = CollectiveStats()
        self._world: World = _local.world

    def transport(self, device: torch.device) -> tuple[str, str]:
        return "native", "a test"

    def map_devices(self, devices: Iterable[torch.device]) -> None:
        pass

    def landing_dtype(self, wire: torch.dtype, compute: torch.dtype, device: torch.device) -> torch.dtype:
        return wire

    def empty(self, kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def release(self, tensor: Tensor) -> None:
        pass

    def owns(self, tensor: Tensor) -> bool:
        return True

    def scratch(self) -> list[Tensor]:
        return []

    def reduce_scatter(self, shard: Tensor, full: Tensor, what: str) -> LatePending:
        return self._world.launch(self.groups.shard_rank, f"reduce_scatter {what}", shard, full)

    def all_gather(self, full: Tensor, shard: Tensor, what: str) -> LatePending:
        return self._world.launch(self.groups.shard_rank, f"all_gather {what}", full, shard)

    def sum_shards(self, tensor: Tensor, what: str, op: Any = dist.ReduceOp.SUM) -> LatePending:
        kind = "sum" if op == dist.ReduceOp.SUM else "max"
        return self._world.launch(self.groups.shard_rank, f"{kind} {what}", tensor)

    def agree(self, votes: Tensor, what: str) -> None:
        everyone = self._world.meet(self.groups.shard_rank, votes.clone())
        votes.copy_(torch.stack(everyone).amax(0))

    def broadcast(self, tensor: Tensor, what: str) -> None:
        tensor.copy_(self._world.meet(self.groups.shard_rank, tensor.clone())[0])

    def exchange(self, value: Any, what: str) -> list[Any]:
        return self._world.meet(self.groups.shard_rank, value)


def _resolve(policy: Any, timeout_s: float | None, owner: object) -> Groups:
    return Groups(
        shard=None,
        replicate=None,
        shard_control=None,
        replicate_control=None,
        parent=None,
        shard_rank=_local.rank,
        num_shards=_local.world.num_ranks,
        replicate_rank=0,
        num_replicas=1,
    )


@contextmanager
def _patched() -> Any:
    with (
        mock.patch.object(distadam.optimizer, "Collectives", LateCollectives),
        mock.patch.object(distadam.optimizer.Groups, "resolve", _resolve),
        mock.patch.object(buffers, "PATIENCE_S", 0.01),
        mock.patch.object(distadam.optimizer.places, "refuse_ddp", return_value=None),  # scans all objects: slow
    ):
        yield


def run_world(world: World, function: Callable[[int], Any]) -> list[Any]:
    """Run ``function(rank)`` on every rank of ``world``; results by rank. The first error of any rank is raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        _local.world, _local.rank = world, rank
        try:
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)
            world.fail()

    with _patched():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world.num_ranks)]
