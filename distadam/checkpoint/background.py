"""Asynchronous saves: a staged copy, one thread, and what happens when it fails or the process ends.

Note [Meeting through files]: the thread must not issue collectives (they would be matched with the training's), and the
process group may be gone when the last save ends. So each rank writes a small part file when its data are on disk, and
the first rank's thread commits when it has seen all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distadam import native
from distadam.checkpoint.agree import agree, as_ours
from distadam.checkpoint.files import Slice
from distadam.checkpoint.job import Job
from distadam.engine.access import Access
from distadam.engine.votes import Purpose
from distadam.errors import CheckpointError

EXIT_GRACE_S = 15.0
"""How long the committing rank waits for the others' files when its process ends."""

_POLL_S = 0.02
_logger = logging.getLogger("distadam")


class Save:
    """A save that is done or under way; see `save`.

    Attributes:
        path: where.
        nbytes: what this rank writes.
    """

    def __init__(self, job: Job, optimizer: weakref.ref[Any], thread: _Writer | None = None) -> None:
        self.path = job.store.path
        self.nbytes = sum(part.tensor.nbytes for part in job.parts)
        self._optimizer, self._thread = optimizer, thread

    @property
    def done(self) -> bool:
        """Whether this rank has nothing left to do. Local."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is committed.

        Raises:
            CheckpointError: a rank could not write; raised on every rank.

        Collective: every rank of shard x replicate, for an asynchronous save. Syncs: the host waits.
        """
        optimizer = self._optimizer()
        if self._thread is not None and optimizer is not None and _in_flight.get(optimizer) is self._thread:
            access = optimizer.checkpoint_access()
            access.announce(Purpose.WAIT_CHECKPOINT)
            settle(optimizer, access)


class _Writer(threading.Thread):
    """Writes one job, and commits it on the first rank."""

    def __init__(self, job: Job, buffers: _Staging) -> None:
        super().__init__(name=f"distadam checkpoint {job.id}", daemon=True)
        self.job, self.buffers = job, buffers
        self.error: Exception | None = None
        self.commit_error: Exception | None = None
        self.written = threading.Event()
        self.abort = threading.Event()
        self.deadline_s: float | None = None

    def run(self) -> None:
        """Write, tell, commit; what goes wrong is kept for `settle`."""
        what = f"saving {self.job.store.path}"
        try:
            self.job.write()
            self.job.write_part()
        except Exception as error:
            self.error = as_ours(error, what)
            self.job.clean()
            with contextlib.suppress(Exception):
                self.job.write_part(error=str(self.error))
        finally:
            self.written.set()
        try:
            if self.error is None and self.job.template is not None:
                self._commit()
        except Exception as error:
            self.commit_error = as_ours(error, what)
        self.job.finished()

    def _commit(self) -> None:
        parts: list[Any] = [None] * self.job.num_ranks
        parts[self.job.rank] = self.job.items
        while any(part is None for part in parts):
            missing = [rank for rank, part in enumerate(parts) if part is None]
            for rank in missing:
                parts[rank] = self.job.read_part(rank)
            if self.abort.is_set():
                return
            if self.deadline_s is not None and time.monotonic() > self.deadline_s:
                raise CheckpointError(f"{self.job.store.path}: ranks {missing} wrote nothing; not committed.")
            if any(part is None for part in parts):
                time.sleep(_POLL_S)
        self.job.commit(parts)


class _Staging:
    """Host memory that the slices are copied to, kept for the next save."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def copy(self, parts: Sequence[Slice]) -> list[Slice]:
        """Return the slices with tensors of their own, in host memory."""
        offsets, nbytes = [], 0
        for part in parts:
            offsets.append(nbytes)
            nbytes += -(-part.tensor.nbytes // 64) * 64
        if self._buffer is None or self._buffer.numel() < nbytes:
            on_cuda = any(part.tensor.device.type == "cuda" for part in parts)
            self._buffer = None
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda)
        staged = []
        for part, offset in zip(parts, offsets, strict=True):
            own = self._buffer[offset : offset + part.tensor.nbytes].view(part.tensor.dtype)
            native.copy(own, part.tensor)  # past the cache, which is training's
            staged.append(replace(part, tensor=own))
        return staged


_in_flight: weakref.WeakKeyDictionary[Any, _Writer] = weakref.WeakKeyDictionary()
_buffers: weakref.WeakKeyDictionary[Any, _Staging] = weakref.WeakKeyDictionary()
_writers: weakref.WeakSet[_Writer] = weakref.WeakSet()
_hooked = False


def submit(optimizer: Any, job: Job) -> Save:
    """Copy a job's slices and write them in the background."""
    _hook()
    buffers = _buffers.setdefault(optimizer, _Staging())
    job.parts = buffers.copy(job.parts)
    writer = _Writer(job, buffers)
    _in_flight[optimizer] = writer
    _writers.add(writer)
    writer.start()
    return Save(job, weakref.ref(optimizer), writer)


def settle(optimizer: Any, access: Access) -> None:
    """Wait for the optimizer's save in flight, if there is one, and raise on every rank what went wrong on any.

    Collective: every rank of shard x replicate.
    """
    writer = _in_flight.get(optimizer)
    if writer is None:
        return
    what = f"the asynchronous save to {writer.job.store.path}"
    writer.written.wait()
    try:
        agree(access, what, writer.error)  # every rank has written
        writer.join()
        agree(access, what, writer.commit_error)  # and the first has committed
    except Exception:
        writer.abort.set()
        writer.join()
        writer.job.clean()
        raise
    finally:
        _in_flight.pop(optimizer, None)


def flush(grace_s: float = EXIT_GRACE_S) -> None:
    """Finish the saves in flight of this process without talking to other ranks; runs at exit and on SIGTERM.

    Args:
        grace_s: how long the committing rank waits for the others' files.
    """
    for writer in list(_writers):
        writer.deadline_s = time.monotonic() + grace_s
        if writer.ident is not None:
            writer.join()
        if writer.error is not None or writer.commit_error is not None:
            _logger.error("an asynchronous checkpoint was lost: %s", writer.error or writer.commit_error)
        _writers.discard(writer)


def _hook() -> None:
    """Flush at exit, and on SIGTERM before whatever else would happen then."""
    global _hooked
    if _hooked or threading.current_thread() is not threading.main_thread():
        return
    _hooked = True
    atexit.register(flush)
    before = signal.getsignal(signal.SIGTERM)

    def on_term(number: int, frame: Any) -> None:
        flush()
        if callable(before):
            before(number, frame)
        elif before is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, on_term)
