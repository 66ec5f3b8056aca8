"""Two containers train; one is killed, comes back, and the run ends with the loss of one that never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.docker import CUDA_IMAGE, IMAGE, Compose, Engine, EngineRefused, missing, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

STEPS, SAVE_EVERY = 150, 10


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if missing():
        pytest.skip(missing())
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(Engine(tmp_path_factory.mktemp("docker")))
        except EngineRefused as refused:  # of the host, not of what is tested: containers in which no engine may run
            pytest.skip(f"no Docker engine can run here: {refused}")
        engine.build()
        yield engine


@pytest.fixture
def nodes(engine: Engine) -> Iterator[Compose]:
    compose = Compose(f"distadamtest{os.getpid()}", STEPS=str(STEPS), SAVE_EVERY=str(SAVE_EVERY))
    try:
        yield compose
    finally:
        compose.close()


def until(met: Callable[[], bool], what: Callable[[], str], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < ends, what()
        time.sleep(1.0)


def last_step(compose: Compose) -> int:
    """Return the last step that the curve has."""
    try:
        return int(json.loads(compose.read("run/curve.jsonl").splitlines()[-1])["step"])
    except (RuntimeError, IndexError, json.JSONDecodeError):
        return 0


def test_image_is_small_in_what_it_can_do(engine: Engine) -> None:
    said = run(
        "docker", "run", "--rm", "--network", "none", IMAGE, "sh", "-c", "id -u; which gcc cc make pip git; true"
    )
    assert said.split() == ["1000"]
    inside = "import torch, distadam, prometheus_client; print(distadam.__file__)"
    assert "/opt/distadam/" in run("docker", "run", "--rm", "--network", "none", IMAGE, "python3", "-c", inside)


def test_image_for_cuda_is_built_and_imports(engine: Engine) -> None:
    """From the same base and wheels, of torch for CPUs and without Triton: its own are 5 GB, and no GPU is here."""
    engine.image("cuda", CUDA_IMAGE)
    inside = "import os, distadam; print(distadam.__file__, os.getuid(), os.environ['TRITON_CACHE_DIR'])"
    said = run("docker", "run", "--rm", "--network", "none", CUDA_IMAGE, "python3", "-c", inside)
    assert re.search(r"^/opt/distadam/\S+ 1000 /tmp/triton$", said, re.M)


def test_two_nodes_lose_one_and_end_with_the_loss_of_a_run_that_never_stopped(nodes: Compose, tmp_path: Path) -> None:
    script = ["/srv/distadam/examples/train_gpt.py", f"--steps={STEPS}", "--out=/tmp/run"]
    show = ["sh", "-c", 'python3 "$@" >/tmp/said 2>&1 && cat /tmp/run/run.json || cat /tmp/said', "sh", *script]
    alone = json.loads(run("docker", "run", "--rm", "--network", "none", IMAGE, *show))

    nodes("up", "--detach", "--no-build")
    until(lambda: last_step(nodes) >= 30, nodes.logs)
    assert "2 processes" in nodes.logs()
    until(lambda: nodes.container("node1")["State"]["Health"]["Status"] == "healthy", nodes.logs, 60)
    os.kill(nodes.container("node1")["State"]["Pid"], signal.SIGKILL)  # as a host is lost: nobody is told
    until(lambda: nodes.container("node1")["RestartCount"] == 1, nodes.logs)
    until(lambda: not any(nodes.container(name)["State"]["Running"] for name in ("node0", "node1")), nodes.logs, 600)

    assert [nodes.container(name)["State"]["ExitCode"] for name in ("node0", "node1")] == [0, 0], nodes.logs()
    points = [json.loads(line) for line in nodes.read("run/curve.jsonl").splitlines()]
    steps = [point["step"] for point in points]
    assert sorted(set(steps)) == list(range(10, STEPS + 1, 10))
    assert nodes.logs().count("distadam: launcher torchrun") >= 2  # it was started again, and went on from there
    found = json.loads(nodes.read("run/run.json"))["val_bits_per_byte"]
    # The same batches and the same sums but for the order of additions of two ranks, over 150 steps.
    assert found == pytest.approx(alone["val_bits_per_byte"], rel=2e-3)
