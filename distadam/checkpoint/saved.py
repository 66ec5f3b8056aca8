"""A committed checkpoint that is open for reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distadam.checkpoint import extra as extras
from distadam.checkpoint.files import Progress, Slice, dtype_of, read_slices
from distadam.checkpoint.live import state_key
from distadam.checkpoint.manifest import Manifest, ParamEntry, check_sizes, read_manifest
from distadam.checkpoint.store import Store
from distadam.errors import LayoutMismatch

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
        """Read a whole tensor, 1-D."""
        entry = self.manifest.tensors[key]
        tensor = torch.empty(entry.numel, dtype=dtype_of(entry.dtype))
        read_slices(self.store, self.manifest, [Slice(entry, 0, tensor)], progress)
        return tensor

    def decoded(self, entry: ParamEntry, name: str, progress: Progress | None = None) -> Tensor:
        """Return a whole state in fp32 (fp64 stays), 1-D, in the order in which its parameter lay in memory."""
        value = self.whole(state_key(entry.name, name), progress)
        return value if value.dtype == torch.float64 else value.float()

    def weight(self, entry: ParamEntry, progress: Progress | None = None) -> Tensor:
        """Return a parameter's whole fp32 master, 1-D, in the order in which it lay in memory."""
        return self.whole(state_key(entry.name, "master"), progress)

    def blob(self, key: str) -> Any:
        """Return the values behind a tensor of bytes."""
        return extras.unpack(self.whole(key).numpy().tobytes())

    def read(self, wanted: Mapping[str, tuple[int, Tensor]]) -> None:
        """Fill tensors, by key, with elements from a first one on."""
        read_slices(
            self.store,
            self.manifest,
            [Slice(self.manifest.tensors[key], start, tensor) for key, (start, tensor) in wanted.items()],
        )


def renamed(name: str, rename: Rename) -> str:
    """Return a saved name as it is today."""
    if rename is None:
        return name
    return rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
