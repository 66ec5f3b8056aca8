"""All checks of one host, in the order in which their causes lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from distadam.doctor.devices import check_devices, check_kernels, check_threads
from distadam.doctor.finding import Finding, guarded
from distadam.doctor.launcher import check_launcher
from distadam.doctor.mpi import Mpi, check_mpi
from distadam.doctor.network import Endpoint, check_cards, check_endpoint, find_interfaces
from distadam.doctor.storage import check_checkpoints
from distadam.doctor.system import (
    allowed_cpus,
    check_clock,
    check_memfd,
    check_open_files,
    check_shared_memory,
    clock_status,
)
from distadam.doctor.versions import Facts, check_versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the job will be, as far as the user says.

    Args:
        num_local: ranks on this host.
        num_cores: that these may use together; None: those of this process.
        endpoint: where ranks of several hosts meet; None: one host.
        is_first: this host is the one that listens there; None: if the address is its own.
        checkpoints: where checkpoints will go.
        mpi: MPI will start the ranks.
    """

    num_local: int
    num_cores: int | None = None
    endpoint: Endpoint | None = None
    is_first: bool | None = None
    checkpoints: Path | None = None
    mpi: bool = False


def examine(question: Question) -> list[Finding]:
    """Look at this host. Communicates nothing but one connection to the endpoint, where it is another host's."""
    has_cuda = torch.cuda.is_available()
    cores = question.num_cores or len(allowed_cpus())
    environment = dict(os.environ)
    checks: dict[str, Callable[[], list[Finding]]] = {
        "launcher": partial(check_launcher, environment, question.num_local),
        "versions": lambda: check_versions(Facts.here()),
        "devices": check_devices,
        "kernels": check_kernels,
        "threads": partial(
            check_threads, question.num_local, environment, cores, torch.get_num_threads(), has_cuda=has_cuda
        ),
        "network": partial(_network, question, environment, has_cuda),
        "mpi": lambda: check_mpi(Mpi.here(), environment, question.mpi),
        "system.shm": partial(check_shared_memory, has_cuda=has_cuda),
        "system.memfd": check_memfd,
        "system.open_files": partial(check_open_files, question.num_local),
        "system.clock": lambda: check_clock(clock_status(), question.endpoint is not None),
    }
    if question.checkpoints is not None:
        checks["checkpoints"] = partial(check_checkpoints, question.checkpoints)
    return [finding for name, look in checks.items() for finding in guarded(name, look)]


def _network(question: Question, environment: dict[str, str], has_cuda: bool) -> list[Finding]:
    findings: list[Finding] = []
    address = ""
    if question.endpoint is not None:
        findings, address = check_endpoint(question.endpoint, question.is_first)
    return [*check_cards(environment, find_interfaces(), address, has_cuda=has_cuda), *findings]
