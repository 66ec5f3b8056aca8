"""Frozen settings of the optimizer: how to shard, store, communicate and place its state.

A policy offers only values that work. They are validated where they are written (at construction), never later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distadam.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


# By name: this module does without torch.
_REDUCE_DTYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(policy: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in allowed):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{policy}({field}=...) expected one of {choices} but got {value!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPolicy:
    """How parameters' optimizer state is divided over ranks.

    Args:
        stage: 1 keeps every bucket's full gradient buffer, 2 gives it back to a pool once it is reduced (ZeRO-2).
        shard_group: ranks that divide the state; None is the default group.
        replicate_group: ranks that hold the same shard (hybrid sharding); None is no replication. Each rank of the
            grid shard x replicate must be in exactly one of each.
        mesh: a 1-D ``DeviceMesh`` (shard) or a 2-D one (replicate, shard) instead of the two groups.
        share_parameters: the ranks of a shard group, processes of one host, keep one copy of their CPU parameters: a
            gather sends nothing and parameters take 1/n of the memory. Only ``step()`` may write them: what one rank
            writes, all have.
    """

    stage: Literal[1, 2] = 2
    shard_group: ProcessGroup | None = None
    replicate_group: ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    share_parameters: bool = False

    def __post_init__(self) -> None:
        _one_of("ShardPolicy", "stage", self.stage, (1, 2))
        _one_of("ShardPolicy", "share_parameters", self.share_parameters, (True, False))
        if self.replicate_group is not None and self.shard_group is None and self.mesh is None:
            raise ConfigError(
                "ShardPolicy(replicate_group=...) expected shard_group= too but got None; give both groups or mesh=."
            )
        if self.mesh is not None:
            if self.shard_group is not None or self.replicate_group is not None:
                raise ConfigError(
                    "ShardPolicy expected either mesh= or shard_group=/replicate_group= but got both; drop one of them."
                )
            axes = getattr(self.mesh, "ndim", None)
            if axes not in (1, 2) or not hasattr(self.mesh, "get_group"):
                raise ConfigError(
                    "ShardPolicy(mesh=...) expected a DeviceMesh of 1 axis (shard) or 2 (replicate, shard) but got "
                    f"{self.mesh!r}."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPolicy:
    """How numbers are stored and sent.

    Args:
        master: what 16-bit parameters have beside them (others are their own weights): "auto" or "fp32": an fp32 master
            in the shard; "split" (bfloat16): the 16 bits that make parameter and remainder an exact fp32 master;
            "stochastic" (bfloat16): nothing, updates are rounded stochastically; "none": nothing, to nearest even.
        moments: storage of the optimizer state: "fp32" (float64 parameters keep float64 state), "bf16", or "8bit" in
            blocks of 256 elements of one parameter.
        reduce_dtype: floating dtype that gradients are sent in; None is the parameter's dtype.
        seed: of stochastic rounding, 32 bits.

    A parameter group may have entries "master" and "moments" that stand for the fields of the same names.
    """

    master: Literal["auto", "fp32", "split", "stochastic", "none"] = "auto"
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    reduce_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("PrecisionPolicy", "master", self.master, ("auto", "fp32", "split", "stochastic", "none"))
        _one_of("PrecisionPolicy", "moments", self.moments, ("fp32", "bf16", "8bit"))
        if not (isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**32):
            raise ConfigError(f"PrecisionPolicy(seed=...) expected an integer in [0, 2**32) but got {self.seed!r}.")
        if self.reduce_dtype is not None and repr(self.reduce_dtype) not in _REDUCE_DTYPES:
            raise ConfigError(
                f"PrecisionPolicy(reduce_dtype=...) expected None or one of {', '.join(_REDUCE_DTYPES)} but got "
                f"{self.reduce_dtype!r}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommPolicy:
    """What travels when.

    Args:
        bucket_mb: MiB of parameter storage in a bucket; "auto" is max(25, 0.8 x shard ranks).
        overlap_reduce: launch a bucket's reduction in backward as soon as it is full; False waits for ``step()``.
        overlap_gather: let gathers run while the next buckets are updated; False waits for each.
        reduce: "native": the backend's own reduce-scatter and all-gather; "exchange": pairwise sends and a float32 sum
            in a fixed order, for CPU parameters; "shared": the same bits by reading each other's memory on one host,
            and on several, with equally many ranks each, inside them, with messages between them; CUDA parameters on
            one host only, by torch's symmetric memory (not run on a GPU yet); "auto": for CPU parameters shared where
            ranks lie so, else exchange over gloo; native elsewhere.
        timeout_s: seconds that a collective may take; None is the process group's own timeout.
    """

    bucket_mb: float | Literal["auto"] = "auto"
    overlap_reduce: bool = True
    overlap_gather: bool = True
    reduce: Literal["auto", "native", "exchange", "shared"] = "auto"
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.bucket_mb != "auto" and not (_is_number(self.bucket_mb) and 0 < self.bucket_mb < math.inf):
            raise ConfigError(
                f"CommPolicy(bucket_mb=...) expected 'auto' or a positive number of MiB but got {self.bucket_mb!r}."
            )
        _one_of("CommPolicy", "overlap_reduce", self.overlap_reduce, (True, False))
        _one_of("CommPolicy", "overlap_gather", self.overlap_gather, (True, False))
        _one_of("CommPolicy", "reduce", self.reduce, ("auto", "native", "exchange", "shared"))
        if self.timeout_s is not None and not (_is_number(self.timeout_s) and 0 < self.timeout_s < math.inf):
            raise ConfigError(
                f"CommPolicy(timeout_s=...) expected a positive number or None but got {self.timeout_s!r}."
            )

    def bucket_nbytes(self, num_shards: int) -> int:
        """Return the bytes of parameter storage that close a bucket."""
        mb = max(25.0, 0.8 * num_shards) if self.bucket_mb == "auto" else float(self.bucket_mb)
        return max(1, int(mb * 2**20))


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPolicy:
    """Where the optimizer state lives.

    Args:
        state: "device", beside the parameters.
    """

    state: Literal["device"] = "device"

    def __post_init__(self) -> None:
        _one_of("OffloadPolicy", "state", self.state, ("device",))
