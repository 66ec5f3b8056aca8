"""What a Rule is, and the few elementwise operations that rules are made of.

[Note: one rounding per operation]
    An element's new weight must depend on that element alone: not on where the flat buffer was cut into buckets,
    shards or chunks, nor on how many threads share the work. torch's CPU loops run a vectorised body and a scalar
    tail, compiled apart, and an operation with two roundings (`add(alpha=)`, `addcmul`, `addcdiv`, `lerp`) may become
    one fused multiply-add in the first and not in the second: in torch 2.13's x86 wheel that befalls the tail of
    `_fused_adamw_` (exp_avg_sq drifts when cut at fewer than 8 elements); the four named agree there, by luck of the
    compiler. So rules use only operations that round once by IEEE 754: mul, add, sub, div, reciprocal, neg, maximum,
    where, copy. There is no order of evaluation to choose and nothing to contract, and body and tail agree in every
    bit (of a NaN, its payload and sign aside).

    On the CPU two of the four save passes over memory and still round as those do. `addcmul(a, x, 1, value=c)` is
    (c x) 1 + a: c x is rounded, times 1 it is exact, so a fused multiply-add rounds the same sum; likewise with -0 for
    a, where nothing is added. `addcdiv(a, x, y, value=c)` is (c x) / y + a, and a sum with a quotient cannot be fused.

[Note: square roots on the CPU]
    `torch.sqrt` is not among them: in torch builds with MKL it is a VML call, wrong in the last bit for 9% of fp32
    values, and MKL does not say that it is independent of position. `torch.rsqrt` on the CPU is 1 / sqrt(x) in two
    IEEE instructions, so its reciprocal is the square root to within 3 roundings, from IEEE operations only, at the
    price of VML's. 0, inf and NaN come out right. Elsewhere `torch.rsqrt` may be an approximation (CUDA) and
    `torch.sqrt` is IEEE, hence `sqrt_into`.

[Note: division by a scalar]
    On CUDA, torch turns a division by a Python number or a CPU scalar into a multiplication by its reciprocal. Rules
    and kernels therefore divide by tensors on the device only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distadam.rules import scalars
from distadam.rules.scratch import Scratch

TERM = 0
"""Scratch index of a rule's one temporary."""

_OLD = 1
"""First scratch index of the values that a skipped update puts back."""

_ONE = {dtype: torch.tensor(1.0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
_MINUS_ZERO = {dtype: torch.tensor(-0.0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
"""0-D constants, made here since what is made in a step would be memory that no report knows."""


class Rule(ABC):
    """An update rule: names of state, and a pure elementwise update.

    Attributes:
        name: The key in `RULES`.
        has_step: Whether torch's state of this rule has a "step" entry.
    """

    name: str
    has_step: bool

    @abstractmethod
    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return torch's state keys under the group's options, in torch's order, without "step"."""

    @abstractmethod
    def _update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        step: Tensor,
        group: Mapping[str, Any],
        scratch: Scratch,
    ) -> None:
        """Update in place; see `update`."""

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        step: Tensor,
        group: Mapping[str, Any],
        scratch: Scratch,
        skip: Tensor | None,
    ) -> None:
        """Update weight and state in place; the gradient may be overwritten.

        All of weight, grad and the states are 1-D, contiguous, of one shape, device and compute dtype (fp32 or fp64).

        Args:
            weight: The (master) weights, shape (n,).
            grad: The averaged gradient, shape (n,).
            state: The tensors of `state_names`, each of shape (n,).
            step: 0-D float32 on the same device; already counts this step, so it is 1 at the first.
            group: torch's param_group dict.
            scratch: Where temporaries come from.
            skip: None, or a 0-D bool tensor on the same device: where true, weight and state keep their bits.

        Syncs: never.
        """
        if skip is None:
            self._update(weight, grad, state, step, group, scratch)
        elif scalars.on_host(skip):
            # Before the step count is looked at: a skipped first step has count 0, and 1 - beta**0 divides by zero.
            if not bool(skip):
                self._update(weight, grad, state, step, group, scratch)
        else:
            kept = [weight, *state.values()]
            old = [
                scratch.get(_OLD + i, tensor.numel(), tensor.dtype, tensor.device).copy_(tensor)
                for i, tensor in enumerate(kept)
            ]
            self._update(weight, grad, state, step, group, scratch)
            for before, tensor in zip(old, kept, strict=True):
                torch.where(skip, before, tensor, out=tensor)


def ewa_(average: Tensor, x: Tensor, decay: scalars.Scalar, gain: scalars.Scalar, term: Tensor) -> None:
    """Move an exponentially weighted average: average = decay * average + gain * x.

    The two products, and not torch's `lerp`, because they are accurate for every decay: `lerp` must choose between two
    forms by comparing its weight with 0.5, which nobody may do on the host when betas are device tensors. Where torch
    takes its second form (decay <= 0.5), an infinite x makes its average NaN; here it makes it infinite.

    Args:
        average: Shape (n,), updated in place.
        x: Shape (n,).
        decay: b, as a coefficient.
        gain: 1 - b, as a coefficient.
        term: Shape (n,), overwritten.
    """
    add_scaled_(average.mul_(decay), x, gain, term)


def ewa_of_square_(average: Tensor, x: Tensor, decay: scalars.Scalar, gain: scalars.Scalar, term: Tensor) -> None:
    """Move an exponentially weighted average of squares: average = decay * average + (gain * x) * x.

    In torch's order: gain * x first, so that x * x neither overflows nor underflows where torch's would not.

    Args:
        average: Shape (n,), updated in place.
        x: Shape (n,).
        decay: b, as a coefficient.
        gain: 1 - b, as a coefficient.
        term: Shape (n,), overwritten.
    """
    if x.device.type == "cpu" and isinstance(gain, float) and isinstance(decay, float):
        torch.addcmul(_MINUS_ZERO[x.dtype], x, x, value=gain, out=term)
        torch.addcmul(term, average, _ONE[x.dtype], value=decay, out=average)
    else:
        torch.mul(x, gain, out=term)
        term.mul_(x)
        average.mul_(decay).add_(term)


def add_scaled_(total: Tensor, x: Tensor, gain: scalars.Scalar, term: Tensor) -> None:
    """Add a multiple, total += gain * x, rounding twice (see [Note: one rounding per operation]).

    Args:
        total: Shape (n,), updated in place.
        x: Shape (n,).
        gain: As a coefficient.
        term: Shape (n,); may be overwritten, and may be x.
    """
    if x.device.type == "cpu" and isinstance(gain, float):
        total.addcmul_(x, _ONE[x.dtype], value=gain)
    else:
        total.add_(torch.mul(x, gain, out=term))


def add_quotient_(total: Tensor, x: Tensor, gain: scalars.Scalar, denominator: Tensor, term: Tensor) -> None:
    """Add a quotient, total += gain * x / denominator, rounding three times.

    Args:
        total: Shape (n,), updated in place.
        x: Shape (n,).
        gain: As a coefficient.
        denominator: Shape (n,).
        term: Shape (n,); may be overwritten, and may be x.
    """
    if x.device.type == "cpu" and isinstance(gain, float):
        total.addcdiv_(x, denominator, value=gain)
    else:
        total.add_(torch.mul(x, gain, out=term).div_(denominator))


def add_weight_decay_(grad: Tensor, weight: Tensor, weight_decay: scalars.Scalar, term: Tensor) -> None:
    """Add the gradient of an L2 penalty: grad += weight_decay * weight.

    Args:
        grad: Shape (n,), updated in place.
        weight: Shape (n,).
        weight_decay: As a coefficient.
        term: Shape (n,), overwritten.
    """
    add_scaled_(grad, weight, weight_decay, term)


def sqrt_into(x: Tensor, out: Tensor) -> None:
    """Write the square root of x to out (see [Note: square roots on the CPU]).

    Args:
        x: Shape (n,).
        out: Shape (n,); may be x.
    """
    if x.device.type == "cpu":
        torch.rsqrt(x, out=out)
        out.reciprocal_()
    else:
        torch.sqrt(x, out=out)


def is_zero(value: Any) -> bool:
    """Whether a hyper-parameter is known to be zero without waiting for a device."""
    if isinstance(value, Tensor) and not scalars.on_host(value):
        return False
    return float(value) == 0.0
