"""Uneven inputs: what a rank that has run out of data does while others go on."""

from __future__ import annotations

from typing import Protocol

from distadam.comm import JoinHook


class Shadowing(Protocol):
    """What the hook calls; the optimizer."""

    def shadow_iteration(self) -> None:
        """Replay one iteration of the other ranks with zeros."""

    def leave_join(self) -> None:
        """Average over all ranks again."""


class ShadowHook(JoinHook):
    """Replays each iteration's collectives with zeros; this rank's shard is updated and gathered as ever."""

    def __init__(self, optimizer: Shadowing) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """Take part in one iteration of the ranks that still have data."""
        self._optimizer.shadow_iteration()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Go back to averaging over all ranks; all have the same parameters after every iteration."""
        self._optimizer.leave_join()
