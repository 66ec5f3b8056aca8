"""``reduce="shared"`` on CUDA devices (comm/symmetric.py), played by CPU ranks whose devices are threads.

`tests.symmetric_double` stands for torch's symmetric memory and for a stream; everything else is the code that runs on
CUDA, between real processes. Everything compared has the same bits: sums are taken in the order of `Exchange`. What a
device does itself is tested by tests/gpu/test_symmetric_on_gpu.py.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.comm import Collectives, Groups, Streams
from distadam.comm import symmetric as symmetric_module
from distadam.comm import tree as tree_module
from distadam.comm.device_memory import DeviceMemory
from distadam.comm.exchange import Exchange
from distadam.comm.streams import Work
from distadam.comm.symmetric import Symmetric
from distadam.comm.tree import TreeSum
from distadam.errors import CommError, ConfigError
from tests.ranks import Pool, RanksFailed, run_ranks
from tests.symmetric_double import Devices, DoubleHandle, DoubleMemory, Mark, devices
from tests.test_dry_run import MixedDevices
from tests.test_shared import Model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)).to(
        dtype
    )


def _symmetric(rank: int) -> Symmetric:
    group = dist.group.WORLD
    assert group is not None
    memory: Any = DoubleMemory(group, torch.device("cpu"))
    return Symmetric(memory, rank, dist.get_world_size(), 30.0)


# Collectives ----------------------------------------------------------------------------------------------------------


def _same_as_exchange(rank: int, stage_nbytes: int) -> None:
    num_ranks = dist.get_world_size()
    by_messages = Exchange(dist.group.WORLD, None)
    with devices(latest_s=0.001), mock.patch.object(symmetric_module, "STAGE_NBYTES", stage_nbytes):
        over = _symmetric(rank)
        over.probe()
        for dtype in DTYPES:
            wide = torch.promote_types(dtype, torch.float32)
            for numel in (64, 192, 140_032):
                if numel * num_ranks * dtype.itemsize > 40 * stage_nbytes:
                    continue  # hundreds of parts show nothing more
                full, values = torch.empty(num_ranks * numel, dtype=dtype), _values(rank, num_ranks * numel, dtype)
                full.copy_(values)
                found, expected = torch.empty(numel, dtype=wide), torch.empty(numel, dtype=wide)
                by_messages.reduce_scatter(expected, full.clone()).wait()
                work = over.reduce_scatter(found, full)
                work.released.wait()  # type: ignore[attr-defined]
                full.fill_(-1.0)  # the pool's next gradient
                work.wait()
                assert torch.equal(found, expected)
                assert work.is_completed()
                parts = [_values(other, num_ranks * numel, dtype)[:numel] for other in range(num_ranks)]
                mapped = over.empty(num_ranks * numel, dtype).zero_()
                mine = mapped[rank * numel : (rank + 1) * numel].copy_(values[:numel])
                over.all_gather(mapped, mine).wait()
                assert torch.equal(mapped, torch.cat(parts))
                mine.fill_(-1.0)  # after the wait it is this rank's again
                private = torch.zeros(num_ranks * numel, dtype=dtype)
                over.all_gather(private, values[:numel]).wait()
                assert torch.equal(private, torch.cat(parts))
                over.release(mapped)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("stage_nbytes", [100_000, 64 << 20])
def test_results_have_the_bits_of_exchange(num_ranks: int, stage_nbytes: int) -> None:
    run_ranks(num_ranks, _same_as_exchange, stage_nbytes)


Place = tuple[str, int]


def _barriers(rank: int, dropped: Place | None, seed: int = 0) -> tuple[bool, list[Place]]:
    """Reduce and gather with late devices, one barrier taken out; return whether all was right, and what was passed."""
    num_ranks, numel, right = dist.get_world_size(), 4096, True
    small_stage = mock.patch.object(symmetric_module, "STAGE_NBYTES", 64 << 10)
    with devices(latest_s=0.004, dropped=dropped, seed=seed), small_stage:
        over = _symmetric(rank)
        full, shard = torch.empty(num_ranks * 2 * numel), torch.empty(2 * numel)
        mapped, private = over.empty(num_ranks * numel, torch.float32), torch.empty(num_ranks * numel)
        mine = mapped[rank * numel : (rank + 1) * numel]
        for number in range(1, 12):
            Devices.be_late()
            full.fill_(float(number))  # in two parts
            work = over.reduce_scatter(shard, full)
            work.released.wait()  # type: ignore[attr-defined]
            full.fill_(-1.0)
            work.wait()
            right = right and bool((shard == num_ranks * number).all())
        for number in range(1, 12):
            Devices.be_late()
            mine.fill_(float(number + rank))
            over.all_gather(mapped, mine).wait()
            mine.fill_(-1.0)  # by hand, say
            right = right and all(
                bool((mapped[peer * numel : (peer + 1) * numel] == number + peer).all())
                for peer in range(num_ranks)
                if peer != rank
            )
        for number in range(1, 12):
            over.all_gather(private, torch.full((numel,), float(number))).wait()
            right = right and bool((private == number).all())
        return right, sorted(Devices.seen)


def test_each_barrier_is_needed() -> None:
    clean = run_ranks(2, _barriers, None)
    assert [right for right, _ in clean] == [True, True]
    places = clean[0][1]
    assert sorted(name for name, _ in places) == ["_add", "_add", "_copy", "_copy", "_pass_on", "_pass_on"]
    for place in places:
        # Who is late is drawn; on a busy machine a few runs may draw nothing that shows.
        runs = (run_ranks(2, _barriers, place, seed) for seed in range(20))
        assert not all(right for run in runs for right, _ in run), f"{place} does nothing"


def _memory_is_bounded(rank: int) -> tuple[int, int]:
    with devices():
        over = _symmetric(rank)
        for numel in (64, 128_000, 512_000):
            full = torch.ones(2 * numel, dtype=torch.bfloat16)
            over.reduce_scatter(torch.empty(numel), full).wait()
        return sum(tensor.nbytes for tensor in over.scratch()), len(over.scratch())


def test_staging_buffer_and_blocks_are_all_it_keeps() -> None:
    for nbytes, number in run_ranks(2, _memory_is_bounded):
        assert number in (1, 2)  # the compiled sum needs no blocks
        assert nbytes <= (64 << 20) + 2 * (4 << 20)


def test_sum_on_a_device_never_reaches_code_for_the_cpu() -> None:
    """Addresses of a device's memory would crash it."""
    meta = torch.device("meta")
    tree = TreeSum(3, meta, 128)
    with mock.patch.object(tree_module.native, "sum_ranks", side_effect=AssertionError):
        tree.add(torch.empty(300, device=meta), [torch.empty(300, device=meta, dtype=torch.bfloat16) for _ in range(3)])
    assert [block.device for block in tree.scratch] == [meta]


class MetaMemory:
    """Memory of a device that can bring nothing to the host; its lane is the current stream."""

    device = torch.device("meta")

    def empty(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, MetaMemory]:
        return torch.empty(numel, dtype=dtype, device="meta"), self

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def barrier(self, channel: int, timeout_ms: int) -> None:
        pass

    def lane(self) -> MetaMemory:
        return self

    def run(self, call: Callable[[], object]) -> Work:
        call()
        mark = Mark()
        mark.over.set()
        return mark


def test_collectives_never_wait_for_the_device() -> None:
    """On meta whatever would bring a value to the host raises, and so does what mixes devices."""
    memory: Any = MetaMemory()
    over, mapped = Symmetric(memory, 1, 3, 30.0), Symmetric(memory, 1, 3, 30.0)
    with MixedDevices() as mode:
        for dtype in DTYPES:
            wide = torch.promote_types(dtype, torch.float32)
            full = torch.empty(3 * 300_032, dtype=dtype, device="meta")
            shard = torch.empty(300_032, dtype=wide, device="meta")
            over.reduce_scatter(shard, full)
            over.all_gather(full, full[300_032:600_064])
            mapped.all_gather(mapped.empty(3 * 300_032, dtype), full[300_032:600_064])
        assert mode.operations
        with pytest.raises(RuntimeError, match="meta"):
            over.probe()  # which does wait: the check can fail


# The optimizer --------------------------------------------------------------------------------------------------------


def _train(rank: int, how: str, dtype: torch.dtype, prefetch: bool, bucket_nbytes: int) -> list[Tensor]:
    """15 steps with everything in them; the parameters after each, and the whole state."""
    if how != "device":
        return _steps(rank, CommPolicy(reduce=how, bucket_mb=bucket_nbytes / 2**20), dtype, prefetch)
    with devices(latest_s=0.001), mock.patch.object(symmetric_module, "STAGE_NBYTES", 4096):
        result = _steps(rank, CommPolicy(reduce="shared", bucket_mb=bucket_nbytes / 2**20), dtype, prefetch)
        assert {name for name, _ in Devices.seen} >= {"_add", "_copy"}  # parameters are read where they are
        return result


def _steps(rank: int, comm: CommPolicy, dtype: torch.dtype, prefetch: bool) -> list[Tensor]:
    model = Model(dtype)
    optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2, comm=comm)
    if prefetch:
        optimizer.prefetch(model)
    seen = []
    for step in range(15):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(4, 30, generator=generator).to(dtype)
        if step == 4:
            with optimizer.no_sync():
                model(x).float().square().mean().backward()
        if step == 8:
            model.late.requires_grad_(True)
        model(x, skip=2 if step % 5 == 3 and rank == 0 else None, late=step >= 8).float().square().mean().backward()
        if step % 3 == 1:
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        if step == 10:
            optimizer.load_state_dict(optimizer.full_state_dict(to=None))
        optimizer.flush()
        seen += [param.detach().clone() for param in model.parameters()]
        if step == 12:
            with torch.no_grad():  # at once: `flush` has made the buffers this rank's again
                for param in model.parameters():
                    param.mul_(0.5)
            optimizer.reload_parameters()
    state = optimizer.full_state_dict(to=None)["state"]
    why = str(optimizer.kernel_report().as_dict()[0]["reason_of_reduce"])
    assert ("by symmetric memory" in why) == (comm.reduce == "shared")
    return seen + [value for entry in state.values() for value in entry.values()]


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "prefetch", "bucket_nbytes"),
    [
        (2, torch.float32, False, 4096),
        (2, torch.bfloat16, True, 4096),
        (2, torch.float32, True, 1 << 20),
        (3, torch.float32, True, 4096),
        (4, torch.bfloat16, False, 4096),
    ],
)
def test_training_has_the_bits_of_exchange(
    num_ranks: int, dtype: torch.dtype, prefetch: bool, bucket_nbytes: int
) -> None:
    expected = run_ranks(num_ranks, _train, "exchange", dtype, prefetch, bucket_nbytes)
    found = run_ranks(num_ranks, _train, "device", dtype, prefetch, bucket_nbytes)
    for rank in range(num_ranks):
        assert len(expected[rank]) == len(found[rank])
        assert all(map(torch.equal, expected[rank], found[rank]))


def _hybrid(rank: int, how: str) -> list[Tensor]:
    """Two hosts of two: gradients are added up inside a shard group by memory, between replicas by the backend."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2))
    comm = CommPolicy(reduce="shared" if how == "device" else "exchange")
    model = nn.Linear(40, 40)
    with devices(latest_s=0.001):
        optimizer = distadam.SGD(model.named_parameters(), lr=1.0, comm=comm, shard=ShardPolicy(mesh=mesh))
        for step in range(3):
            model(torch.full((2, 40), float(rank + step + 1))).sum().backward()  # sums of integers are exact
            optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.long
def test_hybrid_sharding_reads_memory_inside_a_shard_group() -> None:
    expected, found = run_ranks(4, _hybrid, "exchange"), run_ranks(4, _hybrid, "device")
    assert all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))


# Where it cannot be --------------------------------------------------------------------------------------------------


def _refused(rank: int, case: str) -> str:
    params = [nn.Parameter(torch.ones(100))]
    identity = f"host {rank}" if case == "hosts" else "one host"
    obstacle = "torch 2.9 has no symmetric memory" if case == "obstacle" and rank == 1 else ""
    broken = "no link between the devices" if case == "broken" and rank == 1 else ""
    with (
        devices(),
        mock.patch.multiple(Devices, obstacle=obstacle, broken=broken),
        mock.patch.object(symmetric_module, "machine_identity", return_value=identity),
        pytest.raises(ConfigError) as raised,
    ):
        distadam.SGD(params, comm=CommPolicy(reduce="shared"))
    return str(raised.value)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("obstacle", "rank 1: torch 2.9 has no symmetric memory"),
        ("broken", "rank 1: RuntimeError: no link between the devices"),
        ("hosts", "they are processes of several hosts"),
    ],
)
def test_shared_is_refused_on_all_ranks_with_the_reason(case: str, reason: str) -> None:
    for message in run_ranks(2, _refused, case):
        assert 'CommPolicy(reduce="shared") expected' in message
        assert reason in message
        assert 'use reduce="auto" or "native"' in message


def _refused_by_another_replica(rank: int) -> str:
    """Ranks 2 and 3 are a shard group without an obstacle."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2))
    with (
        devices(),
        mock.patch.object(Devices, "obstacle", "torch 2.9 has no symmetric memory" if rank == 1 else ""),
        pytest.raises(ConfigError) as raised,
    ):
        distadam.SGD([nn.Parameter(torch.ones(100))], comm=CommPolicy(reduce="shared"), shard=ShardPolicy(mesh=mesh))
    return str(raised.value)


@pytest.mark.long
def test_shared_is_refused_by_all_replicas_where_one_cannot() -> None:
    for message in run_ranks(4, _refused_by_another_replica):
        assert "rank 1: torch 2.9 has no symmetric memory" in message


def _without_a_device(rank: int) -> str:
    """torch's own module, which has no allocator for this device here."""
    group = dist.group.WORLD
    assert group is not None
    memory = DeviceMemory(group, torch.device("cuda", 0))
    if memory.obstacle():
        return memory.obstacle()
    try:
        memory.empty(64, torch.float32)
    except RuntimeError as error:
        return str(error)
    return "works"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_torch_without_cuda_says_so() -> None:
    for message in run_ranks(2, _without_a_device):
        assert "support" in message or "no symmetric memory" in message, message


@pytest.mark.parametrize(
    ("module", "obstacle"),
    [(None, "has no symmetric memory"), (SimpleNamespace(_SymmetricMemory=object), "has another interface")],
)
def test_other_versions_of_torch_are_an_obstacle(module: Any, obstacle: str) -> None:
    memory = DeviceMemory(None, torch.device("cuda", 0))  # type: ignore[arg-type]
    assert memory.obstacle() == ""
    with mock.patch.dict("sys.modules", {"torch._C._distributed_c10d": module}):
        assert obstacle in memory.obstacle()


def test_torchs_handle_takes_what_is_passed() -> None:
    """The double's signatures, and what `Symmetric` passes by position, are those of the installed torch."""
    from torch._C._distributed_c10d import _SymmetricMemory

    for name in ("get_buffer", "barrier"):
        ours = list(inspect.signature(getattr(DoubleHandle, name)).parameters)[1:]
        signature = str(getattr(_SymmetricMemory, name).__doc__).splitlines()[0]
        theirs = re.findall(r"(\w+): ", signature)[1:]
        assert theirs == ours, signature


def _devices_differ(rank: int) -> str:
    owner = nn.Module()
    collectives = Collectives(Groups.resolve(ShardPolicy(), None, owner), Streams(), None, "shared")
    with pytest.raises(ConfigError) as raised:
        collectives.map_devices([torch.device("cuda", index) for index in range(1 + rank)])
    return str(raised.value)


def test_parameters_on_different_numbers_of_devices_are_refused() -> None:
    for message in run_ranks(2, _devices_differ):
        assert "parameters lie on different numbers of devices ([1, 2], by rank)" in message


def _on_cuda(rank: int, reduce: str) -> tuple[str, str]:
    owner = nn.Module()
    groups = Groups.resolve(ShardPolicy(), None, owner)
    return Collectives(groups, Streams(), None, reduce).transport(torch.device("cuda", 0))


def test_auto_leaves_cuda_to_the_backend_and_says_why() -> None:
    for how, why in run_ranks(2, _on_cuda, "auto"):
        assert how == "native"
        assert why == 'the backend of cuda tensors has its own; "shared" was never measured there'


# Peers that are gone --------------------------------------------------------------------------------------------------


def _lose_a_peer(rank: int, phase: str, how: str) -> None:
    """The last rank dies, or stops, in ``phase``; the others must raise CommError."""

    def end() -> None:
        if rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    with devices():
        model = Model()
        comm = CommPolicy(reduce="shared", bucket_mb=4096 / 2**20, timeout_s=2.0)
        optimizer = distadam.AdamW(model.named_parameters(), comm=comm)
        if phase == "gather":
            optimizer.prefetch(model)
        for step in range(3):
            if step == 2 and phase == "backward":
                model.layers[1].weight.register_hook(lambda grad: end())
            model(torch.ones(2, 30)).sum().backward()
            optimizer.step()
            if step == 1 and phase == "gather":
                end()


@pytest.mark.parametrize(("phase", "how"), [("backward", "killed"), ("gather", "killed"), ("backward", "stopped")])
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


def _silent_device(rank: int) -> str:
    """Hosts live, but rank 1's device never comes to a barrier."""
    with devices():
        over = _symmetric(rank)
        over._timeout_ms = 300
        full, shard = torch.ones(128), torch.empty(64)
        dist.barrier()
        said = "silent"
        try:
            if rank == 0:
                over.reduce_scatter(shard, full).wait()
        except RuntimeError as error:
            said = str(error)
        dist.barrier()  # rank 1 lives until then
        return said


def test_device_that_never_comes_is_an_error_after_the_timeout() -> None:
    assert run_ranks(2, _silent_device) == ["nothing came from rank 1 within 0.3 s", "silent"]
