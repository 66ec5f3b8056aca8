"""Time the update of a flat shard on the CPU, for every storage, against torch._fused_adamw_ on fp32 tensors.

    python benchmarks/update.py [--numel 10000000] [--rounds 15] [--reference] [--out benchmarks/results]

All variants take turns in each round, each round beginning with another one, so that what else the machine does falls
on all; what counts are ratios of medians within this one run. torch stands against itself, too: that ratio is the
noise. Gradients are fp32, as the reduction delivers them. The last columns are a lower bound for the reference kernel:
its passes over a chunk, each timed alone with its operands in the cache. Writes JSON and a Markdown table.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distadam.kernels import GradScaling, GroupRanges, ShardUpdate, make_kernel
from distadam.policies import PrecisionPolicy
from distadam.precision import Run, choose, make_moment, make_weights, start_of
from distadam.rules import RULES

GROUP = {
    "lr": 1e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "amsgrad": False,
    "maximize": False,
}
VARIANTS = [
    (torch.float32, "auto", "fp32"),
    (torch.float32, "auto", "bf16"),
    (torch.float32, "auto", "8bit"),
    (torch.bfloat16, "fp32", "fp32"),
    (torch.bfloat16, "fp32", "8bit"),
    (torch.bfloat16, "split", "fp32"),
    (torch.bfloat16, "split", "bf16"),
    (torch.bfloat16, "split", "8bit"),
    (torch.bfloat16, "stochastic", "fp32"),
    (torch.bfloat16, "stochastic", "8bit"),
    (torch.bfloat16, "none", "fp32"),
]
CHUNK = 262_144  # of the reference kernel; passes are timed on one
STAGGER = 5_120  # elements between flat buffers: at exact powers of two apart, cache sets collide


def empty(kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    empty.calls += 1
    return torch.zeros(numel + empty.calls % 7 * STAGGER, dtype=dtype)[empty.calls % 7 * STAGGER :]


empty.calls = 0


def torch_alone(numel: int) -> Callable[[], None]:
    weight, grad, exp_avg, exp_avg_sq = (empty("", numel, torch.float32, torch.device("cpu")) for _ in range(4))
    weight.normal_()
    grad.normal_()
    step = torch.tensor(10.0)
    arguments = {"amsgrad": False, "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    return lambda: torch._fused_adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], [], [step], maximize=False, **arguments
    )


def ours(numel: int, dtype: torch.dtype, master: str, moments: str, kernel_name: str) -> Callable[[], None]:
    choice = choose(PrecisionPolicy(master=master, moments=moments), {}, dtype, "w")
    param, runs = empty("", numel, dtype, torch.device("cpu")).normal_(), [Run(0, numel, start_of("w"))]
    steps = torch.full((1,), 10.0)
    ranges = GroupRanges(group=GROUP, spans=[(0, numel)], steps=[steps[0]], slots=[0], first=[False])
    update = ShardUpdate(
        weights=make_weights(choice, param, runs, 0, empty),
        states={name: make_moment(choice, name, param, runs, 0, empty) for name in ("exp_avg", "exp_avg_sq")},
        sources=[empty("", numel, torch.float32, torch.device("cpu")).normal_()],
        compute_dtype=torch.float32,
        steps=steps,
        ranges=[ranges],
    )
    kernel = make_kernel(kernel_name, lambda n, dtype, device: torch.empty(n, dtype=dtype))
    keep = update.grad.clone() if kernel_name == "reference" else None

    def run() -> None:
        kernel.update(RULES["adamw"], update, GradScaling())

    def restore() -> None:
        if keep is not None:
            update.grad.copy_(keep)

    run.restore = restore
    return run


class Calls(TorchDispatchMode):
    """Records the operations that go through at least ``numel`` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not func.is_view and max((tensor.numel() for tensor in tensors), default=0) >= self.numel:
            self.calls.append(partial(func, *args, **kwargs))
        return func(*args, **kwargs)


def passes(variant: Callable[[], None], numel: int, repeats: int = 40) -> tuple[int, float]:
    """Return how many passes an update makes, and the sum of their times when each runs alone, operands in the cache.

    No order of these passes can be faster: a chunk must be fetched from memory, too, and operations be called for
    blocks, segments and scalars.

    Args:
        variant: An update of one chunk.
        numel: Its elements; operations on fewer than half of them are not counted.
        repeats: The best of so many times counts.
    """
    variant()
    with Calls(numel // 2) as recorded:
        variant()
    total = 0.0
    for call in recorded.calls:
        best = math.inf
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
        total += best
    return len(recorded.calls), total


def measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants.items())
    for number in range(rounds + 1):
        order = order[7 % len(order) :] + order[: 7 % len(order)]
        for name, run in order:
            getattr(run, "restore", lambda: None)()
            begin = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=10_000_000 // 256 * 256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reference", action="store_true", help="the reference kernel for every storage, too")
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)

    variants: dict[str, Callable[[], None]] = {
        name: torch_alone(options.numel) for name in ("torch._fused_adamw_", "torch._fused_adamw_ again")
    }
    bounds: dict[str, tuple[int, float]] = {}
    for dtype, master, moments in VARIANTS:
        kernels = ["compiled", "torch_fused", *(["reference"] if options.reference else [])]
        for kernel in kernels:
            name = f"{str(dtype).removeprefix('torch.')} parameters, master {master}, moments {moments}, {kernel}"
            if options.only in name:
                variants[name] = ours(options.numel, dtype, master, moments, kernel)
                if kernel == "reference":
                    bounds[name] = passes(ours(CHUNK, dtype, master, moments, kernel), CHUNK)
    times = measure(variants, options.rounds)
    about = (
        f"AdamW on {options.numel:,} elements, one thread, {options.rounds} rounds; torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}."
    )
    text = about + "\n\n" + table(times, bounds, options.numel)
    print(text)
    if options.out is not None:
        stem = options.out / f"update-{options.numel / 1e6:.0f}M_cpu_{date.today():%Y-%m-%d}"
        stem.with_suffix(".md").write_text(text)
        content = {"about": about, "seconds": times, "passes": bounds}
        stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def table(times: dict[str, list[float]], bounds: dict[str, tuple[int, float]], numel: int) -> str:
    """Return the Markdown table; ratios of medians, and, for what other processes spoil less, of minima."""
    base = times["torch._fused_adamw_"]
    rows = [
        "| update | min | median | max | ns per element | x torch, medians | x torch, minima | passes "
        "| alone, ns per element | x torch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, values in times.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        cells = [f"{value * 1e3:.1f} ms" for value in (low, middle, high)] + [f"{middle / numel * 1e9:.2f}"]
        cells += [f"{middle / statistics.median(base):.2f}", f"{low / min(base):.2f}"]
        if name in bounds:
            count, seconds = bounds[name]
            cells += [str(count), f"{seconds / CHUNK * 1e9:.2f}", f"{seconds / CHUNK / (min(base) / numel):.2f}"]
        else:
            cells += ["", "", ""]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
