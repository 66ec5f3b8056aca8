"""Save and load an optimizer state of about 1 GB: distadam, FSDP2 with DCP, and gathering to rank 0; one run.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --out results.json

Every way has the same model (fp32 parameters, AdamW's two moments), writes into the same folder and flushes to disk.
Reported by rank 0: seconds (minimum, median, maximum over repeats; the slowest rank counts), the most memory that any
rank had beyond what it had before, and for the asynchronous save how long the loop stood still, beside the time of the
staging copy alone. Loading reads from the page cache: files were just written.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import distadam


def resident() -> int:
    """Return bytes of memory that this process has and shares with no file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["RssAnon"].split()[0])


class Peak:
    """The most memory beyond what there was at the start, looked at every 2 ms."""

    def __enter__(self) -> "Peak":
        self._before, self.nbytes, self._stop = resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.nbytes = max(self.nbytes, resident() - self._before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def model_of(gigabytes: float) -> nn.Module:
    """Return square layers whose AdamW moments take so many gigabytes together."""
    width = 2048
    layers = max(1, round(gigabytes * 1e9 / (8 * width * width)))
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.01)
    optimizer.step()
    optimizer.zero_grad()


def measure(call: Callable[[], object]) -> tuple[float, int]:
    """Return the slowest rank's seconds and the largest rank's extra bytes."""
    dist.barrier()
    with Peak() as peak:
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
    worst = torch.tensor([seconds, float(peak.nbytes)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst[0].item(), int(worst[1])


def ours(gigabytes: float, folder: Path) -> dict[str, Callable[[], object]]:
    model = model_of(gigabytes)
    optimizer = distadam.AdamW(model.named_parameters())
    step(model, optimizer)
    handles: list[Any] = []

    def save_async() -> None:
        handles.append(distadam.checkpoint.save(folder / "async", model, optimizer, asynchronous=True))

    return {
        "save": lambda: distadam.checkpoint.save(folder / "sync", model, optimizer),
        "load": lambda: distadam.checkpoint.load(folder / "sync", model, optimizer),
        "save, asynchronous (stall)": save_async,
        "wait for the asynchronous": lambda: handles.pop().wait(),
    }


def fsdp(gigabytes: float, folder: Path) -> dict[str, Callable[[], object]]:
    model = model_of(gigabytes)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer)

    def save() -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state}, storage_writer=dcp.FileSystemWriter(folder / "fsdp"))

    def load() -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=folder / "fsdp")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    return {"save": save, "load": load}


def gathering(gigabytes: float, folder: Path) -> dict[str, Callable[[], object]]:
    model = model_of(gigabytes)
    optimizer = distadam.AdamW(model.named_parameters())
    step(model, optimizer)
    path = folder / "gathered.pt"

    def save() -> None:
        state = optimizer.full_state_dict(to=0)
        if dist.get_rank() == 0:
            with path.open("wb") as file:
                torch.save({"model": model.state_dict(), "optim": state}, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()

    def load() -> None:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.reload_parameters()
        optimizer.load_state_dict(saved["optim"])

    return {"save": save, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_checkpoint"))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, way in (("distadam", ours), ("FSDP2 + DCP", fsdp), ("gather to rank 0", gathering)):
        calls = way(options.gigabytes, options.folder)
        found: dict[str, list[tuple[float, int]]] = {what: [] for what in calls}
        for _ in range(options.repeats):
            for what, call in calls.items():
                found[what].append(measure(call))
        for what, measured in found.items():
            seconds = sorted(value for value, _ in measured)
            # what the asynchronous save keeps (its staging copy) is new memory the first time only
            extra = max(nbytes for _, nbytes in measured)
            row = {"way": name, "what": what, "min_s": seconds[0], "median_s": statistics.median(seconds)}
            rows.append(row | {"max_s": seconds[-1], "extra_mb": extra / 1e6})
            if dist.get_rank() == 0:
                times = f"{seconds[0]:7.2f} {row['median_s']:7.2f} {seconds[-1]:7.2f} s"
                print(f"{name:18} {what:28} {times} {extra / 1e6:8.0f} MB")
        del calls
    if dist.get_rank() == 0:
        own = options.gigabytes * 1e9 * 1.5 / dist.get_world_size()
        source = torch.ones(int(own) // 4)
        target = torch.zeros_like(source)
        begin = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter() - begin
        print(f"a copy of one rank's {own / 1e6:.0f} MB (moments and weights) into mapped memory: {copied:.2f} s")
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
        result = {"gigabytes": options.gigabytes, "ranks": dist.get_world_size(), "copy_s": copied, "rows": rows}
        if options.out is not None:
            options.out.write_text(json.dumps(result | machine, indent=1) + "\n")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(options.folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
