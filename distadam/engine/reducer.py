"""Collect gradients as backward produces them, reduce buckets in one order on every rank."""

from __future__ import annotations

import operator
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distadam.comm import Collectives, Pending
from distadam.engine.buffers import BufferPool
from distadam.engine.chain import Chain, Link
from distadam.engine.flat_bucket import TORCH_DTYPES, FlatBucket
from distadam.engine.gradients import Operations, ShardedGradient
from distadam.engine.hooks import hook_placed, hook_unplaced
from distadam.engine.ledger import Ledger
from distadam.engine.order import NO_PROPOSAL
from distadam.engine.rounds import BucketGradient, Pools
from distadam.engine.votes import CALLS, Purpose, Votes
from distadam.errors import ConfigError, RankMismatchError, UsageError
from distadam.policies import CommPolicy, PrecisionPolicy, ShardPolicy

_get_grad = operator.attrgetter("grad")
_IN_FLIGHT = 2
_PATIENCE_STEPS = 2


class Reducer:
    """All buckets' gradients during one step.

    Note [Launch order]: buckets are reduced in the order of their index, round by round, on every rank, never in the
    order in which they become ready: ranks see different orders. Backward runs ahead in that order as far as complete
    buckets allow; `finish` does the rest after the ranks have agreed how much that is.
    """

    def __init__(
        self,
        collectives: Collectives,
        ledger: Ledger,
        chain: Chain,
        *,
        shard: ShardPolicy,
        precision: PrecisionPolicy,
        comm: CommPolicy,
        on_backward: Callable[[], None],
        on_iteration: Callable[[], None],
        on_unfrozen: Callable[[bytes], None],
    ) -> None:
        self.gradients: list[BucketGradient] = []
        self.stand_ins: list[ShardedGradient] = []
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.indices: dict[Tensor, int] = {}
        self.bases: list[int] = []
        self.hooks: list[RemovableHandle] = []
        self.frozen: list[Tensor] = []
        self.frozen_names: list[str] = []
        self.frozen_hooks: list[RemovableHandle] = []
        self.syncing = True
        self.has_global = b""
        self.version = 0
        self.num_active = 0  # ranks to average over, for joined ranks to hear; 0 is all
        self.operations: Operations
        self.arriving: Mapping[int, Pending] = {}
        self.inspect: Callable[[FlatBucket, Tensor], None] | None = None
        self.chain = chain
        self._collectives = collectives
        self._ledger = ledger
        self._precision = precision
        self._overlap = comm.overlap_reduce and collectives.groups.num_ranks > 1
        dedicated = shard.stage == 1 or collectives.groups.num_ranks == 1
        self._pools = Pools(
            wire=BufferPool(ledger, "gradient_buffers", None if dedicated else _IN_FLIGHT),
            accumulation=BufferPool(ledger, "gradient_accumulation", None),
        )
        self._on_backward = on_backward
        self._on_iteration = on_iteration
        self._on_unfrozen = on_unfrozen
        self._lock = threading.RLock()
        self._has = bytearray()
        self._discarded = bytearray()
        self._dropped = bytearray()  # whether it is known that ``p.grad`` was taken away, and nothing has come since
        self._by_hand: dict[int, Tensor] = {}
        self._shown = False  # whether a backward of this step has installed stand-ins
        self._plan: list[tuple[int, int]] = []
        self._next = 0
        self._graph_task = -1
        self._votes = Votes(0, 0, len(self.frozen))
        ledger.watch("scratch", self._small_tensors)
        ledger.watch("gradients", self._waiting_gradients)

    def _small_tensors(self) -> list[Tensor]:
        return [self._votes.tensor, *(factor for gradient in self.gradients for factor in gradient.multipliers)]

    def _waiting_gradients(self) -> list[Tensor]:
        held = [param.grad.waiting for param in self.frozen if isinstance(param.grad, ShardedGradient)]
        waiting = [grad for gradient in self.gradients for grad in gradient.waiting]
        return [*waiting, *(grad for grad in held if grad is not None)]

    # Setting up ------------------------------------------------------------------------------------------------------

    def add_bucket(self, flat: FlatBucket) -> None:
        """Take charge of a bucket's gradients."""
        for slot, param in enumerate(flat.params):
            if not param.is_leaf:
                raise ConfigError(
                    f"parameter {flat.names[slot]!r}: expected a leaf tensor but got the result of an operation."
                )
        reduce_dtype = self._precision.reduce_dtype or flat.dtype
        gradient = BucketGradient(flat, self._pools, self._collectives, reduce_dtype, self._ledger)
        self._pools.wire.expect(flat.bucket, reduce_dtype, flat.device)
        self.chain.add_bucket(flat.bucket)
        base = len(self.params)
        self.bases.append(base)
        self.gradients.append(gradient)
        self.params += flat.params
        self.indices |= {param: base + slot for slot, param in enumerate(flat.params)}
        self.names += flat.names
        for slot, param in enumerate(flat.params):
            stand_in = param.grad
            if isinstance(stand_in, ShardedGradient) and stand_in.belongs_to(self.operations):
                stand_in.param_index = base + slot  # the parameter was frozen, and loops may hold this already
            else:
                if isinstance(stand_in, ShardedGradient):
                    param.grad = None  # collected for an optimizer that this one replaces
                stand_in = ShardedGradient(param, self.operations, base + slot, flat.names[slot])
            self.stand_ins.append(stand_in)
            self.hooks.append(hook_placed(self, gradient, slot, base + slot, param, stand_in))
        self._has += bytes(len(flat.params))
        self._discarded += bytes(len(flat.params))
        self._dropped += bytes(len(flat.params))
        self._votes = Votes(len(self.gradients), len(self.params), len(self.frozen))
        self._plan.append((1, len(self.gradients) - 1))

    def set_frozen(self, frozen: Sequence[Tensor], names: Sequence[str]) -> None:
        """Replace the parameters that have no place yet: see Note [Unfrozen parameters]."""
        for handle in self.frozen_hooks:
            handle.remove()
        self.frozen_hooks.clear()
        self.frozen = list(frozen)
        for param, name in zip(frozen, names, strict=True):
            if param.dtype in TORCH_DTYPES.values() and not param.is_inference():
                self.frozen_hooks.append(hook_unplaced(self, name, param))
        self.frozen_names = list(names)
        self._votes = Votes(len(self.gradients), len(self.params), len(self.frozen))

    def locate(self, index: int) -> tuple[int, int]:
        """Return bucket and slot of parameter ``index`` (parameters in order of buckets and slots)."""
        bucket = bisect_right(self.bases, index) - 1
        return bucket, index - self.bases[bucket]

    def place(self, index: int) -> tuple[BucketGradient, int]:
        """Return the bucket's gradient and the slot of parameter ``index``."""
        bucket, slot = self.locate(index)
        return self.gradients[bucket], slot

    # Backward --------------------------------------------------------------------------------------------------------

    def collect(self, gradient: BucketGradient, slot: int, index: int, grad: Tensor, *, replaces: bool = False) -> None:
        """Take one contribution; launch what has become complete.

        Args:
            gradient: the parameter's bucket.
            slot: its place in there.
            index: its place among all.
            grad: any floating dtype, the parameter's shape and device.
            replaces: ``p.grad`` was empty before this came, so whatever was collected has been dropped by the user.
        """
        if grad.layout != torch.strided:
            raise ConfigError(
                f"parameter {self.names[index]!r} got a {grad.layout} gradient; expected a dense one. "
                "Use nn.Embedding(sparse=False), or leave the parameter to torch.optim.SparseAdam."
            )
        with self._lock:
            task = self._begin_backward()
            if task != -1 and gradient.flat.bucket.index in self.arriving:
                raise UsageError(
                    f"parameter {self.names[index]!r} was used while its gather was under way, since no hook of "
                    "prefetch(model) ran before. Call flush() before reading parameters outside the model's forward."
                )
            if replaces and (self._has[index] or (self._shown and not self._dropped[index])):
                self._discard(index)
            self._has[index], self._dropped[index] = 1, 0
            self.version += 1
            gradient.collect(slot, grad.detach() if grad.requires_grad else grad, not self.syncing)
            if gradient.complete:
                gradient.flush(not self.syncing)
                self._advance()

    def hold(self, stand_in: ShardedGradient, grad: Tensor) -> None:
        """Take one contribution to a parameter that has no place yet: see Note [Unfrozen parameters]."""
        with self._lock:
            self._begin_backward()
            stand_in.hold(grad)
            self.version += 1

    def _begin_backward(self) -> int:
        """Prepare for the end of this backward, once; return its number, -1 outside of any."""
        task = torch._C._current_graph_task_id()
        if task != -1 and task != self._graph_task:
            self._graph_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._install_stand_ins)
            self._on_backward()
            if self.syncing:
                self._on_iteration()
        return task

    def _advance(self) -> None:
        if not (self.syncing and self._overlap):
            return
        while self._next < len(self._plan):
            gradient = self.gradients[self._plan[self._next][1]]
            if not (gradient.complete and gradient.landed):
                return
            self._launch(gradient)
            self._next += 1

    def _launch(self, gradient: BucketGradient) -> None:
        self.chain.order.append(gradient.flat.bucket.index)
        gradient.launch(self.inspect)

    def _install_stand_ins(self) -> None:
        """At the end of a backward every trainable parameter's ``grad`` is a stand-in, on every rank the same."""
        if any(map(operator.is_, map(_get_grad, self.params), repeat(None))):
            for index, (param, stand_in) in enumerate(zip(self.params, self.stand_ins, strict=True)):
                if param.grad is None and param.requires_grad:
                    if self._shown and not self._dropped[index]:  # the user took it away after an earlier backward
                        self._discard(index)
                    param.grad, self._dropped[index] = stand_in, 0
        for param, name in zip(self.frozen, self.frozen_names, strict=True):
            if param.grad is None and param.requires_grad:
                param.grad = ShardedGradient(param, self.operations, None, name)
                self.version += 1
        self._shown = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate locally while the context is open."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before
            if before:
                for gradient in self.gradients:
                    gradient.reopen()

    # Discarding ------------------------------------------------------------------------------------------------------

    def _discard(self, index: int) -> None:
        # Also where this rank has collected nothing: others may have, and all must agree on what comes after.
        gradient, slot = self.place(index)
        gradient.discard(slot)
        self.version += 1
        self._has[index] = 0
        self._discarded[index] = self._dropped[index] = 1

    def discard_all(self) -> None:
        """Drop everything that was collected in this step, reductions in flight included. Communicates nothing."""
        with self._lock:
            for index, param in enumerate(self.params):
                if self._has[index] or (self._shown and param.requires_grad):
                    self._discard(index)

    def zero(self, index: int) -> None:
        """Make what was collected for a parameter a gradient of zeros: it still counts as one."""
        with self._lock:
            had = self._has[index]
            self._discard(index)
            self._has[index], self._dropped[index] = had, 0

    def _look_at_grads(self, by_hand: bool) -> None:
        """Compare every ``p.grad`` with what was collected: dropped ones are discarded, the user's own are taken."""
        grads = list(map(_get_grad, self.params))
        if all(map(operator.is_, grads, self.stand_ins)):
            return
        for index, (grad, stand_in) in enumerate(zip(grads, self.stand_ins, strict=True)):
            if grad is stand_in:
                continue
            if grad is None:
                dropped = self._shown and self.params[index].requires_grad and not self._dropped[index]
                if self._has[index] or dropped:
                    self._discard(index)
            elif by_hand and self._by_hand.get(index) is not grad:
                self._by_hand[index] = grad
                gradient, slot = self.place(index)
                self.collect(gradient, slot, index, grad)

    # Finishing -------------------------------------------------------------------------------------------------------

    def finish(
        self,
        purpose: Purpose,
        detail: bytes = b"",
        *,
        by_hand: bool = False,
        error: Exception | None = None,
        proposal: bytes = NO_PROPOSAL,
    ) -> tuple[Purpose, bytes]:
        """Agree on what this step reduces and launch the rest of it.

        Note [Unfrozen parameters]: a parameter that was frozen when the optimizer was built has no place in a bucket.
        Once it gets a gradient, ``p.grad`` is a stand-in that keeps this rank's contributions (`hold`); the first call
        that communicates, whatever it is, finds so on some rank and gives it its place on all of them.

        Args:
            purpose: the call that needs the gradient.
            detail: bytes that all ranks must share.
            by_hand: take ordinary tensors that the user put in ``p.grad`` too.
            error: what this rank found wrong; it is raised here, and as `RankMismatchError` on the others.
            proposal: the order of gathers that this rank would use; see `agreed_proposal`.

        Returns:
            What all ranks are doing, and its detail: news for a joined rank only.

        Collective: every rank. Syncs: hosts wait for each other, devices for nothing.
        """
        with self._lock:
            if purpose is not Purpose.JOINED:
                self._on_iteration()
            link: Link | None = None
            if error is None:
                try:
                    self._look_at_grads(by_hand)
                    for gradient in self.gradients:
                        gradient.flush(False)
                    if purpose is Purpose.STEP and self._collectives.groups.num_ranks > 1:
                        link = self.chain.next()
                except Exception as caught:
                    error = caught
            voted = Purpose.FAILED if error else purpose
            agreed, agreed_detail = self._agree(voted, detail, error, by_hand, link, proposal)
            digest = self._votes.digest
            self._launch_agreed(self._votes.rounds)
            if 1 in self._votes.frozen:
                self._on_unfrozen(self._votes.frozen)
                return self.finish(purpose, detail, by_hand=by_hand)
            if link is not None:
                self.chain.take(link)
            elif agreed is Purpose.STEP and digest is not None:
                self.chain.follow(digest)
        return agreed, agreed_detail

    def announce(self, purpose: Purpose, detail: bytes = b"") -> None:
        """Agree that every rank makes this call with this detail; it issues collectives of its own. Gradients stay.

        Collective: every rank. Syncs: hosts wait for each other.
        """
        with self._lock:
            self._on_iteration()
            votes, nothing = self._votes, bytes(len(self.params))
            rounds, frozen = bytes(len(self.gradients)), bytes(len(self.frozen))
            votes.cast(purpose, detail, self.chain.digest, rounds, nothing, nothing, frozen)
            self._collectives.agree(votes.tensor, f"the agreement before {CALLS[purpose]}")
            if votes.failed:
                self._raise_failure(CALLS[purpose], None)
            if votes.purpose is not purpose or votes.detail is None:
                raise self._disagreement(purpose, detail)
            if votes.digest is None:
                raise self.chain.mismatch(None, self._collectives.exchange)
            if votes.joined:
                raise joined_error(purpose)

    def _agree(
        self,
        purpose: Purpose,
        detail: bytes,
        error: Exception | None,
        by_hand: bool,
        link: Link | None,
        proposal: bytes,
    ) -> tuple[Purpose, bytes]:
        votes = self._votes
        kept = bytes(self._has)
        discarded = bytes(self._discarded)
        if 1 in discarded:
            discarded = bytes(flag + (flag & has) for flag, has in zip(discarded, kept, strict=True))
            kept = bytes(has & (not flag) for flag, has in zip(discarded, kept, strict=True))
        grads = map(_get_grad, self.frozen)
        frozen = bytes(isinstance(grad, ShardedGradient) or (by_hand and grad is not None) for grad in grads)
        rounds = bytes(min(gradient.num_rounds, 255) for gradient in self.gradients)
        digest = self.chain.digest if link is None else link.digest
        depth = self._pools.wire.depth or 0
        votes.cast(purpose, detail, digest, rounds, kept, discarded, frozen, self.num_active, proposal, depth)
        call = CALLS.get(purpose, "a failed call")
        self._collectives.agree(votes.tensor, f"the agreement before {call}")
        self._pools.wire.deepen(votes.depth)
        if votes.failed:
            self._raise_failure(call, error)
        if purpose is Purpose.JOINED and votes.num_active:
            self.divide_by(votes.num_active)
        agreed, agreed_detail = votes.purpose, votes.detail
        if agreed is None or agreed_detail is None:
            raise self._disagreement(purpose, detail)
        if votes.digest is None:
            raise self.chain.mismatch(link, self._collectives.exchange)
        conflict = (
            [a & (b > 0) for a, b in zip(votes.has, votes.discarded, strict=True)] if any(votes.discarded) else []
        )
        if 1 in conflict:
            name = self.names[conflict.index(1)]
            raise UsageError(
                f"parameter {name!r}: some ranks discarded its collected gradient (p.grad = None or zero_grad()) and "
                "others kept theirs; expected all ranks to discard or none. Call zero_grad() on every rank."
            )
        self.has_global = (
            bytes(a | (b == 2) for a, b in zip(votes.has, votes.discarded, strict=True))
            if any(votes.discarded)
            else votes.has
        )
        return agreed, agreed_detail

    def _raise_failure(self, call: str, error: Exception | None) -> None:
        errors = self._collectives.exchange(None if error is None else f"{type(error).__name__}: {error}", call)
        if error is not None:
            raise error
        rank, message = next((rank, text) for rank, text in enumerate(errors) if text is not None)
        raise RankMismatchError(f"rank {rank} failed while this rank called {call}: {message}")

    def _disagreement(self, purpose: Purpose, detail: bytes) -> RankMismatchError:
        calls = self._collectives.exchange((CALLS.get(purpose, "nothing (joined)"), detail.hex()), "calls")
        shown = ", ".join(f"rank {rank} {call} {arguments}".rstrip() for rank, (call, arguments) in enumerate(calls))
        return RankMismatchError(
            f"ranks call different things: {shown}. Every rank must make the same calls on the optimizer in one order."
        )

    def _launch_agreed(self, rounds: bytes) -> None:
        # Note [Launch order]: the rest of the plan first, then further rounds by (round, bucket).
        for number, index in self._plan[self._next :]:
            if rounds[index] >= number and self.gradients[index].launched < number:
                self._launch(self.gradients[index])
        self._next = len(self._plan)
        for number in range(1, max(rounds, default=0) + 1):
            for index, gradient in enumerate(self.gradients):
                if rounds[index] >= number and gradient.launched < number:
                    self._launch(gradient)

    @property
    def agreed_proposal(self) -> bytes | None:
        """What every rank proposed in the last `finish`, or None if they differ: the same on every rank."""
        return self._votes.proposal

    @property
    def has_now(self) -> bytes:
        """Per parameter, whether this rank has collected a gradient in this step."""
        return bytes(self._has)

    @property
    def reduced(self) -> tuple[bytes, bytes]:
        """Rounds launched and slots discarded in this step: after `finish` the same on every rank."""
        return bytes(min(gradient.launched, 255) for gradient in self.gradients), self._votes.discarded

    def divide_by(self, num_ranks: int) -> None:
        """Average over ``num_ranks`` from now on: ranks that have data, with uneven inputs."""
        for gradient in self.gradients:
            gradient.divide_by(num_ranks)

    # After the step --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget this step; plan the next one as this one went."""
        with self._lock:
            self._learn_expected()
            self.version += 1
            self.chain.end_step()
            idle = not any(gradient.launched for gradient in self.gradients)
            for gradient in self.gradients:
                if not idle:
                    gradient.planned = gradient.launched
                gradient.reset()
            most = max((gradient.planned for gradient in self.gradients), default=0)
            self._plan = [
                (number, index)
                for number in range(1, most + 1)
                for index, gradient in enumerate(self.gradients)
                if gradient.planned >= number
            ]
            self._next = 0
            self._has = bytearray(len(self.params))
            self._discarded = bytearray(len(self.params))
            self._dropped = bytearray(len(self.params))
            self._by_hand.clear()
            self._shown = False
            self._clear_stand_ins()

    def _clear_stand_ins(self) -> None:
        grads = list(map(_get_grad, self.params))
        if all(map(operator.is_, grads, self.stand_ins)):
            for param in self.params:
                param.grad = None
            return
        for param, grad, stand_in in zip(self.params, grads, self.stand_ins, strict=True):
            if grad is stand_in:
                param.grad = None

    def _learn_expected(self) -> None:
        """A parameter that missed two steps in a row is not waited for; it is again as soon as it comes."""
        if 0 not in self._has and all(0 not in gradient.expected for gradient in self.gradients):
            return
        for gradient, base in zip(self.gradients, self.bases, strict=True):
            for slot in range(len(gradient.expected)):
                missed = 0 if self._has[base + slot] else min(gradient.missed[slot] + 1, _PATIENCE_STEPS)
                gradient.missed[slot] = missed
                gradient.expected[slot] = missed < _PATIENCE_STEPS

    def bucket_has(self, index: int) -> bytes:
        """Return for each slot of a bucket whether some rank had a gradient."""
        base = self.bases[index]
        return self.has_global[base : base + len(self.gradients[index].flat.params)]


def joined_error(purpose: Purpose) -> UsageError:
    """Return what every rank raises when some have run out of data in a call that needs all of them."""
    return UsageError(
        f"{CALLS[purpose]} expected every rank but some have joined (Join: they ran out of data); "
        "call it before or after the Join context."
    )
