"""Join the job that a launcher started, or be one process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distadam.errors import ConfigError

_OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPICH or Intel MPI",
    "SLURM_NTASKS": "Slurm",
}


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
    """Join the process group that torchrun's variables describe, or stay a single process without one.

    Args:
        backend: torch.distributed's name; None is "nccl" with CUDA (plus gloo for CPU tensors), else "gloo".
        timeout_s: seconds a collective may take; None is torch's default.

    Returns:
        Launcher, backend, rank, world size, local rank and this rank's device; ``str()`` says it in a line.

    Raises:
        ConfigError: under a launcher whose variables are not understood yet: N processes would train N models.

    Collective: every process of the job.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            _refuse_unknown_launcher()
            return RunInfo(launcher="none", backend="none", rank=0, world_size=1, local_rank=0, device=device)
        backend = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout)
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "environment"
    return RunInfo(
        launcher=launcher,
        backend=dist.get_backend(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
    )


def _refuse_unknown_launcher() -> None:
    for variable, launcher in _OTHER_LAUNCHERS.items():
        if int(os.environ.get(variable, "1") or "1") > 1:
            raise ConfigError(
                f"expected torchrun's variables RANK and WORLD_SIZE but found {variable}={os.environ[variable]}"
                f" ({launcher}); start with `distadam launch` or `torchrun`, or initialise torch.distributed yourself."
            )
