"""SGD, with momentum and Nesterov momentum by torch's definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distadam.rules import scalars as scalars_module
from distadam.rules.rule import TERM, Rule, add_scaled_, add_weight_decay_, is_zero
from distadam.rules.scalars import Scalars
from distadam.rules.scratch import Scratch


class Sgd(Rule):
    """Stochastic gradient descent.

        buf_1 = g_1,   buf_t = mu buf_{t-1} + (1 - dampening) g_t
        w_t = w_{t-1} - lr buf_t                       (Nesterov: g_t + mu buf_t for buf_t; mu = 0: g_t)

    with g_t + weight_decay w_{t-1} for g_t. torch knows the first step by the absence of a buffer; here it is
    step == 1, since the buffer is part of a flat one that always exists.

    Source: `torch.optim.SGD`.
    """

    name = "sgd"
    has_step = False

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return momentum_buffer if there is momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

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
        momentum = float(group["momentum"])

        if group["maximize"]:
            grad.neg_()
        if not is_zero(group["weight_decay"]):
            add_weight_decay_(grad, weight, scalars.coefficient(scalars.read(group["weight_decay"])), term)
        direction = grad
        if momentum != 0:
            buffer = state["momentum_buffer"]
            _advance_buffer_(buffer, grad, step, group, scratch)
            if group["nesterov"]:
                add_scaled_(grad, buffer, momentum, term)
            else:
                direction = buffer
        negative_lr = scalars.neg(scalars.read(group["lr"]))
        add_scaled_(weight, direction, scalars.coefficient(negative_lr), term)


def _advance_buffer_(buffer: Tensor, grad: Tensor, step: Tensor, group: Mapping[str, Any], scratch: Scratch) -> None:
    """Bring the momentum buffer from t - 1 to t."""
    host_knows = scalars_module.on_host(step)
    if host_knows and float(step) == 1.0:
        buffer.copy_(grad)
        return
    gain = 1.0 - float(group["dampening"])
    buffer.mul_(float(group["momentum"]))
    if gain == 1.0:
        buffer.add_(grad)
    else:
        add_scaled_(buffer, grad, gain, scratch.get(TERM, grad.numel(), grad.dtype, grad.device))
    if not host_knows:
        is_first = torch.eq(step, 1.0, out=scratch.scalar(0, torch.bool, step.device))
        torch.where(is_first, grad, buffer, out=buffer)
