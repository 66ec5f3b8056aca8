"""Memory that the ranks of a test share, without an optimizer around it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from distadam.comm.shared import SharedMemory, meet


def meet_ranks(rank: int) -> SharedMemory:
    """Return the memory of all ranks of the default group. Collective: every rank."""
    num_ranks = dist.get_world_size()

    def swap(value: Any) -> list[Any]:
        answers: list[Any] = [None] * num_ranks
        dist.all_gather_object(answers, value)
        return answers

    memory = meet([f"rank {other}" for other in range(num_ranks)], rank, range(num_ranks), swap)
    assert memory is not None
    return memory
