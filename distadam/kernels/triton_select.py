"""Whether Triton's kernels can serve an update, asked without importing Triton."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from distadam.rules import Rule

TRITON = "triton"
INSTALL = "pip install 'distadam[triton]'"

_RULES = ("adam", "adamw", "sgd", "rmsprop")
_OLDEST = (8, 0)
"""Compute capability: bfloat16 arithmetic and `max` that keeps NaN."""


def triton_obstacle(
    rule: Rule | None, group: Mapping[str, Any], compute_dtype: torch.dtype, device_type: str
) -> str | None:
    """Say why Triton's kernels cannot serve the update, or None if they can.

    Args:
        rule: The update rule; None asks about gradients' norms.
        group: torch's param_group dict.
        compute_dtype: The dtype of the update.
        device_type: "cuda"; "meta" stands for it in dry runs, and "cpu" in Triton's interpreter.

    Syncs: never.
    """
    if rule is not None and rule.name not in _RULES:
        return f"there is no Triton kernel for {rule.name}"
    if compute_dtype != torch.float32:
        return f"Triton's kernels compute in float32, not {compute_dtype}"
    if group.get("eps") == 0:
        return "with eps=0 padding must be masked, which Triton's kernels do not"
    if device_type not in ("cuda", "meta", "cpu"):
        return f"Triton's kernels are not checked on {device_type}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU Triton has its interpreter only (TRITON_INTERPRET=1), which is for tests"
    if not _is_installed():
        if device_type == "cuda":
            _warn_missing()
        return f"Triton is not installed ({INSTALL})"
    if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST:
        return "Triton's kernels need compute capability 8.0"
    return None


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _warn_missing() -> None:
    warnings.warn(
        "distadam: Triton is not installed, so the optimizer updates with torch's fused operations: several passes "
        f"over memory instead of one. Install it with: {INSTALL}",
        stacklevel=2,
    )
