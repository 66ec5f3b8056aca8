"""What `diagnostics.watch(every=10)` costs on the GPT of examples/train_gpt.py.

    python benchmarks/watch.py [--pairs 12] [--out benchmarks/results]

Three figures from one run. Pairs: 10 steps without a watcher and 10 with one, the order changing from pair to pair; the
median over pairs of the ratio, with quartiles, in wall time and in processor time (one thread that waits for nothing:
the two agree on an idle machine, and what others take is not in the second). Then the time spent inside the watcher's
own code (what the optimizer calls, `log`), as a share of the watched steps; what it does to caches is not in that.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_gpt

from distadam import diagnostics
from distadam.diagnostics.watch import Watcher

BLOCK = 10


def build() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    options = SimpleNamespace(optimizer="adamw", lr=None, reference=False, precision="fp32")
    text = torch.randint(0, 256, (200_000,), dtype=torch.uint8)
    place = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    batches = train_gpt.Batches(train=text, validation=text, batch_size=8, seq_len=128, seed=0, **place)
    model = train_gpt.GPT(4, 4, 128, 128)
    return model, train_gpt.build_optimizer(options, model), batches


def block(model: Any, optimizer: Any, batches: Any, watcher: Any) -> tuple[float, float]:
    began = (time.perf_counter(), time.process_time())
    for step in range(BLOCK):
        loss = model.loss(*batches.training(step))
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if watcher is not None:
            watcher.log(loss=loss.detach())
    return time.perf_counter() - began[0], time.process_time() - began[1]


class Inside:
    """Adds up the seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return call

    def install(self) -> None:
        for name in ("reducing", "begin_step", "begin_bucket", "gradient", "end_bucket", "end_step", "log"):
            setattr(Watcher, name, self.timed(getattr(Watcher, name)))


def measure(pairs: int) -> tuple[list[tuple[tuple[float, float], tuple[float, float]]], float]:
    inside = Inside()
    inside.install()
    model, optimizer, batches = build()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)

        def watched() -> tuple[float, float]:
            with diagnostics.watch(optimizer, every=BLOCK, run=run) as watcher:
                return block(model, optimizer, batches, watcher)

        watched()
        block(model, optimizer, batches, None)
        inside.seconds = 0.0
        seconds = []
        for pair in range(pairs):
            if pair % 2:
                on, off = watched(), block(model, optimizer, batches, None)
            else:
                off, on = block(model, optimizer, batches, None), watched()
            seconds.append((off, on))
    return seconds, inside.seconds / sum(on[0] for _, on in seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds, share = measure(options.pairs)
    costs, rows = {}, []
    for clock, name in enumerate(("wall", "processor")):
        low, middle, high = costs[name] = statistics.quantiles((on[clock] / off[clock] - 1 for off, on in seconds), n=4)
        off = statistics.median(off[clock] for off, _ in seconds) / BLOCK
        on = statistics.median(on[clock] for _, on in seconds) / BLOCK
        rows.append(
            f"| {name} | {1e3 * off:.2f} ms | {1e3 * on:.2f} ms "
            f"| {100 * middle:+.2f}% ({100 * low:+.2f}% to {100 * high:+.2f}%) |"
        )
    about = (
        f"GPT of 4 layers, width 128, 8 x 128 bytes a step; torch {torch.__version__}, {platform.machine()}, 1 thread"
    )
    lines = [
        f"{about}, {options.pairs} pairs of {BLOCK} steps.",
        "",
        "| time | step without, median | step with watch(every=10), median | cost by pairs, median (quartiles) |",
        "|---|---|---|---|",
        *rows,
        "",
        f"{100 * share:.2f}% of the watched steps' wall time is inside the watcher's own code.",
    ]
    print("\n".join(lines))
    name = options.out / f"watch_cpu_{date.today()}"
    name.with_suffix(".md").write_text("\n".join(lines) + "\n")
    result = {
        "command": " ".join(sys.argv),
        "about": about,
        "seconds_off_on": seconds,
        "cost": costs,
        "inside": share,
    }
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
