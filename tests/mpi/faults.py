"""What goes wrong under mpiexec, one kind a run: ``mpiexec -n 3 python -m tests.mpi.faults KIND``.

Each rank prints what it has caught behind ``caught``; the runner (test_under_mpiexec.py) looks at that and at how the
job ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.comm import Collectives
from distadam.errors import CommError

TIMEOUT_S = 8.0
LOST = 1


def lose(how: str) -> None:
    """End this rank as ``how`` says; "late" comes back."""
    if how == "late":
        time.sleep(2 * TIMEOUT_S + 4)
    elif how == "exception":
        raise RuntimeError("this rank has had enough")
    else:
        os.kill(os.getpid(), {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}[how])


def catch(call: Any) -> None:
    """Print what ``call`` raises, and end as a script that does not catch it."""
    began = time.monotonic()
    try:
        call()
    except CommError as error:
        print(f"caught after {time.monotonic() - began:.0f} s by rank {dist.get_rank()}: {error}", flush=True)
        raise


def all_reduce(how: str) -> None:
    dist.all_reduce(torch.ones(3))
    if dist.get_rank() == LOST:
        lose(how)
    catch(lambda: dist.all_reduce(torch.ones(3)))


def receive(how: str) -> None:
    dist.barrier()
    if dist.get_rank() == LOST:
        lose(how)
    elif dist.get_rank() == 0:
        catch(lambda: dist.recv(torch.ones(3), LOST))
    time.sleep(2 * TIMEOUT_S)


def group(how: str) -> None:
    if dist.get_rank() == LOST:
        lose(how)
    catch(lambda: dist.new_group([0, 1, 2], timeout=timedelta(seconds=TIMEOUT_S), use_local_synchronization=True))


def step(how: str, phase: str, reduce: str) -> None:
    """Lose a rank in a phase of a training step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(3)))
    comm = CommPolicy(reduce=reduce, timeout_s=TIMEOUT_S, bucket_mb=4096 / 2**20)  # type: ignore[arg-type]
    optimizer = distadam.AdamW(model.named_parameters(), comm=comm, shard=ShardPolicy())

    def train() -> None:
        model(torch.ones(2, 30)).sum().backward()
        optimizer.step()

    train()
    name = {"backward": "reduce_scatter", "agree": "agree", "gather": "all_gather"}[phase]
    original = getattr(Collectives, name)

    def vanish(*args: Any) -> Any:
        if dist.get_rank() == LOST:
            lose(how)
        return original(*args)

    with mock.patch.object(Collectives, name, vanish):
        catch(train)


def main(kind: str, how: str = "", *rest: str) -> None:
    torch.set_num_threads(1)
    info = distadam.init_process_group(timeout_s=TIMEOUT_S if kind != "step" else 60.0)
    print(info, flush=True)
    {"all-reduce": all_reduce, "receive": receive, "group": group, "step": step, "start": lambda _: None}[kind](
        how, *rest
    )
    if dist.is_initialized():  # one rank is no group unless asked for
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
