"""A tensor's memory as bytes, and as a storage of its own; nothing is copied, and numpy is not needed."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, which lives as long as they do."""
    if not tensor.nbytes:
        return memoryview(b"")
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # an address keeps nothing alive
    return memoryview(memory).cast("B")


def alone(tensor: Tensor) -> Tensor:
    """Return a 1-D contiguous CPU tensor over the same memory whose storage holds nothing else.

    ``torch.save`` writes the whole storage that a view is of.
    """
    first = tensor.storage_offset() * tensor.element_size()
    part = tensor.untyped_storage()[first : first + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(part, 0, tensor.shape, (1,))
