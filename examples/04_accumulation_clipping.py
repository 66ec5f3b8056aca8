"""Accumulate gradients over microbatches, then clip. Run: python examples/04_accumulation_clipping.py (any ranks).

Under ``no_sync`` a backward adds its gradients locally and sends nothing; the last one, outside, sends the sum. The
two ways to clip give the same norm over all ranks: ``optimizer.clip_grad_norm_`` costs no pass over the gradients, for
the step multiplies them as it reads them, and torch's own function works as it stands.

The model is an autoencoder of random images of one bright square, and it makes four microbatches of 32 into one step.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam

MICROBATCHES = 4


def squares(count: int, device: torch.device, side: int = 16) -> Tensor:
    """Return ``count`` images, each flat (side * side,), of a 5 x 5 square somewhere."""
    corner = torch.randint(side - 5, (count, 2, 1), device=device)
    along = torch.arange(side, device=device)
    inside = (along >= corner) & (along < corner + 5)
    return (inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1).float()


def train(device: torch.device, own_clip: bool, steps: int = 90) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms by step."""
    encoder, decoder = nn.Linear(256, 96), nn.Linear(96, 256)
    model = nn.Sequential(encoder, nn.GELU(), nn.Linear(96, 12), nn.Linear(12, 96), nn.GELU(), decoder).to(device)
    optimizer = distadam.Adam(model.parameters(), lr=3e-3)
    clip: Callable[[float], Tensor] = optimizer.clip_grad_norm_
    if not own_clip:
        clip = lambda most: torch.nn.utils.clip_grad_norm_(model.parameters(), most)  # noqa: E731
    losses, norms = [], []
    for _ in range(steps):
        total = torch.zeros((), device=device)
        for microbatch in range(MICROBATCHES):
            images = squares(32, device)
            is_last = microbatch == MICROBATCHES - 1
            with nullcontext() if is_last else optimizer.no_sync():
                loss = nn.functional.binary_cross_entropy_with_logits(model(images), images) / MICROBATCHES
                loss.backward()
            total += loss.detach()
        norms.append(clip(0.05).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, norms


def main() -> None:
    group = distadam.init_process_group()
    for name, own_clip in (("optimizer.clip_grad_norm_", True), ("torch.nn.utils.clip_grad_norm_", False)):
        torch.manual_seed(group.rank)
        losses, norms = train(group.device, own_clip)
        if group.rank == 0:
            print(
                f"{name:31} loss {losses[0]:.4f} -> {losses[-1]:.4f}, first norm {norms[0]:.4f}, last {norms[-1]:.4f}"
            )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
