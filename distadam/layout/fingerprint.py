"""What ranks compare before the first collective that would hang if they disagreed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """An ordered list of (what, value) lines, and their hash."""

    lines: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, lines: Iterable[tuple[str, object]]) -> Fingerprint:
        """Return the fingerprint of (what, value) pairs; values are compared by ``repr``."""
        return cls(tuple((what, repr(value)) for what, value in lines))

    @property
    def digest(self) -> str:
        """SHA-256 over all lines."""
        return hashlib.sha256("\n".join(f"{what}={value}" for what, value in self.lines).encode()).hexdigest()


def first_difference(mine: Fingerprint, other: Fingerprint) -> str | None:
    """Return the first line in which two fingerprints differ, in words, or None."""
    for (what, value), (their_what, their_value) in zip(mine.lines, other.lines, strict=False):
        if what != their_what:
            return f"{what} = {value} here but {their_what} = {their_value} there"
        if value != their_value:
            return f"{what} is {value} here but {their_value} there"
    if len(mine.lines) != len(other.lines):
        longer, where = (mine, "here") if len(mine.lines) > len(other.lines) else (other, "there")
        what, value = longer.lines[min(len(mine.lines), len(other.lines))]
        return f"{what} = {value} exists only {where}"
    return None
