"""Which storages a parameter gets: the policy, what its group says instead, and its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from distadam.errors import ConfigError
from distadam.policies import PrecisionPolicy
from distadam.precision.counters import BLOCK

GROUP_KEYS = ("master", "moments")
"""Entries of a parameter group that stand for the policy's fields of the same names."""

_ALIGN = 64
_16_BIT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageChoice:
    """The storages of a bucket.

    Attributes:
        weights: "own" (fp32, fp64), "fp32" (a master), "split", "stochastic" or "none" (to nearest).
        moments: "fp32" (the compute dtype), "bf16" or "8bit".
    """

    weights: Literal["own", "fp32", "split", "stochastic", "none"]
    moments: Literal["fp32", "bf16", "8bit"]

    @property
    def key(self) -> str:
        """What parameters must share to share a bucket; empty for the storages of torch.optim and fp32 masters."""
        return "" if self.weights in ("own", "fp32") and self.moments == "fp32" else f"{self.weights} {self.moments}"

    @property
    def align(self) -> int:
        """Elements at multiples of which slots and shards start: blocks and counters are not cut."""
        return BLOCK if self.weights == "stochastic" or self.moments == "8bit" else _ALIGN


def choose(policy: PrecisionPolicy, group: Mapping[str, Any], dtype: torch.dtype, name: str) -> StorageChoice:
    """Return the storages of a parameter.

    Args:
        policy: The optimizer's.
        group: Its param_group dict, which may have entries "master" and "moments".
        dtype: Its dtype.
        name: Its name, for messages.

    Raises:
        ConfigError: The group's entries are no values of the policy's fields, or the dtype cannot have them.
    """
    own = {key: group[key] for key in GROUP_KEYS if key in group}
    try:
        policy = replace(policy, **own) if own else policy
    except ConfigError as error:
        raise ConfigError(f"parameter {name!r}: its group has {own}: {error}") from error
    if policy.moments != "fp32" and dtype == torch.float64:
        raise ConfigError(
            f"parameter {name!r}: moments={policy.moments!r} expected a parameter that computes in float32 but got "
            f'float64; give its group "moments": "fp32".'
        )
    if dtype not in _16_BIT:
        return StorageChoice(weights="own", moments=policy.moments)
    if policy.master == "auto":
        return StorageChoice(weights="fp32", moments=policy.moments)
    if policy.master in ("split", "stochastic") and dtype != torch.bfloat16:
        raise ConfigError(
            f"parameter {name!r}: master={policy.master!r} expected a bfloat16 parameter but got {dtype}, whose bits "
            f'are not the upper ones of a float32; use master="fp32", for its group alone with "master": "fp32".'
        )
    return StorageChoice(weights=policy.master, moments=policy.moments)


def check_rule(rule: str, group: Mapping[str, Any], moments: str, name: str) -> None:
    """Refuse moments that a rule's formula cannot bear.

    Raises:
        ConfigError: Centered RMSprop: square_avg - grad_avg^2 is a small difference that rounded terms make negative.
    """
    if rule == "rmsprop" and group.get("centered") and moments != "fp32":
        raise ConfigError(
            f'parameter {name!r}: centered RMSprop expected moments="fp32" but got {moments!r}: its square_avg - '
            "grad_avg^2 would be negative, and the update NaN; use centered=False or fp32 moments for its group."
        )
