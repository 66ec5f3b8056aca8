"""The mpi4py backend as far as it goes without MPI: what launchers say, what is refused, the progress thread on a fake.

The backend itself is tested under mpiexec (``tests/mpi``, ``make test-mpi``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distadam
from distadam.comm import phase
from distadam.comm.launchers import find, find_mpi, first_host, slurm_meeting_place
from distadam.comm.mpi import numbers, progress, world
from distadam.comm.mpi.progress import Job, Lane, Progress
from distadam.comm.tree import TreeSum
from distadam.errors import CommError, ConfigError, MissingDependency

ROOT = Path(__file__).parents[1]

# Launchers ------------------------------------------------------------------------------------------------------------

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
BY_HAND = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "kind", "launcher", "place"),
    [
        (TORCHRUN, "torchrun", "torchrun", (3, 8, 1)),
        (BY_HAND, "torchrun", "environment", (3, 8, 1)),
        (OPEN_MPI, "mpi", "Open MPI", (2, 4, 1)),
        (PMI, "mpi", "MPICH or Intel MPI", (2, 4, 1)),
        (SRUN, "slurm", "Slurm", (2, 4, 1)),
        (SRUN | {"PMIX_RANK": "2"}, "mpi", "PMIx", (2, 4, 1)),
        (SRUN | PMI, "mpi", "MPICH or Intel MPI", (2, 4, 1)),
        (TORCHRUN | SRUN | OPEN_MPI, "torchrun", "torchrun", (3, 8, 1)),
        (BY_HAND | SRUN, "torchrun", "environment", (3, 8, 1)),
        (BY_HAND | {"RANK": "2", "WORLD_SIZE": "4"} | OPEN_MPI, "mpi", "Open MPI", (2, 4, 1)),
    ],
    ids=str,
)
def test_launcher_is_found_by_its_variables(environment, kind, launcher, place):
    found = find(environment)
    assert (found.kind, found.launcher) == (kind, launcher)
    assert (found.rank, found.world_size, found.local_rank) == place


def test_batch_script_of_slurm_is_in_no_step():
    assert find({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[08-11,20],gpu1", "n08"),
        ("gpu1,n[1-2]", "gpu1"),
        ("r[1-2]n[07,9]", "r1n07"),
        ("a-b.c", "a-b.c"),
    ],
)
def test_first_host_of_slurms_short_form(nodes, first):
    assert first_host(nodes) == first


def test_ranks_of_a_slurm_step_meet_on_its_first_node_at_a_port_of_the_job():
    environment = {"SLURM_STEP_NODELIST": "n[3-4]", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0"}
    assert slurm_meeting_place(environment) == ("n3", 20123)
    assert slurm_meeting_place(environment | {"SLURM_STEP_ID": "2"})[1] != 20123
    assert slurm_meeting_place(environment | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}) == ("a", 5)


def test_world_that_is_not_the_launchers_is_refused():
    world.check_size(None, 1, "MPICH")
    world.check_size(find_mpi(PMI), 4, "MPICH")
    with pytest.raises(ConfigError, match=r"4 ranks that MPICH or .* launcher started .*Open MPI 5.* world of 1"):
        world.check_size(find_mpi(PMI), 1, "Open MPI 5.0")
    world.check_vendor(find_mpi(OPEN_MPI), "Open MPI 5.0")
    world.check_vendor(find_mpi(PMI), "Open MPI 5.0")  # Slurm's PMI starts both
    for library in ("MPICH 5.0", "Intel(R) MPI Library 2021"):  # its MPI_Init would end the process
        with pytest.raises(ConfigError, match=r"that Open MPI's launcher started .* cannot be started by it"):
            world.check_vendor(find_mpi(OPEN_MPI), library)


def test_missing_mpi4py_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingDependency, match=r"pip install 'distadam\[mpi\]'"):
        distadam.register_mpi_backend()


class Comm:
    """One of ``size`` ranks of a communicator that answers as told."""

    def __init__(self, rank: int = 0, size: int = 1, told: Any = None) -> None:
        self.rank, self.size, self._told = rank, size, told

    def Split_type(self, kind: int) -> Comm:
        return self

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def Free(self) -> None:
        pass

    def bcast(self, value: Any) -> Any:
        return value if value is not None else self._told


class Mpi:
    """mpi4py's module, of which the progress thread uses little."""

    ANY_SOURCE = ANY_TAG = -1
    COMM_TYPE_SHARED = INT64_T = 0
    Exception = OSError
    Status = object

    def __init__(self, comm: Comm | None = None) -> None:
        self.COMM_WORLD = comm
        self.Request = self
        self.done: set[Any] = set()
        self.tested = threading.Semaphore(0)
        self.abort_status = 0

    def Testsome(self, requests: list[Any], statuses: list[Any]) -> list[int]:
        self.tested.release()
        found = [index for index, request in enumerate(requests) if request in self.done]
        self.done -= {requests[index] for index in found}
        return found

    def _set_abort_status(self, status: int) -> None:
        self.abort_status = status


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_ranks_meet_where_mpi_says(environment):
    world.meet(Mpi(Comm(1, 3, ("10.0.0.1", "777"))))
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")] == [
        "1",
        "3",
        "10.0.0.1",
        "777",
    ]
    with pytest.raises(ConfigError, match="expected WORLD_SIZE=2, as in MPI's world, but the environment says 3"):
        world.meet(Mpi(Comm(1, 2)))


def test_first_rank_chooses_loopback_and_a_free_port_for_one_host(environment):
    world.meet(Mpi(Comm(0, 2)))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(os.environ["MASTER_PORT"]) < 65536


# The progress thread --------------------------------------------------------------------------------------------------


class Letters(Comm):
    """Peers of which some answer: rank -> how many collectives they have entered."""

    def __init__(self, size: int, answers: dict[int, int]) -> None:
        super().__init__(0, size)
        self._answers, self._inbox = answers, []

    def Isend(self, data: list[Any], peer: int, tag: int) -> Letters:
        if peer in self._answers:
            self._inbox.append((peer, data[0][0], data[0][1], self._answers[peer]))
        return self

    def Test(self) -> bool:
        return True

    def Improbe(self, source: int, tag: int, status: Any) -> Any:
        if not self._inbox:
            return None
        self._next = self._inbox.pop()
        return self

    def Recv(self, data: list[Any]) -> None:
        for place, word in enumerate(self._next[1:]):
            data[0][place] = word


class Answer:
    """What MPI says of a message: an answer, from whoever sent it last."""

    tag = progress._ANSWER
    letters: Letters

    @property
    def source(self) -> int:
        return self.letters._next[0]


@pytest.fixture
def started(monkeypatch):
    """Start progress threads on fakes; end them."""
    threads = []

    def start(size: int = 3, answers: dict[int, int] | None = None) -> tuple[Progress, Mpi, Lane]:
        mpi, letters = Mpi(), Letters(size, answers or {})
        mpi.Status = type("Status", (Answer,), {"letters": letters, "__init__": lambda self, *_: None})
        threads.append(Progress(mpi, letters))
        lane = Lane("a group", 7, range(size))
        threads[-1].add_lane(lane)
        return threads[-1], mpi, lane

    monkeypatch.setattr(progress, "GRACE_S", 0.0)
    monkeypatch.setattr(progress, "_DRAIN_S", 0.0)
    yield start
    for thread in threads:
        thread.stop()


def steps(*waits: list[Any], then: Any = None) -> progress.Steps:
    yield from (requests for requests in waits)  # a generator takes what is sent
    if then is not None:
        then()


def job(lane: Lane, what: str, body: progress.Steps, timeout_s: float = 60.0, **options: Any) -> Job:
    return Job(what, body, timeout_s, lane, list(lane.world_ranks), options.get("is_collective", True))


def test_collectives_of_a_group_run_one_at_a_time_and_messages_beside_them(started):
    thread, mpi, lane = started()
    order: list[str] = []
    first = job(lane, "first", steps(["a"], ["b"], then=lambda: order.append("first")))
    second = job(lane, "second", steps(["c"], then=lambda: order.append("second")))
    message = job(lane, "message", steps(["d"], then=lambda: order.append("message")), is_collective=False)
    for each in (first, second, message):
        thread.submit(each)
    mpi.done |= {"b", "c", "d"}  # the second would be over, had it been begun
    assert thread.wait(message, 10)
    assert not second.ended.is_set()
    mpi.done.add("a")
    assert thread.wait(second, 10)
    assert order == ["message", "first", "second"]
    assert mpi.abort_status == 0


def test_thousands_of_collectives_that_end_at_once_are_no_recursion(started):
    thread, _, lane = started()
    gate = threading.Event()
    jobs = [job(lane, "held", steps(then=gate.wait)), *(job(lane, str(n), steps()) for n in range(5000))]
    for each in jobs:
        thread.submit(each)
    gate.set()
    assert thread.wait(jobs[-1], 30)
    assert all(each.error is None for each in jobs)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({1: 1}, r"rank 2 is dead, stopped or busy inside Python's lock"),
        ({1: 1, 2: 0}, r"rank 2 is alive and not there yet"),
        ({}, r"ranks 1, 2 are dead"),
        ({1: 1, 2: 1}, r"all ranks take part in it"),
    ],
)
def test_time_out_says_who_is_missing_and_the_group_is_unusable_from_then_on(started, answers, words):
    thread, mpi, lane = started(3, answers)
    late = job(lane, "an all-reduce", steps(["never"]), timeout_s=0.2)
    queued = job(lane, "a broadcast", steps())
    for each in (late, queued):
        thread.submit(each)
    assert thread.wait(queued, 30)
    assert isinstance(late.error, CommError)
    with pytest.raises(CommError, match=rf"^an all-reduce did not finish within 0.2 s: .*{words}"):
        raise late.error
    with pytest.raises(CommError, match=r"^a broadcast could not start: .* unusable since an all-reduce did not"):
        raise queued.error
    assert not thread.remove_lane(lane)  # MPI may still write into its memory
    thread.stop()
    assert mpi.abort_status == 1  # MPI_Finalize would wait for the dead


def test_error_in_a_message_is_its_own_and_in_a_collective_the_groups(started):
    def fails() -> progress.Steps:
        yield []
        raise ValueError("no such thing")

    thread, _, lane = started()
    message = Job("a message", fails(), 60.0, lane, [2], False)
    thread.submit(message)
    assert thread.wait(message, 10)
    assert str(message.error) == "a message failed (with rank 2): no such thing"
    assert lane.error is None
    thread.submit(collective := job(lane, "a gather", fails()))
    assert thread.wait(collective, 10)
    assert lane.error is collective.error


def test_idle_thread_does_not_test_and_looks_ten_times_a_second(started, monkeypatch):
    thread, mpi, lane = started()
    pauses: list[float] = []
    wait = thread._changed.wait
    monkeypatch.setattr(thread._changed, "wait", lambda timeout: (pauses.append(timeout), wait(timeout))[1])
    thread.submit(only := job(lane, "only", steps(["a"])))
    mpi.done.add("a")
    assert thread.wait(only, 10)
    while mpi.tested.acquire(blocking=False):
        pass
    pauses.clear()
    while len(pauses) < 10:
        thread._thread.join(0.05)
    assert not mpi.tested.acquire(blocking=False)
    assert pauses[-1] == progress._IDLE_S == 0.1
    assert all(later >= earlier for earlier, later in pairwise(pauses))


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    steps = 128 if dtype is torch.bfloat16 else 1024  # values have all the bits that the dtype has
    leaves = [(1 + torch.randint(0, steps, (5000,), generator=generator) / steps).to(dtype) for _ in range(3)]
    exact = torch.stack([leaf.double() for leaf in leaves])
    for op, expected in (
        (dist.ReduceOp.SUM, exact.sum(0)),
        (dist.ReduceOp.AVG, (exact.sum(0) / 3).float()),
        (dist.ReduceOp.MAX, exact.amax(0)),
        (dist.ReduceOp.MIN, exact.amin(0)),
        (dist.ReduceOp.PRODUCT, leaves[0].float() * leaves[1].float() * leaves[2].float()),
    ):
        reduction = numbers.Reduction(op, dtype, 3)
        assert reduction.in_float32
        assert torch.equal(reduction.combine(TreeSum(3), leaves).to(dtype), expected.to(dtype))
    assert not torch.equal(leaves[0] + leaves[1] + leaves[2], exact.sum(0).to(dtype))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (dist.ReduceOp.AVG, torch.int32),
        (dist.ReduceOp.AVG, torch.bool),
        (dist.ReduceOp.BAND, torch.float32),
        (dist.ReduceOp.BXOR, torch.bfloat16),
        (dist.ReduceOp.SUM, torch.float8_e4m3fn),
        (dist.ReduceOp.SUM, torch.complex64),
        (dist._make_nccl_premul_sum(2.0), torch.float32),
    ],
)
def test_reductions_that_are_not_defined_are_refused(op, dtype):
    with pytest.raises(ConfigError, match=f"no reduction .* of {dtype}"):
        numbers.Reduction(op, dtype, 2)


# What mpirun.sh reads -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
exec(open(sys.argv[1]).read())  # without torch
note("reduce_scatter of bucket 3 on rank 1 of 2")
note("agree of step")
end(1)
end(2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_note_outlives_a_killed_process(tmp_path):
    variables = {phase.VARIABLE: str(tmp_path), "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, phase.__file__], env=os.environ | variables, check=False)
    assert done.returncode == -9
    assert phase.read(tmp_path, 1) == "agree of step"
    assert phase.read(tmp_path, 0) == ""
    assert (tmp_path / "exit.1").read_text().endswith(" 1 1\n")


def test_mpirun_shows_its_command(tmp_path):
    launcher = tmp_path / "mpiexec"
    launcher.write_text('#!/bin/sh\necho "mpiexec (Open MPI) 5.0"\n')
    launcher.chmod(0o755)
    variables = {"DRY_RUN": "1", "NPROC": "3", "MPIEXEC": str(launcher), "PHASES": str(tmp_path / "phases")}
    variables |= {"MPIEXEC_ARGS": "--hostfile h", "PYTHON": "python9"}
    script = str(ROOT / "launch/mpirun.sh")
    done = subprocess.run(
        [script, "t.py", "a b"], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{launcher} --hostfile h --bind-to none -x DISTADAM_PHASES ")
    assert done.stdout.rstrip().endswith(r"rank python9 -m mpi4py t.py a\ b")
    assert " -n 3 bash -c " in done.stdout
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2
