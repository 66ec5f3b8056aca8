"""The timeline: what it says of a step, that it changes nothing, and that it leaves nothing behind.

Times are never compared with a clock: arithmetic is checked on spans that the test makes up, and of real steps which
spans there are, which lie inside which, and that seconds counted once add up to no more than the step. Bits with and
without a timeline are equal.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distadam
from distadam.comm import Clock, Pending, clock
from distadam.diagnostics import merge_traces, timeline
from distadam.diagnostics.timeline_spans import Span, StepSpans, exclusive, intersection, length, union
from distadam.errors import UsageError
from tests.ranks import run_ranks

NUM_STEPS = 3


def span(kind: str, role: str, begin: float, end: float, busy: float | None = None, on_demand: bool = False) -> Span:
    return Span(
        kind=kind,
        role=role,
        label=kind,
        bucket=0,
        begin_s=begin,
        end_s=end,
        busy_s=end - begin if busy is None else busy,
        on_demand=on_demand,
    )


def step_of(*spans: Span) -> StepSpans:
    return StepSpans(step=1, rank=0, begin_s=0.0, end_s=20.0, spans=spans)


# Arithmetic ----------------------------------------------------------------------------------------------------------


def test_intervals_count_each_moment_once() -> None:
    assert union([(3, 4), (0, 1), (1, 2), (0.5, 1.5)]) == [(0, 2), (3, 4)]
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    assert intersection([(0, 4), (6, 8)], [(1, 2), (3, 7)]) == [(1, 2), (3, 4), (6, 7)]


def test_parts_take_waits_out_of_what_contains_them() -> None:
    step = step_of(
        span("forward", "work", 0, 2),
        span("gather", "wait", 0.5, 1),
        span("backward", "work", 2, 8),
        span("reduce", "wait", 3, 4),
        span("agree", "wait", 8, 9),
        span("update", "work", 9, 13),
        span("reduce", "wait", 9, 13, busy=1.5),  # piece by piece
        span("gather", "wait", 13, 15),
        span("reduce", "flight", 3, 12),
        span("backward", "filling", 2, 5),
    )
    expected = {"forward": 1.5, "backward": 5.0, "reduce": 2.5, "update": 2.5, "gather": 2.5, "agree": 1.0}
    assert step.parts == pytest.approx(expected)
    assert step.seconds == 20


def test_a_region_and_the_part_of_its_name_are_one() -> None:
    spans = [span("backward", "work", 0, 6), span("backward", "work", 1, 6), span("reduce", "wait", 2, 3)]
    assert step_of(*spans).parts["backward"] == 5.0
    assert sum(seconds for _, seconds in exclusive(spans)) == 6.0


def test_overlap_is_the_share_of_communication_beside_other_work() -> None:
    flights = [span("reduce", "flight", 0, 6), span("reduce", "flight", 4, 8)]
    step = step_of(*flights, span("reduce", "wait", 6, 9), span("agree", "wait", 0, 6))
    assert (step.hidden_s, step.exposed_s) == (6, 3)
    assert step.overlap == pytest.approx(6 / 9)
    on_demand = step_of(span("reduce", "flight", 0, 8, on_demand=True), span("reduce", "wait", 6, 8))
    assert on_demand.overlap == 0.0
    assert step_of(span("update", "work", 0, 1)).overlap is None


# Real steps ----------------------------------------------------------------------------------------------------------


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def make(model: nn.Module, **options: Any) -> Any:
    comm = distadam.CommPolicy(bucket_mb=12000 / 2**20, timeout_s=20.0, **options)
    return distadam.AdamW(model.named_parameters(), lr=1e-2, comm=comm)


def one_step(rank: int, number: int, model: nn.Module, optimizer: Any) -> None:
    torch.manual_seed(100 * number + rank)
    model(torch.randn(5, 40)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def train(rank: int, model: nn.Module, optimizer: Any, num_steps: int = NUM_STEPS) -> list[torch.Tensor]:
    for number in range(num_steps):
        one_step(rank, number, model, optimizer)
    optimizer.flush()
    return [param.detach().clone() for param in model.parameters()]


def _watched(rank: int, reduce: str, prefetch: bool, folder: str) -> dict[str, Any]:
    plain = make_model()
    expected = train(rank, plain, make(plain, reduce=reduce))
    model = make_model()
    optimizer = make(model, reduce=reduce)
    if prefetch:
        optimizer.prefetch(model)
    records: list[dict[str, Any]] = []
    sink = type("Sink", (), {"write": staticmethod(records.append)})()
    with timeline(optimizer, sink=sink, first_step=7) as seen:
        after = train(rank, model, optimizer)
    seen.save(f"{folder}/trace-{rank}.json")
    same = all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    return {"same": same, "steps": seen.steps, "records": records, "text": str(seen), "overlap": seen.overlap}


def check_steps(answer: dict[str, Any], num_buckets: int, sends: bool) -> None:
    steps: list[StepSpans] = answer["steps"]
    assert [step.step for step in steps] == [7, 8, 9]
    for step in steps:
        counts = Counter((s.kind, s.role, s.bucket) for s in step.spans if s.role != "wait")
        assert counts["backward", "work", None] == 1
        for bucket in range(num_buckets):
            assert counts["update", "work", bucket] == 1
            assert counts["backward", "filling", bucket] == 1
            assert counts["reduce", "flight", bucket] == counts["gather", "flight", bucket] == int(sends)
        assert all(step.begin_s <= s.begin_s <= s.end_s for s in step.spans)
        assert all(s.end_s <= step.end_s for s in step.spans if s.role != "flight")
        assert 0 < sum(step.parts.values()) <= step.seconds * (1 + 1e-9)
        assert step.parts["backward"] > 0 < step.parts["update"]
    records = answer["records"]
    assert [record["step"] for record in records] == [7, 8, 9]
    assert all(record["kind"] == "step" and record["step_s"] > 0 for record in records)
    assert [record["parts"] for record in records] == [step.parts for step in steps]


@pytest.mark.parametrize("prefetch", [False, True])
def test_one_rank_shows_backward_and_updates_and_no_communication(prefetch: bool, tmp_path: Path) -> None:
    answer = _watched(0, "auto", prefetch, str(tmp_path))
    assert answer["same"]
    check_steps(answer, num_buckets=3, sends=False)
    assert answer["overlap"] is None
    assert "nothing was sent" in answer["text"]
    assert "update" in answer["text"]


@pytest.mark.parametrize(
    ("reduce", "prefetch"), [("shared", True), ("exchange", False), ("native", True), ("native", False)]
)
def test_two_ranks_show_every_bucket_on_its_way(reduce: str, prefetch: bool, tmp_path: Path) -> None:
    for rank, answer in enumerate(run_ranks(2, _watched, reduce, prefetch, str(tmp_path))):
        assert answer["same"]
        check_steps(answer, num_buckets=3, sends=True)
        for step in answer["steps"]:
            assert step.rank == rank
            flights = [s for s in step.spans if s.role == "flight"]
            assert all(s.on_demand == (reduce == "shared") for s in flights)
            reduced = [s.bucket for s in flights if s.kind == "reduce"]
            assert reduced == sorted(reduced)
            assert "0.weight" in {s.label for s in flights if s.bucket == 2}.pop()
            if reduce == "shared":
                assert step.hidden_s == 0 < step.exposed_s
        assert 0 <= answer["overlap"] <= 1
    merge_traces(sorted(tmp_path.glob("trace-*.json")), tmp_path / "all.json")
    check_trace(json.loads((tmp_path / "all.json").read_text()), num_ranks=2)


def check_trace(trace: dict[str, Any], num_ranks: int) -> None:
    events = trace["traceEvents"]
    named = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert named == {f"rank {rank}" for rank in range(num_ranks)}
    assert min(event["ts"] for event in events if "ts" in event) == 0
    begun = Counter((e["pid"], e["id2"]["local"]) for e in events if e["ph"] == "b")
    ended = Counter((e["pid"], e["id2"]["local"]) for e in events if e["ph"] == "e")
    assert begun == ended
    assert set(begun.values()) == {1}
    for rank in range(num_ranks):
        work = [e for e in events if e["ph"] == "X" and e["pid"] == rank and e["tid"] == 1]
        assert {"backward", "update of bucket 0", "update of bucket 2"} <= {e["name"] for e in work}
        around: list[float] = []
        for event in sorted(work, key=lambda e: (e["ts"], -e["dur"])):  # a viewer draws one row: events must nest
            while around and around[-1] <= event["ts"] + 0.01:
                around.pop()
            end = event["ts"] + event["dur"]
            assert not around or end <= around[-1] + 0.01
            around.append(end)


def test_waits_of_a_prefetching_model_belong_to_the_next_step(tmp_path: Path) -> None:
    answer = run_ranks(2, _watched, "shared", True, str(tmp_path))[0]
    first, second, _ = answer["steps"]
    forward_waits = [s for s in second.spans if s.role == "wait" and s.kind == "gather"]
    assert not [s for s in first.spans if s.role == "wait" and s.kind == "gather"]
    assert forward_waits
    backward = next(s for s in second.spans if s.kind == "backward" and s.role == "work")
    assert all(s.end_s <= backward.begin_s for s in forward_waits)


def test_regions_are_parts_and_backward_joins_the_optimizers_own() -> None:
    model = make_model()
    optimizer = make(model)
    with timeline(optimizer) as seen:
        with seen.region("forward"):
            loss = model(torch.randn(5, 40)).sum()
        with seen.region("backward"):
            loss.backward()
        optimizer.step()
    (step,) = seen.steps
    assert list(step.parts) == ["backward", "reduce", "update", "gather", "forward"]
    assert step.parts["forward"] > 0
    outer, inner = [s for s in step.spans if s.kind == "backward" and s.role == "work"]
    assert step.parts["backward"] == pytest.approx(outer.end_s - outer.begin_s)
    assert outer.begin_s <= inner.begin_s <= inner.end_s <= outer.end_s


# Off costs nothing ---------------------------------------------------------------------------------------------------


def _leftovers(optimizer: Any) -> dict[str, set[str]]:
    owners = (optimizer, optimizer._reducer, optimizer._stepper, optimizer._collectives, optimizer._gatherer)
    return {type(owner).__name__: {name for name, value in vars(owner).items() if callable(value)} for owner in owners}


def files_of_calls(function: Callable[[], Any]) -> Counter[str]:
    """Return how many Python functions of each file are entered while ``function`` runs."""
    files: Counter[str] = Counter()

    def on_event(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            files[Path(frame.f_code.co_filename).name] += 1

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def _cost_after(rank: int, num_ranks: int) -> None:
    model = make_model()
    optimizer = make(model)
    train(rank, model, optimizer)
    before, hooks = _leftovers(optimizer), len(optimizer._optimizer_step_post_hooks)

    def calls() -> Counter[str]:
        gc.collect()  # or what a collection calls is counted, too
        return files_of_calls(lambda: one_step(rank, 0, model, optimizer))

    calls()  # the first is another: caches fill
    plain = calls()
    seen = timeline(optimizer)
    with pytest.raises(UsageError, match="close the first"):
        timeline(optimizer)
    assert {"observe.py", "timeline.py"} <= calls().keys()
    assert _leftovers(optimizer) != before
    seen.close()
    seen.close()
    one_step(rank, 0, model, optimizer)
    after = calls()
    assert not {"observe.py", "timeline.py", "clock.py"} & (plain.keys() | after.keys())
    # How often ranks look for each other is chance; alone, every call is the same.
    assert num_ranks > 1 or after == plain
    assert _leftovers(optimizer) == before
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    gone = weakref.ref(seen)
    del seen
    gc.collect()
    assert gone() is None
    with timeline(optimizer) as again:
        one_step(rank, 0, model, optimizer)
    assert len(again.steps) == 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_closing_leaves_no_hook_and_no_call_behind(num_ranks: int) -> None:
    run_ranks(num_ranks, _cost_after, num_ranks)


def test_timeline_does_not_keep_an_optimizer_alive() -> None:
    model = make_model()
    optimizer = make(model)
    seen = timeline(optimizer)
    one_step(0, 0, model, optimizer)
    gone = weakref.ref(optimizer._reducer)
    del optimizer
    gc.collect()
    assert gone() is None
    seen.close()
    assert len(seen.steps) == 1


def test_profilers_see_ranges_with_buckets_and_parameters() -> None:
    model = make_model()
    optimizer = make(model)
    with timeline(optimizer), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(0, 0, model, optimizer)
    names = {event.name for event in profile.events()}
    assert "distadam update bucket 2: 0.bias ... 0.weight (2 parameters)" in names
    assert "distadam gradient 4.weight (bucket 0)" in names


# CUDA's clock, played ------------------------------------------------------------------------------------------------


class Device:
    """Streams that get as far as ``reached``; every record and wait is one more thing on a stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.reached = 0


class Event:
    device: Device

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        self.device.log.append(f"record on {stream}")
        self.place = len(self.device.log)

    def query(self) -> bool:
        return self.device.reached >= self.place

    def synchronize(self) -> None:
        self.device.reached = max(self.device.reached, self.place)

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.place - self.place)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    from contextlib import contextmanager

    played, current = Device(), ["main"]

    @contextmanager
    def stream(name: str) -> Any:
        current.append(name)
        yield
        current.pop()

    monkeypatch.setattr(Event, "device", played, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(clock.time, "monotonic", lambda: 50.0)
    return played


def test_cuda_marks_become_seconds_once_the_device_is_there(device: Device) -> None:
    cuda = torch.device("cuda", 0)
    watch = Clock([cuda])
    first, second = watch.mark(cuda), watch.mark(cuda)
    assert watch.seconds(first) is None
    device.reached = 2
    assert watch.seconds(first) == 51.0
    assert watch.seconds(second) is None
    assert watch.seconds(watch.mark(torch.device("cpu"))) == 50.0


def test_cuda_collectives_end_on_a_stream_that_waits_for_nothing_else(device: Device) -> None:
    class Work:
        def wait(self) -> bool:
            device.log.append(f"{torch.cuda.current_stream(0)} waits")
            return True

        def is_completed(self) -> bool:
            return False

    cuda = torch.device("cuda", 0)
    watch, pending = Clock([cuda]), Pending(Work())
    assert watch.completion(cuda, pending) is not None
    pending.wait()  # the engine's own wait is still to come, on its own stream
    assert device.log == ["record on main", "side waits", "record on side", "main waits"]
    assert watch.completion(torch.device("cpu"), pending) is None
