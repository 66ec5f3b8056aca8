"""One save on one rank: write the slices, then, on the first rank, commit."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata

import torch

from distadam.checkpoint.files import Slice, pickle_metadata, write_slices
from distadam.checkpoint.manifest import (
    COMMIT,
    DCP_METADATA,
    Item,
    Manifest,
    TensorEntry,
    read_commit,
    write_commit,
)
from distadam.checkpoint.prune import prune
from distadam.checkpoint.store import Store
from distadam.errors import CheckpointError

Items = dict[str, list[Item]]


def versions() -> dict[str, str]:
    """Return what wrote a checkpoint."""
    try:
        own = metadata.version("distadam")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {"distadam": own, "torch": str(torch.__version__)}


@dataclass
class Job:
    """What one rank does in one save.

    Args:
        store: the checkpoint's directory.
        id: of this save, the same on all ranks.
        rank: this rank.
        num_ranks: how many write.
        parts: this rank's slices.
        template: the manifest without files, on the rank that commits.
        keep_last: prune afterwards.
    """

    store: Store
    id: str
    rank: int
    num_ranks: int
    parts: Sequence[Slice]
    template: Manifest | None = None
    keep_last: int | None = None
    items: Items = field(default_factory=dict)

    def write(self) -> None:
        """Write this rank's file."""
        self.items = write_slices(self.store, f"{self.id}-{self.rank}", self.parts)
        self.store.sync()

    def part_name(self, rank: int) -> str:
        """Return the file in which a rank of an asynchronous save says what it has written."""
        return f"{self.id}-{rank}.part.json"

    def write_part(self, error: str | None = None) -> None:
        """Tell the rank that commits what this rank has written, or why not."""
        items = {name: [asdict(item) for item in rows] for name, rows in self.items.items()}
        self.store.write(self.part_name(self.rank), json.dumps({"error": error, "items": items}).encode())

    def read_part(self, rank: int) -> Items | None:
        """Return what another rank has written, or None as long as it has not.

        Raises:
            CheckpointError: that rank failed.
        """
        if not self.store.exists(self.part_name(rank)):
            return None
        data = json.loads(self.store.read(self.part_name(rank)))
        if data["error"] is not None:
            raise CheckpointError(f"rank {rank}: {data['error']}")
        return {name: [Item(**row) for row in rows] for name, rows in data["items"].items()}

    def commit(self, written: Sequence[Items]) -> None:
        """Make the checkpoint exist, then remove what it replaces and what was asked to go."""
        assert self.template is not None
        commit(self.store, self.template, written)
        if self.keep_last is not None:
            prune(self.store.parent().path, self.keep_last)

    def finished(self) -> None:
        """Let go of the slices."""
        self.parts = ()

    def clean(self) -> None:
        """Remove what this rank has written of a save that failed, unless it failed after it was committed."""
        with contextlib.suppress(OSError, CheckpointError):
            if self.store.exists(COMMIT) and read_commit(self.store).id == self.id:
                return
            mine = (f"{self.id}-{self.rank}_", self.part_name(self.rank), *self._manifest_names())
            for name in self.store.names():
                if name.startswith(mine):
                    self.store.remove(name)

    def _manifest_names(self) -> list[str]:
        return [] if self.template is None else [f"{self.id}.manifest.json"]


def commit(store: Store, template: Manifest, written: Sequence[Items]) -> Manifest:
    """Write ``.metadata``, manifest and marker over the files that ranks have written; remove what these replace."""
    files = {name: items for part in written for name, items in part.items()}
    tensors = dict(template.tensors)
    for items in files.values():
        for item in items:
            if item.key not in template.tensors:  # what ranks added: bytes
                known = tensors.get(item.key, TensorEntry(item.key, "uint8", 0))
                tensors[item.key] = replace(known, numel=known.numel + item.numel)
    manifest = replace(template, files=files, tensors=tensors)
    pickled = pickle_metadata(manifest)
    store.write(DCP_METADATA, pickled)
    manifest = replace(manifest, dcp_crc32=zlib.crc32(pickled))
    write_commit(store, manifest)
    remove_stale(store, manifest.id)
    return manifest


def remove_stale(store: Store, identity: str) -> None:
    """Remove files of saves that are not the committed one: replaced ones, and ones that were interrupted."""
    for name in store.names():
        ours = name.endswith((".distcp", ".manifest.json", ".part.json", ".tmp"))
        if ours and name != COMMIT and (not name.startswith(identity) or name.endswith(".part.json")):
            with contextlib.suppress(OSError):
                store.remove(name)
