"""Groups on several hosts: memory inside a host, messages between hosts (comm/hosts.py, comm/mixed.py).

Hosts are what `machine_identity` says they are, so here it says what a test wants. Everything compared has the same
bits: sums of float values are those of `Exchange`, whose order is that of a binary tree over ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
from distadam.comm import mesh as mesh_module
from distadam.comm.exchange import Exchange
from distadam.comm.hosts import Hosts, machine_identity
from distadam.comm.mesh import READ, Mesh
from distadam.comm.mixed import Mixed, MixedJob
from distadam.comm.shared import SharedMemory, meet
from distadam.errors import CommError, ConfigError
from tests import test_reports, test_shared
from tests.ranks import Pool, RanksFailed, run_ranks
from tests.staggered import counts_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGNED = ((0, 1), (2, 3))
INTERLEAVED = ((0, 2), (1, 3))
SEPARATE = ((0,), (1,), (2,), (3,))
UNEVEN = ((0, 1, 2), (3,))
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
        over.all_reduce(total := torch.arange(100.0)).wait()
        assert torch.equal(total, num_ranks * torch.arange(100.0))


@pytest.mark.parametrize("scratch_nbytes", [exchange_module.SCRATCH_NBYTES, 1])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_results_have_the_bits_of_exchange_in_any_amount_of_memory(placement: Placement, scratch_nbytes: int) -> None:
    run_ranks(_num_ranks(placement), _same_as_exchange, placement, scratch_nbytes)


def _reuses(rank: int, waits: bool) -> list[bool]:
    """Overwrite buffers after the own result, with or without waiting for a peer, which is late, to have read them."""
    over, shard, full_wait, full_look = _mixed(rank, ALIGNED), torch.empty(64), Mesh.wait, Mixed.look

    def wait(mesh: Mesh, kind: int, number: int, timeout_s: float) -> dict[int, int]:
        return full_wait(mesh, kind, number, timeout_s) if waits or kind != READ else {}

    def look(mixed: Mixed, number: int, full: Tensor) -> dict[int, Tensor]:
        found = full_look(mixed, number, full)
        if rank == 1:
            time.sleep(0.5)
        return found

    right = []
    with mock.patch.object(Mesh, "wait", wait), mock.patch.object(Mixed, "look", look):
        full = over.memory.empty(4 * 64, torch.float32).fill_(rank + 1.0)
        over.reduce_scatter(shard, full).wait()
        full.fill_(-1.0)
        dist.barrier()
        right.append(bool((shard == 10).all()))
        over.all_gather(full, torch.full((64,), float(rank))).wait()
        right.append(torch.equal(full, torch.arange(4.0).repeat_interleave(64)))
        full.fill_(-1.0)
        dist.barrier()
    return right


def test_buffers_are_overwritten_only_after_the_host_has_read_them() -> None:
    assert run_ranks(4, _reuses, True) == [[True, True]] * 4
    assert run_ranks(4, _reuses, False)[1] == [False, False]


def _goes_ahead(rank: int, alone: bool) -> bool:
    """Launch two sums; rank 1 launches the second one after the first is done on all."""
    put, over = Exchange.put, _mixed(rank, ALIGNED, timeout_s=2.0)

    def hasty(exchange: Exchange, *args: Any, **options: Any) -> None:
        put(exchange, *args, **options | {"alone": False})

    buffers = [over.memory.empty(4 * 64, torch.float32).fill_(1.0) for _ in range(2)]
    shards = [torch.empty(64) for _ in range(2)]
    with mock.patch.object(Exchange, "put", put if alone else hasty):
        if rank == 1:
            time.sleep(0.3)  # others have launched both by then
        jobs = [over.reduce_scatter(shards[index], buffers[index]) for index in range(1 if rank == 1 else 2)]
        jobs[0].wait()
        dist.barrier()
        if rank == 1:
            jobs.append(over.reduce_scatter(shards[1], buffers[1]))
        jobs[1].wait()
    return all(bool((shard == 4).all()) for shard in shards)


def test_sum_that_waits_for_a_peer_to_launch_holds_up_no_sum_before_it() -> None:
    assert run_ranks(4, _goes_ahead, True) == [True] * 4
    pool = Pool(4, timeout_s=2.0)
    try:
        with pytest.raises(RanksFailed) as failed:
            pool.run(_goes_ahead, False)
    finally:
        pool.close()
    assert "nothing came from rank 1" in failed.value.errors[0][1]


# The optimizer --------------------------------------------------------------------------------------------------------


def _on_hosts(rank: int, placement: Placement, function: Callable[..., Any], *args: Any) -> Any:
    with _placed(rank, placement):
        return function(rank, *args)


@pytest.mark.parametrize(
    ("placement", "dtype", "prefetch"),
    [
        (ALIGNED, torch.bfloat16, True),
        (INTERLEAVED, torch.float32, True),
        pytest.param(ALIGNED, torch.float32, False, marks=pytest.mark.long),
    ],
)
def test_training_has_the_bits_of_exchange(placement: Placement, dtype: torch.dtype, prefetch: bool) -> None:
    """Clipping, accumulation, absent gradients, a thawed parameter and loading a state included."""
    expected = run_ranks(4, _on_hosts, SEPARATE, test_shared._train, False, dtype, prefetch)
    for found in run_ranks(4, _on_hosts, placement, test_shared._train, False, dtype, prefetch):
        assert len(found) == len(expected[0])
        assert all(map(torch.equal, found, expected[0]))


WIDTH = 1200  # 1.44 M elements, 5.5 MiB in float32


def _train_on_integers(rank: int, reduce: Any, wire: torch.dtype | None) -> tuple[str, Tensor]:
    """Return how bytes travelled, and a large parameter after two steps."""
    param = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    precision = PrecisionPolicy(reduce_dtype=wire)
    optimizer = distadam.AdamW([("large", param)], lr=0.1, comm=CommPolicy(reduce=reduce), precision=precision)
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        (param * torch.randint(-4, 5, (WIDTH, WIDTH), generator=generator)).sum().backward()
        optimizer.step()
    return str(optimizer.kernel_report()), param.detach()


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_large_buckets_of_integer_gradients_have_the_bits_of_native(wire: torch.dtype | None) -> None:
    expected = run_ranks(4, _train_on_integers, "native", wire)[0][1]
    for placement in (ALIGNED, INTERLEAVED):
        for report, found in run_ranks(4, _on_hosts, placement, _train_on_integers, "auto", wire):
            assert "2 hosts with 2 ranks each" in report
            assert torch.equal(found, expected)


def _count_messages(rank: int, placement: Placement, wire: torch.dtype | None) -> tuple[dict[int, int], dict[str, int]]:
    """Return the bytes of a step by the rank that they go to, and what statistics claim."""
    sent: dict[int, int] = {}
    post = exchange_module._Chunk.post

    class Counted:
        def __init__(self, group: Any) -> None:
            self.recv, self._send = group.recv, group.send

        def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
            sent[peer] = sent.get(peer, 0) + tensors[0].nbytes
            return self._send(tensors, peer, tag)

    with _placed(rank, placement):
        param = nn.Parameter(torch.zeros(4 * 6400))
        optimizer = distadam.SGD([param], precision=PrecisionPolicy(reduce_dtype=wire))
    optimizer.comm_stats.clear()
    with mock.patch.object(exchange_module._Chunk, "post", lambda chunk, group: post(chunk, Counted(group))):
        param.sum().backward()
        optimizer.step()
    return sent, optimizer.comm_stats.payload_nbytes


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_each_byte_crosses_between_hosts_once(wire: torch.dtype | None) -> None:
    shard_nbytes = 4 * 6400
    for rank, (sent, claimed) in enumerate(run_ranks(4, _count_messages, ALIGNED, wire)):
        assert sent == {(rank + 2) % 4: 2 * shard_nbytes}  # a partial sum in float32, and the updated shard
        assert claimed["reduce_scatter"] == claimed["all_gather"] == shard_nbytes
    for rank, (sent, claimed) in enumerate(run_ranks(4, _count_messages, INTERLEAVED, wire)):
        gradient = shard_nbytes * (wire or torch.float32).itemsize // 4
        assert sent == {peer: gradient + shard_nbytes * (peer == rank ^ 1) for peer in range(4) if peer != rank}
        assert claimed["reduce_scatter"] == 3 * gradient
        assert claimed["all_gather"] == shard_nbytes


@counts_bytes
def _watched(rank: int, placement: Placement) -> tuple[list[str], int]:
    return _on_hosts(rank, placement, test_reports._watch_a_run, "adamw", torch.bfloat16, 2, {})


def test_memory_report_is_the_sum_of_live_storages() -> None:
    for wrong, num_checks in run_ranks(4, _watched, ALIGNED):
        assert wrong == []
        assert num_checks > 20


def _scratch(rank: int, placement: Placement) -> int:
    with _placed(rank, placement):
        param = nn.Parameter(torch.zeros(4 * (1 << 20)))
        optimizer = distadam.SGD([param])
    param.sum().backward()
    optimizer.step()
    return sum(tensor.nbytes for tensor in optimizer._collectives.scratch())


def test_scratch_is_bounded() -> None:
    blocks = 2 * 2 * 131_072 * 4  # each tree adds up by blocks, two deep
    assert run_ranks(4, _scratch, ALIGNED) == [exchange_module.SCRATCH_NBYTES + blocks] * 4


# What is said ---------------------------------------------------------------------------------------------------------


def _says(rank: int, placement: Placement, reduce: Any, share: bool) -> str:
    with _placed(rank, placement):
        try:
            optimizer = distadam.SGD(
                [nn.Parameter(torch.ones(100))],
                comm=CommPolicy(reduce=reduce),
                shard=ShardPolicy(share_parameters=share),
            )
        except ConfigError as error:
            return str(error)
    row = optimizer.kernel_report().as_dict()[0]
    return f"{row['reduce']}: {row['reason_of_reduce']}"


@pytest.mark.parametrize(
    ("placement", "reduce", "expected"),
    [
        (ALIGNED, "auto", "shared: 2 hosts with 2 ranks each: by memory on a host, by messages between them"),
        (ALIGNED, "shared", 'shared: CommPolicy(reduce="shared"), 2 hosts with 2 ranks each: by memory on a host, by'),
        (ALIGNED, "exchange", 'exchange: CommPolicy(reduce="exchange")'),
        (INTERLEAVED, "auto", "sums by messages alone, since ranks of one host do not follow each other in the group"),
        (UNEVEN, "auto", "exchange: gloo's own reduce-scatter sends twice the bytes; hosts hold 3 and 1 ranks of the"),
        (UNEVEN, "shared", "but found that hosts hold 3 and 1 ranks of the shard group, not equally many; use"),
        (SEPARATE, "auto", "sends twice the bytes; each rank of the shard group has a host of its own"),
    ],
)
def test_kernel_report_and_errors_say_how_ranks_lie(placement: Placement, reduce: str, expected: str) -> None:
    for said in run_ranks(4, _says, placement, reduce, False):
        assert expected in said


def _says_without_sockets(rank: int, reduce: Any) -> str:
    """Say how bytes travel where one rank of a host cannot be reached by the other."""
    broken = mock.patch.object(mesh_module.secrets, "token_hex", side_effect=OSError) if rank == 3 else nullcontext()
    with broken:
        return _says(rank, ALIGNED, reduce, False)


@pytest.mark.parametrize("reduce", ["auto", "shared"])
def test_all_exchange_where_one_host_shares_no_memory(reduce: str) -> None:
    for said in run_ranks(4, _says_without_sockets, reduce):
        assert "ranks of one host could not open each other's memory" in said
        assert said.startswith('CommPolicy(reduce="shared") expected' if reduce == "shared" else "exchange: ")


def test_parameters_are_not_shared_between_hosts() -> None:
    for said in run_ranks(4, _says, ALIGNED, "auto", True):
        assert "share_parameters=True" in said
        assert "of one host" in said


# Peers that are gone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        ("backward", "killed"),
        ("gather", "killed"),
        pytest.param("backward", "stopped", marks=pytest.mark.long),
        pytest.param("gather", "stopped", marks=pytest.mark.long),
        pytest.param("construction", "killed", marks=pytest.mark.long),
    ],
)
def test_peer_that_is_gone_is_a_comm_error_on_both_hosts(phase: str, how: str) -> None:
    pool = Pool(4, timeout_s=2.0)
    try:
        with pytest.raises(RanksFailed) as failed:
            pool.run(_on_hosts, ALIGNED, test_shared._lose_a_peer, phase, how, timeout_s=20.0)
        for rank in range(3):
            kind, text = failed.value.errors[rank]
            assert kind == CommError.__name__, text
        assert failed.value.errors[3][0] in ("Died", "Hang")
    finally:
        pool.close()


def _misses(rank: int, phase: str) -> str:
    """Let rank 1 not launch; return what another one says."""
    over = _mixed(rank, ALIGNED, timeout_s=1.0)
    full, shard = over.memory.empty(4 * 64, torch.float32).zero_(), torch.zeros(64)
    if rank == 1:
        time.sleep(3.0)
        return ""
    job = over.reduce_scatter(shard, full) if phase == "sum" else over.all_gather(full, shard)
    with pytest.raises(RuntimeError) as raised:
        job.wait()
    return str(raised.value)


@pytest.mark.parametrize("phase", ["sum", "gather"])
def test_silent_peer_is_named(phase: str) -> None:
    pool = Pool(4)
    try:
        said = pool.run(_misses, phase)
    finally:
        pool.close()
    assert "nothing came from rank 1 within 1 s" in said[0]
    assert "nothing comes from rank 1" in said[3]
