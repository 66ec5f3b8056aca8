"""Notice parameters that somebody else wrote.

Note [Written elsewhere]: `step` writes parameters through their flat buffer, which their own version counters do not
see, and then bumps those counters itself. So a counter that moved, or a data pointer that is not the flat buffer's,
means a write that masters and other ranks' shards know nothing of. Both are read for all parameters by one C-level
``map``: the cost is tens of nanoseconds a parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from distadam.errors import UsageError

_version = operator.attrgetter("_version")


class ParameterGuard:
    """Remembers version counters and data pointers of all parameters in buckets."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._names: list[str] = []
        self._versions: list[int] = []
        self._pointers: list[int] = []

    def watch(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Start anew with these parameters as they are now."""
        self._params, self._names = list(params), list(names)
        self.accept()

    def accept(self) -> None:
        """Take the present state as right."""
        self._versions = list(map(_version, self._params))
        self._pointers = list(map(torch.Tensor.data_ptr, self._params))

    def written(self, params: Sequence[Tensor]) -> None:
        """Bump the counters of what `step` updated, so that a stale graph raises as with torch.optim."""
        torch.autograd.graph.increment_version(params)
        self._versions = list(map(_version, self._params))

    def moved(self) -> list[int]:
        """Return the indices of parameters that are no longer views of their flat buffer."""
        pointers = list(map(torch.Tensor.data_ptr, self._params))
        if pointers == self._pointers:
            return []
        return [index for index, (now, was) in enumerate(zip(pointers, self._pointers, strict=True)) if now != was]

    def changed(self) -> list[int]:
        """Return the indices of parameters that were written, as far as counters tell, or moved."""
        versions = zip(map(_version, self._params), self._versions, strict=True)
        written = {index for index, (now, was) in enumerate(versions) if now != was}
        return sorted(written | set(self.moved()))

    def check(self) -> UsageError | None:
        """Return the error to raise if a parameter was written or replaced since `accept` or `written`."""
        moved = self.moved()
        if moved:
            name = self._names[moved[0]]
            return UsageError(
                f"parameter {name!r} no longer lies in the optimizer's flat buffer (model.to(...), p.data = ... or "
                f"{len(moved) - 1} more). Move the model before building the optimizer; after p.data = ... call "
                "optimizer.reload_parameters() on every rank."
            )
        versions = list(map(_version, self._params))
        if versions != self._versions:
            index = next(i for i, (now, was) in enumerate(zip(versions, self._versions, strict=True)) if now != was)
            return UsageError(
                f"parameter {self._names[index]!r} was written outside step() (load_state_dict, EMA swap, clamping). "
                "Call optimizer.reload_parameters() on every rank after writing parameters."
            )
        return None
