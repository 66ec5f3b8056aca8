"""One bucket in memory: its parameters as views of a flat buffer, this rank's weights and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from distadam.engine.ledger import Ledger
from distadam.layout import Bucket
from distadam.precision import (
    Moment,
    Run,
    StorageChoice,
    StoredTensor,
    Weights,
    compute_dtype,
    make_moment,
    make_weights,
    start_of,
)

TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def dense_strides(param: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides, or dense ones in the same order where it has gaps or overlaps."""
    return tuple(torch.empty_like(param, device="meta").stride())


class FlatBucket:
    """Parameters of one bucket as views of ``param_flat``, and what this rank owns of them.

    Args:
        bucket: the layout.
        params: the parameters, by slot; each becomes a view, its identity, values, shape and strides kept.
        names: their names, by slot.
        shard: this rank's shard.
        ledger: allocates.
        owns: whether this rank may fill a flat buffer: of one that ranks share, the first rank does.
        choice: how weights and states are stored; all parameters of a bucket agree.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        bucket: Bucket,
        params: Sequence[Tensor],
        names: Sequence[str],
        shard: int,
        ledger: Ledger,
        owns: Callable[[Tensor], bool],
        choice: StorageChoice,
        seed: int,
    ) -> None:
        self.bucket = bucket
        self.params = list(params)
        self.names = list(names)
        self.dtype = TORCH_DTYPES[bucket.dtype]
        self.compute_dtype = compute_dtype(self.dtype)
        self.device = params[0].device
        self.views = [(tuple(param.shape), dense_strides(param)) for param in params]
        self.param_flat = ledger.empty("parameters", bucket.numel, self.dtype, self.device)
        self._fills = owns(self.param_flat)
        if self._fills:
            self.param_flat.zero_()
        self.adopt(range(len(self.params)))
        self.shard_start = shard * bucket.shard_numel
        self.param_shard = self.param_flat[self.shard_start : self.shard_start + bucket.shard_numel]
        self.pieces = bucket.pieces(shard)
        self.piece_of_slot = {piece.slot: piece for piece in self.pieces}
        self.choice = choice
        self._seed = seed
        self.weights: Weights = make_weights(choice, self.param_shard, self.runs, seed, ledger.empty)
        self.states: dict[str, Moment] = {}
        self.steps = ledger.zeros("steps", len(self.params), torch.float32, self.device)
        self.steps_version = self.steps._version
        # Slots with one number have been updated in the same steps, so their step counts are equal on the device.
        self.history = [0] * len(self.params)
        self._ledger = ledger

    def param_view(self, slot: int) -> Tensor:
        """Return the flat buffer's view of a slot, in the parameter's shape and strides."""
        return self.unflatten(self.param_flat, slot)

    def adopt(self, slots: Sequence[int]) -> None:
        """Copy the parameters of ``slots`` into the flat buffer and make them views of it."""
        with torch.no_grad():
            for slot in slots:
                view = self.param_view(slot)
                if self._fills:
                    view.copy_(self.params[slot])
                self.params[slot].data = view

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The shard's parameters with the identities of their elements; see [Note: random bits]."""
        return tuple(
            Run(piece.start, piece.padded_end, start_of(self.names[piece.slot]) + piece.param_start)
            for piece in self.pieces
        )

    def reload(self, slots: Sequence[int]) -> None:
        """Let the weights follow parameters after those of ``slots`` may have been written by somebody else."""
        pieces = [self.piece_of_slot[slot] for slot in slots if slot in self.piece_of_slot]
        self.weights.reload([(piece.start, piece.end) for piece in pieces])

    def state(self, name: str) -> Moment:
        """Return the storage of this rank's shard of a state, zeros when new."""
        moment = self.states.get(name)
        if moment is None:
            moment = make_moment(self.choice, name, self.param_shard, self.runs, self._seed, self._ledger.empty)
            self.states[name] = moment
        return moment

    def stored(self) -> dict[str, StoredTensor]:
        """Return everything of this shard that lies in memory between steps beside parameters and step counts.

        Returns:
            By name: "master" (fp32) or "remainder" (int16), and each state by torch's name ("exp_avg"), in 8 bits its
            codes, with the scales of its blocks beside it ("exp_avg_scale").
        """
        parts = dict(self.weights.stored())
        for name, moment in self.states.items():
            parts |= {f"{name}{suffix}": part for suffix, part in moment.stored().items()}
        return parts

    def slot_shard(self, tensor: Tensor, slot: int) -> Tensor:
        """Return the 1-D part of a shard-sized tensor that belongs to a slot; empty when another rank owns it."""
        piece = self.piece_of_slot.get(slot)
        return tensor[:0] if piece is None else tensor[piece.start : piece.end]

    def slot_part(self, part: StoredTensor, slot: int) -> Tensor:
        """Return the 1-D part of a stored tensor that belongs to a slot; empty when another rank owns it."""
        piece = self.piece_of_slot.get(slot)
        if piece is None:
            return part.tensor[:0]
        return part.tensor[piece.start // part.block : -(-piece.end // part.block)]

    def flatten(self, value: Tensor, slot: int) -> Tensor:
        """Return ``value`` (the parameter's shape) as 1-D in the order in which the parameter lies in memory."""
        shape, strides = self.views[slot]
        dense = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        dense.copy_(value)
        return dense.as_strided((self.bucket.slots[slot].numel,), (1,))

    def unflatten(self, full: Tensor, slot: int) -> Tensor:
        """Return the view of a bucket-sized tensor that has the slot's shape and strides.

        Large buffers begin inside their memory (Note [Stagger] in comm/shared.py), and `as_strided` counts from there.
        """
        shape, strides = self.views[slot]
        return full.as_strided(shape, strides, full.storage_offset() + self.bucket.slots[slot].offset)
