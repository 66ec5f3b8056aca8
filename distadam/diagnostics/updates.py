"""`check_updates`: was this step the one that the published formula says?"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from distadam.diagnostics.agreement import Disagreement, checksums, compare_ranks
from distadam.diagnostics.formulas import FORMULAS, UNITS, Before, Exact
from distadam.diagnostics.shards import Part, access_of, element, parts_of, read_state, read_weights, spell
from distadam.diagnostics.storage_error import bits_lost, spacing, state_slack, weight_slack
from distadam.diagnostics.update_report import UpdateReport, UpdateRow
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.observers import BucketStep, StepObserver
from distadam.errors import CheckFailed, UsageError
from distadam.optimizer import ShardedOptimizer


@dataclass(slots=True, kw_only=True)
class _Sample:
    """Sampled elements of one part of a parameter.

    Attributes:
        where: their places in the shard.
        weight, state: before the step, float64.
        param: before the step, as the model reads it.
        grad: what the rule sees, in the compute dtype.
        updated: whether the step changes it.
    """

    part: Part
    where: Tensor
    weight: Tensor
    param: Tensor
    state: dict[str, Tensor]
    step: float
    grad: Tensor
    updated: bool = False


def check_updates(
    optimizer: ShardedOptimizer, *, elements: int | None = 4096, seed: int = 0, raises: bool = True
) -> UpdateCheck:
    """Check the steps in a ``with`` block against the published formula, recomputed in float64.

        with diagnostics.check_updates(optimizer) as check:
            optimizer.step()
        print(check.report)

    or, in two phases, ``check = check_updates(optimizer); check.begin(); optimizer.step(); check.finish()``. Every
    storage is checked for what it promises: fp32 weights and masters by the bound of contract 2.3.1, others for that
    and the distance to a neighbouring number of theirs. Ranks must hold the same parameters before and after.

    Args:
        optimizer: any rule, any storage.
        elements: how many elements of each parameter a rank samples from its shard; None is all of them.
        seed: chooses them.
        raises: raise at the end of the block if something is wrong.

    Raises:
        CheckFailed: at the end, with ``raises``; the message names parameter, element and rank.

    Collective: every rank, with the same arguments. Syncs: yes.
    """
    return UpdateCheck(optimizer, elements=elements, seed=seed, raises=raises)


class UpdateCheck(StepObserver):
    """See `check_updates`.

    Attributes:
        report: what was found, once finished.
    """

    def __init__(self, optimizer: ShardedOptimizer, *, elements: int | None, seed: int, raises: bool) -> None:
        if elements is not None and elements < 1:
            raise ValueError(f"check_updates(elements=...) expected a number above 0 or None but got {elements!r}.")
        self.report: UpdateReport | None = None
        self._optimizer = optimizer
        self._elements = elements
        self._generator = torch.Generator().manual_seed(seed)
        self._raises = raises
        self._samples: dict[int, list[_Sample]] = {}
        self._rows: dict[str, UpdateRow] = {}
        self._num_steps = 0
        self._found: list[Disagreement] = []
        self._sums: dict[str, int] = {}

    def __enter__(self) -> UpdateCheck:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._remove()
            return
        self.finish()

    def begin(self) -> None:
        """Compare the ranks' parameters and watch the coming steps. Collective: every rank."""
        self._access = access_of(self._optimizer)
        self._optimizer.flush()
        self._sums = checksums(self._access)
        self._found = compare_ranks(self._access, self._sums)
        self._remove = self._optimizer.observe(self)

    def finish(self) -> UpdateReport:
        """Return the report of the steps since `begin`. Collective: every rank.

        Raises:
            CheckFailed: something is wrong, with ``raises``.
            UsageError: there was no step.
        """
        self._remove()
        if not self._num_steps:
            raise UsageError("check_updates expected optimizer.step() between begin() and finish() but there was none.")
        self._optimizer.flush()
        collectives = self._access.collectives
        before = self._sums if self._num_steps == 1 else None
        known = {found.parameter for found in self._found}
        after = compare_ranks(self._access, checksums(self._access), before)
        self._found += [found for found in after if found.parameter not in known]
        rows = {name: UpdateRow(parameter=name) for flat in self._access.flats for name in flat.names}
        # Replicas hold the same shards, and each checks its own.
        for answer in collectives.exchange(list(self._rows.values()), "check_updates"):
            for row in answer:
                rows[row.parameter].merge(row)
        order = {name: number for number, name in enumerate(self._access.names.values())}
        self.report = UpdateReport(
            rows=tuple(sorted(rows.values(), key=lambda row: order[row.parameter])),
            disagreements=tuple(self._found),
            num_steps=self._num_steps,
        )
        if self._raises and not self.report.ok:
            raise CheckFailed(f"check_updates found something wrong:\n{self.report}")
        return self.report

    # What the optimizer shows

    def begin_step(self) -> None:
        """Remember sampled elements of everything."""
        self._samples = {flat.bucket.index: self._sample(flat) for flat in self._access.flats}

    def _sample(self, flat: FlatBucket) -> list[_Sample]:
        weights, states = read_weights(flat), {}
        steps = flat.steps.tolist()
        samples = []
        for part in parts_of(flat):
            numel = part.end - part.start
            where = torch.arange(part.start, part.end)
            if self._elements is not None and numel > self._elements:
                where = torch.randint(part.start, part.end, (self._elements,), generator=self._generator)
                where = torch.sort(where)[0]
            where = where.to(flat.device)
            group = self._access.param_groups[part.group]
            names = self._access.rule.state_names(group)
            for name in names:
                if name not in states:
                    states[name] = read_state(flat, name)
            samples.append(
                _Sample(
                    part=part,
                    where=where,
                    weight=weights[where].double(),
                    param=flat.param_shard[where],
                    state={name: states[name][where].double() for name in names},
                    step=steps[part.slot],
                    grad=torch.zeros(where.numel(), dtype=flat.compute_dtype, device=flat.device),
                )
            )
        return samples

    def begin_bucket(self, step: BucketStep) -> None:
        """Note which parameters will change."""
        skipped = step.found_inf is not None and bool(step.found_inf.reshape(()) != 0)
        for sample in self._samples[step.flat.bucket.index]:
            sample.updated = bool(step.has[sample.part.slot]) and not skipped

    def gradient(self, step: BucketStep, start: int, piece: Tensor) -> None:
        """Remember sampled elements of the gradient, scaled as contract 2.3.3 says."""
        for sample in self._samples[step.flat.bucket.index]:
            if sample.part.end <= start or sample.part.start >= start + piece.numel():
                continue
            here = (sample.where >= start) & (sample.where < start + piece.numel())
            grad = piece[sample.where[here] - start].to(step.flat.compute_dtype)
            if step.num_ranks is not None:
                grad = grad / step.num_ranks
            for multiplier in step.multipliers:
                grad = grad * multiplier
            if step.loss_scale is not None:
                grad = grad / step.loss_scale.reshape(())
            sample.grad[here] = grad

    def end_step(self) -> None:
        """Compare everything with the formula."""
        self._num_steps += 1
        for flat in self._access.flats:
            weights, states = read_weights(flat), {}
            steps = flat.steps.tolist()
            for sample in self._samples.pop(flat.bucket.index):
                for name in sample.state:
                    if name not in states:
                        states[name] = read_state(flat, name)
                row = self._judge(sample, weights, states, steps[sample.part.slot])
                self._rows.setdefault(row.parameter, UpdateRow(parameter=row.parameter)).merge(row)

    # Judging

    def _judge(self, sample: _Sample, weights: Tensor, states: dict[str, Tensor], step: float) -> UpdateRow:
        part, flat = sample.part, sample.part.flat
        rank = self._access.collectives.groups.rank
        row = UpdateRow(parameter=part.name, num_elements=sample.where.numel(), rank=rank)
        weight = weights[sample.where].double()
        state = {name: states[name][sample.where].double() for name in sample.state}
        if not sample.updated:
            _judge_kept(row, sample, weight, state, step)
            return row
        group = self._access.param_groups[part.group]
        if self._access.rule.has_step and step != sample.step + 1:
            row.findings.append(f"{part.name}: expected step count {sample.step + 1:g} but got {step:g} on rank {rank}")
        before = Before(
            weight=sample.weight,
            grad=sample.grad.double(),
            state=sample.state,
            step=int(sample.step) + 1,
            dtype=flat.compute_dtype,
        )
        after = FORMULAS[self._access.rule.name](group, before)
        _measure(row, sample, "weight", after.weight, weight, weight_slack(flat, after.weight.value))
        row.bits_lost = bits_lost(weight, after.weight.value, flat.compute_dtype)
        for name, result in after.state.items():
            _measure(row, sample, name, result, state[name], state_slack(flat, name, result.value, sample.where))
            row.state_bits_lost = max(row.state_bits_lost, bits_lost(state[name], result.value, flat.compute_dtype))
        moves = after.weight.value != sample.weight
        row.should_move = int(moves.sum())
        row.frozen = int((moves & (weight == sample.weight)).sum())
        _judge_param(row, sample, weight)
        return row


def _measure(
    row: UpdateRow, sample: _Sample, what: str, expected: Exact, actual: Tensor, slack: Tensor | float
) -> None:
    """Put the largest error of one kind of numbers into the row, in units of the bound."""
    dtype = sample.part.flat.compute_dtype
    info = torch.finfo(dtype)
    # In float64 the formula here rounds as often as the kernel does.
    bound = (UNITS if dtype == torch.float32 else 2 * UNITS) * info.eps * expected.scale
    bound = bound + info.smallest_normal * info.eps * UNITS
    error = (actual - expected.value).abs()
    excess = (error - slack - expected.slack).clamp_min(0) / bound
    same = (actual == expected.value.to(dtype).double()) | (actual.isnan() & expected.value.isnan())
    judged = ~same & bound.isfinite() & ~torch.as_tensor(expected.slack).isinf()
    excess = torch.where(judged, torch.where(excess.isnan(), torch.inf, excess), 0.0)
    if not excess.numel():
        return
    position = int(excess.argmax())
    if float(excess[position]) >= row.worst or not row.what:
        part = sample.part
        offset = part.first + int(sample.where[position]) - part.start
        row.worst, row.what = float(excess[position]), what
        row.index = element(part.flat, part.slot, offset)
        row.expected, row.actual = float(expected.value[position]), float(actual[position])


def _judge_kept(row: UpdateRow, sample: _Sample, weight: Tensor, state: dict[str, Tensor], step: float) -> None:
    """Check that a parameter without a gradient (or with found_inf) kept its bits."""
    name = sample.part.name
    if step != sample.step:
        row.findings.append(f"{name}: expected step count {sample.step:g}, there was no update, but got {step:g}")
    pairs = {"weight": (sample.weight, weight)} | {key: (old, state[key]) for key, old in sample.state.items()}
    for what, (old, new) in pairs.items():
        changed = (old != new) & ~(old.isnan() & new.isnan())
        if bool(changed.any()):
            position = int(changed.nonzero()[0])
            offset = sample.part.first + int(sample.where[position]) - sample.part.start
            where = spell(name, element(sample.part.flat, sample.part.slot, offset))
            row.findings.append(
                f"{what} of {where} on rank {row.rank}: expected its bits to stay, it has no gradient (or found_inf), "
                f"but {float(old[position])!r} became {float(new[position])!r}"
            )


def _judge_param(row: UpdateRow, sample: _Sample, weight: Tensor) -> None:
    """Check that the parameter is its master's rounding."""
    flat = sample.part.flat
    if flat.choice.weights not in ("fp32", "split"):
        return
    param = flat.param_shard[sample.where].double()
    apart = ((param - weight).abs() > spacing(weight, flat.dtype) / 2) & param.isfinite() & weight.isfinite()
    if bool(apart.any()):
        position = int(apart.nonzero()[0])
        offset = sample.part.first + int(sample.where[position]) - sample.part.start
        where = spell(sample.part.name, element(flat, sample.part.slot, offset))
        row.findings.append(
            f"{where} on rank {row.rank}: expected its master "
            f"{float(weight[position])!r} rounded to {flat.dtype} but got {float(param[position])!r}"
        )
