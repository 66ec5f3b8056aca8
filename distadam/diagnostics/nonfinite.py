"""The first gradient that is not finite: whose, where, and did other ranks have it too?

Note [Before the sum]: once gradients are added up nobody can tell which rank brought a NaN along. So while a watcher is
there a hook on each parameter looks at this rank's own gradient as backward makes it: one sum over it, which is not
finite if anything in it is not. Ranks learn of it from the step's `grad_norm`, which all of them have anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distadam.diagnostics.shards import row_major_index, spell
from distadam.engine.access import Access


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """The first element of this rank's gradients of a step that is not finite."""

    parameter: str
    index: tuple[int, ...]
    value: float
    num_elements: int


class NonFiniteHooks:
    """Hooks on the parameters of an optimizer."""

    def __init__(self, access: Access) -> None:
        self.found: NonFinite | None = None
        self._handles: list[RemovableHandle] = []
        for param, name in access.names.items():
            if param.requires_grad:
                self._handles.append(param.register_hook(self._look_at(name)))  # type: ignore[no-untyped-call]

    def _look_at(self, name: str):  # type: ignore[no-untyped-def]
        def look(grad: Tensor) -> None:
            if self.found is None and grad.layout == torch.strided:
                total = grad.sum(dtype=torch.float32 if grad.element_size() < 4 else None)
                if not math.isfinite(total):
                    self.found = first_nonfinite(name, grad)

        return look

    def take(self) -> NonFinite | None:
        """Return what was found since the last call."""
        found, self.found = self.found, None
        return found

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def first_nonfinite(name: str, grad: Tensor) -> NonFinite | None:
    """Return the first element of a gradient that is not finite, None if all are."""
    bad = grad.isfinite().logical_not_().flatten()
    count = int(bad.sum())
    if not count:
        return None  # the sum has overflowed
    position = int(bad.nonzero()[0])
    index = row_major_index(grad.shape, position)
    return NonFinite(parameter=name, index=index, value=float(grad[index]), num_elements=count)


def describe(answers: list[NonFinite | None]) -> str:
    """Return in words what the ranks have found."""
    had = [(rank, found) for rank, found in enumerate(answers) if found is not None]
    if not had:
        return "the gradient is not finite though every rank's own was: the sum overflowed, or p.grad was set by hand"
    rank, first = had[0]
    others = [str(other) for other, _ in had[1:]]
    also = f"rank {', '.join(others)} had one too" if others else "no other rank had one" if len(answers) > 1 else ""
    where = spell(first.parameter, first.index)
    return f"{where} on rank {rank} is {first.value}, {first.num_elements} of its elements are not finite" + (
        f"; {also}" if also else ""
    )
