"""Ranks that differ say so: the hash that rides on the agreement, and where ranks stand when one of them hangs.

Faults are planted on one rank only. What is compared are names, ranks and steps in messages; no tolerance. The hang is
real: processes under `distadam launch` with a timeout of some seconds; what is said is checked, never a time.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distadam import CommError, RankMismatchError, UsageError, diagnostics
from distadam.cli.wait_page import merge, read_dumps
from distadam.engine import dumps
from tests.ranks import run_ranks
from tests.test_inspect_faults import build, loss_of


def train(rank: int, fault: str, num_steps: int = 6) -> tuple[int, str, list[float]]:
    """Return the steps that were taken, what was raised, and the parameters after it."""
    model, optimizer = build()
    check = diagnostics.check_ranks(optimizer, every=1) if fault in ("bit", "stale") else None
    calls = dict(optimizer.comm_stats.calls)
    odd = rank == 1
    for step in range(1, num_steps + 1):
        loss_of(model, rank, step).backward()
        if step == 4 and fault == "bit":
            dist.barrier()  # a rank may be done with a step whose result its peers still read from its memory
        if step == 4 and odd:
            plant(fault, model, optimizer)
        before = torch.cat([param.detach().flatten() for param in model.parameters()])
        try:
            optimizer.step()
        except RankMismatchError as error:
            after = torch.cat([param.detach().flatten() for param in model.parameters()])
            assert torch.equal(before, after)  # no rank has taken the step
            return step - 1, str(error), after.tolist()
        if fault == "order" and step == 4 and odd:
            optimizer._reducer._plan.reverse()
    agreements = optimizer.comm_stats.calls.get("agree", 0) - calls.get("agree", 0)
    assert agreements == (0 if optimizer.layout.num_shards == 1 else num_steps)  # no collective was added
    if check is not None:
        check.close()
    return num_steps, "", torch.cat([param.detach().flatten() for param in model.parameters()]).tolist()


def plant(fault: str, model: Any, optimizer: Any) -> None:
    if fault == "lr":
        optimizer.param_groups[0]["lr"] = 0.02
    elif fault == "betas":
        optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    elif fault == "tensor lr":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    elif fault == "bit":
        model.second.weight.data.view(-1).view(torch.int32).numpy()[7] ^= 1 << 20
    elif fault == "stale":
        flat = optimizer._flats[0]
        kept, original = flat.param_flat.clone(), optimizer._gatherer.wait

        def wait(bucket: int) -> None:
            original(bucket)
            if bucket == 0:
                mine = flat.param_shard.clone()
                flat.param_flat.copy_(kept)
                flat.param_shard.copy_(mine)

        optimizer._gatherer.wait = wait


SAID = {
    "lr": (
        3,
        "ranks differ since step 4: group 0: lr: expected the same on every rank but got 0.01 on",
        "0.02 on rank 1",
    ),
    "betas": (3, "ranks differ since step 4: group 0: betas", "[0.9, 0.99] on rank 1"),
    "tensor lr": (3, "ranks differ since step 4: group 0: lr", "0.5 on rank 1"),
    "order": (5, "ranks differ since step 6: order of reductions in step 5", "on rank 1"),
    "bit": (
        3,
        "ranks differ since step 4: parameters differ before step 4 (they were the same before step 3): "
        "second.weight[0, 7]: expected the same bits on every rank",
        "one bit of one element is flipped",
    ),
    "stale": (
        4,
        "parameters differ before step 5 (they were the same before step 4)",
        "rank 1 still has what was there",
    ),
}


@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_what_one_rank_does_differently_is_named_on_all_with_its_step(num_ranks: int, fault: str) -> None:
    steps, *said = SAID[fault]
    for taken, text, _ in run_ranks(num_ranks, train, fault):
        assert taken == steps
        assert all(part in text for part in said), text
        assert f"No rank has taken step {steps + 1}" in text


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_equal_ranks_are_not_told_apart(num_ranks: int) -> None:
    answers = run_ranks(num_ranks, train, "") + run_ranks(num_ranks, train, "bit" if num_ranks == 1 else "")
    assert [text for _, text, _ in answers] == [""] * len(answers)


def goes_on(rank: int) -> list[str]:
    model, optimizer = build()
    said = []
    for step in range(1, 5):
        loss_of(model, rank, step).backward()
        optimizer.param_groups[0]["lr"] = 0.02 if step == 2 and rank == 1 else 0.01
        try:
            optimizer.step()
            said.append("")
        except RankMismatchError as error:
            said.append(str(error))
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
    return said


def test_training_goes_on_once_ranks_are_alike_again() -> None:
    for said in run_ranks(2, goes_on):
        assert [bool(text) for text in said] == [False, True, False, False]


def checked_every(rank: int) -> tuple[str, str]:
    model, optimizer = build()
    with diagnostics.check_ranks(optimizer, every=3) as check:
        with pytest.raises(UsageError, match="check_ranks"):
            diagnostics.check_ranks(optimizer)
        for step in range(1, 6):
            loss_of(model, rank, step).backward()
            optimizer.step()
        dist.barrier()
        if rank == 1:
            model.gain.data.view(torch.int32).numpy()[2] ^= 1
        loss_of(model, rank, 6).backward()
        try:
            optimizer.step()
        except RankMismatchError as error:
            text = str(error)
        assert check.checked == 3
    optimizer.step()  # nothing looks any more, and the gather heals what rank 0 owns
    with pytest.raises(RankMismatchError) as caught:
        diagnostics.check_ranks(optimizer, every=1 + rank)
    return text, str(caught.value)


def test_parameters_are_checked_every_so_many_steps() -> None:
    for text, other in run_ranks(2, checked_every):
        assert "parameters differ before step 6 (they were the same before step 3): gain[2]: expected" in text
        assert "a check of distadam.diagnostics" in other


# Where ranks stand ----------------------------------------------------------------------------------------------------


def stands(rank: int) -> dict[str, Any]:
    """Look at a rank in the middle of backward, from its own hook."""
    model, optimizer = build()
    seen: list[Any] = []
    loss_of(model, rank, 1, gain=rank == 0).backward()
    optimizer.step()
    model.first.weight.register_hook(lambda grad: seen.append(optimizer.wait_report()))
    loss_of(model, rank, 2, gain=rank == 0).backward()
    optimizer.step()
    return {"in backward": seen[0].as_dict(), "after": optimizer.wait_report().as_dict()}


def test_wait_report_names_what_has_not_come() -> None:
    for rank, found in enumerate(run_ranks(2, stands)):
        report = found["in backward"]
        assert report["step"] == 2
        missing = set(report["never_ready"])
        assert "first.weight" in missing
        assert ("gain" in missing) == (rank == 1)
        assert {"second.weight", "second.bias"}.isdisjoint(missing)
        assert any(bucket["state"].startswith("waits for gradients of") for bucket in report["buckets"])
        assert "test_desync.py" in report["at"]
        assert found["after"]["never_ready"] == []


def test_wait_report_keeps_no_optimizer_alive() -> None:
    model, optimizer = build()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        assert optimizer.wait_report().never_ready == ()
        del model, optimizer
        assert gone() is None
    finally:
        gc.enable()


HANGS = """
    import time
    import torch
    from torch import nn
    import distadam

    run = distadam.init_process_group()
    first, second, gain = nn.Linear(6, 16), nn.Linear(16, 3), nn.Parameter(torch.ones(3))
    named = [("first.weight", first.weight), ("second.weight", second.weight), ("gain", gain)]
    optimizer = distadam.AdamW(named, comm=distadam.CommPolicy(bucket_mb=1 / 4096, timeout_s={timeout_s}))

    def hang_here(grad):
        time.sleep(1000)

    for step in range(3):
        y = second(torch.tanh(first(torch.ones(8, 6))))
        if run.rank == 1 and step == 2:
            first.weight.register_hook(hang_here)
        else:
            y = y * gain
        y.square().mean().backward()
        optimizer.step()
"""


STOPPED = """
    import time
    import torch
    import distadam

    weight, gain = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = distadam.SGD([("weight", weight), ("gain", gain)], lr=0.1)

    def hang_here(grad):
        print("hangs", flush=True)
        time.sleep(1000)

    weight.register_hook(hang_here)
    (weight.exp() * gain).sum().backward()  # the gradient of gain comes first
"""


def test_rank_that_hangs_writes_where_it_stands_when_it_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(STOPPED)]
    environment = os.environ | {"DISTADAM_DUMPS": str(tmp_path), "RANK": "3"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    dump = json.loads((tmp_path / "waits.3.json").read_text())
    assert (dump["rank"], dump["reason"]) == (3, "")
    report = dump["optimizers"][0]
    assert " in hang_here" in report["at"]
    assert report["never_ready"] == ["weight"]


def test_failed_collective_is_logged_and_under_the_launcher_written(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("DISTADAM_DUMPS", raising=False)
    _, optimizer = build()
    report = optimizer.wait_report()
    dumps.failed(CommError("timed out"), report)
    assert "where this rank stands: rank 0 of 1, step 0" in caplog.text
    monkeypatch.setenv("DISTADAM_DUMPS", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    dumps.failed(CommError("timed out"), report)
    page = merge(read_dumps(tmp_path))
    assert "rank 0: timed out" in page
    assert "nothing has come yet on rank 0" in page


@pytest.mark.long
def test_launch_shows_where_ranks_stood_when_one_hangs_in_backward(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(HANGS).format(timeout_s=15.0))
    command = [
        sys.executable,
        "-m",
        "distadam",
        "launch",
        "--nproc",
        "2",
        "--log-dir",
        str(tmp_path / "logs"),
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    page = (tmp_path / "logs" / "waits.txt").read_text()
    assert page in done.stderr
    assert "rank 0: agree of the agreement before step() on rank 0 of 2 failed" in page
    assert "rank 1: was ended; until then it had raised nothing" in page
    assert "rank 1: step 3, at " in page
    assert " in hang_here" in page
    assert "waits for gradients of gain on rank 1" in page
    assert "never ready on rank 1: gain, first.weight" in page
    found = [json.loads((tmp_path / "logs" / f"waits.{rank}.json").read_text()) for rank in range(2)]
    assert [dump["rank"] for dump in found] == [0, 1]
    assert any("hang_here" in frame for frame in found[1]["optimizers"][0]["stack"])


def test_page_puts_ranks_and_buckets_that_are_alike_together() -> None:
    def dump(rank: int, states: list[str], missing: list[str]) -> dict[str, Any]:
        buckets = [{"bucket": index, "state": state, "missing": []} for index, state in enumerate(states)]
        report = {"step": 7, "at": "train.py:3 in main", "buckets": buckets, "never_ready": missing}
        return {"rank": rank, "attempt": 0, "reason": "timed out" if rank != 2 else "", "optimizers": [report]}

    told = [dump(rank, ["reduced", "reduced", "waits"], []) for rank in (0, 1, 3)]
    told.insert(2, dump(2, ["reduced", "reduced", "other"], [f"w{n}" for n in range(9)]))
    assert merge(told).splitlines()[1:] == [
        "  ranks 0, 1, 3: timed out",
        "  rank 2: was ended; until then it had raised nothing",
        "  ranks 0 to 3: step 7, at train.py:3 in main",
        "  buckets 0, 1: reduced on ranks 0 to 3",
        "  bucket 2: waits on ranks 0, 1, 3; other on rank 2",
        "  never ready on rank 2: w0, w1, w2, w3, w4, w5 and 3 more",
    ]
