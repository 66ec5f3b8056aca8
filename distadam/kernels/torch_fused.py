"""torch's own fused optimizer operations, over the ranges of flat buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distadam.errors import UsageError
from distadam.kernels.chunks import Chunks
from distadam.kernels.reference import is_skipped
from distadam.kernels.update import DirectViews, GradScaling, GroupRanges, ShardUpdate
from distadam.rules import Adam, Allocate, Rule, Scratch, Sgd

_CPU_CHUNK = 262_144
"""Elements a chunk on the CPU: with less, calls cost more than the cache saves (8-bit moments with AdamW, 10M elements,
AMD EPYC, 1 thread: 24 ns an element at 32 Ki, 10 at 128 Ki, 8 at 256 Ki and 512 Ki)."""

_DEVICE_CHUNK = 4_194_304


class TorchFusedKernel:
    """`torch._fused_adam_`, `_fused_adamw_` and `_fused_sgd_`: one call for all ranges of a group wherever possible.

    Storages that the operations do not know are loaded, a chunk at a time, into scratch that they do, and stored again.

    The operations read the step counts and do not advance them; `torch.optim` advances before the call, and so does
    our caller.

    [Note: what the fused operations take]
        `grad_scale` and `found_inf` must be float32 whatever the compute dtype, and only the value 1 of `found_inf`
        skips: 2, the sum over two ranks, would be taken for "all finite". `grad_scale` is a true division, written
        back to the gradient, the same bits as a division beforehand.
    """

    name = "torch_fused"

    def __init__(self, allocate: Allocate | None = None) -> None:
        self._allocate = allocate or _empty
        self._flags: dict[torch.device, Tensor] = {}
        self._chunks = Chunks(Scratch(self._allocate), _CPU_CHUNK, _DEVICE_CHUNK)

    def update(self, rule: Rule, update: ShardUpdate, scaling: GradScaling) -> None:
        """Scale the gradients, update and store; see `Kernel.update`.

        Args:
            rule: Adam, AdamW or SGD.
            update: What to update.
            scaling: What to do to the gradients first.

        Raises:
            UsageError: torch has no fused operation for the rule, or only the device knows which SGD step is the first
                and dampening makes a difference; `select` sends neither here.

        Syncs: never.
        """
        if update.device.type == "meta":
            update.validate(rule)
        found_inf = self._found_inf(scaling.found_inf)
        for ranges in update.ranges:
            names = rule.state_names(ranges.group)
            views = update.direct(ranges, names)
            if not ranges.spans:
                continue
            if views is None:
                self._update_chunks(rule, update, ranges, scaling, found_inf)
                continue
            grad_scale = _scale_(views.grads, scaling)
            _run(rule, views, ranges.steps, ranges.first, ranges.group, grad_scale, found_inf)
            if update.weights.stores:
                for (start, end), value, step in zip(ranges.spans, views.weights, ranges.steps, strict=True):
                    update.weights.store(start, end, value, step, self._chunks.temporary)

    def _update_chunks(
        self, rule: Rule, update: ShardUpdate, ranges: GroupRanges, scaling: GradScaling, found_inf: Tensor | None
    ) -> None:
        if is_skipped(found_inf):
            return
        names = rule.state_names(ranges.group)
        skip = None if found_inf is None or found_inf.device.type == "cpu" else found_inf != 0
        for chunk in self._chunks.walk(update, ranges, names, skip):
            views = DirectViews(
                weights=[chunk.weight], grads=[chunk.grad], states={name: [t] for name, t in chunk.state.items()}
            )
            grad_scale = _scale_(views.grads, scaling)
            step, first = ranges.steps[chunk.index], ranges.first[chunk.index]
            _run(rule, views, [step], [first], ranges.group, grad_scale, found_inf)

    def _found_inf(self, found_inf: Tensor | None) -> Tensor | None:
        """Turn "not 0" into 1, in float32 (see [Note: what the fused operations take])."""
        if found_inf is None:
            return None
        flag = self._flags.get(found_inf.device)
        if flag is None:
            flag = self._flags[found_inf.device] = self._allocate(1, torch.float32, found_inf.device).view(())
        return torch.ne(found_inf.reshape(()), 0.0, out=flag)


def _empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


def _scale_(grads: list[Tensor], scaling: GradScaling) -> Tensor | None:
    """Apply the factors in place, or return the only one if the operation can apply it for free."""
    divisors = [divisor for divisor in (scaling.num_ranks, scaling.loss_scale) if divisor is not None]
    if len(divisors) == 1 and not scaling.multipliers and divisors[0].dtype == torch.float32:
        return divisors[0]
    if scaling.num_ranks is not None:
        torch._foreach_div_(grads, scaling.num_ranks)
    for multiplier in scaling.multipliers:
        torch._foreach_mul_(grads, multiplier)
    if scaling.loss_scale is not None:
        torch._foreach_div_(grads, scaling.loss_scale)
    return None


def _run(
    rule: Rule,
    views: DirectViews,
    steps: list[Tensor],
    first: list[bool | None],
    group: Mapping[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if isinstance(rule, Adam):
        _adam_(rule, views, steps, group, grad_scale, found_inf)
    elif isinstance(rule, Sgd):
        _sgd_(views, steps, first, group, grad_scale, found_inf)
    else:
        raise UsageError(
            f"torch_fused: expected adam, adamw or sgd but got {rule.name}, which torch does not fuse; "
            "use the reference kernel"
        )


def _adam_(
    rule: Adam,
    views: DirectViews,
    steps: list[Tensor],
    group: Mapping[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lr = _lr(group["lr"], views.weights[0])
    if isinstance(lr, Tensor) and views.weights[0].is_meta:
        # The overloads for tensor lr have no meta kernel; what one would check, validate() has checked.
        return
    operation = torch._fused_adamw_ if rule.decouples_weight_decay(group) else torch._fused_adam_
    operation(
        views.weights,
        views.grads,
        views.states["exp_avg"],
        views.states["exp_avg_sq"],
        views.states.get("max_exp_avg_sq", []),
        steps,
        amsgrad=group["amsgrad"],
        lr=lr,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def _sgd_(
    views: DirectViews,
    steps: list[Tensor],
    first: list[bool | None],
    group: Mapping[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lr = _lr(group["lr"], views.weights[0])
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    buffers = views.states.get("momentum_buffer", [])
    firsts = [_is_first(*known, dampening) for known in zip(first, steps, strict=True)] if buffers else [False]
    if views.weights[0].is_meta:
        # torch._fused_sgd_ has no meta kernel; what one would check, validate() has checked.
        return
    for is_first_step in sorted(set(firsts)):
        # One call, on the caller's own lists, unless ranges took their first steps at different times.
        chosen = None if len(set(firsts)) == 1 else [i for i, f in enumerate(firsts) if f is is_first_step]
        torch._fused_sgd_(
            _pick(views.weights, chosen),
            _pick(views.grads, chosen),
            _pick(buffers, chosen),
            weight_decay=float(group["weight_decay"]),
            momentum=momentum,
            lr=lr,
            dampening=dampening,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=is_first_step,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )


def _is_first(first: bool | None, step: Tensor, dampening: float) -> bool:
    """Decide a range's `is_first_step`, from the host's knowledge alone."""
    if first is not None:
        return first
    if step.device.type == "cpu":
        return float(step) == 1.0
    if dampening != 0:
        raise UsageError(
            f"torch_fused: expected dampening 0 where only {step.device} knows which step is the first but "
            f"got {dampening}; use the reference kernel"
        )
    # Buffers start as zeros, so mu * 0 + g is the first step too (but for -0.0, which becomes 0.0 in the buffer).
    return False


def _pick(tensors: list[Tensor], chosen: list[int] | None) -> list[Tensor]:
    return tensors if chosen is None or not tensors else [tensors[i] for i in chosen]


def _lr(lr: Any, weight: Tensor) -> float | Tensor:
    """Take lr as the operations want it: a number, or a tensor that is 0-D and on the CPU or on the weight's device."""
    if not isinstance(lr, Tensor):
        return float(lr)
    if weight.is_meta and lr.device.type == "cpu":
        return float(lr)
    scalar: Tensor = lr.reshape(())
    if scalar.device.type != "cpu" and scalar.device != weight.device:
        return scalar.to(weight.device, non_blocking=True)
    return scalar
