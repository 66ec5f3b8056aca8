"""`ShardedOptimizer`: the file to read first.

A step in four lines: backward hooks collect gradients and reduce-scatter full buckets (`engine.reducer`); `step` lets
the ranks agree on what is left to reduce, updates this rank's shard of each bucket with one fused call
(`engine.stepper`) and all-gathers it (`engine.gatherer`). One process runs the same code with nothing to send.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distadam.comm import Collectives, CollectiveStats, Groups, Join, Joinable, JoinHook, Streams
from distadam.engine import dumps, places, prefetch, state
from distadam.engine.access import Access
from distadam.engine.chain import Chain, Witness
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.gatherer import Gatherer
from distadam.engine.gradients import ShardedGradient, register_foreach
from distadam.engine.guard import ParameterGuard
from distadam.engine.ledger import Ledger, MemoryReport
from distadam.engine.norms import StepNorm
from distadam.engine.observe import Observer, observe
from distadam.engine.observers import Observers, StepObserver
from distadam.engine.operations import GradientOperations
from distadam.engine.order import NO_PROPOSAL, GatherOrder
from distadam.engine.reducer import Reducer, joined_error
from distadam.engine.shadow import ShadowHook
from distadam.engine.stepper import KernelReport, Stepper
from distadam.engine.votes import Purpose, pack_floats, unpack_floats
from distadam.engine.waiting import WaitReport, wait_report
from distadam.errors import ConfigError, NonFiniteError, RankMismatchError, UsageError
from distadam.layout import Fingerprint, Layout, first_difference
from distadam.policies import CommPolicy, OffloadPolicy, PrecisionPolicy, ShardPolicy
from distadam.rules import RULES


class ShardedOptimizer(torch.optim.Optimizer, Joinable):
    """A torch optimizer whose state is divided over ranks and which reduces gradients itself.

    Use `Adam`, `AdamW`, `SGD` or `RMSprop`. Construction is collective: ranks compare names, shapes, dtypes and
    hyper-parameters, then take the parameters of the first rank.

    Args:
        rule: key in ``distadam.rules.RULES``.
        params: iterable of tensors, of (name, tensor), or of group dicts.
        make_defaults: returns torch's validated default hyper-parameters, or raises as torch does.
        shard, precision, comm, offload: see ``distadam.policies``.
    """

    def __init__(
        self,
        rule: str,
        params: Iterable[Any],
        make_defaults: Callable[[], dict[str, Any]],
        *,
        shard: ShardPolicy,
        precision: PrecisionPolicy,
        comm: CommPolicy,
        offload: OffloadPolicy,
    ) -> None:
        self._policies = (shard, precision, comm, offload)
        self._rule = RULES[rule]
        # A policy of another type is refused by `_check_arguments`, once this rank can tell the others.
        shard = shard if isinstance(shard, ShardPolicy) else ShardPolicy()
        comm = comm if isinstance(comm, CommPolicy) else CommPolicy()
        groups = Groups.resolve(shard, comm.timeout_s, self)
        self._collectives = Collectives(groups, Streams(), comm.timeout_s, comm.reduce, shard.share_parameters)
        self._layout: Layout | None = None
        self._collectively("building the optimizer", lambda: self._check_arguments(params, make_defaults))
        Joinable.__init__(self)
        register_foreach()
        self._ledger = Ledger(self._collectives)
        self._flats: list[FlatBucket] = []
        self._guard = ParameterGuard()
        self._gatherer = Gatherer(self._collectives, overlap=comm.overlap_gather)
        self._stepper = Stepper(self._rule, self.param_groups, self._ledger, self._collectives.streams)
        self._norm = StepNorm(self._ledger, self._collectives)
        self._observers = Observers()
        self._order = GatherOrder()
        self._reducer = Reducer(
            self._collectives,
            self._ledger,
            Chain(self.param_groups, tuple(self.defaults), self._order),
            shard=shard,
            precision=precision,
            comm=comm,
            on_backward=_weak_method(self, "_refuse_ddp"),
            on_iteration=_weak_method(self, "_begin_iteration"),
            on_unfrozen=_weak_method(self, "_place_unfrozen"),
        )
        self._operations = GradientOperations(self._reducer, self._collectives, _weak_method(self, "_joining"))
        self._reducer.operations = self._operations
        self._reducer.arriving = self._gatherer.arriving
        self._ledger.watch("scratch", self._operations.tensors)
        self._ledger.watch("scratch", self._collectives.scratch)
        weakref.finalize(self, _remove_all, self._reducer.hooks, self._reducer.frozen_hooks).atexit = False
        weakref.finalize(self, self._norm.settle)
        self._collectives.on_failure = _weak_method(self, "_dump")
        dumps.watch(self)
        self._prefetched: set[int] = set()
        self._ddp_checked = False
        self._iterating = False
        self._divide_by_initial_world_size = True
        self._step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()
        self._place(*places.by_trainable(self.param_groups))

    # The step --------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Finish the reductions, update this rank's shard, gather the parameters.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            UsageError: a parameter was written outside `step`.
            RankMismatchError: ranks called different things, or another rank failed.
            CommError: a collective failed or timed out.

        Collective: every rank of shard x replicate. Syncs: hosts agree; a CUDA device is not waited for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            found_inf, loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
            self._reducer.finish(
                Purpose.STEP,
                self._step_detail(found_inf, loss_scale),
                by_hand=True,
                error=self._guard.check(),
                proposal=NO_PROPOSAL if self._collectives.streams.capturing else self._order.propose(),
            )
            self._update(found_inf, loss_scale)
        return loss

    def _update(self, found_inf: Tensor | None, loss_scale: Tensor | None) -> None:
        """Update and gather bucket by bucket, each as its reduction lands; then forget the gradients."""
        updated: list[Tensor] = []
        self._order.settle(self._reducer.agreed_proposal)
        if self._observers:
            self._observers.begin_step()  # before the last step's norm is forgotten
        self._norm.begin(self._reducer.reduced)
        for index in self._order.buckets:
            gradient, has = self._reducer.gradients[index], self._reducer.bucket_has(index)
            if 1 not in has:
                continue  # no rank has a gradient here: bits, moments and steps stay
            self._gatherer.wait(index)  # the last step's gather may still read the shard
            with self._norm.of_bucket(gradient, loss_scale) as squares:
                if self._observers:
                    squares = self._observers.begin_bucket(gradient, has, found_inf, loss_scale, squares)
                self._stepper.update(gradient, has, found_inf, loss_scale, squares)
            if self._observers:
                self._observers.end_bucket()
            self._gatherer.launch(gradient.flat)
            params = gradient.flat.params
            updated += params if 0 not in has else [param for param, flag in zip(params, has, strict=True) if flag]
        self._norm.finish()
        self._guard.written(updated)
        self._reducer.reset()
        self._iterating = False
        self.wait_buckets([index for index in self._order.buckets if index not in self._prefetched])
        if self._observers:
            self._observers.end_step()

    # Gradients -------------------------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward accumulates on this rank and communicates nothing.

        Local accumulation is fp32 for 16-bit parameters. The next backward outside, or `step`, reduces the sum.
        """
        return self._reducer.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard what was collected, reductions in flight included; communicates nothing.

        Args:
            set_to_none: False makes gradients zero instead of absent, as in torch.
        """
        if set_to_none:
            self._reducer.discard_all()
        super().zero_grad(set_to_none)

    def clip_grad_norm_(
        self,
        max_norm: float | Tensor,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """Scale the averaged gradient so that its norm is at most ``max_norm``; the coming `step` carries it out.

        Args:
            max_norm: the largest norm that stays.
            norm_type: order of the norm, ``inf`` included.
            error_if_nonfinite: raise if the norm is NaN or Inf (costs a host sync).
            foreach: a hint that is not needed.

        Returns:
            The global norm before clipping: 0-D, on the parameters' device.

        Raises:
            NonFiniteError: with ``error_if_nonfinite``.

        Collective: every rank, with the same arguments. Syncs: hosts agree; no device, unless ``error_if_nonfinite``.
        """
        order = float(norm_type)
        limit = float(max_norm) if not isinstance(max_norm, Tensor) or max_norm.device.type == "cpu" else None
        if limit is None and self._joining():
            limit = float(max_norm)
        with torch.no_grad():
            self._reducer.finish(
                Purpose.CLIP,
                pack_floats(limit or 0.0, order),
                by_hand=True,
                error=self._guard.check(),
            )
            self._operations.mark_finished()
            return self._clip(max_norm if limit is None else limit, order, error_if_nonfinite)

    def _clip(self, max_norm: float | Tensor, order: float, error_if_nonfinite: bool = False) -> Tensor:
        if not self._flats:
            return torch.zeros(())
        norm = self._operations.total_norm(order, self._norm)
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise NonFiniteError(
                f"The total norm of order {order} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set"
                " `error_if_nonfinite=False`. distadam: the norm is over all ranks; see grad_norm of earlier steps."
            )
        if isinstance(max_norm, Tensor):
            max_norm = max_norm.to(norm.device)
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in self._reducer.gradients:
            gradient.multiply(coefficient)
        self._norm.give(norm, self._reducer.reduced)
        return norm

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the last step's averaged gradient, 0-D; clipping's value where it clipped; None before a step.

        Local: every rank has it without asking. Syncs: waits for an all-reduce that `step` launched.
        """
        return self._norm.value

    def full_grad(self, param: Tensor | str) -> Tensor:
        """Return the averaged gradient of the coming step as an ordinary tensor; zeros if no rank has one.

        Args:
            param: the parameter or its name.

        Collective: every rank, with the same parameter. Syncs: hosts agree; on CPU until the gather is done.
        """
        with torch.no_grad():
            number, error = -1, self._guard.check()
            for position, (known, name) in enumerate(places.param_names(self.param_groups).items()):
                if (known is param or name == param) and (known.requires_grad or known in self._reducer.indices):
                    number = position
                    break
            else:
                given = repr(param) if isinstance(param, str) else f"a tensor of shape {tuple(param.shape)}"
                error = UsageError(
                    f"full_grad expected a trainable parameter of this optimizer or its name but got {given}."
                )
            self._reducer.finish(Purpose.FULL_GRAD, pack_floats(float(number)), by_hand=True, error=error)
            self._operations.mark_finished()
            return self._full_grad(number)

    def _full_grad(self, number: int) -> Tensor:
        param = list(places.param_names(self.param_groups))[number]
        if param not in self._reducer.indices:  # no rank has had a gradient for it yet
            return torch.zeros_like(param, requires_grad=False)
        return self._operations.full(self._reducer.indices[param])

    # Parameters ------------------------------------------------------------------------------------------------------

    def prefetch(self, model: nn.Module) -> None:
        """Let gathers overlap the next forward: each module of ``model`` waits for the parameters it owns.

        The end of the root's forward, its ``state_dict()``, ``load_state_dict()`` and ``eval()``, and
        `full_state_dict` flush. Read a parameter elsewhere only after `flush`. ``model.load_state_dict`` also reloads
        master weights. Buckets are gathered in the order in which the forward waits for them, learned in the first
        step and anew when it changes on all ranks alike; `kernel_report` shows it.

        Args:
            model: the root module; call once, on every rank.
        """
        bucket_of = {param: flat.bucket.index for flat in self._flats for param in flat.params}
        self._prefetched |= prefetch.install(model, self, bucket_of, self._order)
        if self._prefetched:
            self._order.learn()

    def wait_buckets(self, buckets: Sequence[int]) -> None:
        """Make what follows see the parameters of these buckets. Syncs: on CPU until they have arrived."""
        for bucket in buckets:
            self._gatherer.wait(bucket)

    def flush(self) -> None:
        """Make every parameter safe to read: the current stream waits (CUDA), or the host (CPU)."""
        self._gatherer.wait_all()

    def reload_parameters(self) -> None:
        """Take over parameters that somebody else wrote: masters and shards follow, ranks take the first rank's.

        A master weight that still rounds to its parameter keeps its low bits. With ``master="split"`` every parameter
        that was written on some rank loses them: which of its elements changed, nobody can tell any more.

        Raises:
            ConfigError: a parameter's shape, dtype or device is no longer the layout's.

        Collective: every rank of shard x replicate. Syncs: until the broadcast is done on CPU.
        """
        self.flush()
        self._collectively("reload_parameters()", self._check_moved, Purpose.RELOAD)
        self._reducer.finish(Purpose.PARAMETERS)  # what backward has launched differs between ranks until now
        with torch.no_grad():
            moved = set(self._guard.moved())
            written = set().union(*self._collectives.exchange(self._guard.changed(), "reload_parameters()"))
            for flat, base in zip(self._flats, self._reducer.bases, strict=True):
                slots = range(len(flat.params))
                flat.adopt([slot for slot in slots if base + slot in moved])
                self._collectives.broadcast(flat.param_flat, f"parameters of bucket {flat.bucket.index}")
                flat.reload([slot for slot in slots if base + slot in written])
        self._guard.accept()

    def _check_moved(self) -> list[tuple[str, object]]:
        for index in self._guard.moved():
            param, name = self._reducer.params[index], self._reducer.names[index]
            gradient, slot = self._reducer.place(index)
            flat = gradient.flat
            expected = (flat.views[slot][0], flat.dtype, flat.device)
            if (tuple(param.shape), param.dtype, param.device) != expected:
                raise ConfigError(
                    f"parameter {name!r}: expected shape, dtype, device {expected} but got "
                    f"{(tuple(param.shape), param.dtype, param.device)}; build a new optimizer after model.to(...)."
                )
        return []

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: torch's keys as 1-D shards, plus rank, layout, masters and step counts.

        Fits the same rank of the same layout only; `full_state_dict` fits everything. Communicates nothing.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._publish()
        result = state.pack(self.state, self.param_groups)
        result[state.KEY] = state.local_extra(self._flats, self.layout.to_json(), self._collectives.groups.rank)
        return self._after_state_dict(result)

    def _after_state_dict(self, result: dict[str, Any]) -> dict[str, Any]:
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, result)
            result = result if replaced is None else replaced
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a local `state_dict` of this rank and layout, or a full torch.optim state_dict of the same parameters.

        Raises:
            LayoutMismatch: local state of another rank or layout.
            ValueError: other parameter groups, as torch.
            CheckpointError: state of another kind of optimizer, or of other shapes.
            RankMismatchError: another rank failed, or ranks load different things.

        Collective: every rank of shard x replicate.
        """
        saved: dict[str, Any] = {}

        def prepare() -> list[tuple[str, object]]:
            nonlocal saved
            saved = dict(state_dict)
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                replaced = hook(self, saved)
                saved = saved if replaced is None else replaced
            return self._check_state(saved)

        self._collectively("load_state_dict()", prepare, Purpose.LOAD)
        self.flush()
        with torch.no_grad():
            state.load_groups(saved, self.param_groups, self.defaults, self._stepper.rule)
            load = state.load_local if state.KEY in saved else state.load_full
            load(saved, self._stepper.rule, self._flats, self.param_groups)
            state.load_unplaced(saved, self._flats, self.param_groups, self.state)
            state.renew_history(self._flats)
        self._stepper.invalidate()
        self._publish()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_state(self, saved: Mapping[str, Any]) -> list[tuple[str, object]]:
        state.check_groups(saved, self.param_groups, self.defaults)
        groups = self._collectives.groups
        if state.KEY in saved:
            state.check_local(saved[state.KEY], self.layout.to_json(), groups.rank, groups.num_ranks)
        names = places.param_names(self.param_groups)
        state.check_entries(saved, self._stepper.rule, self._flats, self.param_groups, names)
        without = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
        return [("kind of state", "local" if state.KEY in saved else "full"), ("param_groups", repr(without))]

    def full_state_dict(self, to: int | None = 0) -> dict[str, Any]:
        """Return torch.optim's exact format with whole CPU tensors on rank ``to``, ``{}`` elsewhere.

        Bucket by bucket: no rank holds more than the result and one state of one bucket. Master weights of 16-bit
        parameters have no place in torch's format and are left out.

        Args:
            to: rank of shard x replicate (replicas major); None is every rank.

        Raises:
            ConfigError: there is no rank ``to``.
            RankMismatchError: ranks call different things.

        Collective: every rank of shard x replicate. Syncs: yes.
        """
        groups = self._collectives.groups
        error: Exception | None = None
        try:
            if to is not None and to not in range(groups.num_ranks):
                raise ConfigError(
                    f"full_state_dict(to=...) expected a rank below {groups.num_ranks} or None but got {to!r}."
                )
            for pre_hook in self._optimizer_state_dict_pre_hooks.values():
                pre_hook(self)
        except Exception as caught:
            error = caught
        # Between two iterations this counts as one for joined ranks, which do nothing else in it.
        alone = self._joining() and not self._iterating
        detail = pack_floats(-1.0 if to is None or error else float(to), float(alone))
        try:
            # What backward has launched differs between ranks until it is agreed on.
            self._reducer.finish(Purpose.FULL_STATE, detail, error=error)
        finally:
            self._iterating = self._iterating and not alone
        self.flush()
        full = self._full_state(to is None or to == groups.rank)
        return {} if full is None else self._after_state_dict(full)

    def _full_state(self, keep: bool) -> dict[str, Any] | None:
        with torch.no_grad():
            full = state.full_state(
                self._stepper.rule, self._flats, self.param_groups, self.state, self._collectives, keep
            )
        return state.pack(full, self.param_groups) if keep else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, in buckets of its own.

        Collective: every rank of shard x replicate, once the optimizer is built.
        """
        if self._layout is None:  # torch's constructor adds the first groups
            super().add_param_group(param_group)
            return

        def add() -> list[tuple[str, object]]:
            super(ShardedOptimizer, self).add_param_group(param_group)
            return self._fingerprint()

        known = len(self.param_groups)
        try:
            self._collectively("add_param_group()", add, Purpose.ADD_GROUP)
        except Exception:
            del self.param_groups[known:]
            raise
        self._reducer.finish(Purpose.PARAMETERS)  # what backward has launched differs between ranks until now
        self._place(*places.by_trainable(self.param_groups[-1:]))

    def checkpoint_access(self) -> Access:
        """Return what `distadam.checkpoint` reads and writes. Communicates nothing."""
        return Access(
            rule=self._stepper.rule,
            flats=self._flats,
            param_groups=self.param_groups,
            defaults=self.defaults,
            names=places.param_names(self.param_groups),
            state=self.state,
            collectives=self._collectives,
            announce=self._reducer.announce,
            loaded=self._take_loaded,
        )

    def _take_loaded(self) -> None:
        state.renew_history(self._flats)
        self._stepper.invalidate()
        self._guard.accept()
        self._publish()

    # Reports ---------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Which parameter lies in which bucket; printable, hashable, the same on every rank."""
        if self._layout is None:
            raise UsageError("the optimizer was not built")
        return self._layout

    def memory_report(self) -> MemoryReport:
        """Return the bytes that live in the optimizer on this rank, by kind."""
        return self._ledger.report()

    def kernel_report(self) -> KernelReport:
        """Return which kernel serves which bucket and group, how its bytes travel, in which order, and why."""
        return self._stepper.report(self._flats, self._collectives.transport, self._order)

    def wait_report(self) -> WaitReport:
        """Return where this rank stands: buckets that are reduced or wait, parameters whose gradient has not come.

        Local; may be called from another thread while this rank hangs. When a collective fails it is logged, and
        `distadam launch` shows those of all ranks on one page.
        """
        groups = self._collectives.groups
        return wait_report(self._reducer, self._gatherer.arriving, groups.rank, groups.num_ranks)

    def _dump(self, error: Exception) -> None:
        dumps.failed(error, self.wait_report())

    def observe(self, observer: StepObserver) -> Callable[[], None]:
        """Show `observer` every step from now on: `distadam.diagnostics` does. Communicates nothing.

        Args:
            observer: reads what it is shown and changes nothing; on every rank, since it may communicate.

        Returns:
            What takes it away again.
        """
        remove = self._observers.add(observer)
        self._reducer.inspect = self._observers.reducing

        def stop() -> None:
            remove()
            if not self._observers:
                self._reducer.inspect = None

        return stop

    def compare_before_steps(self, witness: Witness) -> Callable[[], None]:
        """Let `witness` say before each step what must be the same on every rank: `diagnostics.check_ranks` does.

        Returns:
            What takes it away again; on every rank, between the same steps.

        Raises:
            UsageError: there is one already.
        """
        return self._reducer.chain.attend(witness)

    @property
    def comm_stats(self) -> CollectiveStats:
        """Calls and payload bytes of this rank's collectives since construction or ``clear()``."""
        return self._collectives.stats

    def observe_times(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` what backward and `step` do, and when (`distadam.diagnostics.timeline` is one).

        Returns:
            What ends it and leaves nothing behind.

        Raises:
            UsageError: somebody observes this optimizer already.
        """
        return observe(observer, self._reducer, self._stepper, self._collectives)

    # Building --------------------------------------------------------------------------------------------------------

    def _check_arguments(
        self, params: Iterable[Any], make_defaults: Callable[[], dict[str, Any]]
    ) -> list[tuple[str, object]]:
        for policy, expected in zip(
            self._policies, (ShardPolicy, PrecisionPolicy, CommPolicy, OffloadPolicy), strict=True
        ):
            if not isinstance(policy, expected):
                raise ConfigError(f"expected a {expected.__name__} but got {policy!r}.")
        torch.optim.Optimizer.__init__(self, params, make_defaults())
        return self._fingerprint()

    def _fingerprint(self) -> list[tuple[str, object]]:
        names = places.param_names(self.param_groups)
        places.check_groups(self.param_groups, names)
        places.check_params(names)
        shard, precision, comm, offload = self._policies
        groups = self._collectives.groups
        one_host = self._collectives.on_one_host or groups.num_shards == 1
        places.storage_choices(self.param_groups, names, precision, self._rule.name)
        places.check_reduce(names, comm.reduce, self._collectives.unshared)
        places.check_sharing(names, shard.share_parameters, one_host)
        return [
            ("optimizer", type(self).__name__),
            ("ranks (shards x replicas)", (groups.num_shards, groups.num_replicas)),
            ("ShardPolicy.stage", shard.stage),
            ("PrecisionPolicy", repr(precision)),
            ("CommPolicy", repr(comm)),
            ("OffloadPolicy", repr(offload)),
            *places.fingerprint_lines(self.param_groups, names),
        ]

    def _collectively(
        self, what: str, check: Callable[[], list[tuple[str, object]]], purpose: Purpose | None = None
    ) -> None:
        """Run a local check on every rank and compare what it returns: an error anywhere is an error everywhere."""
        if purpose is not None:  # once built, other ranks may be in another call
            self._reducer.announce(purpose)
        error: Exception | None = None
        fingerprint = Fingerprint(())
        try:
            fingerprint = Fingerprint.of(check())
        except Exception as caught:
            error = caught
        mine = (fingerprint.digest, None if error is None else f"{type(error).__name__}: {error}")
        answers = self._collectives.exchange(mine, what)
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(answers):
            if message is not None:
                raise RankMismatchError(f"rank {rank} failed in {what}: {message}")
        if len({digest for digest, _ in answers}) > 1:
            first = self._collectives.exchange(fingerprint if self._collectives.groups.rank == 0 else None, what)[0]
            differences = self._collectives.exchange(first_difference(fingerprint, first), what)
            rank, difference = next((rank, text) for rank, text in enumerate(differences) if text is not None)
            raise RankMismatchError(
                f"{what}: rank {rank} differs from rank 0: {difference} (here rank {rank}, there rank 0)"
            )

    def _place(self, trainable: Sequence[Tensor], frozen: Sequence[Tensor]) -> None:
        """Give trainable parameters their places, take the first rank's values, remember the frozen ones."""
        names = places.param_names(self.param_groups)
        precision = self._policies[1]
        choices = places.storage_choices(self.param_groups, names, precision, self._rule.name)
        specs = places.param_specs(trainable, self.param_groups, names, choices)
        self._collectives.map_devices(param.device for param in trainable)
        groups = self._collectives.groups
        if self._layout is None:
            nbytes = self._policies[2].bucket_nbytes(groups.num_shards)
            self._layout = Layout((), (), groups.num_shards, nbytes)
        base = len(self._layout.params)
        self._layout = self._layout.extend(specs)
        with torch.no_grad():
            for bucket in self._layout.buckets[len(self._flats) :]:
                members = [trainable[slot.param - base] for slot in bucket.slots]
                flat = FlatBucket(
                    bucket,
                    members,
                    [names[param] for param in members],
                    groups.shard_rank,
                    self._ledger,
                    self._collectives.owns,
                    choices[members[0]],
                    precision.seed,
                )
                self._collectives.broadcast(flat.param_flat, f"parameters of bucket {bucket.index}")
                flat.reload(range(len(members)))
                state.load_slots(self.state, self._stepper.rule, flat, self.param_groups)
                self._flats.append(flat)
                self._reducer.add_bucket(flat)
            for param in frozen:
                value = param.detach().contiguous()
                self._collectives.broadcast(value.view(-1).view(torch.uint8), f"parameter {names[param]!r}")
                if value.data_ptr() != param.data_ptr():
                    param.data.copy_(value)
        self._order.extend(len(self._flats))
        placed = set(self._reducer.params)
        waiting = [param for group in self.param_groups for param in group["params"] if param not in placed]
        self._reducer.set_frozen(waiting, [names[param] for param in waiting])
        self._guard.watch(self._reducer.params, self._reducer.names)
        self._publish()

    def _place_unfrozen(self, flags: bytes) -> None:
        """Give parameters that have become trainable on some rank a place; called on every rank in one order."""
        unfrozen = [param for param, flag in zip(self._reducer.frozen, flags, strict=True) if flag]
        base = len(self._reducer.params)
        self._place(unfrozen, frozen=[])
        for param, stand_in in zip(self._reducer.params[base:], self._reducer.stand_ins[base:], strict=True):
            grad = param.grad
            if isinstance(grad, ShardedGradient):
                grad, stand_in.waiting = stand_in.waiting, None
            param.grad = stand_in
            if grad is not None:
                self._operations.collect(stand_in, grad)

    def _publish(self) -> None:
        state.publish(self._stepper.rule, self._flats, self.param_groups, self.state)

    def _refuse_ddp(self) -> None:
        if not self._ddp_checked:
            self._ddp_checked = True
            places.refuse_ddp(places.param_names(self.param_groups))

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            "a sharded optimizer cannot be copied or pickled: it holds process groups and views. Use state_dict()."
        )

    # Uneven inputs ---------------------------------------------------------------------------------------------------

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the hook that stands in for this rank once it has run out of data.

        Args:
            kwargs: ``divide_by_initial_world_size`` (True): as DDP, average over all ranks, else over active ones.
        """
        self._divide_by_initial_world_size = kwargs.get("divide_by_initial_world_size", True)
        return ShadowHook(self)

    @property
    def join_device(self) -> torch.device:
        """The device of the first parameter."""
        return self.param_groups[0]["params"][0].device  # type: ignore[no-any-return]

    @property
    def join_process_group(self) -> Any:
        """The group that the caller named, or the default one."""
        return self._collectives.groups.parent

    def _joining(self) -> bool:
        return bool(self._join_config.enable)

    def _begin_iteration(self) -> None:
        """Tell joined ranks, once an iteration and before its first collective, that this rank goes on."""
        if self._iterating:
            return
        self._iterating = True
        work = Join.notify_join_context(self)
        if work is not None:
            work.wait()
            if not self._divide_by_initial_world_size:
                self._reducer.num_active = int(work.get_future().value()[0])
                self._reducer.divide_by(self._reducer.num_active)

    def _step_detail(self, found_inf: Tensor | None, loss_scale: Tensor | None) -> bytes:
        """Return what a joined rank must know of this step; ranks that differ in it would do different things."""
        joining = self._joining()
        return pack_floats(
            float(len(self._observers)),  # they may communicate
            float(found_inf) if joining and found_inf is not None else 0.0,
            float(loss_scale) if joining and loss_scale is not None else 0.0,
        )

    def leave_join(self) -> None:
        """Average over all ranks again (called by `Join` when every rank has run out of data)."""
        Joinable.__init__(self)  # Join leaves its configuration behind, as if it went on
        self._reducer.num_active = 0
        self._reducer.divide_by(self._collectives.groups.num_ranks)

    def shadow_iteration(self) -> None:
        """Replay one iteration of the other ranks with zeros, as they go through it (called by `Join`)."""
        self._reducer.reset()  # what this rank's last batches left under no_sync is nobody's
        with torch.no_grad():
            while True:
                purpose, detail = self._reducer.finish(Purpose.JOINED)
                first, second, third = unpack_floats(detail)
                if purpose is Purpose.STEP:
                    device = self.join_device
                    found_inf = torch.tensor(second, device=device) if second else None
                    self._update(found_inf, torch.tensor(third, device=device) if third else None)
                    return
                if purpose is Purpose.CLIP:
                    self._clip(first, second)
                elif purpose is Purpose.NORM:
                    self._operations.compute_norms(first)
                elif purpose is Purpose.CHECK:
                    self._operations.compute_found()
                elif purpose is Purpose.SCALE:
                    self._operations.replay_scale(int(first), second, bool(third))
                elif purpose is Purpose.FULL_GRAD:
                    self._full_grad(int(first))
                elif purpose is Purpose.FULL_STATE:
                    self._full_state(keep=False)
                    if second:
                        return
                else:
                    raise joined_error(purpose)


def _weak_method(owner: object, name: str) -> Callable[..., Any]:
    """Return a callable that calls a method of ``owner`` without keeping it alive: hooks outlive optimizers."""
    reference = weakref.ref(owner)

    def call(*args: Any) -> Any:
        living = reference()
        return None if living is None else getattr(living, name)(*args)

    return call


def _remove_all(*lists: list[RemovableHandle]) -> None:
    for handles in lists:
        for handle in handles:
            handle.remove()
