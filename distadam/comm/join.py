"""torch's context manager for uneven inputs, imported in one place."""

from torch.distributed.algorithms.join import Join, Joinable, JoinHook

__all__ = ["Join", "JoinHook", "Joinable"]
