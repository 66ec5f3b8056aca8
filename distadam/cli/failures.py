"""Which rank failed first, and why: the end of a ``distadam launch`` that went wrong."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

__all__ = ["RankFailure", "print_failures", "sort_failures"]

# A crash leaves no note of its time. The launcher sees it one poll later, and by then the ranks that were talking to
# the crashed one have noted theirs; so it is taken to have happened this long before it was seen.
_CRASH_HEAD_START_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """How one rank ended.

    Args:
        rank: global rank.
        exit_code: as a shell gives it: 128 + n for signal n.
        time_s: seconds since the epoch; infinite for a rank that the launcher ended because of another.
        summary: one line.
        traceback: the script's traceback, or nothing when it did not end by an exception.
    """

    rank: int
    exit_code: int
    time_s: float
    summary: str
    traceback: str


def sort_failures(failures: Mapping[int, ProcessFailure]) -> list[RankFailure]:
    """Return torchelastic's failures by global rank as a list, the first to happen first."""
    found = [_read(rank, failure) for rank, failure in failures.items()]
    return sorted(found, key=lambda failure: (failure.time_s, failure.rank))


def print_failures(console: Console, failures: list[RankFailure], phase_of: Callable[[int], str]) -> None:
    """Print the first failure in full and what that rank had started last, then the others; repeats are only counted.

    Args:
        console: where to.
        failures: the first to happen first.
        phase_of: what a rank has noted (`distadam.comm.phase`).
    """
    first, *others = failures
    _print_one(console, first, f"rank {first.rank} failed first", first.traceback)
    phase = phase_of(first.rank)
    if phase:
        text = f"distadam launch: rank {first.rank} had last started: {phase}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    ended = [failure.rank for failure in others if failure.time_s == float("inf")]
    for other in others:
        if other.rank in ended:
            continue
        again = bool(other.traceback) and other.summary == first.summary
        _print_one(console, other, f"rank {other.rank} failed next", "" if again else other.traceback)
    if ended:
        console.print(f"distadam launch: then ended rank {', '.join(map(str, ended))}", highlight=False)


def _print_one(console: Console, failure: RankFailure, what: str, traceback: str) -> None:
    reason = "" if traceback else f": {failure.summary}"
    console.print(f"distadam launch: {what} (exit code {failure.exit_code}){reason}", style="bold red", markup=False)
    if traceback:
        console.print(traceback, end="", markup=False, highlight=False, soft_wrap=True)


def _read(rank: int, failure: ProcessFailure) -> RankFailure:
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        extra = message.get("extraInfo", {})
        time_s = extra["timestamp_ns"] / 1e9 if "timestamp_ns" in extra else float(failure.timestamp)
        summary, traceback = str(message.get("message", "")), str(extra.get("py_callstack", ""))
        exit_code = int(extra.get("exit_code", 1)) & 255
        return RankFailure(rank=rank, exit_code=exit_code, time_s=time_s, summary=summary, traceback=traceback)
    exit_code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    if failure.exitcode == -signal.SIGTERM:
        return RankFailure(rank=rank, exit_code=exit_code, time_s=float("inf"), summary="ended", traceback="")
    summary = f"signal {failure.signal_name()}" if failure.exitcode < 0 else "the process ended without an exception"
    time_s = failure.timestamp - _CRASH_HEAD_START_S
    return RankFailure(rank=rank, exit_code=exit_code, time_s=time_s, summary=summary, traceback="")
