"""Awkward models and loops at 1, 2 and 3 ranks: the bits of torch.optim given the average of the ranks' gradients.

Covered: frozen, unfrozen and re-frozen parameters; unused ones; tied ones; scalars, empty tensors, gaps, transposed
and channels-last strides; fewer parameters than ranks; a parameter larger than many buckets; mixed dtypes; activation
checkpointing of both kinds; several backwards before a step; ``retain_graph``; gradients and parameters written by
hand; stale graphs; discarded gradients; two optimizers on one model; the user's own collectives; dropped optimizers;
BatchNorm, LSTM, Embedding.

A scenario runs the same loop twice in each rank, with distadam on a model and with `AveragedOracle` on its twin, and
compares parameters after every step and torch's whole state at the end. rtol = atol = 0 throughout: gradients are small
integers or rounded to multiples of 2^-8, so every order of summation is exact. Each scenario runs with one bucket for
each parameter (stage 2) and with one bucket for all (stage 1).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distadam
from distadam import CommPolicy, PrecisionPolicy, ShardPolicy, UsageError
from tests.averaged_oracle import (
    TINY_MB,
    AveragedOracle,
    assert_same_parameters,
    assert_same_state,
    impatient,
    integer_loss,
    integers,
    quantise,
)
from tests.ranks import run_ranks

RANKS = (1, 2, 3)
CONFIGURATIONS: tuple[tuple[float | str, int], ...] = ((TINY_MB, 2), ("auto", 1))


class Bag(nn.Module):
    """Parameters without a model, for `integer_loss`."""

    def __init__(self, **params: Tensor) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))

    def loss(self, seed: int, *names: str) -> Tensor:
        chosen = dict(self.named_parameters())
        return integer_loss([chosen[name] for name in names or chosen], seed)


def _bag() -> Bag:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (16, 8), "b": (13,), "c": (3, 5), "d": (64,)}
    return Bag(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def _seed(rank: int, step: int) -> int:
    return 100 * step + rank


@dataclass(frozen=True)
class Scenario:
    """A model and one iteration of its loop, ``iterate(model, optimizer, rank, step)``."""

    iterate: Callable[[Any, Any, int, int], None]
    build: Callable[[], nn.Module] = _bag
    num_steps: int = 4
    rule: str = "AdamW"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05})


def _pair(scenario: Scenario, bucket_mb: Any, stage: int, **policies: Any) -> tuple[Any, ...]:
    model, twin = scenario.build(), scenario.build()
    optimizer = getattr(distadam, scenario.rule)(
        model.named_parameters(),
        **scenario.options,
        shard=ShardPolicy(stage=stage),
        comm=CommPolicy(bucket_mb=bucket_mb),
        **policies,
    )
    torch_rule = getattr(torch.optim, scenario.rule)
    oracle = AveragedOracle(lambda flats: torch_rule(flats, fused=True, **scenario.options), twin.parameters())
    return model, optimizer, twin, oracle


@impatient
def _run(rank: int, name: str) -> None:
    scenario = SCENARIOS[name]
    for bucket_mb, stage in CONFIGURATIONS:
        model, optimizer, twin, oracle = _pair(scenario, bucket_mb, stage)
        for step in range(scenario.num_steps):
            scenario.iterate(model, optimizer, rank, step)
            scenario.iterate(twin, oracle, rank, step)
            assert_same_parameters(model, twin, f"bucket_mb={bucket_mb} step {step}")
        assert_same_state(optimizer, oracle, f"bucket_mb={bucket_mb}")


# Which parameters take part ------------------------------------------------------------------------------------------


def _toggle(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    model.a.requires_grad_(step not in (2, 3))
    model.b.requires_grad_(step in (1, 4, 5))
    model.c.requires_grad_(step >= 3)
    model.loss(_seed(rank, step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _frozen_bag() -> Bag:
    bag = _bag()
    bag.b.requires_grad_(False)
    bag.c.requires_grad_(False)
    return bag


def _unused(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    if step != 3:  # nothing at all has a gradient in step 3
        names = ["a"]
        names += ["b"] * (rank == 0)  # on one rank only
        names += ["c"] * ((rank + step) % 2)  # now here, now there
        names += ["d"] * (step in (0, 5))  # in some steps only, then everywhere
        model.loss(_seed(rank, step), *names).backward()
    optimizer.step()
    optimizer.zero_grad()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(11, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        quantise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


def _tokens(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    tokens = torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(_seed(rank, step)))
    model(tokens).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# Shapes, dtypes, strides ---------------------------------------------------------------------------------------------


def _train_bag(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    model.loss(_seed(rank, step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _odd_shapes() -> Bag:
    torch.manual_seed(3)
    return Bag(
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 3),
        one=torch.randn(1),
        prime=torch.randn(67),
        big=torch.randn(40, 41),
        empty_too=torch.zeros(0),
        deep=torch.randn(1, 2, 1, 3, 1),
        lonely_empty=torch.zeros(0, dtype=torch.float64),
    )


def _mixed_dtypes() -> Bag:
    torch.manual_seed(4)
    return Bag(
        single=torch.randn(9, 5),
        wide=torch.randn(70, dtype=torch.float64),
        brain=torch.randn(33).bfloat16(),
        narrow=torch.randn(3, 4).half(),
        brain_too=torch.randn(2, 64).bfloat16(),
        single_scalar=torch.randn(()),
    )


def _strided() -> Bag:
    torch.manual_seed(5)
    return Bag(
        transposed=torch.randn(8, 24).t(),
        permuted=torch.randn(3, 4, 5).permute(2, 0, 1),
        channels_last=torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        channels_last_3d=torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        plain=torch.randn(7),
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.net.to(memory_format=torch.channels_last)
        quantise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def _images(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(_seed(rank, step)))
    model(images.to(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# Backward more than once ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block of its own, then one block used twice; what is recomputed depends on ``use_reentrant``."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(8, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)
        quantise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(2):
            hidden = checkpoint(self.block, hidden, use_reentrant=self.use_reentrant)
        return checkpoint(self.head, hidden, use_reentrant=self.use_reentrant)


def _inputs(rank: int, step: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_seed(rank, step)))


def _regress(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    model(_inputs(rank, step, 5, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _accumulate(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    for micro in range(3):
        with optimizer.no_sync() if micro < 2 else nullcontext():
            model.loss(_seed(rank, step) + 10 * micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def _accumulate_mixed(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    """Communicate after each backward, or never, or in a changing order, with parameters that come and go."""
    for micro in range(1 + step % 3):
        with optimizer.no_sync() if (micro + step) % 3 == 1 else nullcontext():
            names = ["a", "d"] + ["b"] * ((micro + rank) % 2) + ["c"] * (micro == 2)
            model.loss(_seed(rank, step) + 10 * micro, *names).backward()
    optimizer.step()
    optimizer.zero_grad()


def _accumulate_only(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    with optimizer.no_sync():
        for micro in range(2):
            model.loss(_seed(rank, step) + 10 * micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def _different_numbers_of_backwards(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    for micro in range(1 + (rank + step) % 3):
        model.loss(_seed(rank, step) + 10 * micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def _retain_graph(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    loss = model(_inputs(rank, step, 5, 8)).square().sum()
    loss.backward(retain_graph=True)
    if step % 2:
        loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _plain_net() -> nn.Module:
    torch.manual_seed(8)
    return quantise(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))


# Modules with peculiarities ------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        quantise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def _normalised(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    _regress(model, optimizer, rank, step)
    distadam.broadcast_buffers(model)
    mean = [torch.zeros(16) for _ in range(dist.get_world_size())]
    dist.all_gather(mean, model.get_buffer("net.1.running_mean"))
    assert mean[0].abs().sum() > 0
    assert all(torch.equal(mean[0], other) for other in mean)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 12, num_layers=2, bidirectional=True)
        self.head = nn.Linear(24, 3)
        quantise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


# Discarded gradients -------------------------------------------------------------------------------------------------


def _discard(how: str) -> Callable[[Any, Any, int, int], None]:
    """Backward, drop it, backward again: only the second one counts. What is dropped may be in flight."""

    def iterate(model: Bag, optimizer: Any, rank: int, step: int) -> None:
        for micro in range(1 + step % 3):
            model.loss(_seed(rank, step) + 10 * micro).backward()
        if how == "optimizer.zero_grad":
            optimizer.zero_grad()
        elif how == "model.zero_grad":
            model.zero_grad()
        elif how == "one parameter":
            model.b.grad = None
        elif how == "zeros":
            optimizer.zero_grad(set_to_none=False)
        elif how == "some parameters, then others":
            model.a.grad = model.b.grad = None
            model.loss(_seed(rank, step) + 50, "a", "d").backward()
            model.d.grad = None
        if step % 4 != 3:
            model.loss(_seed(rank, step) + 30).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iterate


def _discard_where_some_had_none(how: str) -> Callable[[Any, Any, int, int], None]:
    """As `_discard`, with parameters that only some ranks use, before or after: every rank discards all the same."""

    def iterate(model: Bag, optimizer: Any, rank: int, step: int) -> None:
        before = ["a"] + ["b"] * (rank == 0) + ["c"] * (rank == step % 3)
        model.loss(_seed(rank, step), *before).backward()
        if how == "none":
            optimizer.zero_grad()
        elif how == "parameter by parameter":
            for param in model.parameters():
                param.grad = None
        else:
            optimizer.zero_grad(set_to_none=False)
        after = ["b", "d"] + ["c"] * (rank == (step + 1) % 3)
        model.loss(_seed(rank, step) + 50, *after).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iterate


def _discard_under_no_sync(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    with optimizer.no_sync():
        model.loss(_seed(rank, step)).backward()
        optimizer.zero_grad()
        model.loss(_seed(rank, step) + 30, "a", "b").backward()
    model.loss(_seed(rank, step) + 60, "b", "c").backward()
    if step % 2:
        model.c.grad = None
    optimizer.step()
    optimizer.zero_grad()


# Gradients set by hand -----------------------------------------------------------------------------------------------


def _gradients_by_hand(model: Bag, optimizer: Any, rank: int, step: int) -> None:
    """Only by hand, on all ranks or on one; left in place and used again; replaced; then by backward again."""
    if step == 0:
        model.a.grad = integers(model.a, _seed(rank, step))
        if rank == 0:
            model.b.grad = integers(model.b, _seed(rank, step))
    elif step == 2:
        model.a.grad.mul_(2)
    elif step == 3:
        model.a.grad = integers(model.a, _seed(rank, step))
        model.c.grad = integers(model.c, _seed(rank, step) + 1)
    elif step == 4:
        model.loss(_seed(rank, step)).backward()  # autograd adds to what the user left in p.grad, as in torch
    elif step == 5:
        optimizer.zero_grad()
        model.loss(_seed(rank, step)).backward()
    optimizer.step()


SCENARIOS = {
    "frozen_unfrozen_refrozen": Scenario(_toggle, _frozen_bag, num_steps=7),
    "unused_on_some_ranks_or_steps": Scenario(_unused, num_steps=7),
    "unused_with_momentum": Scenario(
        _unused, num_steps=7, rule="SGD", options={"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ),
    "tied": Scenario(_tokens, Tied),
    "odd_shapes": Scenario(_train_bag, _odd_shapes),
    "odd_shapes_adam_amsgrad": Scenario(
        _train_bag, _odd_shapes, rule="Adam", options={"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}
    ),
    "fewer_parameters_than_ranks": Scenario(_train_bag, lambda: Bag(only=torch.tensor(0.25))),
    "mixed_dtypes": Scenario(_train_bag, _mixed_dtypes),
    "strided": Scenario(_train_bag, _strided),
    "channels_last_convolutions": Scenario(_images, Convolutions),
    "checkpoint": Scenario(_regress, lambda: Checkpointed(use_reentrant=False)),
    "checkpoint_reentrant": Scenario(_regress, lambda: Checkpointed(use_reentrant=True)),
    "accumulation_with_no_sync": Scenario(_accumulate),
    "accumulation_of_mixed_dtypes": Scenario(_accumulate, _mixed_dtypes),
    "accumulation_in_changing_ways": Scenario(_accumulate_mixed, num_steps=9),
    "no_sync_up_to_the_step": Scenario(_accumulate_only),
    "different_numbers_of_backwards": Scenario(_different_numbers_of_backwards, num_steps=6),
    "different_numbers_of_backwards_of_mixed_dtypes": Scenario(_different_numbers_of_backwards, _mixed_dtypes),
    "retain_graph": Scenario(_retain_graph, _plain_net),
    "batch_norm": Scenario(_normalised, Normalised),
    "lstm_and_embedding": Scenario(_tokens, Recurrent),
    "discarded_by_optimizer_zero_grad": Scenario(_discard("optimizer.zero_grad"), num_steps=6),
    "discarded_by_model_zero_grad": Scenario(_discard("model.zero_grad"), num_steps=6),
    "discarded_for_one_parameter": Scenario(_discard("one parameter"), num_steps=6),
    "discarded_here_and_there": Scenario(_discard("some parameters, then others"), num_steps=6),
    "discarded_by_zeros": Scenario(_discard("zeros"), num_steps=6),
    "discarded_where_some_ranks_had_none": Scenario(_discard_where_some_had_none("none"), num_steps=6),
    "discarded_one_by_one_where_some_ranks_had_none": Scenario(
        _discard_where_some_had_none("parameter by parameter"), num_steps=6
    ),
    "discarded_by_zeros_where_some_ranks_had_none": Scenario(_discard_where_some_had_none("zeros"), num_steps=6),
    "discarded_under_no_sync": Scenario(_discard_under_no_sync, num_steps=6),
    "gradients_by_hand": Scenario(_gradients_by_hand, num_steps=6),
}


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_training_has_the_bits_of_torch_given_the_average(name: str, num_ranks: int) -> None:
    run_ranks(num_ranks, _run, name, timeout_s=30)


# Construction --------------------------------------------------------------------------------------------------------


@impatient
def _check_construction(rank: int) -> None:
    model = _strided()
    model.register_parameter("gaps", nn.Parameter(torch.arange(24.0).view(4, 6)[:, ::2]))
    model.register_parameter("odd_stride_scalar", nn.Parameter(torch.tensor(3.0)))
    before = {name: (param, param.detach().clone(), param.stride()) for name, param in model.named_parameters()}
    optimizer = distadam.AdamW(model.named_parameters(), comm=CommPolicy(bucket_mb=400 / 2**20))
    for name, param in model.named_parameters():
        same, value, strides = before[name]
        assert param is same
        assert param.stride() == strides or name == "gaps"
        torch.testing.assert_close(param.detach(), value, rtol=0, atol=0)
        param.sum().backward()
        assert param.grad.shape == param.shape
    assert all(any(param is other for other in model.parameters()) for param in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("num_ranks", RANKS)
def test_construction_keeps_identity_values_shapes_and_strides(num_ranks: int) -> None:
    run_ranks(num_ranks, _check_construction)


def _sparse(rank: int) -> None:
    model = nn.Embedding(5, 4, sparse=True)
    optimizer = distadam.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(distadam.ConfigError, match=r"'weight' got a torch.sparse_coo gradient"):
        model(torch.tensor([1, 2])).sum().backward()
    del optimizer


@pytest.mark.parametrize("num_ranks", RANKS)
def test_sparse_gradient_raises_config_error_on_every_rank(num_ranks: int) -> None:
    run_ranks(num_ranks, _sparse)


# Accumulation --------------------------------------------------------------------------------------------------------


def _accumulate_257(rank: int) -> list[float]:
    """256 + 1 is no bf16 number. One number is averaged, so that the sum over ranks does not round."""
    results = []
    for no_sync, reduce_dtype in ((True, torch.float32), (False, None), (False, torch.float32)):
        weight = nn.Parameter(torch.full((3,), 256.0, dtype=torch.bfloat16))
        optimizer = distadam.SGD([weight], lr=1.0, precision=PrecisionPolicy(reduce_dtype=reduce_dtype))
        with optimizer.no_sync() if no_sync else nullcontext():
            (256 * weight).sum().backward()
        weight.sum().backward()
        optimizer.step()
        results.append(weight[1].item())
    return results


@pytest.mark.parametrize("num_ranks", RANKS)
def test_accumulation_of_bf16_gradients_is_fp32(num_ranks: int) -> None:
    for results in run_ranks(num_ranks, _accumulate_257):
        assert results == [-1.0, -1.0, -1.0]


def _count_reductions(rank: int) -> list[tuple[int, int]]:
    model = _bag()
    optimizer = distadam.AdamW(model.named_parameters(), comm=CommPolicy(bucket_mb=TINY_MB))
    counts = []
    for step in range(3):
        optimizer.comm_stats.clear()
        _accumulate(model, optimizer, rank, step)
        counts.append((optimizer.comm_stats.calls["reduce_scatter"], len(optimizer.layout.buckets)))
    return counts


def test_accumulation_with_no_sync_reduces_each_bucket_once() -> None:
    for counts in run_ranks(2, _count_reductions):
        assert counts == [(4, 4)] * 3


# Gradients and parameters written by hand ----------------------------------------------------------------------------


def _add_by_hand(rank: int, num_ranks: int) -> None:
    """What backward collected plus what the user put there; that stays and is used again, as in torch."""
    for bucket_mb, stage in CONFIGURATIONS:
        model, optimizer, twin, oracle = _pair(Scenario(_train_bag), bucket_mb, stage)
        by_hand = integers(model.a, 77 + rank)
        model.loss(rank).backward()
        model.a.grad = by_hand
        if rank == 0:
            model.b.grad = integers(model.b, 5)
        twin.loss(rank).backward()
        twin.a.grad = twin.a.grad + by_hand
        if rank == 0:
            twin.b.grad = twin.b.grad + integers(twin.b, 5)
        optimizer.step()
        oracle.step()
        assert_same_parameters(model, twin)
        assert model.a.grad is by_hand
        assert (model.b.grad is not None) == (rank == 0)
        assert model.c.grad is None
        oracle.zero_grad()
        twin.a.grad = by_hand
        twin.b.grad = integers(twin.b, 5) if rank == 0 else None
        optimizer.step()
        oracle.step()
        assert_same_parameters(model, twin)
        assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_gradient_by_hand_adds_to_what_backward_collected(num_ranks: int) -> None:
    run_ranks(num_ranks, _add_by_hand, num_ranks)


def _write_in_place(model: Bag) -> None:
    with torch.no_grad():
        model.b.mul_(0.5)


def _write_state_dict(model: Bag) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _write_data(model: Bag) -> None:
    model.b.data = model.b.detach() * 0.5


WRITES = {"in place": _write_in_place, "load_state_dict": _write_state_dict, "p.data": _write_data}


def _written_by_hand(rank: int, how: str) -> None:
    for bucket_mb, stage in CONFIGURATIONS:
        for build in (_bag, lambda: _bag().bfloat16()):
            model, optimizer, twin, oracle = _pair(Scenario(_train_bag, build), bucket_mb, stage)
            for step in range(4):
                if step == 2:
                    WRITES[how](model)
                    WRITES[how](twin)
                    model.loss(_seed(rank, step)).backward()
                    name = "d" if how == "load_state_dict" else "b"  # the first in the layout's order
                    for call in (optimizer.step, lambda o=optimizer: o.clip_grad_norm_(1.0)):
                        with pytest.raises(UsageError, match=rf"parameter '{name}'.*reload_parameters\(\)"):
                            call()
                    optimizer.reload_parameters()
                    optimizer.step()
                    oracle.reload_parameters()
                    _train_bag(twin, oracle, rank, step)
                else:
                    _train_bag(model, optimizer, rank, step)
                    _train_bag(twin, oracle, rank, step)
                assert_same_parameters(model, twin, f"step {step}")
            assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_parameter_written_by_hand_raises_until_reloaded(num_ranks: int, how: str) -> None:
    run_ranks(num_ranks, _written_by_hand, how)


def _written_on_one_rank(rank: int) -> None:
    model, optimizer, twin, oracle = _pair(Scenario(_train_bag), TINY_MB, 2)
    model.loss(_seed(rank, 0)).backward()
    if rank == 1:
        _write_in_place(model)
    if rank == 1:
        with pytest.raises(UsageError, match=r"parameter 'b' was written outside step\(\).*reload_parameters"):
            optimizer.step()
    else:
        with pytest.raises(distadam.RankMismatchError, match=r"rank 1 failed .*step\(\): UsageError: parameter 'b'"):
            optimizer.step()
    optimizer.reload_parameters()  # takes the first rank's
    optimizer.step()
    _train_bag(twin, oracle, rank, 0)
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parameter_written_on_one_rank_raises_on_every_rank(num_ranks: int) -> None:
    run_ranks(num_ranks, _written_on_one_rank)


def _moved(rank: int) -> None:
    model = _bag()
    optimizer = distadam.AdamW(model.named_parameters())
    _train_bag(model, optimizer, rank, 0)
    model.to(torch.float32)  # changes nothing
    _train_bag(model, optimizer, rank, 0)
    model.to(torch.float64)
    with pytest.raises(UsageError, match=r"parameter 'd' no longer lies in the optimizer's flat buffer.*model.to"):
        optimizer.step()
    with pytest.raises(distadam.ConfigError, match=r"torch.float64.*build a new optimizer"):
        optimizer.reload_parameters()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_model_to_another_dtype_raises_on_every_rank(num_ranks: int) -> None:
    run_ranks(num_ranks, _moved)


def _stale(rank: int) -> None:
    model = _plain_net()
    optimizer = distadam.SGD(model.named_parameters(), lr=0.1)
    loss = model(_inputs(rank, 0, 5, 8)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad()
    model(_inputs(rank, 0, 5, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_stale_graph_raises_after_step_as_in_torch(num_ranks: int) -> None:
    run_ranks(num_ranks, _stale)


# Discarding on some ranks only ---------------------------------------------------------------------------------------


@impatient
def _asymmetric_discard(rank: int) -> None:
    for bucket_mb, stage in CONFIGURATIONS:
        for again in (False, True):
            model, optimizer, twin, oracle = _pair(Scenario(_train_bag), bucket_mb, stage)
            model.loss(_seed(rank, 0)).backward()
            if rank == 0:
                model.c.grad = None
            if again:
                model.loss(_seed(rank, 0) + 1).backward()
            with pytest.raises(UsageError, match=r"parameter 'c': some ranks discarded"):
                optimizer.step()
            optimizer.zero_grad()
            _train_bag(model, optimizer, rank, 1)
            _train_bag(twin, oracle, rank, 1)
            assert_same_parameters(model, twin)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_discarding_on_one_rank_only_raises_on_every_rank(num_ranks: int) -> None:
    run_ranks(num_ranks, _asymmetric_discard)


# Several optimizers, other collectives -------------------------------------------------------------------------------


@impatient
def _two_optimizers(rank: int) -> None:
    """One backward feeds two optimizers; each has its own collectives, which ranks may launch in any order."""
    for bucket_mb, stage in CONFIGURATIONS:
        model, twin = _bag(), _bag()
        comm, shard = CommPolicy(bucket_mb=bucket_mb), ShardPolicy(stage=stage)
        pairs = [
            (
                distadam.AdamW([model.a, model.c], lr=0.1, comm=comm, shard=shard),
                AveragedOracle(lambda flats: torch.optim.AdamW(flats, lr=0.1, fused=True), [twin.a, twin.c]),
            ),
            (
                distadam.SGD([model.d, model.b], lr=0.1, momentum=0.5, comm=comm, shard=shard),
                AveragedOracle(
                    lambda flats: torch.optim.SGD(flats, lr=0.1, momentum=0.5, fused=True), [twin.d, twin.b]
                ),
            ),
        ]
        for step in range(5):
            names = ["a", "b", "d"] + ["c"] * ((rank + step) % 2)
            model.loss(_seed(rank, step), *names).backward()
            twin.loss(_seed(rank, step), *names).backward()
            for optimizer, oracle in pairs if step % 2 else pairs[::-1]:
                if step == 3 and oracle is pairs[1][1]:
                    model.d.grad = model.b.grad = twin.d.grad = twin.b.grad = None
                optimizer.step()
                oracle.step()
                oracle.zero_grad()
            assert_same_parameters(model, twin, f"step {step}")
        for optimizer, oracle in pairs:
            assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_two_optimizers_share_one_backward(num_ranks: int) -> None:
    run_ranks(num_ranks, _two_optimizers)


@impatient
def _user_collectives(rank: int) -> None:
    """The user all-reduces on the default group while ranks have launched 0 to 4 buckets."""
    for stage in (1, 2):
        model, optimizer, twin, oracle = _pair(Scenario(_train_bag), TINY_MB, stage)
        for step in range(4):
            names = list("dcba"[: 4 - (rank + step) % 4]) or ["a"]
            model.loss(_seed(rank, step), *names).backward()
            mine = torch.full((5,), float(rank + 1))
            dist.all_reduce(mine)
            assert mine.tolist() == [sum(range(1, dist.get_world_size() + 1))] * 5
            optimizer.step()
            twin.loss(_seed(rank, step), *names).backward()
            oracle.step()
            oracle.zero_grad()
            assert_same_parameters(model, twin, f"step {step}")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_user_collectives_between_backward_and_step_are_not_mixed_up(num_ranks: int) -> None:
    run_ranks(num_ranks, _user_collectives)


def _replaced(rank: int) -> None:
    """A new optimizer on the same parameters: after the old one is gone, in its place, with gradients collected."""
    scenario = Scenario(_train_bag)
    for bucket_mb, stage in CONFIGURATIONS:
        model, optimizer, twin, oracle = _pair(scenario, bucket_mb, stage)
        for round_ in range(3):
            _train_bag(model, optimizer, rank, round_)
            _train_bag(twin, oracle, rank, round_)
            if round_ == 1:
                model.loss(_seed(rank, 9)).backward()  # collected for nobody
            if round_ == 0:
                del optimizer
            optimizer = distadam.AdamW(
                model.named_parameters(),
                **scenario.options,
                shard=ShardPolicy(stage=stage),
                comm=CommPolicy(bucket_mb=bucket_mb),
            )
            oracle = AveragedOracle(
                lambda flats: torch.optim.AdamW(flats, fused=True, **scenario.options), twin.parameters()
            )
            assert all(param.grad is None for param in model.parameters())
            assert all(len(param._post_accumulate_grad_hooks) == 1 for param in model.parameters())
            assert_same_parameters(model, twin, f"round {round_}")
        _train_bag(model, optimizer, rank, 5)
        _train_bag(twin, oracle, rank, 5)
        assert_same_parameters(model, twin)
        assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_dropped_optimizer_makes_way_for_a_new_one(num_ranks: int) -> None:
    run_ranks(num_ranks, _replaced)


def _two_live(rank: int) -> None:
    model = _bag()
    first = distadam.AdamW(model.named_parameters())
    second = distadam.AdamW(model.named_parameters())
    with pytest.raises(UsageError, match=r"parameter '.' is in two live distadam optimizers"):
        model.loss(rank).backward()
    del first, second


@pytest.mark.parametrize("num_ranks", RANKS)
def test_two_live_optimizers_on_one_parameter_raise(num_ranks: int) -> None:
    run_ranks(num_ranks, _two_live)


# Unfrozen parameters take part at once -------------------------------------------------------------------------------


def _clip_unfrozen(rank: int, how: str) -> None:
    model, optimizer, twin, oracle = _pair(
        Scenario(_train_bag, _frozen_bag, rule="SGD", options={"lr": 0.5}), TINY_MB, 2
    )
    for step in range(4):
        if step == 1:
            model.b.requires_grad_(True)
            twin.b.requires_grad_(True)
        model.loss(_seed(rank, step)).backward()
        clip = optimizer.clip_grad_norm_ if how == "optimizer" else torch.nn.utils.clip_grad_norm_
        norm = clip(*([] if how == "optimizer" else [model.parameters()]), 1.0)
        optimizer.step()
        twin.loss(_seed(rank, step)).backward()
        averages = oracle.average()
        expected = torch.nn.utils.get_total_norm([average for average in averages if average is not None])
        torch.nn.utils.clip_grads_with_norm_(oracle.flats_with_grad(averages), 1.0, expected)
        oracle.step(averages)
        oracle.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=4 * 2**-23, atol=0)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=4 * 2**-23, atol=0.5 * 8 * 4 * 2**-23)


@pytest.mark.parametrize("how", ["optimizer", "torch"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_unfrozen_parameter_is_clipped_in_its_first_step(num_ranks: int, how: str) -> None:
    """The norm may differ in the last place or two: so may the coefficient and what it scales (|lr g| <= 4)."""
    run_ranks(num_ranks, _clip_unfrozen, how)
