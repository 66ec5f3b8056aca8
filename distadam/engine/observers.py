"""Who is shown each step: the seam between the engine and `distadam.diagnostics`. Nobody is, and nothing is paid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.norms import BucketSquares
from distadam.engine.rounds import BucketGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketStep:
    """The update of one bucket's shard.

    The gradient that the rule sees is the sum over ranks, divided by ``num_ranks``, multiplied by each of
    ``multipliers`` and divided by ``loss_scale``, rounded to the compute dtype each time.

    Args:
        reduced: the bucket's gradient.
        has: per slot, whether any rank has a gradient; the others keep their bits.
        loss_scale: 0-D, or None.
        found_inf: where not 0 nothing is updated; or None.
    """

    reduced: BucketGradient
    has: bytes
    loss_scale: Tensor | None
    found_inf: Tensor | None

    @property
    def flat(self) -> FlatBucket:
        """The bucket in memory."""
        return self.reduced.flat

    @property
    def num_ranks(self) -> Tensor | None:
        """0-D; None where it is 1 or the sum is divided already. Known once the gradient is shown."""
        return self.reduced.scaling_divisor

    @property
    def multipliers(self) -> tuple[Tensor, ...]:
        """0-D each: clipping's factor, the inverse of a loss scale. Known once the gradient is shown."""
        return tuple(self.reduced.multipliers)


class StepObserver:
    """Reads along while a step updates this rank's shards; the methods do nothing here.

    They are called in one order on every rank, so they may communicate; what they are shown they must not change.

    Attributes:
        reads_gradients: Whether `gradient` is called in this step, asked after `begin_step`. Where nobody reads them
            sums of gradients need not be in memory, and on the CPU are not.
    """

    reads_gradients = True

    def reducing(self, flat: FlatBucket, full: Tensor) -> None:
        """See this rank's own gradient of a bucket, in backward or `step`, just before it is reduced."""

    def begin_step(self) -> None:
        """Gradients are agreed on, nothing is updated yet."""

    def begin_bucket(self, step: BucketStep) -> None:
        """A bucket is about to be updated: weights, states and step counts are the old ones."""

    def gradient(self, step: BucketStep, start: int, piece: Tensor) -> None:
        """See elements [start, start + len(piece)) of the shard's summed gradient; the memory is used again."""

    def end_bucket(self, step: BucketStep) -> None:
        """The bucket is updated and about to be gathered."""

    def end_step(self) -> None:
        """All buckets are updated; parameters have arrived, unless `prefetch` leaves that to the next forward."""


class Observers:
    """The observers of one optimizer."""

    def __init__(self) -> None:
        self._observers: list[StepObserver] = []
        self._step: BucketStep | None = None

    def __len__(self) -> int:
        return len(self._observers)

    def add(self, observer: StepObserver) -> Callable[[], None]:
        """Show ``observer`` every step from now on; return what ends that."""
        self._observers = [*self._observers, observer]

        def remove() -> None:
            self._observers = [other for other in self._observers if other is not observer]

        return remove

    def reducing(self, flat: FlatBucket, full: Tensor) -> None:
        """See `StepObserver.reducing`."""
        for observer in self._observers:
            observer.reducing(flat, full)

    def begin_step(self) -> None:
        """See `StepObserver.begin_step`."""
        for observer in self._observers:
            observer.begin_step()

    def begin_bucket(
        self,
        gradient: BucketGradient,
        has: bytes,
        found_inf: Tensor | None,
        loss_scale: Tensor | None,
        squares: BucketSquares,
    ) -> BucketSquares:
        """Announce a bucket; return what is to take its summed gradient in place of ``squares``."""
        step = self._step = BucketStep(reduced=gradient, has=has, loss_scale=loss_scale, found_inf=found_inf)
        for observer in self._observers:
            observer.begin_bucket(step)
        readers = [observer for observer in self._observers if observer.reads_gradients]
        start = 0

        def show(piece: Tensor) -> None:
            nonlocal start
            for observer in readers:
                observer.gradient(step, start, piece)
            start += piece.numel()

        return replace(squares, show=show) if readers else squares

    def end_bucket(self) -> None:
        """See `StepObserver.end_bucket`."""
        if self._step is not None:
            step, self._step = self._step, None
            for observer in self._observers:
                observer.end_bucket(step)

    def end_step(self) -> None:
        """See `StepObserver.end_step`."""
        for observer in self._observers:
            observer.end_step()
