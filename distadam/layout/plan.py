"""Predict bytes per rank before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from distadam.layout.layout import Layout, format_table
from distadam.layout.params import ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes on one rank and on the wire, by kind; the kinds are those of ``memory_report()``, small ones left out."""

    num_shards: int
    parameters: int
    masters: int
    moments: int
    gradient_shards: int
    gradient_buffers: int
    sent_per_step: int

    @property
    def total(self) -> int:
        """Bytes on one rank."""
        return self.parameters + self.masters + self.moments + self.gradient_shards + self.gradient_buffers

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self) | {"total": self.total})

    def __str__(self) -> str:
        rows = [("kind", "bytes per rank", "MiB")]
        for kind, nbytes in (asdict(self) | {"total": self.total}).items():
            if kind != "num_shards":
                rows.append((kind, f"{nbytes:,}", f"{nbytes / 2**20:.2f}"))
        return format_table(rows, left=(0,))


def plan(
    params: Sequence[ParamSpec],
    *,
    num_shards: int,
    num_moments: int = 2,
    bucket_mb: float = 25.0,
    stage: int = 2,
    reduce: Literal["native", "exchange"] = "native",
) -> Plan:
    """Return the bytes that training ``params`` takes on one of ``num_shards`` ranks.

    Args:
        params: what to train.
        num_shards: ranks that divide the state.
        num_moments: state tensors per parameter: Adam 2, AMSGrad 3, momentum 1.
        bucket_mb: MiB of parameter storage in a bucket.
        stage: 1 or 2, as in ``ShardPolicy``; at 2 two buckets are counted in flight, the largest of a dtype and device.
        reduce: as in ``CommPolicy``: exchange delivers gradients of 16-bit parameters in float32, native in 16 bits, to
            be widened.
    """
    layout = Layout.build(params, num_shards=num_shards, bucket_nbytes=max(1, int(bucket_mb * 2**20)))
    owned = [(bucket, bucket.shard_numel) for bucket in layout.buckets]
    # One rank sends nothing: the full buffer is the gradient. 16-bit ones are counted as widened to fp32, as for
    # clipping and torch's kernels; the compiled kernel and Triton's read them as they are.
    alone = num_shards == 1
    full: dict[tuple[str, str], list[int]] = {}
    for bucket in layout.buckets:
        full.setdefault((bucket.dtype, bucket.device), []).append(bucket.nbytes)
    in_flight = None if alone or stage == 1 else 2
    wire = sum(bucket.nbytes for bucket in layout.buckets) if num_shards > 1 else 0
    return Plan(
        num_shards=num_shards,
        parameters=sum(bucket.nbytes for bucket in layout.buckets),
        masters=sum(4 * numel for bucket, numel in owned if bucket.itemsize < 4),
        moments=sum(num_moments * max(4, bucket.itemsize) * numel for bucket, numel in owned),
        gradient_shards=sum(
            (0 if alone or (reduce == "exchange" and bucket.itemsize < 4) else bucket.itemsize * numel)
            + (4 * numel if bucket.itemsize < 4 else 0)
            for bucket, numel in owned
        ),
        gradient_buffers=sum(sum(sorted(sizes, reverse=True)[:in_flight]) for sizes in full.values()),
        sent_per_step=2 * wire * (num_shards - 1) // max(1, num_shards),
    )
