"""Ways to spell load -> update -> store, and the choice between them with its reason."""

from __future__ import annotations

from distadam.kernels.reference import ReferenceKernel
from distadam.kernels.select import Choice, make_kernel, select
from distadam.kernels.torch_fused import TorchFusedKernel
from distadam.kernels.update import DirectViews, GradScaling, GroupRanges, Kernel, ShardUpdate

__all__ = [
    "Choice",
    "DirectViews",
    "GradScaling",
    "GroupRanges",
    "Kernel",
    "ReferenceKernel",
    "ShardUpdate",
    "TorchFusedKernel",
    "make_kernel",
    "select",
]
