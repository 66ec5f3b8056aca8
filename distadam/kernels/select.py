"""Which kernel serves which update, why, and why not the faster one.

Fastest first: Triton (on CUDA: one launch a bucket, every storage), torch's fused operations (storages that they do not
know are loaded and stored in chunks), the reference kernel.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from distadam.errors import ConfigError
from distadam.kernels.reference import ReferenceKernel
from distadam.kernels.torch_fused import TorchFusedKernel
from distadam.kernels.update import Kernel
from distadam.rules import Adam, Allocate, Rule, Sgd

ENVIRONMENT_VARIABLE = "DISTADAM_KERNEL"

_INSTALL = "pip install triton"

_NAMES = (ReferenceKernel.name, TorchFusedKernel.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A kernel and the reason for it, as `kernel_report()` shows them.

    Attributes:
        name: What `make_kernel` takes.
        reason: Why this one; one clause, for people.
        obstacle: Why not the faster one; None where there is none, or where `reason` says it.
    """

    name: str
    reason: str
    obstacle: str | None = None

    def __str__(self) -> str:
        return self.reason if self.obstacle is None else f"{self.reason}; not triton: {self.obstacle}"


def select(rule: Rule, group: Mapping[str, Any], compute_dtype: torch.dtype, device_type: str) -> Choice:
    """Choose the kernel for a rule under a group's options.

    Args:
        rule: The update rule.
        group: torch's param_group dict.
        compute_dtype: The dtype of weights, gradients and states in the update.
        device_type: "cpu", "cuda", "meta", ...

    Returns:
        torch's fused operation where there is one that never syncs, the reference kernel otherwise; or what the
        environment variable DISTADAM_KERNEL says.

    Raises:
        ConfigError: DISTADAM_KERNEL names no kernel, or one that cannot serve this update.

    Syncs: never.
    """
    obstacle = _fused_obstacle(rule, group, compute_dtype, device_type)
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced is not None:
        return _forced(forced, rule, obstacle)
    not_triton = triton_obstacle(device_type)
    if obstacle is not None:
        return Choice(name=ReferenceKernel.name, reason=obstacle, obstacle=not_triton)
    return Choice(name=TorchFusedKernel.name, reason=f"torch fuses {rule.name} on {device_type}", obstacle=not_triton)


def triton_obstacle(device_type: str) -> str | None:
    """Say why a Triton kernel cannot serve a CUDA update; None on devices that have no Triton kernels.

    Warns once when all that is missing is Triton.
    """
    if device_type != "cuda":
        return None
    if find_spec("triton") is None:
        _warn_of_missing_triton()
        return f"Triton is not installed ({_INSTALL})"
    return "there is no Triton kernel for this rule"


@cache
def _warn_of_missing_triton() -> None:
    warnings.warn(
        f"distadam: Triton is not installed, so updates on CUDA devices use torch's own operations; {_INSTALL}",
        stacklevel=2,
    )


def make_kernel(name: str, allocate: Allocate) -> Kernel:
    """Build the kernel of a `Choice`.

    Args:
        name: "reference" or "torch_fused".
        allocate: Makes the kernel's scratch buffers.

    Raises:
        ConfigError: There is no kernel of that name.
    """
    if name == ReferenceKernel.name:
        return ReferenceKernel(allocate)
    if name == TorchFusedKernel.name:
        return TorchFusedKernel(allocate)
    raise ConfigError(f"kernel: expected one of {', '.join(_NAMES)} but got {name!r}")


def _forced(forced: str, rule: Rule, obstacle: str | None) -> Choice:
    if forced not in _NAMES:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(_NAMES)} but got {forced!r}; unset it or correct it"
        )
    if forced == TorchFusedKernel.name and obstacle is not None:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={forced}: expected an update that torch fuses but for {rule.name} {obstacle}; "
            f"unset it or set it to {ReferenceKernel.name}"
        )
    return Choice(name=forced, reason=f"{ENVIRONMENT_VARIABLE}={forced}")


def _fused_obstacle(rule: Rule, group: Mapping[str, Any], compute_dtype: torch.dtype, device_type: str) -> str | None:
    """Say why torch's fused operation cannot serve the update, or None if it can."""
    if rule.name == "rmsprop":
        return "torch has no fused RMSprop"
    if not isinstance(rule, (Adam, Sgd)):
        return f"torch has no fused {rule.name}"
    if compute_dtype not in (torch.float32, torch.float64):
        return f"torch's fused {rule.name} is used for float32 and float64, not {compute_dtype}"
    if device_type not in ("cpu", "cuda", "meta"):
        return f"torch's fused {rule.name} is not checked on {device_type}"
    if isinstance(rule, Adam) and any(_is_on_device(beta) for beta in group["betas"]):
        return "torch's fused operation takes numbers for betas, and reading them would be a host sync"
    if _is_on_device(group["weight_decay"]):
        return "torch's fused operation takes a number for weight_decay, and reading one would be a host sync"
    if isinstance(rule, Sgd) and device_type != "cpu" and group["momentum"] != 0 and group["dampening"] != 0:
        return "with dampening the first SGD step differs, and only the device knows which step is the first"
    return None


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
