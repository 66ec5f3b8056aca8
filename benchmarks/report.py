"""Time reading and drawing the report of a made-up run: 10,000 steps, 200 parameters, 2 ranks.

    python -m benchmarks.report [--steps 10000] [--layers 200] [--rounds 5]

Prints medians in seconds, CPU and wall, and the page's size; torch's import is not in them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from distadam.diagnostics.report_data import read_run
from distadam.diagnostics.report_page import render
from tests.report_runs import write_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, num_steps=arguments.steps, num_layers=arguments.layers)
        taken = []
        for _ in range(arguments.rounds):
            cpu_s, wall_s = time.process_time(), time.monotonic()
            text = render(read_run(run))
            taken.append((time.process_time() - cpu_s, time.monotonic() - wall_s))
    cpu, wall = (statistics.median(column) for column in zip(*taken, strict=True))
    size = f"page {len(text) / 1e6:.1f} MB"
    size = f"page {len(text) / 1e6:.1f} MB"
    print(f"read and drawn: {cpu:.2f} s CPU, {wall:.2f} s wall (medians of {len(taken)}), {size}")


if __name__ == "__main__":
    main()
