"""Real processes for tests: pools of gloo ranks that live for the whole session.

``run_ranks(n, function, *args)`` runs a module-level function on n ranks of one gloo group and returns its results by
rank. Workers come from a forkserver that has torch and distadam imported, so a new pool costs a fifth of a second. A
rank that raises fails the call with every rank's traceback; a call that does not end within its time kills its pool (a
hang is a failure, never a wait).
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

MOST_GROUPS = 6  # gloo's threads wake a hundred times a second each: hundreds of left groups would take a whole core

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.testing", "torch._dynamo", "distadam"])


class RanksFailed(AssertionError):
    """Some rank raised, died or did not answer in time. ``errors`` maps rank to the exception's (type name, text)."""

    def __init__(self, message: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(message)
        self.errors = errors


def _serve(rank: int, num_ranks: int, store: str, connection: Connection, timeout_s: float) -> None:
    import datetime
    import warnings

    import torch
    import torch.distributed as dist

    from tests.staggered import stagger_for

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*barrier.*")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    gc.freeze()  # what is imported is no garbage: collections and scans of live objects stay cheap
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            os._exit(0)
        torch.manual_seed(0)
        stagger_for(function)
        try:
            answer = ("ok", function(rank, *args))
        except BaseException as error:
            answer = ("error", (type(error).__name__, str(error), traceback.format_exc()))
        gc.collect()
        connection.send((*answer, _num_collectives(), len(dist.distributed_c10d._world.pg_map)))


def _num_collectives() -> int:
    """Return how many collectives this rank has issued on the pool's own group."""
    import torch
    import torch.distributed as dist

    world: Any = dist.group.WORLD
    return int(world._get_backend(torch.device("cpu"))._get_sequence_number_for_group())


class Pool:
    """n ranks in one process group, ``worn`` once the next test is better off with another pool.

    That is so when ranks have issued different numbers of collectives on the group (they stopped in the middle of
    something, with an error that a test expects: the next collective would never match), and when tests have left more
    than ``MOST_GROUPS`` groups behind.
    """

    def __init__(self, num_ranks: int, timeout_s: float = 60.0) -> None:
        self.worn = False
        self._directory = tempfile.TemporaryDirectory()
        store = os.path.join(self._directory.name, "store")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(num_ranks):
            mine, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, num_ranks, store, theirs, timeout_s), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Run ``function(rank, *args)`` on every rank; return the results by rank."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    answers[rank] = waiting.pop(rank).recv()
                except (EOFError, ConnectionError):
                    answers[rank] = ("error", ("Died", f"rank {rank} died", ""), 0, 0)
        for rank in waiting:
            answers[rank] = ("error", ("Hang", f"rank {rank} did not answer within {timeout_s} s", ""), 0, 0)
        failed = {rank: answer for rank, (kind, answer, *_) in sorted(answers.items()) if kind == "error"}
        uneven = len({num_collectives for *_, num_collectives, _ in answers.values()}) > 1
        self.worn = uneven or any(num_groups > MOST_GROUPS for *_, num_groups in answers.values())
        if failed:
            self.close()
            text = "\n".join(f"rank {rank}: {name}: {what}\n{trace}" for rank, (name, what, trace) in failed.items())
            raise RanksFailed(text, {rank: (name, what) for rank, (name, what, _) in failed.items()})
        return [answers[rank][1] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """End all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._directory.cleanup()


_pools: dict[int, Pool] = {}


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run ``function(rank, *args)`` on ``num_ranks`` ranks that are kept for the next call; results by rank.

    Raises:
        RanksFailed: with every failing rank's traceback. The pool is then replaced.
    """
    pool = _pools.get(num_ranks)
    if pool is None:
        pool = _pools[num_ranks] = Pool(num_ranks)
    try:
        return pool.run(function, *args, timeout_s=timeout_s)
    except BaseException:
        pool.worn = True
        raise
    finally:
        if pool.worn:
            _pools.pop(num_ranks, None)
            pool.close()


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()
