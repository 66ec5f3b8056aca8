"""Groups on several hosts: memory inside a host, messages between hosts (comm/hosts.py, comm/mixed.py).

Hosts are what `machine_identity` says they are, so here it says what a test wants. Everything compared has the same
bits: sums of float values are those of `Exchange`, whose order is that of a binary tree over ranks.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, PrecisionPolicy, ShardPolicy
from distadam.comm import collectives as collectives_module
from distadam.comm import exchange as exchange_module
from distadam.comm.exchange import Exchange
from distadam.comm.hosts import Hosts, machine_identity
from distadam.comm.mesh import READ, READY, Mesh
from distadam.comm.mixed import Mixed, MixedJob
from distadam.comm.shared import SharedMemory, meet
from distadam.errors import CommError, ConfigError
from tests.ranks import Pool, RanksFailed, run_ranks
from tests.staggered import counts_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGNED = ((0, 1), (2, 3))
INTERLEAVED = ((0, 2), (1, 3))
THREE_HOSTS = ((0, 1), (2, 3), (4, 5))
FOURS = ((0, 1, 2, 3), (4, 5, 6, 7))
PLACEMENTS = [ALIGNED, INTERLEAVED, *(pytest.param(wide, marks=pytest.mark.long) for wide in (THREE_HOSTS, FOURS))]

Placement = tuple[tuple[int, ...], ...]


def _num_ranks(placement: Placement) -> int:
    return sum(map(len, placement))


def _placed(rank: int, placement: Placement) -> AbstractContextManager[Any]:
    """Let this rank say that it is on the host where ``placement`` puts it."""
    host = next(index for index, local in enumerate(placement) if rank in local)
    return mock.patch.object(collectives_module, "machine_identity", return_value=f"host {host}")


# Hosts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identities", "ranks", "unshared", "unaligned"),
    [
        ("aabb", ALIGNED, "", ""),
        ("abab", INTERLEAVED, "", "do not follow each other"),
        ("bbaacc", THREE_HOSTS, "", ""),
        ("aaabbb", ((0, 1, 2), (3, 4, 5)), "", "3 is no power of two"),
        ("aaab", ((0, 1, 2), (3,)), "hosts hold 3 and 1 ranks", None),
        ("abc", ((0,), (1,), (2,)), "a host of its own", None),
        ("aaa", ((0, 1, 2),), "", None),
    ],
)
def test_hosts_are_told_apart_by_identity(
    identities: str, ranks: Placement, unshared: str, unaligned: str | None
) -> None:
    hosts = Hosts.of(identities)
    assert hosts.ranks == ranks
    assert hosts.unshared == "" if not unshared else unshared in hosts.unshared
    if unaligned is not None:
        assert hosts.unaligned == "" if not unaligned else unaligned in hosts.unaligned


def test_ranks_find_their_peers() -> None:
    hosts = Hosts.of("abab")
    assert [hosts.local(rank) for rank in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [hosts.across(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_identity_is_the_kernels_and_the_network_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = machine_identity()
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    with mock.patch("socket.gethostname", return_value="elsewhere"):
        assert machine_identity() == mine
    with mock.patch("os.stat", return_value=mock.Mock(st_ino=1)):
        assert machine_identity() != mine
    with mock.patch("builtins.open", side_effect=OSError):  # no /proc: each its own
        assert machine_identity() != machine_identity()


# Collectives ----------------------------------------------------------------------------------------------------------


def _memory(rank: int, hosts: Hosts) -> SharedMemory:
    def swap(value: Any) -> list[Any]:
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, value)
        return answers

    names = [f"rank {other}" for other in range(dist.get_world_size())]
    memory = meet(names, rank, hosts.local(rank), swap)
    assert memory is not None
    return memory


def _mixed(rank: int, placement: Placement, timeout_s: float = 60.0) -> Mixed:
    hosts = Hosts(placement)
    return Mixed(_memory(rank, hosts), Exchange(dist.group.WORLD, timeout_s), hosts, rank, timeout_s)


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Values whose sum depends on the order of adding."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)).to(
        dtype
    )


def _same_as_exchange(rank: int, placement: Placement, scratch_nbytes: int) -> None:
    num_ranks = dist.get_world_size()
    with mock.patch.object(exchange_module, "SCRATCH_NBYTES", scratch_nbytes):
        over, messages = _mixed(rank, placement), Exchange(dist.group.WORLD, None)
        for dtype in DTYPES:
            wide = torch.promote_types(dtype, torch.float32)
            for numel in (64, 192, 140_032) if scratch_nbytes > 1 else (64, 192):
                full = over.memory.empty(num_ranks * numel, dtype)
                full.copy_(_values(rank, num_ranks * numel, dtype))
                found, expected = torch.empty(numel, dtype=wide), torch.empty(numel, dtype=wide)
                messages.reduce_scatter(expected, full).wait()
                job = over.reduce_scatter(found, full)
                whole = over.memory.empty(num_ranks * numel, dtype)
                gather = over.all_gather(whole, _values(rank, numel, dtype))
                assert isinstance(gather, MixedJob)
                assert isinstance(job, MixedJob) == (placement != INTERLEAVED)
                job.wait()
                full.fill_(-1.0)  # all have read it
                gather.wait()
                assert torch.equal(found, expected)
                assert torch.equal(whole, torch.cat([_values(other, numel, dtype) for other in range(num_ranks)]))
                whole.fill_(-1.0)
        assert sum(buffer.numel() for buffer in over.exchange._buffers) <= max(
            scratch_nbytes, 2 * 64 * 8 * 2 * len(over.peers), 2 * 64 * 8 * (num_ranks - 1)
        )
        private = torch.ones(num_ranks * 64)
        over.reduce_scatter(found := torch.empty(64), private).wait()
        assert torch.equal(found, torch.full((64,), float(num_ranks)))
        over.all_gather(private, torch.full((64,), float(rank))).wait()
        assert torch.equal(private, torch.arange(float(num_ranks)).repeat_interleave(64))
        over.all_reduce(total := torch.arange(100.0))
        over.exchange.all_reduce(again := torch.zeros(1)).wait()
        assert torch.equal(total, num_ranks * torch.arange(100.0))
        del again


@pytest.mark.parametrize("scratch_nbytes", [exchange_module.SCRATCH_NBYTES, 1])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_results_have_the_bits_of_exchange_in_any_amount_of_memory(placement: Placement, scratch_nbytes: int) -> None:
    run_ranks(_num_ranks(placement), _same_as_exchange, placement, scratch_nbytes)
