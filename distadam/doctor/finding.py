"""One thing that the doctor looked at, what it found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    Args:
        check: dotted name, the same in every version: "network.gloo".
        level: "error" stops training or makes it wrong, "warning" slows it or will bite later.
        text: what was found, one line.
        cure: what to do, a command where there is one; empty only for "ok".
        values: the numbers behind the text, for programs.
    """

    check: str
    level: Level
    text: str
    cure: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def ok(check: str, text: str, **values: Any) -> Finding:
    """Return a finding that needs no cure."""
    return Finding(check=check, level="ok", text=text, values=values)


def warning(check: str, text: str, cure: str, **values: Any) -> Finding:
    """Return a finding that slows training or will bite later."""
    return Finding(check=check, level="warning", text=text, cure=cure, values=values)


def error(check: str, text: str, cure: str, **values: Any) -> Finding:
    """Return a finding that stops training or makes it wrong."""
    return Finding(check=check, level="error", text=text, cure=cure, values=values)


def guarded(check: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Run a check; one that breaks is a finding too, so that the others still run."""
    try:
        return look()
    except Exception as problem:
        text = f"the check itself failed: {type(problem).__name__}: {problem}"
        return [warning(check, text, "report it; the other findings stand")]
