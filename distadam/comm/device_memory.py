"""Memory of a CUDA device that other ranks map: the only file that knows torch's symmetric memory, which is private."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distadam.comm.streams import Lane


class Handle(Protocol):
    """One buffer on every rank, as torch's ``_SymmetricMemory`` shows it."""

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        """Return a rank's buffer from ``storage_offset`` (in elements) on; of a peer's it is a view, too."""
        ...

    def barrier(self, channel: int, timeout_ms: int) -> None:
        """Let the current stream go on once every rank's has come here; a device that waits longer fails."""
        ...


class DeviceMemory:
    """Makes buffers on one device that the ranks of a group map.

    Args:
        group: of processes of one host.
        device: this rank's.
    """

    DEVICE_TYPE = "cuda"

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self.device = device

    def obstacle(self) -> str:
        """Return why this rank's torch has no such memory; empty if it seems to have some."""
        try:
            from torch._C._distributed_c10d import _SymmetricMemory
            from torch.distributed import _symmetric_memory
        except ImportError as error:
            return f"torch {torch.__version__} has no symmetric memory ({error})"
        if not (hasattr(_SymmetricMemory, "empty_strided_p2p") and hasattr(_symmetric_memory, "rendezvous")):
            return f"torch {torch.__version__} has another interface to symmetric memory"
        return ""

    def empty(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, Handle]:
        """Return uninitialised 1-D memory and what it is on every rank.

        Not ``_symmetric_memory.empty``, which takes memory from a pool: where one rank's garbage was collected earlier,
        it gets back a block that is mapped already and asks nobody, while its peers wait for it.

        Collective: every rank of the group, in one order, with the same arguments. Syncs: until all have made theirs.

        Raises:
            RuntimeError: ranks cannot map each other's memory.
        """
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed import _symmetric_memory

        tensor = _SymmetricMemory.empty_strided_p2p((numel,), (1,), dtype, self.device, self._group.group_name)
        handle: Any = _symmetric_memory.rendezvous(tensor, self._group.group_name)
        if handle is None:
            raise RuntimeError("torch made memory that ranks cannot map")
        return tensor, handle

    def lane(self) -> Lane:
        """Return the stream for what reads and writes such memory."""
        return Lane(self.device)
