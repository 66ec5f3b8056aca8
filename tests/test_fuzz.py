"""230 random training runs on 1 to 4 ranks against an unsharded oracle.

A run is drawn from its seed, the same on every rank: shapes (0-d, empty, odd, channels last, transposed), dtypes
(fp32, bf16, fp64), parameter groups with their own hyper-parameters, frozen parameters, rule, stage, bucket size,
overlap, wire dtype; then iterations of backwards with and without ``no_sync`` (plain, inside a closure, reentrant
checkpointing), parameters that some ranks, or all, do not use, ranks without any backward, clipping in between,
``zero_grad`` and ``p.grad = None`` in odd places, gradients set by hand, steps left out, freezing and unfreezing, new
learning rates.

The oracle knows every rank's gradients (integers, so that sums are exact in every order), follows torch's meaning of
each call, and updates with torch.optim (`tests.unsharded`): after every step all parameters, at the end all states,
have the same bits (rtol=0, atol=0). Clipping uses the norm that the optimizer found, after comparing it with the
oracle's (1e-6 relative: 0.5 ulp of rounding on either side). torch has no fused RMSprop, whose loop rounds differently:
a run has at most 7 steps of a dozen roundings, so 2^8 units of the dtype, relative to 1 and the value (bf16 parameters:
one unit of bf16); a gradient that is lost, doubled or not averaged is off by a tenth and more.

A failure names its seed: ``run_ranks(num_ranks, tests.test_fuzz.run_seeds, num_ranks, [seed])`` runs it alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distadam import CommPolicy, PrecisionPolicy, ShardPolicy
from distadam.engine.gradients import ShardedGradient
from distadam.engine.reducer import Reducer
from distadam.engine.rounds import BucketGradient
from tests.averaged_oracle import impatient
from tests.ranks import run_ranks
from tests.unsharded import CLASSES, Unsharded, compute_dtype, integers

SEEDS = {1: range(80), 2: range(80, 150), 3: range(150, 182), 4: range(182, 200)}
"""200 runs by number of ranks: fewer where they cost more."""

LARGE_SEEDS = {1: range(1000, 1006), 2: range(1006, 1024), 3: range(1024, 1030)}
"""Runs whose parameters take several chunks, pieces and buckets as real ones do, over every way to reduce."""

LARGEST = 3  # so that sums over ranks and backwards stay below bf16's 256

SHAPES = [(), (1,), (0,), (3, 0), (7,), (64,), (5, 13), (130,), (2, 3, 4, 4), (33, 9), (1500,)]
LARGE_SHAPES = [(1,), (1500,), (131_073,), (700, 913), (1100, 1100), (64, 32, 12, 12), (1_500_001,)]
LARGE_BUCKET_NBYTES = [500_000, 3 * 2**20, 25 * 2**20]
BUCKET_NBYTES = [71, 300, 1024, 25 * 2**20]
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp32 and bf16": [torch.float32, torch.bfloat16],
    "all": [torch.float32, torch.bfloat16, torch.float64],
}


def _draw_options(draw: random.Random, rule: str) -> dict[str, Any]:
    """Draw one group's hyper-parameters."""
    options: dict[str, Any] = {"lr": draw.choice([0.5, 0.1, 0.01]), "maximize": draw.random() < 0.2}
    options["weight_decay"] = draw.choice([0.0, 0.0, 0.1])
    if rule == "sgd":
        options["momentum"] = draw.choice([0.0, 0.9])
        if options["momentum"]:
            options |= draw.choice([{"nesterov": True}, {"dampening": 0.3}, {}])
    elif rule == "rmsprop":
        options |= {"alpha": 0.9, "momentum": draw.choice([0.0, 0.9]), "centered": draw.random() < 0.4}
    else:
        options |= {"betas": draw.choice([(0.9, 0.999), (0.5, 0.7)]), "amsgrad": draw.random() < 0.3}
    return options


class Expectation:
    """What the gradients of the coming step are, by torch's rules, over all ranks.

    A parameter's gradient is ``scaled`` (an average that was clipped) plus the average of what ranks collected since.
    """

    def __init__(self, params: Sequence[Tensor], num_ranks: int) -> None:
        self.params = params
        self.num_ranks = num_ranks
        self.has = [False] * len(params)
        self.touched: set[int] = set()
        self.scaled: list[Tensor | None] = [None] * len(params)
        self.raw: list[Tensor | None] = [None] * len(params)

    def add(self, index: int, grad: Tensor) -> None:
        """Add one rank's gradient."""
        before = self.raw[index]
        wide = grad.to(compute_dtype(grad.dtype))
        self.raw[index] = wide if before is None else before + wide
        self.touched.add(index)
        self.has[index] = True

    def discard(self, index: int) -> None:
        self.has[index], self.scaled[index], self.raw[index] = False, None, None

    def zero(self) -> None:
        """Make every gradient that there is zero."""
        for index, has in enumerate(self.has):
            if has:
                self.scaled[index] = self.raw[index] = None

    def gradient(self, index: int) -> Tensor | None:
        if not self.has[index]:
            return None
        param, scaled, raw = self.params[index], self.scaled[index], self.raw[index]
        total = torch.zeros(param.shape, dtype=compute_dtype(param.dtype)) if scaled is None else scaled
        return total if raw is None else total + raw / self.num_ranks

    def clip(self, coefficient: Tensor) -> None:
        for index, has in enumerate(self.has):
            if has:
                gradient = self.gradient(index)
                assert gradient is not None
                self.scaled[index], self.raw[index] = gradient * coefficient.to(gradient.dtype), None


class Run:
    """One random training run, on one rank."""

    def __init__(self, rank: int, num_ranks: int, seed: int) -> None:
        self.rank, self.num_ranks, self.seed = rank, num_ranks, seed
        self.large = seed >= 1000
        self.draw = draw = random.Random(seed)
        self.num_backwards = 0
        self.found: list[str] = []
        self.log: list[str] = []
        self.rule = draw.choice(["adam", "adamw", "sgd", "rmsprop"])
        self.params = self._make_params()
        indices = list(range(len(self.params)))
        draw.shuffle(indices)
        cuts = sorted(draw.choice(range(len(indices) + 1)) for _ in range(draw.choice([0, 0, 1, 2])))
        parts = [indices[a:b] for a, b in zip([0, *cuts], [*cuts, len(indices)], strict=True)]
        groups = [(part, _draw_options(draw, self.rule)) for part in parts if part]
        policies = {
            "shard": ShardPolicy(stage=draw.choice([1, 2])),
            "comm": CommPolicy(
                bucket_mb=draw.choice(LARGE_BUCKET_NBYTES if self.large else BUCKET_NBYTES) / 2**20,
                overlap_reduce=draw.random() < 0.8,
                overlap_gather=draw.random() < 0.8,
                reduce=draw.choice(["native", "exchange", "shared"]) if self.large and num_ranks > 1 else "auto",
            ),
            "precision": PrecisionPolicy(reduce_dtype=draw.choice([None, None, None, torch.float32, torch.bfloat16])),
        }
        self.optimizer = CLASSES[self.rule](
            [{"params": [self.params[i] for i in part], **options} for part, options in groups], **policies
        )
        self.groups = [part for part, _ in groups]
        self.oracle = Unsharded(self.rule, self.params, groups)
        self.placed = [param.requires_grad for param in self.params]
        self.shown = [False] * num_ranks
        self.expected = Expectation(self.params, num_ranks)
        self.note(f"{self.rule} {groups} {policies} {[(tuple(p.shape), p.dtype) for p in self.params]}")

    def _make_params(self) -> list[nn.Parameter]:
        draw = self.draw
        dtypes = DTYPES[draw.choice(list(DTYPES))]
        generator = torch.Generator().manual_seed(self.seed)
        params = []
        for _ in range(draw.randint(1, 7)):
            value = torch.randn(draw.choice(LARGE_SHAPES if self.large else SHAPES), generator=generator).to(
                draw.choice(dtypes)
            )
            if value.dim() == 4:
                value = value.to(memory_format=torch.channels_last)
            elif value.dim() == 2 and draw.random() < 0.5:
                value = value.t()
            params.append(nn.Parameter(value, requires_grad=draw.random() < 0.85))
        if not any(param.requires_grad for param in params):
            params[0].requires_grad_(True)
        return params

    def note(self, what: str) -> None:
        self.log.append(what)

    # One iteration

    def iterate(self) -> None:
        draw = self.draw
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            self.backward(no_sync=draw.random() < 0.35)
            # Gradients may be dropped where every rank has seen the backward: a rank that has not cannot tell dropping
            # what others have from the usual zero_grad() after a step, and then all ranks raise UsageError.
            if draw.random() < 0.15 and all(self.shown):
                self.drop()
        if draw.random() < 0.07:
            return  # no step: gradients stay for the next iteration
        by_hand = draw.random() < 0.1
        if by_hand:
            self.by_hand()
        if draw.random() < 0.3:
            self.clip()
            # What comes after clipping is averaged by itself. One plain backward: two would be rounded one by one. None
            # where a tensor was set by hand: clipping leaves that in place, unclipped, and a backward adds into it, so
            # that ranks with and without one would disagree about what was dropped (a UsageError).
            if draw.random() < 0.3 and not by_hand:
                self.backward(no_sync=draw.random() < 0.3, plain=True)
            self.step()
        elif draw.random() < 0.15 and not by_hand:
            self.step(lambda: self.backward(no_sync=False))
        else:
            self.step()
        if draw.random() < 0.7:
            self.zero_grad()
        if draw.random() < 0.3:
            self.toggle()
        if draw.random() < 0.2:
            group = draw.randrange(len(self.groups))
            self.note(f"group {group}: half the lr")
            self.optimizer.param_groups[group]["lr"] *= 0.5
            for index in self.groups[group]:
                self.oracle.optimizers[index].param_groups[0]["lr"] *= 0.5

    def _used(self) -> list[list[bool]]:
        """Return by rank and parameter whether a backward uses it."""
        draw, shape = self.draw, (self.num_ranks, len(self.params))
        kind = draw.choice(["all", "all", "same", "random", "one rank"])
        if kind == "same":
            row = [draw.random() < 0.7 for _ in self.params]
            used = [row] * shape[0]
        elif kind == "random":
            used = [[draw.random() < 0.6 for _ in self.params] for _ in range(shape[0])]
        else:
            only = draw.randrange(shape[0])
            used = [[kind == "all" or rank == only] * shape[1] for rank in range(shape[0])]
        return [[use and p.requires_grad for use, p in zip(row, self.params, strict=True)] for row in used]

    def backward(self, *, no_sync: bool, plain: bool = False) -> Tensor:
        """Run a backward on every rank that uses a parameter; tell the oracle of all ranks' gradients."""
        used = self._used()
        reentrant = not plain and self.draw.random() < 0.12
        self.num_backwards += 1
        self.note(f"backward no_sync={no_sync} reentrant={reentrant} used={[list(map(int, row)) for row in used]}")
        for rank, row in enumerate(used):
            self.shown[rank] |= any(use and placed for use, placed in zip(row, self.placed, strict=True))
        terms = []
        for rank, row in enumerate(used):
            for index, param in enumerate(self.params):
                if row[index]:
                    factor = self._integers(rank, index)
                    self.expected.add(index, factor * (2 if reentrant else 1))
                    if rank == self.rank:
                        terms.append((param, factor))
        if not terms:
            return torch.zeros(())
        with self.optimizer.no_sync() if no_sync else nullcontext():
            loss = _loss(torch.ones(()), terms)
            if reentrant:
                loss = loss + checkpoint(_loss, torch.ones((), requires_grad=True), terms, use_reentrant=True)
            loss.backward()
        return loss.detach()

    def _integers(self, rank: int, index: int) -> Tensor:
        param = self.params[index]
        return integers(param.shape, param.dtype, self.seed, self.num_backwards, rank, index, largest=LARGEST)

    def drop(self) -> None:
        """Drop or zero gradients, of all or of some parameters, on every rank."""
        kind = self.draw.choice(["zero_grad", "to zero", "some"])
        self.note(kind)
        if kind == "zero_grad":
            self.zero_grad()
        elif kind == "to zero":
            self.optimizer.zero_grad(set_to_none=False)
            self.expected.zero()
        else:
            for index, param in enumerate(self.params):
                if self.draw.random() < 0.5:
                    self.note(f"parameter {index}: grad = None")
                    param.grad = None
                    self.expected.discard(index)
                    self.expected.touched.add(index)

    def zero_grad(self) -> None:
        self.note("zero_grad()")
        self.optimizer.zero_grad()
        for index in range(len(self.params)):
            self.expected.discard(index)

    def by_hand(self) -> None:
        """Put an ordinary tensor in p.grad of a parameter that has had no gradient since the step, on some ranks."""
        free = [i for i, param in enumerate(self.params) if param.requires_grad and i not in self.expected.touched]
        if not free:
            return
        index = self.draw.choice(free)
        ranks = [rank for rank in range(self.num_ranks) if self.draw.random() < 0.7]
        self.num_backwards += 1
        self.note(f"parameter {index}: grad by hand on {ranks}")
        for rank in ranks:
            grad = self._integers(rank, index)
            self.expected.add(index, grad)
            if rank == self.rank:
                self.params[index].grad = torch.empty_like(self.params[index]).copy_(grad)  # with its strides

    def clip(self) -> None:
        order = self.draw.choice([2.0, 2.0, 1.0, float("inf")])
        max_norm = self.draw.choice([0.5, 3.0, 1e6])
        norm = self.optimizer.clip_grad_norm_(max_norm, norm_type=order)
        self.note(f"clip {max_norm} {order}")
        self._place()
        gradients = [self.expected.gradient(index) for index in range(len(self.params))]
        flat = [gradient.double().reshape(-1) for gradient in gradients if gradient is not None and gradient.numel()]
        expected = torch.linalg.vector_norm(torch.cat(flat), order) if flat else torch.zeros(())
        if abs(float(norm) - float(expected)) > 1e-6 * float(expected):
            self.found.append(f"norm {float(norm)} instead of {float(expected)}")
        self.expected.clip(torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self.note("step" if closure is None else "step(closure)")
        self.optimizer.step(closure)
        self._place()
        self.shown = [False] * self.num_ranks
        self.oracle.step([self.expected.gradient(index) for index in range(len(self.params))])
        for index, param in enumerate(self.params):
            self.expected.discard(index)
            if not isinstance(param.grad, ShardedGradient):
                param.grad = None  # put there by hand, and left in place as torch does
        self.expected.touched.clear()
        self.compare_params()

    def _place(self) -> None:
        """Note which parameters have a place now: clipping and steps give one to what has become trainable."""
        self.placed = [placed or has for placed, has in zip(self.placed, self.expected.has, strict=True)]

    def toggle(self) -> None:
        """Freeze or unfreeze some parameters."""
        for index, param in enumerate(self.params):
            if self.draw.random() < 0.3:
                self.note(f"parameter {index}: requires_grad = {not param.requires_grad}")
                param.requires_grad_(not param.requires_grad)

    # Comparing

    def compare_params(self) -> None:
        for index, (param, value) in enumerate(zip(self.params, self.oracle.values, strict=True)):
            self._compare(f"parameter {index}", param.detach(), value)

    def compare_state(self) -> None:
        actual, expected = self.optimizer.full_state_dict(to=None)["state"], self.oracle.state()
        shown = {number: sorted(entry) for number, entry in actual.items()}
        wanted = {number: sorted(entry) for number, entry in expected.items()}
        if shown != wanted:
            self.found.append(f"state has {shown} instead of {wanted}")
            return
        for number, entry in expected.items():
            for name, value in entry.items():
                self._compare(f"{name} of {number}", actual[number][name], value)

    def _compare(self, what: str, actual: Tensor, expected: Tensor) -> None:
        tolerance = 0.0
        if self.rule == "rmsprop" and "step" not in what:
            tolerance = torch.finfo(expected.dtype).eps * (1 if expected.dtype == torch.bfloat16 else 2**8)
        try:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            self.found.append(f"after {self.log[-1]}: {what}: {' '.join(str(error).split())}")


def _loss(one: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([(param * factor).sum().double() for param, factor in terms]).sum() * one.double()


@impatient
def run_seeds(rank: int, num_ranks: int, seeds: Sequence[int]) -> list[str]:
    """Run the seeds one after the other; return what went wrong, with its seed and what was done."""
    found = []
    for seed in seeds:
        run = Run(rank, num_ranks, seed)
        try:
            for _ in range(run.draw.randint(2, 7)):
                run.iterate()
            run.compare_state()
            _ = run.optimizer.grad_norm  # waits for it: an optimizer that dies meanwhile takes 50 ms
        except Exception as error:
            raise AssertionError(f"seed {seed}, {num_ranks} ranks, after {run.log}") from error
        if run.found:
            found.append("\n  ".join([f"seed {seed}, rank {rank} of {num_ranks}:", *run.found[:3], *run.log]))
    return found


@pytest.mark.parametrize("num_ranks", SEEDS)
def test_random_runs_have_the_bits_of_the_unsharded_oracle(num_ranks: int) -> None:
    found = [text for texts in run_ranks(num_ranks, run_seeds, num_ranks, list(SEEDS[num_ranks])) for text in texts]
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", LARGE_SEEDS)
def test_random_runs_of_large_parameters_have_the_bits_of_the_unsharded_oracle(num_ranks: int) -> None:
    seeds = list(LARGE_SEEDS[num_ranks])
    found = [text for texts in run_ranks(num_ranks, run_seeds, num_ranks, seeds, timeout_s=600.0) for text in texts]
    assert not found, "\n".join(found)


# The fuzz can fail ----------------------------------------------------------------------------------------------------


def _keep(self: BucketGradient, slot: int) -> None:
    """Discard nothing."""


def _multiply(self: BucketGradient, factor: Tensor) -> None:
    """Ignore a factor."""


def _everywhere(self: Reducer, index: int) -> bytes:
    return b"\x01" * len(self.gradients[index].flat.params)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "discarded gradients stay": (BucketGradient, "discard", _keep),
    "clipping does nothing": (BucketGradient, "multiply", _multiply),
    "sums are not divided": (BucketGradient, "scaling_divisor", property(lambda self: None)),
    "parameters without a gradient are updated": (Reducer, "bucket_has", _everywhere),
}


def _run_mutated(rank: int, mutation: str, seeds: Sequence[int]) -> list[str]:
    owner, name, replacement = MUTATIONS[mutation]
    with mock.patch.object(owner, name, replacement):
        return run_seeds(rank, 2, seeds)


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_random_runs_fail_when(mutation: str) -> None:
    assert all(run_ranks(2, _run_mutated, mutation, list(range(16)))), "every rank must see it"
