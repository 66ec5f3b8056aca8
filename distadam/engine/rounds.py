"""Gradients of one bucket on their way: collected, copied into a flat buffer, reduced, added into the shard.

Note [Rounds]: a step reduces a bucket in rounds. Round 1 is launched in backward when every parameter that is expected
has contributed. What comes after that (a second backward, reentrant checkpointing, a parameter that was not expected)
is the next round. Backward launches only the rounds that all ranks planned (as many as the last step needed); how many
a step really has is agreed in `Reducer.finish`, so ranks that saw different hooks still issue the same collectives.

Note [Discarding]: gradients that were collected and then dropped (``p.grad = None``, ``zero_grad()``) may already be
part of a planned round on another rank. So nothing that comes after a discard goes into a planned round: the bucket's
current round is sealed, and the next contributions wait for an unplanned one. When a planned round has been reduced,
each rank zeroes the discarded parameter's part of its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distadam import native
from distadam.comm import DONE, Collectives, Pending
from distadam.engine.buffers import BufferPool, FullBuffer
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.ledger import Ledger

# On a CPU gradients are copied while in cache, 1 MiB at a time, and their memory serves the next ones; elsewhere a
# bucket is one call.
_HOT_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Where full-gradient buffers come from: ``wire`` are sent, ``accumulation`` collect under ``no_sync``."""

    wire: BufferPool
    accumulation: BufferPool


class Round:
    """Contributions of one bucket that will be reduced together."""

    __slots__ = ("buffer", "contributed", "filled", "missing", "pending", "streams")

    def __init__(self, expected: bytearray) -> None:
        self.pending: dict[int, Tensor] = {}
        self.buffer: FullBuffer | None = None
        self.filled = bytearray(len(expected))
        self.contributed = bytearray(len(expected))
        self.missing = expected.count(1)
        self.streams: list[torch.cuda.Stream] = []

    @property
    def empty(self) -> bool:
        """Whether nothing was contributed."""
        return not self.pending and self.buffer is None


class BucketGradient:
    """The gradient of one bucket during one step.

    Args:
        flat: the bucket in memory.
        pools: where full buffers come from.
        collectives: reduces.
        reduce_dtype: dtype on the wire.
        ledger: allocates the shard's gradient.
    """

    def __init__(
        self, flat: FlatBucket, pools: Pools, collectives: Collectives, reduce_dtype: torch.dtype, ledger: Ledger
    ) -> None:
        self.flat = flat
        self.wire_dtype = reduce_dtype
        self.expected = bytearray(b"\x01" * len(flat.params))
        self.missed = bytearray(len(flat.params))
        self.planned = 1
        self.launched = 0
        self.multipliers: list[Tensor] = []
        self.divided = False
        self._pools = pools
        self._collectives = collectives
        self._ledger = ledger
        self._num_ranks = collectives.groups.num_ranks
        self._open = Round(self.expected)
        self._sealed: Round | None = None
        self._after_plan = False
        self._inflight = DONE
        self._absorbed = 0
        self._pending_nbytes = 0
        self._landing: Tensor | None = None
        self._held: FullBuffer | None = None
        self._sum: Tensor | None = None
        self._accumulator: Tensor | None = None
        self._void: dict[int, int] = {}
        self._num_ranks_tensor: Tensor | None = None

    # Collecting ------------------------------------------------------------------------------------------------------

    def collect(self, slot: int, grad: Tensor, accumulate: bool) -> None:
        """Take a contribution to the open round; a reference is kept until `flush`."""
        current = self._open
        if slot in current.pending:
            self.flush(accumulate)
        current.pending[slot] = grad
        if not current.contributed[slot]:
            current.contributed[slot] = 1
            current.missing -= self.expected[slot]
        if self.flat.device.type == "cpu":
            self._pending_nbytes += grad.nbytes
            if self._pending_nbytes >= _HOT_NBYTES:
                self.flush(accumulate)
        elif grad.is_cuda:
            stream = self._collectives.streams.current(grad.device)
            if stream is not None and stream not in current.streams:
                current.streams.append(stream)

    def reopen(self) -> None:
        """Expect everything once more: what came under `no_sync` is reduced with the next backward's gradients."""
        self._open.contributed = bytearray(len(self.expected))
        self._open.missing = self.expected.count(1)

    @property
    def waiting(self) -> list[Tensor]:
        """Contributions that are not copied yet."""
        return [grad for current in (self._open, self._sealed) if current for grad in current.pending.values()]

    @property
    def complete(self) -> bool:
        """Whether the next round to launch has all that is expected."""
        if self._sealed is not None:
            return True
        return self._open.missing <= 0 and not self._after_plan

    @property
    def num_rounds(self) -> int:
        """Rounds that this rank needs: launched ones and what waits."""
        waiting = int(self._sealed is not None and not self._sealed.empty)
        if not self._open.empty:
            first_free = max(self.launched + waiting, self.planned if self._after_plan else 0)
            return first_free + 1
        return self.launched + waiting

    def flush(self, accumulate: bool) -> None:
        """Copy (or add) pending contributions into the open round's buffer, in one call each."""
        self._pending_nbytes = 0
        self._flush(self._open, accumulate)

    def _flush(self, current: Round, accumulate: bool) -> None:
        if not current.pending:
            return
        flat, bucket = self.flat, self.flat.bucket
        for stream in current.streams:
            self._collectives.streams.follow(flat.device, stream)
        adds = any(current.filled[slot] for slot in current.pending)
        dtype = flat.compute_dtype if accumulate or adds else self.wire_dtype
        if current.buffer is None:
            pool = self._pools.accumulation if accumulate else self._pools.wire
            current.buffer = pool.acquire(bucket, dtype, flat.device)
        elif adds and current.buffer.flat.dtype != dtype:
            wider = self._pools.accumulation.acquire(bucket, dtype, flat.device)
            wider.tensor(bucket).copy_(current.buffer.tensor(bucket))
            self._give_back(current.buffer)
            current.buffer = wider
        views = current.buffer.views(bucket, flat.views)
        fresh = [slot for slot in current.pending if not current.filled[slot]]
        with torch.no_grad():
            if fresh:
                native.copy_all([views[slot] for slot in fresh], [current.pending[slot] for slot in fresh])
            if adds:
                again = [slot for slot in current.pending if current.filled[slot]]
                torch._foreach_add_([views[slot] for slot in again], [current.pending[slot] for slot in again])
        for slot in fresh:
            current.filled[slot] = 1
        for stream in current.streams:
            self._collectives.streams.lead(flat.device, stream)
        current.pending.clear()

    # Discarding ------------------------------------------------------------------------------------------------------

    def discard(self, slot: int) -> None:
        """Drop what was collected for a slot in this step; see Note [Discarding]."""
        if self.multipliers:  # they scale what there is, not what will come; and a clip factor may be NaN
            self.average()
        for current in (self._open, self._sealed):
            if current is not None:
                current.pending.pop(slot, None)
                if current.filled[slot] and current.buffer is not None:
                    current.buffer.views(self.flat.bucket, self.flat.views)[slot].zero_()
        # Planned rounds may carry the slot from a peer that launched before it discarded, whatever this rank sends.
        self._void[slot] = self.launched if self._num_ranks == 1 else max(self.launched, self.planned)
        if self._sum is not None:
            self.flat.slot_shard(self._sum, slot).zero_()
        if self._num_ranks == 1:
            current = self._open
            current.filled[slot] = 0
            if current.contributed[slot]:
                current.contributed[slot] = 0
                current.missing += self.expected[slot]
        elif not self._after_plan and self.launched < self.planned:
            self._sealed = self._open
            self._open = Round(self.expected)
            self._after_plan = True

    # Reducing --------------------------------------------------------------------------------------------------------

    @property
    def landed(self) -> bool:
        """Whether `launch` would not wait: a peer may launch the former round no earlier than this rank's `step`."""
        return self._absorbed == self.launched or self._inflight.ready(0.0)

    def launch(self, inspect: Callable[[FlatBucket, Tensor], None] | None) -> None:
        """Start the reduction of the next round; zeros where this rank has nothing. ``inspect`` is shown it before."""
        self.absorb()
        if self._sum is not None:
            self._sum = self._to_accumulator(self._sum)
            if self._held is not None:
                self._give_back(self._held)
                self._held = None
        full = self._take(self._next_round())
        bucket = self.flat.bucket
        if inspect is not None:
            inspect(self.flat, full.tensor(bucket))
        if self._num_ranks == 1:
            self._held, self._landing = full, full.tensor(bucket)
        else:
            if self._landing is None:
                flat = self.flat
                dtype = self._collectives.landing_dtype(self.wire_dtype, flat.compute_dtype, flat.device)
                self._landing = self._ledger.empty("gradient_shards", bucket.shard_numel, dtype, flat.device)
            self._inflight = self._collectives.reduce_scatter(
                self._landing, full.tensor(bucket), f"bucket {bucket.index}"
            )
            self._give_back(full, self._inflight.reading)
        self.launched += 1

    def _next_round(self) -> Round:
        if self._sealed is not None:
            current, self._sealed = self._sealed, None
            return current
        if self._after_plan and self.launched < self.planned:
            return Round(self.expected)
        current, self._open = self._open, Round(self.expected)
        return current

    def _take(self, current: Round) -> FullBuffer:
        """Return the round's full gradient in the wire dtype, zero where nothing was contributed."""
        bucket, flat = self.flat.bucket, self.flat
        self._flush(current, accumulate=False)
        buffer = current.buffer
        with torch.no_grad():
            if buffer is None:
                buffer = self._pools.wire.acquire(bucket, self.wire_dtype, flat.device)
                buffer.tensor(bucket).zero_()
                return buffer
            views, padding = buffer.views(bucket, flat.views), buffer.padding(bucket, flat.views)
            if not all(current.filled):
                padding = padding + [view for view, filled in zip(views, current.filled, strict=True) if not filled]
            if padding:
                torch._foreach_zero_(padding)
            if buffer.flat.dtype != self.wire_dtype and self._num_ranks > 1:
                wire = self._pools.wire.acquire(bucket, self.wire_dtype, flat.device)
                wire.tensor(bucket).copy_(buffer.tensor(bucket))
                self._give_back(buffer)
                return wire
        return buffer

    def _give_back(self, buffer: FullBuffer, pending: Pending = DONE) -> None:
        buffer.pool.release(buffer, pending)

    def absorb(self) -> None:
        """Wait for the round in flight and add it to the step's sum."""
        if self._absorbed == self.launched or self._landing is None:
            return
        self._inflight.wait()
        self._absorbed = self.launched
        landing = self._landing
        with torch.no_grad():
            for slot, last_round in self._void.items():
                if self._absorbed <= last_round:
                    self.flat.slot_shard(landing, slot).zero_()
            if self._sum is None:
                self._sum = landing
            elif self.divided or self.multipliers:
                # The sum was scaled (clipped, unscaled) before this round came: only the new part is a raw sum.
                self._sum = self._apply_scaling(self._sum)
                self._sum.add_(landing.to(self._sum.dtype).div_(self.num_ranks_tensor()))
            else:
                self._sum.add_(landing)

    # The reduced gradient --------------------------------------------------------------------------------------------

    @property
    def scaling_divisor(self) -> Tensor | None:
        """What the sum is still to be divided by: the number of ranks, or None."""
        return None if self.divided or self._num_ranks == 1 else self.num_ranks_tensor()

    def num_ranks_tensor(self) -> Tensor:
        """Return the number of ranks as a 0-D tensor of the compute dtype."""
        if self._num_ranks_tensor is None:
            scalar = self._ledger.empty("scratch", 1, self.flat.compute_dtype, self.flat.device)
            self._num_ranks_tensor = scalar.fill_(float(self._num_ranks)).view(())
        return self._num_ranks_tensor

    def divide_by(self, num_ranks: int) -> None:
        """Average over ``num_ranks`` from now on (uneven inputs with ``divide_by_initial_world_size=False``)."""
        self.num_ranks_tensor().fill_(float(num_ranks))

    def summed(self) -> Tensor:
        """Return this shard's sum over ranks in the compute dtype; zeros if no round was launched."""
        self.absorb()
        if self._sum is None:
            self._sum = self._accumulator_tensor().zero_()
        elif self._sum.dtype != self.flat.compute_dtype:
            self._sum = self._to_accumulator(self._sum)
        return self._sum

    def pieces(self) -> Iterator[Tensor]:
        """Return this shard's sum over ranks in the compute dtype, piece by piece; once, in place of `summed`.

        Where nothing has asked for the sum yet and the collectives can add up as it is read, it never goes to memory:
        each piece then overwrites the one before. Otherwise there is one piece.
        """
        taken = self._inflight.pieces() if self._unread else None
        if taken is None:
            return iter([self.summed()])  # now: what it absorbs may change what is still to be scaled
        self._absorbed = self.launched
        return taken

    def leaves(self) -> Iterator[list[Tensor]]:
        """Return, in one item and in place of `summed`, what to add up: every rank's part of this shard, by rank.

        Where something has asked for the sum, or the collectives can give nothing else, that is the only part, in the
        compute dtype or 16 bits.
        """
        taken = self._inflight.leaves() if self._unread else None
        if taken is None:
            return iter([[self.raw_sum()]])
        self._absorbed = self.launched
        return taken

    @property
    def _unread(self) -> bool:
        """Whether one reduction is the whole sum, and nothing has asked for it yet."""
        alone = self._sum is None and self._absorbed == self.launched - 1 and not self._void
        return alone and self._landing is not None and self._landing.dtype == self.flat.compute_dtype

    def raw_sum(self) -> Tensor:
        """Return what `summed` returns, in the 16-bit dtype of the wire where nothing has widened it yet."""
        self.absorb()
        if self._sum is None or self._sum.dtype not in (torch.bfloat16, torch.float16):
            return self.summed()
        return self._sum

    def multiply(self, factor: Tensor | float) -> None:
        """Scale the averaged gradient by a 0-D tensor or a number, when the update reads it."""
        if not isinstance(factor, Tensor):
            factor = torch.tensor(factor, dtype=self.flat.compute_dtype)
        self.multipliers.append(factor.to(self.flat.device, self.flat.compute_dtype, non_blocking=True))

    def average(self) -> Tensor:
        """Return this shard's averaged gradient, with every multiplier applied, in the compute dtype."""
        total = self._apply_scaling(self.summed())
        self._sum = total
        return total

    def _apply_scaling(self, total: Tensor) -> Tensor:
        if total.dtype != self.flat.compute_dtype:
            total = self._to_accumulator(total)
        divisor = self.scaling_divisor
        if divisor is not None:
            total.div_(divisor)
        self.divided = True
        for multiplier in self.multipliers:
            total.mul_(multiplier)
        self.multipliers = []
        return total

    def _accumulator_tensor(self) -> Tensor:
        if self._accumulator is None:
            self._accumulator = self._ledger.empty(
                "gradient_shards", self.flat.bucket.shard_numel, self.flat.compute_dtype, self.flat.device
            )
        return self._accumulator

    def _to_accumulator(self, total: Tensor) -> Tensor:
        accumulator = self._accumulator_tensor()
        return accumulator if total is accumulator else accumulator.copy_(total)

    def reset(self) -> None:
        """Forget the step: what was not reduced or not used is dropped, buffers go back."""
        if self._absorbed != self.launched:
            self._inflight.wait()
        for current in (self._open, self._sealed):
            if current is not None and current.buffer is not None:
                self._give_back(current.buffer)
        if self._held is not None:
            self._give_back(self._held)
        self._held = self._sum = self._sealed = None
        self._open = Round(self.expected)
        self.launched = self._absorbed = 0
        self._after_plan = self.divided = False
        self._inflight = DONE
        self._void.clear()
        self.multipliers = []
