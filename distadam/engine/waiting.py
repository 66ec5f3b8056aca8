"""Where a rank stands in its step: which buckets are reduced, which wait and for what, who never got a gradient."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distadam.engine.reducer import Reducer

_MOST_NAMES = 6
_MOST_FRAMES = 16
_NOT_THE_USERS = tuple(str(Path(path).parent) for path in (torch.__file__, Path(__file__).parent, threading.__file__))

REDUCED = "reduced"
REDUCING = "in reduction, waits for other ranks"
GATHERING = "in its gather, waits for other ranks"
IDLE = "nothing has come yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketWait:
    """One bucket.

    Attributes:
        bucket: its index.
        state: in words, the same for the same reason on every rank.
        missing: parameters without a gradient in this step, by name.
    """

    bucket: int
    state: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitReport:
    """What this rank waits for.

    Attributes:
        rank, num_ranks: of shard x replicate.
        step: the step under way, counted from 1 since the optimizer was built; between steps the last one.
        buckets: in order.
        at: where the main thread is in the user's own code, "file:line in function".
        stack: the main thread's innermost calls, outermost first.
    """

    rank: int
    num_ranks: int
    step: int
    buckets: tuple[BucketWait, ...]
    at: str
    stack: tuple[str, ...]

    @property
    def never_ready(self) -> tuple[str, ...]:
        """Parameters whose gradient has not come, of a step in which some have."""
        return tuple(name for bucket in self.buckets for name in bucket.missing)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self) | {"never_ready": list(self.never_ready)}

    def __str__(self) -> str:
        lines = [f"rank {self.rank} of {self.num_ranks}, step {self.step}, at {self.at}"]
        lines += [f"  bucket {one.bucket}: {one.state}" for one in self.buckets]
        if self.never_ready:
            lines.append(f"  never ready: {some(self.never_ready)}")
        return "\n".join(lines)


def some(names: Collection[str]) -> str:
    """Return a few names, and how many more there are."""
    shown = ", ".join(list(names)[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def wait_report(reducer: Reducer, arriving: Collection[int], rank: int, num_ranks: int) -> WaitReport:
    """Return where this rank stands.

    Takes no lock and waits for nothing, so that it can be asked by another thread while this rank hangs; what it says
    of a rank that does not hang is approximate.

    Args:
        reducer: of the optimizer.
        arriving: buckets whose gather nobody has waited for.
        rank: of shard x replicate.
        num_ranks: of shard x replicate.
    """
    at, stack = _main_thread()
    buckets, first = [], None
    begun = 1 in reducer.has_now or any(gradient.launched for gradient in reducer.gradients)
    for gradient in reducer.gradients:
        index = gradient.flat.bucket.index
        base = reducer.bases[index]
        has = reducer.has_now[base : base + len(gradient.flat.params)]
        missing = [name for name, flag in zip(gradient.flat.names, has, strict=True) if not flag] if begun else []
        if index in arriving:
            state = GATHERING
        elif gradient.launched:
            state = REDUCED if gradient.landed else REDUCING
        elif not begun:
            state = IDLE
        elif not gradient.complete:
            state = f"waits for gradients of {some(missing)}"
        else:
            state = "waits for step()" if first is None else f"waits for bucket {first} to be launched"
        if first is None and not gradient.launched:
            first = index
        buckets.append(BucketWait(bucket=index, state=state, missing=tuple(missing)))
    step = reducer.chain.step + begun
    return WaitReport(rank=rank, num_ranks=num_ranks, step=step, buckets=tuple(buckets), at=at, stack=stack)


def _main_thread() -> tuple[str, tuple[str, ...]]:
    # No name for the frame: it may be this one, which would then keep itself, and all that its callers hold, alive.
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    frames = [entry for entry in stack if not entry.filename.startswith("<frozen")]
    shown = [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in frames]
    own = [text for entry, text in zip(frames, shown, strict=True) if not entry.filename.startswith(_NOT_THE_USERS)]
    return (own or shown)[-1], tuple(shown[-_MOST_FRAMES:])
