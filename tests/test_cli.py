"""``distadam launch``: whose line it is, which rank failed first, exit codes, and what the ranks' environment holds.

The scripts that are launched do not import torch, so that a launch costs little more than the launcher's own start.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import typer
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from typer.testing import CliRunner

from distadam.cli import app
from distadam.cli.cores import divide, find_cores, spell
from distadam.cli.failures import sort_failures
from distadam.cli.launch import cpu_environment, share_cores
from distadam.cli.rank_output import RankLines
from distadam.comm import phase
from distadam.doctor.system import allowed_cpus

ROOT = Path(__file__).parents[1]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distadam", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what launchers set, and with the checkout's package first."""
    dropped = {"OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *ALLOCATOR}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | more


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(**variables), capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def script(tmp_path: Path):
    """Return a function that writes a script and returns its path.

    The script has ``rank``, and ``signal_peers()`` and ``await_peer()`` to let one rank go before another: ranks start
    seconds apart on a busy machine.
    """
    flag = tmp_path / "flag"
    head = f"""
import json, os, signal, sys, time
rank = int(os.environ['RANK'])
def signal_peers():
    open({str(flag)!r}, 'w').close()
def await_peer():
    while not os.path.exists({str(flag)!r}):
        time.sleep(0.01)
"""

    def write(body: str) -> str:
        path = tmp_path / "job.py"
        path.write_text(head + body)
        return str(path)

    return write


@pytest.mark.long
def test_launch_prefixes_every_line_with_its_rank(script):
    path = script(
        "print('one'); print('two', end='', flush=True); time.sleep(0.3); print(' halves')\n"
        "print('complaint', file=sys.stderr); print('no newline', end='')\n"
    )
    done = run("launch", "--nproc", "2", path)
    assert done.returncode == 0, done.stderr
    expected = [f"[{rank}] {line}" for rank in (0, 1) for line in ("no newline", "one", "two halves")]
    assert sorted(done.stdout.splitlines()) == expected
    assert {"[0] complaint", "[1] complaint"} < set(done.stderr.splitlines())


def test_launch_sets_up_each_rank_and_says_so(script):
    path = script("print(json.dumps({'argv': sys.argv[1:], 'path': sys.path[0], 'env': dict(os.environ)}))\n")
    done = run("launch", "--nproc", "2", path, "--", "--nproc", "a b", "x$$y", "${local_rank}")
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line[4:]) for line in sorted(done.stdout.splitlines())]
    assert [rank["env"]["RANK"] for rank in ranks] == ["0", "1"]
    for rank in ranks:
        assert rank["argv"] == ["--nproc", "a b", "x$$y", "${local_rank}"]
        assert rank["path"] == str(Path(path).parent)
        assert rank["env"]["WORLD_SIZE"] == "2"
        assert rank["env"]["MASTER_ADDR"] == "127.0.0.1"
    announced = done.stderr.splitlines()[0]
    assert announced.startswith("distadam launch: 2 processes")
    for name, value in cpu_environment(2, len(os.sched_getaffinity(0))).items():
        assert ranks[0]["env"][name] == value
        assert f"{name}={value}" in announced


@pytest.mark.long
def test_launch_keeps_variables_that_are_set(script):
    path = script("print(os.environ['OMP_NUM_THREADS'], os.environ['MALLOC_TOP_PAD_'])\n")
    done = run("launch", "--nproc", "1", path, OMP_NUM_THREADS="5", MALLOC_TOP_PAD_="1")
    assert done.stdout == "[0] 5 1\n"
    assert "OMP_NUM_THREADS" not in done.stderr
    assert "MALLOC_TOP_PAD_" not in done.stderr


def test_launch_prints_first_failing_ranks_traceback_first(script):
    # Rank 1 fails first but takes its time to exit; rank 0 fails later and is gone before.
    path = script(
        "import atexit\n"
        "if rank == 1:\n"
        "    atexit.register(time.sleep, 3)\n    atexit.register(signal_peers)\n    raise KeyError('the cause')\n"
        "await_peer()\nraise RuntimeError('a consequence')\n"
    )
    done = run("launch", "--nproc", "2", path)
    assert done.returncode == 1
    first, second = done.stderr.index("KeyError: 'the cause'"), done.stderr.index("RuntimeError: a consequence")
    assert done.stderr.index("rank 1 failed first") < first < done.stderr.index("rank 0 failed next") < second
    assert done.stderr.count("Traceback") == 2
    assert "worker.py" not in done.stderr
    assert "runpy" not in done.stderr


@pytest.mark.long
def test_launch_ends_other_ranks_and_returns_exit_code_of_first(script):
    path = script("if rank == 1:\n    sys.exit(7)\ntime.sleep(600)\n")
    began = time.monotonic()
    done = run("launch", "--nproc", "3", path)
    assert time.monotonic() - began < 60
    assert done.returncode == 7
    assert "rank 1 failed first (exit code 7): SystemExit: 7" in done.stderr
    assert "then ended rank 0, 2" in done.stderr


def test_launch_reports_crash_before_what_it_causes(script):
    path = script(
        f"exec(open({phase.__file__!r}).read(), globals())\n"
        "note(f'agree of step on rank {rank} of 2')\n"
        "if rank == 1:\n    signal_peers()\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "await_peer()\nraise ConnectionError('peer is gone')\n"
    )
    done = run("launch", "--nproc", "2", path)
    assert done.returncode == 128 + signal.SIGSEGV
    assert "[1] Fatal Python error: Segmentation fault" in done.stderr
    assert "rank 1 failed first (exit code 139): signal SIGSEGV" in done.stderr
    assert "rank 1 had last started: agree of step on rank 1 of 2\n" in done.stderr


@pytest.mark.long
def test_launch_starts_again_after_failure(script):
    path = script("attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\nprint('attempt', attempt)\n1 / attempt\n")
    done = run("launch", "--nproc", "1", "--max-restarts", "1", path)
    assert done.returncode == 0
    assert done.stdout == "[0] attempt 0\n[0] attempt 1\n"
    assert "[0] ZeroDivisionError: division by zero" in done.stderr


@pytest.mark.long
def test_launch_starts_a_group_again_that_lost_a_rank(script):
    path = script(
        "import distadam, torch, torch.distributed as dist\ndistadam.init_process_group(timeout_s=60)\n"
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\ntotal = torch.ones(1)\ndist.all_reduce(total)\n"
        "print('attempt', attempt, 'of', int(total))\n"
        "if attempt < 2 and rank == attempt:\n    os.kill(os.getpid(), signal.SIGKILL)\ndist.barrier()\n"
    )
    done = run("launch", "--nproc", "3", "--max-restarts", "2", path)
    assert done.returncode == 0, done.stderr
    for attempt in range(3):
        assert done.stdout.count(f"attempt {attempt} of 3") == 3


@pytest.mark.long
def test_launch_keeps_logs_where_it_is_told(script, tmp_path):
    done = run(
        "launch", "--nproc", "2", "--log-dir", str(tmp_path / "logs"), script("print('kept', rank)\nassert rank\n")
    )
    assert done.returncode == 1
    assert sorted(log.read_text() for log in tmp_path.rglob("stdout.log")) == ["kept 0\n", "kept 1\n"]
    assert "AssertionError" in next(tmp_path.rglob("error.json")).read_text()
    assert f"logs in {tmp_path / 'logs'}" in done.stderr


@pytest.mark.long
def test_launch_runs_module():
    done = run("launch", "--nproc", "1", "-m", "calendar", "2000", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["[0]", "February", "2000"]


@pytest.mark.parametrize("interrupt", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_launch_ends_ranks_when_interrupted(script, interrupt):
    path = script("print(os.getpid(), flush=True)\ntime.sleep(600)\n")
    launcher = subprocess.Popen(
        command("launch", "--nproc", "2", path),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        launcher.send_signal(interrupt)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 128 + interrupt
    assert f"stopped by signal {int(interrupt)}" in errors
    assert "Traceback" not in errors
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "expected a file, got 'missing.py'"),
        (["--nproc", "0", __file__], "expected a positive number or auto, got '0'"),
        (["--nnodes", "2", __file__], "expected host:port of the first host"),
    ],
)
def test_launch_refuses_wrong_arguments(arguments, message):
    done = run("launch", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_module_run_lists_commands():
    done = run("--help")
    assert done.returncode == 0
    assert "launch" in done.stdout


def failure(folder: Path, rank: int, exit_code: int, noted_s: float | None = None, seen_s: int = 0) -> ProcessFailure:
    """Return what torchelastic hands over for a rank that noted an exception, or was only seen to be gone."""
    path = folder / f"{rank}.json"
    if noted_s is not None:
        extra = {"py_callstack": "trace", "timestamp": str(int(noted_s)), "timestamp_ns": int(noted_s * 1e9)}
        path.write_text(json.dumps({"message": {"message": "why", "extraInfo": extra}}))
    found = ProcessFailure(local_rank=rank, pid=1, exitcode=exit_code, error_file=str(path))
    if noted_s is None:
        found.timestamp = seen_s
    return found


def test_failures_are_sorted_by_what_came_first(tmp_path):
    failures = {
        0: failure(tmp_path, 0, -signal.SIGTERM, seen_s=1000),  # ended by the launcher
        1: failure(tmp_path, 1, 1, noted_s=1000.7),
        2: failure(tmp_path, 2, 1, noted_s=1000.2),
        3: failure(tmp_path, 3, -signal.SIGKILL, seen_s=1030),  # did not heed the launcher's SIGTERM
    }
    assert [found.rank for found in sort_failures(failures)] == [2, 1, 3, 0]
    failures[3] = failure(tmp_path, 3, -signal.SIGKILL, seen_s=1000)  # out of memory, say: the others lost their peer
    assert [found.rank for found in sort_failures(failures)] == [3, 2, 1, 0]


def test_rank_lines_join_pieces_per_rank():
    target = io.StringIO()
    lines = RankLines(target)
    for piece in ("\x1e0\x1fhalf ", "\x1e1\x1fwhole\n", "plain\n", "\x1e0\x1fa line\n", "\x1e1\x1fnever ended"):
        lines.write(piece)
    lines.finish()
    assert target.getvalue() == "[1] whole\nplain\n[0] half a line\n[1] never ended\n"


def test_rank_lines_are_coloured_by_rank_where_colours_show(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    target = io.StringIO()
    with contextlib.redirect_stdout(target):
        lines = RankLines(target)
        lines.write("\x1e0\x1fa\n")
        lines.write("\x1e1\x1fb\n")
    assert target.getvalue() == "\x1b[36m[0]\x1b[0m a\n\x1b[35m[1]\x1b[0m b\n"


def test_cpu_environment_shares_cores_and_respects_settings(monkeypatch):
    for name in ("OMP_NUM_THREADS", *ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    assert cpu_environment(2, 8)["OMP_NUM_THREADS"] == "4"
    assert cpu_environment(8, 2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in cpu_environment(2, 8)


def write_topology(system: Path, cpus: dict[int, tuple[int, int, str]]) -> Path:
    """Write what the kernel says of its CPUs, each with socket, NUMA node and hardware threads of its core."""
    for cpu, (socket, node, threads) in cpus.items():
        topology = system / f"cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "thread_siblings_list").write_text(f"{threads}\n")
        (system / f"cpu{cpu}/node{node}").mkdir()
    return system


def test_cores_hold_their_hardware_threads_and_lie_by_socket(tmp_path):
    """Even cores in one socket, odd ones in the other, the second threads numbered after all first ones."""
    numbers = {cpu: (cpu % 2, cpu % 2, f"{cpu % 4},{cpu % 4 + 4}") for cpu in range(8)}
    system = write_topology(tmp_path / "cpus", numbers)
    cores = find_cores(range(8), system)
    assert cores == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert divide(cores, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert divide(cores, 3) == [[0, 4], [2, 6], [1, 3, 5, 7]]
    assert find_cores([1, 2, 5, 6], system) == [[2, 6], [1, 5]]  # what taskset left
    assert find_cores([3, 1], tmp_path / "nothing") == [[1], [3]]
    neighbours = write_topology(
        tmp_path / "neighbours", {cpu: (0, 0, f"{cpu - cpu % 2}-{cpu | 1}") for cpu in range(4)}
    )
    assert find_cores(range(4), neighbours) == [[0, 1], [2, 3]]


def test_cpus_are_spelled_as_taskset_takes_them():
    assert spell([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"


def test_ranks_are_pinned_by_default_where_each_gets_two_cores(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    four, two = [[0], [1], [2], [3]], [[0], [1]]
    assert share_cores(2, None, four) == [[0, 1], [2, 3]]
    assert share_cores(2, False, four) == []
    assert share_cores(1, None, four) == []  # it has them all
    assert share_cores(2, None, two) == []
    assert share_cores(2, True, two) == [[0], [1]]
    assert share_cores(3, None, two) == []
    with pytest.raises(typer.BadParameter, match="at least one core for each rank but got 3 ranks on 2 cores"):
        share_cores(3, True, two)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert share_cores(2, None, four) == []
    with pytest.raises(typer.BadParameter, match="expected ranks on CPU"):
        share_cores(2, True, four)


def test_launch_pins_ranks_to_what_it_may_use_itself_and_says_so(script):
    cores = find_cores(allowed_cpus())
    if len(cores) < 2:
        pytest.skip("one core")
    path = script("print(sorted(os.sched_getaffinity(0)), sys.argv[1:])\n")
    done = run("launch", "--nproc", "2", "--pin", path, "--cores")
    shares = divide(cores, 2)
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] {cpus} ['--cores']" for rank, cpus in enumerate(shares)]
    said = " | ".join(f"rank {rank} {spell(cpus)}" for rank, cpus in enumerate(shares))
    assert done.stderr.splitlines()[0].endswith(f"; kept to CPUs: {said}")
    last = cores[-1][-1]
    one = subprocess.run(
        ["taskset", "--cpu-list", str(last), *command("launch", "--nproc", "1", "--pin", path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert one.stdout == f"[0] [{last}] []\n"
    assert one.stderr.splitlines()[0].endswith(f"; kept to CPUs: rank 0 {last}")


def test_version_is_the_packages():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"distadam {metadata.version('distadam')}\n")
