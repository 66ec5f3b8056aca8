"""Recipes of torch's AMP documentation, with ``torch.amp.GradScaler("cpu")`` and ``torch.autocast("cpu")``.

Covered at 1, 2 and 3 ranks: scaling without ``unscale_``; ``unscale_`` + ``torch.nn.utils.clip_grad_norm_`` + step;
accumulation; a gradient penalty; several losses and optimizers; bf16 autocast without a scaler; inf and NaN on one rank
only; fp16 parameters; a disabled scaler.

Every recipe runs twice in each rank: with distadam, and with ``torch.optim.X(fused=True)`` and a scaler of its own on a
twin of the model, whose gradients are averaged over the ranks right after backward. At one rank that is plain torch.
rtol = atol = 0: gradients are rounded to multiples of 2^-8, so every order of summation is exact, and every parameter
has a multiple of 64 elements. Only where clipping takes part, tolerances apply (contract 2.3.5: norms differ by an ulp
or two, here by 4 at most); the twin then restarts each step from the model's parameters, so that errors do not grow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.comm import DONE, Collectives
from tests.averaged_oracle import (
    TINY_MB,
    AveragedOracle,
    assert_same_parameters,
    assert_same_state,
    average,
    impatient,
    integer_loss,
    quantise,
)
from tests.ranks import run_ranks

RANKS = (1, 2, 3)
ULPS = 4 * 2**-23


class Net(nn.Module):
    def __init__(self, seed: int = 1, quantised: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 64)
        self.rarely = nn.Linear(64, 64, bias=False)
        if quantised:
            quantise(self)

    def forward(self, inputs: Tensor, rarely: bool = False) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        return self.second(self.rarely(hidden) if rarely else hidden)


def average_grads(model: nn.Module) -> None:
    """Average ``p.grad`` over ranks."""
    params = list(model.parameters())
    for param, value in zip(params, average([param.grad for param in params], params), strict=True):
        param.grad = value


def inputs_of(rank: int, step: int, *shape: int) -> Tensor:
    return torch.randn(shape or (4, 16), generator=torch.Generator().manual_seed(100 * step + rank))


Reduce = Callable[..., None]
Recipe = Callable[..., None]


def _typical(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
    (optimizer,) = optimizers
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs_of(rank, step), rarely=(rank + step) % 3 == 0).square().mean()
    scaler.scale(loss).backward()
    reduce(model)
    scaler.step(optimizer)
    scaler.update()


def _typical_fp16(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
    (optimizer,) = optimizers
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(inputs_of(rank, step)).float().square().mean()
    scaler.scale(loss).backward()
    reduce(model)
    scaler.step(optimizer)
    scaler.update()


def _unscaled(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
    (optimizer,) = optimizers
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs_of(rank, step), rarely=step % 2 == 0).square().mean()
    scaler.scale(loss).backward()
    reduce(model)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def _clipped(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
    (optimizer,) = optimizers
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = 100 * model(inputs_of(rank, step)).square().mean()
    scaler.scale(loss).backward()
    reduce(model)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    assert norm > 1
    scaler.step(optimizer)
    scaler.update()


def _accumulated(no_sync: bool) -> Recipe:
    def recipe(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
        (optimizer,) = optimizers
        for micro in range(3):
            local = no_sync and micro < 2 and isinstance(optimizer, distadam.ShardedOptimizer)
            with optimizer.no_sync() if local else nullcontext():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(inputs_of(rank, step + 50 * micro)).square().mean() / 3
                scaler.scale(loss).backward()
        reduce(model)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return recipe


def _penalised(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
    (optimizer,) = optimizers
    optimizer.zero_grad()
    params = [param for name, param in model.named_parameters() if "rarely" not in name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs_of(rank, step)).square().mean()
    scaled = torch.autograd.grad(scaler.scale(loss), params, create_graph=True)
    grads = [grad * (1.0 / scaler.get_scale()) for grad in scaled]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss + sum(grad.pow(2).sum() for grad in grads).sqrt()
    scaler.scale(loss).backward()
    reduce(model)
    scaler.step(optimizer)
    scaler.update()


def _several(model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int) -> None:
    first, second = optimizers
    first.zero_grad()
    second.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model["0"](inputs_of(rank, step))
        loss0 = output.square().mean() + 0.5 * model["1"](inputs_of(rank, step)).square().mean()
        loss1 = 0.3 * output.abs().mean() + model["1"](inputs_of(rank, step + 50)).square().mean()
    scaler.scale(loss0).backward(retain_graph=True)
    scaler.scale(loss1).backward()
    reduce(model)
    scaler.unscale_(first)
    scaler.step(first)
    scaler.step(second)
    scaler.update()


def _without_scaler(
    model: Any, optimizers: list[Any], scaler: GradScaler, reduce: Reduce, rank: int, step: int
) -> None:
    (optimizer,) = optimizers
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs_of(rank, step)).square().mean()
    loss.backward()
    reduce(model)
    optimizer.step()


RECIPES: dict[str, Recipe] = {
    "typical": _typical,
    "typical_fp16": _typical_fp16,
    "unscale": _unscaled,
    "unscale_and_clip": _clipped,
    "accumulation": _accumulated(no_sync=False),
    "accumulation_with_no_sync": _accumulated(no_sync=True),
    "gradient_penalty": _penalised,
    "several_optimizers": _several,
    "without_scaler": _without_scaler,
}


class Both:
    """A model under distadam and its twin under torch.optim, each with a scaler."""

    def __init__(self, name: str, bucket_mb: float | str, stage: int, **scaler: Any) -> None:
        build = (lambda: nn.ModuleDict({"0": Net(1), "1": Net(2)})) if name == "several_optimizers" else Net
        self.recipe = RECIPES[name]
        self.model, self.twin = build(), build()
        self.exact = name != "unscale_and_clip"
        self.scaler, self.twin_scaler = GradScaler("cpu", **scaler), GradScaler("cpu", **scaler)
        policies = {"comm": CommPolicy(bucket_mb=bucket_mb), "shard": ShardPolicy(stage=stage)}
        self.optimizers: list[Any] = []
        self.twins: list[Any] = []
        for module, other in (
            zip(self.model.values(), self.twin.values(), strict=True)
            if name == "several_optimizers"
            else [(self.model, self.twin)]
        ):
            if self.exact:
                self.optimizers.append(distadam.AdamW(module.named_parameters(), lr=0.01, **policies))
                self.twins.append(torch.optim.AdamW(other.parameters(), lr=0.01, fused=True))
            else:
                self.optimizers.append(distadam.SGD(module.named_parameters(), lr=0.01, **policies))
                self.twins.append(torch.optim.SGD(other.parameters(), lr=0.01, fused=True))

    def step(self, rank: int, step: int) -> None:
        self.recipe(self.model, self.optimizers, self.scaler, lambda model: None, rank, step)
        self.recipe(self.twin, self.twins, self.twin_scaler, average_grads, rank, step)
        assert self.scaler.state_dict() == self.twin_scaler.state_dict()
        if self.exact:
            assert_same_parameters(self.model, self.twin, f"step {step}")
            return
        for param, other in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            # The clipped gradient is at most 1, its error ULPS; lr times that, and the rounding of the sum.
            torch.testing.assert_close(param, other, rtol=2**-23, atol=0.01 * ULPS)
        self.twin.load_state_dict(self.model.state_dict())

    def compare_state(self) -> None:
        for optimizer, twin in zip(self.optimizers, self.twins, strict=True):
            full, expected = optimizer.full_state_dict(to=None)["state"], twin.state_dict()["state"]
            assert full.keys() == expected.keys()
            for number, entry in expected.items():
                for key, value in entry.items():
                    torch.testing.assert_close(full[number][key], value, rtol=0, atol=0, equal_nan=True)


@impatient
def _run(rank: int, name: str) -> None:
    for bucket_mb, stage, num_steps, scaler in (
        (TINY_MB, 2, 5, {"init_scale": 2.0**8, "growth_interval": 2}),
        ("auto", 1, 3, {"init_scale": 1000.0}),
        (TINY_MB, 2, 2, {"enabled": False}),
    ):
        both = Both(name, bucket_mb, stage, **scaler)
        for step in range(num_steps):
            both.step(rank, step)
        both.compare_state()


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_equals_torch(name: str, num_ranks: int) -> None:
    run_ranks(num_ranks, _run, name)


# Inf and NaN on one rank ---------------------------------------------------------------------------------------------


def _poison(model: nn.Module, rank: int, step: int, value: float) -> list[Any]:
    """In steps 1 and 2 one element of one gradient is not finite, on the last rank only."""
    if step not in (1, 2) or rank != dist.get_world_size() - 1:
        return []
    param = next(iter(model.parameters())) if step == 1 else list(model.parameters())[-2]

    def poison(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[-1] = value
        return grad

    return [param.register_hook(poison)]


@impatient
def _inf_on_one_rank(rank: int, name: str, value: float, bucket_mb: Any, stage: int) -> None:
    both = Both(name, bucket_mb, stage, init_scale=2.0**8, growth_interval=2)
    scales = []
    for step in range(6):
        before = [param.detach().clone() for param in both.model.parameters()]
        hooks = _poison(both.model, rank, step, value) + _poison(both.twin, rank, step, value)
        both.step(rank, step)
        for hook in hooks:
            hook.remove()
        moved = [not torch.equal(param, other) for param, other in zip(both.model.parameters(), before, strict=True)]
        half = len(moved) // 2  # each of several optimizers is skipped by itself
        first, second = (moved[:half], moved[half:]) if name == "several_optimizers" else (moved, moved)
        assert any(first) == (step != 1 if name == "several_optimizers" else step not in (1, 2))
        assert any(second) == (step != 2 if name == "several_optimizers" else step not in (1, 2))
        scales.append(both.scaler.get_scale())
    both.compare_state()
    assert scales == [256.0, 128.0, 64.0, 64.0, 128.0, 128.0]
    ranks: list[Any] = [None] * dist.get_world_size()
    mine = (
        scales,
        [param.detach() for param in both.model.parameters()],
        [optimizer.full_state_dict(to=None)["state"] for optimizer in both.optimizers],
    )
    dist.all_gather_object(ranks, mine)
    for other in ranks:
        torch.testing.assert_close(other, ranks[0], rtol=0, atol=0)


@pytest.mark.parametrize(("value", "bucket_mb", "stage"), [(float("inf"), TINY_MB, 2), (float("nan"), "auto", 1)])
@pytest.mark.parametrize("name", ["typical", "unscale", "accumulation_with_no_sync", "several_optimizers"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_non_finite_value_on_one_rank_skips_the_step_on_all(
    num_ranks: int, name: str, value: float, bucket_mb: Any, stage: int
) -> None:
    run_ranks(num_ranks, _inf_on_one_rank, name, value, bucket_mb, stage)


@impatient
def _scale_after_inf(rank: int, combine: bool) -> float:
    both = Both("typical", TINY_MB, 2, init_scale=2.0**8)
    whole = Collectives.sum_shards

    def broken(self: Collectives, tensor: Tensor, what: str, *args: Any) -> Any:
        return DONE if what == "found_inf" else whole(self, tensor, what, *args)

    with mock.patch.object(Collectives, "sum_shards", whole if combine else broken):
        _poison(both.model, rank, 1, float("inf"))
        both.recipe(both.model, both.optimizers, both.scaler, lambda model: None, rank, 1)
    return both.scaler.get_scale()


@pytest.mark.parametrize("combine", [True, False])
def test_scale_differs_between_ranks_when_found_inf_is_not_combined(combine: bool) -> None:
    """The proof that the tests above can fail: the owner of the shard with the inf would be alone to see it."""
    assert set(run_ranks(2, _scale_after_inf, combine)) == ({128.0} if combine else {128.0, 256.0})


# fp16 parameters -----------------------------------------------------------------------------------------------------


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Parameter(torch.randn(8, 9).half())
        self.b = nn.Parameter(torch.randn(5).half())


def _half(rank: int) -> None:
    """Gradients that fit, then a sum in fp16 that overflows though no rank's part does, then ones that fit."""
    for bucket_mb, stage in ((TINY_MB, 2), ("auto", 1)):
        model, twin = Half(), Half()
        optimizer = distadam.AdamW(
            model.named_parameters(),
            lr=0.1,
            comm=CommPolicy(bucket_mb=bucket_mb, reduce="native"),
            shard=ShardPolicy(stage=stage),
        )
        oracle = AveragedOracle(lambda flats: torch.optim.AdamW(flats, lr=0.1, fused=True), twin.parameters())
        scaler = GradScaler("cpu", init_scale=256.0, growth_interval=10)
        for step in range(4):
            loss = integer_loss(model.parameters(), 10 * step + rank)
            if step == 1:
                loss = loss + 224 * model.a.double().sum() * (1 if dist.get_world_size() > 1 else 2)
            scaler.scale(loss).backward()
            if step == 2:
                with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
                    scaler.unscale_(optimizer)
                scaler = GradScaler("cpu", init_scale=128.0, growth_interval=10)
                optimizer.zero_grad()
                scaler.scale(integer_loss(model.parameters(), 10 * step + rank)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step != 1:
                integer_loss(twin.parameters(), 10 * step + rank).backward()
                oracle.step()
                oracle.zero_grad()
            assert scaler.get_scale() == (256.0 if step == 0 else 128.0)
            assert_same_parameters(model, twin, f"step {step}")
        assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_fp16_parameters_scale_but_refuse_unscale(num_ranks: int) -> None:
    run_ranks(num_ranks, _half)


# What the scaler must also reach -------------------------------------------------------------------------------------


def _unfrozen(rank: int) -> float:
    """An inf in the first gradient of a parameter that was frozen so far, on one rank."""
    model = Net()
    model.rarely.requires_grad_(False)
    optimizer = distadam.AdamW(model.named_parameters())
    scaler = GradScaler("cpu", init_scale=256.0)
    model.rarely.requires_grad_(True)
    if rank == 0:
        model.rarely.weight.register_hook(lambda grad: grad * float("inf"))
    scaler.scale(model(inputs_of(rank, 0), rarely=True).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(param.isfinite().all() for param in model.parameters())
    return scaler.get_scale()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_non_finite_gradient_of_an_unfrozen_parameter_skips_the_step_on_all(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _unfrozen) == [128.0] * num_ranks


@impatient
def _norms(rank: int) -> None:
    """`grad_norm` is that of the gradient which the update sees: averaged and unscaled."""
    for recipe in ("typical", "unscale"):
        both = Both(recipe, "auto", 2, init_scale=2.0**8)
        both.step(rank, 0)
        norm = torch.nn.utils.get_total_norm([param.grad for param in both.twin.parameters() if param.grad is not None])
        torch.testing.assert_close(both.optimizers[0].grad_norm, norm, rtol=ULPS, atol=0)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_grad_norm_is_that_of_the_unscaled_gradient(num_ranks: int) -> None:
    """torch's fused step writes the unscaled gradient back, so the twin has it; norms differ by an ulp or two."""
    run_ranks(num_ranks, _norms)
