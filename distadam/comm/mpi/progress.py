"""The thread that makes all MPI calls of this process, and keeps them going.

Note [Progress]: MPI moves data only inside MPI calls, so somebody has to call. One thread starts every operation and
tests what is in flight. It does so without a pause while data moves (a test that takes long has copied something), and
at growing distances otherwise: soon again where somebody waits for a result, up to a millisecond apart where the
process computes meanwhile. With nothing in flight it looks ten times a second: what MPI has taken over from a finished
operation may still have to be pushed out, and peers may ask what this rank is doing.

Note [Order]: MPI wants the collectives of a communicator in one order on all ranks, and a collective here may be
several of MPI's. So each group has a lane in which one collective runs at a time. Sends and receives are outside of
it.

Note [Who is missing]: MPI does not say whose absence an operation waits for. Shortly before the time is up, this rank
asks the others by letters on a communicator of their own how far they have come in that lane. Whoever does not answer
is dead, stopped, or keeps Python's lock; whoever has not come as far is called missing.

Note [Unusable groups]: what has not finished in time is in flight for ever, with its memory. No later collective could
be matched with those of the peers, so the group refuses all of them, and the process does not end by MPI_Finalize,
which would wait for the peers, but by MPI_Abort, which ends the job; a few seconds later, so that others get to
report.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from distadam.errors import CommError

GRACE_S = 3.0
"""Seconds between a failure and the end of the job, for peers to notice the same failure and say so."""

_SPIN_S = 50e-6
_MOVED_S = 100e-6  # a test that takes longer has moved data
_SHORTEST_S, _LONGEST_WAITED_S, _LONGEST_S, _IDLE_S = 20e-6, 200e-6, 1e-3, 0.1
_DRAIN_S = 5.0
_QUESTION, _ANSWER = 1, 2

Steps = Generator[list[Any], list[Any], None]
"""An operation: yields requests, goes on with their statuses when all are done."""


class Lane:
    """The collectives of one group, one at a time; see Note [Order].

    Args:
        name: the same on all ranks of the group, different for each group.
        key: the name as a number.
        world_ranks: the ranks of the group, in MPI's world.
    """

    def __init__(self, name: str, key: int, world_ranks: Sequence[int]) -> None:
        self.name = name
        self.key = key
        self.world_ranks = list(world_ranks)
        self.num_entered = 0
        self.current: Job | None = None
        self.waiting: deque[Job] = deque()
        self.error: CommError | None = None


class Job:
    """An operation, from its submission to its end.

    Args:
        what: operation and group, for errors.
        steps: carries it out, on the progress thread.
        timeout_s: seconds from its start to its end.
        lane: of its group.
        peers: world ranks that take part.
        is_collective: whether it keeps to the lane.
    """

    def __init__(
        self, what: str, steps: Steps, timeout_s: float, lane: Lane, peers: Sequence[int], is_collective: bool
    ) -> None:
        self.what = what
        self.steps = steps
        self.timeout_s = timeout_s
        self.lane = lane
        self.peers = peers
        self.is_collective = is_collective
        self.sequence = -1
        self.deadline = 0.0
        self.answers: dict[int, int] | None = None
        self.requests: list[Any] = []
        self.statuses: list[Any] = []
        self.num_open = 0
        self.error: CommError | None = None
        self.ended = threading.Event()
        self._listeners: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def when_done(self, call: Callable[[], object]) -> None:
        """Have ``call`` called when the operation has ended, once; at once if it has."""
        with self._lock:
            if not self.ended.is_set():
                self._listeners.append(call)
                return
        call()

    def end(self, error: CommError | None = None) -> None:
        """Let everybody know that it is over; the first call counts."""
        with self._lock:
            if self.ended.is_set():
                return
            self.error = error
            self.ended.set()
        for call in self._listeners:
            call()


class Progress:
    """Carries out jobs on a thread of its own; see Note [Progress].

    Args:
        mpi: mpi4py's module.
        letters: a communicator like MPI's world that nobody else uses.
    """

    THREAD_NAME = "distadam mpi"

    def __init__(self, mpi: Any, letters: Any) -> None:
        self._mpi = mpi
        self._letters = letters
        self._sent: list[tuple[Any, Any]] = []
        self._lanes: dict[int, Lane] = {}
        self._changed = threading.Condition()
        self._new: list[Job] = []
        self._num_waiting = 0
        self._stopping = False
        self._running: list[Job] = []
        self._free: deque[Lane] = deque()
        self._abandoned: list[Job] = []
        self._status_pool: list[Any] = []
        self._pause_s = 0.0
        self._quiet_since = 0.0
        self._letters_due = 0.0
        self._failed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=self.THREAD_NAME, daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    # For other threads ------------------------------------------------------------------------------------------------

    def add_lane(self, lane: Lane) -> None:
        """Let peers ask about a group."""
        self._lanes[lane.key] = lane

    def remove_lane(self, lane: Lane) -> bool:
        """Forget a group; say whether its communicator may go: nothing is in flight, nothing will be for ever."""
        self._lanes.pop(lane.key, None)
        with self._changed:
            return not any(job.lane is lane for job in (*self._new, *self._running, *self._abandoned))

    def submit(self, job: Job) -> None:
        """Have an operation carried out. Syncs: never."""
        with self._changed:
            if self._stopping:
                raise CommError(f"{job.what} could not start: this process is ending.")
            self._new.append(job)
            self._changed.notify()

    def wait(self, job: Job, timeout_s: float | None) -> bool:
        """Wait for a job to end; say whether it has."""
        if job.ended.is_set():
            return True
        if threading.current_thread() is self._thread:
            raise CommError(f"{job.what} cannot be waited for on the thread that carries it out.")
        with self._changed:
            self._num_waiting += 1
            self._changed.notify()
        try:
            return job.ended.wait(timeout_s)
        finally:
            with self._changed:
                self._num_waiting -= 1

    def stop(self) -> None:
        """End the thread, before MPI is finalized; what is in flight is given a few seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        if self._running or self._failed_at is not None:
            if self._failed_at is not None:
                time.sleep(max(0.0, self._failed_at + GRACE_S - time.monotonic()))
            self._mpi._set_abort_status(1)

    # On the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.no_grad():
            stop_at = None
            while True:
                with self._changed:
                    if not self._new and not self._stopping and self._pause_s > 0:
                        self._changed.wait(self._pause_s)
                    new, self._new = self._new, []
                    if self._stopping and stop_at is None:
                        stop_at = time.monotonic() + (_DRAIN_S if self._failed_at is None else 0.0)
                for job in new:
                    self._admit(job)
                self._turn(bool(new))
                if stop_at is not None and (not self._running or time.monotonic() > stop_at):
                    return

    def _turn(self, has_begun: bool) -> None:
        began = time.monotonic()
        num_done = self._test() if self._running else 0
        while self._free:  # a loop, since a queue of collectives that end at once would be a recursion of its length
            lane = self._free.popleft()
            self._admit(lane.waiting.popleft())
            if lane.waiting and lane.current is None:
                self._free.append(lane)
        if began >= self._letters_due:
            self._read_letters()
            self._letters_due = began + _LONGEST_S
        now = time.monotonic()
        for job in list(self._running):
            self._watch(job, now)
        if num_done or has_begun or (self._running and now - began > _MOVED_S):
            self._pause_s, self._quiet_since = 0.0, now
        elif not self._running:
            self._pause_s = min(_IDLE_S, max(_LONGEST_S, 2 * self._pause_s))
        elif self._num_waiting and now - self._quiet_since < _SPIN_S:
            self._pause_s = 0.0
            os.sched_yield()
        else:
            longest = _LONGEST_WAITED_S if self._num_waiting else _LONGEST_S
            self._pause_s = min(longest, max(_SHORTEST_S, 2 * self._pause_s))

    def _test(self) -> int:
        """Go on with the jobs whose requests are done; return how many requests were."""
        requests, owners = [], []
        for job in self._running:
            requests += job.requests
            owners += [job] * len(job.requests)
        while len(self._status_pool) < len(requests):
            self._status_pool.append(self._mpi.Status())
        statuses = self._status_pool[: len(requests)]
        try:
            done = self._mpi.Request.Testsome(requests, statuses) or []
        except self._mpi.Exception:
            return self._find_failure()
        for place, index in enumerate(done):
            owner = owners[index]
            owner.num_open -= 1
            if not owner.is_collective:
                owner.statuses.append(self._mpi.Status(statuses[place]))
        for job in [job for job in self._running if job.num_open == 0]:
            self._advance(job)
        return len(done)

    def _find_failure(self) -> int:
        """Test one request after the other, and end the jobs of those that MPI says have failed."""
        num_done = 0
        for job in list(self._running):
            job.num_open = len(job.requests)
            job.statuses.clear()
            try:
                for request in job.requests:
                    status = self._mpi.Status()
                    if request.Test(status):
                        job.num_open -= 1
                        num_done += 1
                        job.statuses.append(status)
            except self._mpi.Exception as error:
                self._end(job, self._failure(job, error))
                continue
            if job.num_open == 0:
                self._advance(job)
        return num_done

    def _admit(self, job: Job) -> None:
        if job.lane.error is not None:
            job.end(CommError(f"{job.what} could not start: the group is unusable since {job.lane.error}"))
        elif job.is_collective and job.lane.current is not None:
            job.lane.waiting.append(job)
        else:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        if job.is_collective:
            job.lane.current = job
            job.lane.num_entered += 1
            job.sequence = job.lane.num_entered
        job.deadline = time.monotonic() + job.timeout_s
        self._running.append(job)
        self._advance(job)

    def _advance(self, job: Job) -> None:
        try:
            while job.num_open == 0:
                statuses, job.statuses = job.statuses, []
                job.requests = job.steps.send(statuses) if job.requests else next(job.steps)
                job.num_open = len(job.requests)
        except StopIteration:
            self._end(job)
        except Exception as error:
            self._end(job, self._failure(job, error))

    def _end(self, job: Job, error: CommError | None = None) -> None:
        self._running.remove(job)
        lane = job.lane
        if error is not None and job.is_collective:
            self._give_up(lane, error)
        if lane.current is job:
            lane.current = None
        if error is not None and job.num_open:
            self._abandoned.append(job)  # MPI may still write there
        if lane.waiting and lane.current is None:
            self._free.append(lane)
        job.end(error)

    def _give_up(self, lane: Lane, error: CommError) -> None:
        """See Note [Unusable groups]."""
        if lane.error is None:
            lane.error = error
        if self._failed_at is None:
            self._failed_at = time.monotonic()

    def _failure(self, job: Job, error: Exception) -> CommError:
        place = f" (with rank {job.peers[0]})" if len(job.peers) == 1 else ""
        failure = CommError(f"{job.what} failed{place}: {error}")
        failure.__cause__ = error
        return failure

    # Peers that do not come -------------------------------------------------------------------------------------------

    def _watch(self, job: Job, now: float) -> None:
        """Ask the peers of a job that has little time left; end it when it has none."""
        if job.answers is None and now > job.deadline - min(1.0, job.timeout_s / 3):
            job.answers = {}
            for peer in job.peers:
                self._send_letter(peer, _QUESTION, (job.lane.key, job.sequence, 0))
        if now > job.deadline:
            error = CommError(f"{job.what} did not finish within {job.timeout_s:g} s: {self._account(job)}")
            self._give_up(job.lane, error)
            self._end(job, error)

    def _account(self, job: Job) -> str:
        """Say who is missing; see Note [Who is missing]."""
        answers = job.answers or {}
        silent = [peer for peer in job.peers if peer not in answers and peer != self._letters.rank]
        behind = [peer for peer, num_entered in answers.items() if num_entered < job.sequence]
        found = []
        if silent:
            found.append(f"{_ranks(silent)} dead, stopped or busy inside Python's lock (no answer)")
        if behind:
            found.append(f"{_ranks(behind)} alive and not there yet")
        if not found and job.is_collective:
            found.append("all ranks take part in it; the network or the machine is too slow")
        if not found:
            found.append(f"{_ranks(job.peers)} alive but has not sent or received it")
        return "; ".join(found)

    def _send_letter(self, peer: int, tag: int, words: tuple[int, int, int]) -> None:
        letter = array.array("q", words)
        with contextlib.suppress(self._mpi.Exception):  # a peer that cannot be reached will be missing
            self._sent.append((self._letters.Isend([letter, self._mpi.INT64_T], peer, tag), letter))

    def _read_letters(self) -> None:
        """Answer questions and note answers. Any call gives MPI a chance to move what it still holds."""
        with contextlib.suppress(self._mpi.Exception):
            while True:
                status = self._mpi.Status()
                message = self._letters.Improbe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status)
                if message is None:
                    break
                letter = array.array("q", (0, 0, 0))
                message.Recv([letter, self._mpi.INT64_T])
                key, sequence, num_entered = letter
                if status.tag == _QUESTION:
                    lane = self._lanes.get(key)
                    entered = -1 if lane is None else lane.num_entered
                    self._send_letter(status.source, _ANSWER, (key, sequence, entered))
                else:
                    for job in self._running:
                        if job.answers is not None and (job.lane.key, job.sequence) == (key, sequence):
                            job.answers[status.source] = num_entered
            self._sent = [entry for entry in self._sent if not entry[0].Test()]


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(str(rank) for rank in sorted(ranks))
    return f"rank {listed} is" if len(ranks) == 1 else f"ranks {listed} are"
