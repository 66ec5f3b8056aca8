"""A live optimizer and model as named 1-D tensors: what this rank stores of which parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distadam.checkpoint.files import Slice, dtype_name
from distadam.checkpoint.manifest import ParamEntry, TensorEntry
from distadam.engine.access import Access
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.state import state_names
from distadam.layout.buckets import Piece
from distadam.precision import StoredTensor

COMMON = "common"
"""Key of what all ranks share and is no parameter: groups, entries without a place, the model's other entries."""


def extra_key(rank: int) -> str:
    """Return the key of what the user added on a rank."""
    return f"extra.{rank}"


def weight_key(name: str) -> str:
    """Return the key of a parameter's values."""
    return f"model.{name}"


def state_key(name: str, stored: str) -> str:
    """Return the key of a tensor of a parameter's state."""
    return f"optim.state.{name}.{stored}"


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter that the optimizer trains.

    Args:
        name: as the model calls it.
        flat: its bucket.
        slot: its place in it.
        group: parameter group.
        states: names of its states, in torch's order.
        step: step count.
    """

    name: str
    flat: FlatBucket
    slot: int
    group: int
    states: tuple[str, ...]
    step: float

    @property
    def param(self) -> Tensor:
        """The parameter."""
        return self.flat.params[self.slot]

    @property
    def piece(self) -> Piece | None:
        """This rank's part, if it has one."""
        return self.flat.piece_of_slot.get(self.slot)

    @property
    def view(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides."""
        return self.flat.views[self.slot]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.view[0])

    def parts(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield (key, this rank's shard-sized tensor) of everything stored."""
        yield weight_key(self.name), StoredTensor(self.flat.param_shard)
        for stored, part in self.flat.weights.stored().items():
            yield state_key(self.name, stored), part
        for state in self.states:
            for suffix, part in self.flat.state(state).stored().items():
                yield state_key(self.name, state + suffix), part

    def entry(self, key: str, part: StoredTensor) -> TensorEntry:
        """Return the global tensor that a part belongs to."""
        return TensorEntry(key, dtype_name(part.tensor.dtype), -(-self.numel // part.block), part.block)

    def cut(self, part: StoredTensor) -> tuple[int, Tensor]:
        """Return the first global element of this rank's part of a tensor, and the part; empty where it has none."""
        piece = self.piece
        start = 0 if piece is None else piece.param_start // part.block
        return start, self.flat.slot_part(part, self.slot)

    def describe(self) -> ParamEntry:
        """Return the manifest's entry."""
        return ParamEntry(
            name=self.name,
            shape=self.view[0],
            dtype=dtype_name(self.flat.dtype),
            strides=self.view[1],
            group=self.group,
            placed=True,
            step=self.step,
            weights=self.flat.weights.name,
            states={state: self.flat.state(state).name for state in self.states},
        )


@dataclass(frozen=True, slots=True)
class Live:
    """What a checkpoint holds of a model and its optimizer.

    Args:
        placed: parameters with a place, by name.
        others: the model's other tensors (buffers, frozen parameters) and frozen parameters of the optimizer.
        values: entries of the model's state_dict that are no tensors.
        names: the name of every parameter of the optimizer.
    """

    placed: dict[str, Placed]
    others: dict[str, Tensor]
    values: dict[str, Any]
    names: dict[Tensor, str]


def look_at(model: nn.Module | None, access: Access) -> Live:
    """Return the named parts of a model and its optimizer. Names are the model's, where it has the parameter."""
    names = dict(access.names)
    entries: Mapping[str, Any] = {}
    if model is not None:
        entries = {_plain(name): value for name, value in model.state_dict(keep_vars=True).items()}
        names |= {param: _plain(name) for name, param in model.named_parameters() if param in names}
    placed: dict[str, Placed] = {}
    trained = {id(param) for flat in access.flats for param in flat.params}
    for flat in access.flats:
        steps = flat.steps.tolist()
        for slot, param in enumerate(flat.params):
            group = flat.bucket.slots[slot].group
            states = state_names(access.rule, access.param_groups[group], steps[slot])
            placed[names[param]] = Placed(names[param], flat, slot, group, states, steps[slot])
    others: dict[str, Tensor] = {n: v for n, v in entries.items() if isinstance(v, Tensor) and id(v) not in trained}
    others.update({name: param for param, name in names.items() if id(param) not in trained})
    values = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
    return Live(placed, {name: others[name].detach() for name in others}, values, names)


def _plain(name: str) -> str:
    """Return a name without what torch.compile puts in front of it."""
    return name.replace("_orig_mod.", "")


def describe_other(name: str, value: Tensor) -> ParamEntry:
    """Return the manifest's entry of a tensor that the optimizer does not train; it is stored in row-major order."""
    shape = tuple(value.shape)
    return ParamEntry(name=name, shape=shape, dtype=dtype_name(value.dtype), strides=row_major(shape))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(torch.empty(shape, device="meta").stride())


def blob(key: str, data: bytes | memoryview) -> Slice:
    """Return bytes as a tensor."""
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Slice(TensorEntry(key, "uint8", len(data)), 0, tensor)


def slices(live: Live, access: Access) -> Iterator[Slice]:
    """Yield this rank's slices of parameters and states; replicas after the first have none.

    What is not sharded is written by the first rank.
    """
    groups = access.collectives.groups
    if groups.replicate_rank == 0:
        for placed in live.placed.values():
            for key, part in placed.parts():
                start, tensor = placed.cut(part)
                if tensor.numel():
                    yield Slice(placed.entry(key, part), start, tensor)
    if groups.rank == 0:
        for name, value in live.others.items():
            flat = value.contiguous().view(-1)
            yield Slice(TensorEntry(weight_key(name), dtype_name(flat.dtype), flat.numel()), 0, flat)


def tensor_table(live: Live) -> dict[str, TensorEntry]:
    """Return every tensor of the checkpoint but the blobs; the same on every rank."""
    entries = [placed.entry(key, part) for placed in live.placed.values() for key, part in placed.parts()]
    entries += [TensorEntry(weight_key(n), dtype_name(v.dtype), v.numel()) for n, v in live.others.items()]
    return {entry.key: entry for entry in entries}
