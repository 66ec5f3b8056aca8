"""Loops that lose ranks, get signals or end while they save: nothing is read twice, nothing left out, nothing lost.

Gradients are sums of sample numbers, exact in every order, so runs on other numbers of ranks have the same bits.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distadam
from distadam import ConfigError, checkpoint
from distadam.checkpoint import elastic, files
from tests.ranks import Pool, RanksFailed, run_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
SAMPLES, BATCH, STEPS = 50, 12, 30  # a batch that an epoch's end cuts, and that 1, 2, 3 and 4 ranks divide


def loop(rank: int, folder: str, kill: tuple[int, int] | None = None, pause: float = 0.0) -> list[float]:
    """Train with `elastic.run` and note what was read when; ``kill`` is (rank, step) of a SIGKILL to itself."""
    model = nn.Linear(5, 3)
    torch.nn.init.ones_(model.weight)
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7)
    batches = elastic.GlobalBatches(SAMPLES, BATCH, optimizer, seed=1)
    num_ranks = optimizer.checkpoint_access().collectives.groups.num_ranks
    extra = {"schedule": schedule, "batches": batches}
    weights = []
    for step in elastic.run(f"{folder}/checkpoints", model, optimizer, num_steps=STEPS, extra=extra, every=4):
        own = batches.next()
        with open(f"{folder}/read.{num_ranks}.{rank}.jsonl", "a") as file:
            file.write(json.dumps([step, own.tolist()]) + "\n")
        if kill == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        for param in model.parameters():
            param.grad = torch.full_like(param, float(own.sum()) * num_ranks / 64)
        optimizer.step()
        schedule.step()
        weights.append(float(model.weight.detach().sum()))
        time.sleep(pause)
    return weights


def as_script(rank: int, folder: str, kill: tuple[int, int], pause: float) -> None:
    """End the process when the loop fails, as a script would: its peers learn of it by that."""
    try:
        loop(rank, folder, kill, pause)
    except distadam.DistAdamError:
        os._exit(1)


def _reads(folder: Path, num_ranks: int) -> dict[int, list[int]]:
    """Return the samples that all ranks together read in each step that all of them began."""
    found: dict[int, list[list[int]]] = {}
    for path in folder.glob(f"read.{num_ranks}.*.jsonl"):
        for line in path.read_text().splitlines():
            step, own = json.loads(line)
            found.setdefault(step, []).append(own)
    return {step: sorted(itertools.chain(*parts)) for step, parts in found.items() if len(parts) == num_ranks}


def _expected() -> dict[int, list[int]]:
    order: list[int] = []
    for epoch in range(STEPS * BATCH // SAMPLES + 1):
        generator = torch.Generator().manual_seed(1_000_003 + epoch)
        order += torch.randperm(SAMPLES, generator=generator).tolist()
    return {step: sorted(order[step * BATCH : (step + 1) * BATCH]) for step in range(STEPS)}


def test_run_that_loses_a_rank_goes_on_with_the_rest(tmp_path: Path) -> None:
    pool = Pool(4)
    with pytest.raises(RanksFailed) as failure:
        pool.run(as_script, str(tmp_path), (2, 14), 0.01, timeout_s=60)
    assert {name for name, _ in failure.value.errors.values()} == {"Died"}
    (weights, *others) = run_ranks(3, loop, str(tmp_path))
    assert all(other == weights for other in others)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert weights == loop(0, str(whole))[-len(weights) :]
    first, second, expected = _reads(tmp_path, 4), _reads(tmp_path, 3), _expected()
    begin = min(second)
    assert 0 < begin <= 14
    assert {step: first[step] for step in range(begin)} | second == expected == _reads(whole, 1)


def test_global_batches_of_any_number_of_ranks_are_the_same(tmp_path: Path) -> None:
    assert len({tuple(map(tuple, _expected().values()))}) == 1
    model = nn.Linear(2, 2)
    optimizer = distadam.SGD(model.named_parameters())
    batches = elastic.GlobalBatches(10, 4, optimizer, shuffle=False)
    assert [batches.next().tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert batches.epoch == 1
    with pytest.raises(ConfigError, match="expected num_samples 11 but the checkpoint has 10"):
        elastic.GlobalBatches(11, 4, optimizer).load_state_dict(batches.state_dict())


def _signalled(rank: int, folder: str, number: int) -> tuple[list[int], int | None]:
    model = nn.Linear(2, 2)
    optimizer = distadam.SGD(model.named_parameters())
    done: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        for step in elastic.run(folder, model, optimizer, num_steps=6):
            done.append(step)
            if rank == 1 and step == 2:
                os.kill(os.getpid(), number)
    except SystemExit as stop:
        return done, int(str(stop.code))
    finally:
        assert signal.getsignal(signal.SIGTERM) is before
    return done, None


def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    assert run_ranks(2, _signalled, str(tmp_path), signal.SIGTERM) == [([0, 1, 2], 143)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]
    assert run_ranks(3, _signalled, str(tmp_path), 0) == [([3, 4, 5], None)] * 3


def test_sigusr1_to_one_rank_saves_and_goes_on(tmp_path: Path) -> None:
    assert run_ranks(2, _signalled, str(tmp_path), signal.SIGUSR1) == [([0, 1, 2, 3, 4, 5], None)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000006"]


def test_resume_passes_over_a_checkpoint_with_a_flipped_byte(tmp_path: Path) -> None:
    loop(0, str(tmp_path))
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.endswith("30")
    victim = next(Path(newest).glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(data)
    assert len(run_ranks(2, loop, str(tmp_path))[0]) == 2  # from step 28 on


def test_asynchronous_save_returns_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(20, 20)
    optimizer = distadam.AdamW(model.named_parameters())
    gate = tmp_path / "gate"
    write_item = files._ItemStream.write

    def gated(self: Any, data: Any) -> int:
        while not gate.exists():
            time.sleep(0.005)
        return write_item(self, data)

    monkeypatch.setattr(files._ItemStream, "write", gated)
    first = checkpoint.save(tmp_path / "a", model, optimizer, asynchronous=True)
    assert not first.done
    value = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()  # training goes on while nothing is written yet
    assert not (tmp_path / "a" / "commit.json").exists()
    gate.touch()
    second = checkpoint.save(tmp_path / "b", model, optimizer, asynchronous=True)
    assert first.done  # one in flight: the second waited for the first
    second.wait()
    assert (tmp_path / "b" / "commit.json").exists()
    checkpoint.load(tmp_path / "a", model, optimizer)
    assert torch.equal(model.weight, value)  # a copy of the moment of saving


SCRIPT = """
import os, signal, sys, time
import torch, distadam
from distadam.checkpoint import files
model = torch.nn.Linear(4, 4)
optimizer = distadam.AdamW(model.named_parameters())
plain = files._ItemStream.write
files._ItemStream.write = lambda self, data: (time.sleep(0.02), plain(self, data))[1]
distadam.checkpoint.save(sys.argv[1], model, optimizer, asynchronous=True)
if sys.argv[2] == "term":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.long
@pytest.mark.parametrize(("how", "code"), [("exit", 0), ("term", -signal.SIGTERM)])
def test_save_in_flight_is_finished_at_exit_and_sigterm(how: str, code: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a"), how]
    assert subprocess.run(command, env=environment, timeout=60).returncode == code
    checkpoint.verify(tmp_path / "a")
