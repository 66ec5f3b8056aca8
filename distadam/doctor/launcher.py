"""Who started this process, and with how many others."""

from __future__ import annotations

from collections.abc import Mapping

from distadam.comm.launchers import find, find_mpi, find_slurm
from distadam.doctor.finding import Finding, ok, warning


def check_launcher(environment: Mapping[str, str], num_local: int) -> list[Finding]:
    """Say whose job this process is part of, as `distadam.init_process_group` would see it.

    Args:
        environment: of this process.
        num_local: ranks on this host.
    """
    found, other = find(environment), find_mpi(environment) or find_slurm(environment)
    num_tasks = environment.get("SLURM_NTASKS") or "1"
    if found is None and int(num_tasks) > 1:
        text = f"Slurm allotted {num_tasks} tasks (SLURM_NTASKS) but srun did not start this process: training refuses"
        return [warning("launcher", text, "srun python -m distadam doctor; for this process alone unset SLURM_NTASKS")]
    if found is None:
        return [ok("launcher", "none; distadam launch, torchrun, mpiexec and srun start ranks")]
    if found.launcher == "environment" and other is not None:
        text = f"RANK and WORLD_SIZE say rank {found.rank} of {found.world_size}, {other.launcher} says rank"
        text += f" {other.rank} of {other.world_size} ({other.variable}): the first are believed, and MPI refuses"
        return [warning("launcher", text, "unset RANK and WORLD_SIZE")]
    text = f"{found.launcher} started {found.world_size} ranks ({found.variable}), {num_local} of them on this host"
    return [ok("launcher", text, launcher=found.launcher, ranks=found.world_size, local_ranks=num_local)]
