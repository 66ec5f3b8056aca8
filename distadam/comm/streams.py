"""The order of asynchronous work.

Note [One handle, two meanings]: a collective is launched with the stream that wrote its input as the current one. On
CUDA the backend runs it on a stream of its own that waits for that one, and `Pending.wait()` makes the current stream
wait, never the host. On CPU the backend runs it on a thread and `wait()` blocks the host. The engine is written
against this handle only, so a test double can delay every collective as far as the recorded waits allow: a missing wait
shows as a wrong result (tests/adversarial.py).

Buffers that a collective reads or writes are kept by the engine until its handle was waited for; nothing relies on
``record_stream``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from distadam.errors import CommError


class Work(Protocol):
    """What torch.distributed returns for ``async_op=True``."""

    def is_completed(self) -> bool:
        """Say whether waiting would return at once."""
        ...

    def wait(self, timeout: timedelta = ...) -> bool:
        """Block (CPU) or make the current stream wait (CUDA)."""
        ...


class Pending:
    """A collective in flight.

    Args:
        work: torch.distributed's handle; None if it is already finished.
        what: operation and bucket, for errors.
        timeout_s: seconds to wait; None is the group's own timeout.
        after: called once, by the first `wait`.
        on_failure: called with what is about to be raised when the collective failed or timed out.
    """

    __slots__ = ("_after", "_on_failure", "_reading", "_timeout", "_work", "what")

    def __init__(
        self,
        work: Work | None,
        what: str = "",
        timeout_s: float | None = None,
        after: Callable[[], object] | None = None,
        on_failure: Callable[[CommError], None] | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._work = work
        self._after = after
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self.what = what
        released: Work | None = getattr(work, "released", None)
        self._reading = (
            None if released is None else Pending(released, f"{what}, read by all,", timeout_s, on_failure=on_failure)
        )

    @property
    def reading(self) -> Pending:
        """The part after which the input buffer is free: waiting for it launches nothing."""
        return self if self._reading is None else self._reading

    @property
    def on_demand(self) -> bool:
        """Whether nothing moves until somebody waits: the thread that waits does the work."""
        return bool(getattr(self._work, "on_demand", False))

    def when_done(self, call: Callable[[], object]) -> bool:
        """Have ``call`` called, perhaps twice, by the thread that completes the work; say whether there is one."""
        tell: Callable[[Callable[[], object]], None] | None = getattr(self._work, "when_done", None)
        if tell is None:
            return False
        tell(call)
        return True

    def follow(self) -> None:
        """Make the current stream of a CUDA device wait, and leave everything as it is for who waits later."""
        if self._work is not None:
            self._work.wait()

    def pieces(self) -> Iterator[Tensor] | None:
        """Return the result of a reduce-scatter piece by piece, or None where it can only be had whole.

        Pieces are in order, each in the memory of the one before; who begins must take them all, and `wait` no more.

        Raises:
            CommError: as `wait`.
        """
        return self._begin("pieces")

    def leaves(self) -> Iterator[list[Tensor]] | None:
        """Return, in place of the sum of a reduce-scatter, what to add up: every rank's part, by rank, in one item.

        None where only the sum can be had. The parts must not be written, nor read after the next item was asked for
        (there is none): their owners overwrite them then. Who begins must end, and `wait` no more.

        Raises:
            CommError: as `wait`.
        """
        return self._begin("leaves")

    def _begin(self, how: str) -> Iterator[Any] | None:
        take: Callable[[], Iterator[Any]] | None = getattr(self._work, how, None)
        if take is None or self._after is not None or getattr(self._work, "done", False):
            return None
        self._work = None
        return self._take(take)

    def _take(self, take: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        try:
            yield from take()
        except RuntimeError as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Make what follows on the current stream (CPU: on this thread) see the result.

        Raises:
            CommError: if the collective failed or timed out; names operation and bucket.
        """
        if self._work is not None:
            work, self._work = self._work, None
            try:
                if self._timeout is None or torch.cuda.is_available():
                    work.wait()
                else:
                    work.wait(self._timeout)
            except RuntimeError as error:
                raise self._failure(error) from error
            if self._after is not None:
                self._after()

    def _failure(self, error: RuntimeError) -> CommError:
        failure = CommError(
            f"{self.what} failed on this rank: {error}. A peer died, hangs, or issued other collectives; "
            "look for the first error among all ranks' output."
        )
        if self._on_failure is not None:
            self._on_failure(failure)
        return failure

    def ready(self, within_s: float) -> bool:
        """Say whether `wait` will not block the host for long: always on CUDA, elsewhere after polling ``within_s``."""
        if self._work is None or torch.cuda.is_available():
            return True
        deadline = time.monotonic() + within_s
        while not self._work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True


DONE = Pending(None)


class Lane:
    """A CUDA stream for collectives that are made of several operations: these run in order, beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, call: Callable[[], object]) -> Work:
        """Do what ``call`` launches after all that the lane and the current stream have been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            call()
            return _Reached(self._device, self._stream.record_event())


class _Reached:
    """The point on a lane after some work."""

    def __init__(self, device: torch.device, event: torch.cuda.Event) -> None:
        self._device = device
        self._event = event

    def is_completed(self) -> bool:
        """Say whether the device is there."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Make the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(self._event)
        return True


class Streams:
    """Launches collectives. The engine talks to asynchronous work through this class only."""

    def __init__(self) -> None:
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def launch(self, start: Callable[[], Pending]) -> Pending:
        """Start a collective whose inputs were written on the current stream."""
        return start()

    def launch_chain(
        self, device: torch.device, first: Callable[[], Pending], second: Callable[[], Pending]
    ) -> Pending:
        """Start ``first`` now and ``second`` after it, without holding up the current stream.

        On CUDA a side stream waits in between. On CPU there is no thread to wait on: ``second`` starts when the result
        is waited for, in the same order on all ranks.
        """
        if device.type != "cuda":
            pending = self.launch(first)
            return _Chain(pending, lambda: self.launch(second))
        side = self._side.get(device)
        if side is None:
            side = self._side[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.launch(first).wait()
            return self.launch(second)

    def upload(self, values: Sequence[int | float] | Tensor, out: Tensor) -> Tensor:
        """Write host numbers to a device tensor without waiting for the device: through pinned memory on CUDA."""
        if isinstance(values, Tensor):
            host = values.pin_memory() if out.is_cuda else values
        else:
            host = torch.tensor(values, dtype=out.dtype, pin_memory=out.is_cuda)
        return out.copy_(host, non_blocking=True)

    def current(self, device: torch.device) -> torch.cuda.Stream | None:
        """Return the current stream of a CUDA device, None elsewhere."""
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    @property
    def capturing(self) -> bool:
        """Whether the current CUDA stream records a graph that will be replayed as it is now."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return False
        return torch.cuda.is_current_stream_capturing()

    def follow(self, device: torch.device, other: torch.cuda.Stream | None) -> None:
        """Make the current stream wait for what ``other`` has been given so far."""
        if other is not None:
            current = torch.cuda.current_stream(device)
            if current != other:
                current.wait_stream(other)

    def lead(self, device: torch.device, other: torch.cuda.Stream | None) -> None:
        """Make ``other`` wait for the current stream: memory that ``other`` gets back may still be read here."""
        if other is not None:
            current = torch.cuda.current_stream(device)
            if current != other:
                other.wait_stream(current)


class _Chain(Pending):
    __slots__ = ("_first", "_second")

    def __init__(self, first: Pending, second: Callable[[], Pending]) -> None:
        super().__init__(None, first.what)
        self._first: Pending | None = first
        self._second = second
        self._reading = first.reading

    def ready(self, within_s: float) -> bool:
        return (
            self._first is None
        )  # the second half needs peers that may be waiting for this rank until they are in step()

    def wait(self) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            first.wait()
            self._second().wait()
