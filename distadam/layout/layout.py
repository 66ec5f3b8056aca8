"""The layout: which parameter lies in which bucket, for every rank the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from distadam.layout.buckets import Bucket, GroupRange, Slot, round_up
from distadam.layout.params import ParamSpec


@dataclass(frozen=True)
class Layout:
    """Parameters, the buckets they lie in, and the number of shards.

    Buckets take parameters in reverse registration order (about the order in which backward finishes them), keyed by
    dtype, device and storage only; parameter groups are ranges inside a bucket. Which parameters share a bucket depends
    on ``bucket_nbytes`` and not on ``num_shards``.
    """

    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]
    num_shards: int
    bucket_nbytes: int

    @classmethod
    def build(cls, params: Sequence[ParamSpec], *, num_shards: int, bucket_nbytes: int) -> Layout:
        """Return the layout of ``params`` over ``num_shards`` ranks."""
        return cls((), (), num_shards, bucket_nbytes).extend(params)

    def extend(self, params: Sequence[ParamSpec]) -> Layout:
        """Return a layout with ``params`` added in buckets of their own: nothing that is placed moves."""
        base = len(self.params)
        open_buckets: dict[tuple[str, str, str], list[int]] = {}
        open_nbytes: dict[tuple[str, str, str], int] = {}
        closed: list[list[int]] = []
        for position in range(len(params) - 1, -1, -1):
            spec = params[position]
            key = (spec.dtype, spec.device, spec.storage)
            nbytes = round_up(spec.numel, spec.align) * spec.itemsize
            if key not in open_buckets or open_nbytes[key] + nbytes > self.bucket_nbytes:
                open_buckets[key], open_nbytes[key] = [], 0
                closed.append(open_buckets[key])
            open_buckets[key].append(position)
            open_nbytes[key] += nbytes
        buckets = [
            _make_bucket(len(self.buckets) + index, positions, params, base, self.num_shards)
            for index, positions in enumerate(closed)
        ]
        return Layout((*self.params, *params), (*self.buckets, *buckets), self.num_shards, self.bucket_nbytes)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each parameter (bucket index, slot position)."""
        places: list[tuple[int, int]] = [(-1, -1)] * len(self.params)
        for bucket in self.buckets:
            for position, slot in enumerate(bucket.slots):
                places[slot.param] = (bucket.index, position)
        return tuple(places)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(spec.numel for spec in self.params)

    @property
    def padding(self) -> int:
        """Elements of all buckets that belong to no parameter."""
        return sum(bucket.padding for bucket in self.buckets)

    def as_dict(self) -> dict[str, object]:
        """Return the layout as plain numbers and names, ready for ``json.dumps``."""
        return {
            "num_shards": self.num_shards,
            "bucket_nbytes": self.bucket_nbytes,
            "params": [asdict(spec) for spec in self.params],
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }

    def to_json(self) -> str:
        """Return ``as_dict()`` as canonical JSON."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        head = (
            f"{len(self.params):,} parameters, {self.numel:,} elements in {len(self.buckets):,} buckets"
            f" x {self.num_shards:,} shards, padding {self.padding:,}"
        )
        rows = [("bucket", "dtype", "device", "elements", "per shard", "MiB", "padding", "groups", "parameters")]
        for bucket in self.buckets:
            names = [self.params[slot.param].name for slot in bucket.slots]
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
            rows.append(
                (
                    str(bucket.index),
                    bucket.dtype,
                    bucket.device,
                    f"{bucket.numel:,}",
                    f"{bucket.shard_numel:,}",
                    f"{bucket.nbytes / 2**20:.2f}",
                    f"{bucket.padding:,}",
                    ",".join(str(span.group) for span in bucket.ranges),
                    shown,
                )
            )
        return head + "\n" + format_table(rows, left=(1, 2, 8))


def format_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Return rows (the first is the header) as aligned text; columns in ``left`` are left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _make_bucket(
    index: int, positions: Sequence[int], params: Sequence[ParamSpec], base: int, num_shards: int
) -> Bucket:
    # sorted() is stable: inside a group the reverse registration order stays.
    ordered = sorted(positions, key=lambda position: params[position].group)
    slots: list[Slot] = []
    firsts: dict[int, tuple[int, int]] = {}
    offset = 0
    for position in ordered:
        spec = params[position]
        numel = spec.numel
        padded = round_up(numel, spec.align)
        firsts.setdefault(spec.group, (offset, len(slots)))
        slots.append(Slot(base + position, spec.group, offset, numel, padded))
        offset += padded
    ends = [*list(firsts.values())[1:], (offset, len(slots))]
    ranges = [
        GroupRange(group, start, end, first, last)
        for (group, (start, first)), (end, last) in zip(firsts.items(), ends, strict=True)
    ]
    spec = params[ordered[0]]
    numel = round_up(max(offset, 1), spec.align * num_shards)
    return Bucket(index, spec.dtype, spec.device, spec.itemsize, num_shards, numel, tuple(slots), tuple(ranges))
