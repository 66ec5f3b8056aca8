"""The kernel that every rule has: elementwise torch operations, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distadam.kernels.update import GradScaling, UpdateRanges
from distadam.rules import Allocate, Rule, Scratch

_CPU_CHUNK = 131_072
"""Elements a chunk on the CPU. Measured with AdamW, fp32, 10M elements, AMD EPYC 7003 (512 KiB of L2 a core, 32 MiB of
L3), as multiples of `torch._fused_adamw_`, 1 thread: 19x at 4 Ki elements, 5.5x at 32 Ki, 4.5x at 64 Ki, 3.9x at
128 Ki, 3.5x at 256 Ki, 3.7x at 1 Mi. Small chunks pay for operator calls; 128 Ki elements of weight, gradient, two
states and one temporary are 2.5 MiB, which a core's share of L3 holds on smaller machines too."""

_DEVICE_CHUNK = 4_194_304
"""Elements a chunk elsewhere: bounds the temporaries (16 MiB each in fp32), not chosen for speed."""

_SKIP_SCALAR = -1
_DIVISOR_SCALAR = -2
"""0-D scratch indices of this kernel; rules count theirs from 0."""


class ReferenceKernel:
    """Scales the gradient and calls the rule, chunk by chunk; any rule, any device.

    Chunks are multiples of 64 elements, but nothing depends on it: rules are elementwise with one rounding per
    operation, so every cut gives the same bits.

    Args:
        allocate: Makes scratch buffers, at the first steps only.
    """

    name = "reference"

    def __init__(self, allocate: Allocate) -> None:
        self._scratch = Scratch(allocate)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of temporaries held between steps."""
        return self._scratch.nbytes

    def update(self, rule: Rule, ranges: UpdateRanges, group: Mapping[str, Any], scaling: GradScaling) -> None:
        """Scale the gradients, then update weights and states in place; see `Kernel.update`.

        Syncs: never.
        """
        if not ranges.weights:
            return
        if ranges.weights[0].is_meta:
            ranges.validate(rule, group)
        skip = self._skip(scaling.found_inf)
        for i, weight in enumerate(ranges.weights):
            state = {name: tensors[i] for name, tensors in ranges.states.items()}
            for chunk in _chunks(weight):
                grad = ranges.grads[i][chunk]
                self._scale_(grad, scaling)
                state_chunk = {name: tensor[chunk] for name, tensor in state.items()}
                rule.update(weight[chunk], grad, state_chunk, ranges.steps[i], group, self._scratch, skip)

    def _skip(self, found_inf: Tensor | None) -> Tensor | None:
        if found_inf is None:
            return None
        skip = self._scratch.scalar(_SKIP_SCALAR, torch.bool, found_inf.device)
        return torch.ne(found_inf.reshape(()), 0.0, out=skip)

    def _scale_(self, grad: Tensor, scaling: GradScaling) -> None:
        if scaling.num_ranks is not None:
            grad.div_(self._on_device(scaling.num_ranks, grad))
        for multiplier in scaling.multipliers:
            grad.mul_(multiplier)
        if scaling.loss_scale is not None:
            grad.div_(self._on_device(scaling.loss_scale, grad))

    def _on_device(self, divisor: Tensor, grad: Tensor) -> Tensor:
        """Bring a CPU divisor to the device (see [Note: division by a scalar] in rules/rule.py)."""
        if divisor.device == grad.device:
            return divisor
        return self._scratch.scalar(_DIVISOR_SCALAR, grad.dtype, grad.device).fill_(float(divisor))


def _chunks(weight: Tensor) -> Iterator[slice]:
    size = _CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, weight.numel(), size):
        yield slice(start, min(start + size, weight.numel()))
