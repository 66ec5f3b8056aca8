"""How fast the update moves memory on a GPU: against a measured copy, torch's fused optimizers, apex and torchao.

    python benchmarks/gpu_step.py [--numel 268435456] [--repeat 20] [--out results.json] [--device cuda]

One flat bfloat16 parameter, one process, gradients given; what is timed is `step()` and nothing else. Bandwidth counts
the bytes that must move over the time, so a kernel that moves more shows less: those of the storage (docs/kernels.md),
and for distadam 6 more, since step() without a backward copies the gradient and reads it once for its norm. The copy is
`torch.Tensor.copy_` between two float32 buffers: reads plus writes over its time. Every run checks itself: a result
that is not finite, or unchanged parameters, end it. `--device cpu` runs the same code small, as a test.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import distadam

STORAGES = {
    "fp32 master": (distadam.PrecisionPolicy(), 28.0),
    "split": (distadam.PrecisionPolicy(master="split"), 26.0),
    "split + bf16 moments": (distadam.PrecisionPolicy(master="split", moments="bf16"), 18.0),
    "split + 8-bit moments": (distadam.PrecisionPolicy(master="split", moments="8bit"), 14.11),
    "stochastic + 8-bit moments": (distadam.PrecisionPolicy(master="stochastic", moments="8bit"), 10.12),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One contender's times in seconds, and the bytes an element that it must move."""

    name: str
    bytes_per_element: float
    numel: int
    seconds: tuple[float, ...]

    @property
    def bandwidth(self) -> float:
        """Bytes a second at the median."""
        return self.bytes_per_element * self.numel / statistics.median(self.seconds)


def timed(call: Callable[[], object], repeat: int, device: torch.device) -> tuple[float, ...]:
    """Return the time of each call after three that warm up; on CUDA by events, so launches overlap as in training."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeat):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return tuple(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return tuple(a.elapsed_time(b) / 1000 for a, b in pairwise(events))


def copy(numel: int, repeat: int, device: torch.device) -> Result:
    """Measure what a copy reaches: the limit that the others are compared with."""
    source = torch.zeros(numel, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Result("copy", 8.0, numel, timed(lambda: target.copy_(source), repeat, device))


def sharded(name: str, numel: int, repeat: int, device: torch.device) -> Result:
    """Measure `distadam.AdamW` with one of `STORAGES`."""
    policy, nbytes = STORAGES[name]
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device=device))
    optimizer = distadam.AdamW([param], lr=1e-2, precision=policy)
    grad = torch.full_like(param, 1e-3)

    def step() -> None:
        param.grad = grad  # an ordinary tensor: collected by step(), as it would be by a hook
        optimizer.step()

    seconds = timed(step, repeat, device)
    kernels = {str(line["kernel"]) for line in optimizer.kernel_report().as_dict()}
    check(param)
    return Result(f"distadam {name} ({', '.join(sorted(kernels))})", nbytes + 6.0, numel, seconds)


def torch_fused(numel: int, repeat: int, device: torch.device) -> Result:
    """Measure torch's fused AdamW on float32, the least that it needs for the same accuracy without a cast."""
    param = torch.nn.Parameter(torch.ones(numel, device=device))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = torch.optim.AdamW([param], lr=1e-2, fused=True)
    seconds = timed(optimizer.step, repeat, device)
    check(param)
    return Result("torch fused, fp32 parameters", 28.0, numel, seconds)


def other(module: str, build: str, nbytes: float, numel: int, repeat: int, device: torch.device) -> Result | str:
    """Measure an optimizer of another package, or say why not."""
    try:
        make: Any = getattr(import_module(module), build)
    except (ImportError, AttributeError) as error:
        return f"{module}.{build}: not measured ({error})"
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device=device))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = make([param], lr=1e-2)
    seconds = timed(optimizer.step, repeat, device)
    check(param)
    return Result(f"{module}.{build} {metadata.version(module.split('.')[0])}", nbytes, numel, seconds)


def check(param: torch.Tensor) -> None:
    """End the run if the optimizer did nothing, or nonsense."""
    sample = param.detach()[:: max(1, param.numel() // 1000)].float()
    if not bool(torch.isfinite(sample).all()) or bool((sample == 1).all()):
        raise SystemExit(f"a contender's parameters are wrong: {sample[:4].tolist()}")


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=2**28)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, size = torch.device(arguments.device), (arguments.numel, arguments.repeat)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --numel 65536 runs the code without one")
    limit = copy(*size, device)
    contenders: list[Result | str] = [sharded(name, *size, device) for name in STORAGES]
    contenders.append(torch_fused(*size, device))
    contenders.append(other("apex.optimizers", "FusedAdam", 22.0, *size, device))
    contenders.append(other("torchao.optim", "AdamW8bit", 10.1, *size, device))
    results = [limit, *[result for result in contenders if isinstance(result, Result)]]
    print(f"{'':48} {'min':>9} {'median':>9} {'max':>9}  bandwidth  of copy")
    for result in results:
        times = [
            1000 * value for value in (min(result.seconds), statistics.median(result.seconds), max(result.seconds))
        ]
        share = result.bandwidth / limit.bandwidth
        print(f"{result.name:48} " + " ".join(f"{t:7.3f}ms" for t in times), end="")
        print(f"  {result.bandwidth / 1e9:5.0f} GB/s   {share:5.1%}")
    for reason in contenders:
        if isinstance(reason, str):
            print(reason)
    if arguments.out is not None:
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        versions = {"torch": torch.__version__, "distadam": metadata.version("distadam")}
        content = {"device": machine, "versions": versions, "results": [asdict(result) for result in results]}
        arguments.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
