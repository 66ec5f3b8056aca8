"""PyTorch's own table of optimizer inputs, run through distadam.

`torch.testing._internal.common_optimizers` lists the constructor arguments that PyTorch tests its optimizers with, and
those that must raise. Every valid input trains a small model for 10 steps: with parameters of a multiple of 64 elements
Adam, AdamW and SGD end in the bits of torch.optim(fused=True) (tolerance: none); with odd sizes, and for RMSprop, each
step stays within contract 2.3.1's bound of 4 eps S of an oracle in extended precision. Inputs that the table keeps for
CUDA (capturable, tensor lr and betas) run here too: distadam's step never reads them on the wrong side, so they work on
any device. Inputs with differentiable=True raise ConfigError. Error inputs raise the table's type and text.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ConfigError
from tests.reference_optimizers import ORACLES, Problem, same_bits, worst_error

pytest.importorskip("expecttest", reason="torch's table imports it; pip install expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        optim_db,
    )

BOUND = 4.0
NUM_STEPS = 10
NAMES = ("Adam", "AdamW", "SGD", "RMSprop")
INFOS: dict[str, OptimizerInfo] = {info.optim_cls.__name__: info for info in optim_db}
HINTS = ("foreach", "fused", "differentiable", "capturable")
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERY_OPTIMIZER = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forced kernel; and no search of all live objects for DDP, which takes most of a small run's time."""
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)
    monkeypatch.setattr("distadam.engine.places.refuse_ddp", lambda names: None)


def table(name: str, dtype: torch.dtype) -> list[OptimizerInput]:
    """Return the table's inputs, those for CUDA and MPS included, plain and with each flag that the table names."""
    info = INFOS[name]
    inputs: dict[str, OptimizerInput] = {}
    for device in ("cpu", "cuda", "mps"):
        for entry in info.optim_inputs_func(device, dtype):
            for flags in ({}, *({flag: True} for flag in info.supported_impls)):
                kwargs = entry.kwargs | flags
                with contextlib.suppress(ValueError):  # foreach and a tensor lr: one of the table's errors
                    info.optim_cls([nn.Parameter(torch.zeros(1))], **kwargs)
                    inputs.setdefault(repr(kwargs), OptimizerInput(None, kwargs, f"{entry.desc} & {flags}"))
    return list(inputs.values())


def make_model(dtype: torch.dtype, *, odd: bool) -> nn.Module:
    torch.manual_seed(0)
    inner, outer = (5, 3) if odd else (64, 64)
    return nn.Sequential(nn.Linear(7 if odd else 8, inner), nn.Tanh(), nn.Linear(inner, outer)).to(dtype)


def run_backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    first = next(model.parameters())
    inputs = torch.randn(4, first.shape[1], generator=generator, dtype=first.dtype)
    (model(inputs) ** 2).mean().backward()


def final_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    full = optimizer.full_state_dict() if isinstance(optimizer, distadam.ShardedOptimizer) else optimizer.state_dict()
    entries = {f"{key} {n}": value for n, entry in full["state"].items() for key, value in entry.items()}
    return {key: param.detach() for key, param in model.named_parameters()} | {
        key: value for key, value in entries.items() if value is not None
    }


def test_table_has_what_this_file_expects() -> None:
    """A table that torch renamed or emptied would leave the tests below nothing to do."""
    for name in NAMES:
        inputs = table(name, torch.float32)
        assert len(inputs) >= 20
        for hint in ("foreach", "differentiable", *(() if name == "RMSprop" else ("fused",))):
            assert any(entry.kwargs.get(hint) for entry in inputs)
        assert any(isinstance(entry.kwargs.get("lr"), Tensor) for entry in inputs)
        assert name == "SGD" or any(entry.kwargs.get("capturable") for entry in inputs)
        assert len(INFOS[name].optim_error_inputs_func("cpu", torch.float32)) >= 7


@BOTH_DTYPES
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_every_input_trains_to_torchs_bits(name: str, dtype: torch.dtype) -> None:
    num_trained = 0
    for entry in table(name, dtype):
        if entry.kwargs.get("differentiable"):
            continue
        outcomes = []
        for package in (distadam, torch.optim):
            options = copy.deepcopy(entry.kwargs)
            if package is torch.optim:
                options = {key: value for key, value in options.items() if key not in HINTS} | {"fused": True}
            model = make_model(dtype, odd=False)
            optimizer = getattr(package, name)(model.parameters(), **options)
            for step in range(NUM_STEPS):
                run_backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
            outcomes.append(final_state(optimizer, model))
        assert same_bits(*outcomes), entry.desc
        num_trained += 1
    assert num_trained >= 15


def worst_of_a_run(name: str, kwargs: dict[str, Any], dtype: torch.dtype, num_steps: int = 4) -> float:
    """Return the largest |error| / (eps S) of any element in any step, each step from the state before it."""
    model = make_model(dtype, odd=True)
    params = list(model.parameters())
    optimizer = getattr(distadam, name)(params, **copy.deepcopy(kwargs), comm=CommPolicy(bucket_mb=71 / 2**20))
    names = [key for key in optimizer.state.get(params[0], {}) if key != "step"]

    def problem(param: Tensor, count: int) -> Problem:
        state = {key: optimizer.state[param][key].clone() for key in names}
        grad = torch.empty(0) if param.grad is None else optimizer.full_grad(param).reshape(-1)
        return Problem(weight=param.detach().reshape(-1).clone(), grad=grad, state=state, count=count)

    worst = 0.0
    for step in range(num_steps):
        run_backward(model, step)
        exact = [ORACLES[name.lower()](optimizer.param_groups[0], problem(param, step + 1)) for param in params]
        optimizer.step()
        worst = max(
            [worst, *(worst_error(problem(param, step + 1), e) for param, e in zip(params, exact, strict=True))]
        )
    return worst


@BOTH_DTYPES
@EVERY_OPTIMIZER
def test_every_input_stays_within_the_contracts_bound(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("this platform's long double is a double: no oracle for fp64")
    for entry in table(name, dtype):
        if not any(entry.kwargs.get(hint) for hint in HINTS[:3]):  # hints, which the test of bits runs
            assert worst_of_a_run(name, entry.kwargs, dtype) <= BOUND, entry.desc


@EVERY_OPTIMIZER
def test_differentiable_inputs_raise_config_error(name: str) -> None:
    entries = [entry for entry in table(name, torch.float32) if entry.kwargs.get("differentiable")]
    assert entries
    for entry in entries:
        with pytest.raises(ConfigError, match="expected differentiable=False"):
            getattr(distadam, name)(make_model(torch.float32, odd=False).parameters(), **entry.kwargs)


@BOTH_DTYPES
@EVERY_OPTIMIZER
def test_error_inputs_raise_the_tables_errors(name: str, dtype: torch.dtype) -> None:
    for error_input in INFOS[name].optim_error_inputs_func("cpu", dtype):
        assert error_input.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        entry = error_input.optimizer_error_input
        for package in (torch.optim, distadam):
            params = [nn.Parameter(torch.randn(2, 3, dtype=dtype))] if entry.params is None else entry.params
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                with pytest.raises(error_input.error_type, match=error_input.error_regex):
                    getattr(package, name)(copy.copy(params), **entry.kwargs)


@EVERY_OPTIMIZER
def test_tables_schedulers_train_to_torchs_bits(name: str) -> None:
    for kwargs, factories in _scheduler_inputs(name):
        outcomes = []
        for package in (distadam, torch.optim):
            fused = {} if package is distadam or name == "RMSprop" else {"fused": True}
            model = make_model(torch.float32, odd=False)
            optimizer = getattr(package, name)(model.parameters(), **copy.deepcopy(kwargs), **fused)
            schedulers = [factory(optimizer) for factory in factories]
            lrs = []
            for step in range(NUM_STEPS):
                run_backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([1.0] if plateau else []))
                lrs.append(float(optimizer.param_groups[0]["lr"]))
            outcomes.append((lrs, final_state(optimizer, model)))
        (our_lrs, ours), (their_lrs, theirs) = outcomes
        assert our_lrs == their_lrs
        assert name == "RMSprop" or same_bits(ours, theirs)


def _scheduler_inputs(name: str) -> list[tuple[dict[str, Any], list[Any]]]:
    """Normalise the table's two spellings: ([factories], ...) and ((kwargs, [factories]), ...)."""
    found = []
    for entry in INFOS[name].scheduler_inputs:
        kwargs, factories = entry if len(entry) == 2 and isinstance(entry[0], dict) else ({}, entry)
        found.append((kwargs, list(factories)))
    assert found
    return found
