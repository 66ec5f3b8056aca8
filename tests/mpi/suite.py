"""The mpi4py backend under mpiexec: every rank runs this file, ``mpiexec -n 3 python -m tests.mpi.suite``.

In the manner of mpi4py's own suite: a base class of tests, bound to groups of every kind: MPI's world, this rank
alone, a duplicate of the world, the world in reverse order, all ranks but the last. Values are integers small enough
that every order of summation is exact, or 16-bit numbers whose sum is exact in float32, so everything is compared bit
for bit.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import unittest
import warnings
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.errors import CommError, ConfigError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SIXTEEN = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64)
CARRIED = (*INTEGERS, *SIXTEEN, *FLOATS, torch.bool, torch.float8_e4m3fn)
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32, low: int = 0, high: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    return torch.randint(low, high, (numel,), generator=generator).to(dtype)


def same(got: Tensor, expected: Tensor) -> None:
    as_bytes = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (got, expected)]
    assert got.dtype == expected.dtype, (got.dtype, expected.dtype)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert torch.equal(*as_bytes), (got, expected)


class Bound:
    """Tests of one group; subclasses say which."""

    group: ClassVar[Any]
    bound: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        self.group = self.bound[type(self).__name__]
        if not isinstance(self.group, dist.ProcessGroup):
            self.skipTest("this rank is not in the group")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ranks = range(self.size)

    def of_all(self, *args: Any, **options: Any) -> list[Tensor]:
        return [values(rank, *args, **options) for rank in self.ranks]

    # Collectives

    def test_broadcast_from_every_rank(self) -> None:
        for root in self.ranks:
            for dtype in CARRIED:
                tensor = values(self.rank, 13, dtype, high=2)
                dist.broadcast(tensor, group_src=root, group=self.group)
                same(tensor, values(root, 13, dtype, high=2))
            strided = values(self.rank, 12).view(3, 4).t()
            dist.broadcast(strided, group_src=root, group=self.group)
            same(strided, values(root, 12).view(3, 4).t())

    def test_all_reduce_every_operation_and_dtype(self) -> None:
        ops = {
            dist.ReduceOp.SUM: lambda stack: stack.sum(0),
            dist.ReduceOp.PRODUCT: lambda stack: stack.prod(0),
            dist.ReduceOp.MIN: lambda stack: stack.amin(0),
            dist.ReduceOp.MAX: lambda stack: stack.amax(0),
        }
        for dtype in (*INTEGERS, *FLOATS, *SIXTEEN):
            for op, combine in ops.items():
                for numel in (0, 1, 7, 1000):
                    low, high = (1, 3) if op == dist.ReduceOp.PRODUCT else (0, 8)
                    tensor = values(self.rank, numel, dtype, low, high)
                    dist.all_reduce(tensor, op, group=self.group)
                    wide = torch.float64 if dtype.is_floating_point else torch.int64
                    stack = torch.stack([each.to(wide) for each in self.of_all(numel, dtype, low, high)])
                    same(tensor, combine(stack).to(dtype))

    def test_all_reduce_bitwise(self) -> None:
        ops = {
            dist.ReduceOp.BAND: torch.bitwise_and,
            dist.ReduceOp.BOR: torch.bitwise_or,
            dist.ReduceOp.BXOR: torch.bitwise_xor,
        }
        for dtype in (*INTEGERS, torch.bool):
            for op, combine in ops.items():
                high = 2 if dtype is torch.bool else 100
                tensor = values(self.rank, 50, dtype, high=high)
                dist.all_reduce(tensor, op, group=self.group)
                expected, *rest = self.of_all(50, dtype, high=high)
                for other in rest:
                    expected = combine(expected, other)
                same(tensor, expected)

    def test_all_reduce_of_bool_is_logical(self) -> None:
        for op, combine in ((dist.ReduceOp.SUM, torch.any), (dist.ReduceOp.PRODUCT, torch.all)):
            tensor = values(self.rank, 40, torch.bool, high=2)
            dist.all_reduce(tensor, op, group=self.group)
            same(tensor, combine(torch.stack(self.of_all(40, torch.bool, high=2)), 0))

    def test_all_reduce_average_divides_the_exact_sum_once(self) -> None:
        for dtype in (*FLOATS, *SIXTEEN):
            tensor = values(self.rank, 300, dtype)
            dist.all_reduce(tensor, dist.ReduceOp.AVG, group=self.group)
            wide = torch.promote_types(dtype, torch.float32)
            same(tensor, (torch.stack(self.of_all(300, wide)).sum(0) / self.size).to(dtype))

    def test_sixteen_bits_are_summed_in_float32_and_rounded_once(self) -> None:
        for dtype in SIXTEEN:
            steps = 128 if dtype is torch.bfloat16 else 1024  # values have all the bits that the dtype has
            every = [1 + values(rank, 2000, torch.float32, high=steps) / steps for rank in self.ranks]
            total = torch.stack(every).sum(0).to(dtype)
            mine = every[self.rank].to(dtype)
            summed = mine.clone()
            dist.all_reduce(summed, group=self.group)
            same(summed, total)
            scattered = torch.empty(2000, dtype=dtype)
            reduce_scatter_single(scattered, mine.repeat(self.size), group=self.group)
            same(scattered, total)
            for root in self.ranks:
                reduced = mine.clone()
                dist.reduce(reduced, group_dst=root, group=self.group)
                same(reduced, total if root == self.rank else mine)
            naive = every[0].to(dtype)
            for each in every[1:]:
                naive = naive + each.to(dtype)
            assert self.size < 3 or not torch.equal(naive, total)  # rounding after each addition would show

    def test_all_reduce_of_strided_tensors(self) -> None:
        tensor = values(self.rank, 60).view(3, 20)[:, ::2]
        expected = torch.stack([each.view(3, 20)[:, ::2] for each in self.of_all(60)]).sum(0)
        dist.all_reduce(tensor, group=self.group)
        same(tensor, expected)
        leaf = nn.Parameter(values(self.rank, 5))
        dist.all_reduce(leaf, group=self.group)
        same(leaf.detach(), torch.stack(self.of_all(5)).sum(0))

    def test_all_reduce_of_complex_numbers(self) -> None:
        tensor = torch.view_as_complex(values(self.rank, 10).view(5, 2))
        dist.all_reduce(tensor, group=self.group)
        same(tensor, torch.view_as_complex(torch.stack(self.of_all(10)).sum(0).view(5, 2)))

    def test_all_reduce_coalesced(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [values(self.rank, numel, dtype) for numel in (3, 0, 500)]
            opts = dist.distributed_c10d.AllreduceCoalescedOptions()
            self.group.allreduce_coalesced(tensors, opts).wait()
            for tensor, numel in zip(tensors, (3, 0, 500), strict=True):
                same(tensor, torch.stack(self.of_all(numel, torch.float32)).sum(0).to(dtype))

    def test_coalescing_manager(self) -> None:
        tensors = [values(self.rank, 9) for _ in range(4)]
        with dist.distributed_c10d._coalescing_manager(group=self.group, async_ops=True) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)
        manager.wait()
        for tensor in tensors:
            same(tensor, torch.stack(self.of_all(9)).sum(0))
        shards, fulls = [values(self.rank, 5) for _ in range(3)], [torch.empty(5 * self.size) for _ in range(3)]
        with dist.distributed_c10d._coalescing_manager(group=self.group):
            for full, shard in zip(fulls, shards, strict=True):
                all_gather_single(full, shard, group=self.group)
        for full in fulls:
            same(full, torch.cat(self.of_all(5)))
        with dist.distributed_c10d._coalescing_manager(group=self.group):
            for full, shard in zip(fulls, shards, strict=True):
                reduce_scatter_single(shard, full, group=self.group)
        for shard in shards:
            same(shard, self.size * values(self.rank, 5))

    def test_reduce_to_every_rank_leaves_the_others_alone(self) -> None:
        for root in self.ranks:
            for dtype in (torch.float32, torch.int32):
                tensor = values(self.rank, 77, dtype).view(7, 11).t()
                dist.reduce(tensor, group_dst=root, op=dist.ReduceOp.MAX, group=self.group)
                expected = (
                    torch.stack(self.of_all(77, dtype)).amax(0) if root == self.rank else values(self.rank, 77, dtype)
                )
                same(tensor, expected.view(7, 11).t())

    def test_all_gather(self) -> None:
        for dtype in CARRIED:
            parts = [torch.empty(2, 3, dtype=dtype) for _ in self.ranks]
            dist.all_gather(parts, values(self.rank, 6, dtype).view(3, 2).t(), group=self.group)
            for part, expected in zip(parts, self.of_all(6, dtype), strict=True):
                same(part, expected.view(3, 2).t().contiguous())

    def test_all_gather_of_different_sizes(self) -> None:
        parts = [torch.empty(rank) for rank in self.ranks]
        dist.all_gather(parts, values(self.rank, self.rank), group=self.group)
        for rank, part in enumerate(parts):
            same(part, values(rank, rank))

    def test_all_gather_into_one_tensor(self) -> None:
        for dtype in CARRIED:
            full = torch.empty(self.size, 5, dtype=dtype)
            all_gather_single(full, values(self.rank, 5, dtype), group=self.group)
            same(full, torch.stack(self.of_all(5, dtype)))
        in_place = torch.zeros(self.size * 4)
        mine = in_place[4 * self.rank : 4 * self.rank + 4].copy_(values(self.rank, 4))
        all_gather_single(in_place, mine, group=self.group)
        same(in_place, torch.cat(self.of_all(4)))
        spread = torch.empty(self.size * 4, 2)[:, 0]
        all_gather_single(spread, values(self.rank, 4), group=self.group)
        same(spread.contiguous(), torch.cat(self.of_all(4)))

    def test_all_gather_coalesced(self) -> None:
        lists = [[torch.empty(4), torch.empty(2, 2)] for _ in self.ranks]
        mine = [values(self.rank, 4), values(self.rank, 4).view(2, 2) + 1]
        self.group.allgather_coalesced(lists, mine).wait()
        for rank in self.ranks:
            same(lists[rank][0], values(rank, 4))
            same(lists[rank][1], values(rank, 4).view(2, 2) + 1)

    def test_gather_to_every_rank(self) -> None:
        for root in self.ranks:
            parts = [torch.empty(3 + rank) for rank in self.ranks] if root == self.rank else None
            dist.gather(values(self.rank, 3 + self.rank), parts, group_dst=root, group=self.group)
            for rank, part in enumerate(parts or []):
                same(part, values(rank, 3 + rank))

    def test_scatter_from_every_rank(self) -> None:
        for root in self.ranks:
            parts = [values(10 * root + rank, 3 + rank) for rank in self.ranks] if root == self.rank else None
            got = torch.empty(3 + self.rank)
            dist.scatter(got, parts, group_src=root, group=self.group)
            same(got, values(10 * root + self.rank, 3 + self.rank))

    def test_reduce_scatter(self) -> None:
        for dtype in (*FLOATS, *SIXTEEN, torch.int32):
            parts = [values(10 * self.rank + rank, 3 + rank, dtype) for rank in self.ranks]
            got = torch.empty(3 + self.rank, dtype=dtype)
            dist.reduce_scatter(got, parts, group=self.group)
            mine = [values(10 * rank + self.rank, 3 + self.rank, dtype).double() for rank in self.ranks]
            same(got, torch.stack(mine).sum(0).to(dtype))

    def test_reduce_scatter_of_one_tensor(self) -> None:
        for dtype in (*FLOATS, *SIXTEEN, torch.int64):
            expected = torch.stack([full.double() for full in self.of_all(6 * self.size, dtype)]).sum(0).to(dtype)
            expected = expected[6 * self.rank :][:6]
            got = torch.empty(2, 3, dtype=dtype)
            reduce_scatter_single(got, values(self.rank, 6 * self.size, dtype).view(-1, 3), group=self.group)
            same(got, expected.view(2, 3))
            full = values(self.rank, 6 * self.size, dtype)
            part = full[6 * self.rank :][:6]
            reduce_scatter_single(part, full, group=self.group)
            same(part, expected)

    def test_reduce_scatter_average_and_maximum(self) -> None:
        fulls = torch.stack(self.of_all(4 * self.size))
        for op, expected in ((dist.ReduceOp.AVG, fulls.sum(0) / self.size), (dist.ReduceOp.MAX, fulls.amax(0))):
            got = torch.empty(4)
            reduce_scatter_single(got, values(self.rank, 4 * self.size), op, group=self.group)
            same(got, expected[4 * self.rank :][:4])

    def test_all_to_all(self) -> None:
        sent = [values(10 * self.rank + rank, 1 + rank) for rank in self.ranks]
        got = [torch.empty(1 + self.rank) for _ in self.ranks]
        dist.all_to_all(got, sent, group=self.group)
        for rank in self.ranks:
            same(got[rank], values(10 * rank + self.rank, 1 + self.rank))

    def test_all_to_all_of_one_tensor(self) -> None:
        for dtype in CARRIED:
            sent = torch.cat([values(10 * self.rank + rank, 4, dtype) for rank in self.ranks]).view(-1, 2)
            got = torch.empty_like(sent)
            dist.all_to_all_single(got, sent, group=self.group)
            expected = torch.cat([values(10 * rank + self.rank, 4, dtype) for rank in self.ranks])
            same(got, expected.view(-1, 2))
        splits = list(self.ranks)
        sent = torch.cat([values(10 * self.rank + rank, 3 * rank) for rank in self.ranks]).view(-1, 3)
        got = torch.empty(self.size * self.rank, 3)
        dist.all_to_all_single(got, sent, [self.rank] * self.size, splits, group=self.group)
        same(got.view(-1), torch.cat([values(10 * rank + self.rank, 3 * self.rank) for rank in self.ranks]))

    def test_barrier_waits_for_every_rank(self) -> None:
        counter, key = dist.distributed_c10d._get_default_store(), f"{self.group.group_name} barrier"
        for turn in range(1, 6):
            time.sleep(0.01 * self.rank)
            counter.add(key, 1)
            dist.barrier(self.group)
            assert counter.add(key, 0) >= turn * self.size
            dist.barrier(self.group)
        self.group.monitored_barrier(timedelta(seconds=60))

    def test_objects(self) -> None:
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, {"rank": self.rank, "text": "x" * self.rank}, group=self.group)
        assert every == [{"rank": rank, "text": "x" * rank} for rank in self.ranks]
        for root in self.ranks:
            told = [("from", self.rank), self.rank]
            dist.broadcast_object_list(told, group_src=root, group=self.group)
            assert told == [("from", root), root]
            mine: list[Any] = [None]
            dist.scatter_object_list(mine, [f"for {rank}" for rank in self.ranks], group_src=root, group=self.group)
            assert mine == [f"for {self.rank}"]
            gathered: list[Any] | None = [None] * self.size if root == self.rank else None
            dist.gather_object(self.rank, gathered, group_dst=root, group=self.group)
            assert gathered in (None, list(self.ranks))

    def test_large_tensors(self) -> None:
        numel = 3_000_001
        tensor = values(self.rank, numel)
        dist.all_reduce(tensor, group=self.group)
        same(tensor, torch.stack(self.of_all(numel)).sum(0))
        full = torch.empty(self.size * numel)
        all_gather_single(full, values(self.rank, numel), group=self.group)
        for rank, part in enumerate(full.split(numel)):
            same(part, values(rank, numel))

    # In flight

    def test_many_at_once_end_in_any_order_of_waiting(self) -> None:
        tensors = [values(self.rank, numel) for numel in range(0, 4000, 20)]
        works = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        for work in reversed(works):
            assert work.wait()
            assert work.is_completed()
            assert work.is_success()
            assert work.exception() is None
        for tensor in tensors:
            same(tensor, torch.stack(self.of_all(tensor.numel())).sum(0))

    def test_future_has_the_tensors_and_what_is_chained_may_wait(self) -> None:
        tensor = values(self.rank, 20)
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def again(future: Any) -> Tensor:
            [summed] = future.value()
            dist.all_reduce(summed, group=self.group)  # as PowerSGD's hook does
            return summed / self.size

        chained = work.get_future().then(again)
        same(chained.wait(), torch.stack(self.of_all(20)).sum(0))
        same(work.get_future().wait()[0], tensor)
        assert work.result()[0] is tensor

    def test_wait_may_be_given_up_and_begun_anew(self) -> None:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        got = torch.empty(3)
        work = dist.irecv(got, group_src=before, group=self.group)
        with pytest.raises(CommError, match=r"receive from rank .* has not ended after 0\.05 s; it goes on"):
            work.wait(timedelta(seconds=0.05))
        assert not work.is_completed()
        dist.barrier(self.group)  # everybody has given up once
        sending = dist.isend(values(self.rank, 3), group_dst=following, group=self.group)
        for each in (work, sending):
            each.wait(timedelta(seconds=1000))
        same(got, values(before, 3))

    def test_results_are_not_touched_after_wait(self) -> None:
        for _ in range(30):
            tensor = values(self.rank, 1000)
            dist.all_reduce(tensor, group=self.group)
            expected = tensor.clone()
            same(tensor, expected)

    # Point to point

    def test_ring(self) -> None:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for dtype in CARRIED:
            got = torch.empty(11, dtype=dtype)
            works = [
                dist.irecv(got, group_src=before, group=self.group),
                dist.isend(values(self.rank, 11, dtype), group_dst=following, group=self.group),
            ]
            for work in works:
                work.wait()
            same(got, values(before, 11, dtype))

    def test_messages_are_matched_by_tag(self) -> None:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        numel = 40_000  # more than MPI takes without the receiver
        got = [torch.empty(numel) for _ in range(5)]
        sends = [
            dist.isend(values(10 * self.rank + tag, numel), group_dst=following, group=self.group, tag=tag)
            for tag in range(5)
        ]
        receives = [dist.irecv(got[tag], group_src=before, group=self.group, tag=tag) for tag in (3, 1, 4, 0, 2)]
        for work in (*receives, *sends):
            work.wait()
        for tag in range(5):
            same(got[tag], values(10 * before + tag, numel))

    def test_receive_from_anybody_tells_whose_it_is(self) -> None:
        if self.rank == 0:
            seen = set()
            for _ in range(self.size - 1):
                got = torch.empty(3)
                work = dist.irecv(got, group=self.group, tag=7)
                work.wait()
                source = work._source_rank()
                same(got, values(source, 3))
                seen.add(source)
            assert seen == set(range(1, self.size))
        else:
            dist.send(values(self.rank, 3), group_dst=0, group=self.group, tag=7)

    def test_batch_of_sends_and_receives(self) -> None:
        got = [torch.empty(5) for _ in self.ranks]
        pairs = []
        for peer in self.ranks:
            pairs.append(dist.P2POp(dist.irecv, got[peer], group=self.group, group_peer=peer))
            pairs.append(dist.P2POp(dist.isend, values(10 * self.rank + peer, 5), group=self.group, group_peer=peer))
        for work in dist.batch_isend_irecv(pairs):
            work.wait()
        for peer in self.ranks:
            same(got[peer], values(10 * peer + self.rank, 5))

    def test_strided_messages(self) -> None:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        got = torch.zeros(6, 4)
        works = [
            dist.irecv(got[:, 1::2], group_src=before, group=self.group),
            dist.isend(values(self.rank, 12).view(2, 6).t(), group_dst=following, group=self.group),
        ]
        for work in works:
            work.wait()
        same(got[:, 1::2], values(before, 12).view(2, 6).t())
        same(got[:, ::2], torch.zeros(6, 2))

    def test_message_of_another_size_is_an_error_that_names_both(self) -> None:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sender = dist.get_global_rank(self.group, before)
        for numel in (5, 2):  # sent is 3: too short, and too long
            sending = dist.isend(torch.ones(3), group_dst=following, group=self.group)
            work = dist.irecv(torch.empty(numel), group_src=before, group=self.group)
            with pytest.raises(CommError) as caught:
                work.wait()
            assert f"receive from rank {sender} (tag 0)" in str(caught.value)
            assert not work.is_success()
            assert isinstance(work.exception(), CommError)
            with contextlib.suppress(CommError):  # an MPI may tell the sender too
                sending.wait()
            dist.barrier(self.group)  # the group goes on
        with pytest.raises(CommError):
            raise work.exception()

    # What is refused

    def test_wrong_arguments_are_refused_on_the_spot(self) -> None:
        ones = torch.ones(3)
        for call, words in (
            (
                lambda: dist.all_reduce(ones.int(), dist.ReduceOp.AVG, group=self.group),
                "no reduction AVG of torch.int32",
            ),
            (lambda: dist.all_reduce(ones, dist.ReduceOp.BAND, group=self.group), "no reduction BAND of torch.float32"),
            (lambda: dist.all_reduce(ones.to(torch.float8_e4m3fn), group=self.group), "no reduction SUM"),
            (lambda: dist.all_reduce(ones.to("meta"), group=self.group), "CPU tensors but got"),
            (lambda: all_gather_single(torch.empty(3 * self.size + 1), ones, group=self.group), "all-gather expected"),
            (lambda: dist.isend(ones, group_dst=self.rank, group=self.group, tag=-1), "expected a tag"),
            (lambda: dist.isend(ones, group_dst=self.rank, group=self.group, tag=1 << 40), "expected a tag"),
            (
                lambda: dist.all_to_all_single(ones, ones, [1] * self.size + [9], None, group=self.group),
                "splits that sum to 3",
            ),
        ):
            with pytest.raises(ConfigError) as caught:
                call()
            assert words in str(caught.value), caught.value
        dist.barrier(self.group)


class TestWorld(Bound, unittest.TestCase):
    """The default group."""


class TestSelf(Bound, unittest.TestCase):
    """This rank alone."""


class TestDuplicate(Bound, unittest.TestCase):
    """All ranks, in a group of their own."""


class TestReversed(Bound, unittest.TestCase):
    """All ranks, the last one first."""


class TestAllButLast(Bound, unittest.TestCase):
    """A group that not everybody is in."""


class TestGroups(unittest.TestCase):
    """Several groups, several threads, groups that come and go."""

    def test_groups_may_be_used_in_different_orders_on_different_ranks(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        groups = [Bound.bound["TestDuplicate"], dist.group.WORLD]
        for _ in range(20):
            tensors = [torch.ones(30_000), torch.full((30_000,), 2.0)]
            order = [0, 1] if rank % 2 else [1, 0]
            works = [dist.all_reduce(tensors[place], group=groups[place], async_op=True) for place in order]
            for work in works:
                work.wait()
            assert torch.equal(tensors[0], torch.full((30_000,), float(size)))
            assert torch.equal(tensors[1], torch.full((30_000,), 2.0 * size))

    def test_threads_may_use_groups_of_their_own_at_once(self) -> None:
        size, wrong = dist.get_world_size(), []

        def reduce(group: Any) -> None:
            for turn in range(30):
                tensor = torch.full((1000,), float(turn))
                dist.all_reduce(tensor, group=group)
                if not torch.equal(tensor, torch.full((1000,), float(turn * size))):
                    wrong.append(turn)

        threads = [
            threading.Thread(target=reduce, args=(group,))
            for group in (dist.group.WORLD, Bound.bound["TestDuplicate"], Bound.bound["TestReversed"])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_groups_come_and_go(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        for turn in range(20):
            local = turn >= 10  # torch names these by how many groups a rank is in, which must be equal
            ranks = [other for other in range(size - 1) if local or other % 2 == turn % 2] or [0]
            group = dist.new_group(ranks, use_local_synchronization=local)
            if rank not in ranks:
                continue
            tensor = torch.ones(2)
            dist.all_reduce(tensor, group=group)
            assert tensor[0] == len(ranks)
            dist.destroy_process_group(group)
            with pytest.raises(CommError) as caught:
                group.allreduce([tensor])
            assert "has been destroyed" in str(caught.value)

    def test_nothing_runs_when_nothing_is_in_flight(self) -> None:
        """Turns of the progress thread: a bound that load can only lower."""
        progress = dist.group.WORLD._progress
        dist.barrier()
        time.sleep(0.5)
        turn, turns = progress._turn, []
        progress._turn = lambda *args: (turns.append(1), turn(*args))
        time.sleep(1.0)
        del progress._turn
        assert 1 <= len(turns) <= 12, len(turns)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(5, 30, generator=torch.Generator().manual_seed(10 * step + rank))


class TestTorch(unittest.TestCase):
    """torch's own users of a backend."""

    def test_ddp_averages_gradients(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        model = nn.parallel.DistributedDataParallel(Model(), bucket_cap_mb=0.005)
        model(batch(0, rank)).sum().backward()
        grads = []
        for other in range(size):
            alone = Model()
            alone(batch(0, other)).sum().backward()
            grads.append([param.grad for param in alone.parameters()])
        for param, *expected in zip(model.parameters(), *grads, strict=True):
            # fp32 sums of a few values in an order of MPI's choice
            torch.testing.assert_close(param.grad, torch.stack(expected).double().mean(0).float())

    def test_functional_collectives(self) -> None:
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*_functional_collectives")  # new names
        size, group = dist.get_world_size(), dist.group.WORLD
        tensor = torch.full((4,), float(dist.get_rank()))
        total = functional.all_reduce(tensor, "sum", group) + 0
        assert torch.equal(total, torch.full((4,), float(sum(range(size)))))
        gathered = functional.all_gather_tensor(tensor, 0, group) + 0
        assert torch.equal(gathered, torch.arange(float(size)).repeat_interleave(4))
        scattered = functional.reduce_scatter_tensor(torch.ones(2 * size), "sum", 0, group) + 0
        assert torch.equal(scattered, torch.full((2,), float(size)))

    def test_dtensor_on_a_mesh(self) -> None:
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (size,))
        full = torch.arange(6.0 * size).view(size * 2, 3)
        sharded = distribute_tensor(full, mesh, [Shard(0)])
        assert torch.equal(sharded.full_tensor(), full)
        assert torch.equal(sharded.sum().redistribute(placements=[Replicate()]).to_local(), full.sum())


class TestOptimizer(unittest.TestCase):
    """distadam itself."""

    def train(self, group: Any, reduce: str, mesh: Any = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        model = Model().to(dtype)
        shard = ShardPolicy(mesh=mesh) if mesh is not None else ShardPolicy(shard_group=group)
        comm = CommPolicy(reduce=reduce, bucket_mb=4096 / 2**20)
        optimizer = distadam.AdamW(model.named_parameters(), lr=0.01, comm=comm, shard=shard)
        for step in range(4):
            model(batch(step, dist.get_rank()).to(dtype)).square().sum().backward()
            optimizer.step()
        self.report = str(optimizer.kernel_report())
        return [param.detach() for param in model.parameters()]

    def test_adamw_has_the_bits_of_gloos_exchange(self) -> None:
        gloo = dist.new_group(list(range(dist.get_world_size())), backend="gloo", timeout=timedelta(seconds=60))
        for dtype in (torch.float32, torch.bfloat16):
            expected = self.train(gloo, "exchange", dtype=dtype)
            for reduce in ("exchange", "shared"):
                for got, wanted in zip(self.train(None, reduce, dtype=dtype), expected, strict=True):
                    same(got, wanted)
        dist.destroy_process_group(gloo)

    def test_adamw_with_mpis_own_reduction_trains_alike(self) -> None:
        """MPI adds up in an order of its own: three ranks and more differ from exchange by rounding."""
        expected = self.train(None, "exchange")
        for got, wanted in zip(self.train(None, "native"), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)

    def test_adamw_on_a_grid(self) -> None:
        size = dist.get_world_size()
        if size % 2 or size < 4:
            self.skipTest("needs an even number of ranks, four at least")
        mesh = init_device_mesh("cpu", (2, size // 2))
        first, second = (self.train(None, "exchange", mesh) for _ in range(2))
        for got, wanted in zip(first, second, strict=True):
            same(got, wanted)

    def test_full_state_and_clipping(self) -> None:
        model = Model()
        optimizer = distadam.AdamW(model.named_parameters(), lr=0.01)
        for step in range(2):
            model(batch(step, dist.get_rank())).square().sum().backward()
            norm = optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        norms: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(norms, norm.item())
        assert len(set(norms)) == 1
        full = optimizer.full_state_dict(to=None)
        assert set(full["state"]) == set(range(6))


def bind() -> None:
    """Make the groups: collectively, in one order."""
    everybody = list(range(dist.get_world_size()))
    Bound.bound = {
        "TestWorld": dist.group.WORLD,
        "TestDuplicate": dist.new_group(everybody),
        "TestReversed": dist.distributed_c10d._new_group_with_tag(everybody[::-1], sort_ranks=False),
        "TestAllButLast": dist.new_group(everybody[:-1] or everybody),
    }
    for rank in everybody:
        group = dist.new_group([rank])
        if rank == dist.get_rank():
            Bound.bound["TestSelf"] = group


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch.*")
    info = distadam.init_process_group("mpi4py", timeout_s=float(os.environ.get("SUITE_TIMEOUT_S", "90")))
    bind()
    with open(os.devnull, "w") as nowhere:
        stream = sys.stderr if info.rank == 0 else nowhere
        program = unittest.main("tests.mpi.suite", exit=False, testRunner=unittest.TextTestRunner(stream, verbosity=2))
    result = program.result
    for _, text in (*result.failures, *result.errors):
        if info.rank:
            print(f"rank {info.rank}: {text}", file=sys.stderr, flush=True)
    print(f"rank {info.rank} of {info.world_size}: {result.testsRun} tests, ok={result.wasSuccessful()}", flush=True)
    if not result.wasSuccessful():
        raise SystemExit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    from tests.mpi import suite  # the tests know this file by that name

    suite.main()
