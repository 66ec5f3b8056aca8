"""Planted faults are found and named by `distadam.diagnostics`; an optimizer without one passes.

Bounds are the tools' own: contract 2.3.1 for updates, 8 x ranks x eps of the mean magnitude for reductions. Each fault
is planted in the code it would be a mistake in, and the message is read for the parameter and the rank.
"""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, PrecisionPolicy, diagnostics, native
from distadam.diagnostics import CheckFailed
from distadam.engine.gatherer import Gatherer
from distadam.engine.rounds import BucketGradient
from distadam.kernels import compiled
from tests.ranks import run_ranks
from tests.reference_optimizers import OPTIONS
from tests.unsharded import CLASSES, make_params

KB = CommPolicy(bucket_mb=1 / 1024)


class Net(nn.Module):
    """Two layers and a gain that batches may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, gain: bool = True) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        return y * self.gain if gain else y


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def loss_of(model: Net, rank: int, step: int = 0, gain: bool = True) -> Tensor:
    x, y = batch(rank, step)
    return (model(x, gain) - y).square().mean()


def build(rule: str = "adamw", **options: Any) -> tuple[Net, distadam.ShardedOptimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, CLASSES[rule](model.named_parameters(), lr=1e-2, comm=KB, **options)


def message(call: Any) -> str:
    try:
        call()
    except CheckFailed as error:
        return str(error)
    return ""


def checked_step(model: Net, optimizer: distadam.ShardedOptimizer, rank: int, step: int = 0) -> str:
    loss_of(model, rank, step).backward()

    def check() -> None:
        with diagnostics.check_updates(optimizer):
            optimizer.step()

    return message(check)


# Nothing is wrong


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "master", "moments"),
    [
        (torch.float32, "auto", "fp32"),
        (torch.float64, "auto", "fp32"),
        (torch.bfloat16, "fp32", "bf16"),
        (torch.bfloat16, "split", "8bit"),
        (torch.bfloat16, "stochastic", "fp32"),
        (torch.float16, "none", "fp32"),
    ],
)
def test_check_updates_passes_every_rule_and_storage(rule, dtype, master, moments):
    for options in OPTIONS[rule][1::3]:
        if moments != "fp32" and options.get("centered"):
            continue
        params = make_params(dtype)
        precision = PrecisionPolicy(master=master, moments=moments)
        optimizer = CLASSES[rule](params, **options, precision=precision, comm=KB)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                draw = torch.randn(param.shape, generator=generator)
                param.grad = (draw * 10 ** (torch.rand(param.shape, generator=generator) * 5 - 4)).to(dtype)
            optimizer.clip_grad_norm_(3.0)
            with diagnostics.check_updates(optimizer, elements=None) as check:
                optimizer.step()
            assert check.report.ok
            assert sum(row.num_elements for row in check.report.rows) == sum(param.numel() for param in params)


def sound(rank: int) -> list[str]:
    model, optimizer = build()
    found = []
    for step in range(2):
        report = diagnostics.check_gradients(
            optimizer,
            model,
            lambda step=step: loss_of(model, rank, step),
            loss_of=lambda r, step=step: loss_of(model, r, step),
        )
        assert report.ok
        assert max(row.difference_error for row in report.rows) < 1e-3
        assert "first.weight" in report.to_json()
        found += [checked_step(model, optimizer, rank, step)]
    return [*found, *map(str, diagnostics.check_parameters(optimizer))]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sound_optimizer_passes_every_check(num_ranks):
    assert run_ranks(num_ranks, sound) == [["", ""]] * num_ranks


# Faults


def wrong_beta(rank: int, kernel: str) -> str:
    model, optimizer = build(amsgrad=True)

    def wrong(fused: Any, *args: Any, **kwargs: Any) -> Any:
        return fused(*args, **(kwargs | {"beta2": 0.99}))

    def write_wrong(write: Any, work: Any, *args: Any) -> None:
        write(work, *args)
        work.beta2, work.gain2 = 0.99, 1 - 0.99

    owner, name, replacement = {
        "torch_fused": (torch, "_fused_adamw_", wrong),
        "compiled": (compiled, "_write_group", write_wrong),
    }[kernel]
    patched = mock.patch.object(owner, name, functools.partial(replacement, getattr(owner, name)))
    with patched, mock.patch.dict(os.environ, DISTADAM_KERNEL=kernel):
        return checked_step(model, optimizer, rank)


@pytest.mark.parametrize("kernel", ["torch_fused", "compiled"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_wrong_beta_in_one_kernel_is_found(num_ranks, kernel):
    if kernel == "compiled" and native.obstacle():
        pytest.skip(native.obstacle())
    for text in run_ranks(num_ranks, wrong_beta, kernel):
        assert "exp_avg_sq of first.weight[" in text
        assert "by the formula but got" in text


def flipped_bit(rank: int) -> list[str]:
    model, optimizer = build()
    optimizer.flush()
    if rank == 1:
        model.second.weight.data.view(-1).view(torch.int32).numpy()[7] ^= 1 << 20
    found = diagnostics.check_parameters(optimizer, raises=False)
    text = checked_step(model, optimizer, rank)
    return [*map(str, found), text]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_flipped_bit_in_one_parameter_on_one_rank_is_found_and_named(num_ranks):
    for found, text in run_ranks(num_ranks, flipped_bit):
        for said in (found, text):
            assert "second.weight[0, 7]: expected the same bits on every rank" in said
            assert "one bit of one element is flipped" in said
        if num_ranks == 3:
            assert "on rank 1 most likely" in found


def drop_reduction(optimizer: distadam.ShardedOptimizer, rank: int) -> None:
    """Let each rank keep its own gradient in place of the sum."""
    before = optimizer._collectives.reduce_scatter

    def own(shard: Tensor, full: Tensor, what: str) -> Any:
        mine = full[rank * shard.numel() : (rank + 1) * shard.numel()].clone()
        pending = before(shard, full, what)
        pending.wait()
        shard.copy_(mine)
        return pending

    optimizer._collectives.reduce_scatter = own


def missing_reduce(rank: int) -> str:
    model, optimizer = build()
    drop_reduction(optimizer, rank)
    return message(lambda: diagnostics.check_gradients(optimizer, model, lambda: loss_of(model, rank), samples=0))


def test_missing_reduce_is_found():
    for text in run_ranks(2, missing_reduce):
        assert "the average of 2 ranks' own gradients" in text
        assert "first.weight[" in text
        assert "a reduction is missing" in text


def scaled_twice(rank: int) -> str:
    model, optimizer = build()
    before = BucketGradient.average

    def twice(self: BucketGradient) -> Tensor:
        fresh = not self.divided
        total = before(self)
        return total.div_(2) if fresh else total

    BucketGradient.average = twice
    try:
        return message(lambda: diagnostics.check_gradients(optimizer, model, lambda: loss_of(model, rank)))
    finally:
        BucketGradient.average = before


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradient_scaled_twice_is_found(num_ranks):
    for text in run_ranks(num_ranks, scaled_twice):
        assert "gradient of first.weight[" in text
        assert "all of it is 0.5 x the average: it is scaled twice" in text


def test_loss_scaled_twice_is_found_by_central_differences():
    model, optimizer = build()

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    text = message(lambda: diagnostics.check_gradients(optimizer, model, lambda: Twice.apply(loss_of(model, 0))))
    assert "by central differences of the loss in float64" in text


def stale_gather(rank: int) -> str:
    model, optimizer = build()
    before = Gatherer.launch

    def launch(self: Gatherer, flat: Any) -> None:
        kept = flat.param_flat.clone()
        before(self, flat)
        self.wait(flat.bucket.index)
        if rank == 0:
            mine = flat.param_shard.clone()
            flat.param_flat.copy_(kept)
            flat.param_shard.copy_(mine)

    old, Gatherer.launch = Gatherer.launch, launch
    try:
        loss_of(model, rank).backward()
        optimizer.step()
        return checked_step(model, optimizer, rank, 1)
    finally:
        Gatherer.launch = old


def test_stale_gather_is_found():
    for text in run_ranks(2, stale_gather):
        assert "expected the same bits on every rank" in text
        assert "rank 0 " in text.rpartition("; ")[2]


def wrong_data(rank: int, step: int, shard: int) -> str:
    model, optimizer = build()
    read = (shard, step) if rank == 1 else (rank, 0)
    return message(
        lambda: diagnostics.check_gradients(
            optimizer, model, lambda: loss_of(model, *read), loss_of=lambda r: loss_of(model, r), samples=0
        )
    )


@pytest.mark.parametrize(("step", "shard"), [(1, 1), (0, 5)], ids=["another order", "another shard"])
def test_wrong_data_on_one_rank_is_found_and_named(step, shard):
    for text in run_ranks(2, wrong_data, step, shard):
        assert "rank 1 differs: its gradient of " in text
        assert "its data (order, seed, shard) is another" in text
        assert "rank 0 differs" not in text


def same_data(rank: int) -> str:
    model, optimizer = build()
    return str(diagnostics.check_gradients(optimizer, model, lambda: loss_of(model, 0), samples=0))


def test_ranks_that_read_the_same_data_are_remarked_on():
    assert all("ranks 0 and 1 have the same gradient" in text for text in run_ranks(2, same_data))


def left_out(rank: int) -> str:
    model = Net()
    optimizer = distadam.AdamW([pair for pair in model.named_parameters() if pair[0] != "second.bias"], comm=KB)
    return message(lambda: diagnostics.check_gradients(optimizer, model, lambda: loss_of(model, rank), samples=0))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_parameter_left_out_of_optimizer_is_named(num_ranks):
    for text in run_ranks(num_ranks, left_out):
        assert "parameter 'second.bias' of the model is trainable but in no group of the optimizer" in text


def unused(rank: int) -> str:
    model, optimizer = build()
    report = diagnostics.check_gradients(optimizer, model, lambda: loss_of(model, rank, gain=rank == 0))
    assert report.ok
    return str(report)


def test_parameter_that_one_rank_does_not_use_is_named():
    for text in run_ranks(2, unused):
        assert "gain: unused on rank 1: it gets no gradient there, which counts as zeros" in text


def test_elements_frozen_by_rounding_are_counted():
    params = [nn.Parameter(torch.full((256,), 64.0, dtype=torch.bfloat16))]
    optimizer = distadam.SGD(params, lr=1e-4, precision=PrecisionPolicy(master="none"))
    params[0].grad = torch.ones_like(params[0])
    with diagnostics.check_updates(optimizer) as check:
        optimizer.step()
    row = check.report.rows[0]
    assert (row.should_move, row.frozen) == (256, 256)
