"""Training that loses ranks: what each rank read, its loss and its weights are written down step by step.

The loss is linear in the weights and inputs are small integers, so gradients sum exactly in every order: runs on other
numbers of ranks have the same weights, runs on as many have the same losses, bit by bit.

As a script (``python -m tests.elastic_runs FOLDER``) it is what torchrun starts again and again: where the environment
says ``VICTIM``, it kills itself, and the agent above it, at step ``KILL_AT`` of its first life. ``TIMEOUT_S`` is a
collective's, ``PAUSE`` seconds a step takes.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import distadam
from distadam.checkpoint import elastic

SAMPLES, BATCH, STEPS = 50, 12, 30  # a batch that an epoch's end cuts, and that 1, 2, 3 and 4 ranks divide
KILL_AT = 14
EVERY = 4


def loop(
    rank: int, folder: str, kill: tuple[int, int] | None = None, pause: float = 0.0, kill_agent: bool = False
) -> list[float]:
    """Train with `elastic.run` and note what was read when; ``kill`` is (rank, step) of a SIGKILL to itself."""
    inputs = torch.randint(-4, 5, (SAMPLES, 5), generator=torch.Generator().manual_seed(2)).float()
    model = nn.Linear(5, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7)
    batches = elastic.GlobalBatches(SAMPLES, BATCH, optimizer, seed=1)
    num_ranks = optimizer.checkpoint_access().collectives.groups.num_ranks
    extra = {"schedule": schedule, "batches": batches}
    weights = []
    for step in elastic.run(f"{folder}/checkpoints", model, optimizer, num_steps=STEPS, extra=extra, every=EVERY):
        own = batches.next()
        loss = model(inputs[own]).sum() * num_ranks / 64
        with open(f"{folder}/read.{num_ranks}.{rank}.jsonl", "a") as file:
            file.write(json.dumps([step, own.tolist(), loss.item()]) + "\n")
        if kill == (rank, step):
            if kill_agent:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        schedule.step()
        weights.append(float(model.weight.detach().sum()))
        time.sleep(pause)
    return weights


def notes(folder: Path, num_ranks: int) -> dict[int, list[tuple[list[int], float]]]:
    """Return (samples read, loss) of each rank for each step that all of so many ranks began, in the order of ranks."""
    found: dict[int, list[tuple[list[int], float]]] = {}
    for rank in range(num_ranks):
        path = folder / f"read.{num_ranks}.{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            step, own, loss = json.loads(line)
            found.setdefault(step, []).append((own, loss))
    return {step: parts for step, parts in found.items() if len(parts) == num_ranks}


def reads(folder: Path, num_ranks: int) -> dict[int, list[int]]:
    """Return the samples that all ranks together read in each step that all of them began."""
    return {
        step: sorted(itertools.chain(*(own for own, _ in parts))) for step, parts in notes(folder, num_ranks).items()
    }


def expected_reads() -> dict[int, list[int]]:
    """Return the samples of each step of a run that reads every sample of an epoch once."""
    order: list[int] = []
    for epoch in range(STEPS * BATCH // SAMPLES + 1):
        generator = torch.Generator().manual_seed(1_000_003 + epoch)
        order += torch.randperm(SAMPLES, generator=generator).tolist()
    return {step: sorted(order[step * BATCH : (step + 1) * BATCH]) for step in range(STEPS)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    group = distadam.init_process_group(timeout_s=float(os.environ.get("TIMEOUT_S", "60")))
    resumed = (folder / "checkpoints").exists()
    if resumed and group.rank == 0:  # for a run that starts from the same moment and is not interrupted
        shutil.rmtree(folder / f"found.{group.world_size}", ignore_errors=True)
        shutil.copytree(folder / "checkpoints", folder / f"found.{group.world_size}" / "checkpoints")
    dist.barrier()
    kill = (group.rank, KILL_AT) if "VICTIM" in os.environ and not resumed else None
    weights = loop(group.rank, str(folder), kill, pause=float(os.environ.get("PAUSE", "0.01")), kill_agent=True)
    (folder / f"weights.{group.world_size}.{group.rank}.json").write_text(json.dumps(weights))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
