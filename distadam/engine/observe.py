"""Let somebody see what the engine does, and when.

Note [Observing]: nothing in the engine asks whether somebody looks. To observe is to shadow a few methods of one
optimizer's parts by attributes of the same names on these instances; to stop is to delete those. An optimizer that
nobody observes runs the very same code as if this file were not there.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from distadam.comm import DONE, Collectives, Pending
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.reducer import Reducer
from distadam.engine.rounds import BucketGradient
from distadam.engine.stepper import Stepper
from distadam.errors import UsageError


class Observer(Protocol):
    """Who is told. Calls come from the thread that does the work; ``flat`` names bucket, parameters and device."""

    def gradient(self, flat: FlatBucket, slot: int) -> AbstractContextManager[object]:
        """A gradient has come; inside it is collected, and whatever reductions can be are launched."""

    def end_backward(self) -> None:
        """A backward is over."""

    def update(self, flat: FlatBucket) -> AbstractContextManager[object]:
        """Inside, a shard is updated."""

    def launch(self, kind: str, flat: FlatBucket) -> AbstractContextManager[object]:
        """Inside, a "reduce" or "gather" is launched."""

    def launched(self, kind: str, flat: FlatBucket, pending: Pending) -> Any:
        """A "reduce" or "gather" is under way; return what stands for it in `block` and `enqueue`."""

    def block(self, kind: str, collective: Any, began_s: float, ended_s: float, busy_s: float, *, done: bool) -> None:
        """The host waited for a collective (from `launched`; None: for other ranks' agreement); ``done``: it is over.

        ``busy_s`` is less than the whole where the result is taken piece by piece between other work.
        """

    def enqueue(self, kind: str, collective: Any, device: torch.device) -> Callable[[], object]:
        """A device's stream is about to wait for a collective; call the result behind the wait."""


class _Watched(Pending):
    """A collective in flight whose waits are observed."""

    __slots__ = ("_collective", "_device", "_inner", "_kind", "_observer", "_part")

    def __init__(self, inner: Pending, observer: Observer, kind: str, collective: Any, device: torch.device) -> None:
        self._inner = inner
        self._observer = observer
        self._kind = kind
        self._collective = collective
        self._device = device
        self.what = inner.what
        part = inner.reading
        self._part = None if part is inner else _Watched(part, observer, kind, collective, device)

    @property
    def reading(self) -> Pending:
        return self if self._part is None else self._part

    def wait(self) -> None:
        if self._device.type == "cuda":
            done = self._observer.enqueue(self._kind, self._collective, self._device)
            self._inner.wait()
            done()
            return
        began = time.monotonic()
        self._inner.wait()
        self._tell(began, True)

    def ready(self, within_s: float) -> bool:
        began = time.monotonic()
        answer = self._inner.ready(within_s)
        self._tell(began, answer)
        return answer

    def pieces(self) -> Iterator[Tensor] | None:
        taken = self._inner.pieces()
        return None if taken is None else self._timed(taken)

    def leaves(self) -> Iterator[list[Tensor]] | None:
        taken = self._inner.leaves()
        return None if taken is None else self._timed(taken)

    def _timed(self, taken: Iterator[Any]) -> Iterator[Any]:
        first = began = time.monotonic()
        busy = 0.0
        for piece in taken:
            busy += time.monotonic() - began
            yield piece
            began = time.monotonic()
        ended = time.monotonic()
        self._observer.block(self._kind, self._collective, first, ended, busy + ended - began, done=True)

    def _tell(self, began: float, done: bool) -> None:
        ended = time.monotonic()
        self._observer.block(self._kind, self._collective, began, ended, ended - began, done=done)


class _Parts:
    """Wrappers of the engine's methods, each given the method that it stands in for."""

    def __init__(self, observer: Observer, reducer: Reducer) -> None:
        self._observer = observer
        self._reducer = weakref.ref(reducer)

    def collect(
        self, original: Callable[..., None], gradient: BucketGradient, slot: int, *args: Any, **options: Any
    ) -> None:
        with self._observer.gradient(gradient.flat, slot):
            original(gradient, slot, *args, **options)

    def end_backward(self, original: Callable[[], None]) -> None:
        original()
        self._observer.end_backward()

    def update(self, original: Callable[..., None], gradient: BucketGradient, *args: Any) -> None:
        with self._observer.update(gradient.flat):
            original(gradient, *args)

    def reduce_scatter(self, original: Callable[..., Pending], shard: Tensor, full: Tensor, what: str) -> Pending:
        return self._launch("reduce", what, lambda: original(shard, full, what))

    def all_gather(self, original: Callable[..., Pending], full: Tensor, shard: Tensor, what: str) -> Pending:
        return self._launch("gather", what, lambda: original(full, shard, what))

    def agree(self, original: Callable[..., None], votes: Tensor, what: str) -> None:
        began = time.monotonic()
        original(votes, what)
        ended = time.monotonic()
        self._observer.block("agree", None, began, ended, ended - began, done=True)

    def _launch(self, kind: str, what: str, start: Callable[[], Pending]) -> Pending:
        reducer, number = self._reducer(), what.removeprefix("bucket ")
        if reducer is None or not number.isdigit():  # a gather for somebody else than `step`
            return start()
        flat = reducer.gradients[int(number)].flat
        with self._observer.launch(kind, flat):
            pending = start()
        if pending is DONE:  # one rank
            return pending
        return _Watched(pending, self._observer, kind, self._observer.launched(kind, flat, pending), flat.device)


def observe(observer: Observer, reducer: Reducer, stepper: Stepper, collectives: Collectives) -> Callable[[], None]:
    """Have ``observer`` told of what these parts do from now on; see Note [Observing].

    Returns:
        What ends it and leaves nothing behind; the second call does nothing.

    Raises:
        UsageError: somebody observes them already.
    """
    parts = _Parts(observer, reducer)
    shadows: list[tuple[Any, str, Callable[..., Any]]] = [
        (reducer, "collect", parts.collect),
        (reducer, "_install_stand_ins", parts.end_backward),
        (stepper, "update", parts.update),
        (collectives, "reduce_scatter", parts.reduce_scatter),
        (collectives, "all_gather", parts.all_gather),
        (collectives, "agree", parts.agree),
    ]
    if any(name in vars(owner) for owner, name, _ in shadows):
        raise UsageError("expected one timeline on an optimizer but got a second one; close the first.")
    for owner, name, wrapper in shadows:
        setattr(owner, name, _shadow(owner, name, wrapper))
    places = [(weakref.ref(owner), name) for owner, name, _ in shadows]

    def stop() -> None:
        for reference, name in places:
            owner = reference()
            if owner is not None:
                vars(owner).pop(name, None)

    return stop


def _shadow(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    original, reference = getattr(type(owner), name), weakref.ref(owner)

    def call(*args: Any, **options: Any) -> Any:
        return wrapper(original.__get__(reference()), *args, **options)

    return call
