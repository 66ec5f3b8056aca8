"""Every collective of the optimizer, in one place and counted.

Note [torch 2.13 names]: 2.13 renames ``reduce_scatter_tensor`` / ``all_gather_into_tensor`` to
``reduce_scatter_single`` / ``all_gather_single`` and warns on the old names; this file picks what is there.

Note [gloo's reduce-scatter]: it is an all-reduce of a copy, and its handle cannot be used: ``is_completed()`` is always
False and ``wait(timeout)`` ignores the timeout. So the all-reduce is issued here, on the full buffer itself (the caller
gives it up), and this rank's part is copied out by the first `wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from distadam.comm.device_memory import DeviceMemory
from distadam.comm.exchange import Exchange
from distadam.comm.groups import Groups, count_call, silence_s
from distadam.comm.hosts import Hosts, machine_identity
from distadam.comm.mesh import AGREE, SUM
from distadam.comm.mixed import Mixed
from distadam.comm.phase import note
from distadam.comm.shared import Shared, SharedMemory, meet, stagger_nbytes
from distadam.comm.small import MOST_NBYTES, SmallAllReduces
from distadam.comm.streams import DONE, Pending, Streams, Work
from distadam.comm.symmetric import Symmetric, meet_on_device
from distadam.errors import CommError, ConfigError

_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TRAVELLING = ("parameters", "gradient_buffers", "gradient_accumulation")


@dataclass(slots=True)
class CollectiveStats:
    """Calls and payload bytes of this rank, by operation.

    Payload is what the operation must send from this rank: (n-1)/n of the full buffer for a reduce-scatter or an
    all-gather over n ranks, the buffer times 2(n-1)/n for an all-reduce; where hosts share memory inside and exchange
    messages between them, what goes to other hosts. What a backend really sends may be more.
    """

    calls: dict[str, int] = field(default_factory=dict)
    payload_nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, nbytes: int) -> None:
        """Count one call."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.payload_nbytes[name] = self.payload_nbytes.get(name, 0) + nbytes

    def clear(self) -> None:
        """Start counting anew."""
        self.calls.clear()
        self.payload_nbytes.clear()


class Collectives:
    """Collectives over the grid shard x replicate. With one rank each of them does nothing and returns at once."""

    def __init__(
        self,
        groups: Groups,
        streams: Streams,
        timeout_s: float | None = None,
        reduce: str = "auto",
        share_parameters: bool = False,
    ) -> None:
        self.groups = groups
        self.streams = streams
        self.stats = CollectiveStats()
        self.on_failure: Callable[[CommError], None] | None = None
        self._timeout_s = timeout_s
        self._reduce = reduce
        self._num_private = 0
        self._exchanges: dict[ProcessGroup, Exchange | Shared | Mixed] = {}
        self._on_device: dict[torch.device, Symmetric] = {}
        self._exchanging: dict[torch.device, bool] = {}
        self.hosts: Hosts | None = None
        self.memory: SharedMemory | None = None
        self._small: dict[int, SmallAllReduces] = {}
        if reduce in ("auto", "shared") and groups.shard_control is not None and _has_cpu(groups.shard):
            self._find_hosts()
        self._shares_parameters = share_parameters and self.on_one_host

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks of the shard group read each other's memory."""
        return self.memory is not None and self.hosts is not None and len(self.hosts.ranks) == 1

    @property
    def unshared(self) -> str:
        """Why ranks of one host do not read each other's memory; empty where they do, and for one rank."""
        if self.memory is not None or self.groups.shard is None:
            return ""
        if self.hosts is None:
            return "the process group has no backend for CPU tensors"
        return (
            self.hosts.unshared or "ranks of one host could not open each other's memory (`distadam doctor` says why)"
        )

    def _find_hosts(self) -> None:
        control, rank = self.groups.shard_control, self.groups.shard_rank

        def swap(value: Any) -> list[Any]:
            return self._swap(value, control, "looking for ranks on this host")

        self.hosts = Hosts.of(swap(machine_identity()))
        if not self.hosts.unshared:
            names = [f"rank {other}" for other in dist.get_process_group_ranks(control)]
            self.memory = meet(names, rank, self.hosts.local(rank), swap)
        if self.memory is not None and self.groups.shard is not None and self.on_one_host:
            silent_s = silence_s(self.groups.shard, self._timeout_s)
            self._small = {kind: SmallAllReduces(self.memory, kind, silent_s) for kind in (AGREE, SUM)}

    def map_devices(self, devices: Iterable[torch.device]) -> None:
        """Let ranks read each other's memory on these CUDA devices, where ``reduce="shared"`` asks for it.

        Collective: every rank of shard x replicate, before it makes buffers there. Syncs: until ranks have met.

        Raises:
            ConfigError: on all ranks, where some cannot, with the reason.
        """
        asked = [device for device in dict.fromkeys(devices) if device.type == DeviceMemory.DEVICE_TYPE]
        if self._reduce != "shared" or self.groups.shard is None or not asked:
            return
        what = "mapping memory of devices"
        reason = self._map(self.groups.shard, [device for device in asked if device not in self._on_device], what)
        reason = next(filter(None, self.exchange(reason, what)), "")
        if reason:
            raise ConfigError(
                'CommPolicy(reduce="shared") expected the ranks of a shard group to be processes of one host whose '
                f'devices map each other\'s memory, but found that {reason}; use reduce="auto" or "native".'
            )

    def _map(self, group: ProcessGroup, devices: list[torch.device], what: str) -> str:
        """Return why ranks of the shard group cannot map each other's devices: the same on all of them."""

        def swap(value: Any) -> list[Any]:
            return self._swap(value, self.groups.shard_control, what)

        numbers = swap(len(devices))
        if len(set(numbers)) > 1:
            return f"parameters lie on different numbers of devices ({numbers}, by rank)"
        for device in devices:
            found = meet_on_device(DeviceMemory(group, device), group, silence_s(group, self._timeout_s), swap)
            if isinstance(found, str):
                return found
            self._on_device[device] = found
            self._exchanging.pop(device, None)
        return ""

    def _swap(self, value: Any, group: ProcessGroup | None, what: str) -> list[Any]:
        answers: list[Any] = [None] * dist.get_world_size(group)
        count_call(group)  # type: ignore[arg-type]
        note(what)
        try:
            dist.all_gather_object(answers, value, group=group)
        except RuntimeError as error:
            raise self._failure(f"{what} failed on rank {self.groups.rank}: {error}") from error
        return answers

    def _failure(self, text: str) -> CommError:
        failure = CommError(text)
        if self.on_failure is not None:
            self.on_failure(failure)
        return failure

    def empty(self, kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised memory; that of buffers that travel is where they travel from.

        Collective: of "parameters", every rank of shard x replicate, in one order.
        """
        if device in self._on_device and kind == "parameters":
            return self._mapped(numel, dtype, device)
        if self.memory is not None and device.type == "cpu" and kind in _TRAVELLING:
            if kind == "parameters" and self._shares_parameters:
                return self._common(numel, dtype)
            return self.memory.empty(numel, dtype)
        if device.type != "cpu":
            return torch.empty(numel, dtype=dtype, device=device)
        self._num_private += 1
        skipped = stagger_nbytes(self._num_private, numel * dtype.itemsize) // dtype.itemsize
        return torch.empty(skipped + numel, dtype=dtype)[skipped:]

    def _mapped(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        try:
            return self._on_device[device].empty(numel, dtype)
        except RuntimeError as error:
            raise CommError(f"mapping parameters failed on rank {self.groups.rank}: {error}") from error

    def _common(self, numel: int, dtype: torch.dtype) -> Tensor:
        assert self.memory is not None
        assert self.groups.shard is not None
        try:
            return self.memory.common(numel, dtype, silence_s(self.groups.shard, self._timeout_s))
        except RuntimeError as error:
            raise CommError(f"sharing parameters failed on rank {self.groups.rank}: {error}") from error

    def owns(self, tensor: Tensor) -> bool:
        """Say whether this rank may fill ``tensor`` (from `empty`): of memory that ranks share, the first rank does."""
        return self.memory is None or self.groups.shard_rank == 0 or not self.memory.is_common(tensor)

    def release(self, tensor: Tensor) -> None:
        """Forget memory from `empty`."""
        if tensor.device in self._on_device:
            self._on_device[tensor.device].release(tensor)
        if self.memory is not None:
            self.memory.release(tensor)

    def transport(self, device: torch.device) -> tuple[str, str]:
        """Return how bytes of ``device`` travel, and why: "none", "native", "exchange" or "shared"."""
        data = [group for group in (self.groups.shard, self.groups.replicate) if group is not None]
        if not data:
            return "none", "one rank"
        backends = sorted({group._get_backend(device).name() for group in data} if device.type == "cpu" else set())
        if device in self._on_device:
            return "shared", 'CommPolicy(reduce="shared"), by symmetric memory of the devices of one host'
        if self._reduce == "shared" and device.type == DeviceMemory.DEVICE_TYPE:
            return "native", "one rank in the shard group: nothing to read from peers"
        if self._reduce != "auto":
            several = self.memory is not None and not self.on_one_host
            return self._reduce, f'CommPolicy(reduce="{self._reduce}")' + (f", {self.hosts}" if several else "")
        if device.type == "cpu" and self.memory is not None:
            return "shared", str(self.hosts)
        beside = f"; {self.unshared}" if self.hosts is not None and self.unshared else ""
        if backends == ["gloo"]:
            return "exchange", f"gloo's own reduce-scatter sends twice the bytes{beside}"
        if backends == ["mpi4py"]:
            why = "MPI's own reduce-scatter adds up in an order of its own, and knows no 16-bit numbers"
            return "exchange", f"{why}{beside}"
        unmeasured = '; "shared" was never measured there' if device.type == DeviceMemory.DEVICE_TYPE else ""
        return "native", f"the backend of {device.type} tensors has its own{unmeasured}"

    def landing_dtype(self, wire: torch.dtype, compute: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype in which `reduce_scatter` delivers: exchange adds up in float32 and keeps it."""
        return torch.promote_types(wire, compute) if self._exchanges_on(device) else wire

    def _exchanges_on(self, device: torch.device) -> bool:
        if device not in self._exchanging:
            self._exchanging[device] = self.transport(device)[0] in ("exchange", "shared")
        return self._exchanging[device]

    def scratch(self) -> list[Tensor]:
        """Return what exchanges receive in, for the memory report: at most 16 MiB and a few blocks for each group.

        Where ranks share memory, four small buffers (comm/small.py). On CUDA devices that ranks map, what gradients are
        sent from (64 MiB) and blocks.
        """
        over = [*self._exchanges.values(), *self._on_device.values()]
        return [tensor for used in (*self._small.values(), *over) for tensor in used.scratch()]

    def _exchange_over(self, group: ProcessGroup) -> Exchange | Shared | Mixed:
        if group not in self._exchanges:
            self._exchanges[group] = self._make_exchange(group)
        return self._exchanges[group]

    def _make_exchange(self, group: ProcessGroup) -> Exchange | Shared | Mixed:
        timeout_s = self._timeout_s  # a closure over self would keep it alive
        if self.memory is None or self.hosts is None or group is not self.groups.shard:
            return Exchange(group, timeout_s)
        silent_s = silence_s(group, timeout_s)
        if self.on_one_host:
            return Shared(self.memory, lambda: Exchange(group, timeout_s), silent_s)
        return Mixed(self.memory, Exchange(group, timeout_s), self.hosts, self.groups.shard_rank, silent_s)

    def reduce_scatter(self, shard: Tensor, full: Tensor, what: str) -> Pending:
        """Sum ``full`` over all ranks into this rank's ``shard``; never average (contract 2.3.3).

        ``full`` is given up: its content is undefined afterwards. ``shard`` has the `landing_dtype`.

        Collective: every rank of shard x replicate. Syncs: never (waiting for the handle does, on CPU).
        """
        groups = self.groups
        if groups.num_shards == 1:
            shard.copy_(full)
        if groups.num_ranks == 1:
            return DONE
        exchanges = self._exchanges_on(full.device)

        def scatter() -> Pending:
            if exchanges:
                return self._start("reduce_scatter", groups.shard, full, self._exchange_scatter, shard, full, what=what)
            if _is_gloo(groups.shard, full):
                start = groups.shard_rank * shard.numel()
                mine = full[start : start + shard.numel()]
                return self._start(
                    "reduce_scatter",
                    groups.shard,
                    full,
                    dist.all_reduce,
                    full,
                    what=what,
                    after=lambda: shard.copy_(mine),
                )
            return self._start("reduce_scatter", groups.shard, full, _reduce_scatter, shard, full, what=what)

        def replicate() -> Pending:
            call = self._exchange_sum if exchanges and full.device not in self._on_device else dist.all_reduce
            return self._start("all_reduce", groups.replicate, shard, call, shard, what=what)

        if groups.replicate is None:
            return self.streams.launch(scatter)
        if groups.shard is None:
            return self.streams.launch(replicate)
        return self.streams.launch_chain(full.device, scatter, replicate)

    def all_gather(self, full: Tensor, shard: Tensor, what: str) -> Pending:
        """Collect every rank's ``shard`` in ``full``; ``shard`` may be this rank's part of ``full``.

        Collective: every rank of the shard group. Syncs: never (waiting for the handle does, on CPU).
        """
        if self.groups.shard is None:
            if full.data_ptr() != shard.data_ptr():
                full.copy_(shard)
            return DONE
        call = self._exchange_gather if self._exchanges_on(full.device) else _all_gather
        return self.streams.launch(
            lambda: self._start("all_gather", self.groups.shard, full, call, full, shard, what=what)
        )

    def _exchange_scatter(self, shard: Tensor, full: Tensor, *, group: ProcessGroup, async_op: bool) -> Work:
        return (self._on_device.get(full.device) or self._exchange_over(group)).reduce_scatter(shard, full)

    def _exchange_gather(self, full: Tensor, shard: Tensor, *, group: ProcessGroup, async_op: bool) -> Work:
        return (self._on_device.get(full.device) or self._exchange_over(group)).all_gather(full, shard)

    def _exchange_sum(self, tensor: Tensor, *, group: ProcessGroup, async_op: bool) -> Work:
        return self._exchange_over(group).all_reduce(tensor)

    def sum_shards(self, tensor: Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
        """All-reduce ``tensor`` over the shard group, in place: what shards hold once (replicas hold the same)."""
        if self.groups.shard is None:
            return DONE
        return self.streams.launch(
            lambda: self._start("all_reduce", self.groups.shard, tensor, self._combine, tensor, op, SUM, what=what)
        )

    def agree(self, votes: Tensor, what: str) -> None:
        """Combine uint8 CPU ``votes`` by maximum over all ranks, in place.

        Collective: every rank of shard x replicate, over the hosts' own group or memory: no device is waited for.
        """
        shard, replicate = self.groups.shard_control, self.groups.replicate_control
        if shard is not None:
            self._start("agree", shard, votes, self._combine, votes, dist.ReduceOp.MAX, AGREE, what=what).wait()
        if replicate is not None:
            self._start("agree", replicate, votes, dist.all_reduce, votes, dist.ReduceOp.MAX, what=what).wait()

    def _combine(
        self, tensor: Tensor, op: dist.ReduceOp.RedOpType, kind: int, *, group: ProcessGroup, async_op: bool
    ) -> Any:
        if kind in self._small and tensor.device.type == "cpu" and tensor.nbytes <= MOST_NBYTES:
            return self._small[kind].start(tensor, op)
        return dist.all_reduce(tensor, op, group=group, async_op=async_op)

    def broadcast(self, tensor: Tensor, what: str) -> None:
        """Overwrite ``tensor`` with that of the first rank of shard x replicate."""
        one_copy = self.memory is not None and self.memory.is_common(tensor)
        for group in (self.groups.replicate, self.groups.shard):
            if group is None or (one_copy and group is self.groups.replicate and self.groups.shard_rank != 0):
                continue
            if one_copy and group is self.groups.shard:
                self._swap(None, self.groups.shard_control, what)
                continue
            source = dist.get_global_rank(group, 0)
            self._start("broadcast", group, tensor, dist.broadcast, tensor, source, what=what).wait()

    def exchange(self, value: Any, what: str) -> list[Any]:
        """Return every rank's picklable ``value``, by rank of the grid (replicas major). Syncs: the host waits."""
        values = [value]
        note(what)
        try:
            for group in (self.groups.shard_control, self.groups.replicate_control):
                if group is not None:
                    gathered: list[Any] = [None] * dist.get_world_size(group)
                    count_call(group)
                    dist.all_gather_object(gathered, values, group=group)
                    values = [item for part in gathered for item in part]
        except RuntimeError as error:
            raise self._failure(f"{what} failed on rank {self.groups.rank}: {error}") from error
        return values

    def _start(
        self,
        name: str,
        group: ProcessGroup | None,
        buffer: Tensor,
        call: Callable[..., Any],
        *args: Any,
        what: str,
        after: Callable[[], object] | None = None,
    ) -> Pending:
        label = f"{name} of {what} on rank {self.groups.rank} of {self.groups.num_ranks}"
        if group is not None:
            count_call(group)
        note(label)
        try:
            work = call(*args, group=group, async_op=True)
        except RuntimeError as error:
            raise self._failure(f"{label} could not start: {error}") from error
        num_ranks, factor = dist.get_world_size(group), {"all_reduce": 2, "agree": 2}.get(name, 1)
        payload_nbytes = factor * buffer.nbytes * (num_ranks - 1) // num_ranks
        self.stats.add(name, getattr(work, "payload_nbytes", payload_nbytes))
        return Pending(work, label, self._timeout_s, after, self.on_failure)


def _has_cpu(group: ProcessGroup | None) -> bool:
    return group is not None and torch.device("cpu") in group._device_types and dist.get_backend(group) != "fake"


def _is_gloo(group: ProcessGroup | None, tensor: Tensor) -> bool:
    if group is None or tensor.device.type != "cpu":
        return False
    return group._get_backend(tensor.device).name() == "gloo"
