"""From what was saved of a parameter to what the live optimizer stores: as it is where both agree, else through fp32.

A weight is decoded from the most precise thing that was saved: the fp32 master, else the parameter itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distadam.checkpoint.files import dtype_of
from distadam.checkpoint.live import Placed, moment_parts, moment_storage, state_key, weight_key, weight_parts
from distadam.checkpoint.manifest import ParamEntry
from distadam.checkpoint.saved import Saved
from distadam.errors import LayoutMismatch

Copies = list[tuple[Tensor, Tensor]]
"""Live tensors, and what is to be written to them."""


def weights(saved: Saved, placed: Placed, entry: ParamEntry) -> Copies:
    """Return the copies that fill this rank's part of a parameter's weights."""
    piece, flat = placed.piece, placed.flat
    assert piece is not None
    param = flat.param_shard[piece.start : piece.end]
    parts = weight_parts(flat)
    own = _range(saved, placed, entry, weight_key(entry.name), 1)
    if entry.weights == flat.weights.name and dtype_of(entry.dtype) == flat.dtype:
        copies = [(param, own)]
        for stored, part in parts.items():
            key = state_key(entry.name, stored)
            copies.append((placed.cut(part)[1], _range(saved, placed, entry, key, part.block)))
        return copies
    value = own
    if entry.weights == "fp32 master":
        value = _range(saved, placed, entry, state_key(entry.name, "master"), 1)
    elif entry.weights not in ("own", "none", "stochastic"):
        raise LayoutMismatch(
            f"parameter {placed.name!r}: weights stored as {entry.weights!r} cannot become {flat.weights.name!r}."
        )
    copies = [(param, value.to(flat.dtype))]
    if "master" in parts:
        copies.append((placed.cut(parts["master"])[1], value.float()))
    return copies


def moment(saved: Saved, placed: Placed, entry: ParamEntry, name: str) -> Copies:
    """Return the copies that fill this rank's part of a state; none where it was never saved."""
    if name not in entry.states:
        return []
    piece, flat = placed.piece, placed.flat
    assert piece is not None
    parts = moment_parts(flat, name)
    if entry.states[name] == moment_storage(flat, name):
        return [
            (placed.cut(part)[1], _range(saved, placed, entry, state_key(entry.name, stored), part.block))
            for stored, part in parts.items()
        ]
    return _encoded(placed, name, _range(saved, placed, entry, state_key(entry.name, name), 1))


def whole_moment(placed: Placed, name: str, whole: Tensor) -> Copies:
    """Return the copies that fill this rank's part of a state from the whole one, in the order of memory."""
    piece = placed.piece
    assert piece is not None
    return _encoded(placed, name, whole[piece.param_start : piece.param_start + piece.end - piece.start])


def _encoded(placed: Placed, name: str, value: Tensor) -> Copies:
    part = moment_parts(placed.flat, name)[name]
    return [(placed.cut(part)[1], value.to(part.tensor.dtype))]


def _range(saved: Saved, placed: Placed, entry: ParamEntry, key: str, block: int) -> Tensor:
    """Read the elements of a saved tensor that this rank's part of the parameter needs."""
    piece = placed.piece
    assert piece is not None
    tensor = saved.manifest.tensors[key]
    if tensor.block != block:
        raise LayoutMismatch(f"tensor {key!r}: expected blocks of {block} elements but got {tensor.block}.")
    numel = piece.end - piece.start
    shape, strides = placed.view
    if entry.strides != strides and not _same_order(shape, entry.strides, strides):
        if block != 1:
            raise LayoutMismatch(
                f"parameter {placed.name!r}: strides changed from {entry.strides} to {strides}, and blocks of {block} "
                "elements in memory cannot be put in another order; save with fp32 moments first."
            )
        whole = saved.whole(key).as_strided(shape, entry.strides)
        ordered = torch.empty_strided(shape, strides, dtype=whole.dtype).copy_(whole)
        return ordered.as_strided((placed.numel,), (1,))[piece.param_start : piece.param_start + numel].clone()
    start = piece.param_start // block
    result = torch.empty(-(-numel // block), dtype=dtype_of(tensor.dtype))
    saved.read({key: (start, result)})
    return result


def _same_order(shape: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Say whether two dense strides differ only where a dimension has one element."""
    return all(a == b for size, a, b in zip(shape, first, second, strict=True) if size > 1)
