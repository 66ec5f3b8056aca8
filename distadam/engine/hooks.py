"""Hooks on parameters. They hold nothing: a dropped optimizer leaves no buffers behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distadam.engine.gradients import Operations, ShardedGradient
from distadam.errors import UsageError


class Collects(Protocol):
    """What the hooks call; the reducer."""

    names: list[str]
    operations: Operations

    def collect(self, bucket: Any, slot: int, index: int, grad: Tensor, *, replaces: bool = False) -> None:
        """Take one contribution."""

    def hold(self, stand_in: ShardedGradient, grad: Tensor) -> None:
        """Take one contribution to a parameter that has no place yet."""


def hook_placed(
    reducer: Collects, bucket: object, slot: int, index: int, param: Tensor, stand_in: ShardedGradient
) -> RemovableHandle:
    """Have what backward leaves in ``param.grad`` collected, and a stand-in put there."""
    weak_reducer, weak_bucket, own = weakref.ref(reducer), weakref.ref(bucket), weakref.ref(stand_in)

    def collect_gradient(param: Tensor) -> None:
        grad, mine, living, bucket = param.grad, own(), weak_reducer(), weak_bucket()
        if grad is None or grad is mine or mine is None or living is None or bucket is None:
            return  # the stand-in's add_ has collected it, or the optimizer is gone
        if isinstance(grad, ShardedGradient):
            raise UsageError(
                f"parameter {living.names[index]!r} is in two live distadam optimizers; expected one. Drop the other."
            )
        param.grad = mine
        living.collect(bucket, slot, index, grad, replaces=True)

    return _hook(param, collect_gradient)


def hook_unplaced(reducer: Collects, name: str, param: Tensor) -> RemovableHandle:
    """Have what backward leaves in ``param.grad`` kept until the parameter has a place."""
    weak_reducer = weakref.ref(reducer)

    def hold_gradient(param: Tensor) -> None:
        grad, living = param.grad, weak_reducer()
        if grad is None or living is None or isinstance(grad, ShardedGradient):
            return
        param.grad = stand_in = ShardedGradient(param, living.operations, None, name)
        living.hold(stand_in, grad)

    return _hook(param, hold_gradient)


def _hook(param: Tensor, function: Callable[[Tensor], None]) -> RemovableHandle:
    with _trainable(param):
        return param.register_post_accumulate_grad_hook(function)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def _trainable(param: Tensor) -> Iterator[None]:
    """Let ``param`` require a gradient for as long as it takes to hook it."""
    before = param.requires_grad
    param.requires_grad_(True)
    try:
        yield
    finally:
        param.requires_grad_(before)
