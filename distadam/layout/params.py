"""What the layout knows about a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

ALIGN = 64


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Name, logical shape and storage of one parameter.

    Args:
        name: as the user gave it, else ``param.N``.
        shape: logical shape.
        dtype: torch's name without the prefix, e.g. "bfloat16".
        device: torch's device string, e.g. "cuda:0".
        itemsize: bytes per element.
        group: index of the parameter group.
        strides: strides in elements; parameters keep theirs.
        storage: what parameters must share, beside dtype and device, to share a bucket; a name that means nothing here.
        align: elements at multiples of which its slot starts, the same for every parameter of a storage.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    itemsize: int
    group: int
    strides: tuple[int, ...] = ()
    storage: str = ""
    align: int = ALIGN

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)
