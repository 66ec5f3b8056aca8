"""Several processes: each sees its own data; distadam averages the gradients and each keeps its share of the moments.

    distadam launch --nproc 2 examples/02_two_processes.py      (or: torchrun --nproc-per-node 2 examples/...)

The model learns to add two numbers written digit by digit. Nothing wraps it, and the loop is the usual one; every rank
ends with the same weights. It also runs as ``python examples/02_two_processes.py``, in one process.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam

DIGITS = 2


def sums(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one-hot digits of two numbers, (count, 4 * 10), and the digits of their sum, (count, 3)."""
    numbers = torch.randint(10**DIGITS, (count, 2), generator=generator)
    digits = torch.cat([numbers // 10**place % 10 for place in range(DIGITS)], dim=1)
    total = numbers.sum(dim=1)
    answer = torch.stack([total // 10**place % 10 for place in range(DIGITS + 1)], dim=1)
    return nn.functional.one_hot(digits, 10).flatten(1).float(), answer


def main() -> None:
    group = distadam.init_process_group()
    torch.manual_seed(group.rank)  # on purpose: every rank starts from rank 0's weights all the same
    model = nn.Sequential(nn.Linear(20 * DIGITS, 512), nn.GELU(), nn.Linear(512, 10 * (DIGITS + 1))).to(group.device)
    optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2)
    if group.rank == 0:
        print(group)
        print(optimizer.layout)

    own_data = torch.Generator().manual_seed(1000 + group.rank)
    for step in range(401):
        inputs, answers = (part.to(group.device) for part in sums(256, own_data))
        logits = model(inputs).view(-1, 10, DIGITS + 1)
        loss = nn.functional.cross_entropy(logits, answers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if group.rank == 0 and step % 100 == 0:
            right = (logits.argmax(dim=1) == answers).all(dim=1).float().mean()
            print(f"step {step:3}: loss {loss.item():.4f}, {right:.0%} of sums right")

    weights = sum(p.double().sum().item() for p in model.parameters())
    state = optimizer.memory_report().optimizer_state
    print(f"rank {group.rank}: sum of weights {weights:.12f}, {state:,} bytes of optimizer state")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
