"""Hosts on a network that is slow, cut for a while, or cut for good: every sample is read once, weights are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts_of_two import WAYS
from tests.cluster.netns import PORT, Hosts, missing
from tests.elastic_runs import STEPS, expected_reads, loop, reads

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    if missing():
        pytest.skip(missing())
    with Hosts(getattr(request, "param", 2)) as started:
        yield started


@pytest.fixture
def start(hosts: Hosts, tmp_path: Path) -> Iterator[Start]:
    agents: list[subprocess.Popen[str]] = []

    def start_all(nnodes: str, **environment: str) -> list[subprocess.Popen[str]]:
        script = ("-m", "tests.elastic_runs", str(tmp_path))
        for index in range(hosts.num_hosts):
            log = tmp_path / f"agent.{index}.log"
            agents.append(hosts.torchrun(index, log, nnodes, *script, **environment))
        return agents

    yield start_all
    for agent in agents:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


def said(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("agent.*.log")))


def reach(folder: Path, num_ranks: int, step: int) -> None:
    """Wait until all of so many ranks have begun a step."""
    ends = time.monotonic() + 90
    while max(reads(folder, num_ranks), default=-1) < step:
        assert time.monotonic() < ends, said(folder)
        time.sleep(0.1)


def check(folder: Path, num_ranks: int, begin: int = 0) -> None:
    """Compare weights with those of one process that reads the same samples; sums are exact in every order."""
    (folder / "whole").mkdir()
    weights = loop(0, str(folder / "whole"))
    for rank in range(num_ranks):
        assert json.loads((folder / f"weights.{num_ranks}.{rank}.json").read_text()) == weights[begin:]


@pytest.mark.parametrize("hosts", [2, 4], indirect=True)
def test_hosts_train_over_a_network(hosts: Hosts, start: Start, tmp_path: Path) -> None:
    agents = start(str(hosts.num_hosts))
    assert [agent.wait(timeout=150) for agent in agents] == [0] * hosts.num_hosts, said(tmp_path)
    assert reads(tmp_path, hosts.num_hosts) == expected_reads()
    check(tmp_path, hosts.num_hosts)


def test_a_host_that_sends_slowly_holds_up_the_others_and_nothing_else(
    hosts: Hosts, start: Start, tmp_path: Path
) -> None:
    hosts.slow(1, "tbf", "rate", "200kbit", "burst", "4kb", "latency", "400ms")  # drops what is more
    agents = start("2")
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], said(tmp_path)
    assert reads(tmp_path, 2) == expected_reads()
    check(tmp_path, 2)


def test_a_link_that_is_cut_and_comes_back_in_time_costs_no_restart(hosts: Hosts, start: Start, tmp_path: Path) -> None:
    agents = start("2", PAUSE="0.2", TIMEOUT_S="60")
    reach(tmp_path, 2, 6)
    hosts.link(1, "down")
    before = max(reads(tmp_path, 2))
    time.sleep(2.5)  # the agents give each other three seconds
    assert max(reads(tmp_path, 2)) <= before + 1  # it was cut
    hosts.link(1, "up")
    assert [agent.wait(timeout=150) for agent in agents] == [0, 0], said(tmp_path)
    assert reads(tmp_path, 2) == expected_reads()
    assert not (tmp_path / "found.2").exists()  # made by a start that resumes
    check(tmp_path, 2)


def test_a_host_that_is_cut_off_for_good_is_left_behind(hosts: Hosts, start: Start, tmp_path: Path) -> None:
    agents = start("1:2", PAUSE="0.2", TIMEOUT_S="5")
    reach(tmp_path, 2, 9)
    hosts.link(1, "down")
    assert agents[0].wait(timeout=200) == 0, said(tmp_path)
    both, alone = reads(tmp_path, 2), reads(tmp_path, 1)
    begin = min(alone)
    assert 0 < begin <= max(both) + 1 < STEPS
    assert {step: both[step] for step in range(begin)} | alone == expected_reads()
    check(tmp_path, 1, begin)
    assert "CommError" in (tmp_path / "agent.0.log").read_text()


@pytest.mark.parametrize("interleaved", [False, True])
def test_hosts_with_two_ranks_each_send_each_byte_once(hosts: Hosts, tmp_path: Path, interleaved: bool) -> None:
    ranks = []
    for rank in range(4):
        host = rank % 2 if interleaved else rank // 2
        settings = {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": hosts.address(0), "MASTER_PORT": str(PORT)}
        settings |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        command = [sys.executable, "-m", "tests.cluster.hosts_of_two", str(tmp_path)]
        ranks.append(hosts.start(host, *command, log=tmp_path / f"agent.{rank}.log", **settings))
    try:
        assert [rank.wait(timeout=150) for rank in ranks] == [0] * 4, said(tmp_path)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = [json.loads((tmp_path / f"rank.{rank}.json").read_text()) for rank in range(4)]
    assert len({str(answer[way]["bits"]) for answer in found for way in WAYS}) == 1
    for answer in found:
        mixed, messages = answer["auto"], answer["exchange"]
        assert "2 hosts with 2 ranks each" in mixed["report"]
        nbytes = 4 * mixed["padded"]
        # A host sends half of the gradient's sums, or of each of its two ranks' gradients, and half of the parameters.
        needed = nbytes * (1.5 if interleaved else 1.0)
        assert 0.99 * needed <= mixed["sent"] <= 1.01 * needed
        assert 0.99 * 2 * nbytes <= messages["sent"] <= 1.01 * 2 * nbytes
