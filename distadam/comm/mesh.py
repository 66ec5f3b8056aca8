"""Sockets between the ranks of one host: tokens, file descriptors of memory, and the news that a peer has ended.

Note [Tokens]: ranks that read each other's memory say "my buffer is ready" and "I have read yours" by messages on Unix
sockets. A message is a system call on both sides, so memory is ordered on every processor; who waits sleeps in `poll`
and takes no time from a compute thread; a rank that ends, killed or not, closes its sockets, so its peers know at once;
and there is no thread. Nothing blocks in sending: what a socket does not take now goes with the next call.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import select
import socket
import struct
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

READY, READ, MAP, UNMAP, AGREE, SUM = range(6)

_MESSAGE = struct.Struct("<IIQQ")  # kind, segment, number, bytes
_MEETING_TIMEOUT_S = 30.0
_LOOK_AGAIN_S = 0.01


class Mesh:
    """Connections of this rank to the others of its host.

    Args:
        rank: this rank.
        names: what to call each rank in errors.
        sockets: by peer; SOCK_SEQPACKET, so a message comes whole or not at all.
    """

    def __init__(self, rank: int, names: Sequence[str], sockets: dict[int, socket.socket]) -> None:
        self.peers = [(rank + distance) % (len(sockets) + 1) for distance in range(1, len(sockets) + 1)]
        self.rank = rank
        self.on_map: Callable[[int, int, int, int, int], None] = _ignore_memory
        self.on_unmap: Callable[[int, int], object] = lambda peer, segment: None
        self._names = names
        self._sockets = sockets
        self._outgoing: dict[int, deque[tuple[bytes, int | None]]] = {peer: deque() for peer in sockets}
        self._segments: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)  # by kind and number: peer, segment
        self._gone: set[int] = set()
        self._lock = threading.RLock()
        self._poll = select.poll()
        self._peer_of = {}
        for peer, connection in sockets.items():
            connection.setblocking(False)
            self._poll.register(connection, select.POLLIN)
            self._peer_of[connection.fileno()] = peer
        weakref.finalize(self, _close, list(sockets.values()))
        _close_in_children(self)

    def name(self, peer: int) -> str:
        """Return what to call a peer in errors."""
        return self._names[peer]

    def tell(self, kind: int, number: int, segment: int = 0, nbytes: int = 0, descriptor: int | None = None) -> None:
        """Send a message to every peer; never blocks. ``descriptor`` is kept open as long as it is needed."""
        with self._lock:
            message = _MESSAGE.pack(kind, segment, number, nbytes)
            for peer in self.peers:
                copy = None if descriptor is None else os.dup(descriptor)
                self._outgoing[peer].append((message, copy))
            self._exchange()

    def arrived(self, kind: int, number: int) -> bool:
        """Say whether every peer has sent a token."""
        with self._lock:
            self._exchange()
            return not self._missing(kind, number)

    def wait(self, kind: int, number: int, timeout_s: float) -> dict[int, int]:
        """Block until every peer has sent a token; return the segments that they named, by peer.

        Raises:
            RuntimeError: names the peer that has ended, or that was silent for ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._exchange()
                missing = self._missing(kind, number)
                if not missing:
                    return self._segments.pop((kind, number), {})
                ended = next((peer for peer in missing if peer in self._gone), None)
                if ended is not None:
                    raise RuntimeError(f"{self._names[ended]} has ended")
                pending = any(self._outgoing.values())
                events = select.poll()  # not the one that other threads look at meanwhile
                for peer in missing:
                    events.register(self._sockets[peer], select.POLLIN)
            left = deadline - time.monotonic()
            if left <= 0:
                raise RuntimeError(
                    f"nothing came from {', '.join(self._names[peer] for peer in missing)} within {timeout_s:g} s"
                )
            # Not for as long as it takes: another thread may have received the token before this one began to sleep.
            events.poll(min(left, 0.001 if pending else _LOOK_AGAIN_S) * 1000)

    def _missing(self, kind: int, number: int) -> list[int]:
        came = self._segments.get((kind, number), {})
        # A peer that has ended reads nothing more: its leave to overwrite a buffer is not waited for.
        return [peer for peer in self.peers if peer not in came and not (kind == READ and peer in self._gone)]

    def _exchange(self) -> None:
        """Send what sockets take, receive what has come."""
        for peer, queue in self._outgoing.items():
            while queue:
                message, descriptor = queue[0]
                ancillary = []
                if descriptor is not None:
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
                try:
                    self._sockets[peer].sendmsg([message], ancillary)
                except BlockingIOError:
                    break
                except OSError:  # it has ended; whoever waits for it will say so
                    pass
                queue.popleft()
                if descriptor is not None:
                    os.close(descriptor)
        for number, _ in self._poll.poll(0):
            self._receive(self._peer_of[number])

    def _receive(self, peer: int) -> None:
        while peer not in self._gone:
            try:
                message, ancillary, _, _ = self._sockets[peer].recvmsg(_MESSAGE.size, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return
            except OSError:
                message, ancillary = b"", []
            if not message:
                self._gone.add(peer)
                self._poll.unregister(self._sockets[peer])
                return
            kind, segment, number, nbytes = _MESSAGE.unpack(message)
            if kind == MAP:
                if not ancillary:
                    raise RuntimeError(
                        f"memory of {self._names[peer]} could not be opened: this process has no file descriptor left; "
                        "raise ulimit -n"
                    )
                self.on_map(peer, segment, array.array("i", ancillary[0][2])[0], number, nbytes)
            elif kind == UNMAP:
                self.on_unmap(peer, segment)
            else:
                self._segments[kind, number][peer] = segment


_meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()


def _close_in_children(mesh: Mesh) -> None:
    """Have children that are forked later (a DataLoader's workers) close their copies of the sockets.

    Else peers see no end of this rank while a child of it lives.
    """
    _hook_forks()
    _meshes.add(mesh)


@cache
def _hook_forks() -> None:  # not at import: importing changes nothing
    os.register_at_fork(after_in_child=_close_copies)


def _close_copies() -> None:
    for mesh in _meshes:
        _close(list(mesh._sockets.values()))


def _ignore_memory(peer: int, segment: int, descriptor: int, number: int, nbytes: int) -> None:
    os.close(descriptor)


def _close(sockets: Sequence[socket.socket]) -> None:
    for connection in sockets:
        connection.close()


def connect(names: Sequence[str], rank: int, local: Sequence[int], swap: Callable[[Any], Sequence[Any]]) -> Mesh | None:
    """Return connections to the group's ranks on this host, or None on all ranks where not all can be reached.

    Args:
        names: what to call each rank of the group in errors.
        rank: this rank's place in the group.
        local: the group's ranks on this host; a rank's place among them is its number in the mesh.
        swap: returns every rank's value, by rank.

    Collective: every rank of the group, through ``swap``.
    """
    listener: socket.socket | None = None
    address = None
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("\0distadam-" + secrets.token_hex(16))  # abstract: no file, and known only to who is told
        listener.listen(len(local))
        address = listener.getsockname()
    except (OSError, AttributeError):
        pass
    answers = swap(address)
    addresses = [answers[other] for other in local]
    sockets: dict[int, socket.socket] = {}
    reached = False
    if all(other is not None for other in addresses):
        with contextlib.suppress(OSError, struct.error):
            sockets = _reach(local.index(rank), addresses, listener)
            reached = len(sockets) == len(local) - 1
    if listener is not None:
        listener.close()
    if not all(swap(reached)):
        _close(list(sockets.values()))
        return None
    return Mesh(local.index(rank), [names[other] for other in local], sockets)


def _reach(rank: int, addresses: Sequence[Any], listener: socket.socket | None) -> dict[int, socket.socket]:
    sockets = {}
    for peer in range(rank):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_MEETING_TIMEOUT_S)
        connection.connect(addresses[peer])
        connection.send(struct.pack("<I", rank))
        sockets[peer] = connection
    assert listener is not None
    listener.settimeout(_MEETING_TIMEOUT_S)
    while len(sockets) < len(addresses) - 1:
        connection, _ = listener.accept()
        connection.settimeout(_MEETING_TIMEOUT_S)
        sockets[struct.unpack("<I", connection.recv(4))[0]] = connection
    return sockets
