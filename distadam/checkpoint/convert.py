"""Conversions of whole checkpoints without a process group: other numbers of files, torch.optim's format, safetensors.

Large results are built in memory-mapped files, so that the host's memory need not hold them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distadam.checkpoint import extra as extras
from distadam.checkpoint import safetensors
from distadam.checkpoint.files import Progress, Resolve, Slice, dtype_name, dtype_of, write_slices
from distadam.checkpoint.job import commit, versions
from distadam.checkpoint.live import COMMON, blob, extra_key, row_major, state_key, weight_key
from distadam.checkpoint.manifest import DCP_METADATA, Item, Manifest, ParamEntry, TensorEntry
from distadam.checkpoint.raw import as_bytes
from distadam.checkpoint.saved import Rename, Saved, renamed
from distadam.checkpoint.store import Store
from distadam.errors import CheckpointError, ConfigError, DistAdamError

_TORCH = (".pt", ".pth", ".bin")
_STEPLESS = ("sgd",)


def convert(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    rule: str | None = None,
    ranks: int = 1,
    masters: bool = False,
    rename: Rename = None,
    progress: Progress | None = None,
) -> str:
    """Convert a checkpoint, by the names of source and target; needs no process group and no model.

    | from | to | result |
    |---|---|---|
    | checkpoint | ``*.pt``, ``*.pth``, ``*.bin`` | torch.optim's state dict, for ``torch.optim.X.load_state_dict`` |
    | checkpoint | ``*.safetensors`` | the model's tensors, with ``masters`` the fp32 masters instead of 16-bit ones |
    | checkpoint | folder | the same checkpoint in ``ranks`` files |
    | torch.optim's state dict with ``param_names`` | folder | a checkpoint; needs ``weights`` and ``rule`` |

    Args:
        path: a checkpoint, or a file with torch.optim's state dict.
        to: the target; must not hold a checkpoint yet.
        weights: safetensors file, or ``torch.save`` of the model's state_dict, with the parameters' values.
        rule: "adam", "adamw", "sgd" or "rmsprop": what kind of optimizer wrote the state dict.
        ranks: number of data files to write.
        masters: write the full precision of 16-bit parameters to safetensors.
        rename: from saved names to new ones.
        progress: called with the number of bytes that were just read or, where the target is a folder, written.

    Returns:
        The target's path.

    Raises:
        CheckpointError: the source cannot be read, or lacks something; nothing is left at the target then.
        ConfigError: this cannot be converted into that.
    """
    source, target = os.fspath(path), os.fspath(to)
    with _failing(f"converting {source} to {target}"):
        return _convert(source, target, weights, rule, ranks, masters, rename, progress)


def _convert(
    source: str,
    target: str,
    weights: str | os.PathLike[str] | None,
    rule: str | None,
    ranks: int,
    masters: bool,
    rename: Rename,
    progress: Progress | None,
) -> str:
    if source.endswith(_TORCH):
        if weights is None or rule is None:
            raise ConfigError(f"convert({source!r}) expected weights= and rule= with torch.optim's state dict.")
        return _from_torch(source, Store(target), os.fspath(weights), rule, ranks, rename, progress)
    saved = Saved.open(source, rename)
    if target.endswith(_TORCH):
        _to_torch(saved, target, progress)
    elif target.endswith(".safetensors"):
        _to_safetensors(saved, target, masters, progress)
    else:
        return _reshard(source, target, ranks, rename, progress)
    return target


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn errors of the file system, which torch may raise as RuntimeErrors, into CheckpointErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, DistAdamError):
            raise
        raise CheckpointError(f"{what} failed: {error}. Nothing is left at the target.") from error


def reshard(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    ranks: int,
    rename: Rename = None,
    progress: Progress | None = None,
) -> str:
    """Write a checkpoint again as ``ranks`` ranks would have written it. `load` does not need it.

    Holds a few items of at most 8 MiB in host memory.

    Raises:
        CheckpointError: the source cannot be read, or the target not be written; nothing is left there then.
    """
    with _failing(f"writing {os.fspath(path)} again to {os.fspath(to)}"):
        return _reshard(path, to, ranks, rename, progress)


def _reshard(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    ranks: int,
    rename: Rename,
    progress: Progress | None,
) -> str:
    if ranks < 1:
        raise ConfigError(f"reshard(ranks=...) expected at least 1 but got {ranks!r}.")
    saved = Saved.open(path, rename)
    new_name = {entry.name: name for name, entry in saved.names.items()}
    keys = _renamed_keys(saved.manifest, new_name)
    common = saved.blob(COMMON)
    for group in common["param_groups"]:
        group["params"] = [new_name[name] for name in group["params"]]
    common["unplaced"] = {new_name[name]: entry for name, entry in common["unplaced"].items()}
    data = {key: entry for key, entry in saved.manifest.tensors.items() if key != COMMON and key in keys}
    extra = [key for key in saved.manifest.tensors if key.startswith("extra.") and key not in keys]
    template = replace(
        saved.manifest,
        id=_new_id(),
        time_ns=time.time_ns(),
        num_ranks=ranks,
        params=[replace(entry, name=name) for name, entry in saved.names.items()],
        tensors={keys[key]: replace(entry, key=keys[key]) for key, entry in data.items()},
        files={},
    )

    def parts(rank: int) -> Iterator[Slice]:
        for key, entry in data.items():
            start, end = _even(entry.numel, rank, ranks)
            tensor = torch.empty(end - start, dtype=dtype_of(entry.dtype), device="meta")
            yield Slice(replace(entry, key=keys[key]), start, tensor)
        if rank == 0:
            yield blob(COMMON, extras.pack(common, "the optimizer"))
            yield from (blob(key, as_bytes(saved.whole(key))) for key in extra)

    old_keys = {new: old for old, new in keys.items()}

    def resolve(key: str, start: int, numel: int) -> Tensor:
        return saved.elements(old_keys[key], start, start + numel)

    return _write(Store(to), template, parts, resolve, progress)


def _renamed_keys(manifest: Manifest, new_name: Mapping[str, str]) -> dict[str, str]:
    """Return each parameter tensor's new key."""
    keys: dict[str, str] = {}
    for entry in manifest.params:
        keys[weight_key(entry.name)] = weight_key(new_name[entry.name])
        prefix = state_key(entry.name, "")
        for stored in ("master", "remainder", *_stored(manifest, entry)):
            if prefix + stored in manifest.tensors:
                keys[prefix + stored] = state_key(new_name[entry.name], stored)
    return keys


def _stored(manifest: Manifest, entry: ParamEntry) -> list[str]:
    """Return the names of the tensors that a parameter's states are stored as."""
    prefix = state_key(entry.name, "")
    return [
        key.removeprefix(prefix)
        for key in manifest.tensors
        if key.startswith(prefix) and key.removeprefix(prefix).removesuffix("_scale") in entry.states
    ]


def _even(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    return numel * rank // ranks, numel * (rank + 1) // ranks


def _new_id() -> str:
    return f"{time.time_ns():x}{secrets.token_hex(2)}"


def _write(
    store: Store,
    template: Manifest,
    parts: Callable[[int], Iterator[Slice]],
    resolve: Resolve | None = None,
    progress: Progress | None = None,
) -> str:
    """Write one file per rank and commit."""
    if store.exists("commit.json"):
        raise ConfigError(f"{store.path}: expected a place without a checkpoint; remove that one first.")
    written: list[dict[str, list[Item]]] = []
    try:
        for rank in range(template.num_ranks):
            written.append(
                write_slices(store, f"{template.id}-{rank}", list(parts(rank)), resolve=resolve, progress=progress)
            )
        commit(store, template, written)
    except BaseException:
        for name in store.names():
            if name.startswith(template.id) or name == DCP_METADATA:
                store.remove(name)
        store.remove_directory()
        raise
    return store.path


def _to_safetensors(saved: Saved, target: str, masters: bool, progress: Progress | None) -> None:
    def is_whole(entry: ParamEntry) -> bool:
        return masters and entry.weights not in ("own", "none", "stochastic")

    tensors = {
        name: ("float32" if is_whole(entry) else entry.dtype, entry.shape) for name, entry in saved.names.items()
    }

    def values() -> Iterator[Tensor]:
        for entry in saved.names.values():
            whole = (
                saved.weight(entry, progress=progress)
                if is_whole(entry)
                else saved.whole(weight_key(entry.name), progress)
            )
            yield whole.as_strided(entry.shape, entry.strides)

    with _replacing(target) as temporary:
        safetensors.write(temporary, tensors, values())


@contextmanager
def _replacing(target: str) -> Iterator[str]:
    """Yield a name beside ``target`` that takes its place when all went well."""
    temporary = f"{target}.tmp"
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _to_torch(saved: Saved, target: str, progress: Progress | None) -> None:
    common, names = saved.blob(COMMON), {entry.name: name for name, entry in saved.names.items()}
    entries = {entry.name: entry for entry in saved.manifest.params}
    state: dict[int, dict[str, Tensor]] = {}
    groups, number = [], 0
    with tempfile.TemporaryDirectory(dir=Path(target).absolute().parent) as folder:
        for group in common["param_groups"]:
            numbers = range(number, number + len(group["params"]))
            number += len(numbers)
            for index, name in zip(numbers, group["params"], strict=True):
                kept = common["unplaced"].get(name)
                entry = kept if kept is not None else _torch_entry(saved, entries.get(name), folder, progress)
                if entry:
                    state[index] = entry
            groups.append(group | {"params": list(numbers), "param_names": [names.get(n, n) for n in group["params"]]})
        with _replacing(target) as temporary, open(temporary, "wb") as file:  # by name, torch hides the system's error
            torch.save({"state": state, "param_groups": groups}, file)
            file.flush()
            os.fsync(file.fileno())


def _torch_entry(saved: Saved, entry: ParamEntry | None, folder: str, progress: Progress | None) -> dict[str, Tensor]:
    """Return torch's state of one parameter, tensors in memory-mapped files."""
    if entry is None or not entry.placed or not entry.step:
        return {}
    result = {} if saved.manifest.rule in _STEPLESS else {"step": torch.tensor(entry.step)}
    for name in entry.states:
        value = saved.decoded(entry, name, progress=progress)
        if value.numel():
            value = _mapped(value, os.path.join(folder, secrets.token_hex(8)))
        result[name] = value.as_strided(entry.shape, entry.strides)
    return result


def _mapped(value: Tensor, path: str) -> Tensor:
    """Return a copy in a memory-mapped file. Its bytes are allotted first: touching what does not fit is a SIGBUS."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, value.nbytes)
    return torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype).copy_(value)


def _from_torch(
    source: str, store: Store, weights: str, rule: str, ranks: int, rename: Rename, progress: Progress | None
) -> str:
    saved = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    values = _open_weights(weights)
    entries: dict[str, ParamEntry] = {}
    states: dict[str, tuple[TensorEntry, Tensor]] = {}
    groups = []
    for index, group in enumerate(saved["param_groups"]):
        if "param_names" not in group:
            raise CheckpointError(f"{source}: expected param_names; build the torch optimizer from named_parameters().")
        names = [renamed(name, rename) for name in group["param_names"]]
        groups.append({k: v for k, v in group.items() if k not in ("params", "param_names")} | {"params": names})
        for name, number in zip(names, group["params"], strict=True):
            if name not in values:
                raise CheckpointError(f"{weights}: expected parameter {name!r} but there is none.")
            entries[name] = _entry_of(name, index, values[name], saved["state"].get(number, {}), states)
    for name, value in values.items():
        entries.setdefault(name, _plain_entry(name, value))
        key = weight_key(name)
        states[key] = (TensorEntry(key, dtype_name(value.dtype), value.numel()), _flat(value))
    template = Manifest(
        id=_new_id(),
        time_ns=time.time_ns(),
        num_ranks=ranks,
        rule=rule,
        versions=versions(),
        params=list(entries.values()),
        tensors={key: entry for key, (entry, _) in states.items()},
        files={},
    )

    def parts(rank: int) -> Iterator[Slice]:
        for entry, value in states.values():
            start, end = _even(entry.numel, rank, ranks)
            yield Slice(entry, start, value[start:end])
        if rank == 0:
            yield blob(COMMON, extras.pack({"param_groups": groups, "unplaced": {}, "values": {}}, source))
            yield blob(extra_key(0), extras.pack({}, source))

    return _write(store, template, parts, progress=progress)


def _plain_entry(name: str, value: Tensor) -> ParamEntry:
    shape = tuple(value.shape)
    return ParamEntry(name=name, shape=shape, dtype=dtype_name(value.dtype), strides=row_major(shape))


def _entry_of(
    name: str, group: int, value: Tensor, state: Mapping[str, Any], states: dict[str, tuple[TensorEntry, Tensor]]
) -> ParamEntry:
    kinds = {}
    for key, tensor in state.items():
        if key == "step" or tensor is None:
            continue
        if tuple(tensor.shape) != tuple(value.shape):
            raise CheckpointError(
                f"parameter {name!r}: expected {key} of shape {tuple(value.shape)} but got {tuple(tensor.shape)}."
            )
        stored = state_key(name, key)
        kinds[key] = dtype_name(tensor.dtype)
        states[stored] = (TensorEntry(stored, dtype_name(tensor.dtype), tensor.numel()), _flat(tensor))
    step = float(state["step"]) if "step" in state else float(bool(kinds))
    return replace(_plain_entry(name, value), group=group, placed=True, step=step, states=kinds)


def _flat(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(-1)


def _open_weights(path: str) -> Mapping[str, Tensor]:
    if path.endswith(".safetensors"):
        return safetensors.read(path)
    values: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
