"""The tables in device memory that one launch of a Triton kernel reads: chunks, rows and hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from distadam.kernels.triton_update import BLOCK, NUM_COEFFICIENTS, NUM_COLUMNS, NUM_HYPER, RULES, UNIT
from distadam.kernels.update import Upload
from distadam.rules import Adam, Rule

Structure: TypeAlias = tuple[str, tuple[bool, bool, bool]]
"""A key in `RULES` and its flags: what a launch has at compile time."""


class Range(NamedTuple):
    """Elements of a shard that are updated with one group and one step count.

    Attributes:
        start: First element, a multiple of 64 (256 where a storage is blockwise).
        end: First element after, likewise.
        group: Line of the table of hyper-parameters.
        slot: Index of the step count.
    """

    start: int
    end: int
    group: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One launch's tables; see [Note: chunks] in triton_kernels.py.

    Attributes:
        structure: What the launch has at compile time.
        group: One of its groups.
        chunks: Shape (num_chunks, 3), int32.
        rows: Shape (num_rows, 2), int32: group and slot.
        coefficients: Shape (num_rows, 8), float32; written before each use.
    """

    structure: Structure
    group: int
    chunks: Tensor
    rows: Tensor
    coefficients: Tensor


def structure_of(rule: Rule, group: Mapping[str, Any]) -> Structure:
    """Return which kernel, with which compile-time options, serves a group."""
    maximize = bool(group["maximize"])
    if isinstance(rule, Adam):
        return "adam", (rule.decouples_weight_decay(group), bool(group["amsgrad"]), maximize)
    if rule.name == "sgd":
        return "sgd", (group["momentum"] != 0, bool(group["nesterov"]), maximize)
    return "rmsprop", (group["momentum"] > 0, bool(group["centered"]), maximize)


def chunk_table(ranges: Sequence[Range]) -> Tensor:
    """Return the chunk table of ranges on the CPU; line i of the ranges is row i."""
    parts = []
    for row, span in enumerate(ranges):
        starts = torch.arange(span.start // UNIT, span.end // UNIT, BLOCK // UNIT, dtype=torch.int32)
        numels = (span.end // UNIT - starts).clamp_(max=BLOCK // UNIT)
        parts.append(torch.stack([starts, numels, torch.full_like(starts, row)], dim=1))
    return torch.cat(parts) if parts else torch.empty((0, NUM_COLUMNS), dtype=torch.int32)


def make_tables(
    ranges: Sequence[Range], structures: Sequence[Structure], upload: Upload, device: torch.device
) -> list[Table]:
    """Return one table for each structure among the ranges.

    Args:
        ranges: What to update.
        structures: The structure of each group.
        upload: Fills device memory.
        device: Of the update.

    Syncs: never.
    """
    tables = []
    for structure in dict.fromkeys(structures[span.group] for span in ranges):
        mine = [span for span in ranges if structures[span.group] == structure]
        chunks = chunk_table(mine)
        rows = torch.tensor([(span.group, span.slot) for span in mine], dtype=torch.int32)
        table = Table(
            structure=structure,
            group=mine[0].group,
            chunks=torch.empty_like(chunks, device=device),
            rows=torch.empty_like(rows, device=device),
            coefficients=torch.empty((len(mine), NUM_COEFFICIENTS), dtype=torch.float32, device=device),
        )
        upload(chunks, table.chunks)
        upload(rows, table.rows)
        tables.append(table)
    return tables


class HyperTable:
    """Groups' hyper-parameters in float64, on one device.

    Numbers are uploaded when they have changed. Device tensors (a tensor `lr` under a CUDA graph) are copied on the
    device, all in one call, in every update: a replay then sees what a schedule wrote to them.

    Args:
        num_groups: How many.
        upload: Fills device memory.
        device: Of the update.
    """

    def __init__(self, num_groups: int, upload: Upload, device: torch.device) -> None:
        self.table = torch.empty((num_groups, NUM_HYPER), dtype=torch.float64, device=device)
        self._upload = upload
        self._values: list[tuple[float, ...]] = []

    def refresh(self, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the table, shape (num_groups, 8), with the groups' present values. Syncs: never."""
        values: list[tuple[float, ...]] = []
        on_device: list[tuple[int, int, Tensor]] = []
        for line, group in enumerate(groups):
            numbers = [0.0] * NUM_HYPER
            for column, value in enumerate(RULES[structure_of(rule, group)[0]].hyper(group)):
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    on_device.append((line, column, value))
                else:
                    numbers[column] = float(value)
            values.append(tuple(numbers))
        if values != self._values:
            self._upload(torch.tensor(values, dtype=torch.float64), self.table)
            self._values = values
        if on_device:
            targets = [self.table[line, column] for line, column, _ in on_device]
            torch._foreach_copy_(targets, [value.reshape(()) for _, _, value in on_device], non_blocking=True)
        return self.table
