"""What a checkpoint holds, and whether every byte of it is what was written."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from distadam.checkpoint.files import Progress
from distadam.checkpoint.manifest import DCP_METADATA, Manifest, check_sizes, corrupt, read_manifest
from distadam.checkpoint.store import Store
from distadam.errors import CheckpointError, CorruptShard
from distadam.layout.layout import format_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint in a few words and numbers.

    Args:
        path: where it lies.
        id: of the save.
        step: largest step count.
        rule: "adamw", ...
        num_ranks: that wrote it.
        versions: of what wrote it.
        nbytes: of data files.
        files: their sizes.
        params: name, shape, dtype, group, step, storage of weights, storage of each state.
    """

    path: str
    id: str
    step: int
    rule: str
    num_ranks: int
    versions: dict[str, str]
    nbytes: int
    files: dict[str, int]
    params: list[dict[str, object]]

    def as_dict(self) -> dict[str, object]:
        """Return everything, ready for ``json.dumps``."""
        return asdict(self)

    def to_json(self) -> str:
        """Return ``as_dict()`` as JSON."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        written = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        head = (
            f"{self.path}: step {self.step}, {self.rule}, {len(self.params)} tensors, {self.nbytes:,} bytes in "
            f"{len(self.files)} files of {self.num_ranks} ranks, by {written}"
        )
        columns = ("name", "shape", "dtype", "group", "step", "weights")
        rows = [[*(str(row[key]) for key in columns), _states(row["states"])] for row in self.params]
        return head + "\n" + format_table([[*columns, "states"], *rows], left=(0, 1, 2, 5, 6))


def _states(states: object) -> str:
    assert isinstance(states, dict)
    return ", ".join(f"{name} {storage}" for name, storage in states.items()) or "-"


def describe(path: str | os.PathLike[str]) -> Description:
    """Return what a committed checkpoint holds; reads its marker and manifest only."""
    store = Store(path)
    manifest = read_manifest(store)
    sizes = {name: manifest.file_nbytes(name) for name in manifest.files}
    params: list[dict[str, object]] = [
        {
            "name": entry.name,
            "shape": entry.shape,
            "dtype": entry.dtype,
            "group": entry.group if entry.group >= 0 else "-",
            "step": int(entry.step),
            "weights": entry.weights,
            "states": entry.states,
        }
        for entry in manifest.params
    ]
    return Description(
        path=store.path,
        id=manifest.id,
        step=manifest.step,
        rule=manifest.rule,
        num_ranks=manifest.num_ranks,
        versions=manifest.versions,
        nbytes=sum(sizes.values()),
        files=sizes,
        params=params,
    )


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Description:
    """Read every byte of a checkpoint and compare checksums; return its description.

    Holds one item of at most 8 MiB at a time; needs no process group.

    Args:
        path: the checkpoint.
        progress: called with the number of bytes that were just read.

    Raises:
        IncompleteCheckpoint: no marker, or a file is missing.
        CorruptShard: names the first file and tensor that is not what was written; `problems` yields all.
    """
    for problem in problems(path, progress=progress):
        raise problem
    return describe(path)


def problems(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Iterator[CheckpointError]:
    """Yield everything that is wrong with a checkpoint."""
    store = Store(path)
    try:
        manifest = read_manifest(store)
    except CheckpointError as error:
        yield error
        return
    yield from check_sizes(store, manifest)
    data = store.read(DCP_METADATA) if store.exists(DCP_METADATA) else None
    if data is None or zlib.crc32(data) != manifest.dcp_crc32:
        yield CorruptShard(
            f"{store.path}/{DCP_METADATA}: the index for torch.distributed.checkpoint's own tools is "
            f"{'missing' if data is None else 'not what was written'}; distadam does not need it."
        )
    for name in manifest.files:
        if store.nbytes(name) is not None:
            yield from _compare(store, manifest, name, progress)


def _compare(store: Store, manifest: Manifest, name: str, progress: Progress | None) -> Iterator[CorruptShard]:
    with store.open(name) as file:
        for item in manifest.files[name]:
            file.seek(item.offset)
            data = file.read(item.nbytes)
            if progress is not None:
                progress(len(data))
            if zlib.crc32(data) != item.crc32:
                yield corrupt(store, name, item)
            del data  # before the next is read
