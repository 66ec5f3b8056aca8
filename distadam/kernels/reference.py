"""The kernel that every rule and every storage has: elementwise torch operations, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from distadam.kernels.chunks import Chunks
from distadam.kernels.update import GradScaling, ShardUpdate
from distadam.rules import Allocate, Rule, Scratch

_CPU_CHUNK = 262_144
"""Elements a chunk on the CPU. Measured with AdamW, 2 Mi elements, AMD EPYC 7003 (512 KiB of L2 a core, 32 MiB of L3),
one thread, as multiples of `torch._fused_adamw_`: fp32 4.9x at 64 Ki elements, 3.9x at 128 Ki, 3.4x at 256 Ki; with
8-bit moments 14.4x, 10.4x and 8.7x. Small chunks pay for the calls of operations; 256 Ki elements of weight, gradient,
two states and one temporary are 5 MiB."""

_DEVICE_CHUNK = 4_194_304
"""Elements a chunk elsewhere: bounds the temporaries (16 MiB each in fp32), not chosen for speed."""

_SKIP_SCALAR = -1
_DIVISOR_SCALAR = -2
"""0-D scratch indices of this kernel; rules count theirs from 0."""


class ReferenceKernel:
    """Scales the gradient and calls the rule, chunk by chunk; any rule, any storage, any device.

    Chunks are multiples of 256 elements, but nothing depends on it: rules are elementwise with one rounding per
    operation, so every cut gives the same bits.

    Args:
        allocate: Makes scratch buffers, at the first steps only.
    """

    name = "reference"

    def __init__(self, allocate: Allocate) -> None:
        self._scratch = Scratch(allocate)
        self._chunks = Chunks(self._scratch, _CPU_CHUNK, _DEVICE_CHUNK)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of temporaries held between steps."""
        return self._scratch.nbytes

    def tensors(self) -> list[Tensor]:
        """Return nothing; see `Kernel.tensors`."""
        return []

    def update(self, rule: Rule, update: ShardUpdate, scaling: GradScaling) -> None:
        """Scale the gradients, update and store; see `Kernel.update`.

        Syncs: never.
        """
        if update.device.type == "meta":
            update.validate(rule)
        if is_skipped(scaling.found_inf):
            return
        skip = self._skip(scaling.found_inf)
        for ranges in update.ranges:
            for chunk in self._chunks.walk(update, ranges, rule.state_names(ranges.group), skip):
                self._scale_(chunk.grad, scaling)
                step = ranges.steps[chunk.index]
                rule.update(chunk.weight, chunk.grad, chunk.state, step, ranges.group, self._scratch, skip)

    def _skip(self, found_inf: Tensor | None) -> Tensor | None:
        if found_inf is None or found_inf.device.type == "cpu":
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


def is_skipped(found_inf: Tensor | None) -> bool:
    """Say whether the host knows that nothing is to be updated."""
    return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)
