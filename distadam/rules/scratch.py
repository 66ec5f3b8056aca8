"""Temporaries that outlive a step, so that the steady state allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Allocate: TypeAlias = Callable[[int, torch.dtype, torch.device], Tensor]
"""Makes a 1-D contiguous tensor from (numel, dtype, device); its contents do not matter."""


class Scratch:
    """Cached buffers, looked up by a small index.

    A buffer's contents are undefined between two `get` calls: whoever asks for an index owns it until they are done.
    One `Scratch` serves one update at a time, on one stream: two that may run at once need one each.

    Args:
        allocate: Called when a buffer is first wanted or has to grow; never in the steady state.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._scalars: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def get(self, index: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the first `numel` elements of buffer `index`, growing it when it is shorter.

        Args:
            index: Which buffer; buffers of different dtypes or devices never share memory.
            numel: Length of the result.
            dtype: Its dtype.
            device: Its device.

        Returns:
            A 1-D contiguous tensor of shape (numel,), contents undefined.

        Syncs: never.
        """
        key = (index, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = self._allocate(numel, dtype, device)
        return buffer if buffer.numel() == numel else buffer[:numel]

    def scalar(self, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return 0-D buffer `index`.

        Args:
            index: Which 0-D buffer; numbered apart from those of `get`.
            dtype: Its dtype.
            device: Its device.

        Returns:
            A 0-D tensor, contents undefined.

        Syncs: never.
        """
        key = (index, dtype, device)
        scalar = self._scalars.get(key)
        if scalar is None:
            scalar = self._scalars[key] = self._allocate(1, dtype, device).view(())
        return scalar

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        held = (*self._buffers.values(), *self._scalars.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
