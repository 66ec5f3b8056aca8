"""What sharded training is compared with bit by bit, and a model to train that has every awkward shape.

The oracle needs no ranks: torch.optim on plain tensors that are given the averaged gradients.

Tests draw every rank's gradients from seeds, so that each rank, or the parent process, can average them by itself:
`average` is the contract's SUM, then one division. `Unsharded` holds each parameter as a flat fp32 (fp64) master in
row-major order of its logical shape, padded to 64 elements: torch's fused CPU kernels then have no scalar tail, and
their bits are those that contract 2.3.1 promises. torch has no fused RMSprop; its loop is within that clause's bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.engine.ledger import Ledger
from tests.averaged_oracle import impatient

KB = 1 / 1024
BUCKET_MB = {"71 bytes": 71 / 2**20, "1 KB": KB, "25 MB": 25.0}

TORCH_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
CLASSES: dict[str, type[distadam.ShardedOptimizer]] = {
    "adam": distadam.Adam,
    "adamw": distadam.AdamW,
    "sgd": distadam.SGD,
    "rmsprop": distadam.RMSprop,
}

State = dict[int, dict[str, Tensor]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def integers(shape: Sequence[int], dtype: torch.dtype, *seeds: int, largest: int = 8) -> Tensor:
    """Integers of at most ``largest``; other ones for other seeds."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % 2**31
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).to(dtype)


def average(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Sum the ranks' gradients in the compute dtype and divide once; None where no rank has one."""
    present = [grad for grad in grads if grad is not None]
    if not present:
        return None
    total = torch.zeros(present[0].shape, dtype=compute_dtype(present[0].dtype))
    for grad in present:
        total += grad
    return total / len(grads)


class Unsharded:
    """torch.optim on padded flat masters.

    Args:
        rule: "adam", "adamw", "sgd" or "rmsprop".
        values: the parameters' values; dtypes and shapes are kept.
        groups: (indices of parameters, options) of each parameter group.
    """

    def __init__(self, rule: str, values: Sequence[Tensor], groups: Sequence[tuple[Sequence[int], dict[str, Any]]]):
        self.values = [value.detach().clone() for value in values]
        self.masters = [nn.Parameter(self._flat(value)) for value in values]
        self.order = [index for indices, _ in groups for index in indices]
        implementation = {"foreach": False} if rule == "rmsprop" else {"fused": True}
        # One optimizer a parameter: torch's fused SGD fails where some parameters of a group have a momentum buffer
        # and others do not yet.
        self.optimizers = {
            index: TORCH_CLASSES[rule]([self.masters[index]], **options, **implementation)
            for indices, options in groups
            for index in indices
        }

    @staticmethod
    def _flat(value: Tensor) -> Tensor:
        flat = torch.zeros(max(64, -(-value.numel() // 64) * 64), dtype=compute_dtype(value.dtype))
        flat[: value.numel()] = value.detach().reshape(-1)
        return flat

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Update with averaged gradients; None is no gradient."""
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = None if grad is None else self._flat(grad)
        for optimizer in self.optimizers.values():
            optimizer.step()
        with torch.no_grad():
            for value, master, grad in zip(self.values, self.masters, grads, strict=True):
                if grad is not None:
                    value.copy_(master[: value.numel()].view(value.shape))

    def state(self) -> State:
        """torch's state by parameter number (in the order of the groups), in the parameters' shapes."""
        result: State = {}
        for number, index in enumerate(self.order):
            entry = {
                key: value
                for key, value in self.optimizers[index].state[self.masters[index]].items()
                if value is not None
            }
            value = self.values[index]
            if entry:
                result[number] = {
                    key: kept if kept.dim() == 0 else kept.detach()[: value.numel()].view(value.shape)
                    for key, kept in entry.items()
                }
        return result


def difference(what: str, actual: Tensor, expected: Tensor) -> list[str]:
    """Return in words how two tensors differ, NaN being equal to NaN; empty if they do not."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return [f"{what}: {actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"]
    try:
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        return [f"{what}: {' '.join(str(error).split())}"]
    return []


def differences(
    where: str,
    params: Sequence[Tensor],
    state: Mapping[int, Mapping[str, Tensor]],
    values: Sequence[Tensor],
    kept: State,
) -> list[str]:
    """Return in words how parameters and full state differ from what they should be."""
    found = []
    for index, (param, value) in enumerate(zip(params, values, strict=True)):
        found += difference(f"{where}: parameter {index}", param, value)
    found += state_differences(where, state, kept)
    return found


def state_differences(where: str, state: Mapping[int, Mapping[str, Tensor]], kept: State) -> list[str]:
    """Return in words how a full state differs from what it should be."""
    names = {number: sorted(entry) for number, entry in state.items()}
    expected_names = {number: sorted(entry) for number, entry in kept.items()}
    if names != expected_names:
        return [f"{where}: state has {names} instead of {expected_names}"]
    return [
        line
        for number, entry in kept.items()
        for name, value in entry.items()
        for line in difference(f"{where}: {name} of parameter {number}", state[number][name], value)
    ]


NUM_STEPS = 4

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adam": [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}, {"lr": 0.1, "maximize": True}],
    "adamw": [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True}, {"lr": 0.1, "maximize": True}],
    "sgd": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "rmsprop": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "maximize": True},
    ],
}

# Shapes and memory formats: odd, aligned, 0-d, empty, channels last, transposed, larger than a small bucket, with gaps.
SHAPES = [(5, 7), (64,), (), (0,), (2, 3, 4, 4), (6, 50), (257,), (9,)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill everything that optimizers allocate with NaN (integers with 1)."""
    empty = Ledger.empty

    def poison(self: Ledger, kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(self, kind, numel, dtype, device).fill_(math.nan if dtype.is_floating_point else 1)

    Ledger.empty = poison  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ledger.empty = empty  # type: ignore[method-assign]


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    values[4] = values[4].to(memory_format=torch.channels_last)
    values[5] = values[5].t().contiguous().t()
    values[7] = torch.zeros(2 * values[7].numel(), dtype=dtype)[::2].copy_(values[7])
    return [nn.Parameter(value) for value in values]


def grads_of(params: Sequence[Tensor], step: int, rank: int, num_ranks: int) -> list[Tensor | None]:
    """One rank's gradients: now and then the first parameter has one on one rank only, and the last on none."""
    grads: list[Tensor | None] = [integers(p.shape, p.dtype, step, rank, i) for i, p in enumerate(params)]
    if step % 2 and rank != step % num_ranks:
        grads[0] = None
    if step == 2:
        grads[-1] = None
    return grads


def backward(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    terms = [(param * grad).sum().double() for param, grad in zip(params, grads, strict=True) if grad is not None]
    torch.stack(terms).sum().backward()


def split_groups(params: Sequence[Tensor], split: str) -> list[list[int]]:
    everything = list(range(len(params)))
    if split == "one":
        return [everything]
    if split == "alternating":
        return [everything[::2], everything[1::2]]
    return [[index] for index in everything]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to train with: ``OPTIONS[rule][variant]``, a stage, a bucket size, a split of the parameters into groups."""

    rule: str
    variant: int
    stage: int = 2
    bucket: str = "1 KB"
    split: str = "one"
    dtype: torch.dtype = torch.float32
    policies: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return OPTIONS[self.rule][self.variant]

    def build(self, params: Sequence[Tensor], **shard: Any) -> tuple[distadam.ShardedOptimizer, list[int]]:
        """Return an optimizer and the parameters' indices in the order of its groups."""
        indices = split_groups(params, self.split)
        policies = {
            "shard": ShardPolicy(stage=self.stage, **shard),  # type: ignore[arg-type]
            "comm": CommPolicy(bucket_mb=BUCKET_MB[self.bucket]),
        }
        groups = [{"params": [params[i] for i in chosen]} for chosen in indices]
        optimizer = CLASSES[self.rule](groups, **self.options, **(policies | self.policies))
        return optimizer, [index for chosen in indices for index in chosen]


def by_param(optimizer: distadam.ShardedOptimizer, order: Sequence[int]) -> State:
    return {order[number]: entry for number, entry in optimizer.full_state_dict(to=None)["state"].items()}


Expected = tuple[list[Tensor], State]


@cache
def expected_result(rule: str, variant: int, num_ranks: int, dtype: torch.dtype = torch.float32) -> Expected:
    """Train in this process, without a group, on averages over ``num_ranks``."""
    params = make_params(dtype)
    averages = [
        [
            average(grads)
            for grads in zip(*(grads_of(params, step, rank, num_ranks) for rank in range(num_ranks)), strict=True)
        ]
        for step in range(NUM_STEPS)
    ]
    if rule != "rmsprop":
        oracle = Unsharded(rule, params, [(range(len(params)), OPTIONS[rule][variant])])
        for grads in averages:
            oracle.step(grads)
        return oracle.values, oracle.state()
    optimizer, order = Case(rule=rule, variant=variant, bucket="25 MB").build(params)
    for grads in averages:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in params], by_param(optimizer, order)


@impatient
def train(
    rank: int, num_ranks: int, cases: Sequence[Case], expected: Mapping[tuple[str, int], Expected], **shard: Any
) -> list[str]:
    """Train each case as rank ``rank`` in poisoned memory; return in words what differs from ``expected``."""
    found: list[str] = []
    with poisoned():
        for case in cases:
            params = make_params(case.dtype)
            optimizer, order = case.build(params, **shard)
            for step in range(NUM_STEPS):
                backward(params, grads_of(params, step, rank, num_ranks))
                optimizer.step()
            assert optimizer.grad_norm is not None  # waits for it: an optimizer that dies meanwhile takes 50 ms
            values, state = expected[case.rule, case.variant]
            found += differences(f"rank {rank}, {case}", params, by_param(optimizer, order), values, state)
    return found
