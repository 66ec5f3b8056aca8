"""Where the MPI libraries under test are, and how their launchers are called.

``make test-mpi`` makes an environment for each: their wheels overwrite each other's mpiexec.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPLEMENTATIONS = ("mpich", "openmpi")

# Not what the shell that started pytest happens to have: a job must not look like one of Slurm's or torchrun's.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_", "PMI", "OMPI_COMM_")
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    code: int
    text: str


def folder(implementation: str) -> Path:
    return ROOT / f".venv-{implementation}/bin"


def missing(implementation: str) -> str:
    """Say what is not there; nothing if all is."""
    absent = [name for name in ("python", "mpiexec") if not (folder(implementation) / name).exists()]
    return f"{folder(implementation)}: no {' and no '.join(absent)}; make test-mpi makes it" if absent else ""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    return kept | _AS_ROOT | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def mpiexec(
    implementation: str,
    num_ranks: int,
    *arguments: str,
    python: str = "",
    timeout_s: float = 170.0,
    **variables: str,
) -> Ended:
    """Run ``python arguments`` on ``num_ranks`` ranks; a job that does not end in time is ended and fails."""
    options = ["--oversubscribe", "--bind-to", "none"] if implementation == "openmpi" else []
    command = [str(folder(implementation) / "mpiexec"), *options, "-n", str(num_ranks)]
    command += [str(folder(python or implementation) / "python"), *arguments]
    return run(command, environment(**variables), timeout_s)


def run(command: list[str], variables: dict[str, str], timeout_s: float = 170.0) -> Ended:
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, start_new_session=True
    )
    try:
        text, _ = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        job.terminate()  # the launcher ends its ranks
        try:
            text, _ = job.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            job.kill()
            text, _ = job.communicate()
        raise AssertionError(f"the job did not end within {timeout_s} s:\n{text.decode()[-5000:]}") from None
    return Ended(job.returncode, text.decode())
