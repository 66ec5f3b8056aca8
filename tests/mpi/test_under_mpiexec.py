"""The mpi4py backend, and jobs started by mpiexec, with MPICH and with Open MPI (``make test-mpi``).

``suite.py`` holds the tests of the backend, which every rank runs; here it is started on 1, 2, 3 and 5 ranks. What
breaks a job (dead, stopped and late ranks, launchers of another library) is in ``faults.py``, one kind a job. Times
only bound from above, and generously: a job that hangs fails.
"""

from __future__ import annotations

import re

import pytest

from tests.mpi.environments import IMPLEMENTATIONS, ROOT, Ended, environment, folder, missing, mpiexec, run
from tests.mpi.faults import LOST, TIMEOUT_S

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(400)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if missing(request.param):
        pytest.skip(missing(request.param))
    return request.param


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_suite_passes_on_every_rank(implementation, num_ranks):
    ended = mpiexec(implementation, num_ranks, "-m", "tests.mpi.suite", timeout_s=350)
    assert ended.code == 0, ended.text[-8000:]
    reports = re.findall(r"rank (\d+) of (\d+): (\d+) tests, ok=(True|False)", ended.text)
    assert sorted(int(rank) for rank, *_ in reports) == list(range(num_ranks))
    for _, size, num_tests, ok in reports:
        assert (int(size), ok) == (num_ranks, "True")
        assert int(num_tests) > 150


def test_launcher_of_another_library_is_refused(implementation):
    """Every rank would be alone in a world of one, and train a model of its own."""
    [other] = [name for name in IMPLEMENTATIONS if name != implementation]
    if missing(other):
        pytest.skip(missing(other))
    ended = mpiexec(implementation, 2, "-m", "tests.mpi.faults", "start", python=other)
    assert ended.code != 0
    assert "ConfigError: expected the 2 ranks that" in ended.text
    what = {"mpich": "has a world of 1", "openmpi": "cannot be started by it"}[implementation]
    assert f"{what}: launcher and library do not belong together" in ended.text


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_start_finds_mpi_and_says_so(implementation, num_ranks):
    ended = mpiexec(implementation, num_ranks, "-m", "tests.mpi.faults", "start")
    assert ended.code == 0, ended.text
    launcher = {"mpich": "MPICH or Intel MPI", "openmpi": "Open MPI"}[implementation]
    for rank in range(num_ranks if num_ranks > 1 else 0):
        where = f"rank {rank} of {num_ranks} (local rank {rank}), device cpu"
        assert f"distadam: launcher {launcher}, backend mpi4py, {where}" in ended.text


GLOO = """
import os, torch, torch.distributed as dist, distadam
info = distadam.init_process_group("gloo", timeout_s=60.0)
again = distadam.init_process_group()
total = torch.ones(1)
dist.all_reduce(total)
print(f"{info}; {again == info}; sum {total.item():g}; {os.environ['MASTER_ADDR']}", flush=True)
dist.destroy_process_group()
"""


def test_other_backends_meet_at_an_address_that_mpi_broadcasts(implementation):
    """As NCCL does under mpiexec where there are GPUs."""
    ended = mpiexec(implementation, 3, "-c", GLOO)
    assert ended.code == 0, ended.text
    for rank in range(3):
        words = rf"backend gloo, rank {rank} of 3 \(local rank {rank}\), device cpu; True; sum 3; 127\.0\.0\.1"
        assert re.search(words, ended.text), ended.text


def test_doctor_tests_the_jobs_own_ranks_and_reports_once(implementation):
    ended = mpiexec(implementation, 3, "-m", "distadam", "doctor", "--seconds", "0.2", COLUMNS="200")
    assert ended.code == 0, ended.text
    launcher = {"mpich": "MPICH or Intel MPI", "openmpi": "Open MPI"}[implementation]
    for words in (
        f"{launcher} started 3 ranks",
        "3 of them on this host",
        "3 ranks met",
        "backend mpi4py",
        "all right",
    ):
        assert ended.text.count(words) == 1, ended.text
    assert "distadam doctor: 0 errors" in ended.text


BREAK = """
import os, sys
from distadam.doctor import rank
rank.MEETING_TIMEOUT_S = 5.0
if "1" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK")):
    def fail(*_):
        raise RuntimeError("no such device")
    rank.self_test = fail
from distadam.cli import main
sys.argv[1:] = ["doctor", "--seconds", "0"]
main()
"""


def test_doctor_names_the_rank_that_fails(implementation):
    """Rank 1 says why; rank 0, which waits for it, reports that and what it knows of its own host."""
    ended = mpiexec(implementation, 2, "-c", BREAK, COLUMNS="200")
    assert ended.code != 0
    assert re.search(r"distadam doctor: rank 1 of 2 \(.+\): RuntimeError: no such device", ended.text), ended.text
    assert re.search(r"ERROR\S* +self_test +rank 0 of 2 \(.+\): CommError: ", ended.text), ended.text
    assert "kernels.choice" in ended.text


def test_doctor_says_whose_launcher_and_whose_library(implementation):
    [other] = [name for name in IMPLEMENTATIONS if name != implementation]
    if missing(other):
        pytest.skip(missing(other))
    ended = mpiexec(implementation, 2, "-m", "distadam", "doctor", "--seconds", "0", python=other, COLUMNS="200")
    assert ended.code != 0
    assert "mpi.mismatch" in ended.text
    assert re.search(r"distadam doctor: rank 1 of 2 \(.+\): ConfigError: expected the 2 ranks that", ended.text)


def caught(ended: Ended, rank: int) -> str:
    """What a rank has caught; it must have come in time."""
    found = re.search(rf"caught after (\d+) s by rank {rank}: (.*)", ended.text)
    assert found, ended.text[-5000:]
    assert int(found[1]) <= 3 * TIMEOUT_S + 10
    return found[2]


@pytest.mark.parametrize(("how", "words"), [("stopped", "dead, stopped or busy"), ("late", "alive and not there yet")])
def test_collective_names_the_rank_that_does_not_come(implementation, how, words):
    ended = mpiexec(implementation, 3, "-m", "tests.mpi.faults", "all-reduce", how)
    assert ended.code != 0
    for rank in (0, 2):
        text = caught(ended, rank)
        assert f"all-reduce on rank {rank}" in text
        assert f"did not finish within {TIMEOUT_S:g} s: rank {LOST} is {words}" in text


@pytest.mark.long
@pytest.mark.parametrize(("how", "words"), [("stopped", "dead, stopped or busy"), ("late", "alive but has not sent")])
def test_receive_names_the_peer(implementation, how, words):
    ended = mpiexec(implementation, 3, "-m", "tests.mpi.faults", "receive", how)
    assert ended.code != 0
    assert re.search(rf"receive from rank {LOST} \(tag 0\) on rank 0 .* rank {LOST} is {words}", caught(ended, 0))


@pytest.mark.long
def test_new_group_names_the_rank_that_does_not_come(implementation):
    ended = mpiexec(implementation, 3, "-m", "tests.mpi.faults", "group", "late")
    assert ended.code != 0
    for rank in (0, 2):
        assert f"was not made on rank {rank} within {TIMEOUT_S:g} s: ranks [{LOST}] did not come" in caught(ended, rank)


@pytest.mark.long
@pytest.mark.parametrize("reduce", ["exchange", "shared", "native"])
@pytest.mark.parametrize("phase", ["backward", "agree", "gather"])
def test_stopped_rank_is_a_comm_error_on_the_others(implementation, phase, reduce):
    if implementation == "openmpi" and reduce != "exchange":
        pytest.skip("the engine's part is the same for both; MPICH has it")
    ended = mpiexec(implementation, 3, "-m", "tests.mpi.faults", "step", "stopped", phase, reduce)
    assert ended.code != 0
    for rank in (0, 2):
        text = caught(ended, rank)
        assert re.search(rf"(agree|reduce_scatter|all_gather) of .* on rank {rank} of 3", text), text
        assert re.search(rf"rank {LOST}\b", text.replace(f"on rank {rank}", "")), text


@pytest.mark.long
def test_uncaught_exception_ends_the_job_at_once(implementation):
    ended = mpiexec(implementation, 3, "-m", "tests.mpi.faults", "all-reduce", "exception", timeout_s=60)
    assert ended.code != 0
    assert "this rank has had enough" in ended.text


@pytest.mark.parametrize("how", ["killed", "exception", "stopped"])
def test_mpirun_script_says_which_rank_ended_first_and_where(implementation, how):
    variables = {"NPROC": "3", "MPIEXEC": str(folder(implementation) / "mpiexec")}
    variables |= {"PYTHON": str(folder(implementation) / "python"), "MPIEXEC_ARGS": ""}
    if implementation == "openmpi":
        variables["MPIEXEC_ARGS"] = "--oversubscribe"
    command = [str(ROOT / "launch/mpirun.sh"), "-m", "tests.mpi.faults", "step", how, "gather", "exchange"]
    ended = run(command, environment(**variables))
    assert ended.code != 0
    report = [line for line in ended.text.splitlines() if line.startswith("mpirun.sh:")]
    lost = next(line for line in report if f"rank {LOST}" in line and "started:" in line)
    assert re.search(r"last started: (reduce_scatter|agree|all_gather) of .* on rank 1 of 3", lost), report
    if how == "killed":
        assert f"rank {LOST} ended first, exit code 137 (signal 9)" in lost
    elif how == "exception":
        assert f"rank {LOST} ended first, exit code 1" in lost
    else:
        assert any("ended first, exit code 1" in line and f"rank {LOST}" not in line for line in report)
