"""Update rules: names of state, hyper-parameters, and a pure elementwise update; nothing about shards or devices.

A new rule is a `Rule` and a line in `RULES`; every common test then runs on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from distadam.rules.adam import Adam
from distadam.rules.rmsprop import RmsProp
from distadam.rules.rule import Rule
from distadam.rules.scratch import Allocate, Scratch
from distadam.rules.sgd import Sgd

__all__ = ["RULES", "Adam", "Allocate", "RmsProp", "Rule", "Scratch", "Sgd"]

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "adam": Adam("adam", decoupled=False),
        "adamw": Adam("adamw", decoupled=True),
        "sgd": Sgd(),
        "rmsprop": RmsProp(),
    }
)
