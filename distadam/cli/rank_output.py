"""Whole lines of every rank's output, each behind its rank in colour."""

import io
import threading
from typing import TextIO

from rich.console import Console

__all__ = ["PREFIX_TEMPLATE", "RankLines"]

# torchelastic puts this, filled in, before each piece of output that it reads from a rank's log.
PREFIX_TEMPLATE = "\x1e${rank}\x1f"
_START, _END = "\x1e", "\x1f"
_COLORS = (36, 35, 33, 32, 34, 31)  # ANSI foregrounds: cyan, magenta, yellow, green, blue, red
_lock = threading.Lock()  # one for both streams: they usually share a terminal


class RankLines(io.TextIOBase):
    """Stand in for stdout or stderr while ranks run.

    torchelastic reads a rank's log while it is written, so a piece may end in the middle of a line; printed as it
    comes, two ranks would share a line. Pieces wait here until their line is complete.

    Args:
        target: the real stream. Prefixes are coloured where rich would colour it.
    """

    def __init__(self, target: TextIO) -> None:
        self._target = target
        self._colored = Console(file=target).color_system is not None
        self._pending: dict[str, str] = {}

    def write(self, piece: str) -> int:
        """Take one piece of output, prefixed or not; return its length."""
        with _lock:
            if piece.startswith(_START):
                rank, _, text = piece[1:].partition(_END)
                self._add(rank, text)
            else:
                self._target.write(piece)
        return len(piece)

    def finish(self) -> None:
        """Write the lines that never ended."""
        with _lock:
            for rank in list(self._pending):
                self._add(rank, "\n")

    def flush(self) -> None:
        """Flush the real stream."""
        self._target.flush()

    def isatty(self) -> bool:
        """Return whether the real stream is a terminal."""
        return self._target.isatty()

    def _add(self, rank: str, text: str) -> None:
        line = self._pending.pop(rank, "") + text
        if not line.endswith("\n"):
            self._pending[rank] = line
            return
        self._target.write(f"{self._prefix(rank)} {line}")
        self._target.flush()

    def _prefix(self, rank: str) -> str:
        if not self._colored:
            return f"[{rank}]"
        return f"\x1b[{_COLORS[int(rank) % len(_COLORS)]}m[{rank}]\x1b[0m"
