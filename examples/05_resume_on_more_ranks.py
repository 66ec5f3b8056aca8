"""Stop, and go on with another number of processes. Run it twice, with any numbers of ranks:

    python examples/05_resume_on_more_ranks.py --until 60
    distadam launch --nproc 2 examples/05_resume_on_more_ranks.py --until 120

The second run finds the first one's newest good checkpoint, takes its own slices of the optimizer's state out of it and
reads on in the data where the first stopped. The checkpoint does not know how many ranks wrote it. The same script
survives ``torchrun --nnodes 1:2 --max-restarts 3`` (with the variable that launch/README.md names), SIGTERM (saves,
then ends) and SIGUSR1 (saves).

The model learns sine waves of random frequency: it sees 16 points of one and says what the next is.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam.checkpoint import elastic

SAMPLES, BATCH = 960, 24  # 24 divides over 1, 2, 3, 4, 6, 8, 12 and 24 ranks


def waves() -> tuple[Tensor, Tensor]:
    """Return inputs (samples, 16) and targets (samples, 1), the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.rand(SAMPLES, 1, generator=generator) * 0.8 + 0.1
    phase = torch.rand(SAMPLES, 1, generator=generator) * 6.28
    points = torch.sin(frequency * torch.arange(17) + phase)
    return points[:, :16], points[:, 16:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--until", type=int, default=120, help="steps, over all runs")
    parser.add_argument("--directory", type=Path, default=Path("runs/05_resume"))
    options = parser.parse_args()
    group = distadam.init_process_group()
    torch.manual_seed(0)
    inputs, targets = waves()
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    batches = elastic.GlobalBatches(SAMPLES, BATCH, optimizer)

    first, loss = None, torch.zeros(())
    extra = {"schedule": schedule, "batches": batches}
    for step in elastic.run(
        options.directory, model, optimizer, num_steps=options.until, extra=extra, every=20, keep_last=2
    ):
        first = step if first is None else first
        own = batches.next()
        loss = nn.functional.mse_loss(model(inputs[own]), targets[own])
        loss.backward()
        optimizer.step()
        schedule.step()

    if dist.is_initialized():
        dist.all_reduce(loss.detach())
        loss = loss / group.world_size
    if group.rank == 0:
        print(f"steps {first} to {options.until} on {group.world_size} ranks, {batches.position} samples read so far")
        print(f"loss {loss.item():.6f}, lr {optimizer.param_groups[0]['lr']:.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
