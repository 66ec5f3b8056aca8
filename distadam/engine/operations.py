"""What loops do with ``p.grad``, carried out on the shards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distadam.comm import Collectives, ReduceOp
from distadam.engine.gradients import ShardedGradient
from distadam.engine.norms import StepNorm, from_power, to_power
from distadam.engine.reducer import Reducer
from distadam.engine.votes import Purpose, pack_floats
from distadam.errors import UsageError

ALL = -1


class GradientOperations:
    """Norms, scaling and checks of the averaged gradient. Those that communicate do so once for the whole list."""

    def __init__(self, reducer: Reducer, collectives: Collectives, joining: Callable[[], bool]) -> None:
        self._reducer: Reducer = weakref.proxy(reducer)  # which owns this: a dropped optimizer frees its memory at once
        self._joining = joining
        self._collectives = collectives
        self._finished_at = -1
        self._norms: dict[float, list[Tensor]] = {}
        self._found: dict[torch.device, Tensor] = {}

    def tensors(self) -> list[Tensor]:
        """Return the results that are kept, for the memory report."""
        return [*self._found.values(), *(norm for norms in self._norms.values() for norm in norms)]

    def collect(self, stand_in: ShardedGradient, grad: Tensor) -> None:
        """Add this rank's contribution to a parameter's gradient."""
        if stand_in.param_index is None:
            self._reducer.hold(stand_in, grad)
        else:
            gradient, slot = self._reducer.place(stand_in.param_index)
            self._reducer.collect(gradient, slot, stand_in.param_index, grad)

    def zero(self, stand_ins: Sequence[ShardedGradient]) -> None:
        """Make collected gradients zero. Communicates nothing."""
        for stand_in in stand_ins:
            if stand_in.param_index is not None:
                self._reducer.zero(stand_in.param_index)
            elif stand_in.waiting is not None:
                stand_in.waiting.zero_()

    def finish(self, purpose: Purpose, detail: bytes = b"") -> None:
        """Agree on ``purpose`` and have every round reduced.

        Collective: every rank. Syncs: hosts wait for each other.
        """
        self._reducer.finish(purpose, detail)
        self.mark_finished()

    def mark_finished(self) -> None:
        """Say that the reducer has just finished; results that were kept belong to an older gradient."""
        if self._finished_at != self._reducer.version:
            self._finished_at = self._reducer.version
            self._forget()

    def _forget(self) -> None:
        self._norms.clear()
        self._found.clear()

    # Norms -----------------------------------------------------------------------------------------------------------

    def norms(self, stand_ins: Sequence[ShardedGradient], order: float, dtype: torch.dtype | None) -> list[Tensor]:
        """Return norms of averaged gradients as 0-D tensors, one collective for all parameters.

        Collective: every rank, with the same order. Syncs: never on CUDA after the hosts have agreed.
        """
        if order not in self._norms or self._finished_at != self._reducer.version:
            self.finish(Purpose.NORM, pack_floats(order))
            self._norms[order] = self.compute_norms(order)
        kept = self._norms[order]
        params = self._reducer.params
        return [kept[index].to(dtype or params[index].dtype) for index in _indices(stand_ins)]

    def compute_norms(self, order: float) -> list[Tensor]:
        """Return the float64 norm of every parameter's averaged gradient; every rank calls this after `finish`."""
        reducer = self._reducer
        result: list[Tensor] = [torch.empty(0)] * len(reducer.params)
        devices = list(dict.fromkeys(gradient.flat.device for gradient in reducer.gradients))
        for device in devices:
            mine = [
                pair for pair in zip(reducer.gradients, reducer.bases, strict=True) if pair[0].flat.device == device
            ]
            neutral = -math.inf if order == math.inf else math.inf if order == -math.inf else 0.0
            totals = torch.full((len(reducer.params),), neutral, dtype=torch.float64, device=device)
            for gradient, base in mine:
                average = gradient.average()
                views = [average[piece.start : piece.end] for piece in gradient.flat.pieces]
                if views:
                    parts = torch.stack(torch._foreach_norm(views, order, dtype=torch.float64))
                    where = torch.empty(len(views), dtype=torch.int64, device=device)
                    self._collectives.streams.upload([base + piece.slot for piece in gradient.flat.pieces], where)
                    totals.index_copy_(0, where, to_power(parts, order))
            if math.isinf(order):
                # A maximum may lose NaN (gloo's does), so that travels beside it.
                sign, lost = math.copysign(1.0, order), totals.isnan()
                pair = torch.stack([totals.mul_(sign).masked_fill_(lost, -math.inf), lost.double()])
                self._collectives.sum_shards(pair, f"norms of order {order}", ReduceOp.MAX).wait()
                totals = pair[0].mul_(sign).masked_fill_(pair[1] > 0, math.nan)
            else:
                self._collectives.sum_shards(totals, f"norms of order {order}").wait()
            norms = from_power(totals, order)
            for gradient, base in mine:
                for slot in range(len(gradient.flat.params)):
                    empty = gradient.flat.params[slot].numel() == 0 and math.isinf(order)
                    result[base + slot] = norms[base + slot].zero_() if empty else norms[base + slot]
        return result

    def total_norm(self, order: float, norm: StepNorm) -> Tensor:
        """Return the norm of all averaged gradients together, 0-D in the compute dtype, on the first device.

        Collective: every rank, after `finish`. Syncs: never on CUDA.
        """
        gradients = self._reducer.gradients
        device = gradients[0].flat.device
        if order != 2:
            parts = [part.to(device) for part in self.compute_norms(order)]
            total = torch.linalg.vector_norm(torch.stack(parts), order)
        else:
            squares = torch.zeros((), dtype=torch.float64, device=device)
            for gradient in gradients:
                part = torch.zeros((), dtype=torch.float64, device=gradient.flat.device)
                norm.scratch(gradient.flat.device).exact(norm.read(gradient), part)
                if gradient.scaling_divisor is not None:
                    part.div_(gradient.scaling_divisor).div_(gradient.scaling_divisor)
                for multiplier in gradient.multipliers:
                    part.mul_(multiplier).mul_(multiplier)
                squares.add_(part.to(device))
            self._collectives.sum_shards(squares, "gradient norm").wait()
            total = squares.sqrt()
        widest = max((gradient.flat.compute_dtype for gradient in gradients), key=lambda dtype: dtype.itemsize)
        result: Tensor = total.to(widest)
        return result

    # Scaling ---------------------------------------------------------------------------------------------------------

    def scale(self, stand_ins: Sequence[ShardedGradient], factors: Sequence[Any], divide: bool) -> None:
        """Multiply (or divide) averaged gradients in place.

        Collective: every rank. Syncs: hosts wait for each other, once after a backward.
        """
        if not self._joining():
            if self._finished_at != self._reducer.version:
                self.finish(Purpose.SCALE)
            self._scale(_indices(stand_ins), factors, divide)
            return
        # A joined rank scales its shards too, so it is told each factor.
        if any(stand_in.param_index is None for stand_in in stand_ins):
            self.finish(Purpose.SCALE, pack_floats(float(ALL), 1.0, 0.0))
        indices, first = _indices(stand_ins), factors[0]
        if len(indices) == len(self._reducer.params) and all(factor is first for factor in factors):
            pairs = [(ALL, first)]
        else:
            pairs = list(zip(indices, factors, strict=True))
        for index, factor in pairs:
            self.finish(Purpose.SCALE, pack_floats(float(index), float(factor), float(divide)))
            self.replay_scale(index, float(factor), divide)

    def replay_scale(self, index: int, factor: float, divide: bool) -> None:
        """Scale one parameter's gradient, or all of them (`ALL`), as another rank does now."""
        indices = range(len(self._reducer.params)) if index == ALL else [index]
        self._scale(indices, [factor] * len(indices), divide)

    def _scale(self, indices: Sequence[int], factors: Sequence[Any], divide: bool) -> None:
        self._forget()
        by_bucket: dict[int, list[tuple[int, Any]]] = {}
        for index, factor in zip(indices, factors, strict=True):
            bucket, slot = self._reducer.locate(index)
            by_bucket.setdefault(bucket, []).append((slot, factor))
        for bucket, pairs in by_bucket.items():
            gradient = self._reducer.gradients[bucket]
            first = pairs[0][1]
            if not divide and len(pairs) == len(gradient.flat.params) and all(factor is first for _, factor in pairs):
                gradient.multiply(first)
                continue
            average = gradient.average()
            for slot, factor in pairs:
                view = gradient.flat.slot_shard(average, slot)
                if divide:
                    view.div_(factor)
                else:
                    view.mul_(factor)

    def apply(self, stand_ins: Sequence[ShardedGradient], function: Callable[[Tensor], Any]) -> None:
        """Apply an elementwise in-place function to averaged gradients.

        Collective: every rank. Syncs: hosts wait for each other, once after a backward.
        """
        if self._joining():
            raise UsageError(
                "in-place functions on p.grad are not carried over to joined ranks (Join); "
                "use clip_grad_norm_ or scaling."
            )
        if self._finished_at != self._reducer.version:
            self.finish(Purpose.SCALE)
        self._forget()
        for index in _indices(stand_ins):
            gradient, slot = self._reducer.place(index)
            function(gradient.flat.slot_shard(gradient.average(), slot))

    def check_finite(self, stand_ins: Sequence[ShardedGradient], found_inf: Tensor, inv_scale: Tensor) -> None:
        """GradScaler's check and unscale: non-finite values anywhere set ``found_inf`` on every rank.

        Collective: every rank; one all-reduce after a backward. Syncs: never on CUDA after the hosts have agreed.
        """
        if not self._found or self._finished_at != self._reducer.version:
            self.finish(Purpose.CHECK)
            self._found = self.compute_found()
        flag = self._found[found_inf.device]
        found_inf.copy_(torch.maximum(found_inf, flag.to(found_inf.dtype)))
        found = self._found
        if inv_scale.device.type != "cpu" or float(inv_scale) != 1.0:
            self.scale(stand_ins, [inv_scale] * len(stand_ins), divide=False)
        self._found = found

    def compute_found(self) -> dict[torch.device, Tensor]:
        """Return for each device whether any rank's shard has a NaN or Inf (0-D, 0 or 1); every rank calls this."""
        found: dict[torch.device, Tensor] = {}
        for gradient in self._reducer.gradients:
            largest = torch.linalg.vector_norm(gradient.raw_sum(), math.inf)
            flag = torch.isfinite(largest).logical_not_().to(torch.float32)
            device = gradient.flat.device
            found[device] = torch.maximum(found[device], flag) if device in found else flag
        if len(found) > 1:
            total = torch.stack([flag.to(next(iter(found))) for flag in found.values()]).max()
            found = {device: total.to(device) for device in found}
        first = next(iter(found.values()))
        self._collectives.sum_shards(first, "found_inf", ReduceOp.MAX).wait()
        return {device: first.to(device) for device in found}

    # Whole gradients -------------------------------------------------------------------------------------------------

    def full(self, index: int) -> Tensor:
        """Return a parameter's averaged gradient; zeros when no rank has one. Every rank calls this after `finish`.

        Collective: every rank of the shard group, with the same parameter. Syncs: until the gather is done on CPU.
        """
        gradient, slot = self._reducer.place(index)
        flat = gradient.flat
        average = gradient.average()
        whole = torch.empty(flat.bucket.numel, dtype=average.dtype, device=average.device)
        self._collectives.all_gather(whole, average, f"gradient of {flat.names[slot]!r}").wait()
        return flat.unflatten(whole, slot).to(flat.dtype, copy=True)


def _indices(stand_ins: Sequence[ShardedGradient]) -> list[int]:
    """Return the parameters' indices; once the ranks have agreed, all that are some ``p.grad`` have one."""
    lost = next((stand_in for stand_in in stand_ins if stand_in.param_index is None), None)
    if lost is not None:
        raise UsageError(f"{lost!r} is no longer p.grad of its parameter; expected it to stay there until step().")
    return [stand_in.param_index for stand_in in stand_ins if stand_in.param_index is not None]
