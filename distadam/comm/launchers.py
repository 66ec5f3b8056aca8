"""What the variables of a process say about who started it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A launcher, and this process's place in its job.

    Attributes:
        kind: "torchrun", "mpi" or "slurm": whose variables these are.
        launcher: its name.
        variable: the variable that gave it away, with its value.
        rank: this process among all.
        world_size: how many there are.
        local_rank: this process among those of its host; None: not said.
    """

    kind: str
    launcher: str
    variable: str
    rank: int
    world_size: int
    local_rank: int | None


# launcher, then the variables of world size, rank, local rank: one whose size and rank are both set is found.
_TORCHRUN = ("torchrun", "WORLD_SIZE", "RANK", ("LOCAL_RANK",))
_BY_HAND = ("environment", "WORLD_SIZE", "RANK", ("LOCAL_RANK",))
_MPI = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    ("MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK", ("MPI_LOCALRANKID", "SLURM_LOCALID")),
    ("PMIx", "SLURM_STEP_NUM_TASKS", "PMIX_RANK", ("SLURM_LOCALID",)),
)
_SLURM = ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ("SLURM_LOCALID",))


def find(environment: Mapping[str, str]) -> Found | None:
    """Return who started this process.

    Note [Which launcher]: torchrun comes first: inside of a Slurm or MPI job somebody has started it on purpose. Then
    RANK and WORLD_SIZE, unless they are what an MPI launcher or srun says too: then it is that launcher, and they were
    set by `init_process_group` or by a script that repeats it. Then MPI, whose variables srun sets as well where it
    starts MPI ranks, then srun.
    """
    by_hand = _read("torchrun", environment, _TORCHRUN if "TORCHELASTIC_RUN_ID" in environment else _BY_HAND)
    if by_hand is not None and by_hand.launcher == "torchrun":
        return by_hand
    other = find_mpi(environment) or find_slurm(environment)
    if other is None or by_hand is None:
        return other or by_hand
    agree = (other.rank, other.world_size) == (by_hand.rank, by_hand.world_size)
    return other if agree else by_hand


def find_mpi(environment: Mapping[str, str]) -> Found | None:
    """Return what an MPI launcher says: Open MPI's, MPICH's or Intel's (PMI), or Slurm's (PMIx)."""
    return next((found for names in _MPI if (found := _read("mpi", environment, names)) is not None), None)


def find_slurm(environment: Mapping[str, str]) -> Found | None:
    """Return what srun says. A batch script, which srun has not started, is in no step."""
    return _read("slurm", environment, _SLURM)


def slurm_meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return address and port where the ranks of a Slurm step meet: on its first node, by the job's number."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    return address, int(environment.get("MASTER_PORT") or 20000 + (job + 97 * step) % 10000)


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's short form: "n[08-11,20],gpu1" begins with "n08"."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _read(kind: str, environment: Mapping[str, str], names: tuple[str, str, str, tuple[str, ...]]) -> Found | None:
    launcher, size, rank, local_ranks = names
    if not environment.get(size) or not environment.get(rank):
        return None
    local = next((environment[name] for name in local_ranks if environment.get(name)), None)
    return Found(
        kind=kind,
        launcher=launcher,
        variable=f"{size}={environment[size]}",
        rank=int(environment[rank]),
        world_size=int(environment[size]),
        local_rank=None if local is None else int(local),
    )
