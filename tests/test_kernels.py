"""The kernels: bits of torch_fused, bound and bits of reference, scaling, skipping, allocation, meta, selection.

torch_fused against torch.optim(fused=True): the same bits after 50 steps, for every option combination, also when the
flat tensor is cut into ranges (tolerance: none). reference: contract 2.3.1's bound, 4 eps S, of an oracle in extended
precision (measured: at most 3.0), and the same bits however it is cut. Everything about scaling and skipping is bits:
each factor is one IEEE operation, so elementwise torch operations in the stated order are the exact expectation.
"""

from __future__ import annotations

import math
import random
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distadam.errors import ConfigError, UsageError
from distadam.kernels import (
    Choice,
    GradScaling,
    GroupRanges,
    Kernel,
    ReferenceKernel,
    ShardUpdate,
    TorchFusedKernel,
    make_kernel,
    select,
)
from distadam.precision import OwnWeights, PlainMoment
from distadam.rules import RULES, Rule
from tests.reference_optimizers import (
    FUSED_RULES,
    ORACLES,
    TORCH_OPTIMIZERS,
    OperationCounter,
    Options,
    Problem,
    case_id,
    cases,
    make_group,
    make_problem,
    same_bits,
    worst_error,
)

NUMEL = 64 * 40
BOUND = 4.0
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERY_CASE = pytest.mark.parametrize(("name", "options"), cases(), ids=case_id)
FUSED_CASES = pytest.mark.parametrize(("name", "options"), cases(FUSED_RULES), ids=case_id)
EVERY_KERNEL_AND_RULE = pytest.mark.parametrize(
    ("kernel_name", "name"), [("reference", n) for n in RULES] + [("torch_fused", n) for n in FUSED_RULES]
)
OPTIONS_TO_RUN: dict[str, Options] = {
    "adam": {"weight_decay": 0.01, "amsgrad": True},
    "adamw": {"maximize": True},
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "rmsprop": {"momentum": 0.9, "centered": True},
}


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((numel,), math.nan if dtype.is_floating_point else 1, dtype=dtype, device=device)


def random_cuts(seed: int, numel: int = NUMEL) -> list[int]:
    return [0, *sorted(random.Random(seed).sample(range(64, numel, 64), 6)), numel]


def plain_moment(tensor: Tensor) -> PlainMoment:
    """A state that lies in ``tensor`` itself."""
    moment = PlainMoment(0, tensor.dtype, tensor.dtype, tensor.device, lambda kind, *args: torch.empty(0))
    moment.tensor = moment.direct = tensor
    return moment


def cut(problem: Problem, cuts: list[int], group: Options, *, first: bool | None = None) -> ShardUpdate:
    """Lay a problem out as ranges; `first` None means what the count says."""
    spans = list(pairwise(cuts))
    steps = torch.full((max(1, len(spans)),), float(problem.count), device=problem.weight.device)
    ranges = GroupRanges(
        group=group,
        spans=spans,
        steps=[steps[i] for i in range(len(spans))],
        slots=list(range(len(spans))),
        first=[problem.count == 1 if first is None else first for _ in spans],
    )
    return ShardUpdate(
        weights=OwnWeights(problem.weight),
        states={key: plain_moment(tensor) for key, tensor in problem.state.items()},
        sources=[problem.grad],
        compute_dtype=problem.weight.dtype,
        steps=steps,
        ranges=[ranges],
    )


def problem_for(rule: Rule, group: Options, count: int, **arguments: Any) -> Problem:
    return make_problem(rule.state_names(group), count, **{"numel": NUMEL, **arguments})


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor-lr"])
@FUSED_CASES
def test_torch_fused_equals_torch_optim_over_50_steps(name: str, options: Options, tensor_lr: bool) -> None:
    if tensor_lr:
        options = {**options, "lr": torch.tensor(options["lr"])}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(NUMEL, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = TORCH_OPTIMIZERS[name]([parameter], **options, fused=True)
    rule, group = RULES[name], make_group(name, options)
    names = rule.state_names(group)
    runs = [
        (Problem(weight=start.clone(), grad=start, state={n: torch.zeros(NUMEL) for n in names}, count=0), cuts)
        for cuts in ([0, NUMEL], random_cuts(1))
    ]
    kernel = TorchFusedKernel()
    for _ in range(50):
        grad = torch.randn(NUMEL, generator=generator)
        parameter.grad = grad.clone()
        optimizer.step()
        for problem, cuts in runs:
            problem.count += 1
            problem.grad = grad.clone()
            kernel.update(rule, cut(problem, cuts, group), GradScaling())
    expected = {"weight": parameter.detach(), **{n: optimizer.state[parameter][n] for n in names}}
    for problem, _ in runs:
        assert same_bits(problem.results(), expected)


@BOTH_DTYPES
@EVERY_CASE
def test_reference_is_within_the_contracts_bound(name: str, options: Options, dtype: torch.dtype) -> None:
    rule, group = RULES[name], make_group(name, options)
    if dtype == torch.float64:
        import numpy as np

        if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
            pytest.skip("this platform's long double is a double: no oracle for fp64")
    kernel = ReferenceKernel(allocate)
    for count in (1, 7, 300):
        problem = problem_for(rule, group, count, dtype=dtype, seed=1)
        exact = ORACLES[name](group, problem)
        kernel.update(rule, cut(problem, random_cuts(2), group), GradScaling())
        assert worst_error(problem, exact) <= BOUND


@BOTH_DTYPES
@EVERY_CASE
def test_reference_bits_do_not_depend_on_the_cut(
    name: str, options: Options, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, group = RULES[name], make_group(name, options)
    before = problem_for(rule, group, 3, dtype=dtype)
    results = []
    for chunk, cuts in ((1 << 20, [0, NUMEL]), (1 << 20, random_cuts(3)), (192, random_cuts(4))):
        monkeypatch.setattr("distadam.kernels.reference._CPU_CHUNK", chunk)
        problem = before.clone()
        ReferenceKernel(allocate).update(rule, cut(problem, cuts, group), GradScaling())
        results.append(problem.results())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@EVERY_KERNEL_AND_RULE
def test_bits_do_not_depend_on_the_number_of_threads(kernel_name: str, name: str) -> None:
    rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
    numel = 64 * 2999  # more than one chunk of the reference, and not a power of two
    before = problem_for(rule, group, 3, numel=numel)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        problem = before.clone()
        make_kernel(kernel_name, allocate).update(rule, cut(problem, [0, numel], group), GradScaling())
        results.append(problem.results())
    assert same_bits(results[0], results[1])


# 2 is found_inf summed over two ranks: torch's fused operations take only 1 for "found".
@pytest.mark.parametrize("found_inf", [[1.0], 1.0, 2.0, math.inf, math.nan], ids=str)
@EVERY_KERNEL_AND_RULE
def test_found_inf_keeps_every_bit(kernel_name: str, name: str, found_inf: Any) -> None:
    rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
    before = problem_for(rule, group, 2)
    before.grad[::3] = math.nan
    before.grad[1::3] = math.inf
    before.weight[0] = -0.0
    problem = before.clone()
    problem.count = 0  # a skipped step is not counted, and the first may be skipped
    scaling = GradScaling(found_inf=torch.tensor(found_inf))
    make_kernel(kernel_name, allocate).update(rule, cut(problem, random_cuts(5), group), scaling)
    assert same_bits(problem.results(), before.results())


@pytest.mark.parametrize("found_inf", [[0.0], 0.0, -0.0], ids=str)
@EVERY_KERNEL_AND_RULE
def test_found_inf_of_zero_changes_nothing(kernel_name: str, name: str, found_inf: Any) -> None:
    rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
    plain = problem_for(rule, group, 2)
    flagged = plain.clone()
    kernel = make_kernel(kernel_name, allocate)
    kernel.update(rule, cut(plain, [0, NUMEL], group), GradScaling())
    scaling = GradScaling(found_inf=torch.tensor(found_inf))
    kernel.update(rule, cut(flagged, [0, NUMEL], group), scaling)
    assert same_bits(plain.results(), flagged.results())


SCALINGS: dict[str, list[tuple[str, float]]] = {
    "ranks": [("num_ranks", 3.0)],
    "loss-scale": [("loss_scale", 7.0)],
    "multiplier": [("multiplier", 0.1)],
    "ranks-clip": [("num_ranks", 3.0), ("multiplier", 0.7)],
    "all": [("num_ranks", 3.0), ("multiplier", 1 / 49), ("multiplier", 0.7), ("loss_scale", 7.0)],
}


def make_scaling(factors: list[tuple[str, float]], dtype: torch.dtype) -> GradScaling:
    scaling = GradScaling()
    for kind, value in factors:
        factor = torch.tensor(value, dtype=dtype)
        if kind == "multiplier":
            scaling.multipliers.append(factor)
        else:
            setattr(scaling, kind, factor)
    return scaling


@BOTH_DTYPES
@pytest.mark.parametrize("factors", SCALINGS.values(), ids=SCALINGS.keys())
@EVERY_KERNEL_AND_RULE
def test_scaling_rounds_each_factor_in_order(
    kernel_name: str, name: str, factors: list[tuple[str, float]], dtype: torch.dtype
) -> None:
    rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
    scaled = problem_for(rule, group, 2, dtype=dtype)
    expected = scaled.clone()
    for kind, value in factors:
        factor = torch.full((NUMEL,), value, dtype=dtype)  # full-size: no shortcut for scalars can apply
        expected.grad = expected.grad * factor if kind == "multiplier" else expected.grad / factor
    kernel = make_kernel(kernel_name, allocate)
    kernel.update(rule, cut(scaled, random_cuts(6), group), make_scaling(factors, dtype))
    kernel.update(rule, cut(expected, random_cuts(6), group), GradScaling())
    assert same_bits(scaled.results(), expected.results())


def test_scaling_order_shows_in_the_bits() -> None:
    # What the test above would miss if the order, or a reciprocal, made no difference on its numbers.
    grad = problem_for(RULES["sgd"], make_group("sgd", {}), 2).grad
    assert not torch.equal(grad / 3 * 0.7, grad * 0.7 / 3)
    assert not torch.equal(grad / 3, grad * (torch.tensor(1.0) / 3))


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_sgd_ranges_with_different_first_steps_share_an_update(dampening: float) -> None:
    rule, group = RULES["sgd"], make_group("sgd", {"momentum": 0.9, "dampening": dampening})
    whole = problem_for(rule, group, 2)
    parts = whole.clone()
    ranges = cut(parts, [0, 640, 1280, NUMEL], group)
    ranges.ranges[0].first = [True, False, True]
    ranges.ranges[0].steps = [torch.tensor(1.0), torch.tensor(5.0), torch.tensor(1.0)]
    assert ranges.direct(ranges.ranges[0], rule.state_names(group)) is not None
    with OperationCounter() as counter:
        TorchFusedKernel().update(rule, ranges, GradScaling())
    assert counter.operations == ["aten._fused_sgd_.default"] * 2
    expected = torch.where(
        (torch.arange(NUMEL) < 640) | (torch.arange(NUMEL) >= 1280),
        whole.grad,
        0.9 * whole.state["momentum_buffer"] + (1 - dampening) * whole.grad,
    )
    torch.testing.assert_close(parts.state["momentum_buffer"], expected)


@pytest.mark.parametrize("kernel_name", ["reference", "torch_fused"])
def test_sgd_reads_the_step_on_the_cpu_when_the_host_was_not_told(kernel_name: str) -> None:
    rule, group = RULES["sgd"], make_group("sgd", {"momentum": 0.9, "dampening": 0.5})
    for count in (1, 2):
        told = problem_for(rule, group, count)
        untold = told.clone()
        kernel = make_kernel(kernel_name, allocate)
        kernel.update(rule, cut(told, [0, NUMEL], group), GradScaling())
        ranges = cut(untold, [0, NUMEL], group, first=None)
        ranges.ranges[0].first = [None]
        kernel.update(rule, ranges, GradScaling())
        assert same_bits(told.results(), untold.results())


@FUSED_CASES
def test_torch_fused_makes_one_call(name: str, options: Options) -> None:
    rule, group = RULES[name], make_group(name, options)
    problem = problem_for(rule, group, 2)
    ranges = cut(problem, random_cuts(7), group)
    scaling = GradScaling(num_ranks=torch.tensor(3.0))
    assert ranges.direct(ranges.ranges[0], rule.state_names(group)) is not None
    with OperationCounter() as counter:
        TorchFusedKernel().update(rule, ranges, scaling)
    assert len(counter.operations) == 1
    assert "_fused_" in counter.operations[0]


@pytest.mark.parametrize("kernel_name", ["reference", "torch_fused"])
def test_no_ranges_and_empty_ranges_are_updates_of_nothing(kernel_name: str) -> None:
    kernel = make_kernel(kernel_name, allocate)
    for name in FUSED_RULES:
        rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
        problem = problem_for(rule, group, 2)
        kernel.update(rule, cut(problem, [0], group), GradScaling(num_ranks=torch.tensor(2.0)))
        kernel.update(rule, cut(problem, [64, 64], group), GradScaling(num_ranks=torch.tensor(2.0)))


@pytest.mark.parametrize("factors", SCALINGS.values(), ids=SCALINGS.keys())
@EVERY_KERNEL_AND_RULE
def test_steady_state_allocates_nothing(kernel_name: str, name: str, factors: list[tuple[str, float]]) -> None:
    rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
    ranges = cut(problem_for(rule, group, 2), random_cuts(8), group)
    scaling = make_scaling(factors, torch.float32)
    scaling.found_inf = torch.zeros(1)
    kernel = make_kernel(kernel_name, allocate)
    kernel.update(rule, ranges, scaling)
    with OperationCounter() as counter:
        kernel.update(rule, ranges, scaling)
    assert counter.operations
    assert counter.allocating == []


def meta_ranges(rule: Rule, group: Options) -> ShardUpdate:
    problem = Problem(
        weight=torch.empty(192, device="meta"),
        grad=torch.empty(192, device="meta"),
        state={key: torch.empty(192, device="meta") for key in rule.state_names(group)},
        count=2,
    )
    update = cut(problem, [0, 64, 192], group)
    update.ranges[0].first = [None, None]
    return update


@pytest.mark.parametrize(
    "lr", [1e-3, torch.tensor(1e-3), torch.tensor(1e-3, device="meta")], ids=["float", "cpu", "meta"]
)
@EVERY_CASE
def test_selected_kernel_runs_on_meta_without_a_host_sync(name: str, options: Options, lr: float | Tensor) -> None:
    rule, group = RULES[name], make_group(name, options)
    group["lr"] = lr
    choice = select(rule, group, torch.float32, "meta")
    scalar = torch.empty((), device="meta")
    scaling = GradScaling(num_ranks=scalar, multipliers=[scalar, scalar], loss_scale=scalar, found_inf=scalar)
    # A read of a meta tensor raises; the CPU lr may be read.
    make_kernel(choice.name, allocate).update(rule, meta_ranges(rule, group), scaling)
    # Without multipliers torch_fused hands the divisor to the operation.
    scaling = GradScaling(num_ranks=scalar)
    make_kernel(choice.name, allocate).update(rule, meta_ranges(rule, group), scaling)


def test_reference_brings_a_cpu_divisor_to_the_device() -> None:
    rule, group = RULES["sgd"], make_group("sgd", {})
    with OperationCounter() as counter:
        ranges = meta_ranges(rule, group)
        ReferenceKernel(allocate).update(rule, ranges, GradScaling(num_ranks=torch.tensor(3.0)))
    assert "aten.fill_.Scalar" in counter.operations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "expected 2 steps but got 0"),
        ({"sources": [torch.empty(128, device="meta")]}, r"grad: expected .* shape \(192,\) .* got \(128,\)"),
        ({"spans": [(0, 64), (64, 129)]}, r"multiple of 64 but got \[64, 129\)"),
        ({"states": {}}, "are missing"),
        ({"steps": [torch.empty((), device="meta", dtype=torch.float64)] * 2}, "torch.float32 .* got .*torch.float64"),
        ({"sources": [torch.empty(192)]}, "on meta but got .* on cpu"),
    ],
    ids=["missing-steps", "grad-shape", "odd-numel", "missing-states", "step-dtype", "device"],
)
@pytest.mark.parametrize("kernel_name", ["reference", "torch_fused"])
def test_meta_refuses_ranges_that_do_not_belong_together(kernel_name: str, change: Options, message: str) -> None:
    rule, group = RULES["adamw"], make_group("adamw", {})
    ranges = meta_ranges(rule, group)
    for field, value in change.items():
        setattr(ranges.ranges[0] if field in ("steps", "spans") else ranges, field, value)
    with pytest.raises(UsageError, match=message):
        make_kernel(kernel_name, allocate).update(rule, ranges, GradScaling())


def test_torch_fused_refuses_what_torch_does_not_fuse() -> None:
    rule, group = RULES["rmsprop"], make_group("rmsprop", {})
    with pytest.raises(UsageError, match="rmsprop, which torch does not fuse; use the reference kernel"):
        TorchFusedKernel().update(rule, meta_ranges(rule, group), GradScaling())
    rule, group = RULES["sgd"], make_group("sgd", {"momentum": 0.9, "dampening": 0.1})
    with pytest.raises(UsageError, match="expected dampening 0 where only meta knows"):
        TorchFusedKernel().update(rule, meta_ranges(rule, group), GradScaling())


@pytest.fixture
def without_faster_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Triton or the compiled kernel would be chosen is tested in test_triton_engine.py and test_native.py."""
    for name in ("triton_obstacle", "compiled_obstacle"):
        monkeypatch.setattr(sys.modules["distadam.kernels.select"], name, lambda *_: "it is not asked here")


@pytest.mark.usefixtures("without_faster_ones")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("name", RULES)
def test_select_prefers_torch_fused(name: str, device_type: str, dtype: torch.dtype) -> None:
    choice = select(RULES[name], make_group(name, {}), dtype, device_type)
    obstacles = {
        "cpu": "not compiled: it is not asked here",
        "cuda": "not triton: it is not asked here",
        "meta": None,
    }
    obstacle = obstacles[device_type]
    if name == "rmsprop":
        assert choice == Choice(name="reference", reason="torch has no fused RMSprop", obstacle=obstacle)
    else:
        reason = f"torch fuses {name} on {device_type}"
        assert choice == Choice(name="torch_fused", reason=reason, obstacle=obstacle)


META = torch.empty((), device="meta")


@pytest.mark.usefixtures("without_faster_ones")
@pytest.mark.parametrize(
    ("name", "change", "dtype", "device_type", "reason"),
    [
        ("adam", {}, torch.bfloat16, "cpu", "not torch.bfloat16"),
        ("adam", {}, torch.float32, "xpu", "not checked on xpu"),
        ("adam", {"betas": (META, META)}, torch.float32, "cuda", "betas"),
        ("sgd", {"weight_decay": META}, torch.float32, "cuda", "weight_decay"),
        ("sgd", {"momentum": 0.9, "dampening": 0.1}, torch.float32, "cuda", "dampening"),
    ],
)
def test_select_falls_back_to_reference(
    name: str, change: Options, dtype: torch.dtype, device_type: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {**make_group(name, {}), **change}
    choice = select(RULES[name], group, dtype, device_type)
    assert choice.name == "reference"
    assert reason in choice.reason
    monkeypatch.setenv("DISTADAM_KERNEL", "torch_fused")
    with pytest.raises(ConfigError, match=f"DISTADAM_KERNEL=torch_fused: .*{reason}"):
        select(RULES[name], group, dtype, device_type)


@pytest.mark.usefixtures("without_faster_ones")
def test_select_keeps_dampening_fused_where_it_is_safe() -> None:
    group = make_group("sgd", {"momentum": 0.9, "dampening": 0.1})
    assert select(RULES["sgd"], group, torch.float32, "cpu").name == "torch_fused"
    group = make_group("sgd", {"dampening": 0.1})
    assert select(RULES["sgd"], group, torch.float32, "cuda").name == "torch_fused"


@pytest.mark.parametrize("forced", ["reference", "torch_fused"])
def test_select_obeys_the_environment(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTADAM_KERNEL", forced)
    choice = select(RULES["adam"], make_group("adam", {}), torch.float32, "cpu")
    assert choice == Choice(name=forced, reason=f"DISTADAM_KERNEL={forced}")


@pytest.mark.parametrize("forced", ["fast", ""])
def test_select_refuses_an_unknown_kernel(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTADAM_KERNEL", forced)
    with pytest.raises(
        ConfigError, match=f"expected one of reference, torch_fused, compiled, triton but got '{forced}'"
    ):
        select(RULES["adam"], make_group("adam", {}), torch.float32, "cpu")


def test_make_kernel_makes_what_was_chosen() -> None:
    kernels: list[Kernel] = [make_kernel(name, allocate) for name in ("reference", "torch_fused")]
    assert [kernel.name for kernel in kernels] == ["reference", "torch_fused"]
    with pytest.raises(ConfigError, match="expected one of reference, torch_fused, compiled, triton but got 'fast'"):
        make_kernel("fast", allocate)
