"""``distadam doctor`` names each fault that is injected here, with a cure, and tells programs by its exit code.

Faults are real where this process can make them (a port that is taken, a limit that is low, a variable that is wrong,
a directory that cannot be written, a file system that is small); others are facts handed to the check. A check that
finds nothing on a healthy machine is shown beside each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from distadam import native
from distadam.comm.launchers import Found
from distadam.comm.tree import TreeSum
from distadam.doctor import Finding, Question, examine, rank
from distadam.doctor.devices import check_kernels, check_threads
from distadam.doctor.launcher import check_launcher
from distadam.doctor.mpi import Mpi, check_mpi
from distadam.doctor.network import (
    Endpoint,
    Interface,
    check_cards,
    check_endpoint,
    find_interfaces,
    gloo_card,
    nccl_card,
)
from distadam.doctor.storage import check_checkpoints
from distadam.doctor.system import check_clock, check_open_files, check_shared_memory, compare_clocks
from distadam.doctor.versions import Facts, check_versions, compare_facts
from tests.ranks import run_ranks
from tests.reference_optimizers import CPU_KERNEL

ROOT = Path(__file__).parents[1]
LO = Interface(name="lo", address="127.0.0.1", is_up=True, is_loopback=True)
ETH = Interface(name="eth0", address="10.1.0.1", is_up=True, is_loopback=False)
BARE = Interface(name="eth1", address="", is_up=True, is_loopback=False)
DOWN = Interface(name="eth2", address="10.2.0.1", is_up=False, is_loopback=False)
DOCKER = Interface(name="docker0", address="172.17.0.1", is_up=True, is_loopback=False)
CARDS = [LO, DOCKER, ETH, BARE, DOWN]
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_SIZE": "2", "PMI_RANK": "1"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
FACTS = Facts(host="a", distadam="0.1.0", torch="2.13.0+cpu", cuda="none", triton="none", python="3.11.7")


def only(findings: list[Finding], check: str, level: str, *words: str) -> Finding:
    """Return the one finding of that check; its text has the words, and what is not ok has a cure."""
    (found,) = [finding for finding in findings if finding.check == check]
    assert found.level == level, found
    assert all(word in found.text for word in words), found
    assert bool(found.cure) == (level != "ok"), found
    return found


def doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = [sys.executable, "-m", "distadam", "doctor", *arguments]
    env = kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)


@pytest.fixture
def taken_port():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The command ----------------------------------------------------------------------------------------------------------


def test_doctor_names_real_faults_as_json_and_ends_with_one(taken_port):
    """Seven at once: card, port, directory, kernel, threads, open files, MPI."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "sys.argv = ['distadam', *sys.argv[1:]]; from distadam.cli import main; main()"
    )
    arguments = ["doctor", "--json", "--no-self-test", "--mpi", "--endpoint", f"127.0.0.1:{taken_port}"]
    variables = {"GLOO_SOCKET_IFNAME": "nosuch0", "DISTADAM_KERNEL": "fastest", "OMP_NUM_THREADS": "many"}
    without_mpi = {"PATH": str(ROOT / "nowhere")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--checkpoints", "/proc/checkpoints"],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables | without_mpi,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["level"] == "error"
    findings = [Finding(**entry) for entry in told["findings"]]
    only(findings, "network.gloo", "error", "GLOO_SOCKET_IFNAME=nosuch0", "no such interface")
    only(findings, "network.port", "error", str(taken_port), "is taken")
    only(findings, "checkpoints.write", "error", "/proc/checkpoints")
    only(findings, "kernels.choice", "error", "DISTADAM_KERNEL", "fastest")
    only(findings, "threads.omp", "error", "many")
    only(findings, "system.open_files", "error", "64 files")
    missing = [finding for finding in findings if finding.check.startswith("mpi.")]
    assert [finding.level for finding in missing] == ["error"]
    assert "missing" in missing[0].text


@pytest.mark.long
def test_doctor_is_content_with_a_healthy_host_and_tests_it(tmp_path):
    done = doctor("--seconds", "0.2", "--checkpoints", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("2 ranks met", "all right", "are torch.optim's within", f"all ranks see {tmp_path}", "0 errors"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_doctor_leaves_the_self_test_out_where_it_would_fail():
    done = doctor("--json", "--seconds", "0", GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode == 1
    findings = [Finding(**entry) for entry in json.loads(done.stdout)["findings"]]
    only(findings, "self_test", "warning", "left out", "network.gloo")


@pytest.mark.long
def test_doctor_under_torchrun_reports_once_for_all_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distadam"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run(
        [*command, "doctor", "--json", "--seconds", "0.1"], env=env, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    findings = [Finding(**entry) for entry in json.loads(done.stdout)["findings"]]
    only(findings, "self_test.step", "ok")
    only(findings, "versions.torch", "ok")


def test_doctor_refuses_an_endpoint_that_is_none():
    with pytest.raises(ValueError, match="expected host:port but got 'here'"):
        Endpoint.parse("here")


def test_a_check_that_breaks_is_a_finding_and_others_run(monkeypatch):
    def broken(num_local: int) -> list[Finding]:
        raise OSError("no limits here")

    monkeypatch.setattr("distadam.doctor.host.check_open_files", broken)
    findings = examine(Question(num_local=1))
    only(findings, "system.open_files", "warning", "no limits here")
    only(findings, "kernels.choice", "ok")


# Network --------------------------------------------------------------------------------------------------------------


def test_closed_port_and_unknown_host_are_named():
    findings, address = check_endpoint(Endpoint(host="127.0.0.1", port=free_port()), is_first=False)
    assert address == "127.0.0.1"
    only(findings, "network.port", "error", "connection refused")
    findings, address = check_endpoint(Endpoint(host="no-such-host.invalid", port=1), is_first=None)
    assert address == ""
    only(findings, "network.endpoint", "error", "no-such-host.invalid")


def test_address_of_another_host_on_the_first_host_is_named():
    findings, _ = check_endpoint(Endpoint(host="192.0.2.1", port=29500), is_first=True)  # a documentation address
    only(findings, "network.endpoint", "error", "192.0.2.1")


def test_free_port_and_answering_port_are_fine(taken_port):
    only(check_endpoint(Endpoint(host="127.0.0.1", port=free_port()), None)[0], "network.port", "ok", "is free")
    only(check_endpoint(Endpoint(host="127.0.0.1", port=taken_port), False)[0], "network.port", "ok", "answers")


@pytest.mark.parametrize(
    ("setting", "words"),
    [("eth9", "no such interface"), ("eth1", "no IPv4 address"), ("eth2", "is down")],
)
def test_wrong_card_for_gloo_is_named_with_a_better_one(setting, words):
    findings = check_cards({"GLOO_SOCKET_IFNAME": setting}, CARDS, "", has_cuda=False)
    found = only(findings, "network.gloo", "error", words)
    assert found.cure == "export GLOO_SOCKET_IFNAME=docker0"


def test_loopback_for_ranks_on_several_hosts_is_named(monkeypatch):
    monkeypatch.setattr("distadam.doctor.network.resolve", lambda host: ["127.0.0.1"])
    found = only(check_cards({}, CARDS, "10.1.0.1", has_cuda=False), "network.gloo", "error", "other hosts cannot")
    assert found.cure == "export GLOO_SOCKET_IFNAME=eth0"
    only(check_cards({}, CARDS, "127.0.0.1", has_cuda=False), "network.gloo", "ok")


def test_card_that_does_not_lead_to_the_meeting_point_is_named():
    findings = check_cards({"GLOO_SOCKET_IFNAME": "docker0"}, CARDS, "10.1.0.1", has_cuda=False)
    assert only(findings, "network.gloo", "warning", "the way to 10.1.0.1 is eth0").cure.endswith("eth0")


def test_wrong_card_for_nccl_is_named_even_without_cuda():
    only(check_cards({"NCCL_SOCKET_IFNAME": "ib"}, CARDS, "", has_cuda=False), "network.nccl", "error", "no such")


@pytest.mark.parametrize(
    ("setting", "name"),
    [(None, "eth0"), ("docker", "docker0"), ("=eth", None), ("=eth0", "eth0"), ("^lo,docker", "eth0"), ("^eth", "lo")],
)
def test_nccl_card_follows_nccls_rules(setting, name):
    card, _ = nccl_card({} if setting is None else {"NCCL_SOCKET_IFNAME": setting}, CARDS)
    assert (card and card.name) == name


def test_gloo_card_is_the_one_with_the_address_of_the_hosts_name(monkeypatch):
    monkeypatch.setattr("distadam.doctor.network.can_bind", lambda address, port=0: None)
    monkeypatch.setattr("distadam.doctor.network.resolve", lambda host: ["10.1.0.1"])
    assert gloo_card({}, CARDS)[0] is ETH
    monkeypatch.setattr("distadam.doctor.network.resolve", lambda host: [])
    assert gloo_card({}, CARDS)[0] is LO  # torch falls back to loopback
    assert any(card.is_loopback and card.address == "127.0.0.1" for card in find_interfaces())


# Versions, devices, MPI -----------------------------------------------------------------------------------------------


def test_torch_that_is_too_old_is_named():
    old = dataclasses.replace(FACTS, torch="2.8.1")
    found = only(check_versions(old), "versions.torch", "error", "expected torch 2.9 or newer but got 2.8.1")
    assert 'pip install "torch>=2.9"' in found.cure
    only(check_versions(FACTS, driver=Path("/nonexistent")), "versions.torch", "ok")


def test_torch_without_cuda_beside_a_driver_is_named(tmp_path):
    (tmp_path / "version").touch()
    only(check_versions(FACTS, tmp_path / "version"), "versions.cuda", "warning", "training runs on the CPU")


def test_mismatched_torch_between_ranks_is_named():
    other = dataclasses.replace(FACTS, host="b", torch="2.12.0+cpu")
    only(compare_facts([FACTS, FACTS, other]), "versions.torch_differs", "error", "2.12.0+cpu on rank 2 (b)")
    only(compare_facts([FACTS, FACTS]), "versions.ranks", "ok")
    assert compare_facts([FACTS]) == []


def test_unknown_kernel_is_named(monkeypatch):
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)
    only(check_kernels(), "kernels.choice", "ok", f"{CPU_KERNEL} (")
    monkeypatch.setattr(native, "_load", lambda: (None, "DISTADAM_NATIVE=0"))
    only(check_kernels(), "kernels.choice", "ok", "torch_fused", "torch has no fused RMSprop")
    only(check_kernels(), "kernels.compiled", "warning", "slower", "DISTADAM_NATIVE=0")
    monkeypatch.setenv("DISTADAM_KERNEL", "fastest")
    only(check_kernels(), "kernels.choice", "error", "fastest")


@pytest.mark.parametrize(
    ("mpi", "environment", "check", "words"),
    [
        (Mpi(), OPEN_MPI, "mpi.mpi4py", "started by Open MPI"),
        (Mpi(has_mpi4py=True, library="MPICH Version: 5.0"), {}, "mpi.launcher", "mpiexec is missing"),
        (Mpi(has_mpi4py=True, problem="libmpi.so.12: cannot open"), {}, "mpi.library", "libmpi.so.12"),
        (
            Mpi(has_mpi4py=True, launcher="mpiexec (OpenRTE) 4.1.4", library="MPICH Version: 5.0.2"),
            {},
            "mpi.mismatch",
            "Open MPI's but mpi4py's library is MPICH's",
        ),
        (  # mpiexec in the path is not always what started this process
            Mpi(has_mpi4py=True, launcher="HYDRA build details:", library="MPICH Version: 5.0.2"),
            OPEN_MPI,
            "mpi.mismatch",
            "the launcher (OMPI_COMM_WORLD_SIZE=2) is Open MPI's",
        ),
    ],
)
def test_missing_and_mismatched_mpi_are_named(mpi, environment, check, words):
    only(check_mpi(mpi, environment, wanted=True), check, "error", words)


def test_no_mpi_is_fine_where_nobody_asks_for_it():
    only(check_mpi(Mpi(), {}), "mpi.library", "ok")
    whole = Mpi(has_mpi4py=True, launcher="HYDRA build details:", library="MPICH Version: 5.0.2")
    only(check_mpi(whole, PMI, wanted=True), "mpi.library", "ok", "MPICH")
    intel = dataclasses.replace(whole, library="Intel(R) MPI Library 2021.11")  # both speak PMI
    only(check_mpi(intel, PMI), "mpi.library", "ok", "Intel")


@pytest.mark.parametrize(
    ("environment", "level", "words"),
    [
        ({}, "ok", "none"),
        (PMI, "ok", "MPICH or Intel MPI started 2 ranks (PMI_SIZE=2), 1 of them"),
        (OPEN_MPI, "ok", "Open MPI started 2 ranks"),
        (SLURM, "ok", "Slurm started 2 ranks (SLURM_STEP_NUM_TASKS=2)"),
        (SLURM | TORCHRUN, "ok", "torchrun started 8 ranks (WORLD_SIZE=8)"),  # launch/slurm.sbatch
        ({"SLURM_NTASKS": "2"}, "warning", "srun did not start this process"),
        (PMI | {"RANK": "0", "WORLD_SIZE": "4"}, "warning", "rank 0 of 4, MPICH or Intel MPI says rank 1 of 2"),
    ],
)
def test_launcher_is_named(environment, level, words):
    only(check_launcher(environment, 1), "launcher", level, words)


def test_more_threads_than_cores_are_named():
    found = only(check_threads(8, {"OMP_NUM_THREADS": "4"}, 16, 4), "threads.omp", "warning", "8 ranks x 4 threads")
    assert found.cure == "export OMP_NUM_THREADS=2"
    only(check_threads(4, {"OMP_NUM_THREADS": "4"}, 16, 4), "threads.omp", "ok")


@pytest.mark.parametrize("launcher", [PMI, OPEN_MPI, SLURM], ids=["mpich", "openmpi", "slurm"])
def test_ranks_that_take_all_cores_each_are_named(launcher):
    """mpiexec and srun set no OMP_NUM_THREADS: torch takes every core, or fewer where MKL knows the launcher."""
    found = only(check_threads(8, launcher, 16, 16), "threads.omp", "warning", "8 ranks x 16 threads", "is not set")
    assert found.cure == "export OMP_NUM_THREADS=2"
    only(check_threads(8, launcher, 16, 2), "threads.omp", "ok")  # it is known, or has kept each to two
    only(check_threads(8, launcher, 16, 16, has_cuda=True), "threads.omp", "ok")
    only(check_threads(8, launcher | TORCHRUN, 16, 16), "threads.omp", "ok")
    only(check_threads(8, {}, 16, 16), "threads.omp", "ok", "distadam launch shares")


def test_cores_of_a_host_are_those_of_all_its_ranks(monkeypatch):
    """Open MPI, for one, keeps two ranks to one core each."""
    seats = [rank.Seat("a", (0,)), rank.Seat("b", (0, 1)), rank.Seat("a", (4, 5))]
    asked: list[Question] = []
    cli_doctor = importlib.import_module("distadam.cli.doctor")  # distadam.cli has a function of that name
    monkeypatch.setattr(cli_doctor, "meet", lambda: seats)
    monkeypatch.setattr(cli_doctor, "examine", lambda question: asked.append(question) or [])
    monkeypatch.setattr(cli_doctor, "run_self_test", lambda *_: [])
    monkeypatch.setattr(cli_doctor, "gather_findings", lambda own, together: own + together)
    for number in range(3):
        job = Found(kind="mpi", launcher="", variable="", rank=number, world_size=3, local_rank=None)
        cli_doctor._in_job(job, Question(num_local=9), 0.0, self_test=False)
    assert [(question.num_local, question.num_cores) for question in asked] == [(2, 3), (1, 2)]


# System and storage ---------------------------------------------------------------------------------------------------


def mib(number: int) -> SimpleNamespace:
    return SimpleNamespace(f_blocks=number * 256, f_bavail=number * 256, f_frsize=4096)


def test_tiny_shared_memory_is_named(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: mib(64))  # Docker's default
    found = only(check_shared_memory(), "system.shm", "warning", "64 MiB")
    assert "--shm-size" in found.cure
    only(check_shared_memory(has_cuda=True), "system.shm", "error", "NCCL")
    monkeypatch.setattr(os, "statvfs", lambda path: mib(2048))
    only(check_shared_memory(), "system.shm", "ok")
    monkeypatch.undo()
    only(check_shared_memory(Path("/nonexistent")), "system.shm", "warning", "no shared memory")


def test_low_limit_of_open_files_is_named():
    only(check_open_files(8, (256, 65536)), "system.open_files", "error", "256 files")
    only(check_open_files(2, (1024, 65536)), "system.open_files", "warning", "1,024 files")
    assert "administrator" in check_open_files(2, (100, 1024))[0].cure
    only(check_open_files(2, (65536, 65536)), "system.open_files", "ok")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == check_open_files(2)[0].values["soft"]


def test_clocks_that_differ_are_named():
    only(compare_clocks([0.0, 0.2, -7.5], 0.1, ["a", "a", "b"]), "self_test.clock", "error", "rank 2 (b) is -7.5 s")
    only(compare_clocks([0.0, 1.5], 0.9, ["a", "b"]), "self_test.clock", "ok")  # not more than the measurement's doubt
    only(check_clock(0x40, several_hosts=True), "system.clock", "warning", "not synchronised")
    only(check_clock(0x40, several_hosts=False), "system.clock", "ok")
    only(check_clock(0x1, several_hosts=True), "system.clock", "ok")


def test_directory_that_cannot_be_written_is_named(tmp_path):
    only(check_checkpoints(Path("/proc/checkpoints")), "checkpoints.write", "error", "cannot write")
    (tmp_path / "file").touch()
    only(check_checkpoints(tmp_path / "file" / "below"), "checkpoints.write", "error")
    if os.geteuid() != 0:
        tmp_path.chmod(0o555)
        only(check_checkpoints(tmp_path), "checkpoints.write", "error", "Permission denied")


def test_full_disk_is_named(monkeypatch, tmp_path):
    def full(probe: Path) -> float:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("distadam.doctor.storage._write", full)
        found = only(check_checkpoints(tmp_path), "checkpoints.write", "error", "No space left")
        assert "prune" in found.cure
    monkeypatch.setattr(os, "statvfs", lambda path: mib(100))
    only(check_checkpoints(tmp_path), "checkpoints.space", "warning", "0.1 GiB free")
    assert list(tmp_path.iterdir()) == []


def test_file_server_with_another_clock_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("distadam.doctor.storage._write", lambda probe: -40.0)
    only(check_checkpoints(tmp_path), "checkpoints.clock", "warning", "-40.0 s")


# The self-test --------------------------------------------------------------------------------------------------------


def self_test(rank_number: int, fault: str, directory: str) -> list[dict[str, object]]:
    """Run the self-test in a pool's rank, with a fault on rank 1."""
    patches: list[Any] = []
    if fault == "sums" and rank_number == 1:
        add = TreeSum.add
        patches.append(
            mock.patch.object(TreeSum, "add", lambda self, target, leaves: add(self, target, leaves[:1] * 2))
        )
    if fault == "step" and rank_number == 1:
        patches.append(mock.patch("torch.optim.AdamW", functools.partial(torch.optim.AdamW, weight_decay=0.5)))
    if fault == "clock" and rank_number == 1:
        patches.append(mock.patch("time.time", return_value=1.0))
    if fault == "versions" and rank_number == 1:
        patches.append(mock.patch.object(Facts, "here", return_value=dataclasses.replace(FACTS, torch="2.9.0")))
    place = Path(directory)
    if fault == "directory" and rank_number == 1:
        place = place / "mine"
        place.mkdir()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return [finding.as_dict() for finding in rank.self_test(0.0, place, 0.0)]


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("none", "", ""),
        ("sums", "self_test.collectives", "wrong"),
        ("step", "self_test.step", "differs from torch.optim.AdamW's"),
        ("clock", "self_test.clock", "rank 1"),
        ("versions", "versions.torch_differs", "on rank 1"),
        ("directory", "checkpoints.shared", "rank 1 does not see"),
    ],
)
def test_self_test_names_what_differs_between_ranks(fault, check, words, tmp_path):
    for answer in run_ranks(2, self_test, fault, str(tmp_path)):
        findings = [Finding(**entry) for entry in answer]
        wrong = [finding for finding in findings if finding.level == "error"]
        also = {"self_test.step"} if fault == "sums" else set()  # a step is made of sums
        assert {finding.check for finding in wrong} - also == ({check} if check else set()), findings
        if check:
            only(wrong, check, "error", words)
