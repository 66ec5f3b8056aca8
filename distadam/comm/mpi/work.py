"""What torch.distributed gets for an operation in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from distadam.comm.mpi.progress import Job, Progress
from distadam.errors import CommError

_NO_TIMEOUT = timedelta(0)  # torch's default


class MpiWork(dist.Work):
    """An operation of the mpi4py backend.

    Args:
        progress: carries it out.
        job: the operation.
        tensors: its result, once it is done.
    """

    def __init__(self, progress: Progress, job: Job, tensors: list[Tensor]) -> None:
        super().__init__()
        self._progress = progress
        self._job = job
        self._tensors = tensors
        self._future: Future[list[Tensor]] | None = None
        self.sources: list[int] = []  # of a receive, once it is done: the sender

    def is_completed(self) -> bool:
        """Say whether it has ended, well or not."""
        return self._job.ended.is_set()

    def is_success(self) -> bool:
        """Say whether it has ended well."""
        return self.is_completed() and self._job.error is None

    def exception(self) -> CommError | None:
        """Return why it has failed, None as long as it has not."""
        return self._job.error

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Block until it has ended.

        Args:
            timeout: how long to block at most; the operation goes on all the same. 0, or no less than the operation's
                own timeout (its group's): until it ends, by the latter if need be, which finds out who is missing.

        Returns:
            True.

        Raises:
            CommError: it failed, or has not ended by then; names the operation, and who is missing.
        """
        seconds = timeout.total_seconds()
        if not self._progress.wait(self._job, seconds if 0 < seconds < self._job.timeout_s else None):
            raise CommError(f"{self._job.what} has not ended after {seconds:g} s; it goes on")
        if self._job.error is not None:
            raise CommError(str(self._job.error)) from self._job.error
        return True

    def synchronize(self) -> None:
        """Block until it has ended."""
        self.wait()

    def result(self) -> list[Tensor]:
        """Block until it has ended; return the tensors that were written."""
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """Return whose message a receive from anybody has got, as a rank of the group."""
        self.wait()
        if not self.sources:
            raise CommError(f"{self._job.what} receives nothing.")
        return self.sources[0]

    _source_rank = source_rank

    def when_done(self, call: Callable[[], object]) -> None:
        """Have ``call`` called when it has ended, by the thread that ends it; at once if it has."""
        self._job.when_done(call)

    def get_future(self) -> Future[Any]:
        """Return a future of the tensors that are written.

        What is chained to it runs on a thread of its own, which may wait for other operations.
        """
        if self._future is None:
            self._future = Future()
            self._job.when_done(self._fulfil)
        return self._future

    def _fulfil(self) -> None:
        future = self._future
        assert future is not None

        def fulfil() -> None:
            if self._job.error is None:
                future.set_result(self._tensors)
            else:
                future.set_exception(self._job.error)  # type: ignore[arg-type]  # torch annotates a result

        if threading.current_thread().name == Progress.THREAD_NAME:  # it has others to carry on with
            threading.Thread(target=fulfil, name="distadam mpi future", daemon=True).start()
        else:
            fulfil()
