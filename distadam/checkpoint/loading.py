"""Loading: every rank reads the ranges of its own shards into host memory, and only then touches the training state.

Note [Nothing half loaded]: names, shapes, files and checksums are looked at on every rank before the first live tensor
is written. Until the ranks have agreed that all is well, an error leaves model and optimizer as they were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distadam.checkpoint import background, convert_storage
from distadam.checkpoint import extra as extras
from distadam.checkpoint.agree import agree, as_ours
from distadam.checkpoint.live import COMMON, Live, Placed, extra_key, look_at, weight_key
from distadam.checkpoint.manifest import ParamEntry
from distadam.checkpoint.saved import Rename, Saved
from distadam.engine import state as states
from distadam.engine.access import Access
from distadam.engine.votes import Purpose
from distadam.errors import LayoutMismatch, RankMismatchError


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None,
    optimizer: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    rename: Rename = None,
) -> dict[str, Any]:
    """Load a checkpoint that any number of ranks has written, under any policies.

    Args:
        path: what was given to `save`.
        model: takes parameters, buffers and other state_dict entries; None: only the optimizer's parameters.
        optimizer: a distadam optimizer over the same parameters, in the same groups.
        extra: what was given to `save`; everything with ``load_state_dict`` takes its saved state.
        rename: from saved parameter names to today's, a dictionary (what it lacks keeps its name) or a function.

    Returns:
        The saved ``extra``: plain values and state dicts; this rank's, or the first one's where fewer ranks saved.

    Raises:
        IncompleteCheckpoint: no commit marker, or a file is missing.
        CorruptShard: names the file and the tensor.
        LayoutMismatch: names the parameter that is missing, too many or of another shape.
        RankMismatchError: ranks load different things.

    All of these are raised on every rank, with model and optimizer as they were.

    Collective: every rank of shard x replicate. Syncs: yes.
    """
    access: Access = optimizer.checkpoint_access()
    access.announce(Purpose.LOAD_CHECKPOINT)
    background.settle(optimizer, access)
    optimizer.flush()
    what, error, reading = f"loading {os.fspath(path)}", None, None
    try:
        reading = Reading(Saved.open(path, rename), look_at(model, access), access)
        reading.read()
    except Exception as caught:
        error = as_ours(caught, what)
    identities = agree(access, what, error, None if reading is None else reading.saved.manifest.id)
    if len(set(identities)) > 1:
        raise RankMismatchError(f"{what}: ranks found different checkpoints, of saves {sorted(set(identities))}.")
    assert reading is not None
    with torch.no_grad():
        reading.apply()
    if model is not None and reading.values:
        model.load_state_dict(reading.values, strict=False)
    extras.restore(extra, reading.extra)
    return reading.extra


@dataclass
class Reading:
    """What one rank has read, and where it goes."""

    saved: Saved
    live: Live
    access: Access
    writes: convert_storage.Writes = field(default_factory=list)
    unplaced: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def read(self) -> None:
        """Check everything and read everything into host memory."""
        self._check_names()
        self.common = self.saved.blob(COMMON)
        rank = self.access.collectives.groups.rank
        key = extra_key(rank)
        self.extra = self.saved.blob(key if key in self.saved.manifest.tensors else extra_key(0))
        self._check_groups()
        for name, placed in self.live.placed.items():
            self._read_placed(placed, self.saved.names[name])
        for name, tensor in self.live.others.items():
            self._read_other(name, tensor, self.saved.names[name])
        self.values = self.common["values"]

    def _check_names(self) -> None:
        path, theirs = self.saved.store.path, self.saved.names
        ours = {name: placed.view[0] for name, placed in self.live.placed.items()}
        ours |= {name: tuple(value.shape) for name, value in self.live.others.items()}
        for name, shape in ours.items():
            if name not in theirs:
                raise LayoutMismatch(
                    f"{path}: expected parameter or buffer {name!r} but the checkpoint has none of that name; "
                    "load(rename=...) maps saved names to today's."
                )
            if theirs[name].shape != shape:
                raise LayoutMismatch(f"{path}: {name!r}: expected shape {shape} but got {theirs[name].shape}.")
        for name, entry in theirs.items():
            if name not in ours and entry.group >= 0:
                raise LayoutMismatch(f"{path}: the checkpoint's parameter {name!r} is not in the optimizer.")

    def _check_groups(self) -> None:
        by_saved = {entry.name: name for name, entry in self.saved.names.items()}
        groups = self.access.param_groups
        states.check_groups(self.common, groups, self.access.defaults)
        for index, (group, other) in enumerate(zip(groups, self.common["param_groups"], strict=True)):
            expected = {self.live.names[param] for param in group["params"]}
            moved = sorted(expected ^ {by_saved[name] for name in other["params"]})
            if moved:
                raise LayoutMismatch(
                    f"{self.saved.store.path}: parameter {moved[0]!r} is in another parameter group than group {index}."
                )

    def _names_of(self, placed: Placed, step: float) -> tuple[str, ...]:
        group = self.common["param_groups"][placed.group]
        return states.state_names(self.access.rule, group, step)

    def _read_placed(self, placed: Placed, entry: ParamEntry) -> None:
        """Read this rank's part of a parameter and its states."""
        kept = self.common["unplaced"].get(entry.name, {})
        step = entry.step if entry.placed else states.step_of(kept, self.access.rule)
        self.writes.append(partial(placed.flat.steps[placed.slot].fill_, step))
        names = self._names_of(placed, step)
        for name in names:
            if step and name not in entry.states and name not in kept:
                raise LayoutMismatch(
                    f"{self.saved.store.path}: parameter {placed.name!r}: expected state {name!r} but got "
                    f"{sorted(entry.states)}. It was saved by another kind of optimizer ({self.saved.manifest.rule})."
                )
        if placed.piece is None:
            return
        self.writes += convert_storage.weights(self.saved, placed, entry)
        for name in names:
            if name in kept:
                whole = placed.flat.flatten(kept[name], placed.slot)
                self.writes += convert_storage.whole_moment(placed, name, whole)
            else:
                self.writes += convert_storage.moment(self.saved, placed, entry, name)

    def _read_other(self, name: str, tensor: Tensor, entry: ParamEntry) -> None:
        """Read a tensor that this optimizer does not train, and the state that it had where it was trained."""
        whole = self.saved.whole(weight_key(entry.name)).as_strided(entry.shape, entry.strides)
        self.writes.append(partial(tensor.copy_, whole))
        param = next((param for param, known in self.live.names.items() if known == name), None)
        if param is None:
            return
        kept = self.common["unplaced"].get(entry.name)
        if kept is None and entry.placed and entry.step:
            kept = {"step": torch.tensor(entry.step)} if self.access.rule.has_step else {}
            for state in entry.states:
                flat = self.saved.decoded(entry, state)
                kept[state] = flat.as_strided(entry.shape, entry.strides)
        if kept:
            self.unplaced[param] = kept

    def apply(self) -> None:
        """Write what was read into the live tensors, and gather the parameters. Collective."""
        access = self.access
        states.load_groups(self.common, access.param_groups, access.defaults, access.rule)
        access.state.clear()
        access.state.update(self.unplaced)
        for flat in access.flats:
            for moment in flat.states.values():
                for part in moment.stored().values():
                    part.tensor.zero_()
        for write in self.writes:
            write()
        self.writes.clear()
        for flat in access.flats:
            what = f"parameters of bucket {flat.bucket.index}"
            access.collectives.all_gather(flat.param_flat, flat.param_shard, what).wait()
        access.loaded()
