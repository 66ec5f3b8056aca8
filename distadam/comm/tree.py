"""Sums over ranks in one fixed order, whatever arrives first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distadam import native

BLOCK_NUMEL = 131_072  # larger than what a call costs, smaller than what a cache holds


class TreeSum:
    """Adds buffers of all ranks pairwise in the order of a fixed binary tree over ranks, in the target's dtype.

    Args:
        num_ranks: at most so many buffers.
        device: where they lie.
        block_numel: elements that are added up at a time.
    """

    def __init__(self, num_ranks: int, device: torch.device | None = None, block_numel: int = BLOCK_NUMEL) -> None:
        self._num_ranks = num_ranks
        self._device = torch.device("cpu") if device is None else device
        self._block_numel = block_numel
        self._blocks: dict[torch.dtype, Tensor] = {}

    @property
    def scratch(self) -> list[Tensor]:
        """Buffers that are kept between calls."""
        return list(self._blocks.values())

    def reserve(self, dtype: torch.dtype) -> None:
        """Make the buffers for sums in ``dtype`` now, so that no later call allocates."""
        if dtype not in self._blocks:
            depth = max(1, (self._num_ranks - 1).bit_length()) + 1
            self._blocks[dtype] = torch.empty(depth, self._block_numel, dtype=dtype, device=self._device)

    def add(self, target: Tensor, leaves: Sequence[Tensor]) -> None:
        """Write the sum of ``leaves`` (by rank) to ``target``, which may be one of them, block by block."""
        if target.device.type == "cpu" and native.sum_ranks(target, leaves):
            return
        self.reserve(target.dtype)
        blocks = self._blocks[target.dtype]
        for start in range(0, target.numel(), self._block_numel):
            out = target[start : start + self._block_numel]
            numel = out.numel()
            parts = [leaf[start : start + numel] for leaf in leaves]
            for rank, part in enumerate(parts):
                if part.data_ptr() == out.data_ptr() and rank > 0:
                    parts[rank] = blocks[-1, :numel].copy_(part)
            _tree_sum(out, parts, [block[:numel] for block in blocks])


def _tree_sum(out: Tensor, leaves: Sequence[Tensor], blocks: Sequence[Tensor]) -> None:
    """Add ``leaves`` pairwise, halves first; the left half has the larger power of two."""
    if len(leaves) == 1:
        if out.data_ptr() != leaves[0].data_ptr():
            out.copy_(leaves[0])
    elif len(leaves) == 2 and leaves[0].dtype == leaves[1].dtype == out.dtype:
        torch.add(leaves[0], leaves[1], out=out)
    else:
        half = 1 << (len(leaves) - 1).bit_length() - 1
        _tree_sum(out, leaves[:half], blocks)
        _tree_sum(blocks[0], leaves[half:], blocks[1:])
        out.add_(blocks[0])
