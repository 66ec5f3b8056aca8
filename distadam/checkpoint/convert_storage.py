"""From what was saved of a parameter to what the live optimizer stores: as it is, or through fp32 where they differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distadam.checkpoint.files import dtype_of
from distadam.checkpoint.live import Placed, state_key, weight_key
from distadam.checkpoint.manifest import ParamEntry
from distadam.checkpoint.saved import Saved
from distadam.precision import StoredTensor
from distadam.precision.rounding import split_

Writes = list[Callable[[], object]]
"""What is to be done to live tensors once every rank has read everything."""


def weights(saved: Saved, placed: Placed, entry: ParamEntry) -> Writes:
    """Return the writes that fill this rank's part of a parameter's weights."""
    flat = placed.flat
    parts = {state_key(entry.name, stored): part for stored, part in flat.weights.stored().items()}
    param = placed.cut(StoredTensor(flat.param_shard))[1]
    if entry.weights == flat.weights.name and dtype_of(entry.dtype) == flat.dtype and _in_order(placed, entry):
        parts[weight_key(entry.name)] = StoredTensor(flat.param_shard)
        return _as_they_are(saved, placed, parts)
    value = _part(placed, entry, partial(saved.weight, entry))
    if flat.weights.name == "split":
        (remainder,) = (placed.cut(part)[1] for part in parts.values())
        return [lambda: split_(value.to(flat.device), param, remainder)]
    targets = [param, *(placed.cut(part)[1] for part in parts.values())]  # copying rounds to nearest even
    return [partial(target.copy_, value) for target in targets]


def moment(saved: Saved, placed: Placed, entry: ParamEntry, name: str) -> Writes:
    """Return the writes that fill this rank's part of a state; none where it was never saved."""
    if name not in entry.states:
        return []
    live = placed.flat.state(name)
    if entry.states[name] == live.name and _in_order(placed, entry):
        parts = {state_key(entry.name, name + suffix): part for suffix, part in live.stored().items()}
        return _as_they_are(saved, placed, parts)
    return _encoded(placed, name, _part(placed, entry, partial(saved.decoded, entry, name)))


def whole_moment(placed: Placed, name: str, whole: Tensor) -> Writes:
    """Return the writes that fill this rank's part of a state from the whole one, in the order of memory."""
    piece = placed.piece
    assert piece is not None
    return _encoded(placed, name, whole[piece.param_start : piece.param_start + piece.end - piece.start])


def _encoded(placed: Placed, name: str, value: Tensor) -> Writes:
    piece = placed.piece
    assert piece is not None
    live = placed.flat.state(name)
    return [lambda: live.write(piece.start, piece.end, value.to(placed.flat.device))]


def _as_they_are(saved: Saved, placed: Placed, parts: dict[str, StoredTensor]) -> Writes:
    """Read the stored elements of this rank's part; bits stay what they are."""
    writes: Writes = []
    for key, part in parts.items():
        start, target = placed.cut(part)
        writes.append(partial(target.copy_, saved.elements(key, start, start + target.numel())))
    return writes


def _part(placed: Placed, entry: ParamEntry, read: Callable[[int, int], Tensor]) -> Tensor:
    """Return this rank's part of what ``read(start, end)`` gives in the saved order, in the live one."""
    piece = placed.piece
    assert piece is not None
    start, end = piece.param_start, piece.param_start + piece.end - piece.start
    if _in_order(placed, entry):
        return read(start, end)
    shape, strides = placed.view
    whole = read(0, placed.numel).as_strided(shape, entry.strides)
    ordered = torch.empty_strided(shape, strides, dtype=whole.dtype).copy_(whole)
    return ordered.as_strided((placed.numel,), (1,))[start:end].clone()


def _in_order(placed: Placed, entry: ParamEntry) -> bool:
    """Say whether elements lie in memory as they lay when they were saved."""
    shape, strides = placed.view
    return all(a == b for size, a, b in zip(shape, entry.strides, strides, strict=True) if size > 1)
