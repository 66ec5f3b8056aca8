"""What a kernel is given: storages of a shard, the ranges to update in it, and what to do to the gradients first.

[Note: what a kernel may rely on]
    A `ShardUpdate` is made once and given again every step while the same parameters have gradients, so a kernel may
    keep tables for it in `cache`; only `GroupRanges.first` and the numbers in tensors and in `group` change. All ranges
    of all groups that the kernel serves in a bucket come in one call, in the order in which they lie in the shard:
    enough for one launch. Range i of a group is elements [start, end) of the shard = of `grad`, of `weights`, of every
    state; its parameters have the step count `steps[i]`, which is element `slots[i]` of `ShardUpdate.steps`.
    Padding inside ranges is 0 in gradients, weights and states, and stays so under every rule unless eps is 0, when an
    update of it is 0 / 0: a kernel may update it but must store zeros of storages that are not `direct` then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from distadam.errors import UsageError
from distadam.precision import Moment, Weights
from distadam.rules import Rule

RANGE_MULTIPLE = 64
"""Ranges start and end at multiples of this many elements: torch's fused CPU loops then have no scalar tail, whose
bits differ from the vectorised body's."""

Span = tuple[int, int]

Upload: TypeAlias = Callable[[Tensor, Tensor], object]
"""Copies a CPU tensor to a device tensor of its shape and dtype without waiting for the device."""


@dataclass(slots=True, kw_only=True)
class DirectViews:
    """Parallel lists, one entry per range, of tensors in the compute dtype that an update writes in place."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]


@dataclass(slots=True, kw_only=True)
class GroupRanges:
    """The ranges of one parameter group in a shard: parallel lists, one entry per range.

    Attributes:
        group: torch's param_group dict.
        spans: (start, end) in the shard, multiples of 64.
        steps: 0-D float32 step counts on the device; they already count this step.
        slots: The slot of each range whose step count that is.
        first: Whether this is the range's first counted step; None where only the device knows.
        padding: Spans of the shard inside the ranges that belong to no parameter.
    """

    group: Mapping[str, Any]
    spans: list[Span]
    steps: list[Tensor]
    slots: list[int]
    first: list[bool | None]
    padding: list[Span] = field(default_factory=list)
    views: DirectViews | None = None


@dataclass(slots=True, kw_only=True)
class ShardUpdate:
    """One update of a shard; see [Note: what a kernel may rely on].

    Attributes:
        weights: The shard's weights.
        states: The rule's states by name, those of all groups.
        sources: The gradient, each of shape (elements,): one tensor that is the sum over ranks, which the kernel may
            overwrite, in the compute dtype or 16 bits; for the compiled kernel also every rank's, by rank, which it
            adds up and leaves as they are. Given anew each step.
        start: The element of the shard that ``sources`` begin at; all ranges lie in what they cover.
        compute_dtype: What the update computes in.
        steps: float32, shape (slots,): the step counts of all slots of the bucket, on the device.
        ranges: By parameter group.
        cache: What kernels keep for this object, by their names.
    """

    weights: Weights
    states: dict[str, Moment]
    sources: Sequence[Tensor]
    compute_dtype: torch.dtype
    steps: Tensor
    ranges: list[GroupRanges]
    start: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def grad(self) -> Tensor:
        """The sum over ranks, for kernels that add up nothing."""
        return self.sources[0]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.weights.param_shard.device

    def direct(self, ranges: GroupRanges, names: Sequence[str]) -> DirectViews | None:
        """Return the ranges as tensors to be updated in place, or None where a storage or the gradient is encoded."""
        views = ranges.views
        if views is not None and tuple(views.states) == tuple(names):
            return views
        weights, states = self.weights.direct, {name: self.states[name].direct for name in names}
        if weights is None or self.grad.dtype != self.compute_dtype or any(t is None for t in states.values()):
            return None
        ranges.views = DirectViews(
            weights=_cut(weights, ranges.spans),
            grads=_cut(self.grad, [(start - self.start, end - self.start) for start, end in ranges.spans]),
            states={name: _cut(tensor, ranges.spans) for name, tensor in states.items() if tensor is not None},
        )
        return ranges.views

    def validate(self, rule: Rule) -> None:
        """Check that everything belongs together.

        Called where no operation would: on the meta device. Real operations check most of this themselves.

        Args:
            rule: The rule that will run.

        Raises:
            UsageError: A state is missing, or a length, span, shape, dtype or device does not fit.
        """
        numel = self.weights.param_shard.numel()
        _expect(f"{rule.name}: grad", self.grad, numel, self.device)
        stored = {"weights": self.weights, **self.states}
        for what, storage in stored.items():
            for suffix, part in storage.stored().items():
                _expect(f"{rule.name}: {what}{suffix}", part.tensor, numel // part.block, self.device)
        for ranges in self.ranges:
            names = rule.state_names(ranges.group)
            missing = [name for name in names if name not in self.states]
            if missing:
                raise UsageError(f"{rule.name}: expected states {names} but {missing} are missing")
            parallel: dict[str, Sequence[object]] = {
                "steps": ranges.steps,
                "slots": ranges.slots,
                "first": ranges.first,
            }
            for name, values in parallel.items():
                if len(values) != len(ranges.spans):
                    raise UsageError(f"{rule.name}: expected {len(ranges.spans)} {name} but got {len(values)}")
            for start, end in ranges.spans:
                if start % RANGE_MULTIPLE or end % RANGE_MULTIPLE or not 0 <= start <= end <= numel:
                    raise UsageError(
                        f"{rule.name}: expected a range inside [0, {numel}) that starts and ends at a multiple of "
                        f"{RANGE_MULTIPLE} but got [{start}, {end})"
                    )
            for i, step in enumerate(ranges.steps):
                if (step.shape, step.dtype, step.device) != (torch.Size(()), torch.float32, self.device):
                    raise UsageError(
                        f"{rule.name}: steps[{i}]: expected a 0-D torch.float32 tensor on {self.device} but got "
                        f"{tuple(step.shape)}, {step.dtype}, on {step.device}"
                    )


@dataclass(slots=True, kw_only=True)
class GradScaling:
    """What turns a summed gradient into the one that the rule sees; each factor rounds by itself, in this order.

    Attributes:
        num_ranks: Divided by first: 0-D, compute dtype, on the device; None for one rank.
        multipliers: Multiplied by next, in order (GradScaler's inv_scale, the clip coefficient): 0-D, on the device.
        loss_scale: Divided by last (torch's `grad_scale`): 0-D, on the device.
        found_inf: 0-D or 1-element float tensor on the device; where it is not 0, nothing is updated.
        squares: 0-D float64: the compiled kernel adds to it the sum of squares of the summed gradient before scaling.
    """

    num_ranks: Tensor | None = None
    multipliers: list[Tensor] = field(default_factory=list)
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    squares: Tensor | None = None


class Kernel(Protocol):
    """One way to spell load -> update -> store.

    Attributes:
        name: The name that `select` and `DISTADAM_KERNEL` know it by.
    """

    name: str

    def update(self, rule: Rule, update: ShardUpdate, scaling: GradScaling) -> None:
        """Scale the gradients, update weights and states, and store them; the parameter too.

        Args:
            rule: The update rule.
            update: What to update: all ranges that this kernel serves in a bucket.
            scaling: What to do to the gradients first.

        Syncs: never.
        """

    def tensors(self) -> list[Tensor]:
        """Return what the kernel keeps between steps that its `allocate` did not make, for the memory report."""


def _cut(tensor: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    return [tensor[start:end] for start, end in spans]


def _expect(what: str, tensor: Tensor, numel: int, device: torch.device) -> None:
    if tensor.shape != (numel,) or tensor.device != device or not tensor.is_contiguous():
        raise UsageError(
            f"{what}: expected a contiguous tensor of shape ({numel},) on {device} but got {tuple(tensor.shape)}, "
            f"on {tensor.device}"
        )
