"""`check_ranks`: the parameters' checksum becomes part of what ranks agree on before a step."""

from __future__ import annotations

from types import TracebackType

from distadam.diagnostics.agreement import checksums, compare_ranks
from distadam.diagnostics.shards import access_of
from distadam.optimizer import ShardedOptimizer


def check_ranks(optimizer: ShardedOptimizer, *, every: int = 10) -> RankCheck:
    """Have ``step()`` raise on all ranks when their parameters are not the same bits.

        with diagnostics.check_ranks(optimizer, every=100):
            for batch in batches:
                ...
                optimizer.step()

    Hyper-parameters, the order of reductions and the number of steps are compared at every step without this. With it,
    every ``every`` steps each rank sums up its parameters before the update; the sums ride on the exchange of bytes
    that begins a step, so no collective is added. Summing reads each parameter once.

    Args:
        optimizer: any rule, any storage.
        every: steps between checks; 1 names the step after which parameters differ, more only the checks around it. A
            gather rewrites what other ranks own: a flipped bit between two checks may be gone, not its effect.

    Returns:
        What ends it; a context manager.

    Raises:
        RankMismatchError: by ``step()``, before the update: parameter, element, rank, and since which step.
        UsageError: it is on already.

    Collective: every rank, with the same ``every``. Syncs: at those steps, a device until its parameters are there.
    """
    if every < 1:
        raise ValueError(f"check_ranks(every=...) expected a number above 0 but got {every!r}.")
    return RankCheck(optimizer, every)


class RankCheck:
    """See `check_ranks`.

    Attributes:
        checked: the last step before which parameters were found to be the same; 0 before the first.
    """

    def __init__(self, optimizer: ShardedOptimizer, every: int) -> None:
        self._optimizer = optimizer
        self._access = access_of(optimizer, every)
        self._every = every
        self._sums: dict[str, int] = {}
        self._before: dict[str, int] | None = None
        self._step = 0
        self.checked = 0
        self._remove = optimizer.compare_before_steps(self)

    def __enter__(self) -> RankCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave nothing behind. Call it on every rank, between the same steps."""
        self._remove()

    def look(self, step: int) -> object:
        """Return the parameters' sums where a check is due; see `distadam.engine.chain.Witness`."""
        if step % self._every:
            return None
        if self._step != step:  # not a step that is tried again
            self.checked, self._before = self._step, self._sums or None
        self._optimizer.flush()
        self._step, self._sums = step, checksums(self._access)
        return tuple(self._sums.values())

    def explain(self) -> str:
        """Name parameters, elements and ranks. Collective: every rank."""
        found = compare_ranks(self._access, self._sums, self._before)
        since = f"they were the same before step {self.checked}" if self.checked else "this is the first check"
        return f"parameters differ before step {self._step} ({since}): " + "; ".join(map(str, found))
