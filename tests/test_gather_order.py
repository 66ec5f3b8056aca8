"""The order of updates and gathers is that in which the model's forward waits for buckets: Note [Gather order].

Each layer of the model is a bucket, and each forward is told in which order to go through the layers. What the gatherer
launches is compared with what is expected, exactly, and must be the same on every rank in every step: ranks that launch
different gathers mix up buckets. Parameters are compared with torch.optim on the averaged gradients (rtol=0, atol=0;
gradients are small integers). The last tests let ranks adopt what they have not agreed on, and must see it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh

import distadam
from distadam.comm import Streams
from distadam.engine.order import GatherOrder
from distadam.errors import RankMismatchError
from tests.adversarial import World, run_world
from tests.averaged_oracle import TINY_MB, AveragedOracle, integers
from tests.ranks import RanksFailed, run_ranks

NUM_LAYERS = 4
FIRST_LAYERS_FIRST = [3, 2, 1, 0]  # buckets run backwards through the layers
SHUFFLED = [2, 0, 3, 1]


def buckets_of(layers: Sequence[int]) -> list[int]:
    return [NUM_LAYERS - 1 - layer for layer in layers]


class Model(nn.Module):
    """Layers that run in the order asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 1, bias=False) for _ in range(NUM_LAYERS))
        with torch.no_grad():
            for number, layer in enumerate(self.layers):  # without torch's generator: ranks may be threads
                layer.weight.copy_(integers(layer.weight, number) / 8)

    def forward(self, layers: Sequence[int], seed: int) -> Tensor:
        batch = {layer: integers(self.layers[layer].weight, 10 * seed + layer) for layer in layers}
        if -1 in layers:
            raise ArithmeticError("a forward that ends early")
        return sum(self.layers[layer](batch[layer]).sum() for layer in layers)


def build(prefetch: bool = True, hybrid: bool = False) -> tuple[Model, Any, list[list[int]]]:
    """Return model, optimizer, and what each step launches."""
    model = Model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if hybrid else None
    optimizer = distadam.AdamW(
        model.named_parameters(),
        lr=0.25,
        comm=distadam.CommPolicy(bucket_mb=TINY_MB),
        shard=distadam.ShardPolicy(mesh=mesh),
    )
    assert len(optimizer.layout.buckets) == NUM_LAYERS
    if prefetch:
        optimizer.prefetch(model)
    launched: list[list[int]] = []
    launch, update = optimizer._gatherer.launch, optimizer._update

    def note_launch(flat: Any) -> None:
        launched[-1].append(flat.bucket.index)
        launch(flat)

    def note_step(*args: Any) -> None:
        launched.append([])
        update(*args)

    optimizer._gatherer.launch, optimizer._update = note_launch, note_step
    return model, optimizer, launched


def _train(rank: int, plan: list[list[list[int]]], hybrid: bool) -> tuple[list[list[int]], str]:
    """Train with one order of layers for each step and rank; return what was launched and the reason."""
    model, optimizer, launched = build(hybrid=hybrid)
    twin = Model()
    oracle = AveragedOracle(lambda flats: torch.optim.AdamW(flats, lr=0.25, fused=True), twin.parameters())
    for step, by_rank in enumerate(plan):
        layers = by_rank[rank % len(by_rank)]
        for some, stepper in ((model, optimizer), (twin, oracle)):
            some(layers, 7 * step + rank).backward()
            stepper.step()
            stepper.zero_grad()
    optimizer.flush()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    report = optimizer.kernel_report()
    assert [row["turn"] for row in report.as_dict()] == [report.order.index(row[0]) for row in report.rows]
    assert " ".join(map(str, report.order)) + f" ({report.reason_of_order})" in str(report)
    return launched, report.reason_of_order


def train(num_ranks: int, plan: list[list[list[int]]], hybrid: bool = False) -> tuple[list[list[int]], str]:
    results = run_ranks(num_ranks, _train, plan, hybrid)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_first_step_gathers_in_the_order_of_its_forward(num_ranks: int) -> None:
    launched, reason = train(num_ranks, [[SHUFFLED]] * 2)
    assert launched == [buckets_of(SHUFFLED)] * 2
    assert reason == "as a forward of every rank waited for them"


def test_order_is_learned_anew_when_every_forward_changes() -> None:
    orders = [[0, 1, 2, 3], SHUFFLED, [3, 2, 1, 0], [3, 0, 1, 2]]
    launched, _ = train(2, [[order] for order in orders])
    assert launched == [buckets_of(order) for order in orders]


def test_ranks_keep_their_order_while_their_forwards_differ() -> None:
    different = [[0, 1, 2, 3], [1, 0, 3, 2]]
    launched, reason = train(2, [different, [SHUFFLED], different, [[3, 0, 1, 2], SHUFFLED]])
    assert launched == [FIRST_LAYERS_FIRST, *[buckets_of(SHUFFLED)] * 3]
    assert reason == (
        "as a forward of every rank waited for them; at the last step some rank proposed another order, or none"
    )


@pytest.mark.long
def test_replicas_keep_their_order_while_their_forwards_differ() -> None:
    """Ranks of one shard group agree among themselves, and yet must not follow what the other one does not know."""
    launched, _ = train(4, [[SHUFFLED, SHUFFLED, [0, 1, 2, 3], [0, 1, 2, 3]], [SHUFFLED]], hybrid=True)
    assert launched == [FIRST_LAYERS_FIRST, buckets_of(SHUFFLED)]


def test_layers_that_did_not_run_come_first() -> None:
    """The next forward waits for them at its start; without a gradient a bucket is neither updated nor gathered."""
    launched, _ = train(2, [[SHUFFLED], [[3, 0]], [[2, 3, 0], [3, 0, 1]], [[3, 1, 0]], [[3, 1, 0, 2]]])
    assert launched == [buckets_of(SHUFFLED), [0, 3], buckets_of([1, 2, 3, 0]), buckets_of([3, 1, 0]), [0, 2, 3, 1]]


def _other_forwards(rank: int, disturb: Callable[[Model, Any], None]) -> list[list[int]]:
    model, optimizer, launched = build()
    for step in range(3):
        if step:
            disturb(model, optimizer)
        model(SHUFFLED, step).backward()
        model([1, 0, 2, 3], step).backward()  # of one step, only the first forward waits
        optimizer.step()
    return launched


def _evaluate(model: Model, optimizer: Any) -> None:
    model.eval()
    with torch.no_grad():
        model([0, 1, 2, 3], 0)
    model.train()


def _generate(model: Model, optimizer: Any) -> None:
    with torch.inference_mode():
        model([0, 1, 2, 3], 0)


def _fail_on_one_rank(model: Model, optimizer: Any) -> None:
    if optimizer.state_dict()["distadam"]["rank"] == 1:
        with pytest.raises(ArithmeticError):
            model([-1], 0)


@pytest.mark.parametrize("disturb", [_evaluate, _generate, _fail_on_one_rank])
def test_order_is_that_of_the_first_whole_forward_with_gradients(disturb: Any) -> None:
    assert run_ranks(2, _other_forwards, disturb) == [[buckets_of(SHUFFLED)] * 3] * 2


def _no_forward(rank: int) -> list[list[int]]:
    model, optimizer, launched = build()
    for layers in (SHUFFLED, [0, 1, 2, 3], [0, 1, 2, 3]):
        if rank == 1 and len(launched) == 1:
            sum(layer.weight.sum() for layer in model.layers).backward()
        else:
            model(layers, 0).backward()
        optimizer.step()
        optimizer.flush()
    return launched


def test_rank_without_a_forward_proposes_nothing() -> None:
    expected = [buckets_of(SHUFFLED), buckets_of(SHUFFLED), FIRST_LAYERS_FIRST]
    assert run_ranks(2, _no_forward) == [expected] * 2


def _no_forwards(rank: int) -> list[list[int]]:
    """What ranks proposed in a step before, each its own, must not count where none proposes anything."""
    model, optimizer, launched = build()
    model(SHUFFLED if rank else [1, 0, 3, 2], 0).backward()
    optimizer.step()
    optimizer.flush()
    sum(layer.weight.sum() for layer in model.layers).backward()
    optimizer.step()
    return launched


def test_order_stays_where_no_rank_runs_a_forward() -> None:
    assert run_ranks(2, _no_forwards) == [[FIRST_LAYERS_FIRST] * 2] * 2


def _new_buckets(rank: int) -> list[list[int]]:
    model, optimizer, launched = build()
    model(SHUFFLED, 0).backward()
    optimizer.step()
    added, unfrozen = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64), requires_grad=False)
    optimizer.add_param_group({"params": [("added", added), ("unfrozen", unfrozen)]})
    for step in range(3):
        (model(SHUFFLED, step) + added.sum() + (unfrozen.requires_grad_(step > 0) * 2).sum()).backward()
        optimizer.step()
    return launched


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_buckets_that_only_step_waits_for_come_first(num_ranks: int) -> None:
    learned = buckets_of(SHUFFLED)
    expected = [learned, [4, *learned], [5, 4, *learned], [5, 4, *learned]]
    assert run_ranks(num_ranks, _new_buckets) == [expected] * num_ranks


def _uneven(rank: int) -> tuple[list[list[int]], list[Tensor]]:
    """Rank 1 runs out of data after a batch; what it has recorded by then must not count."""
    model, optimizer, launched = build()
    orders = [SHUFFLED, [0, 1, 2, 3], [3, 2, 1, 0]]
    with Join([optimizer]):
        for step in range(3 - 2 * rank):
            model(orders[step], step).backward()
            optimizer.step()
            optimizer.zero_grad()
        model(orders[2], 0)
    model(orders[2], 9).backward()
    optimizer.step()
    optimizer.flush()
    return launched, [param.detach() for param in model.parameters()]


def test_order_stays_while_a_rank_has_joined() -> None:
    (launched, params), (other, same) = run_ranks(2, _uneven)
    assert launched == other == [*[buckets_of(SHUFFLED)] * 3, buckets_of([3, 2, 1, 0])]
    assert all(map(torch.equal, params, same))


def _captured(rank: int) -> list[list[int]]:
    model, optimizer, launched = build()
    for step, layers in enumerate([SHUFFLED, [0, 1, 2, 3], [0, 1, 2, 3]]):
        model(layers, 0).backward()
        with mock.patch.object(Streams, "capturing", step == 1 and rank == 0):
            optimizer.step()
    return launched


def test_order_stays_while_a_rank_captures_a_graph() -> None:
    expected = [buckets_of(SHUFFLED), buckets_of(SHUFFLED), FIRST_LAYERS_FIRST]
    assert run_ranks(2, _captured) == [expected] * 2


def test_nothing_is_captured_on_a_cpu() -> None:
    assert Streams().capturing is False


def _without_prefetch(rank: int) -> list[list[int]]:
    model, optimizer, launched = build(prefetch=False)
    for step in range(2):
        model(SHUFFLED, step).backward()
        optimizer.step()
    assert optimizer.kernel_report().reason_of_order == "as they are reduced: nothing is prefetched"
    return launched


def test_without_prefetch_the_order_is_that_of_reductions() -> None:
    assert run_ranks(2, _without_prefetch) == [[[0, 1, 2, 3]] * 2] * 2


# Ranks that differ ---------------------------------------------------------------------------------------------------


def _one_prefetches(rank: int) -> str:
    model, optimizer, _ = build(prefetch=rank == 0)
    model(SHUFFLED, 0).backward()
    with pytest.raises(RankMismatchError) as caught:
        optimizer.step()
    return str(caught.value)


def test_prefetch_on_one_rank_is_told_before_the_step() -> None:
    for message in run_ranks(2, _one_prefetches):
        assert "step 1: order of gathers: expected the same on every rank but got (3, 2, 1, 0) on rank 0" in message
        assert "(0, 1, 2, 3) on rank 1" in message


def adopt_unagreed(order: GatherOrder, agreed: bytes | None) -> None:
    """Stand for `GatherOrder.settle` with its one fault: what this rank proposed is used whatever others did."""
    if order._proposed:
        order.buckets = order._proposed
    order._waits.clear()


def any_order(rank: int, step: int) -> list[int]:
    """Every other step ranks agree."""
    return random.Random(1000 * step + rank * (step % 2)).sample(range(NUM_LAYERS), NUM_LAYERS)


def _late(rank: int) -> list[Tensor]:
    model, optimizer, launched = build()
    orders = []
    for step in range(8):
        layers = any_order(rank, step)
        model(layers, 7 * step + rank).backward()
        optimizer.step()
        orders.append(buckets_of(any_order(0, step - step % 2)))
    assert launched == orders
    optimizer.flush()
    return [param.detach() for param in model.parameters()]


def late_in_world(seed: int, one_by_one: bool) -> list[list[Tensor]]:
    return run_world(World(2, seed, frozenset(), one_by_one), _late)


def test_ranks_whose_orders_come_and_go_train_to_the_right_bits_when_collectives_are_late() -> None:
    torch.set_num_threads(1)
    twin = Model()
    reference = torch.optim.AdamW(twin.parameters(), lr=0.25, fused=True)
    for step in range(8):
        for rank in range(2):
            (twin(any_order(rank, step), 7 * step + rank) / 2).backward()
        reference.step()
        reference.zero_grad()
    for seed, one_by_one in itertools.product(range(10), (False, True)):
        for params in late_in_world(seed, one_by_one):
            assert all(map(torch.equal, params, twin.parameters()))


def test_order_that_was_not_agreed_on_is_seen() -> None:
    torch.set_num_threads(1)
    with mock.patch.object(GatherOrder, "settle", adopt_unagreed), pytest.raises(AssertionError, match="launche"):
        late_in_world(0, one_by_one=False)


def _drift(rank: int) -> None:
    """A rank whose order has come to differ, however that may be, is stopped before it launches anything."""
    model, optimizer, launched = build()
    for step in range(3):
        model(SHUFFLED, step).backward()
        if step == 2 and rank == 1:
            optimizer._order.buckets = (3, 2, 1, 0)
        optimizer.step()
    raise AssertionError(f"nothing was raised, and launched was {launched}")


def test_order_in_use_that_differs_is_told_before_the_step() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, _drift)
    for kind, message in failed.value.errors.values():
        assert kind == "RankMismatchError"
        assert "ranks differ since step 3: order of gathers" in message
        assert "(3, 2, 1, 0) on rank 1" in message
