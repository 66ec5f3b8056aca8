"""One step of each rule from its published formula, in float64: what `check_updates` measures kernels against.

Nothing here is shared with `distadam.rules` or `distadam.kernels`. Beside every number stands S, the sum of the
absolute values of the terms that it is made of, which the bound of contract 2.3.1 is relative to: |error| is at most
4 x 2^-23 x S for an update that computes in float32. Where a term is itself a rounded sum (g + weight_decay w), its own
absolute terms stand for it.

Note [Underflow]: a square of |g| < 2^-63 is subnormal in float32 and loses its relative precision, of which a formula
in float64 knows nothing. So a weight may also be wrong by as much as it changes when its second moment changes by a few
units of the smallest float32; above 2^-126 that is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

UNITS = 4.0
"""The bound, in units of the compute dtype's epsilon times S (contract 2.3.1)."""

_SMALLEST = {torch.float32: 2.0**-147, torch.float64: 0.0}


@dataclass(frozen=True, slots=True)
class Exact:
    """A result in float64, 1-D: its value, S, and what it may be wrong by beside the bound."""

    value: Tensor
    scale: Tensor
    slack: float | Tensor = 0.0

    def __mul__(self, factor: float) -> Exact:
        return Exact(self.value * factor, self.scale * abs(factor))

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value, self.scale + other.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """Sampled elements of a parameter before a step, all 1-D float64.

    Args:
        weight: what the update reads: the master where there is one.
        grad: the averaged and scaled gradient, rounded to the compute dtype.
        state: torch's states by name.
        step: the number of this step, from 1.
        dtype: what the kernels compute in.
    """

    weight: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]
    step: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class After:
    """What a step makes of the weights and the states."""

    weight: Exact
    state: dict[str, Exact] = field(default_factory=dict)


def exact(value: Tensor) -> Exact:
    """Return a given number: it has no error, and is its own S."""
    return Exact(value, value.abs())


def _gradient(group: Mapping[str, Any], before: Before, *, decoupled: bool) -> Exact:
    grad = exact(-before.grad if group["maximize"] else before.grad)
    decay = float(group["weight_decay"])
    return grad if decoupled or decay == 0 else grad + exact(before.weight) * decay


def _average(old: Tensor, new: Exact, decay: float) -> Exact:
    return exact(old) * decay + new * (1 - decay)


def _square(x: Exact) -> Exact:
    return Exact(x.value**2, x.scale**2)


def _ratio(
    top: Exact, square: Exact, radicand: Callable[[Tensor], Tensor], dtype: torch.dtype, size: float = 1.0
) -> Exact:
    """Return size x top / denominator, where ``radicand`` makes the denominator of a second moment.

    The slack is what a few units of the smallest number in the second moment change; see Note [Underflow].
    """
    limit = torch.finfo(dtype).max
    moment = torch.where(square.value > limit, math.inf, square.value)
    denominator = radicand(moment)
    value, scale = size * top.value / denominator, size * top.scale / denominator
    unit = _SMALLEST[dtype]
    if not unit:
        return Exact(value, scale)
    lower, upper = radicand((moment - unit).clamp_min(0)), radicand(moment + unit)
    slack = size * top.scale * (1 / lower - 1 / upper)
    return Exact(value, scale, torch.where(slack.isfinite(), slack, math.inf))


def _minus(weight: Exact, update: Exact) -> Exact:
    return Exact(weight.value - update.value, weight.scale + update.scale, update.slack)


def adam(group: Mapping[str, Any], before: Before, *, decoupled: bool) -> After:
    """Return Adam's step, AdamW's with ``decoupled``.

    Source: https://arxiv.org/abs/1412.6980 (algorithm 1), https://arxiv.org/abs/1711.05101 (algorithm 2),
    https://openreview.net/forum?id=ryQu7f-RZ (AMSGrad, torch's form: the maximum before bias correction).
    """
    beta1, beta2 = map(float, group["betas"])
    lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
    grad = _gradient(group, before, decoupled=decoupled)
    mean = _average(before.state["exp_avg"], grad, beta1)
    square = _average(before.state["exp_avg_sq"], _square(grad), beta2)
    state = {"exp_avg": mean, "exp_avg_sq": square}
    if group["amsgrad"]:
        old = before.state["max_exp_avg_sq"]
        square = Exact(torch.maximum(old, square.value), torch.maximum(old.abs(), square.scale))
        state["max_exp_avg_sq"] = square
    correction1, correction2 = 1 - beta1**before.step, 1 - beta2**before.step
    update = _ratio(mean, square, lambda v: (v / correction2).sqrt() + eps, before.dtype, lr / correction1)
    kept = exact(before.weight) * (1 - lr * decay if decoupled else 1.0)
    return After(_minus(kept, update), state)


def sgd(group: Mapping[str, Any], before: Before) -> After:
    """Return SGD's step by torch's definition: the first buffer is the gradient, undampened."""
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    grad = direction = _gradient(group, before, decoupled=False)
    state = {}
    if momentum != 0:
        if before.step > 1:
            direction = exact(before.state["momentum_buffer"]) * momentum + grad * (1 - dampening)
        state["momentum_buffer"] = direction
        if group["nesterov"]:
            direction = grad + direction * momentum
    return After(_minus(exact(before.weight), direction * float(group["lr"])), state)


def rmsprop(group: Mapping[str, Any], before: Before) -> After:
    """Return RMSprop's step by torch's definition.

    Source: https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf, https://arxiv.org/abs/1308.0850.
    """
    alpha, eps, momentum = float(group["alpha"]), float(group["eps"]), float(group["momentum"])
    grad = _gradient(group, before, decoupled=False)
    square = _average(before.state["square_avg"], _square(grad), alpha)
    state = {"square_avg": square}
    if group["centered"]:
        mean = _average(before.state["grad_avg"], grad, alpha)
        state["grad_avg"] = mean
        variance = square.value - mean.value**2
        # A difference: its terms over itself are what the quotient's error grows by.
        condition = (square.scale + mean.scale**2) / variance
        top = Exact(grad.value, grad.scale * condition.clamp_min(1))
        update = _ratio(top, square, lambda v: (v - mean.value**2).clamp_min(0).sqrt() + eps, before.dtype)
    else:
        update = _ratio(grad, square, lambda v: v.sqrt() + eps, before.dtype)
    if momentum > 0:
        update = Exact(
            before.state["momentum_buffer"] * momentum + update.value,
            before.state["momentum_buffer"].abs() * momentum + update.scale,
            update.slack,
        )
        state["momentum_buffer"] = update
    lr = float(group["lr"])
    return After(
        _minus(exact(before.weight), Exact(update.value * lr, update.scale * lr, update.slack * lr)),
        state,
    )


FORMULAS: dict[str, Callable[[Mapping[str, Any], Before], After]] = {
    "adam": lambda group, before: adam(group, before, decoupled=bool(group.get("decoupled_weight_decay"))),
    "adamw": lambda group, before: adam(group, before, decoupled=True),
    "sgd": sgd,
    "rmsprop": rmsprop,
}
