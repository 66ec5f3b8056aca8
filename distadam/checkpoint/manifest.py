"""What is in a checkpoint: parameters, tensors, files with their checksums; and the marker that makes it exist.

Note [Commit]: data files carry the save's id in their names, so a save never touches what an earlier one wrote. When
all are on disk, rank 0 writes the manifest and then replaces `commit.json`, which names the manifest and its checksum.
Until that rename the directory holds the previous checkpoint, or none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from distadam.checkpoint.store import Store
from distadam.errors import CheckpointError, CorruptShard, IncompleteCheckpoint

FORMAT = 1
COMMIT = "commit.json"
DCP_METADATA = ".metadata"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamEntry:
    """A parameter, or another entry of the model's state_dict.

    Args:
        name: as the model calls it.
        shape: logical shape.
        dtype: "float32", ...
        strides: dense strides; element k of the stored 1-D tensor is element k in memory order.
        group: parameter group; -1 for what the optimizer does not have.
        placed: whether the optimizer trains it, so that it has a state.
        step: step count.
        weights: storage of the weight ("own", "fp32 master", "split", ...).
        states: storage by torch's state name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    group: int = -1
    placed: bool = False
    step: float = 0.0
    weights: str = "own"
    states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored 1-D tensor; element k stands for elements [k * block, (k + 1) * block) of its parameter."""

    key: str
    dtype: str
    numel: int
    block: int = 1


@dataclass(frozen=True, slots=True)
class Item:
    """Elements [start, start + numel) of a tensor, as bytes [offset, offset + nbytes) of a file."""

    key: str
    start: int
    numel: int
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The table of contents of a checkpoint. Items of a file follow each other without gaps from its first byte."""

    id: str
    time_ns: int
    num_ranks: int
    rule: str
    versions: dict[str, str]
    params: list[ParamEntry]
    tensors: dict[str, TensorEntry]
    files: dict[str, list[Item]]
    dcp_crc32: int = 0

    @property
    def step(self) -> int:
        """Largest step count of a parameter."""
        return int(max((param.step for param in self.params), default=0))

    def file_nbytes(self, name: str) -> int:
        """Return what a data file's size must be."""
        return sum(item.nbytes for item in self.files[name])

    def to_json(self) -> bytes:
        """Return the manifest as JSON; items are rows of numbers, tensors are referred to by position."""
        numbers = {key: number for number, key in enumerate(self.tensors)}
        data = {
            "format": FORMAT,
            "id": self.id,
            "time_ns": self.time_ns,
            "num_ranks": self.num_ranks,
            "rule": self.rule,
            "versions": self.versions,
            "dcp_crc32": self.dcp_crc32,
            "params": [asdict(param) for param in self.params],
            "tensors": [[t.key, t.dtype, t.numel, t.block] for t in self.tensors.values()],
            "files": {
                name: [[numbers[i.key], i.start, i.numel, i.offset, i.nbytes, i.crc32] for i in items]
                for name, items in self.files.items()
            },
        }
        return json.dumps(data, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Return the manifest that `to_json` wrote."""
        data = json.loads(text)
        tensors = [TensorEntry(*row) for row in data["tensors"]]
        return cls(
            id=data["id"],
            time_ns=data["time_ns"],
            num_ranks=data["num_ranks"],
            rule=data["rule"],
            versions=data["versions"],
            dcp_crc32=data["dcp_crc32"],
            params=[
                ParamEntry(**{**row, "shape": tuple(row["shape"]), "strides": tuple(row["strides"])})
                for row in data["params"]
            ],
            tensors={tensor.key: tensor for tensor in tensors},
            files={name: [Item(tensors[row[0]].key, *row[1:]) for row in rows] for name, rows in data["files"].items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The marker: which manifest is the checkpoint's."""

    id: str
    time_ns: int
    manifest: str
    nbytes: int
    crc32: int


def write_commit(store: Store, manifest: Manifest) -> None:
    """Write the manifest, then the marker: from here on the checkpoint exists."""
    data, name = manifest.to_json(), f"{manifest.id}.manifest.json"
    store.write(name, data)
    commit = Commit(id=manifest.id, time_ns=manifest.time_ns, manifest=name, nbytes=len(data), crc32=zlib.crc32(data))
    line = json.dumps({"format": FORMAT, **asdict(commit)})
    store.write(COMMIT, f"{line}\n{zlib.crc32(line.encode()):08x}\n".encode())


def read_commit(store: Store) -> Commit:
    """Return the marker.

    Raises:
        IncompleteCheckpoint: there is none.
        CorruptShard: its bytes are not what was written.
        CheckpointError: it was written by a later version.
    """
    if not store.exists(COMMIT):
        raise IncompleteCheckpoint(
            f"{store.path}: expected a checkpoint but there is no {COMMIT}: "
            + ("a save was interrupted here. " if store.names() else "the directory is empty or does not exist. ")
            + "Use checkpoint.latest(directory) to find the newest whole one."
        )
    data = store.read(COMMIT)
    line = data[: data.find(b"\n")]
    if data != b"%s\n%08x\n" % (line, zlib.crc32(line)):
        raise CorruptShard(f"{store.path}/{COMMIT}: the marker's bytes are not those that were written.")
    values = json.loads(line)
    if values.pop("format") != FORMAT:
        raise CheckpointError(f"{store.path}: expected format {FORMAT} but got a later one; update distadam.")
    return Commit(**values)


def read_manifest(store: Store) -> Manifest:
    """Return the committed manifest, checked by its checksum.

    Raises:
        IncompleteCheckpoint: no marker, or the manifest is missing.
        CorruptShard: names the file.
    """
    commit = read_commit(store)
    data = store.read(commit.manifest)
    if len(data) != commit.nbytes or zlib.crc32(data) != commit.crc32:
        raise CorruptShard(
            f"{store.path}/{commit.manifest}: expected {commit.nbytes} bytes with CRC-32 {commit.crc32:08x} but got "
            f"{len(data)} with {zlib.crc32(data):08x}."
        )
    return Manifest.from_json(data)


def check_sizes(store: Store, manifest: Manifest) -> Iterator[CheckpointError]:
    """Yield an error for every data file that is missing or of another size, naming the first tensor it cuts."""
    for name, items in manifest.files.items():
        found, expected = store.nbytes(name), manifest.file_nbytes(name)
        if found is None:
            yield IncompleteCheckpoint(
                f"{store.path}: file {name} is missing; it holds {_named(items[0])} and {len(items) - 1} more."
            )
        elif found != expected:
            cut = next((item for item in items if item.offset + item.nbytes > found), items[-1])
            yield CorruptShard(
                f"{store.path}/{name}: expected {expected} bytes but got {found}; {_named(cut)} is affected."
            )


def _named(item: Item) -> str:
    return f"tensor {item.key!r} [{item.start}, {item.start + item.numel})"


def corrupt(store: Store, name: str, item: Item) -> CorruptShard:
    """Return the error for an item whose checksum differs."""
    return CorruptShard(
        f"{store.path}/{name}: {_named(item)} in bytes [{item.offset}, {item.offset + item.nbytes}) is not what was "
        "written (CRC-32 differs). Load an older checkpoint."
    )
