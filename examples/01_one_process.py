"""One process: torch.optim.AdamW swapped for distadam.AdamW, and nothing else. Run: python examples/01_one_process.py

The task is to tell two interleaved spirals apart. Both optimizers start from the same weights and see the same points.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

import distadam


def spirals(count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` points of two spirals, (count, 2), and which spiral each is on, (count,)."""
    labels = torch.arange(count) % 2
    angle = 3 * math.pi * torch.rand(count).sqrt()
    points = torch.stack((angle.cos(), angle.sin()), dim=1) * angle[:, None] / (3 * math.pi)
    return points * (1 - 2 * labels[:, None]) + 0.01 * torch.randn(count, 2), labels


def train(optimizer_class: Any, steps: int = 400) -> tuple[float, float]:
    """Return the loss of the last step and the share of new points told right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        points, labels = spirals(256)
        loss = nn.functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    points, labels = spirals(4096)
    return loss.item(), (model(points).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    for name, optimizer_class in (("torch.optim.AdamW", torch.optim.AdamW), ("distadam.AdamW", distadam.AdamW)):
        loss, right = train(optimizer_class)
        print(f"{name:18} loss {loss:.4f}, {right:.1%} of new points right")


if __name__ == "__main__":
    main()
