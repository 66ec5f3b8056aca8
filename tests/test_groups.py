"""Process groups: an optimizer has its own, over the caller's ranks, and gives them back when it is gone.

Gradients are small integers and numbers of ranks powers of two where a division follows, or the same division is done
here: bits are compared (rtol=0, atol=0). Optimizers have a timeout of a few seconds: what would hang is an error.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distadam
from distadam.comm import groups as groups_module
from tests.ranks import Pool, run_ranks

COMM = distadam.CommPolicy(timeout_s=10.0, bucket_mb=256 / 2**20)


def make(
    shard: distadam.ShardPolicy | None = None, *, comm: distadam.CommPolicy = COMM
) -> tuple[Any, list[nn.Parameter]]:
    params = [nn.Parameter(torch.arange(150.0)), nn.Parameter(torch.arange(7.0))]
    optimizer = distadam.SGD(params, lr=0.5, shard=shard or distadam.ShardPolicy(), comm=comm)
    return optimizer, params


def backward(params: list[nn.Parameter], value: float) -> None:
    sum(param.sum() * value for param in params).backward()  # type: ignore[union-attr]


def moved(params: list[nn.Parameter], gradients: list[float]) -> bool:
    """Whether plain SGD with lr 0.5 has taken these gradients' steps."""
    return all(
        torch.equal(param.detach(), torch.arange(float(param.numel())) - 0.5 * sum(gradients)) for param in params
    )


def group_names(optimizer: Any) -> tuple[str, ...]:
    """Names of the data and control groups that an optimizer leases."""
    groups = optimizer._collectives.groups
    leased = (groups.shard, groups.shard_control, groups.replicate, groups.replicate_control)
    return tuple(group.group_name for group in leased if group is not None)


def num_collectives(*groups: dist.ProcessGroup) -> list[int]:
    return [group._get_sequence_number_for_group() for group in groups]


# The caller's groups --------------------------------------------------------------------------------------------------


def _use_everything(optimizer: Any, params: list[nn.Parameter]) -> None:
    for _ in range(2):
        backward(params, 1.0)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    with optimizer.no_sync():
        backward(params, 1.0)
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.full_grad("param.0")
    optimizer.step()
    assert optimizer.grad_norm is not None
    optimizer.load_state_dict(optimizer.full_state_dict(to=None))
    optimizer.reload_parameters()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def _communicate_on_the_callers_groups(rank: int, num_ranks: int) -> dict[str, tuple[list[int], list[int]]]:
    world = dist.group.WORLD
    sub = dist.new_group(list(range(num_ranks)))
    line = init_device_mesh("cpu", (num_ranks,))
    policies = {
        "default": (distadam.ShardPolicy(), [world]),
        "sub-group": (distadam.ShardPolicy(shard_group=sub), [world, sub]),
        "mesh": (distadam.ShardPolicy(mesh=line), [world, line.get_group()]),
    }
    if num_ranks == 4:
        grid = init_device_mesh("cpu", (2, 2))
        policies["grid"] = (distadam.ShardPolicy(mesh=grid), [world, grid.get_group(0), grid.get_group(1)])
    counts = {}
    for what, (policy, groups) in policies.items():
        before = num_collectives(*groups)
        _use_everything(*make(policy))
        counts[what] = (before, num_collectives(*groups))
    dist.all_reduce(torch.ones(1))
    counts["counter"] = (before[:1], num_collectives(world))
    return counts


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_optimizer_never_communicates_on_the_callers_group(num_ranks: int) -> None:
    for counts in run_ranks(num_ranks, _communicate_on_the_callers_groups, num_ranks):
        before, after = counts.pop("counter")
        assert after == [before[0] + 1]  # what is counted is the caller's own collectives
        for what, (before, after) in counts.items():
            assert before == after, what


@contextlib.contextmanager
def sharing_the_callers_group() -> Iterator[None]:
    lease = groups_module._lease
    groups_module._lease = lambda parent, timeout_s, owner: groups_module.Lease(parent, parent, parent)
    try:
        yield
    finally:
        groups_module._lease = lease


def _share_the_callers_group(rank: int) -> tuple[list[int], list[int]]:
    before = num_collectives(dist.group.WORLD)
    with sharing_the_callers_group():
        make()
    return before, num_collectives(dist.group.WORLD)


def test_the_count_of_collectives_notices_a_shared_group() -> None:
    for before, after in run_ranks(2, _share_the_callers_group):
        assert before != after


def _interleave(rank: int, num_ranks: int) -> bool:
    optimizer, params = make()
    for step in range(3):
        mine = torch.full((1000,), float(rank + 1))
        work = dist.all_reduce(mine, async_op=True) if (rank + step) % 2 else None
        backward(params, float(num_ranks * (rank + step)))
        if work is None:
            work = dist.all_reduce(mine, async_op=True)
        if rank != step:
            work.wait()
        optimizer.step()
        work.wait()
        if not torch.equal(mine, torch.full((1000,), num_ranks * (num_ranks + 1) / 2)):
            return False
    return moved(params, [float(sum(rank + step for rank in range(num_ranks))) for step in range(3)])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_callers_collectives_may_fall_anywhere_between_the_optimizers(num_ranks: int) -> None:
    assert all(run_ranks(num_ranks, _interleave, num_ranks))


def _interleave_two_optimizers(rank: int, num_ranks: int) -> tuple[bool, bool, bool]:
    first, first_params = make()
    second, second_params = make()
    for step in range(3):
        order = [(first_params, 1.0), (second_params, 2.0)]
        for params, value in order if (rank + step) % 2 else order[::-1]:
            backward(params, value * num_ranks * (rank + step))
        for optimizer in (first, second):
            optimizer.step()
    gradients = [float(sum(rank + step for rank in range(num_ranks))) for step in range(3)]
    return (
        not set(group_names(first)) & set(group_names(second)),
        moved(first_params, gradients),
        moved(second_params, [2 * gradient for gradient in gradients]),
    )


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_two_live_optimizers_have_groups_of_their_own(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _interleave_two_optimizers, num_ranks) == [(True, True, True)] * num_ranks


def _clip_two_optimizers_together(rank: int, num_ranks: int) -> tuple[float, list[Tensor]]:
    params = [nn.Parameter(torch.arange(64.0)) for _ in range(3)]
    optimizers = [
        distadam.SGD([("a", params[0])], lr=0.5, comm=COMM),
        distadam.SGD([("b", params[1]), ("c", params[2])], lr=0.25, comm=COMM),
    ]
    (params[0][0] * 3.0 + params[1][5] * 4.0 + params[2][7] * 12.0).backward()
    norm = nn.utils.clip_grad_norm_([params[2], params[0], params[1]], 6.5)
    nn.utils.clip_grad_value_(params, 5.0)
    for optimizer in optimizers:
        optimizer.step()
    return norm.item(), [param.detach().clone() for param in params]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradients_of_two_optimizers_are_clipped_together(num_ranks: int) -> None:
    params = [nn.Parameter(torch.arange(64.0)) for _ in range(3)]
    (params[0][0] * 3.0 + params[1][5] * 4.0 + params[2][7] * 12.0).backward()
    assert nn.utils.clip_grad_norm_(params, 6.5).item() == 13.0
    nn.utils.clip_grad_value_(params, 5.0)
    torch.optim.SGD(params[:1], lr=0.5, fused=True).step()
    torch.optim.SGD(params[1:], lr=0.25, fused=True).step()
    for norm, results in run_ranks(num_ranks, _clip_two_optimizers_together, num_ranks):
        assert norm == 13.0
        for result, param in zip(results, params, strict=True):
            torch.testing.assert_close(result, param.detach(), rtol=0, atol=0)


# Leases ---------------------------------------------------------------------------------------------------------------


def _train(num_ranks: int, rank: int, **options: Any) -> tuple[tuple[str, ...], bool]:
    optimizer, params = make(**options)
    backward(params, float(num_ranks * rank))
    optimizer.step()
    return group_names(optimizer), moved(params, [float(sum(range(num_ranks)))])


def _build_again_and_again(rank: int, num_ranks: int) -> tuple[list[tuple[str, ...]], bool, int]:
    results = [_train(num_ranks, rank)]
    gc.collect()
    num_groups = len(dist.distributed_c10d._world.pg_map)
    for _ in range(5):
        results.append(_train(num_ranks, rank))
        gc.collect()
    grown = len(dist.distributed_c10d._world.pg_map) - num_groups
    return [names for names, _ in results], all(right for _, right in results), grown


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_groups_of_dead_optimizers_are_used_again(num_ranks: int) -> None:
    answers = run_ranks(num_ranks, _build_again_and_again, num_ranks)
    for names, right, grown in answers:
        assert len(set(names)) == 1
        assert right
        assert grown == 0
        assert names == answers[0][0]


def _collect_at_different_times(rank: int, num_ranks: int) -> list[tuple[tuple[str, ...], bool]]:
    results = []
    gc.disable()
    try:
        old = make()[0]
        old.cycle = old  # lives until garbage is collected
        results.append((group_names(old), True))
        del old
        if rank == 0:
            gc.collect()
        results.append(_train(num_ranks, rank))  # the other ranks' old lease is still taken
        gc.collect()
        results.append(_train(num_ranks, rank))
    finally:
        gc.enable()
    return results


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_agree_on_groups_when_garbage_is_collected_at_different_times(num_ranks: int) -> None:
    answers = run_ranks(num_ranks, _collect_at_different_times, num_ranks)
    for answer in answers:
        assert answer == answers[0]
        (first, _), (second, _), (third, _) = answer
        assert first != second
        assert third == first  # free on every rank again
        assert all(right for _, right in answer)


def _die_with_a_reduction_in_flight(rank: int, num_ranks: int) -> list[tuple[tuple[str, ...], bool]]:
    optimizer, params = make()
    names = group_names(optimizer)
    if rank == 0:
        backward(params, 5.0)  # launches reductions that no other rank takes part in
    del optimizer, params
    gc.collect()
    return [(names, True), _train(num_ranks, rank), _train(num_ranks, rank)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_groups_with_a_reduction_in_flight_on_one_rank_are_not_used_again(num_ranks: int) -> None:
    pool = Pool(num_ranks)  # a group is left with a reduction that never ends
    try:
        answers = pool.run(_die_with_a_reduction_in_flight, num_ranks)
    finally:
        pool.close()
    for answer in answers:
        (first, _), (second, right), (third, right_again) = answer
        assert right
        assert right_again
        assert first != second
        assert third == second


def _be_in_one_more_group(rank: int, num_ranks: int) -> tuple[tuple[str, ...], bool]:
    group = dist.new_group([rank], use_local_synchronization=True) if rank == 1 else None
    result = _train(num_ranks, rank)
    del group
    return result


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_building_works_when_ranks_are_in_different_numbers_of_groups(num_ranks: int) -> None:
    pool = Pool(num_ranks)  # a new one: groups must still have to be made
    try:
        answers = pool.run(_be_in_one_more_group, num_ranks)
    finally:
        pool.close()
    assert all(right for _, right in answers)
    assert len({names for names, _ in answers}) == 1


def _read_timeouts(rank: int) -> list[list[float]]:
    def timeouts(optimizer: Any) -> list[float]:
        groups = optimizer._collectives.groups
        return [
            group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            for group in (groups.shard, groups.shard_control)
        ]

    short = dist.new_group([0, 1], timeout=torch.distributed.default_pg_timeout.__class__(seconds=33))
    return [
        timeouts(make(comm=distadam.CommPolicy())[0]),
        timeouts(make(comm=distadam.CommPolicy(timeout_s=7.5))[0]),
        timeouts(make(distadam.ShardPolicy(shard_group=short), comm=distadam.CommPolicy())[0]),
    ]


def test_timeout_is_the_groups_own_unless_given() -> None:
    world_s = 60.0  # what tests/ranks.py gives its process groups
    assert run_ranks(2, _read_timeouts) == [[[world_s] * 2, [7.5] * 2, [33.0] * 2]] * 2


# Sub-groups and meshes ------------------------------------------------------------------------------------------------


def _sub_groups(rank: int) -> tuple[bool, list[Tensor]]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    optimizer, params = make(distadam.ShardPolicy(shard_group=halves[rank // 2]))
    for step in range(1 + rank // 2):  # the halves take different numbers of steps
        backward(params, 2.0 * (rank + step))
        optimizer.step()
    expected = {0: [1.0], 1: [5.0, 7.0]}[rank // 2]
    return moved(params, expected), [param.detach().clone() for param in params]


def test_sub_groups_train_by_themselves() -> None:
    answers = run_ranks(4, _sub_groups)
    assert all(right for right, _ in answers)
    assert not torch.equal(answers[0][1][0], answers[2][1][0])


def _some_ranks_only(rank: int) -> tuple[bool, str]:
    group = dist.new_group([1, 2])
    if rank == 0:
        try:
            make(distadam.ShardPolicy(shard_group=group))
        except distadam.ConfigError as error:
            return True, str(error)
        return False, ""
    optimizer, params = make(distadam.ShardPolicy(shard_group=group))
    backward(params, float(2 * rank))
    optimizer.step()
    return moved(params, [3.0]), ""


def test_group_of_some_ranks_trains_there_and_is_refused_elsewhere() -> None:
    answers = run_ranks(3, _some_ranks_only)
    assert [right for right, _ in answers] == [True] * 3
    assert "shard_group" in answers[0][1]
    assert "rank 0" in answers[0][1]


def _grid(rank: int, how: str) -> tuple[bool, tuple[int, int, int, int], int]:
    if how == "mesh":
        policy = distadam.ShardPolicy(mesh=init_device_mesh("cpu", (2, 2)))
    else:
        shards = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        policy = distadam.ShardPolicy(shard_group=shards[rank // 2], replicate_group=replicas[rank % 2])
    optimizer, params = make(policy)
    for step in range(2):
        backward(params, 4.0 * (rank + step))
        optimizer.step()
    groups = optimizer._collectives.groups
    place = (groups.shard_rank, groups.num_shards, groups.replicate_rank, groups.num_replicas)
    state = optimizer.full_state_dict(to=3)
    return moved(params, [6.0, 10.0]), place, len(state)


@pytest.mark.parametrize("how", ["mesh", "groups"])
def test_grid_averages_over_shards_and_replicas(how: str) -> None:
    answers = run_ranks(4, _grid, how)
    assert [right for right, _, _ in answers] == [True] * 4
    assert [place for _, place, _ in answers] == [(0, 2, 0, 2), (1, 2, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]
    assert [size for _, _, size in answers] == [0, 0, 0, 2]


def _grid_with_gaps(rank: int, lacking: tuple[int, ...], num_backwards: int) -> list[float]:
    params = [nn.Parameter(torch.zeros(64)) for _ in range(3)]
    mesh = init_device_mesh("cpu", (2, 2))
    optimizer = distadam.SGD(params, lr=1.0, shard=distadam.ShardPolicy(mesh=mesh), comm=COMM)
    for step in range(3):  # the first step teaches that there are several rounds
        for number in range(num_backwards):
            gap = step == 2 and rank in lacking and number > 0
            sum(param.sum() * 4.0 for i, param in enumerate(params) if not (gap and i == 1)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [param[0].item() for param in params]


@pytest.mark.parametrize("lacking", [(1,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("num_backwards", [2, 3])
def test_grid_takes_several_backwards_with_gaps_on_some_ranks(num_backwards: int, lacking: tuple[int, ...]) -> None:
    full = 3.0 * 4.0 * num_backwards
    gaps = float(len(lacking) * (num_backwards - 1))
    for values in run_ranks(4, _grid_with_gaps, lacking, num_backwards):
        assert values == [-full, -full + gaps, -full]


def _replicas_only(rank: int) -> tuple[bool, int]:
    optimizer, params = make(distadam.ShardPolicy(mesh=init_device_mesh("cpu", (2, 1))))
    backward(params, float(2 * rank))
    optimizer.step()
    return moved(params, [1.0]), optimizer.layout.num_shards


def test_mesh_of_replicas_alone_is_data_parallel_without_shards() -> None:
    assert run_ranks(2, _replicas_only) == [(True, 1)] * 2


def _unsorted_ranks(rank: int) -> bool:
    group = dist.new_group([2, 0, 1], sort_ranks=False)
    optimizer, params = make(distadam.ShardPolicy(shard_group=group))
    for step in range(2):
        backward(params, float(3 * (rank + step)))
        optimizer.step()
    return moved(params, [3.0, 6.0])


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters, reason="this torch sorts the ranks of every group"
)
def test_group_with_ranks_in_another_order_trains() -> None:
    assert all(run_ranks(3, _unsorted_ranks))


def _refused_policies(rank: int) -> dict[str, tuple[str, str]]:
    world = dist.group.WORLD
    other = dist.new_group([0, 1])
    cube = DeviceMesh("cpu", torch.tensor([[[0, 1]]]))
    cases: dict[str, Callable[[], object]] = {
        "replicas without shards": lambda: make(distadam.ShardPolicy(replicate_group=other)),
        "the same ranks twice": lambda: make(distadam.ShardPolicy(shard_group=world, replicate_group=other)),
        "mesh and group": lambda: distadam.ShardPolicy(mesh=cube, shard_group=other),
        "three axes": lambda: distadam.ShardPolicy(mesh=cube),
        "stage": lambda: distadam.ShardPolicy(stage=3),  # type: ignore[arg-type]
        "timeout": lambda: distadam.CommPolicy(timeout_s=0),
        "bucket": lambda: distadam.CommPolicy(bucket_mb=-1),
    }
    results = {}
    for what, call in cases.items():
        try:
            call()
            results[what] = ("nothing", "")
        except Exception as error:
            results[what] = (type(error).__name__, str(error))
    return results


def test_policies_that_are_no_grid_are_refused() -> None:
    words = {
        "replicas without shards": "shard_group=",
        "the same ranks twice": "DeviceMesh",
        "mesh and group": "both",
        "three axes": "axis",
        "stage": "stage",
        "timeout": "timeout_s",
        "bucket": "bucket_mb",
    }
    for results in run_ranks(2, _refused_policies):
        assert set(results) == set(words)
        for what, (name, message) in results.items():
            assert name == "ConfigError", (what, name, message)
            assert words[what] in message, (what, message)


def test_one_process_without_a_group_leases_nothing() -> None:
    assert not dist.is_initialized()
    optimizer, params = make()
    backward(params, 3.0)
    optimizer.step()
    assert moved(params, [3.0])
    assert group_names(optimizer) == ()
    assert optimizer.comm_stats.calls == {}
