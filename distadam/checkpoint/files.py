"""Tensors in files, in torch.distributed.checkpoint's format, with a checksum for each item.

The files are DCP's: ``torch.save`` of one slice after another, and a ``.metadata`` that DCP's own tools read. The loops
that write and read are ours. Each item's CRC-32 is taken while it is written and compared before anything else is made
of it. DCP's writer (torch 2.13) keeps a copy of every item until the file is closed, which doubles the shard's memory;
its reader unpickles each item from a copy into fresh memory, where the bytes of its elements are all that is needed.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from distadam.checkpoint.archive import tensor_bytes
from distadam.checkpoint.manifest import Item, Manifest, TensorEntry, corrupt
from distadam.checkpoint.raw import alone, as_bytes
from distadam.checkpoint.store import Store
from distadam.errors import IncompleteCheckpoint

CHUNK_NBYTES = 8 * 2**20
"""Largest item: a reader holds one at a time beside what it keeps."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read or written."""


Resolve = Callable[[str, int, int], Tensor]
"""Returns elements [start, start + numel) of a tensor: (key, start, numel)."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return torch.float32 for "float32"."""
    return cast(torch.dtype, getattr(torch, name))


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [start, start + tensor.numel()) of the tensor that ``entry`` describes; ``tensor`` is 1-D."""

    entry: TensorEntry
    start: int
    tensor: Tensor

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, tensor) of what becomes an item each: at most `CHUNK_NBYTES`."""
        step = max(1, CHUNK_NBYTES // self.tensor.element_size())
        for begin in range(0, self.tensor.numel(), step):
            yield self.start + begin, self.tensor[begin : begin + step]


class _ItemStream:
    """Hands one item's bytes on and takes their checksum."""

    def __init__(self, raw: IO[bytes], progress: Progress | None) -> None:
        self._raw, self._progress, self.crc32 = raw, progress, 0

    def write(self, data: Any) -> int:
        """Write and count."""
        self.crc32 = zlib.crc32(data, self.crc32)
        written = self._raw.write(data)
        if self._progress is not None:
            self._progress(len(data))
        return written

    def flush(self) -> None:
        """Leave flushing to the end of the file."""


def write_slices(
    store: Store,
    prefix: str,
    slices: Sequence[Slice],
    *,
    resolve: Resolve | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Item]]:
    """Write slices into one new file; return its items by file name (nothing for no slices).

    Slices in host memory are written from where they lie; of others one item of at most `CHUNK_NBYTES` is copied there
    at a time. Slices on the meta device are asked for item by item.
    """
    store.make()
    wanted = [part for part in slices if part.tensor.numel()]
    if not wanted:
        return {}
    items, name = [], f"{prefix}_0.distcp"
    with store.open(name, "wb") as file:
        for part in wanted:
            for start, tensor in part.pieces():
                numel = tensor.numel()
                if tensor.is_meta and resolve is not None:
                    tensor = resolve(part.entry.key, start, numel)
                offset, stream = file.tell(), _ItemStream(file, progress)
                torch.save(alone(tensor.detach().cpu()), cast("IO[bytes]", stream))
                items.append(Item(part.entry.key, start, numel, offset, file.tell() - offset, stream.crc32))
        file.flush()
        if store.is_local:
            os.fsync(file.fileno())
    return {name: items}


def dcp_metadata(manifest: Manifest) -> Metadata:
    """Return the manifest's tensors and files as DCP's metadata."""
    entries = {
        tensor.key: TensorStorageMetadata(
            TensorProperties(dtype=dtype_of(tensor.dtype)), torch.Size([tensor.numel]), []
        )
        for tensor in manifest.tensors.values()
    }
    places = {}
    for name, items in manifest.files.items():
        for item in items:
            start = torch.Size([item.start])
            entries[item.key].chunks.append(ChunkStorageMetadata(start, torch.Size([item.numel])))
            places[MetadataIndex(item.key, start)] = _StorageInfo(name, item.offset, item.nbytes)
    return Metadata(state_dict_metadata=dict(entries), storage_data=places, storage_meta=StorageMeta(), version="1.0.0")


def pickle_metadata(manifest: Manifest) -> bytes:
    """Return the ``.metadata`` file for DCP's own tools."""
    return pickle.dumps(dcp_metadata(manifest))


class Reader:
    """Reads ranges of a checkpoint's tensors; one item is in memory at a time, in a buffer that is used again.

    Args:
        store: the checkpoint's directory.
        manifest: its table of contents.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store, self._buffer = store, bytearray()
        self._items: dict[str, list[tuple[str, Item]]] = {}
        for name, items in manifest.files.items():
            for item in items:
                self._items.setdefault(item.key, []).append((name, item))

    def read(self, entry: TensorEntry, start: int, end: int, progress: Progress | None = None) -> Tensor:
        """Return elements [start, end) of a stored tensor, on the CPU.

        Raises:
            IncompleteCheckpoint: a file, or elements of the tensor, are missing.
            CorruptShard: names the file and the tensor.
        """
        tensor = torch.empty(end - start, dtype=dtype_of(entry.dtype))
        wanted = [
            (name, item, range(max(start, item.start), min(end, item.start + item.numel)))
            for name, item in self._items.get(entry.key, ())
        ]
        wanted = sorted((part for part in wanted if part[2]), key=lambda part: (part[0], part[1].offset))
        lacking = tensor.numel() - sum(len(part) for _, _, part in wanted)
        if lacking:
            raise IncompleteCheckpoint(f"{self._store.path}: {lacking} elements of tensor {entry.key!r} are missing.")
        target, size = as_bytes(tensor), tensor.element_size()
        for name, parts in groupby(wanted, key=lambda part: part[0]):
            try:
                with self._store.open(name) as file:
                    for _, item, part in parts:
                        data = self._elements(file, name, item, tensor.dtype)
                        source = data[(part.start - item.start) * size : (part.stop - item.start) * size]
                        target[(part.start - start) * size : (part.stop - start) * size] = source
                        if progress is not None:
                            progress(item.nbytes)
            except FileNotFoundError as error:
                raise IncompleteCheckpoint(f"{self._store.path}: file {error.filename} is missing.") from error
        return tensor

    def _elements(self, file: IO[bytes], name: str, item: Item, dtype: torch.dtype) -> memoryview:
        """Return the bytes of an item's elements, as they are until the next item; looks at the checksum first."""
        if len(self._buffer) < item.nbytes:
            self._buffer = bytearray(item.nbytes)
        data = memoryview(self._buffer)[: item.nbytes]
        file.seek(item.offset)
        if cast(io.BufferedIOBase, file).readinto(data) != item.nbytes or zlib.crc32(data) != item.crc32:
            raise corrupt(self._store, name, item)
        found = tensor_bytes(data, item.numel * dtype.itemsize)
        return as_bytes(torch.load(io.BytesIO(data), "cpu", weights_only=True)) if found is None else found
