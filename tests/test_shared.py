"""Ranks of one host: tokens by socket (comm/mesh.py), memory that peers map (comm/shared.py), one copy of parameters.

Everything compared has the same bits: sums of float values are taken in one fixed order, that of `Exchange`.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import socket
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.comm import collectives as collectives_module
from distadam.comm import mesh as mesh_module
from distadam.comm import shared as shared_module
from distadam.comm.exchange import Exchange
from distadam.comm.mesh import READ, READY, Mesh
from distadam.comm.shared import Reduction, Shared, SharedMemory, stagger_nbytes
from distadam.engine import buffers
from distadam.engine.buffers import BufferPool, FullBuffer
from distadam.errors import CommError, ConfigError, UsageError
from tests.host_memory import meet_ranks
from tests.ranks import Pool, RanksFailed, run_ranks
from tests.staggered import STAGGERED_ABOVE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Tokens ---------------------------------------------------------------------------------------------------------------


def _pair() -> tuple[Mesh, Mesh]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Mesh(0, ["rank 0", "rank 1"], {1: left}), Mesh(1, ["rank 0", "rank 1"], {0: right})


def test_tokens_are_taken_in_any_order() -> None:
    here, there = _pair()
    for number in range(3):
        there.tell(READY, number, segment=10 + number)
    there.tell(READ, 1)
    assert here.arrived(READ, 1)
    assert not here.arrived(READ, 0)
    assert [here.wait(READY, number, 1.0) for number in (2, 0, 1)] == [{1: 12}, {1: 10}, {1: 11}]


def test_tokens_that_nobody_reads_yet_neither_block_nor_get_lost() -> None:
    here, there = _pair()
    many = 5000  # a socket holds a few hundred
    for number in range(many):
        there.tell(READY, number, segment=number)
        here.tell(READY, number, segment=number)
    for number in range(many):
        while not here.arrived(READY, number):
            there.arrived(READY, number)  # sends what its socket takes now
        assert here.wait(READY, number, 1.0) == {1: number}


def test_silent_peer_is_named_after_the_timeout() -> None:
    here, there = _pair()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"nothing came from rank 1 within 0\.2 s"):
        here.wait(READY, 0, 0.2)
    assert time.monotonic() - begin < 5
    del there


def test_token_that_another_thread_has_received_is_not_slept_through() -> None:
    """One thread is about to sleep until something comes; another, launching something, receives what it waits for."""
    mine, theirs = _pair()
    real = select.poll
    polls = []

    class Poll:
        def __init__(self) -> None:
            self._poll = real()
            self.register = self._poll.register

        def poll(self, milliseconds: float) -> object:
            if not polls:
                theirs.tell(READY, 1, 5)
                mine.tell(READ, 7)  # the other thread: takes what has come along
            polls.append(milliseconds)
            return self._poll.poll(milliseconds)

    began_s = time.monotonic()
    with mock.patch.object(mesh_module.select, "poll", Poll):
        assert mine.wait(READY, 1, 20.0) == {1: 5}
    assert polls, "nothing was waited for"
    assert time.monotonic() - began_s < 10.0


def test_peer_that_has_ended_is_named_at_once_and_reads_nothing_more() -> None:
    here, there = _pair()
    there.tell(READY, 0)
    del there
    gc.collect()
    assert here.wait(READY, 0, 1.0) == {1: 0}  # it was sent before
    with pytest.raises(RuntimeError, match="rank 1 has ended"):
        here.wait(READY, 1, 60.0)
    here.wait(READ, 0, 60.0)
    here.tell(READY, 2)


def _end_shows_beside_a_child() -> bool:
    """Whether a rank's end shows while a child that it forked (a DataLoader's worker) still lives."""
    here, there = _pair()
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        del there
        gc.collect()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:  # the child may not have run yet
            try:
                here.wait(READY, 0, 0.05)
            except RuntimeError as error:
                if "has ended" in str(error):
                    return True
        return False
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_end_of_a_rank_shows_although_children_that_it_forked_live() -> None:
    assert _end_shows_beside_a_child()
    with mock.patch.object(mesh_module, "_close_in_children"):
        assert not _end_shows_beside_a_child()


# Memory and collectives -----------------------------------------------------------------------------------------------


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)).to(
        dtype
    )


def _same_as_exchange(rank: int) -> None:
    num_ranks = dist.get_world_size()
    memory = meet_ranks(rank)
    by_messages = Exchange(dist.group.WORLD, None)
    over = Shared(memory, lambda: by_messages, 60.0)
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        for numel in (64, 192, 140_032):
            full = memory.empty(num_ranks * numel, dtype)
            full.copy_(_values(rank, num_ranks * numel, dtype))
            found, pieced, expected = (torch.empty(numel, dtype=wide) for _ in range(3))
            by_messages.reduce_scatter(expected, full).wait()
            job = over.reduce_scatter(found, full)
            job.wait()
            again = over.reduce_scatter(torch.empty(numel, dtype=wide), full)
            place = 0
            for piece in again.pieces():
                pieced[place : place + piece.numel()] = piece
                place += piece.numel()
            again.released.wait()
            assert place == numel
            assert torch.equal(found, expected)
            assert torch.equal(pieced, expected)
            job.released.wait()
            whole = memory.empty(num_ranks * numel, dtype)
            over.all_gather(whole, full[:numel]).wait()
            assert torch.equal(
                whole, torch.cat([_values(other, num_ranks * numel, dtype)[:numel] for other in range(num_ranks)])
            )
            dist.barrier()  # `step` overwrites shards after an agreement only
    private = torch.ones(num_ranks * 64)
    over.reduce_scatter(found := torch.empty(64), private).wait()
    assert torch.equal(found, torch.full((64,), float(num_ranks)))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_results_have_the_bits_of_exchange(num_ranks: int) -> None:
    run_ranks(num_ranks, _same_as_exchange)


def _reuses(rank: int, waits: bool) -> bool:
    """Overwrite the buffer after the own sum, with or without waiting for the peer to have read it."""
    memory = meet_ranks(rank)
    over = Shared(memory, lambda: Exchange(dist.group.WORLD, None), 60.0)
    full, shard = memory.empty(2 * 4096, torch.float32), torch.empty(4096)
    right = True
    for value in range(1, 20):
        full.fill_(float(value))
        job = over.reduce_scatter(shard, full)
        if rank == 1:
            time.sleep(0.005)  # the peer is late
        job.wait()
        right = right and bool((shard == 2 * value).all())
        if waits:
            job.released.wait()
        full.fill_(-1.0)
    return right


def test_buffer_is_overwritten_only_after_all_have_read_it() -> None:
    assert run_ranks(2, _reuses, True) == [True, True]
    assert not all(run_ranks(2, _reuses, False))


def _await_mapped(memory: SharedMemory, number: int) -> None:
    """Exchange what sockets take until so many peers' buffers are mapped here, and all peers have as many of ours."""
    deadline = time.monotonic() + 30
    while len(memory.mapped) != number and time.monotonic() < deadline:
        memory.mesh.arrived(READY, 0)
    assert len(memory.mapped) == number
    memory.mesh.tell(READY, 1000 + number)
    memory.mesh.wait(READY, 1000 + number, 30.0)


def _leaks(rank: int) -> tuple[int, int]:
    """Return how many file descriptors, and mappings of our files, are left by a hundred buffers and their meeting."""

    def look() -> tuple[int, int]:
        gc.collect()
        with open("/proc/self/maps", encoding="ascii") as maps:
            return len(os.listdir("/proc/self/fd")), sum("memfd:distadam" in line for line in maps)

    before = look()
    memory = meet_ranks(rank)
    buffers = [memory.empty(1000, torch.float32) for _ in range(100)]
    _await_mapped(memory, 100 * (dist.get_world_size() - 1))
    for buffer in buffers[:50]:
        memory.release(buffer)
    del buffers, buffer
    _await_mapped(memory, 50 * (dist.get_world_size() - 1))
    del memory
    after = look()
    return after[0] - before[0], after[1] - before[1]


def test_memory_and_descriptors_go_with_their_owner() -> None:
    assert run_ranks(2, _leaks) == [(0, 0)] * 2


def test_large_buffers_do_not_begin_at_one_offset_modulo_128_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as one pass reads together: parameters, gradients and three states of one size."""
    monkeypatch.setattr(shared_module, "_STAGGERED_ABOVE", STAGGERED_ABOVE)
    size = 128 << 20
    places, end = [], 0
    for index in range(5):  # back to back, as mmap places them
        places.append((end + stagger_nbytes(index, size)) % size)
        end += size + stagger_nbytes(index, size)
    distances = {abs(a - b) for place, a in enumerate(places) for b in places[:place]}
    assert min(min(distance, size - distance) for distance in distances) >= 20_000
    assert stagger_nbytes(3, 1000) == 0


# The optimizer --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())  # the first rank's parameters count
        self.layers = nn.ModuleList(nn.Linear(30, 30, dtype=dtype) for _ in range(4))
        self.late = nn.Linear(30, 30, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor, skip: int | None = None, late: bool = False) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number != skip:
                x = torch.tanh(layer(x))
        return self.late(x) if late else x


def _train(rank: int, share: bool, dtype: torch.dtype, prefetch: bool) -> list[Tensor]:
    """20 steps with everything in them; the parameters after each, and the whole state."""
    model = Model(dtype)
    optimizer = distadam.AdamW(
        model.named_parameters(),
        lr=1e-2,
        comm=CommPolicy(bucket_mb=4096 / 2**20),
        shard=ShardPolicy(share_parameters=share),
    )
    if prefetch:
        optimizer.prefetch(model)
    seen = []
    for step in range(20):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(4, 30, generator=generator).to(dtype)
        if step == 4:
            with optimizer.no_sync():
                model(x).float().square().mean().backward()
        if step == 8:
            model.late.requires_grad_(True)
        model(x, skip=2 if step % 5 == 3 else None, late=step >= 8).float().square().mean().backward()
        if step % 3 == 1:
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        if step == 12:
            state = optimizer.full_state_dict(to=None)
            optimizer.load_state_dict(state)
        optimizer.flush()
        seen += [param.detach().clone() for param in model.parameters()]
    dist.barrier()  # with shared parameters nobody may go on while others still look
    state = optimizer.full_state_dict(to=None)["state"]
    return seen + [value for entry in state.values() for value in entry.values()]


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "prefetch"),
    [(2, torch.float32, False), (2, torch.bfloat16, True), (3, torch.float32, True), (4, torch.bfloat16, False)],
)
def test_shared_parameters_train_to_the_same_bits(num_ranks: int, dtype: torch.dtype, prefetch: bool) -> None:
    own = run_ranks(num_ranks, _train, False, dtype, prefetch)
    shared = run_ranks(num_ranks, _train, True, dtype, prefetch)
    for rank in range(num_ranks):
        assert all(map(torch.equal, own[0], shared[rank]))
        assert len(own[0]) == len(shared[rank])


def _early_sums(rank: int) -> tuple[int, list[int]]:
    """Buckets, and how many of them were added up in each of five backwards."""
    model = Model()
    optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2, comm=CommPolicy(bucket_mb=4096 / 2**20))
    inputs, counts = torch.ones(4, 30), []
    for _ in range(5):
        with mock.patch.object(Reduction, "_read", autospec=True, side_effect=Reduction._read) as reads:
            model(inputs).square().mean().backward()
            counts.append(reads.call_count)
        optimizer.step()
    return len(optimizer.layout.buckets), counts


def test_sum_goes_to_memory_only_where_its_buffer_is_needed() -> None:
    """Two buffers serve all buckets: the last two sums are taken as the update reads them."""
    for num_buckets, counts in run_ranks(2, _early_sums):
        assert num_buckets >= 4
        assert counts == [num_buckets - 2] * 5


_PATIENCE_S = 1.0


def _waits_after_a_stall(rank: int) -> tuple[int, list[float]]:
    """Rank 1 once hangs in backward for longer than its peer waits: buffers lent, and later waits in seconds."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)))
    optimizer = distadam.AdamW(layers.named_parameters(), lr=1e-2, comm=CommPolicy(bucket_mb=4096 / 2**20))
    acquire, waits = BufferPool.acquire, []

    def timed(pool: BufferPool, *arguments: Any) -> FullBuffer:
        began_s = time.monotonic()
        buffer = acquire(pool, *arguments)
        waits.append(time.monotonic() - began_s)
        return buffer

    def hang(grad: Tensor) -> None:
        if rank == 1 and step == 0:
            time.sleep(1.5 * _PATIENCE_S)

    for step in range(5):
        if step == 1:
            waits.clear()
        middle = layers[:3](torch.ones(4, 30))
        middle.register_hook(hang)
        impatient = mock.patch.object(buffers, "PATIENCE_S", _PATIENCE_S)
        with impatient, mock.patch.object(BufferPool, "acquire", timed):
            layers[3:](middle).square().mean().backward()
        optimizer.step()
    return optimizer._reducer._pools.wire.depth or 0, waits


def test_rank_that_once_took_another_buffer_does_not_hold_up_every_step() -> None:
    """It would read its peers' gradients later than they wait for, in every step, if they had not as many buffers."""
    (depth, waits), (other_depth, other_waits) = run_ranks(2, _waits_after_a_stall)
    assert depth == other_depth > 2
    assert waits
    assert max(waits + other_waits) < _PATIENCE_S


def _written(rank: int, share: bool) -> tuple[float, str]:
    """Let rank 1 write a parameter; return what rank 0 sees, and what the next step says."""
    model = Model()
    optimizer = distadam.SGD(model.named_parameters(), lr=0.0, shard=ShardPolicy(share_parameters=share))
    weight = model.layers[0].weight
    with torch.no_grad():
        weight.fill_(1.0) if rank == 0 else None
    optimizer.reload_parameters()
    dist.barrier()
    if rank == 1:
        with torch.no_grad():
            weight[0, 0] = 7.0
    dist.barrier()
    found = weight[0, 0].item()
    model(torch.ones(1, 30)).sum().backward()
    try:
        optimizer.step()
    except (UsageError, distadam.RankMismatchError) as error:
        return found, type(error).__name__
    return found, "nothing"


def test_write_outside_of_step_is_seen_by_all_and_refused() -> None:
    assert run_ranks(2, _written, True) == [(7.0, "RankMismatchError"), (7.0, "UsageError")]
    assert run_ranks(2, _written, False) == [(1.0, "RankMismatchError"), (7.0, "UsageError")]


def _pss(rank: int, share: bool) -> float:
    """MB of memory that this rank's 64 MB of parameters take, shared pages counted once."""

    def pss() -> int:
        with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
            return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))

    gc.collect()
    before = pss()
    param = nn.Parameter(torch.ones(16 << 20))
    optimizer = distadam.SGD([param], shard=ShardPolicy(share_parameters=share))
    dist.barrier()
    param.detach().sum()  # every rank looks at all of it
    dist.barrier()
    used = (pss() - before) / 1024
    dist.barrier()
    del optimizer
    return used


def test_shared_parameters_take_their_memory_once() -> None:
    assert sum(run_ranks(2, _pss, False)) > 120
    assert sum(run_ranks(2, _pss, True)) < 80


def _refused(rank: int, case: str) -> str:
    params = [nn.Parameter(torch.ones(100))]
    shard = ShardPolicy(share_parameters=True)
    comm = CommPolicy(reduce="exchange") if case == "exchange" else CommPolicy()
    identity = f"host {rank}" if case == "two hosts" else "one host"
    with (
        mock.patch.object(collectives_module, "machine_identity", return_value=identity),
        pytest.raises(ConfigError) as raised,
    ):
        distadam.SGD(params, shard=shard, comm=comm)
    return str(raised.value)


@pytest.mark.parametrize("case", ["exchange", "two hosts"])
def test_sharing_is_refused_where_ranks_share_no_memory(case: str) -> None:
    for message in run_ranks(2, _refused, case):
        assert "share_parameters=True" in message


def _transport(rank: int) -> str:
    with mock.patch.object(collectives_module, "machine_identity", return_value=f"host {rank}"):
        optimizer = distadam.SGD([nn.Parameter(torch.ones(100))])
    return str(optimizer.kernel_report().as_dict()[0]["reduce"])


def test_ranks_of_two_hosts_exchange() -> None:
    assert run_ranks(2, _transport) == ["exchange"] * 2


def _pickled(rank: int) -> bool:
    """Copies by pickle, and a process that is forked as DataLoader's workers are."""
    model = Model()
    optimizer = distadam.SGD(model.named_parameters())
    weight = model.layers[0].weight.detach()
    copied = pickle.loads(pickle.dumps(weight))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(float(weight.sum())).encode())
        os._exit(0)
    os.waitpid(child, 0)
    forked = float(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    return not weight.is_shared() and forked == float(copied.sum())


def test_parameters_can_be_pickled_and_forked() -> None:
    assert run_ranks(2, _pickled) == [True, True]


# Peers that are gone --------------------------------------------------------------------------------------------------

PHASES = ("backward", "before step", "gather", "construction", "full state")


def _lose_a_peer(rank: int, phase: str, how: str) -> None:
    """Rank 1 dies, or stops, in ``phase``; the others must raise CommError that names it."""
    victim = dist.get_world_size() - 1

    def end() -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    if phase == "construction":
        end()
    model = Model()
    optimizer = distadam.AdamW(model.named_parameters(), comm=CommPolicy(bucket_mb=4096 / 2**20, timeout_s=2.0))
    if phase == "gather":
        optimizer.prefetch(model)
    for step in range(3):
        if step == 2 and phase == "backward":
            model.layers[1].weight.register_hook(lambda grad: end())
        model(torch.ones(2, 30)).sum().backward()
        if step == 2 and phase == "before step":
            end()
        optimizer.step()
        if step == 1 and phase == "gather":
            end()
        if step == 1 and phase == "full state":
            end()
            optimizer.full_state_dict()


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        *((phase, "killed") for phase in PHASES),
        ("backward", "stopped"),
        pytest.param("gather", "stopped", marks=pytest.mark.long),
    ],
)
def test_peer_that_is_gone_is_a_comm_error_on_the_others(phase: str, how: str) -> None:
    pool = Pool(2, timeout_s=2.0)
    try:
        with pytest.raises(RanksFailed) as failed:
            pool.run(_lose_a_peer, phase, how, timeout_s=25.0 if how == "killed" else 10.0)
        kind, text = failed.value.errors[0]
        assert kind == CommError.__name__, text
        assert failed.value.errors[1][0] in ("Died", "Hang")
    finally:
        pool.close()
