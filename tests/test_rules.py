"""The update rules: numerics, bits, special values, and no allocation; every test runs on every rule of `RULES`.

Tolerances. One step from the same state lies within contract 2.3.1's bound, |error| <= 4 eps S, of an oracle in
extended precision, weights of 0 included, where S is the update alone (measured: at most 3.0, and 3.3 for torch). It
lies within the same bound of torch.optim where the weight is at least as large as its update (measured: at most 3.4);
for smaller weights the errors of both implementations add, and the sum of the two bounds is all that can be promised.
Everything else is bits: however a range is cut, however many threads run, and whatever is skipped.

The arithmetic that runs where the step count may not be read is the same code on 0-D tensors: it runs here on CPU
tensors by pretending that the host cannot read them, and on the meta device, where a host sync raises.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distadam.rules import RULES, Adam, Scratch
from distadam.rules.rule import add_quotient_, add_scaled_, ewa_of_square_, sqrt_into
from tests.reference_optimizers import (
    FUSED_RULES,
    OPTIONS,
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
    torch_step,
    worst_difference,
    worst_error,
)

BOUND = 4.0
COUNTS = (1, 2, 10, 1000)
EVERY_CASE = pytest.mark.parametrize(("name", "options"), cases(), ids=case_id)
EVERY_RULE = pytest.mark.parametrize("name", RULES)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def new_scratch() -> Scratch:
    return Scratch(lambda numel, dtype, device: torch.full((numel,), 7, dtype=dtype, device=device))


def run(
    name: str, group: Options, problem: Problem, *, scratch: Scratch | None = None, skip: bool | None = None
) -> None:
    device = problem.weight.device
    RULES[name].update(
        problem.weight,
        problem.grad,
        problem.state,
        torch.tensor(float(problem.count), device=device),
        group,
        scratch or new_scratch(),
        None if skip is None else torch.tensor(skip, device=device),
    )


def busiest_options(name: str) -> Options:
    """The combination with the most switched on."""
    return max(OPTIONS[name], key=lambda options: sum(bool(value) for value in options.values()))


def problem_for(name: str, group: Options, count: int, **arguments: Any) -> Problem:
    return make_problem(RULES[name].state_names(group), count, **arguments)


@pytest.fixture
def host_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distadam.rules.scalars.on_host", lambda tensor: False)


def test_tables_cover_every_rule() -> None:
    assert set(RULES) == set(OPTIONS) == set(ORACLES) == set(TORCH_OPTIMIZERS)
    assert all(RULES[name].name == name for name in RULES)


@EVERY_CASE
def test_state_names_equal_torch(name: str, options: Options) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = TORCH_OPTIMIZERS[name]([parameter], **options)
    optimizer.step()
    names = tuple(optimizer.state[parameter])
    rule, group = RULES[name], make_group(name, options)
    assert (("step",) if rule.has_step else ()) + rule.state_names(group) == names


@BOTH_DTYPES
@EVERY_CASE
def test_step_is_within_the_contracts_bound(name: str, options: Options, dtype: torch.dtype) -> None:
    if torch.finfo(dtype).eps <= 4 * torch.finfo(torch.float64).eps and math.isclose(_longdouble_eps(), 2**-52):
        pytest.skip("this platform's long double is a double: no oracle for fp64")
    group = make_group(name, options)
    implementations = [{"foreach": False}, {"fused": True}] if name in FUSED_RULES else [{"foreach": False}]
    for count in COUNTS:
        before = problem_for(name, group, count, dtype=dtype)
        exact = ORACLES[name](group, before)
        ours = before.clone()
        run(name, group, ours)
        assert worst_error(ours, exact) <= BOUND
        for implementation in implementations:
            theirs = before.clone()
            torch_step(name, group, theirs, **implementation)
            assert worst_difference(ours, theirs, before, exact) <= BOUND


def _longdouble_eps() -> float:
    import numpy as np

    return float(np.finfo(np.longdouble).eps)


@pytest.mark.parametrize(
    ("name", "options", "mutation"),
    [
        ("adam", {}, {"betas": (0.9001, 0.999)}),
        ("adamw", {}, {"betas": (0.9, 0.9991)}),
        ("adamw", {"weight_decay": 0.01}, {"weight_decay": 0.011}),
        ("sgd", {"momentum": 0.9}, {"momentum": 0.9001}),
        ("sgd", {}, {"lr": 1.0001e-3}),
        ("rmsprop", {}, {"alpha": 0.9901}),
        ("rmsprop", {"centered": True}, {"alpha": 0.9901}),
    ],
    ids=case_id,
)
def test_bound_fails_when_a_hyper_parameter_is_a_little_off(name: str, options: Options, mutation: Options) -> None:
    group = make_group(name, options)
    before = problem_for(name, group, 10)
    exact = ORACLES[name](group, before)
    run(name, {**group, **mutation}, before)
    assert worst_error(before, exact) > BOUND


@BOTH_DTYPES
@EVERY_CASE
def test_bits_do_not_depend_on_the_cut(name: str, options: Options, dtype: torch.dtype) -> None:
    # Cuts of any length, not only at multiples of 64: rules promise more than kernels need.
    group = make_group(name, options)
    before = problem_for(name, group, 3, dtype=dtype, numel=1024)
    whole, pieces = before.clone(), before.clone()
    run(name, group, whole)
    cuts = [0, *sorted(random.Random(1).sample(range(1, 1024), 9)), 1024]
    scratch = new_scratch()
    for start, end in pairwise(cuts):
        piece = Problem(
            weight=pieces.weight[start:end],
            grad=pieces.grad[start:end],
            state={key: tensor[start:end] for key, tensor in pieces.state.items()},
            count=pieces.count,
        )
        run(name, group, piece, scratch=scratch)
    assert same_bits(whole.results(), pieces.results())


@EVERY_RULE
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    group = make_group(name, busiest_options(name))
    before = problem_for(name, group, 3, numel=3 * 32768 + 17)  # torch gives a thread 32768 elements at least
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        problem = before.clone()
        run(name, group, problem)
        results.append(problem.results())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
@EVERY_CASE
def test_skip_keeps_every_bit(name: str, options: Options, device_path: bool, request: pytest.FixtureRequest) -> None:
    if device_path:
        request.getfixturevalue("host_cannot_read")
    group = make_group(name, options)
    before = problem_for(name, group, 2, numel=128)
    before.weight[:3] = torch.tensor([-0.0, math.inf, math.nan])
    before.grad[::5] = math.nan
    skipped, updated, plain = before.clone(), before.clone(), before.clone()
    # A skipped step is not counted, so the first one comes with count 0.
    skipped.count = 0
    run(name, group, skipped, skip=True)
    assert same_bits(skipped.results(), before.results())
    run(name, group, updated, skip=False)
    run(name, group, plain)
    assert same_bits(updated.results(), plain.results())
    assert not same_bits(updated.results(), before.results())


@pytest.mark.usefixtures("host_cannot_read")
@EVERY_CASE
def test_device_arithmetic_is_within_the_contracts_bound(name: str, options: Options) -> None:
    group = make_group(name, options)
    for count in COUNTS:
        before = problem_for(name, group, count)
        exact = ORACLES[name](group, before)
        run(name, group, before)
        assert worst_error(before, exact) <= BOUND


@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
@EVERY_RULE
def test_tensor_hyper_parameters_equal_numbers(name: str, device_path: bool, request: pytest.FixtureRequest) -> None:
    if device_path:
        request.getfixturevalue("host_cannot_read")
    # Values that fp32 holds exactly: the tensor and the number are then the same hyper-parameter.
    numbers: Options = {"lr": 2**-8, "weight_decay": 2**-5}
    tensors: Options = {"lr": torch.tensor([2**-8]), "weight_decay": torch.tensor(2**-5)}
    if name in ("adam", "adamw"):
        numbers["betas"] = (0.875, 0.9921875)
        tensors["betas"] = (torch.tensor(0.875), torch.tensor(0.9921875))
    group = make_group(name, busiest_options(name))
    by_number = problem_for(name, group, 7)
    by_tensor = by_number.clone()
    run(name, {**group, **numbers}, by_number)
    run(name, {**group, **tensors}, by_tensor)
    assert same_bits(by_number.results(), by_tensor.results())


def lerps_from_the_gradient(group: Options) -> bool:
    """Whether torch's lerp takes its other form, which loses signs of zeros and turns an infinite gradient into NaN."""
    return any(float(beta) <= 0.5 for beta in group.get("betas", ())) or group.get("alpha", 1.0) <= 0.5


@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("count", [1, 2])
@EVERY_CASE
def test_special_gradients_end_as_in_torch(
    name: str, options: Options, count: int, device_path: bool, request: pytest.FixtureRequest
) -> None:
    if device_path:
        request.getfixturevalue("host_cannot_read")
    group = make_group(name, options)
    # NaN, infinities, both zeros, denormals, and values whose square overflows or vanishes.
    special = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, -1e-45, 1e-30, 2e19, 1.0]
    if not group.get("centered"):
        # Centered, the square of such a gradient's mean overflows; torch's fused multiply-add never forms it.
        special += [3e38, -3e38]
    ours = problem_for(name, group, count, numel=64 * len(special))
    ours.grad = torch.tensor(special).repeat(64)
    theirs = ours.clone()
    run(name, group, ours)
    torch_step(name, group, theirs, foreach=False)
    for key, tensor in ours.results().items():
        other = theirs.results()[key]
        if key == "exp_avg" and lerps_from_the_gradient(group):
            tensor, other = (t.masked_fill(~t.isfinite(), math.nan) for t in (tensor, other))
        assert torch.equal(tensor.sign().nan_to_num(9), other.sign().nan_to_num(9)), key
        # Near the smallest number a rounding is absolute: a few denormals.
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-7 if key == "weight" else 1e-44, equal_nan=True)


@EVERY_CASE
def test_negative_zero_gradient_keeps_torchs_signs_at_the_first_step(name: str, options: Options) -> None:
    group = make_group(name, options)
    if lerps_from_the_gradient(group):
        pytest.skip("torch's other form of lerp keeps the sign of a zero gradient where a sum of products does not")
    state = {key: torch.zeros(64) for key in RULES[name].state_names(group)}
    ours = Problem(weight=torch.zeros(64), grad=torch.full((64,), -0.0), state=state, count=1)
    theirs = ours.clone()
    run(name, group, ours)
    torch_step(name, group, theirs, foreach=False)
    for key, tensor in ours.results().items():
        assert torch.equal(tensor.signbit(), theirs.results()[key].signbit()), key


@pytest.mark.parametrize("skip", [None, False], ids=["no-skip", "skip"])
@pytest.mark.parametrize("device_path", [False, True], ids=["host", "device"])
@EVERY_CASE
def test_steady_state_allocates_nothing(
    name: str, options: Options, skip: bool | None, device_path: bool, request: pytest.FixtureRequest
) -> None:
    if device_path:
        request.getfixturevalue("host_cannot_read")
    group = make_group(name, options)
    problem = problem_for(name, group, 2, numel=128)
    step, flag, scratch = torch.tensor(2.0), None if skip is None else torch.tensor(skip), new_scratch()
    arguments = (problem.weight, problem.grad, problem.state, step, group, scratch, flag)
    rule = RULES[name]
    with OperationCounter() as first:
        rule.update(*arguments)
    held = scratch.nbytes
    with OperationCounter() as second:
        rule.update(*arguments)
    assert first.allocating
    assert set(first.allocating) == {"aten.full.default"}
    assert second.operations
    assert second.allocating == []
    assert scratch.nbytes == held


def test_counter_sees_an_allocation() -> None:
    x = torch.ones(4)
    with OperationCounter() as counter:
        x.view(2, 2).mul_(2)
        torch.mul(x, x)
    assert counter.allocating == ["aten.mul.Tensor"]


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@EVERY_CASE
def test_runs_on_meta_without_a_host_sync(name: str, options: Options, tensors: bool) -> None:
    group = make_group(name, options)
    if tensors:
        group["lr"] = torch.tensor(1e-3, device="meta")
        group["weight_decay"] = torch.tensor(1e-3, device="meta")
        if "betas" in group:
            group["betas"] = (torch.tensor(0.9, device="meta"), torch.tensor(0.99, device="meta"))
    elsewhere = {key: torch.empty(128, device="meta") for key in RULES[name].state_names(group)}
    step, skip = torch.empty((), device="meta"), torch.empty((), dtype=torch.bool, device="meta")
    with OperationCounter() as counter:
        RULES[name].update(
            torch.empty(128, device="meta"),
            torch.empty(128, device="meta"),
            elsewhere,
            step,
            group,
            new_scratch(),
            skip,
        )
    assert not any("_local_scalar_dense" in operation for operation in counter.operations)


def test_adam_decouples_weight_decay_when_the_group_says_so() -> None:
    adam, adamw = RULES["adam"], RULES["adamw"]
    assert isinstance(adam, Adam)
    assert isinstance(adamw, Adam)
    assert not adam.decouples_weight_decay({})
    assert adam.decouples_weight_decay({"decoupled_weight_decay": True})
    assert adamw.decouples_weight_decay({})


@BOTH_DTYPES
def test_square_root_is_within_three_roundings(dtype: torch.dtype) -> None:
    x = torch.rand(1 << 16, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 4
    x[:5] = torch.tensor([0.0, 1.0, math.inf, math.nan, torch.finfo(dtype).smallest_normal / 64], dtype=dtype)
    root = torch.empty_like(x)
    sqrt_into(x, out=root)
    exact = torch.sqrt(x.double())
    # Each of sqrt, 1 / x, 1 / x errs by half an eps at most; the fp64 oracle by a little itself.
    torch.testing.assert_close(
        root.double(), exact, rtol=1.51 * torch.finfo(dtype).eps + 2**-52, atol=0, equal_nan=True
    )


def _pair(scratch: Scratch, numel: int) -> tuple[Tensor, Tensor]:
    cpu = torch.device("cpu")
    return scratch.get(0, numel, torch.float32, cpu), scratch.get(1, numel, torch.float32, cpu)


def test_scratch_grows_and_keeps_its_memory() -> None:
    made: list[int] = []

    def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(numel)
        return torch.empty(numel, dtype=dtype, device=device)

    scratch = Scratch(allocate)
    a, b = _pair(scratch, 64)
    assert a.data_ptr() != b.data_ptr()
    shorter, _ = _pair(scratch, 32)
    assert shorter.shape == (32,)
    assert shorter.data_ptr() == a.data_ptr()
    longer, _ = _pair(scratch, 128)
    assert longer.shape == (128,)
    again, _ = _pair(scratch, 128)
    assert again.data_ptr() == longer.data_ptr()
    scalar = scratch.scalar(0, torch.float64, torch.device("cpu"))
    assert scalar.shape == ()
    assert scratch.scalar(0, torch.float64, torch.device("cpu")) is scalar
    assert made == [64, 64, 128, 128, 1]
    assert scratch.nbytes == 2 * 128 * 4 + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 7, 64, 1000, 70_001])
def test_passes_that_are_saved_round_as_separate_operations(dtype: torch.dtype, numel: int) -> None:
    """See [Note: one rounding per operation]: a fused multiply-add would differ in one of some hundred elements."""
    draw = torch.Generator().manual_seed(numel)
    total, x, y = (torch.randn(numel, dtype=dtype, generator=draw) for _ in range(3))
    denominator, term = y.abs().add_(0.1), torch.empty(numel, dtype=dtype)
    gain = 0.1234567

    scaled = total.clone()
    add_scaled_(scaled, x, gain, term)
    assert torch.equal(scaled, total + x * gain)
    quotient = total.clone()
    add_quotient_(quotient, x, gain, denominator, term)
    assert torch.equal(quotient, total + x * gain / denominator)
    average = total.clone()
    ewa_of_square_(average, x, 0.9, gain, term)
    assert torch.equal(average, total * 0.9 + x * gain * x)


def test_fused_multiply_add_would_be_seen() -> None:
    draw = torch.Generator().manual_seed(0)
    total, x, y = (torch.randn(70_001, generator=draw) for _ in range(3))
    fused = (total.double() + x.double() * y.double()).float()
    assert not torch.equal(fused, total + x * y)
