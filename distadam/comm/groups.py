"""Which ranks divide the state, which repeat it, and the process groups that only one optimizer uses.

Note [Own groups]: an optimizer never communicates on the caller's group. Ranks may have launched different numbers of
reductions when the caller issues a collective of its own (or another optimizer does); on a shared group those would be
matched with each other. So each optimizer leases a pair of groups over the same ranks: ``data`` for gradients and
parameters, ``control`` (gloo; over MPI: mpi4py) for what hosts agree on, which must not be matched with reductions
either and never waits for a device. Leases of dead optimizers are reused; ranks agree on one that is free everywhere,
since garbage is not collected at the same time on all, and on which all ranks have issued equally many collectives: an
optimizer that died after one rank's backward has left a reduction there that would be matched with its successor's
first collective.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from distadam.comm.mpi.process_group import NAME as MPI4PY
from distadam.comm.mpi.process_group import MpiProcessGroup
from distadam.errors import CommError, ConfigError
from distadam.policies import ShardPolicy


@dataclass(frozen=True, slots=True)
class Lease:
    """Two process groups over the ranks of ``parent``, used by one optimizer at a time."""

    parent: ProcessGroup
    data: ProcessGroup
    control: ProcessGroup


@dataclass(slots=True)
class _Leases:
    """All leases over one parent group."""

    meeting: ProcessGroup
    timeouts: dict[int, float | None] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)


_all_leases: weakref.WeakKeyDictionary[ProcessGroup, _Leases] = weakref.WeakKeyDictionary()
_num_calls: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


def count_call(group: ProcessGroup) -> None:
    """Count a collective that this rank issues on a leased group."""
    _num_calls[group] = _num_calls.get(group, 0) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The grid shard x replicate as this rank sees it; groups of one rank are None."""

    shard: ProcessGroup | None
    replicate: ProcessGroup | None
    shard_control: ProcessGroup | None
    replicate_control: ProcessGroup | None
    parent: ProcessGroup | None
    shard_rank: int
    num_shards: int
    replicate_rank: int
    num_replicas: int

    @property
    def num_ranks(self) -> int:
        """Ranks whose gradients are averaged."""
        return self.num_shards * self.num_replicas

    @property
    def rank(self) -> int:
        """Rank in the grid, replicas major."""
        return self.replicate_rank * self.num_shards + self.shard_rank

    @classmethod
    def resolve(cls, policy: ShardPolicy, timeout_s: float | None, owner: object) -> Groups:
        """Lease groups over the ranks that ``policy`` names, until ``owner`` dies.

        Collective: every rank of the shard group, then of the replicate group.

        Raises:
            ConfigError: if this rank is not in a group, or the two groups are not a grid.
            CommError: if a peer does not take part in time.
        """
        shard, replicate = _named_groups(policy)
        try:
            shard_lease = None if shard is None else _lease(shard, timeout_s, owner)
            replicate_lease = None if replicate is None else _lease(replicate, timeout_s, owner)
        except RuntimeError as error:
            raise CommError(
                f"process groups for the optimizer could not be made on rank {dist.get_rank()}: {error}. A peer died, "
                "hangs, or builds no optimizer; look for the first error among all ranks' output."
            ) from error
        groups = cls(
            shard=shard_lease.data if shard_lease else None,
            replicate=replicate_lease.data if replicate_lease else None,
            shard_control=shard_lease.control if shard_lease else None,
            replicate_control=replicate_lease.control if replicate_lease else None,
            parent=dist.group.WORLD if shard is not None and replicate is not None else shard or replicate,
            shard_rank=dist.get_rank(shard_lease.data) if shard_lease else 0,
            num_shards=1 if shard is None else dist.get_world_size(shard),
            replicate_rank=dist.get_rank(replicate_lease.data) if replicate_lease else 0,
            num_replicas=1 if replicate is None else dist.get_world_size(replicate),
        )
        _check_grid(groups)
        return groups


def _named_groups(policy: ShardPolicy) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    shard, replicate = policy.shard_group, policy.replicate_group
    if policy.mesh is not None:
        if policy.mesh.ndim == 2:
            replicate, shard = policy.mesh.get_group(0), policy.mesh.get_group(1)
        else:
            shard = policy.mesh.get_group()
    if shard is None and dist.is_available() and dist.is_initialized():
        shard = dist.group.WORLD
    shard, replicate = _real(shard, "shard_group"), _real(replicate, "replicate_group")
    if shard is not None and replicate is not None:
        both = set(dist.get_process_group_ranks(shard)) & set(dist.get_process_group_ranks(replicate))
        if both != {dist.get_rank()}:
            raise ConfigError(
                "ShardPolicy expected shard_group and replicate_group to share this rank only (a grid) but on rank "
                f"{dist.get_rank()} they share {sorted(both)}; use a 2-D DeviceMesh (replicate, shard)."
            )
    return shard, replicate


def _check_grid(groups: Groups) -> None:
    """Refuse groups that are no grid: a shard group is one replica, a replicate group has one shard."""
    shard, num_shards, replica, num_replicas = (
        groups.shard_rank,
        groups.num_shards,
        groups.replicate_rank,
        groups.num_replicas,
    )
    row = [(other, num_shards, replica, num_replicas) for other in range(num_shards)]
    column = [(shard, num_shards, other, num_replicas) for other in range(num_replicas)]
    found: list[list[Any]] = []
    for control, expected in ((groups.shard_control, row), (groups.replicate_control, column)):
        if control is None or dist.get_backend(control) == "fake":
            continue
        places: list[Any] = [None] * len(expected)
        try:
            dist.all_gather_object(places, (shard, num_shards, replica, num_replicas), group=control)
        except RuntimeError as error:
            raise CommError(f"comparing process groups failed on rank {dist.get_rank()}: {error}") from error
        found += [] if places == expected else [places]
    if found:
        raise ConfigError(
            "ShardPolicy expected shard_group and replicate_group to be rows and columns of one grid but got ranks at "
            f"(shard, shards, replica, replicas) = {found[0]} in a group of rank {dist.get_rank()}; use a 2-D "
            "DeviceMesh (replicate, shard)."
        )


def _real(group: ProcessGroup | None, field_name: str) -> ProcessGroup | None:
    """Return ``group``, or None where it is absent or has one rank."""
    if group is None:
        return None
    if not isinstance(group, ProcessGroup) or dist.get_rank(group) < 0:  # torch marks non-members by an int
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise ConfigError(
            f"ShardPolicy({field_name}=...) expected a group that holds rank {rank} but got {group!r}; "
            "build the optimizer on the ranks of the group only."
        )
    return None if dist.get_world_size(group) == 1 else group


def _lease(parent: ProcessGroup, timeout_s: float | None, owner: object) -> Lease:
    if dist.get_backend(parent) == "fake":  # nothing is matched with anything
        return Lease(parent, parent, parent)
    known = _all_leases.get(parent)
    if known is None:
        known = _all_leases[parent] = _Leases(_new_group(parent, "meeting", _control_backend(parent), timeout_s))
    timeout = _timeout(parent, timeout_s)
    if timeout is not None:
        _set_timeout(known.meeting, timeout)
    mine = [
        (index, _num_calls.get(lease.data, 0), _num_calls.get(lease.control, 0))
        for index, lease in known.leases.items()
        if index not in known.taken and known.timeouts[index] == timeout_s
    ]
    answers: list[tuple[int, list[tuple[int, int, int]]]] = [(0, [])] * dist.get_world_size(parent)
    dist.all_gather_object(answers, (max(known.leases, default=-1) + 1, mine), group=known.meeting)
    common = set(answers[0][1]).intersection(*(free for _, free in answers[1:]))
    if common:
        index = min(common)[0]
    else:
        index = max(new for new, _ in answers)
        config = dist.distributed_c10d._world.pg_backend_config.get(parent) or dist.get_backend(parent)
        known.leases[index] = Lease(
            parent,
            _new_group(parent, f"data {index}", str(config), timeout_s),
            _new_group(parent, f"control {index}", _control_backend(parent), timeout_s),
        )
        known.timeouts[index] = timeout_s
    known.taken.add(index)
    weakref.finalize(owner, known.taken.discard, index).atexit = False
    return known.leases[index]


def silence_s(group: ProcessGroup, timeout_s: float | None) -> float:
    """Return how long a peer may be silent: what was asked for, else the group's own timeout."""
    timeout = _timeout(group, timeout_s)
    return 1800.0 if timeout is None else timeout.total_seconds()


def _timeout(parent: ProcessGroup, timeout_s: float | None) -> timedelta | None:
    """Return the timeout asked for, else the parent's own, which torch does not hand on to new groups."""
    if timeout_s is not None:
        return timedelta(seconds=timeout_s)
    backends = [parent._get_backend(device) for device in parent._device_types]
    timeouts = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    return max(timeouts, default=None)


def _control_backend(parent: ProcessGroup) -> str:
    """Return the backend for what hosts agree on: where there is MPI, nothing else has to reach the peers."""
    return MPI4PY if isinstance(parent, MpiProcessGroup) else "gloo"


def _set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    if isinstance(group, MpiProcessGroup):
        group.set_timeout(timeout)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _new_group(parent: ProcessGroup, role: str, backend: str, timeout_s: float | None) -> ProcessGroup:
    """Make a group over the ranks of ``parent`` under a name that all of them know.

    torch would name it after its ranks and the number of groups that this rank is in: where one rank is in one more
    (a group of its own for logging, say), ranks would wait for each other under different names.
    """
    ranks = dist.get_process_group_ranks(parent)
    timeout = _timeout(parent, timeout_s)
    naming = dist.distributed_c10d._process_group_name
    name = f"distadam {parent.group_name} {role}"
    dist.distributed_c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        group = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
    finally:
        dist.distributed_c10d._process_group_name = naming
    if not isinstance(group, ProcessGroup):
        raise ConfigError(f"could not make a process group over ranks {ranks}; this rank is not one of them.")
    return group
