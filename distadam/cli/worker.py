"""What ``distadam launch`` starts on every rank: runs the user's script and keeps its exception for the launcher.

Run by path, not imported, and made of the standard library alone: a rank that dies while importing torch is reported
like any other. The exception goes to the file that torchelastic names in ``TORCHELASTIC_ERROR_FILE``, in torchelastic's
format and with a finer clock, so that the launcher can tell which rank failed first.
"""

import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from types import TracebackType


def main() -> int:
    """Run the script or ``-m module`` in ``sys.argv`` as ``__main__``; return the exit code of a failed one.

    ``--cores`` before it gives each local rank its CPUs: "0,1:2,3" keeps rank 0 to CPUs 0 and 1.
    """
    sys.argv.pop(0)
    if sys.argv[0] == "--cores":
        _keep_to(sys.argv[1])
        del sys.argv[:2]
    is_module = sys.argv[0] == "-m"
    if is_module:
        sys.argv.pop(0)
    target = sys.argv[0]
    _replace_own_folder_in_path("" if is_module else os.path.dirname(os.path.abspath(target)))
    faulthandler.enable()  # a crash in native code shows the Python stack that led there
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            _record(f"SystemExit: {stop.code}", "", stop.code if isinstance(stop.code, int) else 1)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # the launcher says so once for all ranks
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, _script_frames(error.__traceback__)))
        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        if not _record(summary, text, 1) or not _is_last_attempt():
            sys.stderr.write(text)
        return 1
    return 0


def _keep_to(cores: str) -> None:
    """Keep this process, and all threads and processes that it will start, to its local rank's CPUs."""
    own = cores.split(":")[int(os.environ["LOCAL_RANK"])]
    os.sched_setaffinity(0, [int(cpu) for cpu in own.split(",")])


def _replace_own_folder_in_path(folder: str) -> None:
    """Put the script's folder where the interpreter put this file's."""
    own = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0] or ".") == own:
        sys.path[0] = folder


def _script_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return ``trace`` without the frames of this file and of runpy in front of the script's own."""
    start = trace
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace or start


def _record(summary: str, text: str, exit_code: int) -> bool:
    """Write the failure for the launcher, which may end this process before it exits; return whether it could."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    now_ns = time.time_ns()
    extra = {"py_callstack": text, "timestamp": str(now_ns // 10**9), "timestamp_ns": now_ns, "exit_code": exit_code}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": summary, "extraInfo": extra}}, file)
    return True


def _is_last_attempt() -> bool:
    """Return whether no restart is left: then the launcher prints the traceback, first failure first."""
    environ = os.environ
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") == environ.get("TORCHELASTIC_MAX_RESTARTS", "0")


if __name__ == "__main__":
    sys.exit(main())
