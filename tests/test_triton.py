"""Triton's update kernels against the reference's operations: the same bits, the square root aside.

On a machine without a GPU they run in Triton's interpreter (tests/conftest.py), on one with a GPU on the device: the
same tests. What is compared with is `Rule.update` with an IEEE square root in place of the CPU's (numpy's, correctly
rounded): every operation is then the same, and so are the bits, tolerance none. With the reference as it is, whose
root may differ by an ulp or two ([Note: square roots on the CPU]), the results stay within contract 2.3.1's bound of
an oracle in extended precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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

import triton
import triton.language as tl

from distadam.kernels.triton_math import power
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


@pytest.fixture(autouse=True)
def quiet_numpy() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where floating point overflows."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def ieee_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference with the square root that Triton has."""

    def sqrt_into(x: Tensor, out: Tensor) -> None:
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
    hyper = HyperTable(len(groups), upload, DEVICE).refresh(rule, groups)
    structures = [structure_of(rule, group) for group in groups]
    scalars = {key: torch.tensor(value, device=DEVICE) for key, value in factors.items()}
    for table in make_tables(ranges, structures, upload, DEVICE):
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


@pytest.mark.usefixtures("ieee_sqrt")
@pytest.mark.parametrize("numel", [64, 960, 1024, 1088, 3 * 1024 + 64])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_round_to_nearest_even(numel: int, grad_dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    group = make_group("adamw", OPTIONS_TO_RUN["adamw"])
    problem = problem_for("adamw", group, numel=numel, seed=numel)
    grad = problem.grad.to(grad_dtype)
    problem.grad = grad.float()
    expected = problem.clone()
    run_reference("adamw", group, expected)
    param = torch.zeros(numel, dtype=param_dtype)
    run_triton("adamw", [group], problem, param=param, extra=problem.weight, grad=grad, weights="fp32")
    assert same_bits(problem.results(), expected.results())
    assert torch.equal(param.view(torch.int16), expected.weight.to(param_dtype).view(torch.int16))


SCALINGS: list[dict[str, float]] = [
    {"num_ranks": 3.0},
    {"multiplier0": 0.7},
    {"loss_scale": 1000.0},
    {"num_ranks": 7.0, "multiplier0": 0.3, "multiplier1": 1.1, "loss_scale": 3.0},
]


@pytest.mark.usefixtures("ieee_sqrt")
@pytest.mark.parametrize("factors", SCALINGS, ids="-".join)
@EVERY_RULE
def test_each_factor_rounds_by_itself_in_order(name: str, factors: dict[str, float]) -> None:
    group = make_group(name, OPTIONS_TO_RUN[name])
    problem = problem_for(name, group)
    expected = problem.clone()
    for key, value in factors.items():
        factor = torch.tensor(value)
        expected.grad = expected.grad * factor if "multiplier" in key else expected.grad / factor
    run_reference(name, group, expected)
    run_triton(name, [group], problem, **factors)
    assert same_bits(problem.results(), expected.results())


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.inf, math.nan])
@EVERY_RULE
def test_found_inf_keeps_every_bit(name: str, found_inf: float) -> None:
    group = make_group(name, OPTIONS_TO_RUN[name])
    problem = problem_for(name, group, count=1, numel=128)
    problem.grad[3] = math.nan
    before = problem.clone()
    run_triton(name, [group], problem, counts=[0.0], found_inf=found_inf)  # a skipped first step has count 0
    assert same_bits(problem.results(), before.results())


@pytest.mark.usefixtures("ieee_sqrt")
@EVERY_RULE
def test_found_inf_of_0_updates(name: str) -> None:
    group = make_group(name, OPTIONS_TO_RUN[name])
    problem = problem_for(name, group, numel=128)
    expected = problem.clone()
    run_reference(name, group, expected)
    run_triton(name, [group], problem, found_inf=0.0)
    assert same_bits(problem.results(), expected.results())


@pytest.mark.usefixtures("ieee_sqrt")
@EVERY_RULE
def test_one_launch_serves_groups_step_counts_and_gaps(name: str) -> None:
    options = OPTIONS_TO_RUN[name]
    groups = [make_group(name, {**options, "lr": lr, "weight_decay": decay}) for lr, decay in [(1e-3, 0.0), (0.1, 0.2)]]
    problem = problem_for(name, groups[0], numel=4096)
    expected, before = problem.clone(), problem.clone()
    ranges = [
        Range(start=0, end=1152, group=1, slot=2),  # more than a chunk
        Range(start=1152, end=1216, group=0, slot=0),
        Range(start=1280, end=2304, group=0, slot=1),  # after a gap
        Range(start=4032, end=4096, group=1, slot=0),
    ]
    counts = [3.0, 1.0, 250.0]
    touched = torch.zeros(4096, dtype=torch.bool)
    for span in ranges:
        piece = slice(span.start, span.end)
        touched[piece] = True
        state = {key: tensor[piece] for key, tensor in expected.state.items()}
        part = Problem(
            weight=expected.weight[piece], grad=expected.grad[piece], state=state, count=int(counts[span.slot])
        )
        run_reference(name, groups[span.group], part)
    structures = [structure_of(RULES[name], group) for group in groups]
    assert len(make_tables(ranges, structures, upload, DEVICE)) == 1
    run_triton(name, groups, problem, ranges=ranges, counts=counts)
    assert same_bits(problem.results(), expected.results())
    for key, tensor in problem.results().items():
        assert torch.equal(tensor[~touched], before.results()[key][~touched])


SPECIALS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 1.17549435e-38, 3.4028235e38, -3.4028235e38, 1e20]


@pytest.mark.usefixtures("ieee_sqrt")
@pytest.mark.parametrize("where", ["grad", "weight", "state"])
@EVERY_RULE
def test_nan_inf_and_denormals_go_where_the_reference_takes_them(name: str, where: str) -> None:
    group = make_group(name, OPTIONS_TO_RUN[name])
    problem = problem_for(name, group, numel=64)
    targets = {"grad": [problem.grad], "weight": [problem.weight], "state": list(problem.state.values())}[where]
    for shift, target in enumerate(targets):
        target[shift : shift + len(SPECIALS)] = torch.tensor(SPECIALS)
    expected = problem.clone()
    run_reference(name, group, expected)
    run_triton(name, [group], problem)
    for key, tensor in expected.results().items():
        actual = problem.results()[key]
        assert torch.equal(actual.isnan(), tensor.isnan()), key
        assert torch.equal(actual.view(torch.int32)[~actual.isnan()], tensor.view(torch.int32)[~tensor.isnan()]), key


@pytest.mark.usefixtures("ieee_sqrt")
def test_tensor_hyper_parameters_are_read_in_every_update() -> None:
    lr = torch.tensor(1e-3)
    groups = [make_group("adamw", {}), make_group("adamw", {"weight_decay": 0.0})]
    groups[0]["lr"] = lr.to(DEVICE)
    table = HyperTable(2, upload, DEVICE)
    for value in (1e-3, 0.5):
        groups[0]["lr"].fill_(value)
        read = table.refresh(RULES["adamw"], groups).cpu()
        assert read[0].tolist()[:5] == [float(torch.tensor(value)), 0.9, 0.999, 1e-8, 0.01]
        assert read[1].tolist()[:5] == [1e-3, 0.9, 0.999, 1e-8, 0.0]
    groups[1]["lr"] = 0.25
    assert table.refresh(RULES["adamw"], groups)[1, 0] == 0.25


@triton.jit
def power_kernel(result, base, count):
    tl.store(result, power(tl.load(base), tl.load(count)))


def test_powers_are_those_of_double_precision() -> None:
    """Within the ulp that C's pow may err by; squaring without the low parts would miss by thousands of ulps."""
    for base in (0.5, 0.9, 0.95, 0.999, 0.9999999):
        for count in (0, 1, 2, 3, 10, 1000, 123_457, 2**24):
            operands = [torch.tensor([base], dtype=torch.float64), torch.tensor([float(count)])]
            result = torch.zeros(1, dtype=torch.float64, device=DEVICE)
            power_kernel[(1,)](result, *[operand.to(DEVICE) for operand in operands], enable_fp_fusion=False)
            assert abs(float(result) - base**count) <= math.ulp(base**count), (base, count)


def test_bias_corrections_round_once_from_double_precision() -> None:
    for beta2, count in [(0.5, 1), (0.95, 10), (0.999, 1), (0.999, 1000), (0.9999999, 3), (0.9999999, 123_457)]:
        group = make_group("adam", {"lr": 1.0, "betas": (0.9, beta2), "eps": 1.0})
        hyper = HyperTable(1, upload, DEVICE).refresh(RULES["adam"], [group])
        ranges = [Range(start=0, end=64, group=0, slot=0)]
        (table,) = make_tables(ranges, [structure_of(RULES["adam"], group)], upload, DEVICE)
        coefficients(table, hyper, float(count))
        root = math.sqrt(1 - beta2**count)
        expected = torch.tensor([-root / (1 - 0.9**count), root])
        assert torch.equal(table.coefficients[0, 5:7].cpu(), expected), (beta2, count)


def coefficients(table: Any, hyper: Tensor, count: float) -> None:
    from distadam.kernels.triton_update import RULES as KERNELS

    steps = torch.tensor([count], device=DEVICE)
    KERNELS["adam"].coefficients[(1,)](table.coefficients, table.rows, hyper, steps, DECOUPLED=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numel", [64, 2048, 3 * 2048 + 64])
def test_norm_and_non_finite_count(numel: int, dtype: torch.dtype) -> None:
    from distadam.kernels.triton_norm import num_programs, sum_of_squares

    values = (torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 100).to(dtype).to(DEVICE)
    partials = torch.full((2 * num_programs(numel),), math.nan, dtype=torch.float64, device=DEVICE)
    total = torch.full((), math.nan, dtype=torch.float64, device=DEVICE)
    nonfinite = torch.full((), math.nan, device=DEVICE)
    sum_of_squares(values, partials, total, nonfinite)
    exact = math.fsum(float(value) ** 2 for value in values.double())
    assert abs(float(total) - exact) <= 1e-13 * exact
    assert float(nonfinite) == 0
    values[[0, numel // 2, numel - 1]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype, device=DEVICE)
    sum_of_squares(values, partials, total, nonfinite)
    assert math.isnan(float(total))
    assert float(nonfinite) == 3


def test_norm_of_large_float32_does_not_overflow() -> None:
    from distadam.kernels.triton_norm import sum_of_squares

    partials = torch.empty(2, dtype=torch.float64, device=DEVICE)
    total = torch.empty((), dtype=torch.float64, device=DEVICE)
    sum_of_squares(torch.full((64,), 3e38, device=DEVICE), partials, total, None)
    assert float(total) == pytest.approx(64 * 9e76, rel=1e-6)
