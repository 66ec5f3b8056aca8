"""The compiled kernel of the CPU: one pass over memory for every rule and storage that computes in float32.

Gradients of all ranks are added up as they are read, their squares summed on the way: neither the sum nor its norm is a
pass of its own. Bits are those of `torch_fused` for Adam, AdamW and SGD, and of `reference` for RMSprop.

[Note: the same bits as torch]
    library.c spells torch's fused operations with the same roundings, fused multiply-adds where torch's vector loops
    have them. Those depend on the processor and on torch's build, so `disagreement` runs both once a process and the
    kernel is not chosen where a bit differs.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distadam import native
from distadam.errors import UsageError
from distadam.kernels.reference import is_skipped
from distadam.kernels.update import GradScaling, GroupRanges, ShardUpdate
from distadam.native.structures import EIGHT_BIT, MAX_MULTIPLIERS, Flag, RuleNumber, State, Update
from distadam.native.structures import Counters as CountersStructure
from distadam.native.structures import Weights as WeightsNumber
from distadam.precision import BlockwiseMoment, Counters, Moment, PlainMoment, StochasticWeights, Weights
from distadam.precision.counters import BLOCK
from distadam.rules import RULES, Adam, RmsProp, Rule, Sgd
from distadam.rules.rule import is_zero

COMPILED = "compiled"

_WEIGHTS = {
    "own": WeightsNumber.OWN,
    "fp32 master": WeightsNumber.MASTER,
    "split": WeightsNumber.SPLIT,
    "stochastic": WeightsNumber.STOCHASTIC,
    "none": WeightsNumber.ROUNDED,
}
_THREAD_NUMEL = 65_536
"""Elements of which a thread of its own is worth its start."""


def compiled_obstacle(rule: Rule, group: Mapping[str, Any], compute_dtype: torch.dtype, device_type: str) -> str | None:
    """Say why the compiled kernel cannot serve the update, or None if it can."""
    if device_type != "cpu":
        return f"the compiled kernel is for the CPU, not {device_type}"
    missing = native.obstacle()
    if missing is not None:
        return missing
    if not isinstance(rule, (Adam, Sgd, RmsProp)):
        return f"the compiled kernel does not know {rule.name}"
    if compute_dtype != torch.float32:
        return f"the compiled kernel computes in float32, not {compute_dtype}"
    if group.get("eps") == 0:
        return "with eps = 0 padding must be kept from becoming 0 / 0"
    return disagreement()


class CompiledKernel:
    """Calls library.c for each range; with more than one torch thread, for parts of it side by side."""

    name = COMPILED

    def __init__(self) -> None:
        self._tables: weakref.WeakKeyDictionary[Counters, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
        self._threads: ThreadPoolExecutor | None = None
        self._sums = torch.empty(0, dtype=torch.float64)

    def tensors(self) -> list[Tensor]:
        """Return the keys of random bits and the threads' sums; see `Kernel.tensors`."""
        return [self._sums, *(table for tables in self._tables.values() for table in tables)]

    def update(self, rule: Rule, update: ShardUpdate, scaling: GradScaling) -> None:
        """Add up, scale the gradients, update and store; see `Kernel.update`.

        Syncs: never.
        """
        skipped = is_skipped(scaling.found_inf)
        if skipped and scaling.squares is None:
            return
        work, sources = _work(update, scaling)
        self._write_weights(work, update.weights)
        for ranges in update.ranges:
            if skipped:
                work.rule, work.num_states = RuleNumber.NONE, 0
            else:
                _write_group(work, rule, ranges.group)
                names = rule.state_names(ranges.group)
                work.num_states = len(names)
                for state, name in zip(work.states, names, strict=False):
                    self._write_state(state, update.states[name])
            for index, (start, end) in enumerate(ranges.spans):
                if not skipped:
                    _write_step(work, rule, ranges, index)
                self._run(work, start, end, scaling.squares)
        del sources

    def _run(self, work: Update, start: int, end: int, squares: Tensor | None) -> None:
        num_threads = min(torch.get_num_threads(), (end - start) // _THREAD_NUMEL)
        if num_threads <= 1:
            native.update(work, start, end)
            return
        if self._threads is None or self._sums.numel() < num_threads:
            self._threads = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="distadam native")
            self._sums = torch.empty(num_threads, dtype=torch.float64)
        size = -(-(end - start) // (num_threads * BLOCK)) * BLOCK
        sums, parts = self._sums.zero_().data_ptr(), []
        for index, begin in enumerate(range(start, end, size)):
            part = Update.from_buffer_copy(work)
            part.squares = sums + 8 * index if squares is not None else None
            parts.append((part, begin, min(begin + size, end)))
        futures = [self._threads.submit(native.update, *part) for part in parts[1:]]
        native.update(*parts[0])
        for future in futures:
            future.result()
        if squares is not None:
            squares.add_(math.fsum(self._sums.tolist()))

    def _write_weights(self, work: Update, weights: Weights) -> None:
        param = weights.param_shard
        work.weights = _WEIGHTS[weights.name]
        work.param, work.param_type = param.data_ptr(), native.type_number(param.dtype)
        for part in weights.stored().values():
            work.extra = part.tensor.data_ptr()
        if isinstance(weights, StochasticWeights):
            self._write_counters(work.counters, weights.counters)

    def _write_state(self, state: State, moment: Moment) -> None:
        if isinstance(moment, PlainMoment):
            state.values, state.type = moment.tensor.data_ptr(), native.type_number(moment.tensor.dtype)
        elif isinstance(moment, BlockwiseMoment):
            state.values, state.scales = moment.codes.data_ptr(), moment.scales.data_ptr()
            state.type, state.levels = EIGHT_BIT, moment.levels
            self._write_counters(state.counters, moment.counters)
        else:
            raise UsageError(
                f"compiled: expected a plain or 8-bit state but got {type(moment).__name__}; use the reference kernel"
            )

    def _write_counters(self, written: CountersStructure, counters: Counters) -> None:
        tables = self._tables.get(counters)
        if tables is None:
            keys, lanes = counters.host_tables()
            tables = self._tables[counters] = (keys.to(torch.int32), lanes.to(torch.int32))  # keys wrap to signed
        written.keys, written.lanes = tables[0].data_ptr(), tables[1].data_ptr()


def _work(update: ShardUpdate, scaling: GradScaling) -> tuple[Update, object]:
    """Return the structure with what all groups have in common, and the array that it points to."""
    work = Update()
    sources = native.addresses(update.sources)
    kind = native.type_number(update.sources[0].dtype)
    if kind is None or len(scaling.multipliers) > MAX_MULTIPLIERS:
        raise UsageError(
            f"compiled: expected a float32, bfloat16 or float16 gradient and at most {MAX_MULTIPLIERS} multipliers but "
            f"got {update.sources[0].dtype} and {len(scaling.multipliers)}"
        )
    work.sources, work.num_sources, work.source_type = ctypes.addressof(sources), len(update.sources), kind
    work.origin = update.start
    work.squares = None if scaling.squares is None else scaling.squares.data_ptr()
    work.num_ranks = 0.0 if scaling.num_ranks is None else float(scaling.num_ranks)
    work.loss_scale = 0.0 if scaling.loss_scale is None else float(scaling.loss_scale)
    work.num_multipliers = len(scaling.multipliers)
    for index, multiplier in enumerate(scaling.multipliers):
        work.multipliers[index] = float(multiplier)
    return work, sources


def _write_group(work: Update, rule: Rule, group: Mapping[str, Any]) -> None:
    """Write what a group's options say, but for what depends on the step."""
    flags = Flag.MAXIMIZE if group["maximize"] else Flag(0)
    if not is_zero(group["weight_decay"]):
        flags |= Flag.DECAYS
    work.lr, work.decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(rule, Adam):
        work.rule = RuleNumber.ADAM
        beta1, beta2 = float(group["betas"][0]), float(group["betas"][1])
        work.gain1, work.beta2, work.gain2, work.eps = 1 - beta1, beta2, 1 - beta2, group["eps"]
        if rule.decouples_weight_decay(group):
            flags |= Flag.DECOUPLED
            work.decay = 1 - float(group["lr"]) * float(group["weight_decay"])
        if group["amsgrad"]:
            flags |= Flag.AMSGRAD
    elif isinstance(rule, Sgd):
        work.rule = RuleNumber.SGD
        work.beta1, work.gain1 = float(group["momentum"]), 1 - float(group["dampening"])
        if group["momentum"] != 0:
            flags |= Flag.MOMENTUM
        if group["nesterov"]:
            flags |= Flag.NESTEROV
    else:
        work.rule = RuleNumber.RMSPROP
        work.beta1, work.beta2, work.gain2 = float(group["momentum"]), float(group["alpha"]), 1 - float(group["alpha"])
        work.eps = float(group["eps"])
        if group["momentum"] > 0:
            flags |= Flag.MOMENTUM
        if group["centered"]:
            flags |= Flag.CENTERED
    work.flags = flags


def _write_step(work: Update, rule: Rule, ranges: GroupRanges, index: int) -> None:
    """Write what depends on how often a range was updated."""
    step, group = float(ranges.steps[index]), ranges.group
    work.step = int(step)
    if isinstance(rule, Adam):
        beta1, beta2 = float(group["betas"][0]), float(group["betas"][1])
        work.lr, work.correction = float(group["lr"]) / (1 - beta1**step), (1 - beta2**step) ** 0.5
    elif isinstance(rule, Sgd):
        is_first = group["momentum"] != 0 and (step == 1.0 if ranges.first[index] is None else ranges.first[index])
        work.flags = work.flags | Flag.FIRST if is_first else work.flags & ~Flag.FIRST


@cache
def disagreement() -> str | None:
    """Run the library and torch's fused operations beside each other; say where a bit differs, or None."""
    for name, group, run in _comparisons():
        rule = RULES[name]
        names = rule.state_names(group)
        generator = torch.Generator().manual_seed(0)
        weight, first, second = (torch.randn(1024, generator=generator) for _ in range(3))
        states = {state: torch.zeros(1024) for state in names}
        theirs, their_states = weight.clone(), {state: torch.zeros(1024) for state in names}
        work, count = Update(), torch.ones(())
        for step, grad in ((1, first), (2, second)):
            count.fill_(step)
            run(theirs, grad.clone(), their_states, count, group)
            _run_plain(work, rule, weight, grad, states, count, group)
        for what, ours, other in (("weights", weight, theirs), *((s, states[s], their_states[s]) for s in names)):
            if not torch.equal(ours.view(torch.int32), other.view(torch.int32)):
                return f"torch's fused {name} rounds {what} differently on this processor"
    return None


def _run_plain(
    work: Update, rule: Rule, weight: Tensor, grad: Tensor, states: Mapping[str, Tensor], step: Tensor, group: Any
) -> None:
    """Update a plain tensor."""
    sources = native.addresses([grad])
    work.sources, work.num_sources, work.param = ctypes.addressof(sources), 1, weight.data_ptr()
    _write_group(work, rule, group)
    work.num_states = len(states)
    for state, tensor in zip(work.states, states.values(), strict=False):
        state.values = tensor.data_ptr()
    ranges = GroupRanges(group=group, spans=[(0, weight.numel())], steps=[step], slots=[0], first=[None])
    _write_step(work, rule, ranges, 0)
    native.update(work, 0, weight.numel())


_Run = Callable[[Tensor, Tensor, dict[str, Tensor], Tensor, Mapping[str, Any]], None]


def _comparisons() -> list[tuple[str, dict[str, Any], _Run]]:
    common = {"lr": 1e-2, "maximize": True}
    adam = {**common, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": True}
    sgd = {**common, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "nesterov": False}
    return [
        ("adamw", adam, _fused_adam),
        ("adam", {**adam, "betas": (0.3, 0.9)}, _fused_adam),
        ("sgd", sgd, _fused_sgd),
    ]


def _fused_adam(
    weight: Tensor, grad: Tensor, states: dict[str, Tensor], step: Tensor, group: Mapping[str, Any]
) -> None:
    operation = torch._fused_adamw_ if group["betas"][0] == 0.9 else torch._fused_adam_
    operation(
        [weight],
        [grad],
        [states["exp_avg"]],
        [states["exp_avg_sq"]],
        [states["max_exp_avg_sq"]],
        [step],
        amsgrad=True,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=True,
    )


def _fused_sgd(weight: Tensor, grad: Tensor, states: dict[str, Tensor], step: Tensor, group: Mapping[str, Any]) -> None:
    torch._fused_sgd_(
        [weight],
        [grad],
        [states["momentum_buffer"]],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=False,
        maximize=True,
        is_first_step=bool(step == 1),
    )
