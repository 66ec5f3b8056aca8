"""`check_gradients`: is the reduced, sharded gradient the gradient of the loss?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distadam.diagnostics.double import DoubleLoss, unchanged
from distadam.diagnostics.gradient_report import GradientReport, GradientRow
from distadam.diagnostics.shards import access_of, row_major_index, spell
from distadam.engine.access import Access
from distadam.errors import CheckFailed, UsageError
from distadam.optimizer import ShardedOptimizer

_SLOPE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class _Batch:
    """A model, the losses of this rank's batch and of others', and the optimizer's view of them."""

    model: nn.Module
    loss: Callable[[], Tensor]
    loss_of: Callable[[int], Tensor] | None
    params: Mapping[str, Tensor]


def check_gradients(
    optimizer: ShardedOptimizer,
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    loss_of: Callable[[int], Tensor] | None = None,
    samples: int = 2,
    seed: int = 0,
    raises: bool = True,
) -> GradientReport:
    """Compare the reduced gradient with central differences and with the average of the ranks' own gradients.

    Call it between two steps, on every rank. It runs a backward of its own and drops it: parameters, buffers, random
    numbers and the optimizer's state stay; gradients that were collected before are lost.

    Args:
        optimizer: of the model's parameters.
        model: the module whose parameters ``loss`` reads.
        loss: returns the loss of this rank's batch; called many times, it must use the same batch and no dropout that
            torch's random numbers do not decide.
        loss_of: ``loss_of(rank)`` returns the loss of another rank's batch, for data that any rank can make. With it
            each rank is checked by its neighbour: a rank that reads the wrong data is named.
        samples: elements a parameter where central differences are taken in float64, the largest gradient's among
            them: two evaluations of the loss each. 0 takes none.
        seed: chooses them.
        raises: raise if something is wrong.

    Raises:
        CheckFailed: with ``raises``; the message names parameter, element and rank.

    Collective: every rank, with the same arguments. Syncs: yes.
    """
    access = access_of(optimizer)
    params = {name: param for param, name in access.names.items() if param.requires_grad}
    batch = _Batch(model, loss, loss_of, params)
    optimizer.flush()
    optimizer.zero_grad()
    own = _own_gradients(batch, loss)
    reduced = _reduced(optimizer, batch)
    findings, remarks = _same_data(access, batch, own)
    rows = []
    generator = torch.Generator().manual_seed(seed)
    double = DoubleLoss(model, loss)
    for name, param in params.items():
        copies: list[Tensor | None] = access.collectives.exchange(own[name], f"gradient of {name!r}")
        row = GradientRow(parameter=name, num_elements=param.numel())
        _against_average(row, reduced[name], copies)
        if samples and param.numel() and not row.findings and param in double.values:
            _against_slopes(access, row, param, reduced[name].double(), double, samples, generator)
        rows.append(row)
    findings += _left_out(access, batch)
    parts = access.collectives.exchange((findings, remarks, rows), "check_gradients")
    report = GradientReport(
        rows=_merge([part[2] for part in parts]),
        findings=tuple(dict.fromkeys(line for part in parts for line in part[0])),
        remarks=tuple(dict.fromkeys(line for part in parts for line in part[1])),
    )
    if raises and not report.ok:
        raise CheckFailed(f"check_gradients found something wrong:\n{report}")
    return report


def _own_gradients(batch: _Batch, loss: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    """Return autograd's own gradients; no hook of the optimizer sees them."""
    with unchanged(batch.model), torch.enable_grad():
        grads = torch.autograd.grad(loss(), list(batch.params.values()), allow_unused=True)
    return {name: None if g is None else g.detach().cpu() for name, g in zip(batch.params, grads, strict=True)}


def _reduced(optimizer: ShardedOptimizer, batch: _Batch) -> dict[str, Tensor]:
    """Return what the optimizer's own reduction makes of the same loss."""
    with unchanged(batch.model), torch.enable_grad():
        batch.loss().backward()  # type: ignore[no-untyped-call]
    reduced = {name: optimizer.full_grad(name).cpu() for name in batch.params}
    optimizer.zero_grad()
    return reduced


def _against_average(row: GradientRow, reduced: Tensor, copies: list[Tensor | None]) -> None:
    row.ranks = tuple(rank for rank, copy in enumerate(copies) if copy is not None)
    if len(row.ranks) < len(copies):
        without = [str(rank) for rank in range(len(copies)) if rank not in row.ranks]
        row.remarks.append(
            f"{row.parameter}: unused on rank {', '.join(without)}: it gets no gradient there, which counts as zeros"
            if row.ranks
            else f"{row.parameter}: unused on every rank: it has no gradient and is not updated"
        )
    if not row.ranks or not reduced.numel():
        return
    present = [copy.double() for copy in copies if copy is not None]
    num_ranks = len(copies)
    average = torch.stack(present).sum(0) / num_ranks
    size = torch.stack(present).abs().sum(0) / num_ranks
    error = (reduced.double() - average).abs()
    unit = max(float(size.max()) * 1e-6, torch.finfo(torch.float64).tiny)  # what nearly cancels has no relative error
    relative = torch.where(error == 0, 0.0, error / size.clamp_min(unit)).nan_to_num(nan=torch.inf)
    relative = torch.where(reduced.isnan() & average.isnan(), 0.0, relative)
    position = int(relative.argmax())
    row.average_error = float(relative.flatten()[position])
    row.average_index = row_major_index(reduced.shape, position)
    tolerance = 8 * num_ranks * torch.finfo(reduced.dtype).eps
    if row.average_error > tolerance:
        row.findings.append(
            f"gradient of {spell(row.parameter, row.average_index)}: expected "
            f"{float(average.flatten()[position]):.9g}, the average of {num_ranks} ranks' own gradients, but got "
            f"{float(reduced.flatten()[position]):.9g} (relative error {row.average_error:.2g})"
            f"{_cause(reduced, average, copies)}"
        )


def _cause(reduced: Tensor, average: Tensor, copies: list[Tensor | None]) -> str:
    """Guess in words what makes a whole gradient wrong."""

    def close(other: Tensor) -> bool:
        return bool(torch.allclose(reduced.double(), other, rtol=1e-2, atol=1e-3 * float(average.abs().max())))

    for rank, copy in enumerate(copies):
        if copy is not None and len(copies) > 1:
            for factor, what in ((1.0, ""), (1.0 / len(copies), f", divided by {len(copies)}")):
                if close(copy.double() * factor):
                    return f"; it is rank {rank}'s own gradient{what}: a reduction is missing"
    top, bottom = (average * reduced.double()).sum(), (average * average).sum()
    ratio = float(top / bottom) if bottom > 0 else 0.0
    if ratio and close(average * ratio):
        return f"; all of it is {ratio:.6g} x the average: it is scaled twice, or not at all"
    return ""


def _against_slopes(
    access: Access,
    row: GradientRow,
    param: Tensor,
    reduced: Tensor,
    double: DoubleLoss,
    samples: int,
    generator: torch.Generator,
) -> None:
    largest = int(reduced.abs().nan_to_num().argmax())
    positions = {largest, *torch.randint(reduced.numel(), (samples - 1,), generator=generator).tolist()}
    rms = float(reduced.square().mean().sqrt())
    for position in sorted(positions):
        index = row_major_index(reduced.shape, position)
        slopes = access.collectives.exchange(double.slope(param, index), f"slope of {row.parameter!r}")
        slope, got = sum(slopes) / len(slopes), float(reduced.flatten()[position])
        scale = max(abs(slope), abs(got), rms, 1e-9)
        error = abs(slope - got) / scale
        if error >= row.difference_error:
            row.difference_error, row.difference_index = error, index
        if not error <= _SLOPE_TOLERANCE[param.dtype]:
            row.findings.append(
                f"gradient of {spell(row.parameter, index)}: expected {slope:.9g} by central differences of the loss "
                f"in float64 but got {got:.9g} (relative error {error:.2g})"
            )


def _same_data(access: Access, batch: _Batch, own: Mapping[str, Tensor | None]) -> tuple[list[str], list[str]]:
    """Compare ranks' own gradients with each other, and each with what its neighbour gets for its batch."""
    groups = access.collectives.groups
    found: list[str] = []
    remarks: list[str] = []
    mine = {name: None if grad is None else float(grad.double().norm()) for name, grad in own.items()}
    norms = access.collectives.exchange(mine, "check_gradients")
    for rank in range(1, len(norms)):
        twin = next((other for other in range(rank) if norms[other] == norms[rank]), None)
        if twin is not None and any(norms[rank].values()):
            remarks.append(
                f"ranks {twin} and {rank} have the same gradient of every parameter: do they read the same data?"
            )
    if batch.loss_of is None:
        return found, remarks
    loss_of, neighbour = batch.loss_of, (groups.rank + 1) % groups.num_ranks
    theirs = _own_gradients(batch, lambda: loss_of(neighbour))
    for name, grad in theirs.items():
        here, there = None if grad is None else float(grad.double().norm()), norms[neighbour][name]
        apart = abs((here or 0.0) - (there or 0.0)) > 1e-4 * max(here or 0.0, 1e-12)
        if apart or (here is None) != (there is None):
            found.append(
                f"rank {neighbour} differs: its gradient of {name!r} has norm {there!r}, but of the batch that it "
                f"should read, as rank {groups.rank} makes it, {here!r}: its data (order, seed, shard) is another"
            )
            break
    return found, remarks


def _left_out(access: Access, batch: _Batch) -> list[str]:
    known = set(access.names)
    if not any(param in known for param in batch.model.parameters()):
        raise UsageError("check_gradients expected the model whose parameters the optimizer has, but got another.")
    return [
        f"parameter {name!r} of the model is trainable but in no group of the optimizer: it is never updated"
        for name, param in batch.model.named_parameters()
        if param.requires_grad and param not in known
    ]


def _merge(parts: list[list[GradientRow]]) -> tuple[GradientRow, ...]:
    """Every rank has compared its own copy of the reduced gradient: keep the worst, and all findings."""
    merged = []
    for rows in zip(*parts, strict=True):
        worst = max(rows, key=lambda row: row.average_error)
        worst.findings = list(dict.fromkeys(finding for row in rows for finding in row.findings))
        merged.append(worst)
    return tuple(merged)
