"""Join the job that a launcher started, or be one process."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distadam.comm.launchers import Found, find, find_slurm, slurm_meeting_place
from distadam.comm.mpi.process_group import NAME as MPI4PY
from distadam.comm.mpi.world import INSTALL, load, meet, register_mpi_backend
from distadam.errors import ConfigError, MissingDependency


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What ``init_process_group`` found."""

    launcher: str
    backend: str
    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    def __str__(self) -> str:
        return (
            f"distadam: launcher {self.launcher}, backend {self.backend}, rank {self.rank} of {self.world_size}"
            f" (local rank {self.local_rank}), device {self.device}"
        )


def init_process_group(backend: str | None = None, *, timeout_s: float | None = None) -> RunInfo:
    """Join the process group of the job that torchrun, an MPI launcher or srun started, or stay a single process.

    Sets torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) where another launcher has not.
    Under MPI an address and a free port of rank 0 are broadcast by MPI, whatever the backend.

    Args:
        backend: torch.distributed's name, or "mpi4py". None is "nccl" with CUDA (plus gloo for CPU tensors); without
            it "mpi4py" under an MPI launcher where mpi4py is installed, else "gloo".
        timeout_s: seconds a collective may take; None is torch's default.

    Returns:
        Launcher, backend, rank, world size, local rank and this rank's device; ``str()`` says it in a line.

    Raises:
        ConfigError: started in a Slurm allocation but not by srun, or by the launcher of another MPI library: N
            processes would train N models.
        MissingDependency: started by an MPI launcher, mpi4py or its MPI library is absent, and MASTER_ADDR and
            MASTER_PORT do not say where ranks meet without it.

    Collective: every process of the job.
    """
    found = _find(backend)
    if not dist.is_initialized():
        backend = _prepare(found, backend)
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if backend is None:
            return RunInfo(launcher="none", backend="none", rank=0, world_size=1, local_rank=0, device=device)
        if backend == MPI4PY:
            register_mpi_backend()
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout)
    launcher = "none" if found is None else found.launcher
    return RunInfo(
        launcher=launcher,
        backend=dist.get_backend(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
    )


def _find(backend: str | None) -> Found | None:
    """Return who started this process; under srun its own word where MPI is not wanted or not there."""
    found, slurm = find(os.environ), find_slurm(os.environ)
    if found is not None and found.kind == "mpi" and slurm is not None and backend != MPI4PY:
        return slurm if backend is not None or not _has_mpi4py() else found
    return found


def _prepare(found: Found | None, backend: str | None) -> str | None:
    """Set torchrun's variables where another launcher has not; return the backend, None for a single process."""
    cuda = torch.cuda.is_available()
    default = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if backend == MPI4PY:
        meet(load())
        return backend
    if found is None or (found.kind != "torchrun" and found.world_size == 1):
        _refuse_allocation_without_step()
        return None
    if found.kind == "mpi":
        if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and not _has_mpi4py():
            raise MissingDependency(
                f"{found.launcher} started {found.world_size} processes ({found.variable}) but mpi4py is not "
                f"installed: {INSTALL}. Without it, set MASTER_ADDR and MASTER_PORT to a free port of rank 0's host, "
                "or start with `distadam launch` or `torchrun`, which set RANK and WORLD_SIZE."
            )
        if _has_mpi4py():
            meet(load())
            default = default if cuda else MPI4PY
    if found.kind == "slurm":
        address, port = slurm_meeting_place(os.environ)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.setdefault("RANK", str(found.rank))
    os.environ.setdefault("WORLD_SIZE", str(found.world_size))
    if found.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(found.local_rank))
    return backend or default


def _has_mpi4py() -> bool:
    return importlib.util.find_spec("mpi4py") is not None


def _refuse_allocation_without_step() -> None:
    """Refuse to be one process of many that Slurm has allotted places for: N of them would train N models."""
    num_tasks = os.environ.get("SLURM_NTASKS") or "1"
    if int(num_tasks) > 1 and find_slurm(os.environ) is None:
        raise ConfigError(
            f"expected srun's or torchrun's variables but found SLURM_NTASKS={num_tasks} (Slurm) alone: this process "
            "is in an allocation and in no step of srun. Start with `srun python ...` or `launch/slurm.sbatch`, on one "
            "host with `distadam launch` or `torchrun`. To train in this process alone, unset SLURM_NTASKS."
        )
