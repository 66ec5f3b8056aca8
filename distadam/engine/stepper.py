"""Update this rank's shard of a bucket: which ranges, which kernel, which scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distadam.comm import Streams
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.ledger import Ledger
from distadam.engine.norms import BucketSquares
from distadam.engine.order import GatherOrder
from distadam.engine.rounds import BucketGradient
from distadam.engine.state import renew_history
from distadam.kernels import Choice, GradScaling, GroupRanges, Kernel, ShardUpdate, make_kernel, select
from distadam.kernels.compiled import COMPILED
from distadam.kernels.triton_select import TRITON
from distadam.layout import Piece
from distadam.layout.layout import format_table
from distadam.rules import Rule

_MAX_CACHED = 64
_MOST_SHOWN = 32
_Choices: TypeAlias = dict[int, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Which kernel serves which bucket and group, how their bytes travel, in which order, and why all that.

    Args:
        rows: (bucket, group, kernel, weights, moments, reason).
        transports: by bucket: "none", "native", "exchange" or "shared", and the reason.
        order: buckets as the next step will update and gather them, unless it learns another order.
        reason_of_order: in words.
    """

    rows: tuple[tuple[int, int, str, str, str, str], ...]
    transports: tuple[tuple[str, str], ...]
    order: tuple[int, ...]
    reason_of_order: str

    def as_dict(self) -> list[dict[str, object]]:
        """Return the rows as dictionaries, ready for JSON.

        ``reduce`` is how the bucket's bytes travel, ``turn`` its place in the order of updates and gathers.
        """
        own = ("bucket", "group", "kernel", "weights", "moments", "reason")
        names = (*own, "reduce", "reason_of_reduce", "turn", "reason_of_turn")
        turns = {bucket: turn for turn, bucket in enumerate(self.order)}
        return [
            dict(zip(names, (*row, *self.transports[row[0]], turns[row[0]], self.reason_of_order), strict=True))
            for row in self.rows
        ]

    def __str__(self) -> str:
        header = ("bucket", "group", "kernel", "weights", "moments", "reason")
        table = format_table([header, *[tuple(map(str, row)) for row in self.rows]], left=(2, 3, 4, 5))
        shown = " ".join(map(str, self.order[:_MOST_SHOWN])) + (" ..." if len(self.order) > _MOST_SHOWN else "")
        order = f"order of updates and gathers: {shown} ({self.reason_of_order})"
        return "\n".join([table, order, *(f"reduce: {how} ({why})" for how, why in dict.fromkeys(self.transports))])


@dataclass(slots=True)
class _Work:
    """The ranges of one shard that are updated together, with the gradient of the shard from one element on.

    Attributes:
        start: that element.
        parts: by parameter group.
        calls: the kernels that serve them, each with its parts; made again when ``choices`` are others.
    """

    start: int
    parts: dict[int, GroupRanges]
    choices: _Choices
    calls: list[tuple[Kernel, ShardUpdate]]


class Stepper:
    """Applies the rule to shards.

    Note [Ranges]: slots of one group lie side by side, so a bucket whose parameters all have gradients and have always
    been updated together is one range per group. Otherwise ranges are cut, at slot boundaries, where a parameter has no
    gradient on any rank (it keeps its bits) or has another step count.
    """

    def __init__(self, rule: Rule, param_groups: list[dict[str, Any]], ledger: Ledger, streams: Streams) -> None:
        self.rule = rule
        self.param_groups = param_groups
        self._ledger = ledger
        self._streams = streams
        self._kernels: dict[str, Kernel] = {}
        self._work: dict[tuple[int, int, int | None, bytes, int], _Work] = {}
        self._history_version = 0
        self._masks: dict[tuple[int, bytes], Tensor] = {}
        self._increments: dict[torch.device, Tensor] = {}
        self._next_history = 1

    def invalidate(self) -> None:
        """Forget cached ranges, after states or steps were replaced."""
        self._work.clear()
        self._history_version += 1

    def update(
        self,
        gradient: BucketGradient,
        has: bytes,
        found_inf: Tensor | None,
        loss_scale: Tensor | None,
        squares: BucketSquares,
    ) -> None:
        """Update the shard of one bucket and store its parameters.

        Args:
            gradient: the bucket with its reduced gradient.
            has: per slot, whether any rank had a gradient.
            found_inf: 0-D or 1-element float tensor; where not 0 nothing changes, steps included.
            loss_scale: 0-D; gradients are divided by it.
            squares: of the gradient before it is scaled: added up by the kernel, or else shown each piece.

        Syncs: never on CUDA; on CPU until the reduction has landed.
        """
        flat = gradient.flat
        self._count_steps(flat, has, found_inf)
        choices = self._choices(flat)
        names = {name for name, _ in choices.values()}
        in_one_pass = names == {COMPILED} and squares.show is None
        if len(gradient.multipliers) > 2 and not names.isdisjoint((COMPILED, TRITON)):
            gradient.average()
        parts = gradient.leaves() if in_one_pass else self._parts(gradient, names)
        scaling = GradScaling(
            num_ranks=gradient.scaling_divisor,
            multipliers=gradient.multipliers,
            loss_scale=_on(loss_scale, flat.device),
            found_inf=_on(found_inf, flat.device),
            squares=squares.part if in_one_pass else None,
        )
        start = 0
        for sources in parts:
            if not in_one_pass:
                squares.add(sources[0])
            work = self._work_for(flat, sources, start, has, None if in_one_pass else sources[0].data_ptr())
            for kernel, update in self._calls(work, flat, choices, sources):
                kernel.update(self.rule, update, scaling)
            start += sources[0].numel()
        if any(self.param_groups[span.group].get("eps") == 0 for span in flat.bucket.ranges):
            _zero_padding(flat)

    @staticmethod
    def _parts(gradient: BucketGradient, names: set[str]) -> Iterator[Sequence[Tensor]]:
        """Return the summed gradient as the kernels of these names take it; Triton reads 16 bits."""
        if TRITON in names:
            return iter([[gradient.raw_sum() if names == {TRITON} else gradient.summed()]])
        return ([piece] for piece in gradient.pieces())

    def _choices(self, flat: FlatBucket) -> _Choices:
        """Return for each parameter group of the bucket its kernel's name and its states' names, as options are now."""
        groups = {span.group: self.param_groups[span.group] for span in flat.bucket.ranges}
        return {
            index: (self._select(flat, group).name, self.rule.state_names(group)) for index, group in groups.items()
        }

    def _count_steps(self, flat: FlatBucket, has: bytes, found_inf: Tensor | None) -> None:
        if flat.steps._version != flat.steps_version:  # the user wrote to optimizer.state[p]["step"]
            renew_history([flat])
            self._history_version += 1
        if not self.rule.has_step:
            has = self._with_momentum(flat, has)
            if 1 not in has:
                return
        full = 0 not in has
        if full and found_inf is None:
            flat.steps.add_(1.0)
        else:
            mask = self._mask(flat, has)
            if found_inf is None:
                flat.steps.add_(mask)
            else:
                increment = self._increment(flat.device)
                torch.eq(_on(found_inf, flat.device).reshape(()), 0, out=increment)  # type: ignore[union-attr]
                flat.steps.addcmul_(mask, increment)
        flat.steps_version = flat.steps._version
        if not full:
            self._split_history(flat, has)

    def _with_momentum(self, flat: FlatBucket, has: bytes) -> bytes:
        """Drop slots without momentum: SGD counts updates of the buffer, of which the first is another formula."""
        counted = bytearray(has)
        for span in flat.bucket.ranges:
            if self.param_groups[span.group]["momentum"] == 0:
                counted[span.first : span.last] = bytes(span.last - span.first)
        return bytes(counted)

    def _mask(self, flat: FlatBucket, has: bytes) -> Tensor:
        key = (flat.bucket.index, has)
        mask = self._masks.get(key)
        if mask is None:
            if len(self._masks) >= _MAX_CACHED:
                for old in self._masks.values():
                    self._ledger.release(old)
                self._masks.clear()
            mask = self._ledger.empty("scratch", len(has), torch.float32, flat.device)
            self._masks[key] = self._streams.upload(list(has), mask)
        return mask

    def _increment(self, device: torch.device) -> Tensor:
        if device not in self._increments:
            self._increments[device] = self._ledger.empty("scratch", 1, torch.float32, device).view(())
        return self._increments[device]

    def _split_history(self, flat: FlatBucket, has: bytes) -> None:
        """Give slots that were updated now and slots that were not different history numbers."""
        numbers: dict[tuple[int, int], int] = {}
        kinds: dict[int, set[int]] = {}
        for number, flag in zip(flat.history, has, strict=True):
            kinds.setdefault(number, set()).add(flag)
        if all(len(flags) == 1 for flags in kinds.values()):
            return
        for slot, flag in enumerate(has):
            key = (flat.history[slot], flag)
            if key not in numbers:
                numbers[key] = self._next_history
                self._next_history += 1
            flat.history[slot] = numbers[key]
        self._history_version += 1

    def _work_for(
        self, flat: FlatBucket, sources: Sequence[Tensor], start: int, has: bytes, address: int | None
    ) -> _Work:
        # By address where kernels keep views of the gradient: the work's calls keep its memory, so no other tensor can
        # have it while it is here.
        key = (flat.bucket.index, start, address, has, self._history_version)
        work = self._work.get(key)
        if work is None:
            if len(self._work) >= _MAX_CACHED * 16:
                self._work.clear()
            work = self._work[key] = self._make_work(flat, start, start + sources[0].numel(), has)
        return work

    def _make_work(self, flat: FlatBucket, start: int, end: int, has: bytes) -> _Work:
        """Return what to update with the gradient of elements [start, end) of the shard."""
        parts: dict[int, GroupRanges] = {}
        for group_range in flat.bucket.ranges:
            pieces = [piece for piece in flat.pieces if group_range.first <= piece.slot < group_range.last]
            spans: list[tuple[int, int]] = []
            slots: list[int] = []
            padding: list[tuple[int, int]] = []
            for run in _runs(flat, pieces, has):
                first, last = max(run[0].start, start), min(run[-1].padded_end, end)
                if first < last:
                    spans.append((first, last))
                    slots.append(run[0].slot)
                    ends = [(max(piece.end, start), min(piece.padded_end, end)) for piece in run]
                    padding += [span for span in ends if span[0] < span[1]]
            if not spans:
                continue
            part = GroupRanges(
                group=self.param_groups[group_range.group],
                spans=spans,
                steps=[flat.steps[slot] for slot in slots],
                slots=slots,
                first=[None] * len(spans),
                padding=padding,
            )
            parts[group_range.group] = part
        return _Work(start, parts, {}, [])

    def _calls(
        self, work: _Work, flat: FlatBucket, choices: _Choices, sources: Sequence[Tensor]
    ) -> list[tuple[Kernel, ShardUpdate]]:
        """Return the kernel calls of this step, with this gradient: one for each kernel that serves some group."""
        if self.rule.name == "sgd":
            on_host = flat.device.type == "cpu"
            for index, part in work.parts.items():
                if choices[index][1]:
                    part.first = [float(step) == 1.0 if on_host else None for step in part.steps]
        if choices == work.choices:
            for _, update in work.calls:
                update.sources = sources
            return work.calls
        names = dict.fromkeys(name for index in work.parts for name in choices[index][1])
        states = {name: flat.state(name) for name in names}
        work.choices, work.calls = choices, []
        for kernel in dict.fromkeys(choices[index][0] for index in work.parts):
            update = ShardUpdate(
                weights=flat.weights,
                states=states,
                sources=sources,
                start=work.start,
                compute_dtype=flat.compute_dtype,
                steps=flat.steps,
                ranges=[part for index, part in work.parts.items() if choices[index][0] == kernel],
            )
            work.calls.append((self._kernel(kernel), update))
        return work.calls

    def _select(self, flat: FlatBucket, group: Mapping[str, Any]) -> Choice:
        return select(self.rule, group, flat.compute_dtype, flat.device.type)

    def _kernel(self, name: str) -> Kernel:
        kernel = self._kernels.get(name)
        if kernel is None:
            ledger = self._ledger
            kernel = self._kernels[name] = make_kernel(
                name, lambda numel, dtype, device: ledger.empty("scratch", numel, dtype, device), self._streams.upload
            )
            ledger.watch("scratch", kernel.tensors)
        return kernel

    def report(
        self, flats: Sequence[FlatBucket], transport: Callable[[torch.device], tuple[str, str]], order: GatherOrder
    ) -> KernelReport:
        """Return which kernel serves which bucket and group, how its bytes travel, in which order, and why."""
        rows = []
        for flat in flats:
            for group_range in flat.bucket.ranges:
                choice = self._select(flat, self.param_groups[group_range.group])
                stored = (flat.weights.name, flat.choice.moments)
                rows.append((flat.bucket.index, group_range.group, choice.name, *stored, str(choice)))
        transports = tuple(transport(flat.device) for flat in flats)
        return KernelReport(tuple(rows), transports, order.buckets, order.reason)


def _runs(flat: FlatBucket, pieces: Sequence[Piece], has: bytes) -> list[list[Piece]]:
    """Return maximal sequences of pieces that are updated together."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if not has[piece.slot]:
            continue
        last = runs[-1][-1] if runs else None
        joined = (
            last is not None and last.padded_end == piece.start and flat.history[last.slot] == flat.history[piece.slot]
        )
        if joined:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _zero_padding(flat: FlatBucket) -> None:
    """With eps=0 an update writes 0/0 to padding: keep it zero (contract 2.3.7)."""
    direct = [storage.direct for storage in (flat.weights, *flat.states.values())]
    written = [tensor for tensor in (*direct, flat.param_shard) if tensor is not None]
    padded = [piece for piece in flat.pieces if piece.end < piece.padded_end]
    views = [tensor[piece.end : piece.padded_end] for tensor in written for piece in padded]
    if views:
        torch._foreach_zero_(views)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)
