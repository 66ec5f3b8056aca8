"""Numbers of one step by parameter, taken from the shards as the update reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from distadam.comm import Pending
from distadam.diagnostics.shards import Part, parts_of, read_state, read_weights
from distadam.engine.access import Access
from distadam.engine.observers import BucketStep
from distadam.precision.moments import UNSIGNED

SUMS = ("grad_square", "zeros", "nonfinite", "update_square", "weight_square")
"""Columns that add up over shards; then one for each state; last, for each shard, the largest magnitude."""


class Statistics:
    """One table for all parameters: a row each, in the layout's order; one all-reduce fills it.

    Args:
        access: of the optimizer.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._bases = self._rows_of_buckets()
        groups = access.collectives.groups
        self._shard, self._num_shards = groups.shard_rank, groups.num_shards
        names = [name for group in access.param_groups for name in access.rule.state_names(group)]
        self.states = tuple(dict.fromkeys(names))
        width = len(SUMS) + len(self.states) + self._num_shards
        device = access.flats[0].device if access.flats else torch.device("cpu")
        self.table = torch.zeros(self._bases[-1], width, dtype=torch.float64, device=device)
        self._before: Tensor | None = None
        self._parts: list[Part] = []

    @property
    def fits(self) -> bool:
        """Whether the optimizer still has the parameters and states that the table was made for."""
        return self._bases == self._rows_of_buckets()

    def _rows_of_buckets(self) -> list[int]:
        """Return each bucket's first row, and the number of rows."""
        return [*accumulate((len(flat.params) for flat in self._access.flats), initial=0)]

    def clear(self) -> None:
        """Begin a step."""
        self.table.zero_()

    def _rows(self, parts: Sequence[Part]) -> slice | Tensor:
        """Return where the table has these parts of one bucket."""
        numbers = [self._bases[part.flat.bucket.index] + part.slot for part in parts]
        if numbers[-1] - numbers[0] + 1 == len(numbers):
            return slice(numbers[0], numbers[-1] + 1)
        return torch.tensor(numbers, device=self.table.device)

    def _add(self, column: int, rows: slice | Tensor, values: Tensor) -> None:
        self.table[rows, column] += values

    def begin_bucket(self, step: BucketStep) -> None:
        """Keep the weights as they are before the update."""
        weights = read_weights(step.flat)
        if weights is step.flat.weights.direct:
            if self._before is None or self._before.numel() < weights.numel() or self._before.dtype != weights.dtype:
                self._before = torch.empty_like(weights)
            weights = self._before[: weights.numel()].copy_(weights)
        self._old = weights
        self._parts = [part for part in parts_of(step.flat) if step.has[part.slot]]

    def gradient(self, step: BucketStep, start: int, piece: Tensor) -> None:
        """Take in elements of the summed gradient."""
        end = start + piece.numel()
        parts = [part for part in self._parts if part.start < end and part.end > start]
        views = [piece[max(part.start, start) - start : min(part.end, end) - start] for part in parts]
        if not views:
            return
        if piece.element_size() < 4:
            views = [view.float() for view in views]
        on_host = piece.device.type == "cpu"
        norms = torch._foreach_norm(views, 2)
        # Not the norm of order inf, which torch does not vectorise on the CPU: 25 times slower.
        extremes = [torch.aminmax(view) for view in views]
        largest = [torch.maximum(-low, high) for low, high in extremes]
        rows, most = self._rows(parts), torch.stack(largest)
        self._add(0, rows, torch.stack(norms).double().square_())
        self._add(1, rows, torch.stack([view.numel() - torch.count_nonzero(view) for view in views]))
        if not on_host or not bool(torch.isfinite(most).all()):
            self._add(2, rows, torch.stack([view.numel() - torch.isfinite(view).sum() for view in views]))
        column = self.table[:, len(SUMS) + len(self.states) + self._shard]
        column[rows] = torch.maximum(column[rows], most.double())

    def end_bucket(self, step: BucketStep) -> None:
        """Scale what was shown as the update did; look at new weights and states."""
        parts, flat = self._parts, step.flat
        if not parts:
            return
        factor = torch.ones((), dtype=torch.float64, device=flat.device)
        if step.num_ranks is not None:
            factor.div_(step.num_ranks)
        for multiplier in step.multipliers:
            factor.mul_(multiplier)
        if step.loss_scale is not None:
            factor.div_(step.loss_scale.reshape(()).to(flat.device))
        rows = self.table[self._bases[flat.bucket.index] : self._bases[flat.bucket.index + 1]]
        rows[:, 0].mul_(factor.square())
        rows[:, len(SUMS) + len(self.states) :].mul_(factor.abs())
        new = read_weights(flat)
        change = self._old.sub_(new)
        columns = [
            torch._foreach_norm([change[part.start : part.end] for part in parts], 2),
            torch._foreach_norm([new[part.start : part.end] for part in parts], 2),
        ]
        index = self._rows(parts)
        for column, norms in enumerate(columns, 3):
            self._add(column, index, torch.stack(norms).double().square_())
        for place, name in enumerate(self.states, len(SUMS)):
            having = [part for part in parts if name in self._names(part)]
            if having:
                state = read_state(flat, name)
                views = [state[part.start : part.end] for part in having]
                order = 1 if name in UNSIGNED else 2
                total = torch.stack(torch._foreach_norm(views, order)).double()
                self._add(place, self._rows(having), total if order == 1 else total.square_())

    def _names(self, part: Part) -> Sequence[str]:
        return self._access.rule.state_names(self._access.param_groups[part.group])

    def reduce(self) -> Pending:
        """Add the shards' tables up: one all-reduce that nothing waits for yet. Collective: the shard group."""
        return self._access.collectives.sum_shards(self.table, "watch's table")

    def read(self) -> dict[str, dict[str, float]]:
        """Return the numbers by parameter, once reduced. Syncs: yes."""
        found: dict[str, dict[str, float]] = {}
        rows = iter(self.table.tolist())
        for flat in self._access.flats:
            for slot, name in enumerate(flat.names):
                found[name] = self._values(next(rows), flat.bucket.slots[slot].numel)
        return found

    def _values(self, row: list[float], numel: int) -> dict[str, float]:
        grad, update, weight, count = row[0] ** 0.5, row[3] ** 0.5, row[4] ** 0.5, max(1, numel)
        values = {
            "grad_norm": grad,
            "grad_max": max(row[len(SUMS) + len(self.states) :]),
            "grad_zeros": row[1] / count,
            "grad_nonfinite": int(row[2]),
            "update_ratio": update / weight if weight else 0.0,
            "effective_lr": update / grad if grad else 0.0,
        }
        for name, total in zip(self.states, row[len(SUMS) :], strict=False):
            if name in UNSIGNED:
                values[f"{name}_mean"] = total / count
            else:
                values[f"{name}_rms"] = (total / count) ** 0.5
        return values
