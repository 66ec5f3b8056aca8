"""Saving: every rank writes its own slices, the first rank writes the manifest and the marker."""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from distadam.checkpoint import background
from distadam.checkpoint import extra as extras
from distadam.checkpoint.agree import agree, as_ours
from distadam.checkpoint.background import Save
from distadam.checkpoint.files import Slice
from distadam.checkpoint.job import Job, versions
from distadam.checkpoint.live import COMMON, Live, blob, describe_other, extra_key, look_at, slices, tensor_table
from distadam.checkpoint.manifest import Manifest
from distadam.checkpoint.store import Store
from distadam.engine.access import Access
from distadam.engine.votes import Purpose
from distadam.errors import ConfigError, RankMismatchError

_DIGEST, _IDENTITY = 16, 32


def save(
    path: str | os.PathLike[str],
    model: nn.Module | None,
    optimizer: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    keep_last: int | None = None,
) -> Save:
    """Write a checkpoint that any number of ranks can load.

    Each rank writes its own slices into a file of its own; nothing is gathered. What `path` held before stays loadable
    until the new checkpoint is complete. Gradients are not saved: call it between steps.

    Args:
        path: a folder of its own, on storage that all ranks see; a URL for fsspec.
        model: its parameters, buffers and other state_dict entries (the first rank's); None: the optimizer's alone.
        optimizer: a distadam optimizer.
        extra: by name, anything with ``state_dict`` or plain values, each rank its own; tensors, numbers, strings.
        asynchronous: copy this rank's slices and write them while training goes on. At most one is in flight: the
            next `save` waits for it and raises what went wrong, on every rank.
        keep_last: afterwards delete all but the newest so many committed checkpoints beside this one.

    Returns:
        A handle; ``wait()`` returns when the checkpoint is committed.

    Raises:
        CheckpointError: writing failed on some rank; raised on every rank, training state untouched.
        ConfigError: ``extra`` holds what cannot be read back.
        RankMismatchError: ranks save to different paths.

    Collective: every rank of shard x replicate. Syncs: until the slices are copied (asynchronous) or written.
    """
    access: Access = optimizer.checkpoint_access()
    access.announce(Purpose.SAVE_CHECKPOINT)
    background.settle(optimizer, access)
    optimizer.flush()
    what, error = f"saving {os.fspath(path)}", None
    parts: list[Slice] = []
    try:
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"save(keep_last=...) expected None or at least 1 but got {keep_last!r}.")
        live = look_at(model, access)
        parts = _parts(live, access, extra)
        store = Store(path)
        store.make()
    except Exception as caught:
        error = as_ours(caught, what)
    identity = _meet(access, what, error, os.fspath(path))
    rank = access.collectives.groups.rank
    template = _template(live, access, identity) if rank == 0 else None
    job = Job(store, identity, rank, access.collectives.groups.num_ranks, parts, template, keep_last)
    if asynchronous:
        return background.submit(optimizer, job)
    _write_now(access, job, what)
    return Save(job, weakref.ref(optimizer))


def _meet(access: Access, what: str, error: Exception | None, path: str) -> str:
    """Return the save's id, the first rank's, once all ranks are ready to save to one path; raise on all what is wrong.

    A few bytes, combined by maximum, where all is well: whether a rank failed, the path's hash and its complement, the
    id. Only ranks that learn of a difference exchange texts.
    """
    digest = blake2b(path.encode(), digest_size=_DIGEST).digest()
    identity = f"{time.time_ns():x}{secrets.token_hex(2)}" if access.collectives.groups.rank == 0 else ""
    ballot = bytes([error is not None]) + digest + bytes(255 - byte for byte in digest) + identity.encode()
    votes = bytearray(ballot.ljust(1 + 2 * _DIGEST + _IDENTITY, b"\0"))
    access.collectives.agree(torch.frombuffer(votes, dtype=torch.uint8), what)
    failed, largest, complement = votes[0], votes[1 : 1 + _DIGEST], votes[1 + _DIGEST : 1 + 2 * _DIGEST]
    if failed or any(a + b != 255 for a, b in zip(largest, complement, strict=True)):
        _same_path(agree(access, what, error, path))
    return votes[1 + 2 * _DIGEST :].rstrip(b"\0").decode()


def _same_path(paths: list[str]) -> None:
    for rank, path in enumerate(paths):
        if path != paths[0]:
            raise RankMismatchError(f"checkpoint.save(): rank 0 saves to {paths[0]!r} but rank {rank} to {path!r}.")


def _write_now(access: Access, job: Job, what: str) -> None:
    error: Exception | None = None
    try:
        job.write()
    except Exception as caught:
        error = as_ours(caught, what)
    try:
        written = agree(access, what, error, job.items)
        try:
            if job.template is not None:
                job.commit(written)
        except Exception as caught:
            error = as_ours(caught, what)
        agree(access, what, error)
    except Exception:
        job.clean()
        raise
    job.finished()


def _parts(live: Live, access: Access, extra: Mapping[str, Any] | None) -> list[Slice]:
    parts = list(slices(live, access))
    rank = access.collectives.groups.rank
    parts.append(blob(extra_key(rank), extras.pack(extras.collect(extra), "save(extra=...)")))
    if rank == 0:
        parts.append(blob(COMMON, extras.pack(_common(live, access), "what is saved of the optimizer")))
    return parts


def _common(live: Live, access: Access) -> dict[str, Any]:
    names = live.names
    unplaced = {
        name: dict(access.state[param])
        for param, name in names.items()
        if name not in live.placed and access.state.get(param)
    }
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        | {"params": [names[param] for param in group["params"]]}
        for group in access.param_groups
    ]
    return {"param_groups": groups, "unplaced": unplaced, "values": live.values}


def _template(live: Live, access: Access, identity: str) -> Manifest:
    params = [placed.describe() for placed in live.placed.values()]
    params += [describe_other(name, value) for name, value in live.others.items()]
    return Manifest(
        id=identity,
        time_ns=time.time_ns(),
        num_ranks=access.collectives.groups.num_ranks,
        rule=access.rule.name,
        versions=versions(),
        params=params,
        tensors=tensor_table(live),
        files={},
    )
