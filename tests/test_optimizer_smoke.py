"""The first thing to run: one model trains on 1, 2 and 3 ranks to the average of the ranks' gradients.

Gradients are small integers, so every order of summation is exact and bits are compared (rtol=0, atol=0).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distadam
from tests.ranks import run_ranks


def _train(rank: int, num_ranks: int) -> list[torch.Tensor]:
    model = nn.Linear(8, 8, bias=False)
    torch.manual_seed(3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 8))
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.1)
    for step in range(3):
        inputs = torch.full((1, 8), float(rank + step))
        model(inputs).sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_matches_torch_given_the_average(num_ranks: int) -> None:
    weight = torch.nn.Parameter(torch.empty(8, 8))
    torch.manual_seed(3)
    with torch.no_grad():
        weight.copy_(torch.randn(8, 8))
    reference = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for step in range(3):
        weight.grad = torch.full((8, 8), float(sum(rank + step for rank in range(num_ranks)))) / num_ranks
        reference.step()
    for (result,) in run_ranks(num_ranks, _train, num_ranks):
        torch.testing.assert_close(result, weight.detach(), rtol=0, atol=0)
