"""The first gradient that is not finite: whose, where, and did other ranks have it too?

Note [Before the sum]: once gradients are added up nobody can tell which rank brought a NaN along. So a watcher is shown
each bucket's own gradient just before it is reduced, and adds it up: a sum is not finite if anything in it is not. On a
device nothing is waited for: where the first bad element lies is found out there, and read only if the step's
`grad_norm`, which all ranks have anyway, says that there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distadam.diagnostics.shards import element, row_major_index, spell
from distadam.engine.flat_bucket import FlatBucket


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """The first element of this rank's gradients of a step that is not finite.

    ``num_elements`` of its parameter are not; 0 where they were not counted.
    """

    parameter: str
    index: tuple[int, ...]
    value: float
    num_elements: int


class FirstNonFinite:
    """Remembers the first bad element of a step's gradients."""

    def __init__(self) -> None:
        self._found: NonFinite | None = None
        self._on_device: list[tuple[FlatBucket, Tensor, Tensor]] = []

    def look(self, flat: FlatBucket, full: Tensor) -> None:
        """Take in a bucket's gradient, as large as the bucket. Syncs: no device."""
        if full.device.type != "cpu":
            self._look_there(flat, full)
        elif self._found is None:
            total = full.sum(dtype=torch.float32 if full.element_size() < 4 else None)
            if not math.isfinite(total):
                self._found = _first_of(flat, full)

    def _look_there(self, flat: FlatBucket, full: Tensor) -> None:
        place = full.isfinite().logical_not_().to(torch.uint8).argmax()
        self._on_device.append((flat, place, full[place]))

    def take(self) -> FirstNonFinite:
        """Return what was found since the last call, and begin anew."""
        taken = FirstNonFinite()
        taken._found, self._found = self._found, None
        taken._on_device, self._on_device = self._on_device, []
        return taken

    def read(self) -> NonFinite | None:
        """Return the first bad element, None if all are finite. Syncs: yes."""
        for flat, place, value in self._on_device if self._found is None else ():
            if not math.isfinite(value):
                return _at(flat, int(place), float(value), 0)
        return self._found


def first_nonfinite(name: str, grad: Tensor) -> NonFinite | None:
    """Return the first element of a gradient that is not finite, None if all are."""
    bad = grad.isfinite().logical_not_().flatten()
    count = int(bad.sum())
    if not count:
        return None  # the sum has overflowed
    position = int(bad.nonzero()[0])
    index = row_major_index(grad.shape, position)
    return NonFinite(parameter=name, index=index, value=float(grad[index]), num_elements=count)


def _first_of(flat: FlatBucket, full: Tensor) -> NonFinite | None:
    found = (first_nonfinite(name, flat.unflatten(full, slot)) for slot, name in enumerate(flat.names))
    return next((one for one in found if one is not None), None)


def _at(flat: FlatBucket, place: int, value: float, num_elements: int) -> NonFinite | None:
    for number, slot in enumerate(flat.bucket.slots):
        if slot.offset <= place < slot.offset + slot.numel:
            index = element(flat, number, place - slot.offset)
            return NonFinite(parameter=flat.names[number], index=index, value=value, num_elements=num_elements)
    return None


def describe(answers: list[NonFinite | None]) -> str:
    """Return in words what the ranks have found."""
    had = [(rank, found) for rank, found in enumerate(answers) if found is not None]
    if not had:
        return "the gradient is not finite though every rank's own was: the sum overflowed"
    rank, first = had[0]
    others = [str(other) for other, _ in had[1:]]
    also = f"rank {', '.join(others)} had one too" if others else "no other rank had one" if len(answers) > 1 else ""
    text = f"{spell(first.parameter, first.index)} on rank {rank} is {first.value}"
    if first.num_elements:
        text += f", {first.num_elements} of its elements are not finite"
    return text + (f"; {also}" if also else "")
