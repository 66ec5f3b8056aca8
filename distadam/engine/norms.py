"""Norms of sharded gradients.

Note [Precision of norms]: sums of squares are float64. What a user asks for (clipping, ``p.grad.norm()``) squares in
float64. The norm that every step takes along for `grad_norm` first takes float32 norms of blocks of 64 elements, which
are the same blocks for every world size and bucket size, then sums their squares in float64: the whole is within one
float32 ulp and costs a third of the update instead of all of it.
"""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distadam.comm import Collectives, Pending
from distadam.engine.ledger import Ledger
from distadam.engine.rounds import BucketGradient
from distadam.kernels import norm_in_one_pass

_CHUNK = 32768
_BLOCK = 64


class _Lingering:
    """Whether gloo's thread may still be letting go of a tensor of ours.

    Note [Lingering]: a collective is over an instant before gloo's thread lets go of its tensors, and that thread must
    not outlive Python with one of them. So the process ends no earlier than this after the last norm that nobody read;
    an optimizer that goes while the process stays costs nothing.
    """

    _SECONDS = 0.05

    def __init__(self) -> None:
        self._exiting = False
        self._until_s = 0.0

    def begin(self) -> None:
        self._until_s = time.monotonic() + self._SECONDS
        if self._exiting:  # finalizers may run after `at_exit`, or before
            self.at_exit()

    def at_exit(self) -> None:
        self._exiting = True
        time.sleep(max(0.0, self._until_s - time.monotonic()))


_lingering = _Lingering()
atexit.register(_lingering.at_exit)


class NormScratch:
    """Sums of squares without an allocation: scratch for one device."""

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self._ledger = ledger
        self._device = device
        self._chunk: Tensor | None = None
        self._blocks: Tensor | None = None
        self._blocks64: Tensor | None = None
        self._part: Tensor | None = None
        self._partials: Tensor | None = None

    def one_pass(self, values: Tensor, out: Tensor, nonfinite: Tensor | None = None) -> bool:
        """Let Triton write the float64 sum of squares and the number of non-finite values; False if it cannot."""
        if not norm_in_one_pass(values.dtype, values.device.type):
            return False
        from distadam.kernels.triton_norm import num_programs, sum_of_squares

        needed = 2 * num_programs(values.numel())
        if self._partials is None or self._partials.numel() < needed:
            if self._partials is not None:
                self._ledger.release(self._partials)
            self._partials = self._ledger.empty("scratch", needed, torch.float64, self._device)
        sum_of_squares(values, self._partials, out, nonfinite)
        return True

    def exact(self, values: Tensor, out: Tensor) -> None:
        """Write the float64 sum of squares of 1-D ``values`` to 0-D ``out``."""
        if self.one_pass(values, out):
            return
        if self._part is None:
            self._part = self._ledger.empty("scratch", 1, torch.float64, self._device)
        if self._device.type != "cpu":
            torch.linalg.vector_norm(values, 2, dtype=torch.float64, out=out)
            out.mul_(out)
            return
        if self._chunk is None:
            self._chunk = self._ledger.empty("scratch", _CHUNK, torch.float64, self._device)
        out.zero_()
        part = self._part.view(())
        for start in range(0, values.numel(), _CHUNK):
            piece = values[start : start + _CHUNK]
            wide = self._chunk[: piece.numel()].copy_(piece)
            torch.dot(wide, wide, out=part)
            out.add_(part)

    def blockwise(self, values: Tensor, out: Tensor) -> None:
        """Write the sum of squares of a part of a shard to 0-D float64 ``out``, by float32 norms of 64 elements."""
        if self.one_pass(values, out):
            return
        num_blocks = values.numel() // _BLOCK
        if self._blocks is None or self._blocks.numel() < num_blocks or self._blocks.dtype != values.dtype:
            for old in (self._blocks, self._blocks64):
                if old is not None:
                    self._ledger.release(old)
            self._blocks = self._ledger.empty("scratch", num_blocks, values.dtype, self._device)
            self._blocks64 = self._ledger.empty("scratch", num_blocks, torch.float64, self._device)
        assert self._blocks64 is not None
        blocks, wide = self._blocks[:num_blocks], self._blocks64[:num_blocks]
        torch.linalg.vector_norm(values.view(num_blocks, _BLOCK), 2, dim=1, out=blocks)
        wide.copy_(blocks)
        torch.dot(wide, wide, out=out)


def to_power(norms: Tensor, order: float) -> Tensor:
    """Return what adds up over the parts of a vector: |x|^p summed, the count for order 0, the maximum for inf."""
    if order == 0 or math.isinf(order):
        return norms
    return norms**order


def from_power(total: Tensor, order: float) -> Tensor:
    """Undo `to_power`."""
    if order == 0 or math.isinf(order):
        return total
    return total ** (1.0 / order)


@dataclass(frozen=True, slots=True)
class BucketSquares:
    """The sum of squares of one bucket's gradient, taken while the update reads it.

    Attributes:
        part: 0-D float64, to be added to; None where the norm is known already.
        show: is shown each piece of the gradient; where it is not None there must be pieces.
    """

    part: Tensor | None = None
    _of_piece: Tensor | None = None
    _scratch: NormScratch | None = None
    show: Callable[[Tensor], None] | None = None

    def add(self, piece: Tensor) -> None:
        """Take a piece of the shard, unscaled; for kernels that do not add to ``part`` themselves."""
        if self.part is not None and self._of_piece is not None and self._scratch is not None:
            self._scratch.blockwise(piece, self._of_piece)
            self.part.add_(self._of_piece)
        if self.show is not None:
            self.show(piece)


class StepNorm:
    """The gradient norm of the last step, for `grad_norm`: known to every rank without a question.

    The sum of squares is taken from the shard as the update reads it; one all-reduce of eight bytes combines the ranks
    while training goes on. When the gradients were clipped, the norm that clipping found is kept instead.
    """

    def __init__(self, ledger: Ledger, collectives: Collectives) -> None:
        self._ledger = ledger
        self._collectives = collectives
        self._scratch: dict[torch.device, NormScratch] = {}
        self._totals: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._pending: list[Pending] = []
        self._clipped: Tensor | None = None
        self._clipped_of: object = None
        self._value: Tensor | None = None
        ledger.watch("scratch", self._results)

    def _results(self) -> list[Tensor]:
        return [norm for norm in (self._clipped, self._value) if norm is not None]

    def scratch(self, device: torch.device) -> NormScratch:
        """Return the scratch of a device."""
        if device not in self._scratch:
            self._scratch[device] = NormScratch(self._ledger, device)
        return self._scratch[device]

    def give(self, norm: Tensor, gradient: object) -> None:
        """Take the norm that clipping found as the coming step's, if it updates with ``gradient`` (compared by ==)."""
        self._clipped, self._clipped_of = norm, gradient

    def begin(self, gradient: object) -> None:
        """Start a step: the last one's sum is no longer needed, nor is the norm of what has changed since."""
        if self._clipped_of != gradient:
            self._clipped = None
        self._wait()
        for total, *_ in self._totals.values():
            total.zero_()

    @contextmanager
    def of_bucket(self, gradient: BucketGradient, loss_scale: Tensor | None) -> Iterator[BucketSquares]:
        """Yield what the update adds up the squares of one bucket's reduced gradient in, before it scales it."""
        if self._clipped is not None:
            yield BucketSquares()
            return
        device = gradient.flat.device
        if device not in self._totals:
            buffer = self._ledger.zeros("scratch", 3, torch.float64, device)
            self._totals[device] = (buffer[0], buffer[1], buffer[2])
        total, part, of_piece = self._totals[device]
        part.zero_()
        yield BucketSquares(part, of_piece, self.scratch(device))
        if gradient.scaling_divisor is not None:
            part.div_(gradient.scaling_divisor).div_(gradient.scaling_divisor)
        for multiplier in gradient.multipliers:
            part.mul_(multiplier).mul_(multiplier)
        if loss_scale is not None:
            scale = loss_scale if loss_scale.device == device else loss_scale.to(device)
            part.div_(scale.view(())).div_(scale.view(()))
        total.add_(part)

    @staticmethod
    def read(gradient: BucketGradient) -> Tensor:
        """Return the gradient as it lies there if one pass over it is enough, else in the compute dtype."""
        raw = gradient.raw_sum()
        return raw if norm_in_one_pass(raw.dtype, raw.device.type) else gradient.summed()

    def finish(self) -> None:
        """Combine the shards' sums; nothing waits for it."""
        if self._clipped is not None:
            self._value, self._clipped = self._clipped, None
            return
        self._value = None
        self._pending = [self._collectives.sum_shards(total, "grad_norm") for total, *_ in self._totals.values()]

    def settle(self) -> None:
        """Wait for what is in flight, when the optimizer goes or at exit; see Note [Lingering]."""
        pending, self._pending = self._pending, []
        if pending and all(item.ready(1.0) for item in pending):
            _lingering.begin()

    def _wait(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending = []

    @property
    def value(self) -> Tensor | None:
        """0-D float32 (float64 for float64 gradients' clipping); None before the first step."""
        if self._value is None and self._totals:
            self._wait()
            totals = [total for total, *_ in self._totals.values()]
            self._value = sum((total.to(totals[0].device) for total in totals[1:]), totals[0]).sqrt().float()
        return self._value
