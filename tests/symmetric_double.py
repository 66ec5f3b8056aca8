"""Devices that map each other's memory, played by CPU ranks, for `distadam.comm.symmetric` as it is.

`ThreadLane` is a stream: what it is given happens later, in order, on a thread, and a late device is one that sleeps.
`DoubleMemory` makes memory that the ranks really map (`distadam.comm.shared`), so one rank sees what another has
written and nothing else. A barrier counts where it stands; one that is `dropped` does nothing: the proof that tests see
it.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from distadam.comm import collectives as collectives_module
from distadam.comm.mesh import READY
from distadam.comm.shared import meet

_BARRIERS = 1 << 40  # numbers of barriers; those of buffers are counted on another thread
_MEET_S = 30.0


class Devices:
    """How the devices of this process behave.

    Attributes:
        latest_s: each piece of work, and each look at a peer's memory, begins so much later at most.
        dropped: the barrier that does nothing, by (function, line).
        seen: barriers that were passed.
        obstacle: why there is no such memory.
        broken: what making memory fails with.
    """

    latest_s = 0.0
    dropped: tuple[str, int] | None = None
    seen: ClassVar[Counter[tuple[str, int]]] = Counter()
    random = random.Random(0)
    obstacle = ""
    broken = ""

    @classmethod
    def be_late(cls) -> None:
        if cls.latest_s:
            time.sleep(cls.random.choice([0.0, cls.random.random()]) * cls.latest_s)


class Mark:
    """The point on a lane after some work."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.error: Exception | None = None

    def is_completed(self) -> bool:
        return self.over.is_set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        assert self.over.wait(120.0), "a lane hangs"
        if self.error is not None:
            raise RuntimeError(str(self.error)) from self.error
        return True


class ThreadLane:
    """Does what it is given in order, on a thread; after an error nothing, as a device."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], object], Mark] | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._work,), daemon=True).start()
        weakref.finalize(self, self._work.put, None)

    def run(self, call: Callable[[], object]) -> Mark:
        mark = Mark()
        self._work.put((call, mark))
        return mark


def _serve(work: Any) -> None:
    error: Exception | None = None
    while (item := work.get()) is not None:
        call, mark = item
        try:
            if error is None:
                Devices.be_late()
                call()
        except Exception as caught:
            error = caught
        mark.error = error
        mark.over.set()
        del call, item, mark


class DoubleHandle:
    """One buffer on every rank."""

    def __init__(self, over: DoubleMemory, mine: Tensor, segments: dict[int, int]) -> None:
        self._over = over
        self._mine = mine
        self._segments = segments

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        (numel,) = sizes
        end = storage_offset + numel
        assert end * dtype.itemsize <= self._mine.nbytes, "beyond the buffer"
        shared = self._over.shared
        if rank == shared.mesh.rank:
            return self._mine.view(torch.uint8).view(dtype)[storage_offset:end]
        Devices.be_late()
        return shared.view(rank, self._segments[rank], dtype, end)[storage_offset:]

    def barrier(self, channel: int, timeout_ms: int) -> None:
        assert channel == 0
        caller = sys._getframe(2)
        place = (caller.f_code.co_name, caller.f_lineno)
        Devices.seen[place] += 1
        if place != Devices.dropped:
            mesh, number = self._over.shared.mesh, next(self._over.barriers)
            mesh.tell(READY, number)
            mesh.wait(READY, number, timeout_ms / 1000)


class DoubleMemory:
    """In place of `distadam.comm.device_memory.DeviceMemory`, on CPU ranks."""

    DEVICE_TYPE = "cpu"

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.device = device
        self.barriers = itertools.count(_BARRIERS)
        rank, size = dist.get_rank(group), dist.get_world_size(group)

        def swap(value: Any) -> list[Any]:
            answers: list[Any] = [None] * size
            dist.all_gather_object(answers, value, group=group)
            return answers

        shared = meet([f"rank {other}" for other in range(size)], rank, range(size), swap)
        assert shared is not None
        self.shared = shared

    def obstacle(self) -> str:
        return Devices.obstacle

    def empty(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, DoubleHandle]:
        tensor = self.shared.empty(numel, dtype)
        segment = self.shared.segment(tensor)
        assert segment is not None
        number = self.shared.next_number()
        self.shared.mesh.tell(READY, number, segment)
        segments = self.shared.mesh.wait(READY, number, _MEET_S)
        if Devices.broken:
            raise RuntimeError(Devices.broken)
        return tensor, DoubleHandle(self, tensor, segments)

    def lane(self) -> ThreadLane:
        return ThreadLane()


@contextmanager
def devices(latest_s: float = 0.0, dropped: tuple[str, int] | None = None, seed: int = 0) -> Iterator[None]:
    """Let CPU tensors lie on devices that behave so."""
    with (
        mock.patch.object(collectives_module, "DeviceMemory", DoubleMemory),
        mock.patch.multiple(
            Devices, latest_s=latest_s, dropped=dropped, seen=Counter(), random=random.Random(seed + os.getpid())
        ),
    ):
        yield
