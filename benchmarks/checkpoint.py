"""Save and load an optimizer state of about 1 GB: distadam, FSDP2 with DCP, and gathering to rank 0; one run.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py [--gigabytes 1] [--repeats 3] [--folder DIR] [--out DIR]

Every way has the same model (fp32 parameters, AdamW's two moments), writes into the same folder and flushes to disk.
Reported: seconds (minimum, median, maximum over repeats; the slowest rank counts) and the most memory that any rank had
beyond what it had before. Loading reads from the page cache: files were just written.

For the asynchronous saves: how long the call kept the loop, beside a staging copy alone (this rank's slices by
``Tensor.copy_`` into memory that is mapped already), measured in turns with it; and how long a step took while the save
was being written, beside steps before. The first asynchronous save also maps its staging memory and is listed by
itself. Each way runs with one small layer first: what a process takes once (imports, threads, pools) is no part of a
save.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from memory import Peak
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import distadam
from distadam.checkpoint import live

WIDTH = 2048
Measured = dict[str, list[tuple[float, int]]]


def model_of(gigabytes: float, width: int = WIDTH) -> nn.Module:
    """Return square layers whose AdamW moments take so many gigabytes together."""
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


def every(calls: dict[str, Callable[[], object]], repeats: int) -> Measured:
    """Measure each call in turn, again and again."""
    found: Measured = {what: [] for what in calls}
    for _ in range(repeats):
        for what, call in calls.items():
            found[what].append(measure(call))
    return found


def ours(model: nn.Module, folder: Path, repeats: int) -> Measured:
    optimizer = distadam.AdamW(model.named_parameters())
    step(model, optimizer)
    save = distadam.checkpoint.save
    found = every(
        {
            "save": lambda: save(folder / "sync", model, optimizer),
            "load": lambda: distadam.checkpoint.load(folder / "sync", model, optimizer),
        },
        repeats,
    )

    handles: list[Any] = []

    def save_async() -> None:
        handles.append(save(folder / "async", model, optimizer, asynchronous=True))

    # the whole of it, until it is on disk: staging memory, and what writing takes beside it
    whole = measure(lambda: (save_async(), handles[-1].wait()))
    found["asynchronous save, the first"] = [whole]

    access = optimizer.checkpoint_access()
    staging = [torch.zeros_like(part.tensor) for part in live.slices(live.look_at(model, access), access)]

    def copy() -> None:
        for part, own in zip(live.slices(live.look_at(model, access), access), staging, strict=True):
            own.copy_(part.tensor)

    rest: Measured = {
        what: [] for what in ("staging copy alone", "asynchronous save: the call", "step", "step meanwhile")
    }
    for _ in range(repeats):
        rest["step"] += [measure(lambda: step(model, optimizer)) for _ in range(2)]
        rest["staging copy alone"].append(measure(copy))
        rest["asynchronous save: the call"].append(measure(save_async))
        rest["step meanwhile"] += [measure(lambda: step(model, optimizer)) for _ in range(2)]
        handles[-1].wait()
    return found | rest


def fsdp(model: nn.Module, folder: Path, repeats: int) -> Measured:
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer)
    futures: list[Any] = []
    others = dist.new_group()  # for the thread of an asynchronous save: its collectives must not meet `measure`'s

    def save() -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state}, storage_writer=dcp.FileSystemWriter(folder / "fsdp"))

    def save_async() -> None:
        weights, state = get_state_dict(model, optimizer)
        writer = dcp.FileSystemWriter(folder / "fsdp_async")
        state_dict = {"model": weights, "optim": state}
        futures.append(dcp.async_save(state_dict, storage_writer=writer, process_group=others))

    def load() -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=folder / "fsdp")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    found = every({"save": save, "load": load}, repeats)
    found["asynchronous save, the first"] = [measure(lambda: (save_async(), futures[-1].result()))]
    found["asynchronous save: the call"] = []
    for _ in range(repeats):
        found["asynchronous save: the call"].append(measure(save_async))
        futures[-1].result()
    return found


def gathering(model: nn.Module, folder: Path, repeats: int) -> Measured:
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

    return every({"save": save, "load": load}, repeats)


WAYS = {"distadam": ours, "FSDP2 + DCP": fsdp, "gather to rank 0": gathering}


def row_of(way: str, what: str, measured: list[tuple[float, int]]) -> dict[str, Any]:
    seconds = sorted(value for value, _ in measured)
    times = {"min_s": seconds[0], "median_s": statistics.median(seconds), "max_s": seconds[-1]}
    extra = {"extra_mb": max(nbytes for _, nbytes in measured) / 1e6}
    return {"way": way, "what": what, **times, **extra, "seconds": seconds}


def write(result: dict[str, Any], stem: Path) -> None:
    """Write the numbers, the table and the picture."""
    lines = [
        result["about"],
        "",
        "| way | what | seconds: min, median, max | most memory beyond what there was, of a rank |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = f"{row['min_s']:.3f}, {row['median_s']:.3f}, {row['max_s']:.3f}"
        lines.append(f"| {row['way']} | {row['what']} | {times} | {row['extra_mb']:,.1f} MB |")
    found = {row["what"]: row for row in result["rows"] if row["way"] == "distadam"}
    call, copy = (found[what]["seconds"] for what in ("asynchronous save: the call", "staging copy alone"))
    lines += [
        "",
        f"A rank's slices are {result['shard_mb']:,.1f} MB, a chunk is {result['chunk_mb']:.1f} MB. The asynchronous "
        f"call takes {statistics.median(call) / statistics.median(copy):.2f} times the staging copy alone (medians; "
        f"fastest against fastest {min(call) / min(copy):.2f}). While the save is written, a step takes "
        f"{found['step meanwhile']['median_s'] / found['step']['median_s']:.2f} times as long.",
    ]
    print("\n".join(lines))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, stem.with_suffix(".png"))


def plot(result: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = ["save", "load", "asynchronous save, the first", "asynchronous save: the call"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, way in enumerate(WAYS):
        rows = {row["what"]: row for row in result["rows"] if row["way"] == way}
        here = [kind for kind in kinds if kind in rows]
        places = [kinds.index(kind) + (number - 1) * 0.27 for kind in here]
        middles = [rows[kind]["median_s"] for kind in here]
        spread = [
            [middle - rows[kind]["min_s"] for kind, middle in zip(here, middles, strict=True)],
            [rows[kind]["max_s"] - middle for kind, middle in zip(here, middles, strict=True)],
        ]
        left.bar(places, middles, 0.25, yerr=spread, capsize=3, label=way)
        right.bar(places, [rows[kind]["extra_mb"] for kind in here], 0.25, label=way)
    names = ["save", "load", "async save,\nuntil on disk", "async save,\nthe loop stands"]
    for axes, label in ((left, "seconds, median (min to max)"), (right, "most extra memory of a rank, MB")):
        axes.set_xticks(range(len(kinds)), names)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    right.axhline(result["shard_mb"], color="black", linewidth=1, linestyle="--", label="a rank's slices")
    right.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    right.set_ylim(top=1.25 * right.get_ylim()[1])
    figure.suptitle(f"{result['gigabytes']:g} GB of AdamW state, {result['ranks']} ranks")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_checkpoint"))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="checkpoint_cpu", help="of the result, before the date")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        for way in options.ways:
            WAYS[way](model_of(0, 64), options.folder, 1)
            model = model_of(options.gigabytes)
            slices_mb = 12e-6 * sum(param.numel() for param in model.parameters()) / dist.get_world_size()
            for what, measured in WAYS[way](model, options.folder, options.repeats).items():
                rows.append(row_of(way, what, measured))
                if dist.get_rank() == 0:
                    print(f"{way}, {what}: {rows[-1]['median_s']:.3f} s, {rows[-1]['extra_mb']:,.0f} MB", flush=True)
        if dist.get_rank() == 0:
            num_ranks = dist.get_world_size()
            kind = os.popen(f"stat -f -c %T '{options.folder}'").read().strip()
            about = (
                f"{options.gigabytes:g} GB of AdamW moments and half as much of fp32 weights, layers of "
                f"{WIDTH} x {WIDTH}, {num_ranks} ranks of one thread, {options.repeats} repeats, on {kind}; torch "
                f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
                f"load {os.getloadavg()[0]:.0f} at the end; {date.today()}."
            )
            result = {
                "command": " ".join(sys.argv),
                "about": about,
                "gigabytes": options.gigabytes,
                "ranks": num_ranks,
                "shard_mb": slices_mb,
                "chunk_mb": distadam.checkpoint.files.CHUNK_NBYTES / 1e6,
                "rows": rows,
            }
            write(result, options.out / f"{options.name}_{date.today()}")
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(options.folder, ignore_errors=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
