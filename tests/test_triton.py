"""Triton's update kernels against the reference's operations: the same bits, the square root aside.

On a machine without a GPU they run in Triton's interpreter (tests/conftest.py), on one with a GPU on the device: the
same tests. What is compared with is `Rule.update` with an IEEE square root in place of the CPU's (numpy's, correctly
rounded): every operation is then the same, and so are the bits, tolerance none. With the reference as it is, whose
root may differ by an ulp or two ([Note: square roots on the CPU]), the results stay within contract 2.3.1's bound of
an oracle in extended precision.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distadam.rules import RULES, Scratch
from tests.reference_optimizers import (
    ORACLES,
    Options,
    Problem,
    case_id,
    cases,
    make_group,
    make_problem,
    same_bits,
    worst_error,
)

pytest.importorskip("triton", reason="triton is not installed (pip install 'distadam[triton]')")

from distadam.kernels.triton_tables import HyperTable, Range, make_tables, structure_of
from distadam.kernels.triton_update import update

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUND = 4.0
NUMEL = 64 * 20  # one whole chunk of 1024 and a part
EVERY_CASE = pytest.mark.parametrize(("name", "options"), cases(), ids=case_id)
OPTIONS_TO_RUN: dict[str, Options] = {
    "adam": {"weight_decay": 0.01, "amsgrad": True},
    "adamw": {"weight_decay": 0.1, "maximize": True},
    "sgd": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "rmsprop": {"momentum": 0.9, "centered": True},
}
EVERY_RULE = pytest.mark.parametrize("name", list(RULES))


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((numel,), math.nan if dtype.is_floating_point else 1, dtype=dtype, device=device)


def upload(host: Tensor, out: Tensor) -> None:
    out.copy_(host)


@pytest.fixture
def ieee_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference with the square root that Triton has."""

    def sqrt_into(x: Tensor, out: Tensor) -> None:
        with np.errstate(invalid="ignore"):
            out.copy_(torch.from_numpy(np.sqrt(x.numpy())))

    monkeypatch.setattr("distadam.rules.adam.sqrt_into", sqrt_into)
    monkeypatch.setattr("distadam.rules.rmsprop.sqrt_into", sqrt_into)
    return


def run_reference(name: str, group: Options, problem: Problem) -> None:
    """Update in place by the rule itself."""
    step = torch.tensor(float(problem.count))
    RULES[name].update(problem.weight, problem.grad, problem.state, step, group, Scratch(allocate), None)


def run_triton(
    name: str,
    groups: list[Options],
    problem: Problem,
    *,
    ranges: list[Range] | None = None,
    counts: list[float] | None = None,
    param: Tensor | None = None,
    extra: Tensor | None = None,
    grad: Tensor | None = None,
    weights: str = "own",
    moments: str = "fp32",
    **factors: float,
) -> None:
    """Update in place by Triton; the problem's weight is the parameter unless param is given."""
    rule = RULES[name]
    ranges = ranges or [Range(start=0, end=problem.weight.numel(), group=0, slot=0)]
    steps = torch.tensor(counts or [float(problem.count)], device=DEVICE)
    device = {"grad": problem.grad if grad is None else grad, "param": problem.weight if param is None else param}
    on_device = {key: tensor.to(DEVICE) for key, tensor in device.items()}
    extra_on_device = None if extra is None else extra.to(DEVICE)
    states = {key: tensor.to(DEVICE) for key, tensor in problem.state.items()}
    hyper = HyperTable(allocate, upload, DEVICE).refresh(rule, groups)
    structures = [structure_of(rule, group) for group in groups]
    scalars = {key: torch.tensor(value, device=DEVICE) for key, value in factors.items()}
    for table in make_tables(ranges, structures, allocate, upload, DEVICE):
        kernel, flags = table.structure
        names = rule.state_names(groups[int(table.rows[0, 0])])
        update(
            on_device["grad"],
            on_device["param"],
            extra_on_device,
            [states[key] for key in names],
            [],
            [],
            table.chunks,
            table.rows,
            hyper,
            steps,
            table.coefficients,
            scalars.get("num_ranks"),
            scalars.get("multiplier0"),
            scalars.get("multiplier1"),
            scalars.get("loss_scale"),
            scalars.get("found_inf"),
            kernel,
            weights,
            moments,
            list(flags),
        )
    for tensor, result in [(device["param"], on_device["param"]), (extra, extra_on_device)]:
        if tensor is not None and result is not None:
            tensor.copy_(result)
    for key, tensor in problem.state.items():
        tensor.copy_(states[key])


def problem_for(name: str, group: Options, count: int = 3, **arguments: Any) -> Problem:
    return make_problem(RULES[name].state_names(group), count, **{"numel": NUMEL, **arguments})


@pytest.mark.usefixtures("ieee_sqrt")
@pytest.mark.parametrize("count", [1, 1000])
@EVERY_CASE
def test_update_has_the_references_bits(name: str, options: Options, count: int) -> None:
    group = make_group(name, options)
    problem = problem_for(name, group, count, numel=192)
    expected = problem.clone()
    run_reference(name, group, expected)
    run_triton(name, [group], problem)
    assert same_bits(problem.results(), expected.results())


@EVERY_RULE
def test_update_is_within_the_contracts_bound(name: str) -> None:
    group = make_group(name, OPTIONS_TO_RUN[name])
    problem = problem_for(name, group, numel=4096)
    exact = ORACLES[name](group, problem)
    run_triton(name, [group], problem)
    assert worst_error(problem, exact) <= BOUND
