"""Read the records of a run, thinned out so that no spike is lost.

A run's folder has one file ``rank-<r>.jsonl`` for each rank, one record a line; see `docs/report.md` for the records.
Whatever is unknown is passed over: a record of a later version is no error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from distadam.errors import UsageError

NUM_BINS = 480
"""Points of a line at most."""

NUM_COLUMNS = 240
"""Columns of a map at most."""

METRICS = ("grad_norm", "update_ratio")
"""What maps show of each parameter."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bin:
    """What lies in some consecutive steps: the extremes stay, however many steps there are.

    Attributes:
        first, last: steps.
        low, high, mean: of the finite values; NaN if there is none.
        nonfinite: how many values were NaN or infinite.
    """

    first: int
    last: int
    low: float
    high: float
    mean: float
    nonfinite: int


def thin(points: Sequence[tuple[int, float]], num_bins: int = NUM_BINS) -> list[Bin]:
    """Return points, in order of their steps, as at most ``num_bins`` bins of equal width that are not empty."""
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    width = max(1.0, (last - first + 1) / num_bins)
    groups: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        groups.setdefault(int((point[0] - first) / width), []).append(point)
    return [_bin(group) for group in groups.values()]


def _bin(points: Sequence[tuple[int, float]]) -> Bin:
    finite = [value for _, value in points if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    mean = sum(finite) / len(finite) if finite else math.nan
    return Bin(points[0][0], points[-1][0], low, high, mean, len(points) - len(finite))


class ParameterMap:
    """One number for each parameter and span of steps: the largest; columns double in width when there are too many.

    A value that is not finite counts as larger than any other.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.columns: list[tuple[int, int]] = []
        self.high: dict[str, list[list[float]]] = {metric: [] for metric in METRICS}
        self._worst: dict[str, list[tuple[float, int]]] = {metric: [] for metric in METRICS}  # by row; NaN: none yet
        self._last: dict[str, list[float]] = {metric: [] for metric in METRICS}
        self._width = 1
        self._in_last = 0

    def worst(self, metric: str) -> dict[str, tuple[float, int]]:
        """Return by parameter the largest value and the first step that had it."""
        return {name: worst for name, worst in zip(self.rows, self._worst[metric], strict=True) if worst[0] == worst[0]}

    def last(self, metric: str) -> dict[str, float]:
        """Return by parameter the last value."""
        return {name: value for name, value in zip(self.rows, self._last[metric], strict=True) if value == value}

    def add(self, step: int, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        """Take one record."""
        if self.columns and self._in_last < self._width:
            self.columns[-1] = (self.columns[-1][0], step)
        else:
            if len(self.columns) == 2 * NUM_COLUMNS:
                self._halve()
            self.columns.append((step, step))
            self._in_last = 0
            for metric in METRICS:
                self.high[metric].append([math.nan] * len(self.rows))
        self._in_last += 1
        for name in parameters:
            self.rows.setdefault(name, len(self.rows))
        rows = None if list(parameters) == list(self.rows) else [self.rows[name] for name in parameters]
        for metric in METRICS:
            values = [_value(record.get(metric)) for record in parameters.values()]
            if rows is not None:
                placed = [math.nan] * len(self.rows)
                for row, value in zip(rows, values, strict=True):
                    placed[row] = value
                values = placed
            self._take(metric, step, values)

    def _take(self, metric: str, step: int, values: list[float]) -> None:
        """Take one metric's values by row, NaN where there is none. Of NaN every comparison is false."""
        columns, worst, last = self.high[metric], self._worst[metric], self._last[metric]
        missing = len(values) - len(worst)
        worst += [(math.nan, 0)] * missing
        last += [math.nan] * missing
        columns[-1] = _larger(columns[-1], values)
        self._worst[metric] = [
            (value, step) if value > known[0] or known[0] != known[0] else known
            for value, known in zip(values, worst, strict=True)
        ]
        self._last[metric] = [value if value == value else known for value, known in zip(values, last, strict=True)]

    def _halve(self) -> None:
        self.columns = [
            (first[0], second[1]) for first, second in zip(self.columns[::2], self.columns[1::2], strict=True)
        ]
        for metric, columns in self.high.items():
            self.high[metric] = [_larger(one, two) for one, two in zip(columns[::2], columns[1::2], strict=True)]
        self._width *= 2


def _larger(one: list[float], two: list[float]) -> list[float]:
    one = one + [math.nan] * (len(two) - len(one))
    return [b if b > a or a != a else a for a, b in zip(one, two, strict=True)]


def _value(value: Any) -> float:
    """Return a value as a map knows it: NaN is none, and what is not finite is larger than any other."""
    if type(value) is float:  # JSON's are finite
        return value
    if value is None:
        return math.nan
    found = number(value)
    return found if math.isfinite(found) else math.inf


@dataclass
class Run:
    """A run as its records tell it.

    Attributes:
        folder: where they are.
        about: the "run" record of the first rank.
        steps: by rank and step, whatever records said of it.
        parameters: gradients and updates of parameters.
        checkpoints, incidents: records in order of time.
        num_unreadable: lines that are no record (a line that is still being written, for one).
    """

    folder: Path
    about: Record = field(default_factory=dict)
    steps: dict[int, dict[int, Record]] = field(default_factory=dict)
    parameters: ParameterMap = field(default_factory=ParameterMap)
    checkpoints: list[Record] = field(default_factory=list)
    incidents: list[Record] = field(default_factory=list)
    num_unreadable: int = 0
    _points: dict[tuple[str, int], list[tuple[int, float]]] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> list[int]:
        """Ranks that have written steps, in order."""
        return sorted(self.steps)

    def points(self, key: str, rank: int) -> list[tuple[int, float]]:
        """Return what one rank says of ``key`` by step; the first entry where there is one for each group.

        Looked up once: ask when everything has been read.
        """
        found = self._points.get((key, rank))
        if found is None:
            found = self._points[key, rank] = []
            for step, record in sorted(self.steps.get(rank, {}).items()):
                value = record.get(key)
                value = value[0] if isinstance(value, list) and value else value
                if value is not None and not isinstance(value, list | dict):
                    found.append((step, number(value)))
        return found

    def over_ranks(self, key: str) -> list[tuple[int, float]]:
        """Return the mean over the ranks that say something, by step."""
        ranks = [points for rank in self.ranks if (points := self.points(key, rank))]
        if len(ranks) == 1:
            return ranks[0]
        values: dict[int, list[float]] = {}
        for points in ranks:
            for step, value in points:
                values.setdefault(step, []).append(value)
        return [(step, sum(found) / len(found)) for step, found in sorted(values.items())]

    def parts(self, rank: int) -> dict[str, float]:
        """Return mean seconds by part over the steps of a rank that say; "elsewhere" is the rest of the step."""
        totals: dict[str, float] = {}
        count = 0
        for record in self.steps.get(rank, {}).values():
            parts = record.get("parts")
            if not parts or "step_s" not in record:
                continue
            count += 1
            rest = number(record["step_s"]) - sum(number(s) for s in parts.values())
            for kind, seconds in {**parts, "elsewhere": max(0.0, rest)}.items():
                totals[kind] = totals.get(kind, 0.0) + number(seconds)
        return {kind: seconds / count for kind, seconds in totals.items()}

    def peak_memory(self, rank: int) -> dict[str, int]:
        """Return for each kind the most bytes that a rank has had of it."""
        peak: dict[str, int] = {}
        for record in self.steps.get(rank, {}).values():
            for kind, nbytes in (record.get("memory") or {}).items():
                peak[kind] = max(peak.get(kind, 0), int(nbytes))
        peak.pop("total", None)
        return {kind: nbytes for kind, nbytes in peak.items() if nbytes}


def number(value: Any) -> float:
    """Return a record's number; those that JSON does not have are written as "inf", "-inf" and "nan"."""
    return float(value)


def read_run(folder: str | Path) -> Run:
    """Read every record of a run.

    Raises:
        UsageError: there are none.
    """
    run = Run(Path(folder))
    files = sorted(run.folder.glob("rank-*.jsonl"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UsageError(
            f"report expected a folder with rank-<r>.jsonl files but {run.folder} has none; "
            "diagnostics.watch and examples/train_gpt.py write them."
        )
    for path in files:
        for record in _records(path, run):
            _take(run, record)
    run.checkpoints = _together(sorted(run.checkpoints, key=lambda record: number(record.get("time", 0))))
    run.incidents.sort(key=lambda record: number(record.get("time", 0)))
    return run


def _together(records: Sequence[Record]) -> list[Record]:
    """Make one record of those that ranks wrote of the same checkpoint: their bytes, the seconds of the slowest."""
    found: dict[tuple[Any, Any], Record] = {}
    for record in records:
        known = found.setdefault((record.get("step"), record.get("path")), record)
        if known is not record:
            known["bytes"] = number(known.get("bytes", 0)) + number(record.get("bytes", 0))
            known["seconds"] = max(number(known.get("seconds", 0)), number(record.get("seconds", 0)))
    return list(found.values())


def _records(path: Path, run: Run) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(line)
            except ValueError:
                run.num_unreadable += bool(line.strip())
                continue
            yield record


def _take(run: Run, record: Record) -> None:
    kind = record.get("kind")
    if kind == "step":
        known = run.steps.setdefault(int(record.get("rank", 0)), {}).setdefault(int(record["step"]), {})
        known.update(record)
    elif kind == "parameters":
        run.parameters.add(int(record["step"]), record["parameters"])
    elif kind == "run":
        if not run.about or record.get("rank") == 0:
            run.about = record
    elif kind == "checkpoint":
        run.checkpoints.append(record)
    elif kind == "incident":
        run.incidents.append(record)


def summary(run: Run) -> dict[str, Any]:
    """Return the run in numbers, ready for JSON; what was not recorded is left out."""
    told = sorted({step for records in run.steps.values() for step in records})
    result: dict[str, Any] = {
        "run": str(run.folder),
        "optimizer": run.about.get("optimizer"),
        "ranks": run.about.get("ranks", len(run.ranks)),
        "parameters": len(run.about.get("parameters") or run.parameters.rows),
        "steps": {"count": len(told), "first": told[0], "last": told[-1]} if told else {"count": 0},
    }
    for key in ("loss", "grad_norm", "lr"):
        points = run.over_ranks(key)
        if points:
            result[key] = _extremes(points)
    by_rank = {rank: [value for _, value in run.points("step_s", rank)] for rank in run.ranks}
    result["step_s"] = {str(rank): {"median": median(v), "max": max(v)} for rank, v in by_rank.items() if v}
    result["parts_s"] = {str(rank): parts for rank in run.ranks if (parts := run.parts(rank))}
    speeds = [value for _, value in run.over_ranks("tokens_per_s")]
    if speeds:
        result["tokens_per_s"] = median(speeds)
    result["peak_memory"] = {str(rank): memory for rank in run.ranks if (memory := run.peak_memory(rank))}
    result["largest"] = {
        metric: [{"parameter": name, "value": value, "step": step} for name, (value, step) in top(worst)]
        for metric in METRICS
        if (worst := run.parameters.worst(metric))
    }
    result["checkpoints"] = len(run.checkpoints)
    result["incidents"] = [{k: v for k, v in record.items() if k != "kind"} for record in run.incidents]
    result["unreadable_lines"] = run.num_unreadable
    return finite_json(result)  # type: ignore[no-any-return]


def top(worst: Mapping[str, tuple[float, int]], count: int = 5) -> list[tuple[str, tuple[float, int]]]:
    """Return the parameters with the largest values, largest first."""
    return sorted(worst.items(), key=lambda item: -item[1][0])[:count]


def _extremes(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    finite = [point for point in points if math.isfinite(point[1])]
    result: dict[str, Any] = {"last": points[-1][1]}
    if finite:
        (low_step, low), (high_step, high) = (
            min(finite, key=lambda point: point[1]),
            max(finite, key=lambda point: point[1]),
        )
        result |= {"first": finite[0][1], "min": low, "min_step": low_step, "max": high, "max_step": high_step}
    broken = [step for step, value in points if not math.isfinite(value)]
    return result | ({"nonfinite_steps": broken[:100], "num_nonfinite": len(broken)} if broken else {})


def finite_json(value: Any) -> Any:
    """Return ``value`` with numbers that JSON does not have as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return [finite_json(item) for item in value] if isinstance(value, list | tuple) else value


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which ``share`` of ``values`` lie; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan
