"""Which checkpoints a directory holds, and deleting old ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from distadam.checkpoint.manifest import COMMIT, DCP_METADATA, check_sizes, read_commit, read_manifest
from distadam.checkpoint.store import Store
from distadam.errors import CheckpointError, ConfigError

_logger = logging.getLogger("distadam")


def committed(directory: str | os.PathLike[str]) -> list[Store]:
    """Return the checkpoints in a directory that have a commit marker, the newest first."""
    found = []
    for store in Store(directory).children():
        try:
            found.append((read_commit(store).time_ns, store.path, store))
        except (CheckpointError, OSError):
            continue
    return [store for _, _, store in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def latest(directory: str | os.PathLike[str]) -> str | None:
    """Return the path of the newest good checkpoint in a directory, or None.

    Good: committed, its manifest unharmed, every file there with the right size. `load` and `verify` look at every
    byte. A newer one that is not good is passed over with a warning in the log.
    """
    for store in committed(directory):
        try:
            problem = next(check_sizes(store, read_manifest(store)), None)
        except CheckpointError as error:
            problem = error
        if problem is None:
            return store.path
        _logger.warning("passing over a damaged checkpoint: %s", problem)
    return None


def prune(directory: str | os.PathLike[str], keep_last: int) -> list[str]:
    """Delete all but the newest committed checkpoints in a directory; return the paths of those that went.

    What has no commit marker (a save in progress, other folders) is neither counted nor touched, and of a checkpoint
    only its own files are deleted, the marker first.

    Args:
        directory: the folder that holds checkpoints.
        keep_last: how many stay, at least 1.
    """
    if keep_last < 1:
        raise ConfigError(f"prune(keep_last=...) expected at least 1 but got {keep_last!r}.")
    old = committed(directory)[keep_last:]
    for store in old:
        for name in list(_own_files(store)):
            store.remove(name)
        store.remove_directory()
    return [store.path for store in old]


def _own_files(store: Store) -> Iterator[str]:
    commit = read_commit(store)
    yield COMMIT
    yield from (name for name in store.names() if name.startswith(commit.id))
    yield DCP_METADATA
