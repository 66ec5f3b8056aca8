"""Which ranks of a group lie on one host, and what that allows."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass


def machine_identity() -> str:
    """Return what ranks share that can reach each other's sockets: kernel boot and network namespace, no host name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return secrets.token_hex(16)  # shares with nobody


@dataclass(frozen=True, slots=True)
class Hosts:
    """A group's ranks by host.

    Args:
        ranks: of each host, in order; hosts in the order of their first ranks.
    """

    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, identities: Sequence[str]) -> Hosts:
        """Return the hosts of ranks with these machine identities."""
        found: dict[str, list[int]] = {}
        for rank, identity in enumerate(identities):
            found.setdefault(identity, []).append(rank)
        return cls(tuple(map(tuple, found.values())))

    def local(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of a rank's host."""
        return next(local for local in self.ranks if rank in local)

    def across(self, rank: int) -> tuple[int, ...]:
        """Return the ranks, one of each host, that have the same place on their host as ``rank``."""
        place = self.local(rank).index(rank)
        return tuple(local[place] for local in self.ranks)

    @property
    def unshared(self) -> str:
        """Why ranks of one host use no memory together; empty where they do."""
        sizes = [len(local) for local in self.ranks]
        if max(sizes) == 1:
            return "each rank of the shard group has a host of its own"
        if len(set(sizes)) > 1:
            counts = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
            return f"hosts hold {counts} ranks of the shard group, not equally many"
        return ""

    @property
    def unaligned(self) -> str:
        """Why sums host by host would have other bits than the tree over ranks; empty where they have the same.

        A host's ranks must be a subtree of it: a power of two of ranks that follow each other.
        """
        num_local = len(self.ranks[0])
        if num_local & (num_local - 1):
            return f"{num_local} is no power of two"
        if [rank for local in self.ranks for rank in local] != list(range(num_local * len(self.ranks))):
            return "ranks of one host do not follow each other in the group"
        return ""

    def __str__(self) -> str:
        if len(self.ranks) == 1:
            return "the ranks of the shard group are processes of one host"
        start = f"{len(self.ranks)} hosts with {len(self.ranks[0])} ranks each: by memory on a host"
        if self.unaligned:
            return f"{start}, by messages between them; sums by messages alone, since {self.unaligned}"
        return f"{start}, by messages between them"
