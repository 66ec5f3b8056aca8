"""`watch`: what every parameter's gradient, update and state do while training goes on."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from distadam.comm import Pending
from distadam.diagnostics.nonfinite import FirstNonFinite, describe
from distadam.diagnostics.shards import access_of
from distadam.diagnostics.sinks import JsonlSink, Sink
from distadam.diagnostics.statistics import Statistics
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.observers import BucketStep, StepObserver
from distadam.optimizer import ShardedOptimizer

_logger = logging.getLogger("distadam")


def watch(
    optimizer: ShardedOptimizer,
    *,
    every: int = 10,
    sinks: Sequence[Sink] = (),
    run: str | os.PathLike[str] | None = None,
    nonfinite: bool = True,
) -> Watcher:
    """Record what each step does, and every ``every`` steps what it does to each parameter.

        with diagnostics.watch(optimizer, every=10, run="runs/gpt") as watcher:
            for batch in batches:
                ...
                optimizer.step()
                watcher.log(loss=loss)

    Per parameter: norm, largest magnitude, share of zeros and number of non-finite elements of the gradient that the
    update took; ratio of update and weight norms; the effective learning rate (update norm over gradient norm: what
    plain SGD would need for a step of that length); root mean squares (means, of squares) of the states.

    Args:
        optimizer: any rule, any storage.
        every: watch parameters at every such step; other steps get a "step" record only.
        sinks: where records go; parameters are written on rank 0 alone.
        run: a directory to write ``rank-<r>.jsonl`` to, for `distadam report`.
        nonfinite: look at this rank's gradients for NaN and Inf, bucket by bucket, just before they are reduced.

    Collective: every rank, with the same ``every`` and ``nonfinite``; at every such step one all-reduce that no update
    waits for. Syncs: at those steps, when the numbers are read at the next one.
    """
    if every < 1:
        raise ValueError(f"watch(every=...) expected a number above 0 but got {every!r}.")
    return Watcher(optimizer, every, list(sinks), run, nonfinite)


class Watcher(StepObserver):
    """See `watch`.

    Attributes:
        step: steps done, going on from the optimizer's own count.
        parameters: the last watched step's numbers by parameter; on every rank.
        incidents: what went wrong, in words; on every rank.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        every: int,
        sinks: list[Sink],
        run: str | os.PathLike[str] | None,
        nonfinite: bool,
    ) -> None:
        self._access = access_of(optimizer, every, nonfinite)
        self._groups = self._access.collectives.groups
        self._optimizer = optimizer
        self._every = every
        self._sinks = sinks if run is None else [*sinks, JsonlSink(run, self._groups.rank)]
        self._statistics = Statistics(self._access)
        self._nonfinite = FirstNonFinite() if nonfinite else None
        self._watching = False
        self._pending: Pending | None = None
        self._record: dict[str, Any] | None = None
        self._known_bad = False
        self._found = FirstNonFinite()
        self._closed = False
        counts = [float(flat.steps.max()) for flat in self._access.flats if flat.device.type != "meta"]
        self.step = int(max(counts, default=0.0))
        self.parameters: dict[str, dict[str, float]] = {}
        self.incidents: list[str] = []
        self._write(
            {
                "kind": "run",
                "rank": self._groups.rank,
                "ranks": self._groups.num_ranks,
                "optimizer": type(optimizer).__name__,
                "parameters": list(self._access.names.values()),
                "every": every,
            }
        )
        self._remove = optimizer.observe(self)
        self._last_s = time.monotonic()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=error is None)

    def log(self, **fields: Any) -> None:
        """Add numbers to the record of the last step: ``loss``, ``tokens_per_s``, ``parts``; call it after `step`."""
        if self._record is not None:
            self._record |= fields

    def write(self, kind: str, **fields: Any) -> None:
        """Write a record of one's own: ``write("checkpoint", path=..., seconds=..., bytes=...)``."""
        self._write({"kind": kind, "step": self.step, **fields})

    def close(self, wait: bool = True) -> None:
        """Write what is still to be written and leave no hook behind.

        Args:
            wait: for the last step's numbers, which other ranks must have sent; False after an error.

        Collective: every rank, after the same step.
        """
        if self._closed:
            return
        self._closed = True
        self._remove()
        if wait:
            self._finish_step()
        for sink in self._sinks:
            sink.close()

    # What the optimizer shows

    def reducing(self, flat: FlatBucket, full: Tensor) -> None:
        """See `FirstNonFinite`."""
        if self._nonfinite is not None:
            self._nonfinite.look(flat, full)

    def begin_step(self) -> None:
        """Finish the last step's records; decide whether this one is watched."""
        self._finish_step()
        if self._nonfinite is not None:
            self._found = self._nonfinite.take()  # by this step's backward
        self._watching = self.reads_gradients = (self.step + 1) % self._every == 0
        if self._watching:
            if not self._statistics.fits:
                self._statistics = Statistics(self._access)
            self._statistics.clear()

    def begin_bucket(self, step: BucketStep) -> None:
        """See `Statistics`."""
        if self._watching:
            self._statistics.begin_bucket(step)

    def gradient(self, step: BucketStep, start: int, piece: Tensor) -> None:
        """See `Statistics`."""
        self._statistics.gradient(step, start, piece)

    def end_bucket(self, step: BucketStep) -> None:
        """See `Statistics`."""
        if self._watching:
            self._statistics.end_bucket(step)

    def end_step(self) -> None:
        """Send the table off; begin the step's record."""
        self.step += 1
        if self._watching:
            self._pending = self._statistics.reduce()
        now = time.monotonic()
        self._record = {
            "kind": "step",
            "step": self.step,
            "time": time.time(),
            "rank": self._groups.rank,
            "lr": [float(group["lr"]) for group in self._access.param_groups],
            "step_s": now - self._last_s,
        }
        if self._watching:
            self._record["memory"] = dict(self._optimizer.memory_report().nbytes)
        self._last_s = now

    def _finish_step(self) -> None:
        """Write the last step's records, now that everything about it has arrived."""
        record, self._record = self._record, None
        if record is None:
            return
        norm = self._optimizer.grad_norm
        on_host = norm is None or norm.device.type == "cpu"
        if norm is not None and (on_host or self._watching):
            record["grad_norm"] = float(norm)
            self._look_for_nonfinite(record["grad_norm"])
        for name, value in record.items():
            if isinstance(value, Tensor):
                record[name] = float(value)
        self._write(record)
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self.parameters = self._statistics.read()
            if self._groups.rank == 0:
                self._write({"kind": "parameters", "step": self.step, "parameters": self.parameters})

    def _look_for_nonfinite(self, norm: float) -> None:
        """Report a gradient that is not finite, once until they are finite again; every rank has the same norm."""
        bad = not math.isfinite(norm)
        if bad and not self._known_bad and self._nonfinite is not None:
            answers = self._access.collectives.exchange(self._found.read(), "the first non-finite gradient")
            detail = describe(answers)
            self.incidents.append(f"step {self.step}: {detail}")
            had = [rank for rank, found in enumerate(answers) if found is not None]
            if self._groups.rank in had or (not had and self._groups.rank == 0):
                incident = {"kind": "incident", "step": self.step, "rank": self._groups.rank, "ranks": had}
                self._write(incident | {"what": "nonfinite_gradient", "detail": detail})
            if self._groups.rank == 0:
                _logger.warning("step %d: %s", self.step, detail)
        self._known_bad = bad

    def _write(self, record: dict[str, Any]) -> None:
        record.setdefault("time", time.time())
        for sink in self._sinks:
            sink.write(record)
