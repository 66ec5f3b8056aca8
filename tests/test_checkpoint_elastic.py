"""Loops that lose ranks, get signals or end while they save: nothing is read twice, nothing left out, nothing lost.

Gradients are sums of sample numbers, exact in every order, so runs on other numbers of ranks have the same bits.
"""

import json
import os
import signal
import socket
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
from tests.elastic_runs import KILL_AT, expected_reads, loop, notes, reads
from tests.ranks import Pool, RanksFailed, run_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]


def as_script(rank: int, folder: str, kill: tuple[int, int], pause: float) -> None:
    """End the process when the loop fails, as a script would: its peers learn of it by that."""
    try:
        loop(rank, folder, kill, pause)
    except distadam.DistAdamError:
        os._exit(1)


def test_run_that_loses_a_rank_goes_on_with_the_rest(tmp_path: Path) -> None:
    pool = Pool(4)
    with pytest.raises(RanksFailed) as failure:
        pool.run(as_script, str(tmp_path), (2, KILL_AT), 0.01, timeout_s=60)
    assert {name for name, _ in failure.value.errors.values()} == {"Died"}
    (weights, *others) = run_ranks(3, loop, str(tmp_path))
    assert all(other == weights for other in others)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert weights == loop(0, str(whole))[-len(weights) :]
    first, second, expected = reads(tmp_path, 4), reads(tmp_path, 3), expected_reads()
    begin = min(second)
    assert 0 < begin <= KILL_AT
    assert {step: first[step] for step in range(begin)} | second == expected == reads(whole, 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _agents(folder: Path, victim: int, host: int, share_store: str) -> list[subprocess.Popen[str]]:
    """Start four torchrun agents of one rank each that meet on loopback; any number from one on may go on."""
    endpoint = f"127.0.0.1:{_free_port()}"
    agents = []
    for number in range(4):
        conf = {"is_host": int(number == host), "last_call_timeout": 2, "join_timeout": 60}
        conf |= {"keep_alive_interval": 1, "keep_alive_max_attempt": 3}
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node", "1"]
        command += ["--max-restarts", "3", "--monitor-interval", "0.2", "--rdzv-backend", "c10d", "--rdzv-id", "lost"]
        command += ["--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
        command += ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in conf.items())]
        command += ["-m", "tests.elastic_runs", str(folder)]
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": share_store}
        environment |= {"VICTIM": "1"} if number == victim else {}
        with (folder / f"agent.{number}.log").open("w") as log:
            agents.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, text=True))
    return agents


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("victim", "host"), [(2, 0), (0, 1)])
def test_torchrun_goes_on_with_three_ranks_when_one_of_four_is_killed(victim: int, host: int, tmp_path: Path) -> None:
    agents = _agents(tmp_path, victim, host, "1")
    try:
        codes = [agent.wait(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = "\n".join(path.read_text()[-4000:] for path in sorted(tmp_path.glob("agent.*.log")))
    assert codes == [-signal.SIGKILL if number == victim else 0 for number in range(4)], said

    first, second = reads(tmp_path, 4), reads(tmp_path, 3)
    begin = min(second)
    assert 0 < begin <= KILL_AT
    assert {step: first[step] for step in range(begin)} | second == expected_reads()

    run_ranks(3, loop, str(tmp_path / "found.3"))  # not interrupted, from the checkpoint that was found
    assert notes(tmp_path / "found.3", 3) == notes(tmp_path, 3)  # losses bit by bit

    whole = tmp_path / "whole"
    whole.mkdir()
    weights = loop(0, str(whole))
    for rank in range(3):
        assert json.loads((tmp_path / f"weights.3.{rank}.json").read_text()) == weights[begin:]


@pytest.mark.parametrize(
    ("shared", "restarts", "warned"), [("True", "3", True), ("True", "0", False), ("False", "3", False)]
)
def test_store_that_torchrun_shares_between_groups_is_warned_of(
    shared: str, restarts: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    optimizer = distadam.SGD(nn.Linear(2, 2).parameters())
    assert list(elastic.run(tmp_path, None, optimizer, num_steps=1)) == [0]
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) is warned


def test_global_batches_of_any_number_of_ranks_are_the_same(tmp_path: Path) -> None:
    assert len({tuple(map(tuple, expected_reads().values()))}) == 1
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
