"""Spans of one step, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Interval = tuple[float, float]

PARTS = ("backward", "reduce", "update", "gather")
"""What every step consists of, in order; "agree" and the caller's own regions come beside them."""

_JITTER_S = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took time.

    Attributes:
        kind: "backward", "reduce", "update", "gather", "agree" (hosts wait for each other), or a region's name.
        role: "work" (this thread or stream computed), "wait" (it waited for ``kind``), "flight" (a collective was under
            way beside it), "filling" (a bucket got its gradients).
        label: bucket and parameters, in words.
        bucket: its index; None where it is none's.
        begin_s: seconds of ``time.monotonic()``.
        end_s: likewise.
        busy_s: how much of it counts; less than the whole where a wait is spread over an update that reads piece by
            piece.
        on_demand: of a flight: nothing moved but while somebody waited.
    """

    kind: str
    role: str
    label: str
    bucket: int | None
    begin_s: float
    end_s: float
    busy_s: float
    on_demand: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpans:
    """One step: from the end of the step before to the end of this one.

    Attributes:
        step: its number.
        rank: whose it is.
        begin_s, end_s: seconds of ``time.monotonic()``.
        spans: in order of their beginning.
    """

    step: int
    rank: int
    begin_s: float
    end_s: float
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def seconds(self) -> float:
        """How long the step took, the caller's own work included."""
        return self.end_s - self.begin_s

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of this thread (CUDA: of its stream) by kind, each second counted once.

        "reduce", "gather" and "agree" are time that it spent waiting for them; "backward" and "update" exclude that.
        """
        parts = dict.fromkeys(PARTS, 0.0)
        for kind, seconds in exclusive(span for span in self.spans if span.role in ("work", "wait")):
            parts[kind] = parts.get(kind, 0.0) + seconds
        return parts

    @property
    def exposed_s(self) -> float:
        """Seconds in which this thread or stream waited for reductions and gathers."""
        return sum(span.busy_s for span in self.spans if span.role == "wait" and span.kind in ("reduce", "gather"))

    @property
    def hidden_s(self) -> float:
        """Seconds in which a reduction or gather was under way while this thread or stream did something else."""
        flights = [(s.begin_s, s.end_s) for s in self.spans if s.role == "flight" and not s.on_demand]
        waits = [(s.begin_s, s.end_s) for s in self.spans if s.role == "wait" and s.kind in ("reduce", "gather")]
        return length(flights) - length(intersection(flights, waits))

    @property
    def overlap(self) -> float | None:
        """The share of communication that cost no time, from 0 to 1; None without communication."""
        total = self.hidden_s + self.exposed_s
        return self.hidden_s / total if total > 0 else None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same moments as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Return how long the moments in ``intervals`` are together, each counted once."""
    return sum(end - begin for begin, end in union(intervals))


def intersection(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Return the moments that both have."""
    ones, others = union(first), union(second)
    found: list[Interval] = []
    one = other = 0
    while one < len(ones) and other < len(others):
        begin, end = max(ones[one][0], others[other][0]), min(ones[one][1], others[other][1])
        if begin < end:
            found.append((begin, end))
        if ones[one][1] < others[other][1]:
            one += 1
        else:
            other += 1
    return found


def exclusive(spans: Iterable[Span]) -> list[tuple[str, float]]:
    """Return for each span its kind and its busy seconds without those of the spans inside it."""
    ordered = sorted(spans, key=lambda span: (span.begin_s, -span.end_s))
    left = [span.busy_s for span in ordered]
    around: list[int] = []
    for number, span in enumerate(ordered):
        while around and ordered[around[-1]].end_s < span.end_s - _JITTER_S:
            around.pop()
        while around and ordered[around[-1]].end_s <= span.begin_s:
            around.pop()
        if around:
            left[around[-1]] -= span.busy_s
        around.append(number)
    return [(span.kind, max(0.0, seconds)) for span, seconds in zip(ordered, left, strict=True)]


def mean_parts(steps: Sequence[StepSpans]) -> dict[str, float]:
    """Return the mean seconds of each part over ``steps``."""
    totals: dict[str, float] = {}
    for step in steps:
        for kind, seconds in step.parts.items():
            totals[kind] = totals.get(kind, 0.0) + seconds
    return {kind: seconds / max(1, len(steps)) for kind, seconds in totals.items()}
