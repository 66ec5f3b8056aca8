"""Whether Triton's kernels can serve an update, asked without importing Triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
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
        return _missing(f"Triton is not installed ({INSTALL})", device_type)
    if device_type == "cuda" and not _has_compiler():
        return _missing("Triton finds no C compiler for its launchers (apt-get install gcc, or set CC)", device_type)
    if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST:
        return "Triton's kernels need compute capability 8.0"
    return None


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _has_compiler() -> bool:
    """Say whether Triton will find a compiler, as it looks for one: without it the first launch would raise."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _missing(what: str, device_type: str) -> str:
    if device_type == "cuda":
        _warn(what)
    return what


@cache
def _warn(what: str) -> None:
    warnings.warn(
        f"distadam: {what}, so the optimizer updates with torch's fused operations: several passes over memory instead "
        "of one.",
        stacklevel=2,
    )
