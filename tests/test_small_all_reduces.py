"""Small all-reduces between ranks of one host, through memory that they share (comm/small.py)."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam import CommPolicy
from distadam.comm.mesh import AGREE, SUM
from distadam.comm.small import SmallAllReduce, SmallAllReduces
from distadam.errors import CommError
from tests.host_memory import meet_ranks
from tests.ranks import RanksFailed, run_ranks


def _values(rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(97 * number + rank)
    if number % 2:
        return torch.randn(5000, dtype=torch.float64, generator=generator)
    numel = random.Random(number).choice((1, 7, 120, 100_000))  # buffers grow on the way, and are not full again
    return torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)


def _combined(num_ranks: int, number: int) -> Tensor:
    total = _values(0, number)
    for rank in range(1, num_ranks):
        total = total + _values(rank, number) if number % 2 else total.maximum(_values(rank, number))
    return total


def _reduce(rank: int, fault: str, numbers: range) -> int:
    """Return how many results were wrong here; rank 1 is late in reading what it knows to be there."""
    memory = meet_ranks(rank)
    small = SmallAllReduces(memory, SUM, 30.0)
    real_buffer, wait, wrong = small._buffer, memory.mesh.wait, 0
    if fault == "one buffer":
        small._buffer = lambda turn, nbytes: real_buffer(0, nbytes)  # type: ignore[method-assign]

    def wait_and_be_late(*args: Any) -> dict[int, int]:
        segments = wait(*args)
        time.sleep(0.002 if rank == 1 else 0.0)
        return segments

    with mock.patch.object(memory.mesh, "wait", wait_and_be_late):
        started: list[tuple[SmallAllReduce, Tensor, int]] = []
        for turn, number in enumerate(numbers):
            if rank == 0 and turn % 7 == 3:
                memory.next_number()  # it has launched one reduction more
            if fault == "none completed":
                small._last = None
            values = _values(rank, number)
            work = small.start(values, dist.ReduceOp.SUM if number % 2 else dist.ReduceOp.MAX)
            started.append((work, values, number))
            if turn % 3 == 2:  # a norm, which is read after the next step's agreement
                continue
            for work, values, number in reversed(started):
                work.wait()
                wrong += int(not torch.equal(values, _combined(dist.get_world_size(), number)))
            started.clear()
    dist.barrier()
    return wrong


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_has_the_sum_or_the_maximum_in_the_order_of_ranks(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _reduce, "", range(60)) == [0] * num_ranks


@pytest.mark.parametrize("fault", ["one buffer", "none completed"])
def test_a_late_rank_would_read_what_comes_after(fault: str) -> None:
    assert run_ranks(2, _reduce, fault, range(1, 121, 2))[1] > 0  # all of one size


def _bring(rank: int, numel: int) -> None:
    small = SmallAllReduces(meet_ranks(rank), AGREE, 30.0)
    work = small.start(torch.zeros(numel + rank, dtype=torch.uint8), dist.ReduceOp.MAX)
    with contextlib.suppress(RuntimeError):
        work.wait()
    work.wait()  # another thread's, say: it must not go on with what was not combined


def test_ranks_that_bring_unequal_numbers_of_bytes_are_told_so() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, _bring, 40)
    assert failed.value.errors[0] == ("RuntimeError", "expected 40 bytes of every rank but got 41 of rank 1")
    assert failed.value.errors[1] == ("RuntimeError", "expected 41 bytes of every rank but got 40 of rank 0")


def _wait_twice(rank: int) -> bool:
    """Two threads of rank 0 wait for one result, the peer being late: as `grad_norm` is read while a step begins."""
    small = SmallAllReduces(meet_ranks(rank), SUM, 5.0)
    for _ in range(5):
        if rank == 1:
            time.sleep(0.05)
        values = torch.ones(3)
        work = small.start(values, dist.ReduceOp.SUM)
        beside = threading.Thread(target=work.wait, daemon=True)
        beside.start()
        work.wait()
        beside.join(20.0)
        if beside.is_alive() or not torch.equal(values, torch.full((3,), 2.0)):
            return False
    return True


def test_two_threads_may_wait_for_one_result() -> None:
    assert run_ranks(2, _wait_twice) == [True, True]


def _train(rank: int, reduce: Any, sends: bool) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = distadam.AdamW(model.parameters(), lr=0.1, comm=CommPolicy(reduce=reduce))
    refusal = mock.patch.object(dist, "all_reduce", side_effect=RuntimeError("a message"))
    if not sends:
        refusal.start()
    try:
        for step in range(3):
            model(torch.full((2, 30), 1.0 + rank + step)).sum().backward()
            clipped = float(optimizer.clip_grad_norm_(1.0) if step == 1 else 0.0)
            optimizer.step()
            assert step != 1 or clipped == float(optimizer.grad_norm) > 0
            assert float(optimizer.grad_norm) > 0
    finally:
        if not sends:
            refusal.stop()
    assert optimizer.comm_stats.calls["agree"] >= 3
    return model.weight.detach()


def test_a_step_on_one_host_sends_no_message_to_agree_or_for_its_norm() -> None:
    """That of `exchange` does: what counts here is not a mock that nobody calls."""
    quiet = run_ranks(2, _train, "shared", False)
    assert torch.equal(quiet[0], quiet[1])
    assert torch.equal(quiet[0], run_ranks(2, _train, "exchange", True)[0])
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, _train, "exchange", False)
    assert failed.value.errors[0][0] == CommError.__name__
