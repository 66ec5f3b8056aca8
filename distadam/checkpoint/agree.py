"""Errors of one rank, raised on every rank."""

from __future__ import annotations

from typing import Any

from distadam import errors
from distadam.engine.access import Access
from distadam.errors import CheckpointError, DistAdamError, RankMismatchError

_KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def as_ours(error: Exception, what: str) -> Exception:
    """Return an error of the file system as a CheckpointError that says what was being done; others as they are."""
    if isinstance(error, DistAdamError) or not isinstance(error, (OSError, RuntimeError)):
        return error
    wrapped = CheckpointError(f"{what} failed: {error}. Model and optimizer are as they were.")
    wrapped.__cause__ = error
    return wrapped


def agree(access: Access, what: str, error: Exception | None, value: Any = None) -> list[Any]:
    """Return every rank's value, or raise everywhere what one rank raised.

    Collective: every rank of shard x replicate. Syncs: hosts wait for each other.
    """
    mine = None if error is None else (type(error).__name__, str(error))
    answers = access.collectives.exchange((mine, value), what)
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(answers):
        if failure is not None:
            name, text = failure
            kind = _KINDS.get(name, RankMismatchError)
            raise kind(f"rank {rank}: {text}" if kind is not RankMismatchError else f"rank {rank} failed: {text}")
    return [answer for _, answer in answers]
