"""Rebuild parameters from shards after the update, and know which are still on their way."""

from __future__ import annotations

from collections.abc import Mapping

from distadam.comm import Collectives, Pending
from distadam.engine.flat_bucket import FlatBucket


class Gatherer:
    """All-gathers of updated parameters, by bucket."""

    def __init__(self, collectives: Collectives, *, overlap: bool) -> None:
        self._collectives = collectives
        self._overlap = overlap
        self._pending: dict[int, Pending] = {}

    @property
    def arriving(self) -> Mapping[int, Pending]:
        """Buckets that nobody has waited for yet."""
        return self._pending

    def launch(self, flat: FlatBucket) -> None:
        """Start the all-gather of a bucket, straight from the buffer that the update wrote.

        Collective: every rank of the shard group. Syncs: never with overlap; on CPU until done without.
        """
        index = flat.bucket.index
        self._pending[index] = self._collectives.all_gather(flat.param_flat, flat.param_shard, f"bucket {index}")
        if not self._overlap:
            self.wait(index)

    def wait(self, bucket: int) -> None:
        """Make what follows see the bucket's parameters."""
        pending = self._pending.pop(bucket, None)
        if pending is not None:
            pending.wait()

    def wait_all(self) -> None:
        """Make what follows see every parameter."""
        for bucket in list(self._pending):
            self.wait(bucket)
