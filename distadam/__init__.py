"""distadam: torch.optim's Adam, AdamW, SGD and RMSprop with state sharded over data-parallel ranks."""

import importlib
import typing

from distadam.api import SGD, Adam, AdamW, RMSprop
from distadam.comm import RunInfo, broadcast_buffers, init_process_group, register_mpi_backend
from distadam.errors import (
    CheckpointError,
    CommError,
    ConfigError,
    CorruptShard,
    DistAdamError,
    IncompleteCheckpoint,
    LayoutMismatch,
    MissingDependency,
    NonFiniteError,
    RankMismatchError,
    UsageError,
)
from distadam.layout import Layout, ParamSpec, Plan, plan
from distadam.optimizer import ShardedOptimizer
from distadam.policies import CommPolicy, OffloadPolicy, PrecisionPolicy, ShardPolicy

if typing.TYPE_CHECKING:
    from distadam import checkpoint as checkpoint
    from distadam import diagnostics as diagnostics

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CheckpointError",
    "CommError",
    "CommPolicy",
    "ConfigError",
    "CorruptShard",
    "DistAdamError",
    "IncompleteCheckpoint",
    "Layout",
    "LayoutMismatch",
    "MissingDependency",
    "NonFiniteError",
    "OffloadPolicy",
    "ParamSpec",
    "Plan",
    "PrecisionPolicy",
    "RMSprop",
    "RankMismatchError",
    "RunInfo",
    "ShardPolicy",
    "ShardedOptimizer",
    "UsageError",
    "broadcast_buffers",
    "init_process_group",
    "plan",
    "register_mpi_backend",
]


def __getattr__(name: str) -> typing.Any:
    """Import ``distadam.checkpoint`` and ``distadam.diagnostics`` when first used: torch's own bring half of torch."""
    if name in ("checkpoint", "diagnostics"):
        return importlib.import_module(f"distadam.{name}")
    raise AttributeError(f"module 'distadam' has no attribute {name!r}")
