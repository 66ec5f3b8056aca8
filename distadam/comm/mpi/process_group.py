"""torch.distributed's collectives of CPU tensors over an MPI communicator."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distadam.comm.mpi.numbers import Reduction, carried, memory, number_type
from distadam.comm.mpi.progress import Job, Lane, Progress, Steps
from distadam.comm.mpi.work import MpiWork
from distadam.comm.tree import TreeSum
from distadam.errors import CommError, ConfigError

NAME = "mpi4py"

c10d: Any = dist.distributed_c10d  # where the options of collectives are


@dataclass(slots=True)
class Options:
    """What torch and distadam ask a backend for."""

    _timeout: timedelta


class _Place:
    """Contiguous memory for tensors, themselves where there is one and it is contiguous.

    Args:
        tensors: on the CPU, of one dtype.
        filled: whether the memory begins with their values.
    """

    def __init__(self, tensors: Sequence[Tensor], filled: bool) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self.counts = [tensor.numel() for tensor in tensors]
        first = self._tensors[0]
        if len(tensors) == 1 and first.is_contiguous():
            self.flat = first.view(-1)
            self._copied = False
            return
        self.flat = torch.empty(sum(self.counts), dtype=first.dtype)
        self._copied = True
        if filled:
            for tensor, part in zip(self._tensors, torch.split(self.flat, self.counts), strict=True):
                part.view(tensor.shape).copy_(tensor)

    def deliver(self) -> None:
        """Write the values to the tensors."""
        if self._copied:
            for tensor, part in zip(self._tensors, torch.split(self.flat, self.counts), strict=True):
                tensor.copy_(part.view(tensor.shape))


class MpiProcessGroup(dist.ProcessGroup):
    """A process group of torch.distributed over an MPI communicator.

    Tensors are on the CPU and of any dtype but complex (torch.distributed hands those on as real ones); non-contiguous
    ones are staged. Every operation is asynchronous; its work's timeout is the group's. float16 and bfloat16 are summed
    in float32 and rounded once (numbers.py, Note [Sixteen bits]).

    Args:
        mpi: mpi4py's module.
        progress: carries out the operations.
        comm: of this group alone: nobody else communicates on it.
        timeout: how long an operation may take from its start.
        name: the same on all ranks, and no other group's.
    """

    def __init__(self, mpi: Any, progress: Progress, comm: Any, timeout: timedelta, name: str) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]
        self._mpi = mpi
        self._progress = progress
        self._comm = comm
        self._options = Options(timeout)
        self._tree = TreeSum(comm.size)
        self._largest_tag = comm.Get_attr(mpi.TAG_UB)
        self._name = name
        group, world = comm.Get_group(), mpi.COMM_WORLD.Get_group()
        self._world_ranks: list[int] = list(mpi.Group.Translate_ranks(group, list(range(comm.size)), world))
        group.Free()
        world.Free()
        self._lane = Lane(name, zlib.crc32(name.encode()), self._world_ranks)
        progress.add_lane(self._lane)

    # What torch.distributed asks about a group ------------------------------------------------------------------------

    def getBackendName(self) -> str:
        """Return "mpi4py"."""
        return NAME

    name = _get_backend_name = getBackendName

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> MpiProcessGroup:  # type: ignore[override]
        if torch.device(device).type != "cpu":
            raise ConfigError(f"the mpi4py backend carries CPU tensors but was asked for {device}.")
        return self

    @property
    def options(self) -> Options:
        """The group's timeout."""
        return self._options

    @property
    def supports_coalescing(self) -> bool:
        """Whether it needs `_start_coalescing`: it does not."""
        return False

    @property
    def group_name(self) -> Any:
        """The name by which torch finds the group."""
        return c10d._world.pg_names.get(self, self._name)

    def _set_group_name(self, name: Any) -> None:
        pass

    def _set_group_desc(self, desc: str) -> None:
        pass

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long later operations may take."""
        self._options._timeout = timeout

    _set_default_timeout = set_timeout

    def _set_sequence_number_for_group(self) -> None:
        pass

    def _get_sequence_number_for_group(self) -> int:
        return self._lane.num_entered

    def shutdown(self) -> None:
        """Give the communicator back; with operations in flight, or after a failure, it is kept until the job ends.

        Collective: every rank of the group, when all its operations have ended.
        """
        if self._comm is not None and self._progress.remove_lane(self._lane) and self._lane.error is None:
            self._comm.Free()
        self._comm = None

    def abort(self) -> None:
        """End the whole job, as MPI can do no less."""
        self._mpi.COMM_WORLD.Abort(1)

    # Collectives ------------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Any, opts: Any = None) -> MpiWork:  # type: ignore[override]
        """Overwrite every rank's tensors with those of ``opts.rootRank``."""
        opts = opts or c10d.BroadcastOptions()
        root = opts.rootRank
        places = [_Place([tensor], filled=self.rank() == root) for tensor in self._checked(tensors)]

        def steps() -> Steps:
            yield [self._comm.Ibcast(carried(self._mpi, place.flat), root) for place in places]
            _deliver(places)

        return self._start(f"broadcast from rank {self._world_rank(root)}", steps(), tensors, opts)

    def allreduce(self, tensors: Any, opts: Any = None) -> MpiWork:  # type: ignore[override]
        """Combine every rank's tensors, in place on all ranks."""
        opts = opts or c10d.AllreduceOptions()
        places = [_Place([tensor], filled=True) for tensor in self._checked(tensors)]

        def steps() -> Steps:
            yield from _together([self._allreduce(place.flat, opts.reduceOp) for place in places])
            _deliver(places)

        self._check_reduction(opts, tensors)
        return self._start("all-reduce", steps(), tensors, opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> MpiWork:
        """`allreduce` of several tensors at once."""
        return self.allreduce(tensors, opts or c10d.AllreduceCoalescedOptions())

    def reduce(self, tensors: Any, opts: Any = None) -> MpiWork:  # type: ignore[override]
        """Combine every rank's tensors, in place on ``opts.rootRank``; the others' keep their values."""
        opts = opts or c10d.ReduceOptions()
        places = [_Place([tensor], filled=True) for tensor in self._checked(tensors)]

        def steps() -> Steps:
            yield from _together([self._reduce(place.flat, opts.reduceOp, opts.rootRank) for place in places])
            if self.rank() == opts.rootRank:
                _deliver(places)

        self._check_reduction(opts, tensors)
        return self._start(f"reduce to rank {self._world_rank(opts.rootRank)}", steps(), tensors, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        """Put every rank's ``input`` one after the other into ``output``. ``input`` may be this rank's part of it."""
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:
        """`all_gather_single` of several tensors at once."""
        opts = opts or c10d.AllgatherOptions()
        self._checked([*outputs, *inputs])
        for output, tensor in zip(outputs, inputs, strict=True):
            self._check_numel("all-gather", output, tensor.numel() * self.size())
        places = [_Place([output], filled=False) for output in outputs]
        sent = [_Place([tensor], filled=True).flat for tensor in inputs]

        def steps() -> Steps:
            yield [self._allgather(place.flat, mine) for place, mine in zip(places, sent, strict=True)]
            _deliver(places)

        return self._start("all-gather", steps(), outputs, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:
        """Copy every rank's k-th input to ``outputs[k][rank]``; ranks' inputs may differ in size."""
        opts = opts or c10d.AllgatherOptions()
        for parts, tensor in zip(outputs, inputs, strict=True):
            self._checked([*parts, tensor])
            self._check_parts("all-gather", parts)
            self._check_numel("all-gather", parts[self.rank()], tensor.numel())
        places = [_Place(parts, filled=False) for parts in outputs]
        sent = [_Place([tensor], filled=True).flat for tensor in inputs]

        def steps() -> Steps:
            yield [
                self._comm.Iallgatherv(carried(self._mpi, mine), carried(self._mpi, place.flat, place.counts))
                for place, mine in zip(places, sent, strict=True)
            ]
            _deliver(places)

        return self._start("all-gather", steps(), [tensor for parts in outputs for tensor in parts], opts)

    def allgather_coalesced(self, output_lists: Any, inputs: Any, opts: Any = None) -> MpiWork:
        """Copy every rank's k-th input to ``output_lists[rank][k]``."""
        return self.allgather([list(parts) for parts in zip(*output_lists, strict=True)], inputs, opts)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:  # type: ignore[override]
        """Copy every rank's input to ``outputs[0][rank]`` of rank ``opts.rootRank``; elsewhere ``outputs`` is empty."""
        opts = opts or c10d.GatherOptions()
        root = opts.rootRank
        self._checked(inputs)
        parts: list[Tensor] = []
        if self.rank() == root:
            parts = self._checked(outputs[0])
            self._check_parts("gather", parts)
            self._check_numel("gather", parts[root], inputs[0].numel())
        place = _Place(parts, filled=False) if parts else None
        sent = _Place(inputs, filled=True).flat

        def steps() -> Steps:
            into = None if place is None else carried(self._mpi, place.flat, place.counts)
            yield [self._comm.Igatherv(carried(self._mpi, sent), into, root)]
            if place is not None:
                place.deliver()

        return self._start(f"gather to rank {self._world_rank(root)}", steps(), parts, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:  # type: ignore[override]
        """Copy ``inputs[0][rank]`` of rank ``opts.rootRank`` to every rank's output."""
        opts = opts or c10d.ScatterOptions()
        root = opts.rootRank
        self._checked(outputs)
        sent = None
        if self.rank() == root:
            self._check_parts("scatter", self._checked(inputs[0]))
            self._check_numel("scatter", outputs[0], inputs[0][root].numel())
            sent = _Place(inputs[0], filled=True)
        place = _Place(outputs, filled=False)

        def steps() -> Steps:
            data = None if sent is None else carried(self._mpi, sent.flat, sent.counts)
            yield [self._comm.Iscatterv(data, carried(self._mpi, place.flat), root)]
            place.deliver()

        return self._start(f"scatter from rank {self._world_rank(root)}", steps(), outputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        """Combine every rank's ``input`` and keep this rank's part. ``output`` may be that part of ``input``."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:
        """`reduce_scatter_single` of several tensors at once."""
        opts = opts or c10d.ReduceScatterOptions()
        self._checked([*outputs, *inputs])
        for output, tensor in zip(outputs, inputs, strict=True):
            self._check_numel("reduce-scatter", tensor, output.numel() * self.size())
        counts = [[output.numel()] * self.size() for output in outputs]
        return self._reduce_scatter(outputs, [_Place([tensor], filled=True) for tensor in inputs], counts, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:  # type: ignore[override]
        """Combine every rank's ``inputs[k][rank]`` into that rank's k-th output; ranks' parts may differ in size."""
        opts = opts or c10d.ReduceScatterOptions()
        for output, parts in zip(outputs, inputs, strict=True):
            self._checked([output, *parts])
            self._check_parts("reduce-scatter", parts)
            self._check_numel("reduce-scatter", output, parts[self.rank()].numel())
        places = [_Place(parts, filled=True) for parts in inputs]
        return self._reduce_scatter(outputs, places, [[part.numel() for part in parts] for parts in inputs], opts)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Any = (), input_splits: Any = (), opts: Any = None
    ) -> MpiWork:
        """Send the r-th part of ``input`` to rank r. Parts are cut along the first dimension, evenly without splits."""
        opts = opts or c10d.AllToAllOptions()
        self._checked([output, input])
        received = self._counts("all-to-all output", output, output_splits)
        sent = self._counts("all-to-all input", input, input_splits)
        return self._all_to_all(_Place([output], filled=False), received, _Place([input], filled=True), sent, opts)

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> MpiWork:
        """Send ``inputs[r]`` to rank r; ``outputs[r]`` comes from rank r. Sizes may differ."""
        opts = opts or c10d.AllToAllOptions()
        for parts in (outputs, inputs):
            self._check_parts("all-to-all", self._checked(parts))
        places = _Place(outputs, filled=False), _Place(inputs, filled=True)
        return self._all_to_all(places[0], places[0].counts, places[1], places[1].counts, opts)

    def barrier(self, opts: Any = None) -> MpiWork:
        """Wait for every rank to get here."""

        def steps() -> Steps:
            yield [self._comm.Ibarrier()]

        return self._start("barrier", steps(), [], opts or c10d.BarrierOptions())

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Block until every rank gets here; the error names all ranks that do not, on all ranks.

        Raises:
            CommError: not all did in time.
        """
        opts = c10d.BarrierOptions()
        if timeout is not None:
            opts.timeout = timeout
        self.barrier(opts).wait()

    # Point to point ---------------------------------------------------------------------------------------------------

    def send(self, tensors: Any, dst: int, tag: int = 0) -> MpiWork:
        """Send one tensor to rank ``dst``, which receives by the same tag."""
        [tensor] = self._checked(tensors)
        flat = _Place([tensor], filled=True).flat
        self._check_tag("send", tag)

        def steps() -> Steps:
            yield [self._comm.Isend(carried(self._mpi, flat), dst, tag)]

        return self._start(f"send to rank {self._world_rank(dst)} (tag {tag})", steps(), tensors, None, peer=dst)

    def recv(self, tensors: Any, src: int, tag: int = 0) -> MpiWork:
        """Receive one tensor, of the size that is sent, from rank ``src``."""
        return self._receive(tensors, src, tag, f"receive from rank {self._world_rank(src)} (tag {tag})")

    def recv_anysource(self, tensors: Any, tag: int = 0) -> MpiWork:
        """Receive one tensor from whoever sends first; the work's ``source_rank()`` tells who."""
        return self._receive(tensors, None, tag, f"receive from any rank (tag {tag})")

    def _receive(self, tensors: Any, src: int | None, tag: int, what: str) -> MpiWork:
        [tensor] = self._checked(tensors)
        place = _Place([tensor], filled=False)
        self._check_tag("receive", tag)
        source: list[int] = []

        def steps() -> Steps:
            data = carried(self._mpi, place.flat)
            [status] = yield [self._comm.Irecv(data, self._mpi.ANY_SOURCE if src is None else src, tag)]
            got = status.Get_count(data[2])
            if got != place.flat.numel():
                raise CommError(
                    f"expected {place.flat.numel()} elements of {tensor.dtype} but rank "
                    f"{self._world_rank(status.source)} sent {got}"
                )
            place.deliver()
            source.append(status.source)

        work = self._start(what, steps(), tensors, None, peer=src, is_collective=False)
        work.sources = source
        return work

    # How it is done: steps on the progress thread ---------------------------------------------------------------------

    def _allreduce(self, flat: Tensor, op: Any) -> Steps:
        reduction = Reduction(op, flat.dtype, self.size())
        if reduction.in_float32:
            counts = self._even(flat.numel())
            mine = yield from self._combine(flat, counts, reduction)
            part = mine.to(flat.dtype)
            yield [self._comm.Iallgatherv(carried(self._mpi, part), carried(self._mpi, flat, counts))]
            return
        yield [self._comm.Iallreduce(self._mpi.IN_PLACE, self._numbers(flat), self._op(reduction))]
        reduction.finish(flat)

    def _reduce(self, flat: Tensor, op: Any, root: int) -> Steps:
        reduction = Reduction(op, flat.dtype, self.size())
        is_root = self.rank() == root
        if reduction.in_float32:
            counts = self._even(flat.numel())
            mine = yield from self._combine(flat, counts, reduction)
            part = mine.to(flat.dtype)
            into = carried(self._mpi, flat, counts) if is_root else None
            yield [self._comm.Igatherv(carried(self._mpi, part), into, root)]
            return
        data = self._numbers(flat)
        source, target = (self._mpi.IN_PLACE, data) if is_root else (data, None)
        yield [self._comm.Ireduce(source, target, self._op(reduction), root)]
        if is_root:
            reduction.finish(flat)

    def _allgather(self, full: Tensor, mine: Tensor) -> Any:
        part = full[self.rank() * mine.numel() : (self.rank() + 1) * mine.numel()]
        into = carried(self._mpi, full)
        into[1] = mine.numel()  # mpi4py's count is that of one rank
        if part.data_ptr() == mine.data_ptr():
            return self._comm.Iallgather(self._mpi.IN_PLACE, into)
        if _overlap(full, mine):
            raise ConfigError("all-gather expected an input that is this rank's part of the output or none of it.")
        return self._comm.Iallgather(carried(self._mpi, mine), into)

    def _reduce_scatter(self, outputs: Any, sent: list[_Place], counts: list[list[int]], opts: Any) -> MpiWork:
        self._check_reduction(opts, outputs)
        flats = [place.flat for place in sent]
        places = [_Place([output], filled=False) for output in outputs]

        def scatter(place: _Place, full: Tensor, parts: list[int]) -> Steps:
            reduction = Reduction(opts.reduceOp, full.dtype, self.size())
            if reduction.in_float32:
                mine = yield from self._combine(full, parts, reduction)
                place.flat.copy_(mine)
                return
            into = torch.empty_like(place.flat) if _overlap(full, place.flat) else place.flat
            yield [self._comm.Ireduce_scatter(self._numbers(full), self._numbers(into), parts, self._op(reduction))]
            reduction.finish(into)
            if into is not place.flat:
                place.flat.copy_(into)

        def steps() -> Steps:
            yield from _together([scatter(*each) for each in zip(places, flats, counts, strict=True)])
            _deliver(places)

        return self._start("reduce-scatter", steps(), outputs, opts)

    def _all_to_all(self, place: _Place, received: list[int], source: _Place, sent: list[int], opts: Any) -> MpiWork:
        def steps() -> Steps:
            yield [
                self._comm.Ialltoallv(carried(self._mpi, source.flat, sent), carried(self._mpi, place.flat, received))
            ]
            place.deliver()

        return self._start("all-to-all", steps(), place._tensors, opts)

    def _combine(
        self, full: Tensor, counts: list[int], reduction: Reduction
    ) -> Generator[list[Any], list[Any], Tensor]:
        """Return this rank's part of the reduction of 16-bit ``full``, in float32."""
        numel = counts[self.rank()]
        received = torch.empty(numel * self.size(), dtype=full.dtype)
        into = carried(self._mpi, received, [numel] * self.size())
        yield [self._comm.Ialltoallv(carried(self._mpi, full, counts), into)]
        return reduction.combine(self._tree, [received[numel * rank :][:numel] for rank in range(self.size())])

    # Small things -----------------------------------------------------------------------------------------------------

    def _start(
        self,
        what: str,
        steps: Steps,
        tensors: Any,
        opts: Any,
        peer: int | None = None,
        is_collective: bool | None = None,
    ) -> MpiWork:
        if self._comm is None:
            raise CommError(f"{what} could not start: group {self._name!r} has been destroyed.")
        is_collective = peer is None if is_collective is None else is_collective
        timeout = getattr(opts, "timeout", None)
        if timeout is None or timeout <= timedelta(0):  # torch's word for the group's own
            timeout = self._options._timeout
        job = Job(
            f"mpi4py: {what} on rank {self._world_ranks[self.rank()]} of group {self._name!r}",
            steps,
            timeout.total_seconds(),
            self._lane,
            self._world_ranks if peer is None else [self._world_ranks[peer]],
            is_collective,
        )
        work = MpiWork(self._progress, job, list(tensors))
        self._progress.submit(job)
        return work

    def _world_rank(self, rank: int) -> int:
        if not 0 <= rank < self.size():
            raise ConfigError(f"expected a rank of group {self._name!r}, 0 to {self.size() - 1}, but got {rank}.")
        return self._world_ranks[rank]

    def _numbers(self, flat: Tensor) -> list[Any]:
        return [memory(self._mpi, flat), flat.numel(), number_type(self._mpi, flat.dtype)]

    def _op(self, reduction: Reduction) -> Any:
        return getattr(self._mpi, reduction.mpi_name)

    def _even(self, numel: int) -> list[int]:
        cuts = [numel * rank // self.size() for rank in range(self.size() + 1)]
        return [end - start for start, end in pairwise(cuts)]

    def _counts(self, what: str, tensor: Tensor, splits: Sequence[int]) -> list[int]:
        rows = tensor.shape[0] if tensor.dim() else 1
        if not splits:
            if rows % self.size():
                raise ConfigError(f"{what}: {rows} rows cannot be divided evenly among {self.size()} ranks.")
            splits = [rows // self.size()] * self.size()
        if len(splits) != self.size() or sum(splits) != rows:
            raise ConfigError(f"{what}: expected {self.size()} splits that sum to {rows} but got {list(splits)}.")
        row = tensor.numel() // rows if rows else 0
        return [split * row for split in splits]

    def _checked(self, tensors: Any) -> list[Tensor]:
        found: list[Tensor] = list(tensors)
        for tensor in found:
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                raise ConfigError(
                    f"the mpi4py backend carries dense CPU tensors but got {tensor.layout} on {tensor.device}; use "
                    "NCCL for CUDA (distadam.init_process_group() does, and meets over MPI)."
                )
            if tensor.dtype != found[0].dtype:
                raise ConfigError(f"expected tensors of one dtype but got {found[0].dtype} and {tensor.dtype}.")
        return found

    def _check_reduction(self, opts: Any, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            Reduction(opts.reduceOp, tensor.dtype, self.size())

    def _check_parts(self, what: str, parts: Sequence[Tensor]) -> None:
        if len(parts) != self.size():
            raise ConfigError(f"{what} expected one tensor for each of {self.size()} ranks but got {len(parts)}.")

    def _check_numel(self, what: str, tensor: Tensor, numel: int) -> None:
        if tensor.numel() != numel:
            raise ConfigError(f"{what} expected a tensor of {numel} elements but got {tuple(tensor.shape)}.")

    def _check_tag(self, what: str, tag: int) -> None:
        if not 0 <= tag <= self._largest_tag:
            raise ConfigError(f"{what}: expected a tag from 0 to {self._largest_tag} (this MPI's) but got {tag}.")


def _together(parts: list[Steps]) -> Steps:
    """Carry out several operations at once, in one order on all ranks."""
    while parts:
        requests, going = [], []
        for part in parts:
            wanted = next(part, None)
            if wanted is not None:
                requests += wanted
                going.append(part)
        parts = going
        if requests:
            yield requests


def _deliver(places: Sequence[_Place]) -> None:
    for place in places:
        place.deliver()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Say whether two contiguous tensors share memory."""
    starts = first.data_ptr() < second.data_ptr() + second.nbytes
    return starts and second.data_ptr() < first.data_ptr() + first.nbytes
