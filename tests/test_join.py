"""`torch.distributed.algorithms.Join`: ranks with different numbers of batches, at 2 and 3 ranks.

A rank that has run out of data contributes zeros; the average is over all ranks, or over those that still have data
(``divide_by_initial_world_size=False``). The oracle is one process that computes every rank's gradients in turn and
steps ``torch.optim.X(fused=True)``. After Join all ranks must hold the same parameters, and the oracle's.

rtol = atol = 0: gradients are small integers or rounded to multiples of 2^-8, and parameters have multiples of 64
elements. Where clipping takes part, norms differ by 4 ulps at most (contract 2.3.5) and so does what they scale: the
tolerance says how that adds up over the steps of plain SGD.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import distadam
from distadam import CommPolicy
from tests.averaged_oracle import TINY_MB, impatient, integers, quantise
from tests.ranks import run_ranks

RANKS = (2, 3)
LR = 0.25


def _num_batches(rank: int) -> int:
    """The first rank goes on longest; with three ranks they leave one after the other."""
    return 7 - 2 * rank


class Bag(nn.Module):
    """Gradients do not depend on the parameters, so any order of ranks and steps is easy to follow."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in {"a": (64, 2), "b": (64,), "c": (8, 40), "sometimes": (64,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def contributions(self, rank: int, step: int) -> dict[str, Tensor]:
        names = ["a", "b", "c"] + ["sometimes"] * (step % 2)
        return {
            name: integers(self.get_parameter(name), 1000 * step + 10 * rank + number)
            for number, name in enumerate(names)
        }

    def forward(self, rank: int, step: int) -> Tensor:
        return sum((self.get_parameter(name) * value).sum() for name, value in self.contributions(rank, step).items())


Rule = Callable[..., torch.optim.Optimizer]


def _oracle(
    num_ranks: int,
    by_initial: bool,
    make: Callable[[Any], torch.optim.Optimizer],
    micro: int = 1,
    clip: float | None = None,
    poison: Callable[[int], bool] = lambda step: False,
) -> list[Tensor]:
    """Steps of `_num_batches(0) // micro` iterations, in one process."""
    model = Bag()
    optimizer = make(model.parameters())
    for step in range(_num_batches(0) // micro):
        batches = range(step * micro, (step + 1) * micro)
        active = [rank for rank in range(num_ranks) if _num_batches(rank) >= batches[-1] + 1]
        for param in model.parameters():
            param.grad = None
        for rank in active:
            for batch in batches:
                for name, value in model.contributions(rank, batch).items():
                    param = model.get_parameter(name)
                    param.grad = value if param.grad is None else param.grad + value
        for param in model.parameters():
            if param.grad is not None:
                param.grad /= num_ranks if by_initial else len(active)
        if clip is not None:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        if not poison(step):
            optimizer.step()
    return [param.detach() for param in model.parameters()]


def _sgd(module: Any, params: Any, **options: Any) -> Any:
    return module.SGD(params, lr=LR, **options)


def _adamw(module: Any, params: Any, **options: Any) -> Any:
    return module.AdamW(params, lr=LR, **options)


def _fused(rule: Rule) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: rule(torch.optim, list(params), fused=True)


def _check(results: list[list[Tensor]], expected: list[Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
        torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


# Plain loop ----------------------------------------------------------------------------------------------------------


@impatient
def _plain(rank: int, rule: Rule, by_initial: bool, bucket_mb: Any, prefetch: bool = False) -> list[Tensor]:
    model = Bag()
    optimizer = rule(distadam, model.named_parameters(), comm=CommPolicy(bucket_mb=bucket_mb))
    if prefetch:
        optimizer.prefetch(model)
    with Join([optimizer], divide_by_initial_world_size=by_initial):
        for step in range(_num_batches(rank)):
            model(rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.flush()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("bucket_mb", [TINY_MB, "auto"])
@pytest.mark.parametrize("by_initial", [True, False])
@pytest.mark.parametrize("rule", [_adamw, _sgd])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_uneven_inputs_average_with_zeros(num_ranks: int, rule: Rule, by_initial: bool, bucket_mb: Any) -> None:
    expected = _oracle(num_ranks, by_initial, _fused(rule))
    _check(run_ranks(num_ranks, _plain, rule, by_initial, bucket_mb), expected)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_uneven_inputs_work_with_prefetch(num_ranks: int) -> None:
    _check(run_ranks(num_ranks, _plain, _adamw, True, TINY_MB, True), _oracle(num_ranks, True, _fused(_adamw)))


@impatient
def _twice(rank: int) -> list[Tensor]:
    """Join, then even training without it, then Join once more, then Join that is not enabled."""
    model = Bag()
    optimizer = _sgd(distadam, model.named_parameters())
    for epoch in range(4):
        uneven = epoch in (0, 2)
        contexts = (
            lambda: Join([optimizer], divide_by_initial_world_size=False),
            contextlib.nullcontext,
            lambda: Join([optimizer]),
            lambda: Join([optimizer], enable=False),
        )
        with contexts[epoch]():
            for step in range(_num_batches(rank) if uneven else 2):
                model(rank, step).backward()
                if not uneven:
                    torch.nn.utils.clip_grad_value_(model.parameters(), 1e6)  # which Join would refuse
                optimizer.step()
                optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


def _twice_expected(num_ranks: int) -> list[Tensor]:
    model = Bag()
    optimizer = _fused(_sgd)(model.parameters())
    for epoch in range(4):
        for step in range(_num_batches(0) if epoch in (0, 2) else 2):
            active = [rank for rank in range(num_ranks) if epoch in (1, 3) or _num_batches(rank) > step]
            for param in model.parameters():
                param.grad = None
            sum(model(rank, step) for rank in active).backward()
            for param in model.parameters():
                if param.grad is not None:
                    param.grad /= len(active) if epoch == 0 else num_ranks
            optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_training_goes_on_after_join(num_ranks: int) -> None:
    _check(run_ranks(num_ranks, _twice), _twice_expected(num_ranks))


# Clipping, scaling, accumulation -------------------------------------------------------------------------------------


@impatient
def _clipped(rank: int, how: str, by_initial: bool, bucket_mb: Any) -> list[Tensor]:
    model = Bag()
    optimizer = _sgd(distadam, model.named_parameters(), comm=CommPolicy(bucket_mb=bucket_mb))
    with Join([optimizer], divide_by_initial_world_size=by_initial):
        for step in range(_num_batches(rank)):
            model(rank, step).backward()
            if how == "optimizer":
                optimizer.clip_grad_norm_(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=how == "foreach")
            optimizer.step()
            optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("bucket_mb", [TINY_MB, "auto"])
@pytest.mark.parametrize("by_initial", [True, False])
@pytest.mark.parametrize("how", ["optimizer", "foreach", "one by one"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_uneven_inputs_are_clipped_as_one(num_ranks: int, how: str, by_initial: bool, bucket_mb: Any) -> None:
    """Seven steps, each off by 8 ulps of lr times a gradient of at most 1, and by the rounding of the sum."""
    expected = _oracle(num_ranks, by_initial, _fused(_sgd), clip=1.0)
    results = run_ranks(num_ranks, _clipped, how, by_initial, bucket_mb)
    _check(results, expected, rtol=7 * 2**-23, atol=7 * 8 * 2**-23 * LR)


@impatient
def _scaled(rank: int, unscale: bool, by_initial: bool) -> tuple[list[Tensor], float]:
    """In step 3 a gradient of rank 0 is inf: nobody steps then."""
    model = Bag()
    optimizer = _adamw(distadam, model.named_parameters(), comm=CommPolicy(bucket_mb=TINY_MB))
    scaler = GradScaler("cpu", init_scale=16.0, growth_interval=100)
    with Join([optimizer], divide_by_initial_world_size=by_initial):
        for step in range(_num_batches(rank)):
            scaler.scale(model(rank, step) * (float("inf") if step == 3 and rank == 0 else 1)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    steps = {int(entry["step"]) for entry in optimizer.full_state_dict(to=None)["state"].values()}
    assert steps == {6, 2}  # "sometimes" has gradients in steps 1, 3 and 5
    return [param.detach() for param in model.parameters()], scaler.get_scale()


@pytest.mark.parametrize("by_initial", [True, False])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_uneven_inputs_share_found_inf_and_scale(num_ranks: int, unscale: bool, by_initial: bool) -> None:
    results = run_ranks(num_ranks, _scaled, unscale, by_initial)
    _check(
        [params for params, _ in results],
        _oracle(num_ranks, by_initial, _fused(_adamw), poison=lambda step: step == 3),
    )
    assert [scale for _, scale in results] == [8.0 if _num_batches(rank) > 3 else 16.0 for rank in range(num_ranks)]


@impatient
def _accumulated(rank: int, by_initial: bool) -> list[Tensor]:
    """Two batches a step. Every rank has an odd number of batches: what the last one left behind is nobody's."""
    model = Bag()
    optimizer = _sgd(distadam, model.named_parameters(), comm=CommPolicy(bucket_mb=TINY_MB))
    with Join([optimizer], divide_by_initial_world_size=by_initial):
        for batch in range(_num_batches(rank)):
            with optimizer.no_sync() if batch % 2 == 0 else contextlib.nullcontext():
                model(rank, batch).backward()
            if batch % 2:
                optimizer.step()
                optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("by_initial", [True, False])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_uneven_inputs_accumulate_with_no_sync(num_ranks: int, by_initial: bool) -> None:
    expected = _oracle(num_ranks, by_initial, _fused(_sgd), micro=2)
    _check(run_ranks(num_ranks, _accumulated, by_initial), expected)


# What joined ranks cannot do -----------------------------------------------------------------------------------------


@impatient
def _in_place(rank: int) -> str:
    model = Bag()
    optimizer = _sgd(distadam, model.named_parameters())
    error = ""
    with contextlib.suppress(distadam.UsageError), Join([optimizer]):
        model(rank, 0).backward()
        try:
            model.a.grad.clamp_(-1, 1)
        except distadam.UsageError as raised:
            error = str(raised)
            raise
    return error


@pytest.mark.parametrize("num_ranks", RANKS)
def test_clamping_inside_join_raises_on_every_rank(num_ranks: int) -> None:
    for message in run_ranks(num_ranks, _in_place):
        assert "joined ranks" in message


def _throw(rank: int) -> str:
    model = Bag()
    optimizer = _sgd(distadam, model.named_parameters())
    try:
        with Join([optimizer], throw_on_early_termination=True):
            for step in range(_num_batches(rank)):
                model(rank, step).backward()
                optimizer.step()
                optimizer.zero_grad()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("num_ranks", RANKS)
def test_early_termination_is_thrown_on_every_rank(num_ranks: int) -> None:
    messages = run_ranks(num_ranks, _throw)
    assert all("exhausted" in message for message in messages), messages


# DDP -----------------------------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    torch.manual_seed(2)
    return quantise(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64)))


def _batches(rank: int) -> Iterator[Tensor]:
    for step in range(_num_batches(rank)):
        yield torch.randn(3, 16, generator=torch.Generator().manual_seed(10 * step + rank))


@impatient
def _against_ddp(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    model = _net()
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.01, comm=CommPolicy(bucket_mb=TINY_MB))
    with Join([optimizer]):
        for inputs in _batches(rank):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    twin = DistributedDataParallel(_net())
    other = torch.optim.AdamW(twin.parameters(), lr=0.01, fused=True)
    with Join([twin]):
        for inputs in _batches(rank):
            other.zero_grad()
            twin(inputs).square().sum().backward()
            other.step()
    return [param.detach() for param in model.parameters()], [param.detach() for param in twin.parameters()]


def test_uneven_inputs_end_where_ddp_ends() -> None:
    """DDP divides before it sums: by 2, which is exact. Its joined rank takes the parameters of the last one."""
    for mine, theirs in run_ranks(2, _against_ddp):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
