"""Buckets of more than 4 MiB, whose buffers begin inside their memory: as in real models, unlike in most tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distadam
from tests.ranks import run_ranks

WIDTH = 1088  # one weight of 4.5 MiB


def _model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 16))


def _loss(model: nn.Module, step: int, ranks: list[int]) -> torch.Tensor:
    inputs = torch.cat([torch.randn(4, 64, generator=torch.Generator().manual_seed(8 * step + rank)) for rank in ranks])
    return model(inputs).square().mean()


def _train(rank: int, num_ranks: int, reduce: str, share_parameters: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    model = _model()
    comm = distadam.CommPolicy(reduce=reduce)
    shard = distadam.ShardPolicy(share_parameters=share_parameters)
    optimizer = distadam.AdamW(model.named_parameters(), lr=1e-3, comm=comm, shard=shard)
    for step in range(2):
        optimizer.zero_grad()
        _loss(model, step, [rank]).backward()
        gradient = optimizer.full_grad("2.weight")
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()], gradient


CASES = [(1, "auto", False), *((2, reduce, False) for reduce in ("native", "exchange", "shared")), (2, "shared", True)]


@pytest.mark.parametrize(("num_ranks", "reduce", "share_parameters"), CASES)
def test_large_buckets_train_as_torch_does(num_ranks: int, reduce: str, share_parameters: bool) -> None:
    expected = _model()
    reference = torch.optim.AdamW(expected.parameters(), lr=1e-3, fused=True)
    for step in range(2):
        reference.zero_grad()
        _loss(expected, step, list(range(num_ranks))).backward()
        reference.step()
    middle = expected[2].weight.grad
    for params, gradient in run_ranks(num_ranks, _train, num_ranks, reduce, share_parameters):
        torch.testing.assert_close(gradient, middle, rtol=1e-4, atol=1e-9)
        for param, other in zip(params, expected.parameters(), strict=True):
            torch.testing.assert_close(param, other.detach(), rtol=0, atol=2e-4)
