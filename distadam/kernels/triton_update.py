"""The update kernels as one operator, and the tables that its launches read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distadam.errors import UsageError
from distadam.kernels import triton_kernels as kernels
from distadam.kernels import triton_math as math
from distadam.kernels.triton_launch import GRADIENT_DTYPES, Launch, define, describe
from distadam.kernels.triton_storage import WIDTH

UNIT: int = kernels.UNIT.value
BLOCK: int = kernels.BLOCK
NUM_COLUMNS: int = kernels.NUM_COLUMNS.value
NUM_HYPER: int = math.NUM_HYPER.value
NUM_COEFFICIENTS: int = math.NUM_COEFFICIENTS.value
WEIGHT_DTYPES = {
    "own": (torch.float32,),
    "fp32": (torch.bfloat16, torch.float16),
    "split": (torch.bfloat16,),
    "stochastic": (torch.bfloat16,),
    "none": (torch.bfloat16, torch.float16),
}
"""The parameter's dtype by weight storage; names as in `precision.StorageChoice`."""

EXTRA_DTYPES = {"fp32": torch.float32, "split": torch.int16}
MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}


class RuleKernels(NamedTuple):
    """The kernels of a rule.

    Attributes:
        update: Updates one chunk.
        coefficients: Computes one row.
        flags: The update's compile-time options, in the operator's order; the last is MAXIMIZE.
        shared: Which of them `coefficients` takes too.
        states: Every state that the rule can have, with the flag that decides (None: always).
        hyper: Reads a group's line of the table of hyper-parameters.
    """

    update: Any
    coefficients: Any
    flags: tuple[str, str, str]
    shared: tuple[str, ...]
    states: tuple[tuple[str, str | None], ...]
    hyper: Callable[[Mapping[str, Any]], tuple[Any, ...]]


RULES: Mapping[str, RuleKernels] = {
    "adam": RuleKernels(
        update=kernels.adam_kernel,
        coefficients=math.adam_coefficients,
        flags=("DECOUPLED", "AMSGRAD", "MAXIMIZE"),
        shared=("DECOUPLED",),
        states=(("exp_avg", None), ("exp_avg_sq", None), ("max_exp_avg_sq", "AMSGRAD")),
        hyper=lambda group: (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
    ),
    "sgd": RuleKernels(
        update=kernels.sgd_kernel,
        coefficients=math.sgd_coefficients,
        flags=("MOMENTUM", "NESTEROV", "MAXIMIZE"),
        shared=("MOMENTUM",),
        states=(("momentum_buffer", "MOMENTUM"),),
        hyper=lambda group: (group["lr"], group["momentum"], group["dampening"], group["weight_decay"]),
    ),
    "rmsprop": RuleKernels(
        update=kernels.rmsprop_kernel,
        coefficients=math.rmsprop_coefficients,
        flags=("MOMENTUM", "CENTERED", "MAXIMIZE"),
        shared=(),
        states=(("square_avg", None), ("momentum_buffer", "MOMENTUM"), ("grad_avg", "CENTERED")),
        hyper=lambda group: (group["lr"], group["alpha"], group["eps"], group["weight_decay"], group["momentum"]),
    ),
}


def update_launches(
    grad: Tensor,
    param: Tensor,
    extra: Tensor | None,
    states: list[Tensor],
    scales: list[Tensor],
    keys: list[Tensor | None],
    chunks: Tensor,
    rows: Tensor,
    hyper: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    num_ranks: Tensor | None,
    multiplier0: Tensor | None,
    multiplier1: Tensor | None,
    loss_scale: Tensor | None,
    found_inf: Tensor | None,
    rule: str,
    weights: str,
    moments: str,
    flags: list[bool],
) -> list[Launch]:
    """Return the launches of the operator `update`, whose arguments these are."""
    spec = RULES[rule]
    options: dict[str, Any] = dict(zip(spec.flags, map(bool, flags), strict=True))
    arguments = {"grad": grad, "param": param, "extra": extra, "chunks": chunks, "coefficients": coefficients}
    factors = {"num_ranks": num_ranks, "multiplier0": multiplier0, "multiplier1": multiplier1, "loss_scale": loss_scale}
    present, absent = _states(spec, flags)
    for name in absent:
        arguments |= {name: None, f"{name}_scale": None, f"{name}_keys": None}
    for i, name in enumerate(present):
        arguments[name] = states[i]
        arguments[f"{name}_scale"] = scales[i] if scales else None
        arguments[f"{name}_keys"] = keys[2 + i] if keys else None
    arguments |= {"lanes": keys[0] if keys else None, "weight_keys": keys[1] if keys else None}
    constants = {"WEIGHTS": weights, "MOMENTS": moments, "BLOCK": BLOCK, **options}
    shared = {flag: options[flag] for flag in spec.shared}
    row_arguments = {"coefficients": coefficients, "rows": rows, "hyper": hyper, "steps": steps, **shared}
    return [
        Launch(spec.coefficients, rows.shape[0], row_arguments, math.OPTIONS),
        Launch(
            spec.update, chunks.shape[0], arguments | factors | {"found_inf": found_inf} | constants, kernels.OPTIONS
        ),
    ]


def _states(spec: RuleKernels, flags: Sequence[bool]) -> tuple[list[str], list[str]]:
    """Return the states that there are and those that there are not."""
    on = {flag for flag, value in zip(spec.flags, flags, strict=True) if value}
    present = [name for name, flag in spec.states if flag is None or flag in on]
    return present, [name for name, _ in spec.states if name not in present]


def _check(
    grad: Tensor,
    param: Tensor,
    extra: Tensor | None,
    states: list[Tensor],
    scales: list[Tensor],
    keys: list[Tensor | None],
    chunks: Tensor,
    rows: Tensor,
    hyper: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    num_ranks: Tensor | None,
    multiplier0: Tensor | None,
    multiplier1: Tensor | None,
    loss_scale: Tensor | None,
    found_inf: Tensor | None,
    rule: str,
    weights: str,
    moments: str,
    flags: list[bool],
) -> None:
    """Check what the kernels take for granted; on the meta device this is all that runs."""
    numel, blocks = grad.numel(), -(-grad.numel() // WIDTH.value)
    if weights not in WEIGHT_DTYPES or moments not in MOMENT_DTYPES:
        raise UsageError(
            f"triton: expected weights of {tuple(WEIGHT_DTYPES)} and moments of {tuple(MOMENT_DTYPES)} but got "
            f"{weights!r} and {moments!r}"
        )
    _expect("grad", grad, numel, GRADIENT_DTYPES)
    _expect("param", param, numel, WEIGHT_DTYPES[weights])
    if (extra is None) != (weights not in EXTRA_DTYPES):
        raise UsageError(f"triton: expected extra weights exactly where weights are of {tuple(EXTRA_DTYPES)}")
    if extra is not None:
        _expect("extra", extra, numel, (EXTRA_DTYPES[weights],))
    present, _ = _states(RULES[rule], flags)
    if len(states) != len(present) or len(scales) != (len(present) if moments == "8bit" else 0):
        raise UsageError(f"triton {rule}: expected states {present} but got {len(states)} and {len(scales)} scales")
    for name, state in zip(present, states, strict=True):
        _expect(name, state, numel, (MOMENT_DTYPES[moments],))
    for name, scale in zip(present, scales, strict=False):
        _expect(f"{name}'s scales", scale, blocks, (torch.float32,))
    for key in keys:
        if key is not None:
            _expect("keys", key, blocks, (torch.int32,))
    _expect("chunks", chunks.view(-1), chunks.shape[0] * NUM_COLUMNS, (torch.int32,))
    _expect("rows", rows.view(-1), rows.shape[0] * 2, (torch.int32,))
    _expect("hyper", hyper.view(-1), hyper.shape[0] * NUM_HYPER, (torch.float64,))
    _expect("steps", steps, steps.numel(), (torch.float32,))
    _expect("coefficients", coefficients.view(-1), rows.shape[0] * NUM_COEFFICIENTS, (torch.float32,))
    for factor in (num_ranks, multiplier0, multiplier1, loss_scale, found_inf):
        if factor is not None:
            _expect("factor", factor.view(-1), 1, (torch.float32,))


def _expect(what: str, tensor: Tensor, numel: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dim() != 1 or tensor.numel() != numel or not tensor.is_contiguous() or tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise UsageError(f"triton: expected {what} 1-D, contiguous, {numel} of {names} but got {describe(tensor)}")


update = define(
    "update(Tensor grad, Tensor(a!) param, Tensor(b!)? extra, Tensor(c!)[] states, Tensor(d!)[] scales, "
    "Tensor?[] keys, Tensor chunks, Tensor rows, Tensor hyper, Tensor steps, Tensor(e!) coefficients, "
    "Tensor? num_ranks, Tensor? multiplier0, Tensor? multiplier1, Tensor? loss_scale, Tensor? found_inf, "
    "str rule, str weights, str moments, bool[] flags) -> ()",
    _check,
    update_launches,
)
"""Update a shard; see `update_launches` for the arguments and [Note: chunks] in triton_kernels.py."""
