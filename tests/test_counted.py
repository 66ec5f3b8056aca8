"""What a step costs, counted: Python calls, operations, allocations, collectives. None of it varies with the machine.

- Python function calls in ``step()`` (sys.setprofile, "call" events) are equal for 100 and for 10,000 parameters that
  fill the same number of buckets. C calls are not counted: `map` over all parameters is one.
- In the steady state neither hooks nor ``step()`` allocate: a TorchDispatchMode sees every operation and reports
  outputs whose storage is not an argument's. The model's own gradients are not ours and are made before counting.
- Host syncs are operations that bring a device value to Python; on the CPU there is no device to wait for, so the same
  count is taken on the meta device in test_dry_run.py, where a sync raises.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distadam
from tests.ranks import run_ranks

RULES = {
    "adam": (distadam.Adam, {}),
    "adamw": (distadam.AdamW, {"amsgrad": True}),
    "sgd": (distadam.SGD, {"momentum": 0.9, "lr": 0.1}),
    "rmsprop": (distadam.RMSprop, {"centered": True, "momentum": 0.5}),
}


def count_python_calls(function: Callable[[], Any]) -> int:
    """Return how many Python functions are entered while ``function`` runs."""
    calls = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        # How often a wait looks for its peers' tokens is chance.
        calls += event == "call" and not frame.f_code.co_filename.endswith("mesh.py")

    gc.collect()
    gc.disable()  # what a collection calls is chance too
    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


class Allocations(TorchDispatchMode):
    """Counts operations whose result lies in memory that no argument brought along."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if plain(leaf)}
        if any(plain(leaf) and leaf.untyped_storage()._cdata not in known for leaf in tree_leaves(result)):
            self.found[str(func)] += 1
        return result


def plain(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and type(leaf).__name__ != "ShardedGradient"


def make_params(number: int, numel: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(numel)) for _ in range(number)]


def backward(params: list[nn.Parameter]) -> None:
    torch.autograd.backward([p.sum() for p in params])


def _calls_in_step(rank: int, number: int, numel: int, rule: str) -> int:
    torch.set_num_threads(1)
    kind, options = RULES[rule]
    params = make_params(number, numel)
    optimizer = kind(params, comm=distadam.CommPolicy(bucket_mb=2.6), **options)
    assert len(optimizer.layout.buckets) == 1
    for _ in range(3):
        backward(params)
        optimizer.step()
    backward(params)
    return count_python_calls(optimizer.step)


@pytest.mark.parametrize(
    ("num_ranks", "rule"),
    [
        (1, "sgd"),
        (2, "adamw"),
        *(
            pytest.param(n, rule, marks=pytest.mark.long)
            for n in (1, 2)
            for rule in RULES
            if (n, rule) not in ((1, "sgd"), (2, "adamw"))
        ),
    ],
)
def test_python_calls_in_step_do_not_depend_on_the_number_of_parameters(rule: str, num_ranks: int) -> None:
    few = run_ranks(num_ranks, _calls_in_step, 100, 6400, rule)
    many = run_ranks(num_ranks, _calls_in_step, 10_000, 64, rule)
    assert few == many
    assert 0 < few[0] < 600


def test_python_call_counter_counts() -> None:
    def called() -> None:
        pass

    def calls_three() -> None:
        for _ in range(3):
            called()

    assert count_python_calls(calls_three) == 4


def _allocations(rank: int, rule: str, stage: int, scaled: bool) -> tuple[dict[str, int], dict[str, int], int]:
    kind, options = RULES[rule]
    params = [*make_params(6, 640), nn.Parameter(torch.ones(100, 10))]
    comm = distadam.CommPolicy(bucket_mb=3000 / 2**20)
    optimizer = kind(params, comm=comm, shard=distadam.ShardPolicy(stage=stage), **options)
    found_inf, grad_scale = torch.zeros(()), torch.full((), 2.0)
    for _ in range(3):
        backward(params)
        if scaled:
            optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
        optimizer.step()
    grads = [torch.ones_like(param) for param in params]
    with Allocations() as in_hooks:
        for param, grad in zip(reversed(params), reversed(grads), strict=True):  # as backward reaches them
            index = optimizer._reducer.indices[param]
            optimizer._reducer.collect(*optimizer._reducer.place(index), index, grad)
    for param, stand_in in zip(optimizer._reducer.params, optimizer._reducer.stand_ins, strict=True):
        param.grad = stand_in
    with Allocations() as in_step:
        optimizer.step()
    return dict(in_hooks.found), dict(in_step.found), in_step.operations + in_hooks.operations


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_hooks_and_step_allocate_nothing_in_the_steady_state(
    rule: str, stage: int, num_ranks: int, scaled: bool
) -> None:
    for in_hooks, in_step, operations in run_ranks(num_ranks, _allocations, rule, stage, scaled):
        assert in_hooks == {}
        assert in_step == {}
        assert operations > 5


def test_allocation_counter_sees_an_allocation() -> None:
    value = torch.ones(4)
    with Allocations() as seen:
        value.add_(1)
        value.view(2, 2)
    assert not seen.found
    with Allocations() as seen:
        value + 1
    assert seen.found
