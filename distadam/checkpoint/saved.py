"""A committed checkpoint that is open for reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distadam.checkpoint import extra as extras
from distadam.checkpoint.files import Progress, Reader
from distadam.checkpoint.live import state_key, weight_key
from distadam.checkpoint.manifest import Manifest, ParamEntry, check_sizes, read_manifest
from distadam.checkpoint.raw import as_bytes
from distadam.checkpoint.store import Store
from distadam.errors import LayoutMismatch
from distadam.precision import blockwise
from distadam.precision.counters import BLOCK
from distadam.precision.moments import UNSIGNED
from distadam.precision.rounding import join

Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass
class Saved:
    """An opened checkpoint.

    Args:
        store: its directory.
        manifest: its table of contents.
        names: the saved entry for each current name.
    """

    store: Store
    manifest: Manifest
    names: dict[str, ParamEntry]
    _reader: Reader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = Reader(self.store, self.manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], rename: Rename = None) -> Saved:
        """Open a checkpoint and look at its files' sizes; reads the marker and the manifest.

        Raises:
            IncompleteCheckpoint: no marker, or a file is missing.
            CorruptShard: names the file.
            LayoutMismatch: two parameters were renamed to one.
        """
        store = Store(path)
        manifest = read_manifest(store)
        for problem in check_sizes(store, manifest):
            raise problem
        names: dict[str, ParamEntry] = {}
        for entry in manifest.params:
            name = renamed(entry.name, rename)
            if name in names:
                raise LayoutMismatch(
                    f"{store.path}: {entry.name!r} and {names[name].name!r} are both renamed {name!r}."
                )
            names[name] = entry
        return cls(store, manifest, names)

    def whole(self, key: str, progress: Progress | None = None) -> Tensor:
        """Read a whole stored tensor, 1-D."""
        return self.elements(key, 0, self.manifest.tensors[key].numel, progress)

    def decoded(
        self, entry: ParamEntry, name: str, start: int = 0, end: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Return elements of a state in fp32 (fp64 stays), 1-D, in the order in which its parameter lay in memory."""
        key = state_key(entry.name, name)
        end = self.manifest.tensors[key].numel if end is None else end
        if entry.states[name] == "8bit":
            return self._from_blocks(key, name, start, end, progress)
        return _wide(self.elements(key, start, end, progress))

    def _from_blocks(self, key: str, name: str, start: int, end: int, progress: Progress | None) -> Tensor:
        first, last = start // BLOCK, -(-end // BLOCK)
        codes = torch.zeros((last - first) * BLOCK, dtype=torch.uint8)
        stop = min(last * BLOCK, self.manifest.tensors[key].numel)
        codes[: stop - first * BLOCK] = self.elements(key, first * BLOCK, stop, progress)
        scales = self.elements(f"{key}_scale", first, last, progress)
        out = torch.empty(codes.numel())
        levels = blockwise.UNSIGNED_LEVELS if name in UNSIGNED else blockwise.SIGNED_LEVELS
        blockwise.decode(codes, scales, levels, out, _fresh)
        return out[start - first * BLOCK : end - first * BLOCK]

    def weight(
        self, entry: ParamEntry, start: int = 0, end: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Return elements of a parameter's weight in full precision, 1-D, in the order in which it lay in memory.

        From the fp32 master or the split one where there is one; never rebuilt from a 16-bit parameter beside them.
        """
        own = weight_key(entry.name)
        end = self.manifest.tensors[own].numel if end is None else end
        if entry.weights == "fp32 master":
            return self.elements(state_key(entry.name, "master"), start, end, progress)
        value = self.elements(own, start, end, progress)
        if entry.weights != "split":
            return _wide(value)
        remainder = self.elements(state_key(entry.name, "remainder"), start, end, progress)
        out = torch.empty(end - start)
        join(value, remainder, out, _fresh)
        return out

    def elements(self, key: str, start: int, end: int, progress: Progress | None = None) -> Tensor:
        """Read elements [start, end) of a stored tensor."""
        return self._reader.read(self.manifest.tensors[key], start, end, progress)

    def blob(self, key: str) -> Any:
        """Return the values behind a tensor of bytes."""
        return extras.unpack(bytes(as_bytes(self.whole(key))))


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _fresh(index: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype)


def renamed(name: str, rename: Rename) -> str:
    """Return a saved name as it is today."""
    if rename is None:
        return name
    return rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
