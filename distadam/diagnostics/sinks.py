"""Where records of a run go: files of JSON lines, TensorBoard, the Prometheus registry, a live table.

A record is a flat dictionary with "kind" and "time" (Unix seconds); `Sink` is all that a place for them must be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from distadam.errors import MissingDependency


class Sink(Protocol):
    """Takes records."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record; it belongs to whoever wrote it and is not kept."""
        ...

    def close(self) -> None:
        """Finish; nothing is written any more."""
        ...


def finite(value: Any) -> Any:
    """Return ``value`` with non-finite floats as "inf", "-inf" and "nan": JSON has no numbers for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def missing(package: str, extra: str) -> MissingDependency:
    """Return the error that names the command which installs an optional package."""
    return MissingDependency(f"{package} is not installed; install it with: pip install 'distadam[{extra}]'")


class JsonlSink:
    """Appends each record as one line of JSON to ``RUN/rank-<r>.jsonl``, which `distadam report RUN` reads.

    Lines are written at once, so that a run that dies leaves what it has said.

    Args:
        run: the run's directory; made if it is not there.
        rank: whose file.
    """

    def __init__(self, run: str | os.PathLike[str], rank: int) -> None:
        self.path = Path(run) / f"rank-{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(finite(record), allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def scalars(record: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return the numbers of a "step" or "parameters" record by (name, parameter or other label); "" is no label."""
    found: dict[tuple[str, str], float] = {}
    if record["kind"] == "parameters":
        for parameter, values in record["parameters"].items():
            found |= {(name, parameter): float(value) for name, value in values.items()}
        return found
    if record["kind"] != "step":
        return found
    for name, value in record.items():
        if name in ("kind", "time", "step", "rank"):
            continue
        if isinstance(value, (int, float)):
            found[name, ""] = float(value)
        elif isinstance(value, Mapping):
            found |= {(name, str(key)): float(item) for key, item in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found |= {(name, str(place)): float(item) for place, item in enumerate(value)}
    return found
