"""What ranks tell each other before they issue collectives that depend on it: one small exchange between hosts.

Note [Agreement]: every call that communicates (`step`, `clip_grad_norm_`, a norm of `ShardedGradient`, ...) begins with
one all-reduce (maximum) of bytes over the hosts' group. It carries what the call is, so that ranks that call different
things learn it instead of hanging; whether a rank failed; the hash of what all must have in common (Note [Desync]); how
many rounds each bucket needs; in which order `step` would best gather (Note [Gather order]); how many gradient buffers
a rank lends (Note [Bounded pool]); and which parameters got a gradient. Hosts wait for each other here, never for a
device.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from itertools import pairwise

import torch

from distadam.engine.chain import DIGEST_NBYTES
from distadam.engine.order import NO_PROPOSAL, PROPOSAL_NBYTES


class Purpose(IntEnum):
    """What a rank is about to do. A joined rank (uneven inputs) votes nothing and does what the others do."""

    JOINED = 0
    STEP = 1
    CLIP = 2
    NORM = 3
    CHECK = 4
    SCALE = 5
    FULL_GRAD = 6
    FULL_STATE = 7
    PARAMETERS = 8
    LOAD = 9
    RELOAD = 10
    ADD_GROUP = 11
    SAVE_CHECKPOINT = 12
    LOAD_CHECKPOINT = 13
    WAIT_CHECKPOINT = 14
    STEP_BOUNDARY = 15
    DIAGNOSE = 16
    FAILED = 250


CALLS = {
    Purpose.STEP: "step()",
    Purpose.CLIP: "clip_grad_norm_()",
    Purpose.NORM: "a norm of p.grad",
    Purpose.CHECK: "GradScaler's check of p.grad",
    Purpose.SCALE: "an in-place operation on p.grad",
    Purpose.FULL_GRAD: "full_grad()",
    Purpose.FULL_STATE: "full_state_dict()",
    Purpose.PARAMETERS: "reload_parameters() or add_param_group()",
    Purpose.LOAD: "load_state_dict()",
    Purpose.RELOAD: "reload_parameters()",
    Purpose.ADD_GROUP: "add_param_group()",
    Purpose.SAVE_CHECKPOINT: "checkpoint.save()",
    Purpose.LOAD_CHECKPOINT: "checkpoint.load()",
    Purpose.WAIT_CHECKPOINT: "wait() for an asynchronous checkpoint",
    Purpose.STEP_BOUNDARY: "checkpoint.elastic's look at signals",
    Purpose.DIAGNOSE: "a check of distadam.diagnostics",
}

_DETAIL = 24
_DIGEST = 2 + 2 * _DETAIL
_PROPOSAL = _DIGEST + 2 * DIGEST_NBYTES
_JOINED = _PROPOSAL + 2 * PROPOSAL_NBYTES
_ACTIVE = _JOINED + 1
_DEPTH = _ACTIVE + 2
_HEADER = _DEPTH + 1
_COMPLEMENTS = bytes(range(255, -1, -1))


class Votes:
    """A byte vector: purpose, detail, hash, proposal, each with its complement so that the maximum shows a difference.

    Sections follow, whose bytes are combined one by one.

    Args:
        num_buckets: buckets, one byte each: rounds needed.
        num_slots: parameters in buckets, two bytes each: has a gradient; was discarded (1) and has one again (2).
        num_frozen: parameters outside the layout, one byte each: has become trainable.
    """

    def __init__(self, num_buckets: int, num_slots: int, num_frozen: int) -> None:
        sizes = (num_buckets, num_slots, num_slots, num_frozen)
        starts = [_HEADER]
        for size in sizes:
            starts.append(starts[-1] + size)
        self._data = bytearray(starts[-1])
        self.tensor = torch.frombuffer(self._data, dtype=torch.uint8)
        self._sections = [slice(start, end) for start, end in pairwise(starts)]

    def cast(
        self,
        purpose: Purpose,
        detail: bytes,
        digest: bytes,
        rounds: bytes,
        has: bytes,
        discarded: bytes,
        frozen: bytes,
        num_active: int = 0,
        proposal: bytes = NO_PROPOSAL,
        depth: int = 0,
    ) -> None:
        """Write this rank's votes."""
        data = self._data
        padded = detail.ljust(_DETAIL, b"\0")[:_DETAIL]
        proposed = proposal + _complement(proposal)
        if purpose is Purpose.JOINED:
            data[:_DEPTH] = bytes(_PROPOSAL) + proposed + b"\1" + bytes(2)
        else:
            data[0], data[1] = purpose, 255 - purpose
            shown = padded + _complement(padded) + digest + _complement(digest) + proposed
            data[2:_ACTIVE] = shown + b"\0"
            data[_ACTIVE:_DEPTH] = num_active.to_bytes(2, "big")
        data[_DEPTH] = min(depth, 255)
        for section, value in zip(self._sections, (rounds, has, discarded, frozen), strict=True):
            data[section] = value

    @property
    def purpose(self) -> Purpose | None:
        """What all ranks do, or None if they differ."""
        return Purpose(self._data[0]) if self._data[0] == 255 - self._data[1] else None

    @property
    def joined(self) -> bool:
        """Whether a rank has joined."""
        return self._data[_JOINED] == 1

    @property
    def num_active(self) -> int:
        """Ranks to average over, as those that have data know it; 0 for all."""
        return int.from_bytes(self._data[_ACTIVE:_DEPTH], "big")

    @property
    def depth(self) -> int:
        """How many gradient buffers the rank that has the most of them lends (Note [Bounded pool])."""
        return self._data[_DEPTH]

    @property
    def failed(self) -> bool:
        """Whether a rank reported an error."""
        return self._data[0] == Purpose.FAILED

    @property
    def detail(self) -> bytes | None:
        """The call's detail, or None if ranks differ."""
        return self._same(2, _DETAIL)

    @property
    def digest(self) -> bytes | None:
        """The hash of what ranks have in common, or None if they differ."""
        return self._same(_DIGEST, DIGEST_NBYTES)

    @property
    def proposal(self) -> bytes | None:
        """The order of gathers that every rank proposed, or None if they differ; a joined rank proposes nothing."""
        return self._same(_PROPOSAL, PROPOSAL_NBYTES)

    def _same(self, start: int, nbytes: int) -> bytes | None:
        largest, other = bytes(self._data[start : start + nbytes]), self._data[start + nbytes : start + 2 * nbytes]
        return largest if _complement(largest) == other else None

    @property
    def rounds(self) -> bytes:
        """Rounds that each bucket needs."""
        return bytes(self._data[self._sections[0]])

    @property
    def has(self) -> bytes:
        """Per slot: 1 if some rank collected a gradient and did not discard one."""
        return bytes(self._data[self._sections[1]])

    @property
    def discarded(self) -> bytes:
        """Per slot: 1 if some rank discarded what it had collected, 2 if one collected anew after that."""
        return bytes(self._data[self._sections[2]])

    @property
    def frozen(self) -> bytes:
        """Per parameter outside the layout: 1 if it is trainable now."""
        return bytes(self._data[self._sections[3]])


def _complement(data: bytes) -> bytes:
    return data.translate(_COMPLEMENTS)


def pack_floats(*values: float) -> bytes:
    """Return up to three floats as a vote's detail."""
    return struct.pack(f">{len(values)}d", *values)


def unpack_floats(detail: bytes) -> tuple[float, float, float]:
    """Return the floats that `pack_floats` wrote, missing ones as 0."""
    first, second, third = struct.unpack(">3d", detail.ljust(_DETAIL, b"\0"))
    return first, second, third
