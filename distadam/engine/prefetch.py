"""Move the wait for a parameter from `step` to the module that reads it.

Note [Read elsewhere]: a module may read another's parameter without calling it (nn.MultiheadAttention does so with its
out_proj), and compiled code may have been traced before the hooks were there. So what belongs to a module that did not
run in the root's last forward is waited for at the start of the next one; in the first forward, that is everything.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distadam.engine.order import GatherOrder


class Waits(Protocol):
    """What the hooks call; the optimizer."""

    def wait_buckets(self, buckets: Sequence[int]) -> None:
        """Make what follows see these buckets' parameters."""

    def flush(self) -> None:
        """Make every parameter safe to read."""

    def reload_parameters(self) -> None:
        """Take over parameters that somebody else wrote."""


class _Hook:
    """A module hook that calls the optimizer while it lives; copies and pickles of it do nothing."""

    def __init__(self, optimizer: Waits | None, method: str, *arguments: Any) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._method = method
        self._arguments = arguments

    @torch._disable_dynamo  # type: ignore[attr-defined]  # a compiler would trace the wait once, with nothing pending
    def __call__(self, *_: Any, **__: Any) -> None:
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is not None:
            getattr(optimizer, self._method)(*self._arguments)

    def __reduce__(self) -> tuple[Callable[..., _Hook], tuple[None, str]]:
        return (_Hook, (None, self._method))


class _Forward:
    """The root's last forward, or the one under way: which modules have run.

    Attributes:
        buckets_of: of each module that owns parameters.
        ran: their numbers, in the order in which they first ran.
        prefetched: buckets that nothing waits for but these modules.
    """

    def __init__(self) -> None:
        self.buckets_of: list[tuple[int, ...]] = []
        self.ran: dict[int, None] = {}
        self.prefetched: set[int] = set()

    def silent(self) -> list[int]:
        """Return the buckets of modules that did not run, first layers first: see Note [Read elsewhere]."""
        silent = [buckets for number, buckets in enumerate(self.buckets_of) if number not in self.ran]
        return sorted({bucket for buckets in silent for bucket in buckets}, reverse=True)

    def waits(self) -> list[int]:
        """Return the buckets in the order in which the next forward waits for them if it is like this one."""
        owned = [bucket for number in self.ran for bucket in self.buckets_of[number]]
        return [bucket for bucket in dict.fromkeys([*self.silent(), *owned]) if bucket in self.prefetched]


class _OwnerHook(_Hook):
    """Waits for the buckets of one module, and notes that it runs."""

    def __init__(self, optimizer: Waits, buckets: Sequence[int], number: int, forward: _Forward) -> None:
        super().__init__(optimizer, "wait_buckets", buckets)
        self._number = number
        self._forward = forward

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, *_: Any, **__: Any) -> None:
        self._forward.ran.setdefault(self._number)
        super().__call__()


class _RootHook(_Hook):
    """Waits for what no module's own hook waited for in the last forward; see Note [Read elsewhere]."""

    def __init__(self, optimizer: Waits, forward: _Forward) -> None:
        super().__init__(optimizer, "wait_buckets")
        self._forward = forward

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, *_: Any, **__: Any) -> None:
        self._arguments = (self._forward.silent(),)
        self._forward.ran.clear()
        super().__call__()


class _EndHook(_Hook):
    """Tells in which order a forward like the one that ends waits for buckets, then flushes."""

    def __init__(self, optimizer: Waits, forward: _Forward, order: GatherOrder) -> None:
        super().__init__(optimizer, "flush")
        self._forward = forward
        self._order = order

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, *_: Any, **__: Any) -> None:
        if torch.is_grad_enabled():
            self._order.record(self._forward.waits())
        super().__call__()


class _EvalThenFlush:
    """Stands for ``model.eval``: flushes first. A copy of the model has one of its own that has nothing to flush."""

    def __init__(self, model: nn.Module, hook: _Hook) -> None:
        self._model = weakref.ref(model)
        self._hook = hook

    def __call__(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the module that this eval() belonged to is gone; call type(module).eval(module)")
        self._hook()
        return type(model).eval(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_EvalThenFlush, (self._model(), self._hook))


def _forget_traces() -> None:
    """Have compiled code traced anew, with guards on hooks: by default Dynamo takes it that none comes later."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()


def install(model: nn.Module, optimizer: Waits, bucket_of: dict[Tensor, int], order: GatherOrder) -> set[int]:
    """Hook ``model`` so that each module waits for the buckets it reads; return the buckets that are covered.

    Args:
        model: the root; every owner of a tied parameter is among its modules.
        optimizer: is held weakly.
        bucket_of: bucket index of each parameter.
        order: learns from the forwards.
    """
    _forget_traces()
    covered: dict[nn.Parameter, int] = {}
    forward = _Forward()
    for module in model.modules():
        owned = {param: bucket_of[param] for param in module.parameters(recurse=False) if param in bucket_of}
        if owned:
            covered |= owned
            buckets = tuple(sorted(set(owned.values())))
            hook = _OwnerHook(optimizer, buckets, len(forward.buckets_of), forward)
            module.register_forward_pre_hook(hook, prepend=True)  # before hooks that read, weight_norm's for one
            forward.buckets_of.append(buckets)
    model.register_forward_pre_hook(_RootHook(optimizer, forward), prepend=True)
    model.register_forward_hook(_EndHook(optimizer, forward, order))
    flush = _Hook(optimizer, "flush")
    model.register_state_dict_pre_hook(flush)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(flush)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_Hook(optimizer, "reload_parameters"))  # type: ignore[no-untyped-call]
    model.__dict__["eval"] = _EvalThenFlush(model, flush)
    outside = {bucket for param, bucket in bucket_of.items() if param not in covered}
    forward.prefetched = set(covered.values()) - outside
    return forward.prefetched
