"""Which kernel serves which update, why, and why not the faster one.

Fastest first: Triton (on CUDA: one launch a bucket, every storage) and the compiled kernel (on the CPU: one pass, every
storage), torch's fused operations (storages that they do not know are loaded and stored in chunks), the reference
kernel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distadam.errors import ConfigError
from distadam.kernels.compiled import COMPILED, CompiledKernel, compiled_obstacle
from distadam.kernels.reference import ReferenceKernel
from distadam.kernels.torch_fused import TorchFusedKernel
from distadam.kernels.triton_select import TRITON, triton_obstacle
from distadam.kernels.update import Kernel, Upload
from distadam.rules import Adam, Allocate, Rule, Sgd

ENVIRONMENT_VARIABLE = "DISTADAM_KERNEL"

_NAMES = (ReferenceKernel.name, TorchFusedKernel.name, COMPILED, TRITON)


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
        return self.reason if self.obstacle is None else f"{self.reason}; {self.obstacle}"


def select(rule: Rule, group: Mapping[str, Any], compute_dtype: torch.dtype, device_type: str) -> Choice:
    """Choose the kernel for a rule under a group's options.

    Args:
        rule: The update rule.
        group: torch's param_group dict.
        compute_dtype: The dtype of weights, gradients and states in the update.
        device_type: "cpu", "cuda", "meta", ...

    Returns:
        Triton's kernel on CUDA, the compiled one on the CPU; where they cannot serve, and elsewhere, torch's fused
        operation if there is one that never syncs, else the reference kernel; or what the environment variable
        DISTADAM_KERNEL says. It may say triton on meta too, and on the CPU in Triton's interpreter.

    Raises:
        ConfigError: DISTADAM_KERNEL names no kernel, or one that cannot serve this update.

    Syncs: never.
    """
    obstacle = _fused_obstacle(rule, group, compute_dtype, device_type)
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced is not None:
        return _forced(forced, rule, group, compute_dtype, device_type, obstacle)
    not_faster = None
    if device_type == "cuda":
        not_triton = triton_obstacle(rule, group, compute_dtype, device_type)
        if not_triton is None:
            return Choice(name=TRITON, reason="one pass over memory, one launch for a bucket")
        not_faster = f"not {TRITON}: {not_triton}"
    elif device_type == "cpu":
        not_compiled = compiled_obstacle(rule, group, compute_dtype, device_type)
        if not_compiled is None:
            return Choice(name=COMPILED, reason="one pass over memory, which adds up ranks' gradients on its way")
        not_faster = f"not {COMPILED}: {not_compiled}"
    if obstacle is not None:
        return Choice(name=ReferenceKernel.name, reason=obstacle, obstacle=not_faster)
    return Choice(name=TorchFusedKernel.name, reason=f"torch fuses {rule.name} on {device_type}", obstacle=not_faster)


def norm_in_one_pass(dtype: torch.dtype, device_type: str) -> bool:
    """Return whether Triton takes sums of squares of gradients of this dtype: where it may take updates."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced != TRITON and (forced is not None or device_type != "cuda"):
        return False
    return triton_obstacle(None, {}, torch.float64 if dtype == torch.float64 else torch.float32, device_type) is None


def _copy(host: Tensor, out: Tensor) -> None:
    out.copy_(host)


def make_kernel(name: str, allocate: Allocate, upload: Upload = _copy) -> Kernel:
    """Build the kernel of a `Choice`.

    Args:
        name: "reference", "torch_fused", "compiled" or "triton".
        allocate: Makes the kernel's scratch buffers.
        upload: Copies a CPU tensor to a device tensor without waiting for the device.

    Raises:
        ConfigError: There is no kernel of that name.
    """
    if name == ReferenceKernel.name:
        return ReferenceKernel(allocate)
    if name == TorchFusedKernel.name:
        return TorchFusedKernel(allocate)
    if name == COMPILED:
        return CompiledKernel()
    if name == TRITON:
        from distadam.kernels.triton_kernel import TritonKernel

        return TritonKernel(upload)
    raise ConfigError(f"kernel: expected one of {', '.join(_NAMES)} but got {name!r}")


def _forced(
    forced: str,
    rule: Rule,
    group: Mapping[str, Any],
    compute_dtype: torch.dtype,
    device_type: str,
    not_fused: str | None,
) -> Choice:
    if forced not in _NAMES:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(_NAMES)} but got {forced!r}; unset it or correct it"
        )
    if forced == TorchFusedKernel.name and not_fused is not None:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={forced}: expected an update that torch fuses but for {rule.name} {not_fused}; "
            f"unset it or set it to {ReferenceKernel.name}"
        )
    obstacles = {TRITON: triton_obstacle, COMPILED: compiled_obstacle}
    obstacle = obstacles[forced](rule, group, compute_dtype, device_type) if forced in obstacles else None
    if obstacle is not None:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={forced}: expected an update that it serves but {obstacle}; "
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
