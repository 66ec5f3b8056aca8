"""``reduce="shared"`` between CUDA devices: torch's symmetric memory itself, streams, barriers that time out.

Sums have the bits of `TreeSum` on the CPU over the same values: float32 additions in one order, which IEEE fixes.
Trained are zeros by gradients of small integers and powers of two, exact in every order, so what gloo's own collectives
train on the CPU has the same bits.

Two ranks, on two devices with NCCL where there are two; on one device by torch's switch for ranks that share one, with
gloo for what is not read from memory: the same collectives, but the two take turns on it. DISTADAM_GPU_TESTS_ON_CPU=1
runs what needs no CUDA on the double of tests/symmetric_double.py: a test of these tests.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.comm import Collectives, Groups, Streams
from distadam.comm.tree import TreeSum
from tests.ranks import Pool, RanksFailed, run_ranks
from tests.symmetric_double import devices

NUM_DEVICES = torch.cuda.device_count()
ON_CPU = NUM_DEVICES == 0 and os.environ.get("DISTADAM_GPU_TESTS_ON_CPU") == "1"
REASON = "needs a CUDA device; torch.cuda.device_count() is 0"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES == 0 and not ON_CPU, reason=REASON)]
CUDA_ONLY = pytest.mark.skipif(NUM_DEVICES == 0, reason=REASON)
MANY = 20_000_000 if NUM_DEVICES else 600_000  # on CUDA more than the staging buffer holds
TWO_DEVICES = pytest.mark.skipif(NUM_DEVICES < 2, reason=f"needs two CUDA devices, found {NUM_DEVICES}")


def _begin(rank: int) -> tuple[torch.device, ShardPolicy]:
    """Return this rank's device and the group of both."""
    if NUM_DEVICES == 0:
        return torch.device("cpu"), ShardPolicy()
    if NUM_DEVICES == 1:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", rank % NUM_DEVICES)
    torch.cuda.set_device(device)
    if NUM_DEVICES == 1:
        return device, ShardPolicy()
    return device, ShardPolicy(shard_group=dist.new_group(backend="nccl"))


def _devices() -> AbstractContextManager[None]:
    return devices(latest_s=0.002) if NUM_DEVICES == 0 else nullcontext()


def _lag(device: torch.device, rank: int, turn: int) -> None:
    """Let one rank's device be late, in turns; its host goes on."""
    if device.type == "cuda" and rank == turn % 2:
        torch.cuda._sleep(20_000_000)


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)).to(
        dtype
    )


def _sums_and_gathers(rank: int, dtype: torch.dtype) -> str:
    device, shard_policy = _begin(rank)
    owner = nn.Module()
    with _devices():
        collectives = Collectives(Groups.resolve(shard_policy, None, owner), Streams(), None, "shared")
        collectives.map_devices([device])
        wide, tree = torch.promote_types(dtype, torch.float32), TreeSum(2)
        for turn, numel in enumerate((64, 4096, 300_000, MANY)):
            values = [_values(other, 2 * numel, dtype) for other in range(2)]
            mine = slice(rank * numel, (rank + 1) * numel)
            expected = torch.empty(numel, dtype=wide)
            tree.add(expected, [value[mine] for value in values])
            full = collectives.empty("gradient_buffers", 2 * numel, dtype, device)
            shard = torch.empty(numel, dtype=wide, device=device)
            _lag(device, rank, turn)
            full.copy_(values[rank])
            pending = collectives.reduce_scatter(shard, full, "test")
            pending.reading.wait()
            full.fill_(-1.0)
            pending.wait()
            assert torch.equal(shard.cpu(), expected), f"sum of {numel} elements"
            whole = collectives.empty("parameters", 2 * numel, dtype, device).zero_()
            private = torch.zeros(2 * numel, dtype=dtype, device=device)
            for turn_of_gather, target in enumerate((whole, private)):
                _lag(device, rank, turn_of_gather)
                part = target[mine].copy_(values[rank][mine])
                collectives.all_gather(target, part, "test").wait()
                found = target.clone()
                part.fill_(-1.0)  # after the wait it is this rank's again
                both = torch.cat([values[other][other * numel : (other + 1) * numel] for other in range(2)])
                assert torch.equal(found.cpu(), both), f"gather of {numel} elements"
    return collectives.transport(device)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_and_gathers_have_the_bits_of_the_tree(dtype: torch.dtype) -> None:
    assert run_ranks(2, _sums_and_gathers, dtype) == ["shared", "shared"]


def _train(rank: int, reduce: str, prefetch: bool) -> list[Tensor]:
    device, shard_policy = _begin(rank) if reduce == "shared" else (torch.device("cpu"), ShardPolicy())
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(device)
    for param in model.parameters():
        nn.init.zeros_(param)
    with _devices():
        optimizer = distadam.SGD(
            model.named_parameters(),
            lr=0.25,
            momentum=0.5,
            shard=shard_policy,
            comm=CommPolicy(reduce=reduce, bucket_mb=20_000 / 2**20),  # type: ignore[arg-type]
        )
        if prefetch:
            optimizer.prefetch(model)
        generator = torch.Generator().manual_seed(rank)
        for step in range(8):
            _lag(device, rank, step)
            if prefetch:
                model(torch.zeros(1, 64, device=device))  # waits for the buckets
            loss = torch.zeros((), device=device)
            for param in model.parameters():
                grad = torch.randint(-8, 9, param.shape, generator=generator).float()
                loss = loss + (param * grad.to(device)).sum()
            loss.backward()
            optimizer.step()
        optimizer.flush()
        assert (optimizer.kernel_report().as_dict()[0]["reduce"] == "shared") == (reduce == "shared")
    return [param.detach().cpu() for param in model.parameters()]


@pytest.mark.parametrize("prefetch", [False, True])
def test_training_has_the_bits_of_the_cpu(prefetch: bool) -> None:
    expected, found = (run_ranks(2, _train, reduce, prefetch) for reduce in ("native", "shared"))
    for rank in range(2):
        assert all(map(torch.equal, expected[rank], found[rank]))
        assert all(map(torch.equal, found[0], found[rank]))


def _never_syncs(rank: int) -> None:
    device, shard_policy = _begin(rank)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(device)
    optimizer = distadam.AdamW(model.parameters(), shard=shard_policy, comm=CommPolicy(reduce="shared"))
    batch = torch.randn(8, 64, device=device)
    for step in range(4):
        if step == 2:  # tables, scratch and streams are made
            torch.cuda.set_sync_debug_mode("error")
        model(batch).sum().backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")


@TWO_DEVICES
def test_backward_and_step_never_sync() -> None:
    run_ranks(2, _never_syncs)


def _lose_a_device(rank: int) -> None:
    device, shard_policy = _begin(rank)
    owner = nn.Module()
    collectives = Collectives(Groups.resolve(shard_policy, 5.0, owner), Streams(), 5.0, "shared")
    collectives.map_devices([device])
    dist.barrier()
    if rank == 1:
        os._exit(1)
    shard = torch.empty(64, device=device)
    collectives.reduce_scatter(shard, torch.ones(128, device=device), "test").wait()
    torch.cuda.synchronize(device)


@CUDA_ONLY
def test_device_whose_peer_is_gone_fails_after_the_timeout() -> None:
    pool = Pool(2)  # of its own: the device of the one that is left is unusable afterwards
    try:
        with pytest.raises(RanksFailed) as failed:
            pool.run(_lose_a_device, timeout_s=60.0)
        assert failed.value.errors[0][0] not in ("Hang", "Died"), failed.value.errors[0]
        assert failed.value.errors[1][0] == "Died"
    finally:
        pool.close()
