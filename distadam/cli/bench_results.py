"""What a benchmark found: the file, the table, and two files beside each other."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from rich.table import Table

__all__ = ["Result", "Run", "compare_table", "read_run", "results_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement on rank 0.

    Args:
        name: the same in every run of the same options.
        times_ms: by repeat; empty if it could not be measured.
        nbytes: bytes that this rank sends, or that an update moves through memory, each time; 0 for neither.
        note: how, or why not.
    """

    name: str
    times_ms: list[float]
    nbytes: int = 0
    note: str = ""

    @property
    def median_ms(self) -> float:
        """The median time."""
        return statistics.median(self.times_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A benchmark's results and the circumstances."""

    command: str
    machine: str
    torch: str
    date: str
    results: list[Result]

    @classmethod
    def of(cls, command: str, results: list[Result]) -> Run:
        """Return the run that ended just now on this machine."""
        machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}"
        date = time.strftime("%Y-%m-%d %H:%M")
        return cls(command=command, machine=machine, torch=torch.__version__, date=date, results=results)

    def write(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_run(path: Path) -> Run:
    """Read what `Run.write` wrote.

    Raises:
        typer.BadParameter: there is no such file, or it is something else.
    """
    try:
        content = json.loads(path.read_text())
        return Run(**{**content, "results": [Result(**result) for result in content["results"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise typer.BadParameter(f"expected a file that distadam bench --json wrote, got {path}: {error}") from error


def results_table(run: Run) -> Table:
    """Return a row per measurement."""
    table = Table("measured", title=run.command, title_justify="left")
    for column in ("median ms", "min", "max", "GB/s"):
        table.add_column(column, justify="right")
    table.add_column("note", style="dim")
    for result in run.results:
        cells = ["-"] * 4
        if result.times_ms:
            cells = [f"{value:.2f}" for value in (result.median_ms, min(result.times_ms), max(result.times_ms))]
            cells.append(f"{result.nbytes / result.median_ms / 1e6:.2f}" if result.nbytes else "-")
        table.add_row(result.name, *cells, result.note)
    return table


def compare_table(before: Run, after: Run) -> Table:
    """Return a row per measurement that both runs have: medians, and how they relate."""
    table = Table("measured", title=f"{before.date} and {after.date}", title_justify="left")
    for column in ("before, ms", "after, ms", "after / before"):
        table.add_column(column, justify="right")
    old = {result.name: result for result in before.results if result.times_ms}
    for result in after.results:
        if result.times_ms and result.name in old:
            was, now = old[result.name], result
            apart = max(was.times_ms) < min(now.times_ms) or max(now.times_ms) < min(was.times_ms)
            ratio = f"{now.median_ms / was.median_ms:.2f}" + ("" if apart else " (within noise)")
            table.add_row(result.name, f"{was.median_ms:.2f}", f"{now.median_ms:.2f}", ratio)
    return table
