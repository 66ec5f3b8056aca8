"""What `distadam bench` runs on every rank: ``python -m distadam.cli.bench_rank KIND SIZES REPEATS FOLDER``.

Rank 0 appends a line to ``FOLDER/results.jsonl`` after each measurement, which is what the progress bar counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import distadam
from distadam.cli.bench_results import Result
from distadam.comm import Collectives, Groups, Streams

_TRANSPORTS = ("native", "exchange", "shared")


class _Owner:
    """Holds the lease of process groups, as an optimizer would."""


def main() -> None:
    """Measure, in the order in which results are announced."""
    kind, sizes, repeats, folder = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    results = _comm(sizes, repeats) if kind == "comm" else _step(sizes, repeats)
    rank = 0
    for result, rank in results:
        if rank == 0:
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def _clock(action: Callable[[], object], repeats: int, meet: Callable[[], object]) -> list[float]:
    """Return milliseconds of ``action``, which all ranks begin together; the first time does not count."""
    times = []
    for _ in range(repeats + 1):
        _finish()
        meet()
        began = time.perf_counter()
        action()
        _finish()
        times.append(1e3 * (time.perf_counter() - began))
    return times[1:]


def _finish() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _comm(sizes: list[float], repeats: int) -> Iterator[tuple[Result, int]]:
    """Reduce-scatter and all-gather of float32 buffers of ``sizes`` MiB by every transport."""
    info = distadam.init_process_group()
    device = info.device
    for transport in _TRANSPORTS if device.type == "cpu" else ("native", "shared"):
        owner = _Owner()
        groups = Groups.resolve(distadam.ShardPolicy(), None, owner)
        collectives = Collectives(groups, Streams(), None, transport)
        missing = _unshared(collectives, device) if transport == "shared" and info.world_size > 1 else ""
        for size in sizes:
            for name, times, nbytes in _sized(collectives, size, 0 if missing else repeats, device):
                title = f"{name}, {transport}, {size:g} MiB"
                yield Result(name=title, times_ms=times, nbytes=nbytes, note=missing), info.rank


def _unshared(collectives: Collectives, device: torch.device) -> str:
    try:
        collectives.map_devices([device])
    except distadam.ConfigError as error:
        return str(error)
    return "ranks do not share memory" if device.type == "cpu" and collectives.memory is None else ""


def _sized(
    collectives: Collectives, size: float, repeats: int, device: torch.device
) -> Iterator[tuple[str, list[float], int]]:
    """Yield operation, milliseconds and bytes that this rank sends, for a buffer of ``size`` MiB."""
    rank, num_ranks = collectives.groups.shard_rank, collectives.groups.num_shards
    numel = max(1, round(size * 2**18 / 64 / num_ranks)) * 64
    full = collectives.empty("gradient_buffers", numel * num_ranks, torch.float32, device).zero_()
    shard = full[rank * numel : (rank + 1) * numel]
    sums = torch.zeros(numel, device=device)
    actions: dict[str, Callable[[], object]] = {
        "reduce-scatter": lambda: collectives.reduce_scatter(sums, full, "bench").wait(),
        "all-gather": lambda: collectives.all_gather(full, shard, "bench").wait(),
    }
    for name, action in actions.items():
        collectives.stats.clear()
        times = _clock(action, repeats, lambda: collectives.exchange(None, "bench")) if repeats else []
        yield name, times, sum(collectives.stats.payload_nbytes.values()) // (repeats + 1)
    collectives.exchange(None, "bench")  # peers have read it
    collectives.release(full)


def _step(sizes: list[float], repeats: int) -> Iterator[tuple[Result, int]]:
    """A step of AdamW on square layers with ``sizes`` million parameters together, and its parts."""
    info = distadam.init_process_group()
    owner = _Owner()
    groups = Groups.resolve(distadam.ShardPolicy(), None, owner)
    meeting = Collectives(groups, Streams(), None, "native")

    def meet() -> None:
        meeting.exchange(None, "bench")

    for size in sizes:
        width = max(64, round((size * 1e6 / 6) ** 0.5 / 64) * 64)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(6))).to(info.device)
        batch = torch.randn(32, width, device=info.device)

        def compute(model: nn.Module = model, batch: torch.Tensor = batch) -> None:
            model(batch).square().mean().backward()

        def alone(model: nn.Module = model, compute: Callable[[], None] = compute) -> None:
            compute()
            model.zero_grad()

        title = f"{6 * width * width / 1e6:.1f} M parameters"
        yield Result(name=f"forward and backward, {title}", times_ms=_clock(alone, repeats, meet)), info.rank
        optimizer = distadam.AdamW(model.named_parameters(), lr=1e-4)

        def update(optimizer: distadam.AdamW = optimizer, compute: Callable[[], None] = compute) -> None:
            compute()
            optimizer.step()

        whole = _clock(update, repeats, meet)
        sent = optimizer.comm_stats.payload_nbytes
        nbytes = (sent.get("reduce_scatter", 0) + sent.get("all_gather", 0)) // (repeats + 1)
        note = str(optimizer.kernel_report()).splitlines()[-1].strip()
        yield Result(name=f"whole step, {title}", times_ms=whole, nbytes=nbytes, note=note), info.rank
        yield _update(optimizer, repeats, meet), info.rank


def _update(optimizer: distadam.AdamW, repeats: int, meet: Callable[[], object]) -> Result:
    """Time the update of this rank's shards alone: what `step` does once gradients are reduced, nothing sent."""
    shards = [torch.zeros(bucket.shard_numel) for bucket in optimizer.layout.buckets]
    states = [[torch.zeros_like(shard) for shard in shards] for _ in range(3)]
    steps = [torch.ones(()) for _ in shards]

    def update() -> None:
        torch._fused_adamw_(
            shards, states[0], states[1], states[2], [], steps, lr=1e-4, beta1=0.9, beta2=0.999,
            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    numel = sum(shard.numel() for shard in shards)
    name = f"update of a shard, {numel / 1e6:.1f} M parameters"
    # Weights and two moments are read and written, gradients read.
    return Result(name=name, times_ms=_clock(update, repeats, meet), nbytes=28 * numel, note="torch's fused kernel")


if __name__ == "__main__":
    main()
