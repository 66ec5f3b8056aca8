"""One launch for a whole shard: the kernel that `select_bucket` prefers on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distadam.kernels.triton_launch import GRADIENT_DTYPES
from distadam.kernels.triton_select import TRITON
from distadam.kernels.triton_tables import HyperTable, Range, Structure, Table, Upload, make_tables, structure_of
from distadam.kernels.triton_update import update
from distadam.kernels.update import GradScaling
from distadam.precision import BlockwiseMoment, Moment, StochasticWeights, Weights
from distadam.rules import Allocate, Rule

MAX_MULTIPLIERS = 2


@dataclass(slots=True, kw_only=True)
class ShardTensors:
    """A shard as it lies in memory; every tensor 1-D, contiguous, on one device.

    Attributes:
        param: The parameter's own elements, where the all-gather reads them.
        weights: Their storage: a key of `triton_update.WEIGHT_DTYPES`.
        extra: What the storage has beside the parameter.
        moments: The states' storage: a key of `triton_update.MOMENT_DTYPES`.
        states: By name.
        scales: By name, where the storage is blockwise.
        keys: Random bits' keys for the weights (under "") and for states, where rounding is stochastic.
        lanes: The blocks' places in their segments.
        steps: Step counts, float32.
    """

    param: Tensor
    weights: str
    steps: Tensor
    extra: Tensor | None = None
    moments: str = "fp32"
    states: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    lanes: Tensor | None = None


def shard_tensors(weights: Weights, moments: Mapping[str, Moment], steps: Tensor, allocate: Allocate) -> ShardTensors:
    """Return a shard's storages as tensors.

    Args:
        weights: The weights' storage.
        moments: The states' storages by name, all of one kind.
        steps: Step counts, float32.
        allocate: Makes the tables of random bits, if there are any.
    """
    extra = next((stored.tensor for stored in weights.stored().values()), None)
    stored = {name: moment.stored() for name, moment in moments.items()}
    states = {name: parts[""].tensor for name, parts in stored.items()}
    scales = {name: parts["_scale"].tensor for name, parts in stored.items() if "_scale" in parts}
    counters = {
        name: storage.counters
        for name, storage in {"": weights, **moments}.items()
        if isinstance(storage, StochasticWeights | BlockwiseMoment) and storage.counters is not None
    }
    keys: dict[str, Tensor] = {}
    lanes: Tensor | None = None
    for name, counter in counters.items():
        wide_keys, wide_lanes = counter.tables()
        keys[name] = allocate(wide_keys.numel(), torch.int32, wide_keys.device).copy_(wide_keys)
        if lanes is None:
            lanes = allocate(wide_lanes.numel(), torch.int32, wide_lanes.device).copy_(wide_lanes)
    return ShardTensors(
        param=weights.param_shard,
        weights=weights.name,
        steps=steps,
        extra=extra,
        moments="8bit" if scales else _MOMENTS[next(iter(states.values())).dtype] if states else "fp32",
        states=states,
        scales=scales,
        keys=keys,
        lanes=lanes,
    )


_MOMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class TritonKernel:
    """Reads every number of a shard once and writes it once, in one launch for all groups (see [Note: chunks]).

    Args:
        rule: The update rule.
        allocate: Makes tables in device memory.
        upload: Fills them without waiting for the device.
    """

    name = TRITON

    def __init__(self, rule: Rule, allocate: Allocate, upload: Upload) -> None:
        self._rule = rule
        self._allocate = allocate
        self._upload = upload
        self._hyper: dict[torch.device, HyperTable] = {}

    def structures(self, groups: Sequence[Mapping[str, Any]]) -> tuple[Structure, ...]:
        """Return what decides, beside the ranges, how many launches there are; tables hold for equal ones."""
        return tuple(structure_of(self._rule, group) for group in groups)

    def tables(self, ranges: Sequence[Range], structures: Sequence[Structure], device: torch.device) -> list[Table]:
        """Return the tables of one update, which the caller keeps: memory is allocated here only. Syncs: never."""
        return make_tables(ranges, structures, self._allocate, self._upload, device)

    def update(
        self,
        shard: ShardTensors,
        grad: Tensor,
        tables: Sequence[Table],
        groups: Sequence[Mapping[str, Any]],
        scaling: GradScaling,
    ) -> None:
        """Scale the gradient (in registers: the tensor keeps its values) and update the shard in place.

        Args:
            shard: What to update.
            grad: The summed gradient: float32, bfloat16 or float16.
            tables: Of `tables`.
            groups: torch's param_group dicts.
            scaling: At most two multipliers.

        Syncs: never.
        """
        device = shard.param.device
        if device not in self._hyper:
            self._hyper[device] = HyperTable(self._allocate, self._upload, device)
        hyper = self._hyper[device].refresh(self._rule, groups)
        multipliers = [_scalar(factor) for factor in scaling.multipliers]
        multipliers += [None] * (MAX_MULTIPLIERS - len(multipliers))
        for table in tables:
            rule, flags = table.structure
            names = self._rule.state_names(groups[table.group])
            update(
                grad,
                shard.param,
                shard.extra,
                [shard.states[name] for name in names],
                [shard.scales[name] for name in names] if shard.scales else [],
                [shard.lanes, shard.keys.get(""), *map(shard.keys.get, names)] if shard.keys else [],
                table.chunks,
                table.rows,
                hyper,
                shard.steps,
                table.coefficients,
                _scalar(scaling.num_ranks),
                *multipliers,
                _scalar(scaling.loss_scale),
                _scalar(scaling.found_inf),
                rule,
                shard.weights,
                shard.moments,
                list(flags),
            )


def takes(grad: Tensor) -> bool:
    """Return whether the kernel reads this gradient as it is."""
    return grad.dtype in GRADIENT_DTYPES


def _scalar(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype == torch.float32 else value.float()
