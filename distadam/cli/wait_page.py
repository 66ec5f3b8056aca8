"""Where every rank stood when a collective failed: the ranks' dumps on one page."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from distadam.engine.waiting import some

__all__ = ["merge", "read_dumps", "show_waits"]

Dump = Mapping[str, Any]

_MOST_BUCKETS = 40
_ENDED = "was ended; until then it had raised nothing"


def show_waits(console: Console, folder: Path) -> None:
    """Print the page if a rank of this host has failed in a collective, and leave it in ``folder`` as ``waits.txt``.

    Args:
        console: to print on.
        folder: where the ranks have written.
    """
    dumps = read_dumps(folder)
    if not any(dump["reason"] for dump in dumps):
        return
    text = merge(dumps)
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    (folder / "waits.txt").write_text(text, encoding="utf-8")


def read_dumps(folder: Path) -> list[Dump]:
    """Return the last attempt's dumps by rank."""
    found: list[Dump] = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("waits.*.json")]
    last = max((dump["attempt"] for dump in found), default=0)
    return sorted((dump for dump in found if dump["attempt"] == last), key=lambda dump: int(dump["rank"]))


def merge(dumps: Sequence[Dump]) -> str:
    """Return the page: who waited in vain and for whom, each bucket on every rank, what never got a gradient."""
    page = io.StringIO()
    page.write("distadam launch: where the ranks stood\n")
    for text, ranks in _group((dump["reason"] or _ENDED, dump["rank"]) for dump in dumps):
        page.write(f"  {_spell(ranks)}: {text}\n")
    for number in range(max(len(dump["optimizers"]) for dump in dumps)):
        having = [dump for dump in dumps if len(dump["optimizers"]) > number]
        reports = {dump["rank"]: dump["optimizers"][number] for dump in having}
        if max(len(dump["optimizers"]) for dump in dumps) > 1:
            page.write(f"  optimizer {number}:\n")
        for text, ranks in _group(
            (f"step {report['step']}, at {report['at']}", rank) for rank, report in reports.items()
        ):
            page.write(f"  {_spell(ranks)}: {text}\n")
        _write_buckets(page, reports)
        for text, ranks in _group((some(report["never_ready"]), rank) for rank, report in reports.items()):
            if text:
                page.write(f"  never ready on {_spell(ranks)}: {text}\n")
    return page.getvalue()


def _write_buckets(page: io.StringIO, reports: Mapping[int, Any]) -> None:
    """Write a line for each bucket and state; buckets that are the same everywhere share one."""
    lines: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    num_buckets = max(len(report["buckets"]) for report in reports.values())
    for index in range(num_buckets):
        states = _group(
            (report["buckets"][index]["state"], rank)
            for rank, report in reports.items()
            if index < len(report["buckets"])
        )
        lines.setdefault(tuple((state, tuple(ranks)) for state, ranks in states), []).append(index)
    for alike, buckets in list(lines.items())[:_MOST_BUCKETS]:
        shown = "; ".join(f"{state} on {_spell(ranks)}" for state, ranks in alike)
        page.write(f"  bucket{'s' if len(buckets) > 1 else ''} {_runs(buckets)}: {shown}\n")


def _group(pairs: Any) -> list[tuple[str, list[int]]]:
    found: dict[str, list[int]] = {}
    for text, rank in pairs:
        found.setdefault(text, []).append(int(rank))
    return list(found.items())


def _spell(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_runs(ranks)}"


def _runs(numbers: Sequence[int]) -> str:
    """Return numbers in order as "0 to 3, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" if b > a + 1 else f"{a}, {b}" for a, b in runs)
