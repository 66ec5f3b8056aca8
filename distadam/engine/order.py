"""In which order a step updates and gathers buckets: as the model's forward waits for them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import blake2b

PROPOSAL_NBYTES = 8
NO_PROPOSAL = bytes(PROPOSAL_NBYTES)


class GatherOrder:
    """The order in use, and what this rank proposes in its place.

    Note [Gather order]: any order gives the same bits, since whoever reads a parameter waits for its bucket, whatever
    was gathered before; but ranks that launch gathers in different orders mix up their buckets. So the order changes
    only by what all ranks know. The first forward after a step says in which order its like waits for buckets, and the
    next `step` proposes that order, as a hash in the agreement that it begins with (Note [Agreement]). If every rank
    proposes the same, all use it from this update on. If they differ, or one proposes nothing, all keep what they have:
    a rank proposes nothing if it has run no whole forward since the last step, has joined (uneven inputs), or captures
    a CUDA graph, whose order must stay as it was learned before. That ranks have one order in use is checked before
    each step all the same (Note [Desync]).

    What no forward waits for comes first: `step` itself does, or the root at the start of the next forward. Forwards
    without gradients (evaluation, generation) are not recorded: most follow ``eval()``, which waits for everything.
    """

    def __init__(self) -> None:
        self.buckets: tuple[int, ...] = ()
        self._learns = False
        self._learned = False
        self._differs = False
        self._waits: dict[int, None] = {}
        self._proposed: tuple[int, ...] = ()

    @property
    def reason(self) -> str:
        """Why the order in use is what it is; the same on every rank."""
        if not self._learns:
            return "as they are reduced: nothing is prefetched"
        reason = "as a forward of every rank waited for them" if self._learned else "first layers first"
        return f"{reason}; at the last step some rank proposed another order, or none" if self._differs else reason

    def extend(self, num_buckets: int) -> None:
        """Take buckets that are new, up to ``num_buckets`` in all. No hook waits for them yet: `step` does."""
        new = range(len(self.buckets), num_buckets)
        self.buckets = (*new[::-1], *self.buckets) if self._learns else (*self.buckets, *new)

    def learn(self) -> None:
        """Begin to learn from forwards, with the last bucket first: buckets run backwards through the model."""
        if not self._learns:
            self._learns = True
            self.buckets = tuple(sorted(self.buckets, reverse=True))

    def record(self, buckets: Iterable[int]) -> None:
        """Take the order in which a forward waits for these buckets; what an earlier one waited for keeps its place."""
        for bucket in buckets:
            self._waits.setdefault(bucket)

    def propose(self) -> bytes:
        """Return the hash of the order that this rank would use from now on."""
        if not self._waits:
            return NO_PROPOSAL
        rest = [bucket for bucket in sorted(self.buckets, reverse=True) if bucket not in self._waits]
        self._proposed = (*rest, *self._waits)
        data = struct.pack(f">{len(self._proposed)}I", *self._proposed)
        return blake2b(data, digest_size=PROPOSAL_NBYTES).digest()

    def settle(self, agreed: bytes | None) -> None:
        """Use what all ranks proposed, or go on as before; then wait for the next forward.

        Args:
            agreed: the hash that every rank proposed; None if they differ.
        """
        self._differs = agreed is None
        if agreed is not None and agreed != NO_PROPOSAL:
            self.buckets, self._learned = self._proposed, True
        self._waits.clear()
