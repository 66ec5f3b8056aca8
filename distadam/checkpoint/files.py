"""Tensors in files, in torch.distributed.checkpoint's format, with a checksum for each item.

The files are DCP's: ``torch.save`` of one slice after another, and a ``.metadata`` that DCP's own tools read. DCP's
resharding says which items a range needs. What is ours: each item's CRC-32 is taken while it is written and compared
before it is unpickled, and the loop that writes, for DCP's writer (torch 2.13) keeps a copy of every item until the
file is closed, which doubles the shard's memory.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from distadam.checkpoint.manifest import Item, Manifest, TensorEntry, corrupt
from distadam.checkpoint.raw import alone
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

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the range, as DCP wants it."""
        return [ChunkStorageMetadata(torch.Size([self.start]), self.tensor.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the elements."""
        return self.tensor

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """Return what DCP writes: items of at most `CHUNK_NBYTES`."""
        step = max(1, CHUNK_NBYTES // self.tensor.element_size())
        properties = TensorProperties(dtype=self.tensor.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, [self.start + begin]),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(
                        torch.Size([self.start + begin]), torch.Size([min(step, self.tensor.numel() - begin)])
                    ),
                    properties,
                    torch.Size([self.entry.numel]),
                ),
            )
            for begin in range(0, self.tensor.numel(), step)
        ]


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
            for item in part.__create_write_items__(part.entry.key, part):
                start, numel = _range(item)
                tensor = part.tensor[start - part.start : start - part.start + numel]
                if tensor.is_meta and resolve is not None:
                    tensor = resolve(part.entry.key, start, numel)
                offset, stream = file.tell(), _ItemStream(file, progress)
                torch.save(alone(tensor.detach().cpu()), cast("IO[bytes]", stream))
                items.append(Item(part.entry.key, start, numel, offset, file.tell() - offset, stream.crc32))
        file.flush()
        if store.is_local:
            os.fsync(file.fileno())
    return {name: items}


def _range(item: WriteItem) -> tuple[int, int]:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.offsets[0], item.tensor_data.chunk.sizes[0]


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


class _LoadPlanner(DefaultLoadPlanner):
    """Resolves a read item to the part of the slice that it fills."""

    def __init__(self, slices: Sequence[Slice], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._targets: list[Tensor] = []
        self.items: list[ReadItem] = []
        self._target_of: dict[int, Tensor] = {}
        for part in slices:
            entry = metadata.state_dict_metadata[part.entry.key]
            assert isinstance(entry, TensorStorageMetadata)
            for item in create_read_items_for_chunk_list(part.entry.key, entry, part.__create_chunk_list__()):
                self._target_of[id(item)] = part.tensor
                self.items.append(item)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return where the elements go."""
        start, length = read_item.dest_offsets[0], read_item.lengths[0]
        return self._target_of[id(read_item)][start : start + length]


class _Reader(FileSystemReader):
    """Compares checksums before anything is unpickled."""

    def __init__(self, store: Store, manifest: Manifest, progress: Progress | None) -> None:
        super().__init__(store.path)
        self._store, self._progress = store, progress
        self.fs, self.path = store.fs, store.path  # type: ignore[assignment]
        self._items = {(name, item.offset): item for name, items in manifest.files.items() for item in items}

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        item = self._items[sinfo.relative_path, sinfo.offset]
        file.seek(item.offset)
        data = file.read(item.nbytes)
        if len(data) != item.nbytes or zlib.crc32(data) != item.crc32:
            raise corrupt(self._store, sinfo.relative_path, item)
        if self._progress is not None:
            self._progress(len(data))
        return io.BytesIO(data)


def read_slices(store: Store, manifest: Manifest, slices: Iterable[Slice], progress: Progress | None = None) -> None:
    """Fill the slices' tensors (CPU, of the stored dtype) from the files; one item is in memory at a time.

    Raises:
        IncompleteCheckpoint: a file, or elements of a tensor, are missing.
        CorruptShard: names the file and the tensor.
    """
    wanted = [part for part in slices if part.tensor.numel()]
    metadata = dcp_metadata(manifest)
    planner = _LoadPlanner(wanted, metadata)
    missing = {part.entry.key: 0 for part in wanted}
    for part in wanted:
        missing[part.entry.key] += part.tensor.numel()
    for item in planner.items:
        missing[item.dest_index.fqn] -= item.lengths[0]
    lacking = [key for key, count in missing.items() if count]
    if lacking:
        raise IncompleteCheckpoint(
            f"{store.path}: {missing[lacking[0]]} elements of tensor {lacking[0]!r} are missing."
        )
    planner.items.sort(key=lambda item: metadata.storage_data[item.storage_index].offset)
    reader = _Reader(store, manifest, progress)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    try:
        reader.read_data(LoadPlan(planner.items), planner).wait()
    except FileNotFoundError as error:
        raise IncompleteCheckpoint(f"{store.path}: file {error.filename} is missing.") from error
