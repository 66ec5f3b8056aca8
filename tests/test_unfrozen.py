"""A parameter that was frozen at construction and gets a gradient later counts from its first backward on.

Whatever call communicates first gives it its place (Note [Unfrozen parameters] in ``engine/reducer.py``). Gradients are
small integers and learning rates powers of two, so that expectations are exact: rtol = atol = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import distadam
from distadam.engine.gradients import ShardedGradient
from distadam.errors import UsageError
from tests.averaged_oracle import integers
from tests.ranks import run_ranks

RANKS = (1, 2, 3)


def _model(*frozen: str, dtype: torch.dtype = torch.float32) -> nn.ParameterDict:
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.zeros(size, dtype=dtype)) for name, size in (("a", 5), ("b", 70))}
    )
    for name in frozen:
        model[name].requires_grad_(False)
    return model


def _sgd(model: nn.Module, **options: Any) -> Any:
    return distadam.SGD(model.named_parameters(), **{"lr": 1.0} | options)


def _backward(model: nn.ParameterDict, seed: int, *names: str) -> None:
    sum((model[name] * integers(model[name], seed)).sum() for name in names).backward()


def _average(param: Tensor, num_ranks: int, seed: int = 0) -> Tensor:
    return sum(integers(param, seed + rank).float() for rank in range(num_ranks)) / num_ranks


def _only_unfrozen(rank: int, num_ranks: int) -> None:
    """No parameter that has a place takes part in this backward."""
    model = _model("b")
    optimizer = _sgd(model)
    model["a"].requires_grad_(False)
    model["b"].requires_grad_(True)
    _backward(model, rank, "b")
    assert isinstance(model["b"].grad, ShardedGradient)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    average = _average(model["b"], num_ranks)
    torch.testing.assert_close(norm, average.norm(), rtol=2**-22, atol=0)
    optimizer.step()
    assert torch.equal(model["b"], -average)
    assert not model["a"].any()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_backward_that_reaches_unfrozen_parameters_only_is_clipped(num_ranks: int) -> None:
    run_ranks(num_ranks, _only_unfrozen, num_ranks)


def _full_grad(rank: int, num_ranks: int) -> None:
    model = _model("a", "b")
    optimizer = _sgd(model)
    with pytest.raises(UsageError, match="expected a trainable parameter"):
        optimizer.full_grad("b")
    for param in model.parameters():
        param.requires_grad_(True)
    assert torch.equal(optimizer.full_grad("a"), torch.zeros(5))
    _backward(model, rank, "b")
    assert torch.equal(optimizer.full_grad("a"), torch.zeros(5))
    assert torch.equal(optimizer.full_grad(model["b"]), _average(model["b"], num_ranks))


@pytest.mark.parametrize("num_ranks", RANKS)
def test_full_grad_of_unfrozen_parameter(num_ranks: int) -> None:
    run_ranks(num_ranks, _full_grad, num_ranks)


def _halve(grad: Tensor) -> None:
    grad.mul_(0.5)


def _clamp(grad: Tensor) -> None:
    grad.clamp_(-1, 1)


def _zero(grad: Tensor) -> None:
    grad.zero_()


def _changed(rank: int, num_ranks: int, change: Callable[[Tensor], None]) -> None:
    model = _model("b")
    optimizer = _sgd(model)
    model["b"].requires_grad_(True)
    _backward(model, rank, "a", "b")
    held = model["b"].grad
    change(held)
    expected = _average(model["b"], num_ranks)
    change(expected)
    assert torch.equal(optimizer.full_grad("b"), expected)
    assert model["b"].grad is held  # loops that keep it in a list go on with it
    optimizer.step()
    assert torch.equal(model["b"], -expected)


@pytest.mark.parametrize("change", [_halve, _clamp, _zero])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_gradient_of_unfrozen_parameter_is_changed_in_place(num_ranks: int, change: Callable[[Tensor], None]) -> None:
    run_ranks(num_ranks, _changed, num_ranks, change)


def _dropped(rank: int, num_ranks: int, set_to_none: bool) -> None:
    model = _model("b")
    optimizer = _sgd(model)
    model["b"].requires_grad_(True)
    _backward(model, rank, "a", "b")
    optimizer.zero_grad(set_to_none)
    assert (model["b"].grad is None) == set_to_none
    _backward(model, 10 + rank, "a", "b")
    optimizer.step()
    assert torch.equal(model["b"], -_average(model["b"], num_ranks, 10))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_gradient_of_unfrozen_parameter_is_dropped(num_ranks: int, set_to_none: bool) -> None:
    run_ranks(num_ranks, _dropped, num_ranks, set_to_none)


def _micro_batches(rank: int) -> None:
    """256 + 1 + 1 + 1 + 1 is 260 in float32; in bfloat16 each 1 is lost."""
    model = _model("b", dtype=torch.bfloat16)
    optimizer = _sgd(model, lr=2.0**-8)
    model["b"].requires_grad_(True)
    with optimizer.no_sync():
        for value in (256, 1, 1, 1, 1):
            (sum(param.sum() for param in model.values()) * value).backward()
    optimizer.step()
    for param in model.values():
        assert torch.equal(param, torch.full_like(param, -260 / 256))


@pytest.mark.parametrize("num_ranks", RANKS)
def test_micro_batches_of_an_unfrozen_parameter_add_up_in_float32(num_ranks: int) -> None:
    run_ranks(num_ranks, _micro_batches)


def _refrozen(rank: int, num_ranks: int) -> None:
    """torch.optim updates whatever has a gradient, and so does this."""
    model = _model("b")
    optimizer = _sgd(model)
    model["b"].requires_grad_(True)
    _backward(model, rank, "a", "b")
    model["b"].requires_grad_(False)
    optimizer.step()
    assert not model["b"].requires_grad
    assert torch.equal(model["b"], -_average(model["b"], num_ranks))
    _backward(model, rank, "a")
    optimizer.step()
    assert torch.equal(model["b"], -_average(model["b"], num_ranks))


@pytest.mark.parametrize("num_ranks", RANKS)
def test_parameter_refrozen_after_its_backward_is_stepped_once(num_ranks: int) -> None:
    run_ranks(num_ranks, _refrozen, num_ranks)


def _by_one_rank(rank: int, num_ranks: int) -> None:
    model = _model("b")
    optimizer = _sgd(model)
    model["b"].requires_grad_(rank == 0)
    _backward(model, rank, *("ab" if rank == 0 else "a"))
    optimizer.step()
    assert torch.equal(model["b"], -integers(model["b"], 0) / num_ranks)
    assert model["b"].requires_grad == (rank == 0)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_parameter_unfrozen_by_one_rank_is_averaged_with_zeros(num_ranks: int) -> None:
    run_ranks(num_ranks, _by_one_rank, num_ranks)


def _held_bytes(rank: int) -> None:
    model = _model("b")
    optimizer = _sgd(model)
    before = optimizer.memory_report().total
    model["b"].requires_grad_(True)
    with optimizer.no_sync():
        _backward(model, rank, "b")
    assert optimizer.memory_report().total - before == 70 * 4


def test_memory_report_counts_what_an_unfrozen_parameter_collected() -> None:
    run_ranks(2, _held_bytes)


def _joined(rank: int, num_ranks: int, how: str) -> list[Tensor]:
    model = _model("b")
    optimizer = _sgd(model)
    with Join([optimizer]):
        for step in range(3 - rank):
            model["b"].requires_grad_(step == 2)
            _backward(model, rank, *("ab" if step == 2 else "a"))
            if step == 2 and how == "clip":
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                expected = torch.cat([integers(model[name], 0) / num_ranks for name in "ab"]).norm()
                torch.testing.assert_close(norm, expected, rtol=2**-22, atol=0)
            if step == 2 and how == "halve":
                model["b"].grad.mul_(0.5)
            optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("how", ["plain", "clip", "halve"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parameter_is_unfrozen_while_others_have_joined(num_ranks: int, how: str) -> None:
    for _, b in run_ranks(num_ranks, _joined, num_ranks, how):
        assert torch.equal(b, -integers(b, 0) / num_ranks * (0.5 if how == "halve" else 1.0))


def _integers(rank: int) -> None:
    """Indices, masks, counts and 8-bit values that live among a model's parameters."""
    model = _model()
    frozen = {
        "table": torch.full((3, 4), rank),
        "mask": torch.full((2,), rank == 0),
        "count": torch.tensor(rank, dtype=torch.int16),
        "scales": torch.full((3,), float(rank)).to(torch.float8_e4m3fn),
    }
    for name, value in frozen.items():
        model[name] = nn.Parameter(value, requires_grad=False)
    optimizer = _sgd(model)
    assert not model["table"].any()
    assert model["mask"].all()
    assert not model["count"]
    assert not model["scales"].float().any()
    _backward(model, rank, "a", "b")
    optimizer.step()
    assert set(optimizer.state_dict()["state"]) <= {0, 1}


@pytest.mark.parametrize("num_ranks", RANKS)
def test_integer_parameters_are_frozen_ones(num_ranks: int) -> None:
    run_ranks(num_ranks, _integers)
