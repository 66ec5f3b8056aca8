"""How much memory a piece of code takes beyond what its process had before."""

import contextlib
import ctypes
import threading
from pathlib import Path


def resident() -> int:
    """Return bytes of memory that this process has and shares with no file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["RssAnon"].split()[0])


class Peak:
    """The most memory beyond what there was at the start, looked at every few milliseconds.

    Args:
        every_s: time between two looks.
    """

    def __init__(self, every_s: float = 0.003) -> None:
        self.nbytes, self._every_s = 0, every_s

    def __enter__(self) -> "Peak":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed and kept would hide what is taken
        self._before, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.nbytes = max(self.nbytes, resident() - self._before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, resident() - self._before)  # what is kept counts, however fast it came
