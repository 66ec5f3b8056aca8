"""What a kernel is given: ranges of flat buffers, and what to do to the gradients first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from distadam.errors import UsageError
from distadam.rules import Rule

RANGE_MULTIPLE = 64
"""Ranges start and end at multiples of this many elements: torch's fused CPU loops then have no scalar tail, whose
bits differ from the vectorised body's."""


@dataclass(slots=True, kw_only=True)
class UpdateRanges:
    """Parallel lists, one entry per range of a bucket; every range has the same options, compute dtype and device.

    Attributes:
        weights: (Master) weights, 1-D contiguous, numel a multiple of 64.
        grads: Gradients in the compute dtype, each of its weight's shape; the kernel may overwrite them.
        states: The rule's states by name, each list parallel to `weights`.
        steps: 0-D float32 step counts on the device; they already count this step.
        first: Whether this is the range's first counted step; None where only the device knows.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]
    steps: list[Tensor]
    first: list[bool | None]

    def validate(self, rule: Rule, group: Mapping[str, Any]) -> None:
        """Check that the lists belong together.

        Called where no operation would: on the meta device. Real operations check most of this themselves.

        Args:
            rule: The rule that will run.
            group: torch's param_group dict.

        Raises:
            UsageError: A list, shape, dtype or device does not fit.
        """
        names = rule.state_names(group)
        if set(self.states) != set(names):
            raise UsageError(f"{rule.name}: expected states {names} but got {tuple(self.states)}")
        parallel: dict[str, Sequence[object]] = {
            "grads": self.grads,
            "steps": self.steps,
            "first": self.first,
            **self.states,
        }
        for name, values in parallel.items():
            if len(values) != len(self.weights):
                raise UsageError(f"{rule.name}: expected {len(self.weights)} {name} but got {len(values)}")
        for i, weight in enumerate(self.weights):
            if weight.dim() != 1 or not weight.is_contiguous() or weight.numel() % RANGE_MULTIPLE:
                raise UsageError(
                    f"{rule.name}: expected weights[{i}] 1-D and contiguous with a multiple of {RANGE_MULTIPLE} "
                    f"elements but got shape {tuple(weight.shape)}, strides {weight.stride()}"
                )
            for name, tensors in {"grads": self.grads, **self.states}.items():
                _expect_like(f"{rule.name}: {name}[{i}]", tensors[i], weight.shape, weight.dtype, weight.device)
            _expect_like(f"{rule.name}: steps[{i}]", self.steps[i], torch.Size(()), torch.float32, weight.device)


@dataclass(slots=True, kw_only=True)
class GradScaling:
    """What turns a summed gradient into the one that the rule sees; each factor rounds by itself, in this order.

    Attributes:
        num_ranks: Divided by first: 0-D, compute dtype, on the device; None for one rank.
        multipliers: Multiplied by next, in order (GradScaler's inv_scale, the clip coefficient): 0-D, on the device.
        loss_scale: Divided by last (torch's `grad_scale`): 0-D, on the device.
        found_inf: 0-D or 1-element float tensor on the device; where it is not 0, nothing is updated.
    """

    num_ranks: Tensor | None = None
    multipliers: list[Tensor] = field(default_factory=list)
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Kernel(Protocol):
    """One way to spell load -> update -> store.

    Attributes:
        name: The name that `select` and `DISTADAM_KERNEL` know it by.
    """

    name: str

    def update(self, rule: Rule, ranges: UpdateRanges, group: Mapping[str, Any], scaling: GradScaling) -> None:
        """Scale the gradients, then update weights and states in place.

        Args:
            rule: The update rule.
            ranges: What to update.
            group: torch's param_group dict.
            scaling: What to do to the gradients first.

        Syncs: never.
        """


def _expect_like(what: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device) or not tensor.is_contiguous():
        raise UsageError(
            f"{what}: expected a contiguous tensor of shape {tuple(shape)}, {dtype}, on {device} but got "
            f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
        )
