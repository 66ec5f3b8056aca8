"""Which backends this build of torch.distributed has."""

from __future__ import annotations

import torch.distributed as dist


def available_backends() -> dict[str, bool]:
    """Return each backend's name and whether this build has it."""
    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl", "mpi", "ucc", "xccl"), False)
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
        "xccl": dist.is_xccl_available(),
    }
