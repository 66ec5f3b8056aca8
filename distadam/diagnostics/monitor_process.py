"""The training process's side of its monitor: the address, the file without a name, the process that answers."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref

from distadam.diagnostics import monitor_server
from distadam.errors import ConfigError

_logger = logging.getLogger("distadam")

MOST_STARTS = 4


class Answering:
    """Listens on an address and has a process answer there; see Note [A process of its own].

    Args:
        host, port: to listen on; port 0 is one that the system chooses.
        rank: whose numbers these are.
        stall_s: seconds without a sign of life after which the rank is unhealthy.
        content_type: of the text.
        checkpoints: directory in which to look for commit markers.

    Raises:
        ConfigError: the address is taken, or not this host's.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rank: int,
        stall_s: float,
        content_type: str,
        checkpoints: str | os.PathLike[str] | None,
    ) -> None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"monitor: rank {rank} cannot listen on {host}:{port}: {error}. Each rank of a host needs a port of "
                "its own, port=9100 + run.local_rank for example; port=0 takes a free one."
            ) from error
        self.port: int = self._listener.getsockname()[1]
        self._file = _file_without_name()
        self._pid = os.getpid()
        self._options = {
            "file": self._file,
            "listener": self._listener.fileno(),
            "parent": self._pid,
            "rank": rank,
            "stall_s": stall_s,
            "checkpoints": None if checkpoints is None else os.path.abspath(os.fspath(checkpoints)),
            "content_type": content_type,
        }
        self._starts = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self.beat(0, time.monotonic())
        self._start()
        self._end = weakref.finalize(self, _end, self._processes, self._listener, self._file, self._pid)

    def beat(self, step: int, now_s: float) -> None:
        """Say that ``step`` was done at ``now_s`` of ``time.monotonic()``: one small write to memory."""
        monitor_server.write_beat(self._file, step, now_s)

    def show(self, text: bytes) -> None:
        """Show ``text`` from now on; start the process again if it was lost."""
        monitor_server.write_text(self._file, text)
        code = self._processes[-1].poll()
        if code is not None and self._starts < MOST_STARTS:
            again = "it is started again" if self._starts + 1 < MOST_STARTS else "it is started for the last time"
            _logger.warning("the monitor's process ended with code %d; %s", code, again)
            self._start()

    def close(self) -> None:
        """End the process and free the address."""
        self._end()

    def _start(self) -> None:
        self._starts += 1
        # Neither site-packages nor the environment's paths: nothing of the job's is imported, and it starts quickly.
        command = [sys.executable, "-I", "-S", monitor_server.__file__, json.dumps(self._options)]
        descriptors = (self._file, self._listener.fileno())
        self._processes[:] = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=descriptors)
        ]


def _file_without_name() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("distadam-monitor")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _end(processes: list[subprocess.Popen[bytes]], listener: socket.socket, file: int, pid: int) -> None:
    if os.getpid() != pid:  # a child that was forked has them too
        return
    for process in processes:
        process.kill()
        process.wait()
    listener.close()
    os.close(file)
