"""Training that goes on after ranks were lost or added: a loop that resumes, saves, and stops on signals.

For ``torchrun --nnodes MIN:MAX --max-restarts N``: whenever the number of ranks changes, torchrun starts the script
again, and `run` goes on from the newest good checkpoint. What a rank reads is decided by `GlobalBatches` from the
position in the data and the number of ranks, so that no sample is read twice or left out. Set
``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun: without it the ranks that are left look for the lost one where it
was (https://github.com/pytorch/pytorch/issues/135712).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distadam.checkpoint.agree import agree
from distadam.checkpoint.background import Save
from distadam.checkpoint.loading import load
from distadam.checkpoint.prune import committed
from distadam.checkpoint.saving import save
from distadam.engine.access import Access
from distadam.engine.votes import Purpose
from distadam.errors import ConfigError, CorruptShard, IncompleteCheckpoint

_logger = logging.getLogger("distadam")
_POSITION = "distadam.elastic.step"
_SHARED_STORE = (
    "torchrun shares one store between the groups that it starts, so ranks that it starts again may connect to lost "
    "ones (pytorch issue 135712): start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
)


def run(
    directory: str | os.PathLike[str],
    model: nn.Module | None,
    optimizer: Any,
    *,
    num_steps: int,
    extra: Mapping[str, Any] | None = None,
    every: int | None = None,
    keep_last: int = 2,
    asynchronous: bool = True,
    on_save: Callable[[int, Save, float], object] | None = None,
) -> Iterator[int]:
    """Yield the numbers of the steps that are left to do, and save between them.

    Loads the newest checkpoint in ``directory`` whose every byte is good, whatever number of ranks wrote it; saves
    every ``every`` steps, after the last one, at SIGUSR1, and at SIGTERM, after which it ends the process with code
    143. A signal to one rank is a signal to all: they tell each other after each step.

    Args:
        directory: of this run's checkpoints, seen by all ranks.
        model: as for `save`.
        optimizer: as for `save`.
        num_steps: where training ends, counted over all restarts.
        extra: as for `save`; whatever has ``load_state_dict`` is restored: schedulers, `GlobalBatches`, `RandomState`.
        every: steps between checkpoints; None: only signals and the end.
        keep_last: committed checkpoints that stay.
        asynchronous: write while training goes on.
        on_save: called after each save with the steps done, the save, and the seconds for which training stood still.

    Example:
        >>> for step in elastic.run("runs/a", model, optimizer, num_steps=1000, every=50):  # doctest: +SKIP
        ...     train_one(step)

    Collective: every rank of shard x replicate, the loop included. Syncs: hosts agree once a step.
    """
    access: Access = optimizer.checkpoint_access()
    if access.collectives.groups.rank == 0 and _shares_store():
        _logger.warning(_SHARED_STORE)
    done = _resume(directory, model, optimizer, access, extra)
    with _signals() as seen:
        for step in range(done, num_steps):
            yield step
            terminate, on_demand = _any_rank(access, seen)
            due = (every is not None and (step + 1) % every == 0) or step + 1 == num_steps
            if not (due or terminate or on_demand):
                continue
            began = time.monotonic()
            handle = save(
                os.path.join(directory, f"step-{step + 1:09d}"),
                model,
                optimizer,
                extra={**(extra or {}), _POSITION: step + 1},
                asynchronous=asynchronous and not terminate,
                keep_last=keep_last,
            )
            if step + 1 == num_steps:
                handle.wait()
            if on_save is not None:
                on_save(step + 1, handle, time.monotonic() - began)
            if terminate:
                raise SystemExit(128 + signal.SIGTERM)


def _resume(
    directory: str | os.PathLike[str],
    model: nn.Module | None,
    optimizer: Any,
    access: Access,
    extra: Mapping[str, Any] | None,
) -> int:
    """Load the newest good checkpoint, the same on every rank; return the steps that it has done."""
    access.announce(Purpose.LOAD_CHECKPOINT)
    first = access.collectives.groups.rank == 0
    found = agree(access, "resuming", None, [store.path for store in committed(directory)] if first else None)[0]
    for path in found:
        try:
            return int(load(path, model, optimizer, extra=extra)[_POSITION])
        except (CorruptShard, IncompleteCheckpoint) as error:
            _logger.warning("passing over a damaged checkpoint: %s", error)
    return 0


def _shares_store() -> bool:
    """Say whether torchrun may start this script again on a store that it has used before."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


@contextmanager
def _signals() -> Iterator[Tensor]:
    """Count SIGTERM and SIGUSR1 in a tensor of two bytes while the loop runs; handlers are Python's main thread's."""
    seen = torch.zeros(2, dtype=torch.uint8)
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda got, _: seen[numbers.index(got)].fill_(1)) for number in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _any_rank(access: Access, seen: Tensor) -> tuple[bool, bool]:
    """Say whether some rank has seen SIGTERM, SIGUSR1. Collective."""
    access.announce(Purpose.STEP_BOUNDARY)
    votes = seen.clone()
    access.collectives.agree(votes, "signals")
    seen[1] = 0
    return bool(votes[0]), bool(votes[1])


class GlobalBatches:
    """Which samples make up each global batch, and which of them are this rank's; put it into ``extra``.

    The samples of an epoch are shuffled by seed and epoch alone and read in that order; a batch that an epoch's end
    cuts is filled from the next one. A rank takes every n-th sample of a global batch, n being today's number of ranks.

    Args:
        num_samples: in the data set.
        batch_size: of the global batch; must divide over the ranks (choose one that does for every number you allow).
        optimizer: knows this rank and how many there are.
        seed: of the order.
        shuffle: False reads in the order of the data set.
    """

    def __init__(
        self, num_samples: int, batch_size: int, optimizer: Any, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        groups = optimizer.checkpoint_access().collectives.groups
        if batch_size % groups.num_ranks:
            raise ConfigError(
                f"GlobalBatches(batch_size=...) expected a multiple of {groups.num_ranks} ranks but got {batch_size}."
            )
        self._num_samples, self._batch_size, self._seed, self._shuffle = num_samples, batch_size, seed, shuffle
        self._rank, self._num_ranks = groups.rank, groups.num_ranks
        self.position = 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def epoch(self) -> int:
        """Times that all samples have been read."""
        return self.position // self._num_samples

    def next(self) -> Tensor:
        """Return this rank's sample numbers of the next global batch, int64, and move on."""
        parts, wanted = [], self._batch_size
        while wanted:
            start = self.position % self._num_samples
            part = self._order_of(self.epoch)[start : start + wanted]
            parts.append(part)
            self.position += len(part)
            wanted -= len(part)
        return torch.cat(parts)[self._rank :: self._num_ranks]

    def _order_of(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(self._num_samples, generator=generator)
            self._order = (epoch, order if self._shuffle else torch.arange(self._num_samples))
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what it is a position in."""
        return {"position": self.position, "num_samples": self._num_samples, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position.

        Raises:
            ConfigError: it is one in another data set or order.
        """
        mine = self.state_dict()
        for key in ("num_samples", "seed"):
            if state[key] != mine[key]:
                raise ConfigError(f"GlobalBatches expected {key} {mine[key]} but the checkpoint has {state[key]}.")
        self.position = int(state["position"])
