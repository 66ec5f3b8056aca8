"""The process that answers /healthz and /metrics for one rank. Run as a script: it imports neither torch nor distadam.

Note [A process of its own]: a thread of the training process would take Python's lock from training for each answer,
and could give none while training is stuck in a call that holds the lock, which is when it is wanted. So training only
leaves its numbers in a file without a name (`write_beat` each step, `write_text` about once a second), and a small
process reads them whenever somebody asks. It runs at the lowest priority, ends with the process that it answers for,
and is started again if it is lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The file: a beat (step, seconds of time.monotonic(), which all processes of a host share), the text's head (bytes,
# CRC-32), the text. Checksums take the place of a lock: what was half-written is read again, or the last good one kept.
_BEAT, _BEAT_AT = struct.Struct("<qd"), 0
_HEAD, _HEAD_AT = struct.Struct("<QI"), 64
_CRC = struct.Struct("<I")
TEXT_AT = 128

MOST_CONNECTIONS = 64  # the oldest gives way
MOST_REQUEST_BYTES = 8192
MOST_UNSENT_BYTES = 1 << 20
PATIENCE_S = 10.0  # for a whole request, and between two of a connection
PARENT_S = 0.5  # how often to look whether the training process lives
CHECKPOINTS_S = 5.0

_REQUEST = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,2048}) HTTP/1\.([01])\r\n")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def write_beat(file: int, step: int, now_s: float) -> None:
    """Say that ``step`` was done at ``now_s`` of ``time.monotonic()``."""
    beat = _BEAT.pack(step, now_s)
    os.pwrite(file, beat + _CRC.pack(zlib.crc32(beat)), _BEAT_AT)


def read_beat(file: int) -> tuple[int, float] | None:
    """Return the last step and its moment; None if it was being written."""
    beat = os.pread(file, _BEAT.size + _CRC.size, _BEAT_AT)
    if len(beat) < _BEAT.size + _CRC.size or _CRC.unpack_from(beat, _BEAT.size)[0] != zlib.crc32(beat[: _BEAT.size]):
        return None
    step, now_s = _BEAT.unpack_from(beat)
    return step, now_s


def write_text(file: int, text: bytes) -> None:
    """Leave the numbers, in Prometheus' text format."""
    os.pwrite(file, text, TEXT_AT)
    os.pwrite(file, _HEAD.pack(len(text), zlib.crc32(text)), _HEAD_AT)


def read_head(file: int) -> bytes:
    """Return what changes whenever the text does."""
    return os.pread(file, _HEAD.size, _HEAD_AT)


def read_text(file: int, head: bytes) -> bytes | None:
    """Return the text that was left with ``head``; None if it was being written."""
    if len(head) < _HEAD.size:
        return None
    nbytes, crc = _HEAD.unpack(head)
    text = os.pread(file, nbytes, TEXT_AT)
    return text if zlib.crc32(text) == crc else None


class Answers:
    """What is answered to which path.

    Args:
        file: what training writes to.
        rank: becomes a label.
        stall_s: seconds without a step after which the rank is unhealthy.
        content_type: of the text.
        commit_time: returns when the newest checkpoint was committed, in Unix seconds, or None.
    """

    def __init__(
        self, file: int, rank: int, stall_s: float, content_type: str, commit_time: Callable[[], float | None]
    ) -> None:
        self._file, self._rank, self._stall_s = file, rank, stall_s
        self._content_type, self._commit_time = content_type, commit_time
        self._beat = (0, time.monotonic())
        self._head, self._text = b"", b""

    def respond(self, request: bytes) -> tuple[bytes, bool]:
        """Return the whole response to a request's head, and whether the connection stays open."""
        match = _REQUEST.match(request)
        headers = request.lower()
        if match is None or b"\r\ncontent-length:" in headers or b"\r\ntransfer-encoding:" in headers:
            return self._response(400, b"expected GET without a body\n")
        method, target, minor = match.groups()
        if method not in (b"GET", b"HEAD"):
            return self._response(405, b"expected GET or HEAD\n", headers="Allow: GET, HEAD\r\n")
        keep = minor == b"1" and b"\r\nconnection: close" not in headers
        path = target.partition(b"?")[0]
        if path == b"/healthz":
            status, body = self.health()
            return self._response(status, body, "application/json", keep=keep, head=method == b"HEAD")
        if path == b"/metrics":
            return self._response(200, self.metrics(), self._content_type, keep=keep, head=method == b"HEAD")
        return self._response(404, b"there are /healthz and /metrics\n")

    @staticmethod
    def too_long() -> bytes:
        """Return the response to a head without an end."""
        return Answers._response(431, b"the request is too long\n")[0]

    def health(self) -> tuple[int, bytes]:
        """Return 200 while steps are done, else 503, and what is known as JSON."""
        step, age_s = self._age()
        healthy = age_s <= self._stall_s
        about = {
            "status": "ok" if healthy else "stalled",
            "rank": self._rank,
            "step": step,
            "last_step_age_s": round(age_s, 3),
            "stall_s": self._stall_s,
        }
        return (200 if healthy else 503), json.dumps(about).encode() + b"\n"

    def metrics(self) -> bytes:
        """Return the text that training left, and what goes on while training does not."""
        head = read_head(self._file)
        if head != self._head:
            text = read_text(self._file, head)
            if text is not None:
                self._head, self._text = head, text
        _, age_s = self._age()
        lines = self._gauge("healthy", "1 while steps are done, 0 once the last is too old.", age_s <= self._stall_s)
        lines += self._gauge("last_step_age_seconds", "Time since the last step or other sign of life.", age_s)
        committed = self._commit_time()
        if committed is not None:
            age = max(0.0, time.time() - committed)
            lines += self._gauge("checkpoint_age_seconds", "Time since the newest checkpoint was committed.", age)
        return self._text + lines.encode()

    def _age(self) -> tuple[int, float]:
        self._beat = read_beat(self._file) or read_beat(self._file) or self._beat
        return self._beat[0], max(0.0, time.monotonic() - self._beat[1])

    def _gauge(self, name: str, about: str, value: float) -> str:
        name = f"distadam_{name}"
        return f'# HELP {name} {about}\n# TYPE {name} gauge\n{name}{{rank="{self._rank}"}} {float(value)!r}\n'

    @staticmethod
    def _response(
        status: int,
        body: bytes,
        kind: str = "text/plain; charset=utf-8",
        *,
        headers: str = "",
        keep: bool = False,
        head: bool = False,
    ) -> tuple[bytes, bool]:
        connection = "keep-alive" if keep else "close"
        start = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"Connection: {connection}\r\n{headers}\r\n"
        )
        return start.encode() + (b"" if head else body), keep


class Connection(asyncio.Protocol):
    """One client: as patient as `PATIENCE_S`, as tolerant as the limits above."""

    def __init__(self, answers: Answers, connections: dict[Connection, None]) -> None:
        self._answers, self._connections = answers, connections
        self._received = bytearray()

    def connection_made(self, transport: Any) -> None:
        """Take a client in, in place of the oldest if there are too many."""
        self._transport = transport
        if len(self._connections) >= MOST_CONNECTIONS:
            next(iter(self._connections)).abort()
        self._connections[self] = None
        self._wait()

    def _wait(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(PATIENCE_S, self.abort)

    def abort(self) -> None:
        """Drop the client."""
        self._connections.pop(self, None)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Answer whatever requests are complete."""
        self._received += data
        while not self._transport.is_closing():
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                if len(self._received) > MOST_REQUEST_BYTES:
                    self._transport.write(self._answers.too_long())
                    self._transport.close()
                return
            request = bytes(self._received[: end + 2])
            del self._received[: end + 4]
            response, keep = self._answers.respond(request)
            self._transport.write(response)
            self._deadline.cancel()
            self._wait()
            if self._transport.get_write_buffer_size() > MOST_UNSENT_BYTES:
                self.abort()  # asks and does not read
            elif not keep:
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the client."""
        self._deadline.cancel()
        self._connections.pop(self, None)


class Checkpoints:
    """Looks for the newest commit marker in a directory, in a thread: a network file system may hang.

    Args:
        directory: of checkpoints; or None, and there is nothing to look for.
    """

    def __init__(self, directory: str | None) -> None:
        self._newest: float | None = None
        if directory is not None:
            threading.Thread(target=self._look, args=(Path(directory),), daemon=True).start()

    def commit_time(self) -> float | None:
        """Return when the newest checkpoint was committed, Unix seconds."""
        return self._newest

    def _look(self, directory: Path) -> None:
        while True:
            times = []
            for marker in (directory / "commit.json", *directory.glob("*/commit.json")):
                try:
                    times.append(marker.stat().st_mtime)
                except OSError:
                    continue  # removed meanwhile
            self._newest = max(times, default=None)
            time.sleep(CHECKPOINTS_S)


async def _serve(listener: socket.socket, answers: Answers, parent: int) -> None:
    connections: dict[Connection, None] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers, connections), sock=listener)
    async with server:
        while os.getppid() == parent:
            await asyncio.sleep(PARENT_S)


def main(options: dict[str, Any]) -> None:
    """Answer until the parent is gone."""
    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGUSR1",
        "SIGUSR2",
    ):  # meant for training: Slurm signals all processes
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.nice(19)
    checkpoints = Checkpoints(options["checkpoints"])
    answers = Answers(
        options["file"], options["rank"], options["stall_s"], options["content_type"], checkpoints.commit_time
    )
    asyncio.run(_serve(socket.socket(fileno=options["listener"]), answers, options["parent"]))
    os._exit(0)  # not waiting for a thread that a file system holds


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
