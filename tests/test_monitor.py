"""`diagnostics.monitor` says what training does, survives whatever is sent to it, and listens only where it is asked.

Ages are compared with a tolerance of nothing: a rank is made to stall by a beat that lies in the past, not by waiting.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distadam import ConfigError, MissingDependency, diagnostics
from distadam.diagnostics import monitor_server
from tests.ranks import run_ranks
from tests.test_inspect_faults import build, loss_of

ROOT = Path(__file__).parents[1]
client = pytest.importorskip("prometheus_client")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(url: str) -> dict[str, float]:
    """Values by name and labels, as a Prometheus server reads them."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(get(f"{url}/metrics")[1])
    found = {}
    for family in families:
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "rank" and value]
            found[" ".join([sample.name, *labels])] = sample.value
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def answering() -> Iterator[diagnostics.Monitor]:
    """One monitor for all tests that only ask."""
    _, optimizer = build()
    with diagnostics.monitor(optimizer, port=0) as monitor:
        yield monitor


def test_metrics_say_what_training_does(tmp_path):
    model, optimizer = build()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "commit.json").touch()
    os.utime(tmp_path / "step-1" / "commit.json", (0, time.time() - 1000))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    with diagnostics.monitor(optimizer, port=0, every_s=0, checkpoints=tmp_path) as monitor:
        for step in range(3):
            loss = loss_of(model, 0, step)
            if step == 1:
                loss = loss * torch.inf
            monitor.log(loss=loss, tokens=32)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            norm = optimizer.grad_norm
        wait_for(lambda: "distadam_checkpoint_age_seconds" in metrics(monitor.url))
        found = metrics(monitor.url)
    assert found["distadam_step"] == 3
    assert found["distadam_loss"] == pytest.approx(float(loss.detach()))
    assert found["distadam_grad_norm"] == pytest.approx(float(norm))
    assert found["distadam_skipped_steps"] == 1
    assert found["distadam_loss_scale"] == 4
    assert found["distadam_lr 0"] == optimizer.param_groups[0]["lr"]
    assert found["distadam_memory moments"] == optimizer.memory_report().nbytes["moments"] > 0
    assert found["distadam_step_s"] > found["distadam_parts update"] > 0
    assert found["distadam_tokens_per_s"] > 0
    assert found["distadam_healthy"] == 1
    assert 1000 <= found["distadam_checkpoint_age_seconds"] < 2000
    assert found["process_resident_memory_bytes"] > 0


def two(rank: int) -> list[str]:
    model, optimizer = build()
    with diagnostics.monitor(optimizer, port=0, every_s=0) as monitor:
        for step in range(2):
            loss_of(model, rank, step).backward()
            optimizer.step()
        text = get(f"{monitor.url}/metrics")[1]
    sent = optimizer.comm_stats.payload_nbytes
    return [f'distadam_sent_bytes{{label="{name}",rank="{rank}"}} {float(sent[name])}' in text for name in sent]


def test_each_rank_shows_the_bytes_that_it_sent():
    for answers in run_ranks(2, two):
        assert answers
        assert all(answers)


def test_health_is_lost_when_steps_stop_and_comes_back():
    model, optimizer = build()
    with diagnostics.monitor(optimizer, port=0, stall_s=100) as monitor:
        status, body = get(f"{monitor.url}/healthz")
        assert (status, json.loads(body)["status"]) == (200, "ok")
        monitor._answering.beat(7, time.monotonic() - 101)
        status, body = get(f"{monitor.url}/healthz")
        about = json.loads(body)
        assert (status, about["status"], about["step"], about["stall_s"]) == (503, "stalled", 7, 100)
        assert about["last_step_age_s"] > 101
        assert metrics(monitor.url)["distadam_healthy"] == 0
        loss_of(model, 0).backward()
        optimizer.step()
        assert get(f"{monitor.url}/healthz")[0] == 200
        monitor._answering.beat(7, time.monotonic() - 101)
        monitor.beat()
        assert get(f"{monitor.url}/healthz")[0] == 200


def test_health_is_told_while_training_is_stopped(tmp_path):
    """A process that is stopped, or holds Python's lock for good, cannot answer; its monitor's process does."""
    script = f"""
import os, socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", 0))
file = os.memfd_create("x")
options = {{"file": file, "listener": listener.fileno(), "parent": os.getpid(), "rank": 0, "stall_s": 0.2,
           "content_type": "text/plain", "checkpoints": None}}
sys.path.insert(0, {str(Path(monitor_server.__file__).parent)!r})
import json, monitor_server
monitor_server.write_beat(file, 1, time.monotonic())
command = [sys.executable, "-I", "-S", monitor_server.__file__, json.dumps(options)]
subprocess.Popen(command, pass_fds=(file, listener.fileno()))
print(listener.getsockname()[1], flush=True)
while True:
    monitor_server.write_beat(file, 1, time.monotonic())
    time.sleep(0.01)
"""
    process = subprocess.Popen([sys.executable, "-I", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        wait_for(lambda: get(f"{url}/healthz")[0] == 200)
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: get(f"{url}/healthz")[0] == 503)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: get(f"{url}/healthz")[0] == 200)
    finally:
        process.kill()
        process.communicate()

    def gone() -> bool:
        try:
            get(f"{url}/healthz")
        except OSError:
            return True
        return False

    wait_for(gone)  # and ends with the process that it answers for


GARBAGE = [  # and which answers will do; "" is a connection that is closed, or reset over what it still had to read
    (b"", {""}),
    (b"\r\n\r\n", {"400"}),
    (b"\x00" * 100 + b"\r\n\r\n", {"400"}),
    (b"GET\r\n\r\n", {"400"}),
    (b"GET /metrics\r\n\r\n", {"400"}),
    (b"GET /metrics HTTP/2.0\r\n\r\n", {"400"}),
    (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", {"404"}),
    (b"POST /metrics HTTP/1.1\r\n\r\n", {"405"}),
    (b"DELETE /healthz HTTP/1.1\r\n\r\n", {"405"}),
    (b"GET /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", {"400"}),
    (b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", {"400"}),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", {"400", "431", "reset"}),
    (b"GET /healthz HTTP/1.1\r\nX: " + b"b" * 1_000_000, {"431", "reset"}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), {""}),  # TLS
]


def send(monitor: diagnostics.Monitor, request: bytes) -> str:
    """Send it all, then return the answer's status."""
    with socket.create_connection((monitor.host, monitor.port), timeout=30) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").readline().decode()[9:12]
        except OSError:
            return "reset"


@pytest.mark.parametrize(("request_bytes", "expected"), GARBAGE, ids=[repr(sent)[:30] for sent, _ in GARBAGE])
def test_garbage_is_refused_and_survived(answering, request_bytes, expected):
    assert send(answering, request_bytes) in expected
    assert get(f"{answering.url}/healthz")[0] == 200
    assert answering._answering._processes[-1].poll() is None


def test_random_bytes_are_survived(answering):
    generator = random.Random(0)
    for _ in range(200):
        send(answering, generator.randbytes(generator.randrange(300)) + generator.choice([b"", b"\r\n\r\n"]))
    assert get(f"{answering.url}/metrics")[0] == 200
    assert answering._answering._processes[-1].poll() is None


def test_client_that_asks_and_does_not_read_is_dropped(answering):
    many = b"GET /metrics HTTP/1.1\r\n\r\n" * 400_000  # 500 MB of answers
    with (
        socket.create_connection((answering.host, answering.port), timeout=30) as connection,
        pytest.raises(ConnectionError),
    ):
        connection.sendall(many)
    assert get(f"{answering.url}/healthz")[0] == 200


def test_clients_that_say_nothing_do_not_keep_others_out(answering):
    silent = []
    for _ in range(2 * monitor_server.MOST_CONNECTIONS):
        silent.append(socket.create_connection((answering.host, answering.port), timeout=30))
        silent[-1].sendall(b"GET /metr")
    assert get(f"{answering.url}/healthz")[0] == 200
    silent[0].settimeout(5)  # half of what a client alone is given
    with contextlib.suppress(ConnectionResetError):
        assert silent[0].recv(1) == b""
    for connection in silent:
        connection.close()


def test_client_that_says_nothing_is_dropped_in_time(monkeypatch):
    monkeypatch.setattr(monitor_server, "PATIENCE_S", 0.05)

    async def ask() -> bytes:
        server = await asyncio.get_running_loop().create_server(
            lambda: monitor_server.Connection(None, {}), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET /metr")
            try:
                return await asyncio.wait_for(reader.read(), 20)
            finally:
                writer.close()

    assert asyncio.run(ask()) == b""


def test_connections_are_kept_as_prometheus_asks(answering):
    with socket.create_connection((answering.host, answering.port), timeout=30) as connection:
        file = connection.makefile("rb")
        for method in (b"GET", b"HEAD", b"GET"):
            connection.sendall(method + b" /healthz?verbose HTTP/1.1\r\nHost: x\r\n\r\n")
            headers = dict(line.split(b": ") for line in iter(file.readline, b"\r\n") if b": " in line)
            length = int(headers[b"Content-Length"])
            assert headers[b"Connection"] == b"keep-alive\r\n"
            if method == b"GET":
                assert json.loads(file.read(length))["status"] == "ok"


def test_text_that_is_being_written_is_never_shown():
    file = os.memfd_create("text")
    monitor_server.write_text(file, b"old")
    answers = monitor_server.Answers(file, 0, 1.0, "text/plain", lambda: None)
    assert answers.metrics().startswith(b"old# HELP")
    os.pwrite(file, b"ne", monitor_server.TEXT_AT)  # half-way through write_text
    os.pwrite(file, b"\x09", 64)
    assert monitor_server.read_text(file, monitor_server.read_head(file)) is None
    assert answers.metrics().startswith(b"old# HELP")
    monitor_server.write_text(file, b"new")
    assert answers.metrics().startswith(b"new# HELP")
    os.close(file)


def listening(pid: int) -> set[str]:
    """Addresses and ports, in the kernel's spelling, on which a process listens for TCP."""
    found = set()
    inodes = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd") if Path(entry.path).is_symlink()}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1])
    return found


def test_nothing_listens_beyond_loopback_unless_asked():
    model, optimizer = build()
    before = listening(os.getpid())
    loss_of(model, 0).backward()
    optimizer.step()
    assert listening(os.getpid()) == before  # off by default
    with diagnostics.monitor(optimizer, port=0) as monitor:
        process = monitor._answering._processes[-1]
        wait_for(lambda: get(f"{monitor.url}/healthz")[0] == 200)
        loopback = {f"0100007F:{monitor.port:04X}"}
        assert listening(process.pid) == loopback
        assert listening(os.getpid()) - before == loopback
    assert process.poll() is not None
    assert listening(os.getpid()) == before
    with diagnostics.monitor(optimizer, port=0, host="0.0.0.0") as monitor:
        assert listening(os.getpid()) - before == {f"00000000:{monitor.port:04X}"}  # the test can see it
        assert get(f"{monitor.url}/healthz")[0] == 200


def test_lost_process_is_started_again(caplog):
    model, optimizer = build()
    with diagnostics.monitor(optimizer, port=0, every_s=0) as monitor:
        first = monitor._answering._processes[-1]
        first.kill()
        first.wait()
        loss_of(model, 0).backward()
        optimizer.step()
        assert "is started again" in caplog.text
        assert metrics(monitor.url)["distadam_step"] == 1


def test_signals_to_all_processes_of_a_job_and_priorities_leave_the_answers_alone():
    _, optimizer = build()
    with diagnostics.monitor(optimizer, port=0) as monitor:
        process = monitor._answering._processes[-1]
        assert get(f"{monitor.url}/healthz")[0] == 200
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        assert get(f"{monitor.url}/healthz")[0] == 200
        assert process.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19


def test_closed_monitor_leaves_nothing_behind():
    _, optimizer = build()
    hooks = len(optimizer._optimizer_step_post_hooks)
    files = len(os.listdir("/proc/self/fd"))
    monitor = diagnostics.monitor(optimizer, port=0)
    process = monitor._answering._processes[-1]
    monitor.close()
    monitor.close()
    assert process.poll() is not None
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    assert len(os.listdir("/proc/self/fd")) == files
    with diagnostics.timeline(optimizer):  # the times are free again
        pass


def test_numbers_of_a_device_are_shown_once_they_have_arrived(monkeypatch):
    """CUDA's path without CUDA: numbers lie in a buffer until the clock knows the mark behind the copy."""
    model, optimizer = build()
    with diagnostics.monitor(optimizer, port=0, every_s=0) as monitor:
        arrived = torch.tensor([2.5], dtype=torch.float64)
        record = {"kind": "step", "step": 9, "lr": {}}
        monkeypatch.setattr(monitor, "_arriving", (record, [("loss", "")], arrived, 0.0))
        monkeypatch.setattr(monitor._clock, "seconds", lambda mark: None)
        loss_of(model, 0).backward()
        optimizer.step()
        assert "distadam_loss" not in metrics(monitor.url)
        monkeypatch.setattr(monitor._clock, "seconds", lambda mark: 1.0)
        loss_of(model, 0).backward()
        optimizer.step()
        assert metrics(monitor.url)["distadam_loss"] == 2.5


def test_watch_can_show_parameters_too():
    model, optimizer = build()
    with diagnostics.monitor(optimizer, port=0, every_s=0) as monitor:
        with diagnostics.watch(optimizer, every=1, sinks=[monitor.sink]):
            loss_of(model, 0).backward()
            optimizer.step()
        loss_of(model, 0).backward()
        optimizer.step()
        assert metrics(monitor.url)["distadam_parameter_grad_norm second.weight"] > 0


def test_wrong_arguments_are_refused_with_their_cure(monkeypatch, answering):
    _, optimizer = build()
    with pytest.raises(ConfigError, match=r"rank 0 cannot listen .* port=9100 \+ run.local_rank"):
        diagnostics.monitor(optimizer, port=answering.port)
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1:0"):
        diagnostics.monitor(optimizer, port=0, host="203.0.113.1")
    with pytest.raises(ConfigError, match="stall_s above 0"):
        diagnostics.monitor(optimizer, port=0, stall_s=0)
    with pytest.raises(TypeError, match="expected an optimizer of distadam but got SGD"):
        diagnostics.monitor(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), port=0)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependency, match=r"pip install 'distadam\[prometheus\]'"):
        diagnostics.monitor(optimizer, port=0)
    with diagnostics.timeline(optimizer):  # none of these left one behind
        pass


def test_the_answering_process_imports_the_standard_library_alone():
    source = Path(monitor_server.__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


def test_dashboard_asks_for_metrics_that_there_are(tmp_path):
    model, optimizer = build()
    (tmp_path / "commit.json").touch()
    with diagnostics.monitor(optimizer, port=0, every_s=0, checkpoints=tmp_path) as monitor:
        loss_of(model, 0).backward()
        optimizer.grad_scale = torch.ones(())  # as a GradScaler's step does
        monitor.log(loss=1.0, tokens=1)
        optimizer.step()
        wait_for(lambda: "distadam_checkpoint_age_seconds" in metrics(monitor.url))
        there = {name.split()[0] for name in metrics(monitor.url)} | {"distadam_sent_bytes"}  # one rank sends nothing
    dashboard = json.loads((ROOT / "launch/grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    names = set(re.findall(r"\b(?:distadam|process)_\w+", asked))
    assert names <= there
    assert {name for name in there if name.startswith("distadam_")} <= names
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_kubernetes_probe_fails_when_training_stalls_and_not_while_nobody_answers():
    text = (ROOT / "launch/kubernetes.yaml").read_text()
    port = re.search(r"--metrics=0\.0\.0\.0:(\d+)", text)
    code = re.search(r"- -ISc\n +- \|\n((?: {18}.*\n)+)", text)
    assert port is not None
    assert code is not None
    assert f"containerPort: {port[1]}" in text
    assert f'prometheus.io/port: "{port[1]}"' in text

    def probe(at: int) -> int:
        command = textwrap.dedent(code[1]).replace(f":{port[1]}/healthz", f":{at}/healthz")
        assert f":{at}/healthz" in command
        return subprocess.run([sys.executable, "-ISc", command], stderr=subprocess.DEVNULL).returncode

    _, optimizer = build()
    with diagnostics.monitor(optimizer, port=0, stall_s=100) as monitor:
        assert probe(monitor.port) == 0
        monitor._answering.beat(0, time.monotonic() - 101)
        assert probe(monitor.port) == 1
    assert probe(monitor.port) == 0
