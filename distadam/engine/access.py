"""What a checkpoint may see of an optimizer, and how it tells it that everything was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distadam.comm import Collectives
from distadam.engine.flat_bucket import FlatBucket
from distadam.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The parts of one optimizer that are saved and loaded.

    Args:
        rule: the update rule.
        flats: buckets, with this rank's weights, states and step counts.
        param_groups: torch's groups.
        defaults: torch's defaults.
        names: every parameter's name, as the optimizer knows it.
        state: ``optimizer.state``; of parameters without a place it holds torch's whole entries.
        collectives: how ranks talk.
        announce: agrees that every rank makes this call; collective.
        loaded: must be called once buckets, groups and states hold new values.
    """

    rule: Rule
    flats: Sequence[FlatBucket]
    param_groups: Sequence[dict[str, Any]]
    defaults: Mapping[str, Any]
    names: Mapping[Tensor, str]
    state: dict[Tensor, Any]
    collectives: Collectives
    announce: Callable[..., None]
    loaded: Callable[[], None]
