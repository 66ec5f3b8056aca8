"""Triton's storages against those of `distadam.precision`: the same bits in memory, tolerance none.

One update from the same memory by the reference kernel (with the IEEE root that Triton has), which loads and stores by
the classes of `precision`, and by Triton in one launch. Compared are codes, scales, remainders and parameters.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distadam.kernels import GradScaling, GroupRanges, Kernel, ReferenceKernel, ShardUpdate
from distadam.precision import (
    BlockwiseMoment,
    MasterWeights,
    Moment,
    Run,
    SplitWeights,
    StochasticWeights,
    StorageChoice,
    Weights,
    make_moment,
    make_weights,
    start_of,
)
from distadam.precision.rounding import split_
from distadam.rules import RULES, Rule
from tests.reference_optimizers import Options, make_group, make_problem

pytest.importorskip("triton", reason="triton is not installed (pip install 'distadam[triton]')")

from distadam.kernels.triton_kernel import TritonKernel
from tests.test_triton import DEVICE, OPTIONS_TO_RUN, allocate, ieee_sqrt, quiet_numpy, upload  # noqa: F401

pytestmark = [pytest.mark.usefixtures("ieee_sqrt"), pytest.mark.long]
NUMEL = 256 * 9
# Three parameters: one ends in a block that padding fills, one crosses from one segment of random bits into the next.
RUNS = [
    Run(start=0, end=512, first_id=start_of("a") + 256),
    Run(start=512, end=1280, first_id=start_of("b")),
    Run(start=1280, end=NUMEL, first_id=start_of("c") + 65_536 - 512),
]
COUNTS = [3.0, 1.0, 70_000.0]
WEIGHTS = ["own", "fp32", "split", "stochastic", "none"]
MOMENTS = ["fp32", "bf16", "8bit"]


class Shard:
    """A shard's storages, filled with the same numbers each time."""

    def __init__(self, rule: Rule, group: Options, weights: str, moments: str, device: torch.device) -> None:
        self.choice = StorageChoice(weights=weights, moments=moments)  # type: ignore[arg-type]
        problem = make_problem(rule.state_names(group), 3, numel=NUMEL)
        dtype = torch.float32 if weights == "own" else torch.bfloat16
        self.param = problem.weight.to(dtype).to(device)
        self.grad = problem.grad.to(torch.bfloat16).to(device)
        make = (self.param, RUNS, 7, ledger)
        self.weights: Weights = make_weights(self.choice, *make)
        if isinstance(self.weights, MasterWeights):
            self.weights.master.copy_(problem.weight)
        if isinstance(self.weights, SplitWeights):
            split_(problem.weight.clone().to(device), self.param, self.weights.remainder)
        self.moments: dict[str, Moment] = {}
        for name, values in problem.state.items():
            moment = self.moments[name] = make_moment(self.choice, name, *make)
            moment.write(0, NUMEL, values.to(device))
        self.steps = torch.tensor(COUNTS, device=device)

    def memory(self) -> dict[str, Tensor]:
        """Everything that an update writes, as integers."""
        tensors = {"param": self.param}
        for name, storage in {"weights": self.weights, **self.moments}.items():
            tensors |= {f"{name}{suffix}": stored.tensor for suffix, stored in storage.stored().items()}
        integer = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
        return {name: tensor.cpu().clone().view(integer[tensor.element_size()]) for name, tensor in tensors.items()}

    def run(self, kernel: Kernel, rule: Rule, group: Options, **scaling: Any) -> None:
        """One update of all three parameters."""
        ranges = GroupRanges(
            group=group,
            spans=[(run.start, run.end) for run in RUNS],
            steps=list(self.steps),
            slots=[0, 1, 2],
            first=[None] * 3,
        )
        update = ShardUpdate(
            weights=self.weights,
            states=self.moments,
            sources=[self.grad],
            compute_dtype=torch.float32,
            steps=self.steps,
            ranges=[ranges],
        )
        kernel.update(rule, update, GradScaling(**scaling))

    def reference(self, rule: Rule, group: Options, **scaling: Any) -> None:
        self.run(ReferenceKernel(allocate), rule, group, **scaling)

    def triton(self, rule: Rule, group: Options, **scaling: Any) -> None:
        self.run(TritonKernel(upload), rule, group, **scaling)


def ledger(kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(numel, dtype=dtype, device=device)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], ignore: dict[str, Tensor] | None = None) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), (name, (actual[name] != tensor).nonzero()[:5])


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_adamw_writes_the_references_bits(weights: str, moments: str) -> None:
    check("adamw", weights, moments)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_other_rules_write_the_references_bits(name: str, moments: str) -> None:
    check(name, "stochastic" if moments == "8bit" else "split", moments)


def check(name: str, weights: str, moments: str) -> None:
    rule, group = RULES[name], make_group(name, OPTIONS_TO_RUN[name])
    if name == "rmsprop" and moments != "fp32":
        group["centered"] = False
    expected = Shard(rule, group, weights, moments, torch.device("cpu"))
    actual = Shard(rule, group, weights, moments, DEVICE)
    before = actual.memory()
    expected.reference(rule, group)
    actual.triton(rule, group)
    compare(actual.memory(), expected.memory())
    assert all(not torch.equal(before[key], tensor) for key, tensor in actual.memory().items() if "scale" not in key)


@pytest.mark.parametrize(("weights", "moments"), [("split", "8bit"), ("stochastic", "bf16")])
def test_found_inf_keeps_every_bit(weights: str, moments: str) -> None:
    rule, group = RULES["adamw"], make_group("adamw", {})
    shard = Shard(rule, group, weights, moments, DEVICE)
    before = {name: tensor.clone() for name, tensor in shard.memory().items()}
    shard.triton(rule, group, found_inf=torch.ones((), device=DEVICE))
    compare(shard.memory(), before)


BITS = [
    0x7FFFFFFF, 0x7F800001, 0x7FC00000, -0x400000, 0x7F800000, -0x800000, 0x7F7FFFFF, -0x800001, 0x7F7F8000, 0x00000001,
    -0x7FFFFFFF, 0x007FFFFF, 0x00008000, 0, -0x80000000, 0x3F808000, 0x3F807FFF, 0x3F818000,
]  # fmt: skip


@pytest.mark.parametrize("weights", ["fp32", "split", "stochastic", "none"])
def test_special_weights_are_stored_as_the_reference_stores_them(weights: str) -> None:
    """SGD with lr 0 and no decay stores what it loads, or the special value that a master holds."""
    rule, group = RULES["sgd"], make_group("sgd", {"lr": 0.0, "momentum": 0.9})
    values = torch.tensor(BITS, dtype=torch.int32).view(torch.float32)
    results = []
    for device in (torch.device("cpu"), DEVICE):
        shard = Shard(rule, group, weights, "fp32", device)
        special = values.to(device)
        shard.param[: len(BITS)] = special.to(torch.bfloat16)
        if isinstance(shard.weights, MasterWeights):
            shard.weights.master[: len(BITS)] = special
        if isinstance(shard.weights, SplitWeights):
            split_(special.clone(), shard.param[: len(BITS)], shard.weights.remainder[: len(BITS)])
        results.append(shard)
    results[0].reference(rule, group)
    results[1].triton(rule, group)
    compare_but_nan_payloads(results[1], results[0])
    if weights == "stochastic":
        finite = values.abs() <= torch.finfo(torch.bfloat16).max
        assert torch.equal(results[1].param[: len(BITS)].cpu().isnan(), values.isnan())
        assert torch.isfinite(results[1].param[: len(BITS)].cpu()[finite]).all()


def test_weights_beyond_the_largest_bfloat16_stay_finite() -> None:
    """Stochastic rounding would take them to Inf; +-3.3895e38 is the largest bfloat16, float32 goes on a little."""
    rule, group = RULES["sgd"], make_group("sgd", {"lr": 1.0})
    largest = torch.finfo(torch.bfloat16).max
    shards = [Shard(rule, group, "stochastic", "fp32", device) for device in (torch.device("cpu"), DEVICE)]
    for shard in shards:
        shard.param[:128], shard.grad[:128] = largest, -6e35
        shard.param[128:256], shard.grad[128:256] = -largest, 6e35
    shards[0].reference(rule, group)
    shards[1].triton(rule, group)
    compare(shards[1].memory(), shards[0].memory())
    assert torch.equal(shards[1].param[:256].abs().cpu(), torch.full((256,), largest, dtype=torch.bfloat16))


def compare_but_nan_payloads(actual: Shard, expected: Shard) -> None:
    nan = expected.param.isnan()
    assert torch.equal(actual.param.cpu().isnan(), nan)
    assert torch.equal(actual.param.cpu()[~nan], expected.param[~nan])
    for name, tensor in expected.memory().items():
        assert torch.equal(actual.memory()[name][~nan], tensor[~nan]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 0.0, 1e-30, 1e-42])
def test_blocks_of_8_bits_treat_special_gradients_as_the_reference_does(value: float) -> None:
    rule, group = RULES["adamw"], make_group("adamw", {})
    shards = [Shard(rule, group, "split", "8bit", device) for device in (torch.device("cpu"), DEVICE)]
    for shard in shards:
        shard.grad[:256] = value
        shard.grad[300] = value
        for name, moment in shard.moments.items():
            assert isinstance(moment, BlockwiseMoment), name
            moment.write(0, 256, torch.zeros(256, device=shard.grad.device))
    shards[0].reference(rule, group)
    shards[1].triton(rule, group)
    for name, moment in shards[0].moments.items():
        expected, actual = moment.read(0, NUMEL), shards[1].moments[name].read(0, NUMEL).cpu()
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual[~expected.isnan()], expected[~expected.isnan()]), name


def test_random_bits_depend_on_step_and_seed() -> None:
    """The comparison above would hold if both ignored them."""
    rule, group = RULES["sgd"], make_group("sgd", {"lr": 1e-4, "momentum": 0.9})
    memories = []
    for counts in (COUNTS, [4.0, 2.0, 70_001.0]):
        shard = Shard(rule, group, "stochastic", "fp32", DEVICE)
        shard.steps.copy_(torch.tensor(counts))
        shard.triton(rule, group)
        memories.append(shard.memory()["param"].clone())
    assert not torch.equal(*memories)
    assert StochasticWeights.name == "stochastic"
