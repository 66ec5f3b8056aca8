"""``torch.compile``d models, whole and block by block: the bits of the compiled model under torch.optim.

Covered at 1, 2 and 3 ranks: compiling in place, the module and the function; before and after the optimizer is built;
``prefetch`` hooks inside compiled code; accumulation, and recompilation while ``p.grad`` holds stand-ins.

rtol = atol = 0: gradients are rounded to multiples of 2^-8, so every order of summation is exact, and all parameters
have multiples of 64 elements. Backend ``aot_eager``: capture, functionalisation and autograd of the compiler, without
the time that C++ takes; ``inductor`` once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy
from tests.averaged_oracle import TINY_MB, Averaged, quantise
from tests.ranks import run_ranks
from tests.test_unmodified_loops import delayed

RANKS = (1, 2, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(torch.relu(self.up(inputs)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 4, bias=False)
        quantise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


def _whole(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=backend)


def _in_place(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


def _blocks(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def _function(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda inputs: model(inputs), backend=backend)


HOW = {"whole": _whole, "in place": _in_place, "blocks": _blocks, "function": _function}


def _inputs(rank: int, step: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(100 * step + rank))


Trained = tuple[list[Tensor], list[Tensor]]


def _train(
    rank: int, how: str, backend: str, *, prefetch: bool = False, late_s: float = 0.0, accumulate: bool = False
) -> Trained:
    """Train a model and its twin; return parameters after each step, of the model and of the twin."""
    with warnings.catch_warnings():
        # The compiler's own: deprecated modules, and .grad of tensors that are no leaves.
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, twin = Net(), Net()
        if rank % 2:  # compiled before or after the optimizer is built: no difference
            run = HOW[how](model, backend)
        optimizer = distadam.AdamW(model.named_parameters(), lr=0.01, comm=CommPolicy(bucket_mb=TINY_MB))
        if rank % 2 == 0:
            run = HOW[how](model, backend)
        if prefetch:
            run(_inputs(rank, 0))  # traced before there are hooks
            optimizer.prefetch(model)
        run_twin = HOW[how](twin, backend)
        expected = list(_steps(rank, run_twin, twin, Averaged(twin.parameters(), lr=0.01), accumulate))
        with delayed(rank, late_s) if late_s else nullcontext():
            got = list(_steps(rank, run, model, optimizer, accumulate))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return got, expected


def _steps(rank: int, forward: Any, model: nn.Module, optimizer: Any, accumulate: bool) -> Iterator[Tensor]:
    for step in range(4):
        for micro in range(2 if accumulate else 1):
            with optimizer.no_sync() if accumulate and micro == 0 and step % 2 else nullcontext():
                # Another shape while gradients are there: dynamo looks at p.grad when it traces again.
                forward(_inputs(rank, step + 10 * micro, 3 + 2 * micro)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield forward(_inputs(rank, 7)).detach().clone()
        yield from (value.clone() for value in model.state_dict().values())


def _compare(results: list[Trained]) -> None:
    for got, expected in results:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _run(rank: int, how: str, backend: str, options: dict[str, Any]) -> Trained:
    return _train(rank, how, backend, **options)


def _run_without_waits(rank: int, how: str) -> Trained:
    with mock.patch.object(distadam.ShardedOptimizer, "wait_buckets", return_value=None):
        return _train(rank, how, "eager", prefetch=True, late_s=0.05)


@pytest.mark.parametrize(
    "how", ["blocks", *(pytest.param(how, marks=pytest.mark.long) for how in HOW if how != "blocks")]
)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_compiled_model_trains_to_the_same_bits(num_ranks: int, how: str) -> None:
    _compare(run_ranks(num_ranks, _run, how, "aot_eager", {}))


@pytest.mark.long
@pytest.mark.parametrize("how", HOW)
def test_prefetch_hooks_survive_compilation_when_collectives_are_late(how: str) -> None:
    _compare(run_ranks(2, _run, how, "aot_eager", {"prefetch": True, "late_s": 0.02}))


@pytest.mark.long
@pytest.mark.parametrize("how", HOW)
def test_compiled_model_reads_stale_parameters_when_hooks_do_not_wait(how: str) -> None:
    """The proof that the test above can fail."""
    results = run_ranks(2, _run_without_waits, how)
    with pytest.raises(AssertionError):
        _compare(results)


@pytest.mark.long
@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiled_model_is_traced_again_while_gradients_are_collected(num_ranks: int, how: str) -> None:
    _compare(run_ranks(num_ranks, _run, how, "aot_eager", {"accumulate": True}))


@pytest.mark.slow
def test_inductor_trains_to_the_same_bits() -> None:
    _compare(run_ranks(2, _run, "blocks", "inductor", {"prefetch": True}))
