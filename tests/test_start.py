"""`init_process_group`: what it finds in the environment, what it makes of it, what it refuses.

Ranks are processes that get the variables which torchrun (or another launcher) sets. Nothing numeric is compared.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distadam
from tests.ranks import _context

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE",
    "PMI_RANK",
    "PMIX_RANK",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


def _serve(connection: Connection, environment: dict[str, str], function: Any, args: tuple[Any, ...]) -> None:
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        connection.send(function(*args))
    except Exception as error:
        connection.send((type(error).__name__, str(error)))
    connection.poll(60)  # until it is killed: rank 0 has the store that the others still connect through


def run_with(environments: list[dict[str, str]], function: Any, *args: Any) -> list[Any]:
    """Run ``function`` in one fresh process for each environment."""
    pipes, processes = [], []
    for environment in environments:
        mine, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs, environment, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        answers = []
        for pipe in pipes:
            assert pipe.poll(60), "a process did not answer"
            answers.append(pipe.recv())
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


def launched(world_size: int, *, elastic: bool) -> list[dict[str, str]]:
    """The variables that torchrun sets, by rank; without its run id, those that people set by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if elastic:
        common["TORCHELASTIC_RUN_ID"] = "none"
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _start(*args: Any, **options: Any) -> distadam.RunInfo:
    return distadam.init_process_group(*args, **options)


def _start_and_sum() -> tuple[distadam.RunInfo, distadam.RunInfo, float, float, str]:
    info = distadam.init_process_group(timeout_s=44.0)
    again = distadam.init_process_group()
    total = torch.full((1,), float(dist.get_rank() + 1))
    dist.all_reduce(total)
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return info, again, total.item(), timeout, str(info)


@pytest.mark.parametrize("elastic", [True, False], ids=["torchrun", "by hand"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_start_joins_what_the_variables_describe(world_size: int, elastic: bool) -> None:
    answers = run_with(launched(world_size, elastic=elastic), _start_and_sum)
    for rank, (info, again, total, timeout, text) in enumerate(answers):
        launcher = "torchrun" if elastic else "environment"
        assert info == distadam.RunInfo(
            launcher=launcher,
            backend="gloo",
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            device=torch.device("cpu"),
        )
        assert again == info  # calling it twice is calling it once
        assert total == world_size * (world_size + 1) / 2
        assert timeout == 44.0
        assert text == (
            f"distadam: launcher {launcher}, backend gloo, rank {rank} of {world_size} (local rank {rank}), device cpu"
        )


def _start_alone() -> tuple[distadam.RunInfo, bool, str]:
    info = distadam.init_process_group()
    optimizer = distadam.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.step()
    return info, dist.is_initialized(), str(info)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": ""},
    ],
    ids=str,
)
def test_start_stays_one_process_when_nothing_says_more(environment: dict[str, str]) -> None:
    [(info, initialized, text)] = run_with([environment], _start_alone)
    assert not initialized
    assert (info.launcher, info.backend, info.rank, info.world_size) == ("none", "none", 0, 1)
    assert text == "distadam: launcher none, backend none, rank 0 of 1 (local rank 0), device cpu"


def _start_without_mpi4py() -> distadam.RunInfo:
    sys.modules["mpi4py"] = None  # type: ignore[assignment]
    return distadam.init_process_group()


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "MPICH or Intel MPI"),
    ],
)
def test_start_under_mpi_without_mpi4py_says_the_cure(variables: dict[str, str], launcher: str) -> None:
    [(name, message)] = run_with([variables], _start_without_mpi4py)
    assert name == "MissingDependency"
    variable = next(iter(variables))
    for words in (f"{variable}=2", launcher, "pip install 'distadam[mpi]'", "MASTER_ADDR", "distadam launch"):
        assert words in message


def test_start_in_an_allocation_without_a_step_says_the_cure() -> None:
    [(name, message)] = run_with([{"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}], _start)
    assert name == "ConfigError"
    for words in ("SLURM_NTASKS=2", "Slurm", "srun", "torchrun"):
        assert words in message


def _start_elsewhere_and_sum() -> tuple[str, float, bool]:
    info = _start_without_mpi4py()
    total = torch.ones(1)
    dist.all_reduce(total)
    return str(info), total.item(), distadam.init_process_group() == info


@pytest.mark.parametrize("launcher", ["Slurm", "Open MPI"])
def test_start_takes_the_place_that_another_launcher_gives(launcher: str) -> None:
    """srun's ranks meet on the first node at a port of the job; MPI's, without mpi4py, where they are told to."""
    [given, _] = launched(2, elastic=False)
    place = {"MASTER_ADDR": given["MASTER_ADDR"], "MASTER_PORT": given["MASTER_PORT"]}
    names = {
        "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    }[launcher]
    environments = [place | dict(zip(names, ("2", str(rank), str(rank)), strict=True)) for rank in range(2)]
    for rank, (text, total, again) in enumerate(run_with(environments, _start_elsewhere_and_sum)):
        assert text == f"distadam: launcher {launcher}, backend gloo, rank {rank} of 2 (local rank {rank}), device cpu"
        assert total == 2
        assert again


def test_start_prefers_torchruns_variables_to_the_schedulers() -> None:
    environments = [environment | {"SLURM_NTASKS": "4"} for environment in launched(2, elastic=True)]
    assert [info.world_size for info in run_with(environments, _start)] == [2, 2]


def _start_with_backend(backend: str) -> list[str]:
    info = distadam.init_process_group(backend)
    return [info.backend, *sorted(str(device) for device in dist.group.WORLD._device_types)]


def test_start_takes_the_backend_that_is_named() -> None:
    assert run_with(launched(1, elastic=True), _start_with_backend, "cpu:gloo") == [["cpu:gloo", "cpu"]]


def _start_after_the_user() -> distadam.RunInfo:
    dist.init_process_group("gloo")
    return distadam.init_process_group("ignored: there is a group")


def test_start_reports_the_group_that_the_user_made() -> None:
    for rank, info in enumerate(run_with(launched(2, elastic=False), _start_after_the_user)):
        assert (info.backend, info.rank, info.world_size) == ("gloo", rank, 2)


def test_run_info_is_a_value() -> None:
    info = distadam.RunInfo(
        launcher="torchrun", backend="nccl", rank=3, world_size=8, local_rank=1, device=torch.device("cuda", 1)
    )
    assert str(info) == "distadam: launcher torchrun, backend nccl, rank 3 of 8 (local rank 1), device cuda:1"
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.rank = 2  # type: ignore[misc]
