"""Hybrid sharding: state divided over a shard group, repeated over a replicate group, gradients averaged over both.

Covers, at 4 ranks, 2 x 2 grids given as groups (contiguous and strided) and as a 2-D ``DeviceMesh``, grids with an axis
of one, a 1-D mesh, and groups that are part of the world: the same bits as pure sharding, and as one process that is
given the average over all ranks of the grid (integer gradients; rtol=0, atol=0), with the memory of the shard group
alone. The order of the second stage's all-reduces is tested against completion in any order. Groups that are no grid
end in a named error on every rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.comm.collectives import Collectives
from distadam.comm.streams import Pending
from tests.ranks import run_ranks
from tests.staggered import counts_bytes
from tests.unsharded import BUCKET_MB, OPTIONS, Case, Expected, expected_result, train

_groups: dict[str, Any] = {}
"""Groups of this worker by name: making one is a collective and costs threads, so tests share them."""


def _group_of(name: str, partition: Sequence[Sequence[int]]) -> Any:
    """Return this rank's group of a partition of the world. Collective, the first time."""
    if name not in _groups:
        made = [dist.new_group(list(ranks)) for ranks in partition]
        mine = next((group for group, ranks in zip(made, partition, strict=True) if dist.get_rank() in ranks), made[0])
        _groups[name] = mine
    return _groups[name]


def _mesh(name: str, shape: tuple[int, ...]) -> Any:
    if name not in _groups:
        names = ("replicate", "shard")[-len(shape) :]
        _groups[name] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _groups[name]


ROWS, COLUMNS, ALONE = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]

GRIDS: dict[str, Callable[[], dict[str, Any]]] = {
    "rows x columns": lambda: {
        "shard_group": _group_of("rows", ROWS),
        "replicate_group": _group_of("columns", COLUMNS),
    },
    "columns x rows": lambda: {
        "shard_group": _group_of("columns", COLUMNS),
        "replicate_group": _group_of("rows", ROWS),
    },
    "mesh 2 x 2": lambda: {"mesh": _mesh("mesh 2 x 2", (2, 2))},
    "mesh 4": lambda: {"mesh": _mesh("mesh 4", (4,))},
    "mesh 1 x 4": lambda: {"mesh": _mesh("mesh 1 x 4", (1, 4))},
    "mesh 4 x 1": lambda: {"mesh": _mesh("mesh 4 x 1", (4, 1))},
    "world x alone": lambda: {"shard_group": dist.group.WORLD, "replicate_group": _group_of("alone", ALONE)},
    "alone x world": lambda: {"shard_group": _group_of("alone", ALONE), "replicate_group": dist.group.WORLD},
}
NUM_SHARDS = {grid: 2 for grid in GRIDS} | {
    "mesh 4": 4,
    "mesh 1 x 4": 4,
    "mesh 4 x 1": 1,
    "world x alone": 4,
    "alone x world": 1,
}


@counts_bytes
def _train_on_grid(
    rank: int, grid: str, cases: Sequence[Case], expected: dict[tuple[str, int], Expected]
) -> tuple[list[str], int, int]:
    """Return what differs, and (shards, bytes of moments) of a layout whose size divides by every grid."""
    shard = GRIDS[grid]()
    found = train(rank, 4, cases, expected, **shard)
    optimizer = distadam.AdamW([nn.Parameter(torch.zeros(256))], shard=ShardPolicy(**shard))
    return found, optimizer.layout.num_shards, optimizer.memory_report().nbytes["moments"]


@pytest.mark.parametrize(
    "grid",
    [
        grid if grid in ("rows x columns", "mesh 2 x 2") else pytest.param(grid, marks=pytest.mark.long)
        for grid in GRIDS
    ],
)
def test_grid_has_the_bits_of_pure_sharding(grid: str) -> None:
    # The grid "mesh 4" is pure sharding; all are compared with the same result of one process.
    cases = [
        Case(rule="adamw", variant=1, stage=1, bucket="71 bytes", split="alternating"),
        Case(rule="sgd", variant=1, stage=2, bucket="1 KB"),
    ]
    if grid == "mesh 2 x 2":
        cases += [Case(rule="adam", variant=1, bucket="71 bytes"), Case(rule="rmsprop", variant=1, bucket="25 MB")]
    expected = {(rule, 1): expected_result(rule, 1, 4) for rule in OPTIONS}
    for found, num_shards, nbytes in run_ranks(4, _train_on_grid, grid, cases, expected):
        assert not found, "\n".join(found)
        assert num_shards == NUM_SHARDS[grid]
        assert nbytes == 2 * 4 * 256 // num_shards


def _train_in_part(
    rank: int, members: Sequence[int], cases: Sequence[Case], expected: dict[tuple[str, int], Expected]
) -> list[str] | None:
    group = _group_of(f"part {members}", [members])
    if rank not in members:
        return None
    return train(list(members).index(rank), len(members), cases, expected, shard_group=group)


@pytest.mark.parametrize("members", [(1, 3), (0, 2, 3), (2,)], ids=str)
def test_part_of_the_world_trains_by_itself(members: tuple[int, ...]) -> None:
    cases = [Case(rule="adamw", variant=1), Case(rule="sgd", variant=1, bucket="71 bytes", stage=1)]
    expected = {(rule, 1): expected_result(rule, 1, len(members)) for rule in ("adamw", "sgd")}
    found = run_ranks(4, _train_in_part, members, cases, expected)
    assert found == [[] if rank in members else None for rank in range(4)]


def _two_halves(rank: int, expected: dict[tuple[str, int], Expected]) -> list[str]:
    """Two optimizers at once, on the two halves of the world."""
    group = _group_of("rows", ROWS)
    return train(rank % 2, 2, [Case(rule="adam", variant=1)], expected, shard_group=group)


def test_halves_of_the_world_do_not_hear_each_other() -> None:
    assert run_ranks(4, _two_halves, {("adam", 1): expected_result("adam", 1, 2)}) == [[]] * 4


# The order of the second stage ----------------------------------------------------------------------------------------


def _train_with_any_completion(rank: int, seed: int, expected: dict[tuple[str, int], Expected]) -> list[str]:
    """Reductions look finished at random times, other ones on every rank, as on a busy network."""
    draw = random.Random(100 * seed + rank)
    ready = Pending.ready

    def sometimes(self: Pending, within_s: float) -> bool:
        return ready(self, within_s) and (within_s > 0 or draw.random() < 0.4)

    shard = GRIDS["rows x columns"]()
    cases = [Case(rule="sgd", variant=1, bucket="71 bytes", split="each")] * 2
    with mock.patch.object(Pending, "ready", sometimes):
        return train(rank, 4, cases, expected, **shard)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_grid_has_the_same_bits_when_reductions_end_in_any_order(seed: int) -> None:
    """The pool of stage 2 waits for whichever buffer is free first; replicas must still reduce in one order."""
    found = run_ranks(4, _train_with_any_completion, seed, {("sgd", 1): expected_result("sgd", 1, 4)}, timeout_s=40)
    assert found == [[]] * 4


# Errors ---------------------------------------------------------------------------------------------------------------

NO_GRIDS: dict[str, Callable[[], ShardPolicy]] = {
    "the same group twice": lambda: ShardPolicy(shard_group=_group_of("rows", ROWS), replicate_group=_groups["rows"]),
    "groups that share more than a rank": lambda: ShardPolicy(
        shard_group=dist.group.WORLD, replicate_group=_group_of("rows", ROWS)
    ),
    "replicas that hold other shards": lambda: ShardPolicy(
        shard_group=_group_of("rows", ROWS), replicate_group=_group_of("twisted", [[0, 3], [1, 2]])
    ),
    "shard groups of different sizes": lambda: ShardPolicy(
        shard_group=_group_of("three and one", [[0, 1, 2], [3]]),
        replicate_group=_group_of("pair and ones", [[0, 3], [1], [2]]),
    ),
    "replicate groups of different sizes": lambda: ShardPolicy(
        shard_group=_group_of("rows", ROWS), replicate_group=_group_of("column and ones", [[0, 2], [1], [3]])
    ),
    "replicas without shards": lambda: ShardPolicy(replicate_group=_group_of("columns", COLUMNS)),
}


def _build_on(rank: int, name: str) -> tuple[str, str]:
    try:
        policy = NO_GRIDS[name]()
        distadam.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, shard=policy, comm=CommPolicy(timeout_s=10))
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


@pytest.mark.parametrize("name", NO_GRIDS)
def test_groups_that_are_no_grid_are_refused_on_every_rank(name: str) -> None:
    errors = run_ranks(4, _build_on, name, timeout_s=40)
    assert all(kind == "ConfigError" for kind, _ in errors), errors
    assert all("grid" in text or "shard_group" in text for _, text in errors), errors


def _build_outside(rank: int) -> tuple[str, str]:
    group = _group_of("part (1, 3)", [[1, 3]])
    try:
        distadam.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, shard=ShardPolicy(shard_group=group))
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_rank_outside_the_group_is_refused_and_others_go_on() -> None:
    errors = run_ranks(4, _build_outside)
    assert [kind for kind, _ in errors] == ["ConfigError", "none", "ConfigError", "none"]
    assert "rank 0" in errors[0][1]
    assert "shard_group" in errors[0][1]


def _bad_meshes(rank: int) -> list[str]:
    texts = []
    mesh = _mesh("mesh 2 x 2", (2, 2))
    deep = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c"))
    arguments: list[dict[str, Any]] = [{"mesh": deep}, {"mesh": mesh, "shard_group": dist.group.WORLD}]
    for keywords in arguments:
        with pytest.raises(distadam.ConfigError) as caught:
            ShardPolicy(**keywords)
        texts.append(str(caught.value))
    return texts


def test_policy_refuses_meshes_that_it_cannot_use() -> None:
    for three, both in run_ranks(4, _bad_meshes):
        assert "expected a DeviceMesh of 1 axis (shard) or 2 (replicate, shard)" in three
        assert "got both" in both


# The checks can fail --------------------------------------------------------------------------------------------------


def _train_without_replicas(rank: int, expected: dict[tuple[str, int], Expected]) -> list[str]:
    """Leave out the second stage of the reduction."""
    scatter = Collectives.reduce_scatter

    def first_stage_only(self: Collectives, *args: Any) -> Pending:
        with mock.patch.object(self.streams, "launch_chain", lambda device, first, second: first()):
            return scatter(self, *args)

    with mock.patch.object(Collectives, "reduce_scatter", first_stage_only):
        return train(rank, 4, [Case(rule="sgd", variant=1)], expected, **GRIDS["rows x columns"]())


def test_comparison_fails_when_replicas_do_not_reduce() -> None:
    assert all(run_ranks(4, _train_without_replicas, {("sgd", 1): expected_result("sgd", 1, 4)}))


def test_bucket_sizes_make_several_buckets() -> None:
    """The order of the second stage is tested with more buckets than the pool of stage 2 holds."""
    optimizer, _ = Case(rule="sgd", variant=1, bucket="71 bytes", split="each").build(
        [nn.Parameter(torch.zeros(5)) for _ in range(8)]
    )
    assert len(optimizer.layout.buckets) == 8
    assert BUCKET_MB["71 bytes"] * 2**20 == 71
