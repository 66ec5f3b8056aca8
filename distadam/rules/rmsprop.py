"""RMSprop: plain, centered, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distadam.rules.rule import (
    TERM,
    Rule,
    add_quotient_,
    add_scaled_,
    add_weight_decay_,
    ewa_,
    ewa_of_square_,
    is_zero,
    sqrt_into,
)
from distadam.rules.scalars import Scalars
from distadam.rules.scratch import Scratch


class RmsProp(Rule):
    """RMSprop by torch's definition.

        v_t = a v_{t-1} + (1 - a) g_t^2
        w_t = w_{t-1} - lr g_t / (sqrt(v_t) + eps)

    with g_t + weight_decay w_{t-1} for g_t. Centered: v_t - u_t^2 under the root, u_t = a u_{t-1} + (1 - a) g_t.
    With momentum: buf_t = mu buf_{t-1} + g_t / (sqrt(v_t) + eps) and w_t = w_{t-1} - lr buf_t.

    Deviation from torch: centered, where u_t^2 overflows (|u_t| > 1.8e19 in fp32, v_t long infinite), the update is
    NaN; torch's fused multiply-add never forms u_t^2 and takes a step of 0.

    Source: https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf, https://arxiv.org/abs/1308.0850
    (centered), `torch.optim.RMSprop`.
    """

    name = "rmsprop"
    has_step = True

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return square_avg, then momentum_buffer with momentum, then grad_avg when centered."""
        names = ["square_avg"]
        if group["momentum"] > 0:
            names.append("momentum_buffer")
        if group["centered"]:
            names.append("grad_avg")
        return tuple(names)

    def _update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        step: Tensor,
        group: Mapping[str, Any],
        scratch: Scratch,
    ) -> None:
        term = scratch.get(TERM, weight.numel(), weight.dtype, weight.device)
        scalars = Scalars(scratch, weight.dtype, weight.device)
        alpha = float(group["alpha"])
        negative_lr = scalars.coefficient(scalars.neg(scalars.read(group["lr"])))

        if group["maximize"]:
            grad.neg_()
        if not is_zero(group["weight_decay"]):
            add_weight_decay_(grad, weight, scalars.coefficient(scalars.read(group["weight_decay"])), term)
        square_avg = state["square_avg"]
        ewa_of_square_(square_avg, grad, alpha, 1.0 - alpha, term)
        denominator = term
        if group["centered"]:
            grad_avg = state["grad_avg"]
            ewa_(grad_avg, grad, alpha, 1.0 - alpha, term)
            torch.mul(grad_avg, grad_avg, out=denominator)
            torch.sub(square_avg, denominator, out=denominator)
            sqrt_into(denominator, out=denominator)
        else:
            sqrt_into(square_avg, out=denominator)
        denominator.add_(float(group["eps"]))
        if group["momentum"] > 0:
            buffer = state["momentum_buffer"]
            buffer.mul_(float(group["momentum"])).add_(grad.div_(denominator))
            add_scaled_(weight, buffer, negative_lr, term)
        else:
            add_quotient_(weight, grad, negative_lr, denominator, grad)
