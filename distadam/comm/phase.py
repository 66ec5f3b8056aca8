"""What this process has started last, where whoever started it can read that after its death.

``launch/mpirun.sh`` and ``distadam launch`` name a folder in DISTADAM_PHASES; without it nothing is noted. The file
``phase.RANK`` in it is mapped memory, so what was noted outlives the process, however it ends, and a note costs no
system call. ``exit.RANK`` holds when, and how, a rank ended: a launcher may end all others, and the shell around the
rank that was first, before that shell can write it.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

VARIABLE = "DISTADAM_PHASES"

_NBYTES = 512
_file: mmap.mmap | None = None


def note(text: str) -> None:
    """Replace the note of this process."""
    global _file
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    if _file is None:
        path = Path(folder) / f"phase.{os.environ.get('RANK', '0')}"
        with path.open("wb+") as file:
            file.truncate(_NBYTES)
            _file = mmap.mmap(file.fileno(), _NBYTES)
    _file[:] = text.encode()[:_NBYTES].ljust(_NBYTES, b"\0")


def end(code: int) -> None:
    """Note that this process ends now, and with which exit code; the first note counts."""
    folder = os.environ.get(VARIABLE)
    if folder:
        rank = os.environ.get("RANK", "0")
        path = Path(folder) / f"exit.{rank}"
        if not path.exists():
            path.write_text(f"{time.time():.9f} {rank} {code}\n")


def read(folder: Path, rank: int) -> str:
    """Return what a rank has noted last; nothing if it has not."""
    try:
        return (folder / f"phase.{rank}").read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""
