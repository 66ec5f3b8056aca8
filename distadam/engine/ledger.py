"""Every tensor that the optimizer allocates, by kind: what `memory_report()` adds up."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distadam.layout.layout import format_table

KINDS = (
    "parameters",
    "masters",
    "moments",
    "steps",
    "gradient_shards",
    "gradient_buffers",
    "gradient_accumulation",
    "gradients",
    "scratch",
)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that live in the optimizer on this rank, by kind. ``parameters`` are the model's own, in flat buffers."""

    nbytes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.nbytes.values())

    @property
    def optimizer_state(self) -> int:
        """Bytes of masters, moments and steps: what sharding divides."""
        return sum(self.nbytes.get(kind, 0) for kind in ("masters", "moments", "steps"))

    def as_dict(self) -> dict[str, int]:
        """Return bytes by kind, and the total."""
        return dict(self.nbytes) | {"total": self.total}

    def to_json(self) -> str:
        """Return ``as_dict()`` as JSON."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        rows = [("kind", "bytes", "MiB")]
        rows += [(kind, f"{nbytes:,}", f"{nbytes / 2**20:.2f}") for kind, nbytes in self.as_dict().items()]
        return format_table(rows, left=(0,))


class Source(Protocol):
    """Where memory comes from; the collectives, which must reach it."""

    def empty(self, kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised memory."""

    def release(self, tensor: Tensor) -> None:
        """Take it back."""


class Ledger:
    """Allocates flat buffers and remembers what for.

    Args:
        source: where memory comes from; None is torch.
    """

    def __init__(self, source: Source | None = None) -> None:
        self._source = source
        self._entries: list[tuple[str, Tensor]] = []
        self._watched: list[tuple[str, weakref.WeakMethod[Callable[[], Iterable[Tensor]]]]] = []

    def empty(self, kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised 1-D tensor that counts as ``kind``."""
        if kind not in KINDS:
            raise KeyError(kind)
        if self._source is None:
            tensor = torch.empty(numel, dtype=dtype, device=device)
        else:
            tensor = self._source.empty(kind, numel, dtype, device)
        self._entries.append((kind, tensor))
        return tensor

    def zeros(self, kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed 1-D tensor that counts as ``kind``."""
        return self.empty(kind, numel, dtype, device).zero_()

    def release(self, tensor: Tensor) -> None:
        """Forget a tensor; its memory goes when the last user does."""
        self._entries = [entry for entry in self._entries if entry[1] is not tensor]
        if self._source is not None:
            self._source.release(tensor)

    def watch(self, kind: str, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Count what a method returns, too: tensors that the optimizer keeps but did not allocate here."""
        self._watched.append((kind, weakref.WeakMethod(tensors)))

    def report(self) -> MemoryReport:
        """Return the bytes of live storages by kind."""
        nbytes = dict.fromkeys(KINDS, 0)
        living = [(kind, method()) for kind, method in self._watched]
        watched = [(kind, tensor) for kind, tensors in living if tensors is not None for tensor in tensors()]
        seen: set[int] = set()
        for kind, tensor in [*self._entries, *watched]:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                nbytes[kind] += storage.nbytes()
        return MemoryReport(nbytes)
