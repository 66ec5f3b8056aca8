"""Every wait in the engine is needed, and none is missing.

The engine trains in a world whose collectives happen as late as its waits allow (tests/adversarial.py): random
schedules must give the bits of a plain loop (rtol=0, atol=0; gradients are small integers and there are two ranks, so
sums and the division by two are exact). Then each wait is taken out, one at a time, and the same check must fail within
a few schedules.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import distadam
from tests.adversarial import World, run_world

NUM_RANKS = 2
SCHEDULES = 100
TRIES = 60
STEPS = 6


class Model(nn.Module):
    """Four layers, each a bucket, of which a step uses some: the gather of an unused one is waited for by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                layer.weight.fill_(1.0 + number)  # no two buckets have the same gradient

    def forward(self, inputs: Tensor, used: list[int]) -> Tensor:
        total = inputs.new_zeros(())
        for number in used:
            layer = self.layers[number]
            total = total + (layer(inputs) * layer.weight.detach().sum()).sum()
        return total


def used_by(rank: int, step: int) -> list[int]:
    """Return the layers that a rank uses: all; in step 1 each rank misses one of its own; in later odd ones no last.

    In their order, which gathers follow where ranks agree: in steps 0 and 2, and another one in step 4.
    """
    if step == 1:
        return [0, 2, 3] if rank == 0 else [3, 2, 1]
    if step % 2:
        return [0, 1, 2] if rank == 0 else [2, 0, 1]
    return [2, 0, 3, 1] if step < 4 else [1, 3, 0, 2]


def batch(rank: int, step: int, part: int = 0) -> Tensor:
    return torch.full((1, 16), float(1 + (rank + 2 * step + 3 * part) % 3))


def spoil_one(grad: Tensor) -> Tensor:
    """Make one element infinite: one shard of the sum has it, the other has not."""
    spoiled = grad.clone()
    spoiled[0, 0] = torch.inf
    return spoiled


def training(rank: int, prefetch: bool, stage: int) -> list[Tensor]:
    """Train; return parameters after every step, norms, one whole gradient and one whole state."""
    model = Model()
    optimizer = distadam.SGD(
        model.named_parameters(),
        lr=2.0**-12,
        momentum=0.5,
        comm=distadam.CommPolicy(bucket_mb=1100 / 2**20),
        shard=distadam.ShardPolicy(stage=stage),
    )
    if prefetch:
        optimizer.prefetch(model)
    seen: list[Tensor] = []
    for step in range(STEPS):
        used = used_by(rank, step)
        spoil = model.layers[0].weight.register_hook(spoil_one) if (step, rank) == (4, 1) else None
        if step == 2:
            with optimizer.no_sync():  # what follows is sent from buffers that the next step does not need
                model(batch(rank, step), used).backward()
        model(batch(rank, step), used).backward()
        if step == 0:
            with optimizer.no_sync():
                model(batch(rank, step, 1), used).backward()  # a second round
            seen.append(optimizer.full_grad("layers.0.weight"))
        if step == 2:
            optimizer.zero_grad()  # what is in flight is dropped
            optimizer.step()
            continue
        if step == 3:
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            seen.append(optimizer.clip_grad_norm_(1e9))
        if step == 4 and spoil is not None:
            spoil.remove()
        if step == 4:
            found_inf = torch.zeros(())
            torch._amp_foreach_non_finite_check_and_unscale_(
                [p.grad for p in model.parameters()], found_inf, torch.ones(())
            )
            seen.append(found_inf)
            optimizer.found_inf = found_inf
            optimizer.step()
            del optimizer.found_inf
            continue
        optimizer.step()
        if not prefetch:
            seen.extend(p.detach().clone() for p in model.parameters())
        seen.append(optimizer.grad_norm.clone())
    seen.extend(state["momentum_buffer"] for state in optimizer.full_state_dict(None)["state"].values())
    optimizer.flush()
    seen.extend(p.detach().clone() for p in model.parameters())
    return seen


def outcome(
    seed: int, prefetch: bool, stage: int, one_by_one: bool, dropped: frozenset[str] = frozenset()
) -> tuple[World, list[Tensor]]:
    world = World(NUM_RANKS, seed, dropped, one_by_one)
    results = run_world(world, lambda rank: training(rank, prefetch, stage))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    return world, results[0]


def plain_training(prefetch: bool) -> list[Tensor]:
    """The same by torch.optim, given the average of both ranks' gradients."""
    model = Model()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=2.0**-12, momentum=0.5, fused=True)
    seen: list[Tensor] = []

    def collect(step: int, part: int = 0) -> None:
        for rank in range(NUM_RANKS):
            (model(batch(rank, step, part), used_by(rank, step)) / NUM_RANKS).backward()

    for step in range(STEPS):
        optimizer.zero_grad()
        if step == 2:
            continue
        if step == 4:
            seen.append(torch.ones(()))
            continue
        collect(step)
        if step == 0:
            collect(step, 1)
            seen.append(params[0].grad.clone())
        norm = torch.nn.utils.get_total_norm([p.grad.double() for p in params if p.grad is not None]).float()
        if step == 3:
            seen += [norm, norm]
        optimizer.step()
        if not prefetch:
            seen.extend(p.detach().clone() for p in params)
        seen.append(norm)
    seen.extend(state["momentum_buffer"] for state in optimizer.state_dict()["state"].values())
    seen.extend(p.detach().clone() for p in params)
    return seen


def agree(mine: list[Tensor], reference: list[Tensor]) -> bool:
    """Bits of tensors; norms (0-dim) within an ulp: theirs are sums in another order."""
    return all(
        torch.equal(a, b) if a.dim() else torch.allclose(a, b, rtol=2e-7, atol=0)
        for a, b in zip(mine, reference, strict=True)
    )


CASES = list(itertools.product((False, True), (1, 2), (False, True)))


@pytest.mark.parametrize(("prefetch", "stage", "one_by_one"), CASES)
def test_late_collectives_change_nothing(prefetch: bool, stage: int, one_by_one: bool) -> None:
    torch.set_num_threads(1)
    reference = plain_training(prefetch)
    for seed in range(SCHEDULES // len(CASES)):
        _, seen = outcome(seed, prefetch, stage, one_by_one)
        assert agree(seen, reference), f"schedule {seed}"


def wait_sites() -> list[str]:
    """Return every place that waits."""
    return sorted({site for case in CASES for site in outcome(0, *case)[0].sites})


def goes_red(site: str, references: dict[bool, list[Tensor]]) -> bool:
    for seed in range(TRIES):
        for case in CASES:
            if site.startswith("read by all") and not case[-1]:
                continue
            try:
                _, seen = outcome(seed, *case, frozenset([site]))
            except AssertionError:
                return True
            if not agree(seen, references[case[0]]):
                return True
    return False


def test_every_wait_is_needed() -> None:
    torch.set_num_threads(1)
    sites = wait_sites()
    assert len(sites) >= 12, sites
    references = {prefetch: plain_training(prefetch) for prefetch in (False, True)}
    needless = [site for site in sites if not goes_red(site, references)]
    assert needless == []
