"""Model buffers: what DDP did for them, as one call."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup


def broadcast_buffers(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Overwrite every buffer of ``model`` (BatchNorm statistics, say) with that of the group's first rank.

    Args:
        model: any module; parameters are not touched.
        group: ranks to take part; None is the default group. Without a process group nothing happens.

    Collective: every rank of ``group``. Syncs: on CPU, until all have arrived.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    source = 0 if group is None else dist.get_global_rank(group, 0)
    works = [dist.broadcast(buffer, source, group=group, async_op=True) for buffer in model.buffers()]
    for work in works:
        if work is not None:
            work.wait()
