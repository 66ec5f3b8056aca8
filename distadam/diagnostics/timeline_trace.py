"""Spans as a trace that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distadam.diagnostics.timeline_spans import Span, StepSpans

_THREAD = 1
_STEPS = 2


def trace_events(steps: Sequence[StepSpans], to_unix_s: float) -> list[dict[str, Any]]:
    """Return the steps of one rank as trace events; a rank is a process of the trace.

    Work and waits lie on one row, nested; collectives in flight and buckets that fill overlap, so each is an
    asynchronous event.

    Args:
        steps: of one rank.
        to_unix_s: what makes monotonic seconds unix time, so that the ranks of a host share an axis.
    """
    events: list[dict[str, Any]] = []
    ranks = {step.rank for step in steps}
    for rank in ranks:
        events += [_name("process_name", rank, 0, f"rank {rank}"), _name("process_sort_index", rank, 0, rank)]
        events += [_name("thread_name", rank, _THREAD, "work and waits"), _name("thread_name", rank, _STEPS, "steps")]
    number = 0
    for step in steps:
        place = {"ph": "X", "pid": step.rank, "tid": _STEPS, "cat": "step"}
        times = {"ts": _us(step.begin_s + to_unix_s), "dur": _us(step.seconds)}
        overlap = step.overlap
        events.append(
            {"name": f"step {step.step}", **place, **times, "args": {"overlap": overlap, "exposed_s": step.exposed_s}}
        )
        for span in step.spans:
            number += 1
            events += _events_of(span, step, number, to_unix_s)
    return events


def _events_of(span: Span, step: StepSpans, number: int, to_unix_s: float) -> list[dict[str, Any]]:
    verb = {"wait": "wait for ", "filling": "gradients of "}.get(span.role, "")
    name = f"{verb}{span.kind}" if span.role != "filling" else f"gradients of bucket {span.bucket}"
    if span.role != "filling" and span.bucket is not None:
        name += f" of bucket {span.bucket}"
    arguments = {"what": span.label, "step": step.step, "busy_s": span.busy_s}
    shared = {"name": name, "cat": span.kind, "pid": step.rank, "tid": _THREAD, "args": arguments}
    begin, end = _us(span.begin_s + to_unix_s), _us(span.end_s + to_unix_s)
    if span.role in ("work", "wait"):
        return [{**shared, "ph": "X", "ts": begin, "dur": end - begin}]
    identity = {"id": number, "id2": {"local": str(number)}}
    del identity["id"]
    return [{**shared, **identity, "ph": "b", "ts": begin}, {**shared, **identity, "ph": "e", "ts": end}]


def _name(kind: str, rank: int, thread: int, value: str | int) -> dict[str, Any]:
    key = "sort_index" if kind == "process_sort_index" else "name"
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {key: value}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def write_trace(path: Path, events: Sequence[dict[str, Any]]) -> None:
    """Write events to a file that both viewers open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms"}) + "\n")


def merge_traces(paths: Iterable[str | Path], to: str | Path) -> None:
    """Write the traces of several ranks as one, which begins at time 0.

    Ranks of different hosts are as far apart as their hosts' clocks are.
    """
    events = [event for path in paths for event in json.loads(Path(path).read_text())["traceEvents"]]
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] = round(event["ts"] - first, 3)
    write_trace(Path(to), events)
