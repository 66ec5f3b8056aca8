"""Where the time of a step goes: spans of backward, reduce, update and gather, bucket by bucket.

Note [What is measured]: on the CPU a wait is time that the thread spent in it; on CUDA it is time that the stream stood
still, between two events around the wait. A collective's end is what the thread that completes it says, or an event of
a stream that waits for nothing else; with gloo's own collectives, whose handles say nothing, it is the end of the wait
for it. With ``shared`` ranks read each other's memory when they wait, so nothing is under way before and the overlap is
0 by construction: that is the fact, not a gap in the measurement.

"backward" begins with the first gradient: no hook sees the layers that have run backward before it. A
``region("backward")`` around the call gives the whole.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from distadam.comm import Clock, Mark, Pending
from distadam.diagnostics.timeline_spans import Span, StepSpans, mean_parts
from distadam.diagnostics.timeline_trace import trace_events, write_trace
from distadam.engine.flat_bucket import FlatBucket
from distadam.layout.layout import format_table
from distadam.optimizer import ShardedOptimizer

__all__ = ["Timeline", "timeline"]

_SHORT_S = 20e-6  # a look that found nothing to wait for is not worth a span


class Sink(Protocol):
    """Where records go."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""


@dataclass(slots=True, eq=False)
class _Raw:
    """A span whose marks a device may still have to reach."""

    kind: str
    role: str
    label: str
    bucket: int | None
    begin: Mark
    end: Mark | None = None
    busy_s: float | None = None
    on_demand: bool = False


@dataclass(slots=True, eq=False)
class _RawStep:
    step: int
    begin: Mark
    end: Mark | None = None
    spans: list[_Raw] = field(default_factory=list)


class Timeline:
    """Watches one optimizer until it is closed; a context manager that closes itself.

    Args:
        optimizer: any of distadam's; one timeline at a time.
        sink: gets a "step" record with "step_s" and "parts" for each step, once its times are known.
        first_step: the number of the step under way.
        keep: steps whose spans are kept; older ones are forgotten.
        ranges: whether profilers see ranges with bucket and parameter names (`record_function`, and NVTX where there
            is CUDA).

    Collective: no. Syncs: each CUDA device once, when it begins and when it is closed or saved.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        *,
        sink: Sink | None = None,
        first_step: int = 1,
        keep: int = 100,
        ranges: bool = True,
    ) -> None:
        self.rank = optimizer.checkpoint_access().collectives.groups.rank
        self._devices = {param.device for group in optimizer.param_groups for param in group["params"]}
        self._device = next(iter(self._devices))
        self._clock = Clock(self._devices)
        self._to_unix_s = time.time() - time.monotonic()
        self._sink = sink
        self._ranges = _Ranges() if ranges else None
        self._lock = threading.Lock()
        self._numbers = itertools.count(first_step)
        self._current = _RawStep(next(self._numbers), self._clock.mark(self._device))
        self._waiting: deque[_RawStep] = deque()
        self._steps: deque[StepSpans] = deque(maxlen=keep)
        self._backward: _Raw | None = None
        self._filling: dict[int, _Raw] = {}
        self._stop = optimizer.observe_times(self)
        self._hook = optimizer.register_step_post_hook(self._end_step)

    # For the caller --------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[StepSpans]:
        """The last steps whose times are known, oldest first. Syncs: never."""
        self._settle()
        return list(self._steps)

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds of each part over `steps`; see `StepSpans.parts`."""
        return mean_parts(self.steps)

    @property
    def overlap(self) -> float | None:
        """The share of communication in `steps` that cost no time, from 0 to 1; None without communication."""
        hidden, exposed = (sum(getattr(step, name) for step in self.steps) for name in ("hidden_s", "exposed_s"))
        return hidden / (hidden + exposed) if hidden + exposed > 0 else None

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Give the caller's own work ("forward", "data") a part of the step; "backward" joins the optimizer's."""
        span = _Raw(name, "work", name, None, self._clock.mark(self._device))
        with ExitStack() as stack:
            if self._ranges is not None:
                stack.enter_context(self._ranges.open(name))
            yield
        span.end = self._clock.mark(self._device)
        self._current.spans.append(span)

    def save(self, path: str | Path) -> None:
        """Write what is kept as a trace for Perfetto or Chrome; `merge_traces` joins those of all ranks.

        Syncs: waits for the devices.
        """
        self._wait_for_devices()
        write_trace(Path(path), trace_events(self.steps, self._to_unix_s))

    def close(self) -> None:
        """Stop watching, wait for the devices, give the sink what is left. The spans stay readable."""
        self._stop()
        self._hook.remove()
        self._wait_for_devices()
        self._settle()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        steps, parts = self.steps, self.parts
        total = sum(step.seconds for step in steps) / max(1, len(steps))
        rows = [("part", "ms", "share")]
        rows += [(kind, f"{1e3 * s:.3f}", f"{s / total:.0%}") for kind, s in parts.items() if total > 0]
        rest = total - sum(parts.values())
        rows += [("elsewhere", f"{1e3 * rest:.3f}", f"{rest / total:.0%}")] if total > 0 else []
        overlap = "nothing was sent" if self.overlap is None else f"{self.overlap:.0%} of communication was hidden"
        head = f"rank {self.rank}: mean of {len(steps)} steps, {1e3 * total:.3f} ms; {overlap}"
        return head + "\n" + format_table(rows, left=(0,))

    # For the engine: see `distadam.engine.observe.Observer` ----------------------------------------------------------

    @contextmanager
    def gradient(self, flat: FlatBucket, slot: int) -> Iterator[None]:
        """Note that a gradient has come."""
        now = self._clock.mark(flat.device)
        with self._lock:
            if self._backward is None:
                self._backward = _Raw("backward", "work", "backward", None, now)
            filling = self._filling.get(flat.bucket.index)
            if filling is None:
                filling = self._filling[flat.bucket.index] = _Raw(
                    "backward", "filling", _label(flat), flat.bucket.index, now
                )
        with self._range(f"gradient {flat.names[slot]} (bucket {flat.bucket.index})"):
            yield
        filling.end = self._clock.mark(flat.device)

    def end_backward(self) -> None:
        """Close the spans of a backward."""
        with self._lock:
            backward, self._backward = self._backward, None
            filled, self._filling = list(self._filling.values()), {}
        if backward is not None:
            backward.end = self._clock.mark(self._device)
            self._current.spans += [backward, *filled]

    @contextmanager
    def update(self, flat: FlatBucket) -> Iterator[None]:
        """Measure the update of a shard."""
        span = _Raw("update", "work", _label(flat), flat.bucket.index, self._clock.mark(flat.device))
        with self._range(f"update {span.label}"):
            yield
        span.end = self._clock.mark(flat.device)
        self._current.spans.append(span)

    @contextmanager
    def launch(self, kind: str, flat: FlatBucket) -> Iterator[None]:
        """Name the launch of a collective."""
        with self._range(f"launch {kind} {_label(flat)}"):
            yield

    def launched(self, kind: str, flat: FlatBucket, pending: Pending) -> Any:
        """Measure a collective until it ends."""
        span = _Raw(kind, "flight", _label(flat), flat.bucket.index, self._clock.mark(flat.device))
        span.on_demand = pending.on_demand
        span.end = self._clock.completion(flat.device, pending)
        if span.end is None:
            pending.when_done(lambda: _end(span))
        self._current.spans.append(span)
        return span

    def block(self, kind: str, collective: Any, began_s: float, ended_s: float, busy_s: float, *, done: bool) -> None:
        """Note a wait of the host."""
        label, bucket = ("other ranks", None) if collective is None else (collective.label, collective.bucket)
        if collective is not None and done:
            _end(collective, ended_s)
        if busy_s > _SHORT_S:
            self._current.spans.append(_Raw(kind, "wait", label, bucket, began_s, ended_s, busy_s))

    def enqueue(self, kind: str, collective: Any, device: torch.device) -> Callable[[], object]:
        """Measure how long a device's stream stands still."""
        span = _Raw(kind, "wait", collective.label, collective.bucket, self._clock.mark(device))

        def done() -> None:
            span.end = self._clock.mark(device)
            self._current.spans.append(span)

        return done

    # Times that become known -----------------------------------------------------------------------------------------

    def _end_step(self, *_: Any) -> None:
        ended = self._current
        ended.end = self._clock.mark(self._device)
        self._backward = None  # one that failed half-way
        self._filling = {}
        self._current = _RawStep(next(self._numbers), ended.end)
        self._waiting.append(ended)
        self._settle()

    def _settle(self) -> None:
        """Turn marks into seconds, step by step, as far as devices and collectives have got."""
        while self._waiting:
            settled = self._seconds_of(self._waiting[0])
            if settled is None:
                return
            self._waiting.popleft()
            self._steps.append(settled)
            if self._sink is not None:
                record = {"kind": "step", "time": settled.end_s + self._to_unix_s, "step": settled.step}
                self._sink.write({**record, "rank": self.rank, "step_s": settled.seconds, "parts": settled.parts})

    def _seconds_of(self, raw: _RawStep) -> StepSpans | None:
        spans = []
        for span in raw.spans:
            begin_s, end_s = self._time(span.begin), self._time(span.end)
            if begin_s is None or end_s is None:
                return None
            spans.append(
                Span(
                    kind=span.kind,
                    role=span.role,
                    label=span.label,
                    bucket=span.bucket,
                    begin_s=begin_s,
                    end_s=end_s,
                    busy_s=end_s - begin_s if span.busy_s is None else span.busy_s,
                    on_demand=span.on_demand,
                )
            )
        begin_s, end_s = self._time(raw.begin), self._time(raw.end)
        if begin_s is None or end_s is None:
            return None
        ordered = tuple(sorted(spans, key=lambda span: span.begin_s))
        return StepSpans(step=raw.step, rank=self.rank, begin_s=begin_s, end_s=end_s, spans=ordered)

    def _time(self, mark: Mark | None) -> float | None:
        return None if mark is None else self._clock.seconds(mark)

    def _wait_for_devices(self) -> None:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for raw in self._waiting:  # what nobody has waited for is not over yet
            raw.spans = [span for span in raw.spans if span.end is not None]

    @contextmanager
    def _range(self, text: str) -> Iterator[None]:
        if self._ranges is None:
            yield
        else:
            with self._ranges.open(f"distadam {text}"):
                yield


class _Ranges:
    """Named ranges for whatever profiler is attached."""

    def __init__(self) -> None:
        self._nvtx = torch.cuda.is_available()

    @contextmanager
    def open(self, text: str) -> Iterator[None]:
        if self._nvtx:
            torch.cuda.nvtx.range_push(text)  # type: ignore[no-untyped-call]
        try:
            with torch.profiler.record_function(text):
                yield
        finally:
            if self._nvtx:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def _end(span: _Raw, moment_s: float | None = None) -> None:
    if span.end is None:
        span.end = time.monotonic() if moment_s is None else moment_s


def _label(flat: FlatBucket) -> str:
    names = flat.names
    shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} parameters)"
    return f"bucket {flat.bucket.index}: {shown}"


def timeline(optimizer: ShardedOptimizer, **options: Any) -> Timeline:
    """Watch where the time of each step goes; see `Timeline` for the options.

        with distadam.diagnostics.timeline(optimizer) as timeline:
            for batch in data:
                ...
        print(timeline)  # seconds by part, and how much communication was hidden
        timeline.save("trace.json")  # for ui.perfetto.dev

    Raises:
        UsageError: the optimizer has a timeline already.
    """
    return Timeline(optimizer, **options)
