"""Write down where a rank stands when a collective fails, and when the launcher ends the process.

Note [Dumps]: a rank that waits in vain raises, and writes first. The rank that all wait for raises nothing: it hangs,
perhaps in native code. `distadam launch` ends it by SIGTERM once another rank has failed; under it (the variable
``DISTADAM_DUMPS`` names a folder) a signal's number goes through a pipe to a thread, which writes for the process and
then lets the signal do its work. Without the launcher nothing is installed, and what a failing rank has to say goes to
the log.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import threading
import time
import weakref
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from distadam.engine.waiting import WaitReport

VARIABLE = "DISTADAM_DUMPS"

_logger = logging.getLogger("distadam")


class Reporter(Protocol):
    """An optimizer."""

    def wait_report(self) -> WaitReport:
        """Say where this rank stands."""


_reporters: weakref.WeakSet[Reporter] = weakref.WeakSet()


def watch(optimizer: Reporter) -> None:
    """Ask ``optimizer`` too, as long as it lives, whenever it is to be written down where this rank stands."""
    _reporters.add(optimizer)
    if VARIABLE in os.environ and threading.current_thread() is threading.main_thread():
        _listen()


def failed(error: Exception, report: WaitReport) -> None:
    """Write down where this rank stands as a collective fails; ``report`` is of the optimizer whose it is."""
    if VARIABLE in os.environ:
        _write(str(error), [report])
    else:
        _logger.error("where this rank stands: %s", report)


def _write(reason: str, reports: list[WaitReport]) -> None:
    if not reports:
        return
    rank = int(os.environ.get("RANK", reports[0].rank))
    dump: dict[str, Any] = {
        "rank": rank,
        "time": time.time(),
        "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "reason": reason,
        "optimizers": [report.as_dict() for report in reports],
    }
    path = Path(os.environ[VARIABLE]) / f"waits.{rank}.json"
    if not reason and path.exists() and json.loads(path.read_text(encoding="utf-8"))["attempt"] == dump["attempt"]:
        return  # the failure itself says more
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dump), encoding="utf-8")
    part.replace(path)


@cache
def _listen() -> None:
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return  # the script's own
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        return
    signal.signal(signal.SIGTERM, _leave_it_to_the_thread)
    os.register_at_fork(after_in_child=_unlisten)
    threading.Thread(target=_serve, args=(reader,), name="distadam dumps", daemon=True).start()


def _leave_it_to_the_thread(*_: object) -> None:
    pass


def _unlisten() -> None:
    """Let children that are forked (a data loader's workers) be as they were."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _leave_it_to_the_thread:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _serve(reader: int) -> None:
    while True:
        if signal.SIGTERM not in os.read(reader, 64):
            continue
        try:
            _write("", [optimizer.wait_report() for optimizer in list(_reporters)])
        finally:
            if signal.getsignal(signal.SIGTERM) is _leave_it_to_the_thread:
                # signal.signal is the main thread's, which may hang.
                ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, ctypes.c_void_p(None))
                os.kill(os.getpid(), signal.SIGTERM)
