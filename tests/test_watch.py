"""`diagnostics.watch` says what steps do, finds the first NaN and costs nothing once closed; sinks write all of it.

Statistics are float64 sums of fp32 norms: within 1e-5 of what torch computes from the same full tensors.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from distadam import MissingDependency, PrecisionPolicy, RankMismatchError, diagnostics
from distadam.diagnostics.nonfinite import FirstNonFinite, describe
from tests.ranks import run_ranks
from tests.test_counted import count_python_calls
from tests.test_inspect_faults import CLASSES, KB, Net, build, drop_reduction, loss_of

STATES = {
    "adamw": {"exp_avg_rms": "exp_avg", "exp_avg_sq_mean": "exp_avg_sq"},
    "sgd": {"momentum_buffer_rms": "momentum_buffer"},
    "rmsprop": {"square_avg_mean": "square_avg"},
}


class Kept:
    """A sink that keeps records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(dict(record))

    def close(self) -> None:
        self.closed = True


def watched(rank: int, rule: str) -> list[str]:
    torch.manual_seed(0)
    model = Net()
    extra = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = CLASSES[rule](model.named_parameters(), lr=1e-2, comm=KB, **extra)
    sink, wrong, norms = Kept(), [], []
    with diagnostics.watch(optimizer, every=2, sinks=[sink]) as watcher:
        for step in range(1, 5):
            loss_of(model, rank, step).backward()
            if step == 4:
                optimizer.clip_grad_norm_(0.1)
            grads = {name: optimizer.full_grad(name).clone() for name, _ in model.named_parameters()}
            before = {name: param.detach().clone() for name, param in model.named_parameters()}
            optimizer.step()
            watcher.log(loss=float(step))
            norms.append(float(optimizer.grad_norm))
    full = optimizer.full_state_dict(to=None)["state"]
    for number, (name, param) in enumerate(model.named_parameters()):
        change = (param.detach() - before[name]).norm()
        expected = {
            "grad_norm": grads[name].norm(),
            "grad_max": grads[name].abs().max(),
            "grad_zeros": (grads[name] == 0).float().mean(),
            "grad_nonfinite": 0,
            "update_ratio": change / param.detach().norm(),
            "effective_lr": change / grads[name].norm(),
        }
        for key, state in STATES[rule].items():
            value = full[number][state]
            expected[key] = value.mean() if key.endswith("_mean") else value.square().mean().sqrt()
        for key, value in expected.items():
            got = watcher.parameters[name][key]
            if got != pytest.approx(float(value), rel=1e-4, abs=1e-12):
                wrong.append(f"{name} {key}: {got} instead of {float(value)}")
    kinds = [record["kind"] for record in sink.records]
    expected_kinds = ["run", "step", "step", "parameters", "step", "step", "parameters"]
    if kinds != [kind for kind in expected_kinds if rank == 0 or kind != "parameters"]:
        wrong.append(f"{kinds}")
    steps = [record for record in sink.records if record["kind"] == "step"]
    if [record["loss"] for record in steps] != [1, 2, 3, 4] or [record["grad_norm"] for record in steps] != norms:
        wrong.append(f"{steps}")
    if not sink.closed or watcher.incidents:
        wrong.append(f"{watcher.incidents}")
    return wrong


@pytest.mark.parametrize("rule", STATES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_watch_says_what_the_step_did(num_ranks, rule):
    assert run_ranks(num_ranks, watched, rule) == [[]] * num_ranks


def first_nan(rank: int, bad_ranks: tuple[int, ...]) -> tuple[list[str], list[dict[str, Any]]]:
    model, optimizer = build()
    sink = Kept()
    with diagnostics.watch(optimizer, every=10, sinks=[sink]) as watcher:
        for step in range(1, 5):
            loss = loss_of(model, rank, step)
            if step == 3 and rank in bad_ranks:
                loss = loss + (model.second.weight[1, 4] * math.inf) * 0.0
            loss.backward()
            optimizer.step()
    return watcher.incidents, [record for record in sink.records if record["kind"] == "incident"]


def test_first_nonfinite_gradient_is_named_with_rank_step_and_element():
    answers = run_ranks(2, first_nan, (1,))
    for incidents, _ in answers:
        assert incidents == [
            "step 3: second.weight[1, 4] on rank 1 is nan, 1 of its elements are not finite; no other rank had one"
        ]
    assert answers[0][1] == []
    record = answers[1][1][0]
    assert (record["what"], record["step"], record["rank"]) == ("nonfinite_gradient", 3, 1)


def test_first_nonfinite_gradient_says_that_other_ranks_had_one():
    for incidents, _ in run_ranks(2, first_nan, (0, 1)):
        assert incidents[0].startswith("step 3: second.weight[1, 4] on rank 0 is nan")
        assert incidents[0].endswith("rank 1 had one too")


def test_first_nonfinite_element_is_found_without_waiting_for_a_device():
    _, optimizer = build()
    looked = FirstNonFinite()
    for flat in optimizer._flats:  # in order: "gain" first, then the layers from the last one on
        full = torch.zeros(flat.bucket.numel)
        if "second.weight" in flat.names:
            flat.unflatten(full, flat.names.index("second.weight"))[1, 4] = math.inf
        if "first.weight" in flat.names:
            flat.unflatten(full, flat.names.index("first.weight")).fill_(math.nan)
        looked._look_there(flat, full)
    taken = looked.take()
    assert describe([taken.read(), None]) == "second.weight[1, 4] on rank 0 is inf; no other rank had one"
    assert looked.take().read() is None


def test_closed_watcher_leaves_no_hook_and_costs_nothing():
    model, optimizer = build()

    def step() -> None:
        loss_of(model, 0).backward()
        optimizer.step()

    for _ in range(4):
        step()
    before = count_python_calls(step)
    hooks = [len(param._backward_hooks or ()) for param in model.parameters()]
    watcher = diagnostics.watch(optimizer, every=1)
    assert count_python_calls(step) > before
    watcher.close()
    watcher.close()
    assert [len(param._backward_hooks or ()) for param in model.parameters()] == hooks
    assert len(optimizer._observers) == 0
    assert optimizer._reducer.inspect is None
    step()
    assert count_python_calls(step) == before


def test_watch_changes_no_bit():
    results = []
    for watches in (False, True):
        model, optimizer = build()
        watcher = diagnostics.watch(optimizer, every=1) if watches else None
        for step in range(3):
            loss_of(model, 0, step).backward()
            optimizer.step()
        if watcher is not None:
            watcher.close()
        results.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*results)


def test_watch_follows_16_bit_storages():
    params = [torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))]
    optimizer = CLASSES["adamw"](params, lr=1e-2, precision=PrecisionPolicy(master="split", moments="8bit"))
    with diagnostics.watch(optimizer, every=1) as watcher:
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    values = watcher.parameters["param.0"]
    assert values["grad_norm"] == pytest.approx(300**0.5, rel=1e-6)
    assert values["exp_avg_rms"] == pytest.approx(0.1, rel=0.15)


def test_jsonl_sink_writes_valid_json_for_numbers_that_are_not_finite(tmp_path: Path):
    model, optimizer = build()
    with diagnostics.watch(optimizer, every=1, run=tmp_path) as watcher:
        loss_of(model, 0).backward()
        optimizer.step()
        watcher.log(loss=math.nan, parts={"backward": math.inf})
        watcher.write("checkpoint", path="x", seconds=1.0, bytes=2)
    lines = (tmp_path / "rank-0.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in lines]
    assert [record["kind"] for record in records] == ["run", "checkpoint", "step", "parameters"]
    assert (records[2]["loss"], records[2]["parts"]) == ("nan", {"backward": "inf"})
    assert records[2]["memory"]["moments"] > 0


def test_live_table_shows_parameters_and_incidents():
    console = Console(record=True, width=140, force_terminal=False, file=io.StringIO())
    table = diagnostics.LiveTable(console)
    table.write({"kind": "step", "step": 7, "loss": 1.5, "time": 0.0})
    table.write({"kind": "incident", "step": 7, "what": "x", "detail": "w[0] is nan", "time": 0.0})
    table.write({"kind": "parameters", "step": 7, "parameters": {"w": {"grad_norm": 2.5, "update_ratio": 0.25}}})
    table.close()
    text = console.export_text()
    assert all(part in text for part in ("step 7", "loss 1.5", "w[0] is nan", "2.5", "0.25"))


def test_prometheus_sink_sets_gauges_and_counts_incidents():
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    sink = diagnostics.PrometheusSink(rank=1, registry=registry)
    sink.write({"kind": "step", "step": 3, "rank": 1, "loss": 2.0, "lr": [0.5], "time": 0.0})
    sink.write({"kind": "parameters", "step": 3, "parameters": {"w": {"grad_norm": 4.0}}, "time": 0.0})
    sink.write({"kind": "incident", "step": 3, "rank": 1, "what": "nan", "detail": "", "time": 0.0})
    value = registry.get_sample_value
    assert value("distadam_loss", {"rank": "1", "label": ""}) == 2.0
    assert value("distadam_lr", {"rank": "1", "label": "0"}) == 0.5
    assert value("distadam_parameter_grad_norm", {"rank": "1", "parameter": "w"}) == 4.0
    assert value("distadam_incidents_total", {"rank": "1", "what": "nan"}) == 1.0
    sink.close()
    assert value("distadam_loss", {"rank": "1", "label": ""}) is None


def test_tensorboard_sink_writes_event_files(tmp_path: Path):
    pytest.importorskip("tensorboard")
    sink = diagnostics.TensorBoardSink(tmp_path, rank=0)
    sink.write({"kind": "step", "step": 3, "rank": 0, "loss": 2.0, "time": 1.0})
    sink.write({"kind": "parameters", "step": 3, "parameters": {"w": {"grad_norm": 4.0}}, "time": 1.0})
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "rank-0"))
    events.Reload()
    assert [event.value for event in events.Scalars("step/loss")] == [2.0]
    assert [event.value for event in events.Scalars("grad_norm/w")] == [4.0]


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    for module in ("prometheus_client", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=r"pip install 'distadam\[prometheus\]'"):
        diagnostics.PrometheusSink()
    with pytest.raises(MissingDependency, match=r"pip install 'distadam\[tensorboard\]'"):
        diagnostics.TensorBoardSink("x")


def compared(rank: int, rule: str, fault: bool) -> str:
    torch.manual_seed(0)
    model = Net()
    optimizer = CLASSES[rule](model.named_parameters(), lr=1e-2, comm=KB)
    before = torch._fused_adamw_
    if fault:
        os.environ["DISTADAM_KERNEL"] = "torch_fused"
        torch._fused_adamw_ = lambda *args, **kwargs: before(*args, **(kwargs | {"beta2": 0.9}))
    try:
        return str(
            diagnostics.compare_with_torch(
                optimizer, model, lambda step: loss_of(model, rank, step), steps=6, clip_norm=0.5, raises=False
            )
        )
    finally:
        torch._fused_adamw_ = before
        os.environ.pop("DISTADAM_KERNEL", None)


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compare_with_torch_finds_no_difference_where_there_is_none(num_ranks, rule):
    assert all(text.startswith("6 steps as torch.optim") for text in run_ranks(num_ranks, compared, rule, False))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compare_with_torch_stops_at_first_step_parameter_and_element(num_ranks):
    for text in run_ranks(num_ranks, compared, "adamw", True):
        assert text.startswith("step 2, parameter gain[0] on rank 0: ")  # at step 1 the correction cancels beta2
        assert "where torch.optim has" in text


def unreduced(rank: int) -> str:
    model, optimizer = build()
    drop_reduction(optimizer, rank)
    return str(diagnostics.compare_with_torch(optimizer, model, lambda step: loss_of(model, rank, step), raises=False))


def test_compare_with_torch_stops_at_a_gradient_that_was_not_reduced():
    for text in run_ranks(2, unreduced):
        assert text.startswith("step 1, gradient ")
        assert "where the average of the ranks' own is" in text


def watches_differently(rank: int) -> str:
    _, optimizer = build()
    with pytest.raises(RankMismatchError) as caught:
        diagnostics.watch(optimizer, every=2 + rank)
    return str(caught.value)


def test_watching_differently_is_an_error_on_every_rank():
    for text in run_ranks(2, watches_differently):
        assert "a check of distadam.diagnostics" in text
