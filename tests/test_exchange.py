"""``reduce="exchange"``: what arrives, in which bits, by how many bytes, in what memory, and when a peer is gone."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import distadam
from distadam import CommPolicy, PrecisionPolicy, ShardPolicy
from distadam.comm import exchange
from distadam.comm.exchange import Exchange
from distadam.errors import CommError, ConfigError
from tests.ranks import Pool, RanksFailed, run_ranks

RANKS = (2, 3, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Values whose sum depends on the order of adding."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)).to(
        dtype
    )


def _tree(leaves: list[Tensor]) -> Tensor:
    """((0 + 1) + (2 + 3)) + ((4 + ...)): the left half has the larger power of two."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1
    while 2 * half < len(leaves):
        half *= 2
    return _tree(leaves[:half]) + _tree(leaves[half:])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# The collectives themselves -------------------------------------------------------------------------------------------


def _collectives(rank: int, num_ranks: int, scratch_nbytes: int) -> None:
    with mock.patch.object(exchange, "SCRATCH_NBYTES", scratch_nbytes):
        over = Exchange(dist.group.WORLD, None)
        for dtype in DTYPES:
            for numel in (64, 1000, 70_000) if scratch_nbytes > 1 else (64, 1000):
                every = [_values(other, num_ranks * numel, dtype) for other in range(num_ranks)]
                expected = _tree([full.to(_wide(dtype)) for full in every]).split(numel)
                shard = torch.empty(numel, dtype=_wide(dtype))
                jobs = [over.reduce_scatter(shard, every[rank])]
                whole = torch.empty(num_ranks * numel, dtype=dtype)
                jobs.append(over.all_gather(whole, every[rank][:numel]))
                total = every[rank][:numel].to(_wide(dtype), copy=True)
                jobs.append(over.all_reduce(total))
                for job in jobs:
                    job.wait()
                assert torch.equal(shard, expected[rank])
                assert torch.equal(whole, torch.cat([full[:numel] for full in every]))
                assert torch.equal(total, _tree([full[:numel].to(_wide(dtype)) for full in every]))
        received = sum(buffer.numel() for buffer in over._buffers)
        assert received <= max(scratch_nbytes, 2 * 64 * 8 * (num_ranks - 1))


@pytest.mark.parametrize("scratch_nbytes", [exchange.SCRATCH_NBYTES, 100_000, 1])
@pytest.mark.parametrize("num_ranks", [*RANKS, 8])
def test_sums_have_the_bits_of_the_tree_in_any_amount_of_memory(num_ranks: int, scratch_nbytes: int) -> None:
    run_ranks(num_ranks, _collectives, num_ranks, scratch_nbytes)


def _late(rank: int) -> bool:
    """The gather of an all-reduce that does not wait for the sums before it sends what was there before."""
    chunk = exchange._Chunk.__init__

    def hasty(self: Any, *args: Any, alone: bool = False, **kwargs: Any) -> None:
        chunk(self, *args, alone=False, **kwargs)

    with mock.patch.object(exchange._Chunk, "__init__", hasty):
        over = Exchange(dist.group.WORLD, None)
        right = []
        for seed in range(50):
            total = torch.full((200_000,), float(rank + seed))
            over.all_reduce(total).wait()
            right.append(bool((total == 1 + 2 * seed).all()))
    return all(right)


def test_all_reduce_fails_when_its_gather_does_not_wait() -> None:
    assert not all(run_ranks(2, _late))


# The optimizer --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(30, 30, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _train(
    rank: int, dtype: torch.dtype, comm: CommPolicy, options: dict[str, Any], grid: bool = False
) -> list[Tensor]:
    if grid:
        options = options | {"shard": ShardPolicy(mesh=init_device_mesh("cpu", (2, 2)))}
    model = Model(dtype)
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.01, comm=comm, **options)
    for step in range(4):
        x = torch.randn(5, 30, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
        model(x).square().sum().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_ranks", "grid"), [(3, False), (4, True)])
def test_training_has_the_same_bits_for_every_bucket_size_and_run(
    num_ranks: int, dtype: torch.dtype, grid: bool
) -> None:
    comm = CommPolicy(reduce="exchange", bucket_mb=71 / 2**20)
    expected = run_ranks(num_ranks, _train, dtype, comm, {}, grid)
    for bucket_mb in (1 / 2**10, 25, 25):
        results = run_ranks(num_ranks, _train, dtype, dataclasses.replace(comm, bucket_mb=bucket_mb), {}, grid)
        for result in results:
            torch.testing.assert_close(result, expected[0], rtol=0, atol=0)


def _reduced(rank: int, num_ranks: int, reduce_dtype: torch.dtype | None) -> None:
    """bfloat16 gradients add up in float32: their average has bits that bfloat16 has not."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))])
    precision = PrecisionPolicy(reduce_dtype=reduce_dtype)
    optimizer = distadam.SGD(model.parameters(), lr=1.0, comm=CommPolicy(reduce="exchange"), precision=precision)
    (model[0] * _values(rank, 300, torch.bfloat16)).sum().backward()
    optimizer.step()
    sent = [
        _values(other, 300, torch.bfloat16).to(reduce_dtype or torch.bfloat16).float() for other in range(num_ranks)
    ]
    expected = -(_tree(sent) / num_ranks)
    for master, piece in zip(optimizer.state_dict()["distadam"]["masters"], optimizer._flats[0].pieces, strict=True):
        part = expected[piece.param_start : piece.param_start + piece.end - piece.start]
        assert torch.equal(master[piece.start : piece.end], part)


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sixteen_bit_gradients_are_summed_and_kept_in_float32(num_ranks: int, reduce_dtype: torch.dtype | None) -> None:
    run_ranks(num_ranks, _reduced, num_ranks, reduce_dtype)


def _count_messages(rank: int, num_ranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that this rank sends in a step, and what the statistics claim."""
    model, x = Model(dtype), torch.ones(2, 30, dtype=dtype)
    comm = CommPolicy(reduce="exchange", bucket_mb=4096 / 2**20)
    optimizer = distadam.AdamW(model.named_parameters(), comm=comm)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    optimizer.comm_stats.clear()
    sent: list[int] = []
    post = exchange._Chunk.post

    def count(chunk: Any, group: Any) -> None:
        sent.extend(tensor.nbytes for _, tensor in chunk._sends())
        post(chunk, group)

    with mock.patch.object(exchange._Chunk, "post", count):
        model(x).sum().backward()
        optimizer.step()
    nbytes = optimizer.comm_stats.payload_nbytes
    parameters = sum(bucket.nbytes for bucket in optimizer.layout.buckets)
    assert 2 * parameters * (num_ranks - 1) // num_ranks - sum(sent) in range(-64, 64)
    return sum(sent), nbytes["reduce_scatter"] + nbytes["all_gather"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_messages_are_the_payload_that_statistics_claim(num_ranks: int, dtype: torch.dtype) -> None:
    for sent, claimed in run_ranks(num_ranks, _count_messages, num_ranks, dtype):
        assert 0 <= sent - claimed < 64  # each bucket's share is rounded down to whole bytes


def _threads() -> int:
    return sum(thread.name == "distadam exchange" for thread in threading.enumerate())


def _dropped(rank: int) -> None:
    gc.collect()
    before = _threads()
    model = Model(torch.float32)
    optimizer = distadam.AdamW(model.named_parameters(), comm=CommPolicy(reduce="exchange"))
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    assert _threads() == before + 1
    del optimizer
    gc.collect()
    assert _threads() == before
    unused = distadam.AdamW(model.named_parameters(), comm=CommPolicy(reduce="exchange"))
    model(torch.ones(2, 30)).sum().backward()  # launched and never waited for
    del unused
    _train(rank, torch.float32, CommPolicy(reduce="exchange"), {})


def test_worker_ends_with_its_optimizer_and_the_next_one_is_not_disturbed() -> None:
    run_ranks(2, _dropped)


def _on_meta(rank: int) -> None:
    params = [("w", nn.Parameter(torch.ones(3, device="meta")))]
    with pytest.raises(ConfigError, match=r"parameter 'w'.*expected CPU parameters but got one on meta"):
        distadam.SGD(params, comm=CommPolicy(reduce="exchange"))


def test_exchange_refuses_parameters_elsewhere() -> None:
    _on_meta(0)


# Peers that are gone --------------------------------------------------------------------------------------------------


def _lose_a_peer(rank: int, lost: int, how: str) -> str:

    def train(model: nn.Module, optimizer: Any) -> None:
        model(torch.ones(2, 30)).sum().backward()
        optimizer.step()

    model = Model(torch.float32)
    comm = CommPolicy(reduce="exchange", timeout_s=3.0, bucket_mb=4096 / 2**20)
    optimizer = distadam.AdamW(model.named_parameters(), comm=comm)
    start: Callable[..., Any] = Exchange.reduce_scatter

    def vanish(self: Exchange, shard: Tensor, full: Tensor) -> Any:
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return start(self, shard, full)

    with mock.patch.object(Exchange, "reduce_scatter", vanish), pytest.raises(CommError) as caught:
        train(model, optimizer)
    return str(caught.value)


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.long)])
def test_peer_that_is_gone_is_a_comm_error_on_the_others_within_the_timeout(how: str) -> None:
    pool = Pool(3)
    try:
        with pytest.raises(RanksFailed) as caught:
            pool.run(_lose_a_peer, 1, how, timeout_s=20.0)
    finally:
        pool.close()
    assert set(caught.value.errors) == {1}  # the others have answered: each got its CommError


def test_error_names_the_operation_and_the_peer() -> None:
    job, group = exchange.Job(), mock.Mock()
    group.recv.return_value.wait.side_effect = RuntimeError("timed out")
    worker = exchange._Worker(group, timedelta(seconds=1))
    chunk = exchange._Chunk(job, 0, lambda: [], lambda: [(1, torch.ones(1))])
    for item in (chunk, None):
        worker.chunks.put(item)
    with mock.patch.object(exchange.dist, "get_global_rank", lambda _, peer: 10 + peer):
        worker.run()
    with pytest.raises(RuntimeError, match="nothing comes from rank 11: timed out"):
        job.wait()
