"""Updates that take a whole shard in one launch: Triton's kernels, behind the stepper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distadam.comm import Streams
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.ledger import Ledger
from distadam.engine.rounds import BucketGradient
from distadam.kernels import GradScaling, select_bucket
from distadam.kernels.triton_select import TRITON
from distadam.precision import OwnWeights
from distadam.rules import Rule

if TYPE_CHECKING:
    from distadam.kernels.triton_kernel import ShardTensors, TritonKernel
    from distadam.kernels.triton_tables import Range, Table

_MAX_CACHED = 64


class ShardUpdate:
    """The part of the stepper that needs Triton, which is imported when a bucket is first served by it.

    Args:
        rule: The update rule.
        param_groups: torch's, by reference.
        ledger: Allocates the tables.
        streams: Uploads them.
    """

    def __init__(self, rule: Rule, param_groups: list[dict[str, Any]], ledger: Ledger, streams: Streams) -> None:
        self._rule = rule
        self._param_groups = param_groups
        self._ledger = ledger
        self._streams = streams
        self._serves: dict[tuple[int, ...], bool] = {}
        self._kernel: TritonKernel | None = None
        self._tables: dict[object, list[Table]] = {}

    def serves(self, flat: FlatBucket) -> bool:
        """Return whether every parameter group of the bucket is Triton's."""
        groups = tuple(dict.fromkeys(span.group for span in flat.bucket.ranges))
        key = (flat.bucket.index, *groups)
        if key not in self._serves:
            self._serves[key] = all(
                select_bucket(self._rule, self._param_groups[group], flat.compute_dtype, flat.device.type).name
                == TRITON
                for group in groups
            )
        return self._serves[key]

    def update(
        self,
        gradient: BucketGradient,
        ranges_key: object,
        make_ranges: Callable[[], Sequence[tuple[int, int, int, int]]],
        found_inf: Tensor | None,
        loss_scale: Tensor | None,
    ) -> None:
        """Update the shard of one bucket, parameters included.

        Args:
            gradient: The bucket with its reduced gradient.
            ranges_key: Equal as long as make_ranges would return the same.
            make_ranges: Returns (start, end, group, slot) of what is updated.
            found_inf: On the device; where not 0 nothing changes.
            loss_scale: On the device; gradients are divided by it.

        Syncs: never.
        """
        kernel, flat = self._made(), gradient.flat
        structures = kernel.structures(self._param_groups)
        key = (ranges_key, structures)
        if key not in self._tables:
            self._tables[key] = kernel.tables(_ranges(make_ranges()), structures, flat.device)
            self._forget_oldest()
        if len(gradient.multipliers) > 2:
            gradient.average()
        scaling = GradScaling(
            num_ranks=gradient.scaling_divisor,
            multipliers=gradient.multipliers,
            loss_scale=loss_scale,
            found_inf=found_inf,
        )
        kernel.update(self._shard(flat), gradient.raw_sum(), self._tables[key], self._param_groups, scaling)

    def _made(self) -> TritonKernel:
        if self._kernel is None:
            from distadam.kernels.triton_kernel import TritonKernel

            self._kernel = TritonKernel(self._rule, self._allocate, self._streams.upload)
        return self._kernel

    def _allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._ledger.empty("scratch", numel, dtype, device)

    def _shard(self, flat: FlatBucket) -> ShardTensors:
        from distadam.kernels.triton_kernel import ShardTensors

        names = {name for span in flat.bucket.ranges for name in self._rule.state_names(self._param_groups[span.group])}
        own = isinstance(flat.weights, OwnWeights)
        return ShardTensors(
            param=flat.param_shard,
            weights="own" if own else "fp32",
            extra=None if own else flat.weights.load(),
            states={name: flat.state(name) for name in names},
            steps=flat.steps,
        )

    def _forget_oldest(self) -> None:
        while len(self._tables) > _MAX_CACHED * max(1, len(self._serves)):
            for table in self._tables.pop(next(iter(self._tables))):
                for tensor in table.memory:
                    self._ledger.release(tensor)


def _ranges(spans: Sequence[tuple[int, int, int, int]]) -> list[Range]:
    from distadam.kernels.triton_tables import Range

    return [Range(start=start, end=end, group=group, slot=slot) for start, end, group, slot in spans]
