"""One launch for all of a bucket: the kernel that `select` prefers on CUDA."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distadam.kernels.triton_select import TRITON
from distadam.kernels.triton_tables import HyperTable, Range, Structure, Table, make_tables, structure_of
from distadam.kernels.triton_update import update as launch
from distadam.kernels.update import GradScaling, ShardUpdate, Upload
from distadam.precision import BlockwiseMoment, Counters, StochasticWeights
from distadam.rules import Rule

_MAX_TABLES = 256

_WEIGHTS = {"own": "own", "fp32 master": "fp32", "split": "split", "stochastic": "stochastic", "none": "none"}
_MOMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "8bit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTensors:
    """A shard as it lies in memory; every tensor 1-D, contiguous, on one device.

    Attributes:
        param: The parameter's own elements, where the all-gather reads them.
        weights: A key of `triton_update.WEIGHT_DTYPES`.
        extra: What the weights' storage has beside the parameter.
        moments: A key of `triton_update.MOMENT_DTYPES`.
        states: By name.
        scales: By name, where the storage is blockwise.
        keys: Keys of random bits, by state's name and, for the weights, "".
        lanes: The blocks' places in their segments, where there are keys.
    """

    param: Tensor
    weights: str
    extra: Tensor | None
    moments: str
    states: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    lanes: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What the kernel keeps for a `ShardUpdate`: valid as long as the structures are."""

    structures: tuple[Structure, ...]
    tables: list[Table]
    hyper: HyperTable
    shard: ShardTensors


class TritonKernel:
    """Reads every number of a shard once and writes it once, in one launch for all groups (see [Note: chunks]).

    The gradient is scaled in registers and keeps its values in memory.

    Args:
        upload: Fills device memory without waiting for the device.
    """

    name = TRITON

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._tables: dict[object, tuple[list[Table], HyperTable]] = {}
        self._blocks: weakref.WeakKeyDictionary[Counters, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()

    def tensors(self) -> list[Tensor]:
        """Return the tables; see `Kernel.tensors`."""
        tables = [table for tables, _ in self._tables.values() for table in tables]
        found = [tensor for table in tables for tensor in (table.chunks, table.rows, table.coefficients)]
        found += [hyper.table for _, hyper in self._tables.values()]
        return found + [tensor for blocks in self._blocks.values() for tensor in blocks]

    def update(self, rule: Rule, update: ShardUpdate, scaling: GradScaling) -> None:
        """Scale, update and store in one pass; see `Kernel.update`. Two multipliers at most. Syncs: never."""
        if update.device.type == "meta":
            update.validate(rule)
        groups = [ranges.group for ranges in update.ranges]
        prepared = self._prepare(rule, update, groups)
        shard = prepared.shard
        hyper = prepared.hyper.refresh(rule, groups)
        multipliers = [*map(_scalar, scaling.multipliers), None, None][: max(2, len(scaling.multipliers))]
        for table in prepared.tables:
            kernel, flags = table.structure
            names = rule.state_names(groups[table.group])
            launch(
                update.grad,
                shard.param,
                shard.extra,
                [shard.states[name] for name in names],
                [shard.scales[name] for name in names] if shard.scales else [],
                [shard.lanes, shard.keys.get(""), *map(shard.keys.get, names)] if shard.keys else [],
                table.chunks,
                table.rows,
                hyper,
                update.steps,
                table.coefficients,
                _scalar(scaling.num_ranks),
                *multipliers,
                _scalar(scaling.loss_scale),
                _scalar(scaling.found_inf),
                kernel,
                shard.weights,
                shard.moments,
                list(flags),
            )

    def _prepare(self, rule: Rule, update: ShardUpdate, groups: Sequence[Mapping[str, Any]]) -> _Prepared:
        structures = tuple(structure_of(rule, group) for group in groups)
        prepared: _Prepared | None = update.cache.get(self.name)
        if prepared is None or prepared.structures != structures:
            ranges = tuple(
                Range(start, end, line, slot)
                for line, part in enumerate(update.ranges)
                for (start, end), slot in zip(part.spans, part.slots, strict=True)
            )
            tables, hyper = self._tables_for((id(update.weights), ranges, structures), update.device)
            prepared = _Prepared(structures=structures, tables=tables, hyper=hyper, shard=self._tensors_of(update))
            update.cache[self.name] = prepared
        return prepared

    def _tables_for(
        self, key: tuple[int, tuple[Range, ...], tuple[Structure, ...]], device: torch.device
    ) -> tuple[list[Table], HyperTable]:
        """Return the tables of a shard's ranges, shared by updates that differ in the gradient's buffer only."""
        _, ranges, structures = key
        if key not in self._tables:
            while len(self._tables) >= _MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            hyper = HyperTable(len(structures), self._upload, device)
            self._tables[key] = (make_tables(ranges, structures, self._upload, device), hyper)
        return self._tables[key]

    def _tensors_of(self, update: ShardUpdate) -> ShardTensors:
        weights = update.weights
        stored = {name: moment.stored() for name, moment in update.states.items()}
        states = {name: parts[""].tensor for name, parts in stored.items()}
        counters = {
            name: moment.counters for name, moment in update.states.items() if isinstance(moment, BlockwiseMoment)
        }
        if isinstance(weights, StochasticWeights):
            counters[""] = weights.counters
        blocks = {name: self._blocks_of(counter) for name, counter in counters.items()}
        return ShardTensors(
            param=weights.param_shard,
            weights=_WEIGHTS[weights.name],
            extra=next((part.tensor for part in weights.stored().values()), None),
            moments=_MOMENTS[next((tensor.dtype for tensor in states.values()), torch.float32)],
            states=states,
            scales={name: parts["_scale"].tensor for name, parts in stored.items() if "_scale" in parts},
            keys={name: keys for name, (keys, _) in blocks.items()},
            lanes=next((lanes for _, lanes in blocks.values()), None),
        )

    def _blocks_of(self, counters: Counters) -> tuple[Tensor, Tensor]:
        """Return the keys and lanes of a shard's blocks in 32 bits, on the device."""
        found = self._blocks.get(counters)
        if found is None:
            keys, lanes = (table.to(torch.int32) for table in counters.host_tables())  # keys wrap to signed
            found = (torch.empty_like(keys, device=counters.device), torch.empty_like(lanes, device=counters.device))
            self._upload(keys, found[0])
            self._upload(lanes, found[1])
            self._blocks[counters] = found
        return found


def _scalar(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype == torch.float32 else value.float()
