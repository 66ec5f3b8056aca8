"""What `diagnostics.monitor` and a flood of scrapes cost a step, on the GPT of examples/train_gpt.py.

    python benchmarks/monitor.py [--rounds 12] [--block 10] [--rate 1000] [--out benchmarks/results]

Each round trains four blocks of steps, in an order that changes from round to round:

    alone      no monitor
    monitored  a monitor, nobody asks
    scraped    a monitor that is asked for /metrics ``--rate`` times a second, four kept connections
    elsewhere  no monitor; the same questions go to the monitor of another, idle process on this machine

"elsewhere" is what the client and the network stack of one machine take from training, which in earnest is another
machine's. Costs are medians over rounds of ratios within a round, with quartiles; CPU time is the training thread's.
One process trains on one thread; the client and the answering process have what is left of the machine.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import watch

from distadam import diagnostics

ARMS = ("alone", "monitored", "scraped", "elsewhere")
RATIOS = (("monitored", "alone"), ("scraped", "monitored"), ("scraped", "alone"), ("scraped", "elsewhere"))


FLOOD = """
import json, os, socket, sys, time
port, rate = int(sys.argv[1]), float(sys.argv[2])
connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
files = [connection.makefile("rb") for connection in connections]
os.set_blocking(0, False)

def told_to_stop():
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False

began, count, wrong = time.monotonic(), 0, 0
while not told_to_stop():
    at = count % 4
    connections[at].sendall(b"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    status, length = files[at].readline(), 0
    while (line := files[at].readline()) != b"\\r\\n":
        if line.startswith(b"Content-Length"):
            length = int(line.split()[1])
    wrong += not (status.startswith(b"HTTP/1.1 200") and b"distadam_step{" in files[at].read(length))
    count += 1
    if count == 1:
        print("asking", flush=True)
    time.sleep(max(0.0, began + count / rate - time.monotonic()))
print(json.dumps({"answers": count, "wrong": wrong, "rate": count / (time.monotonic() - began)}))
"""


class Flood:
    """Asks a port for /metrics from another process while it is open; `said` is what came of it."""

    def __init__(self, port: int, rate: float) -> None:
        command = [sys.executable, "-I", "-S", "-c", FLOOD, str(port), str(rate)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Flood":
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self.said = json.loads(self._process.communicate()[0])


def timed(model: Any, optimizer: Any, batches: Any, log: Any) -> tuple[float, float]:
    cpu_s = time.thread_time()
    return watch.block(model, optimizer, batches, log)[0], time.thread_time() - cpu_s


def measure(
    rounds: int, rate: float, seconds: float
) -> tuple[list[dict[str, tuple[float, float]]], list[dict[str, float]]]:
    model, optimizer, batches = watch.build()
    elsewhere = diagnostics.monitor(watch.build()[1], port=0)
    floods: list[dict[str, float]] = []

    def run(arm: str) -> tuple[float, float]:
        if arm == "alone":
            return timed(model, optimizer, batches, None)
        if arm == "elsewhere":
            with Flood(elsewhere.port, rate) as flood:
                seconds = timed(model, optimizer, batches, None)
            floods.append(flood.said)
            return seconds
        with diagnostics.monitor(optimizer, port=0) as monitor:
            urllib.request.urlopen(f"{monitor.url}/healthz").close()  # its process has started
            if arm == "monitored":
                return timed(model, optimizer, batches, monitor)
            with Flood(monitor.port, rate) as flood:
                seconds = timed(model, optimizer, batches, monitor)
            floods.append(flood.said)
            return seconds

    for arm in ARMS:
        run(arm)
    floods.clear()
    order = random.Random(0)
    taken = []
    deadline = time.monotonic() + seconds
    for number in range(rounds):
        if number > 2 and time.monotonic() > deadline:
            break
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        taken.append({arm: run(arm) for arm in order.sample(ARMS, len(ARMS))})
    elsewhere.close()
    return taken, floods


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after so many")
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    watch.BLOCK = options.block
    taken, floods = measure(options.rounds, options.rate, options.seconds)
    about = (
        f"GPT of 4 layers, width 128, 8 x 128 bytes a step, fp32, one thread; torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {len(taken)} rounds of "
        f"{options.block} steps an arm"
    )
    rates = [flood["rate"] for flood in floods]
    answers, wrong = (int(sum(flood[key] for flood in floods)) for key in ("answers", "wrong"))
    step_ms = {arm: 1e3 * statistics.median(round_[arm][0] for round_ in taken) / options.block for arm in ARMS}
    lines = [
        f"{about}.",
        "",
        "median step: " + ", ".join(f"{arm} {ms:.2f} ms" for arm, ms in step_ms.items()),
        f"scrapes a second: {statistics.median(rates):.0f} (least {min(rates):.0f}); {answers} answers, {wrong} wrong",
        "",
        "| cost | wall, median (quartiles) | CPU of the training thread, median (quartiles) |",
        "|---|---|---|",
    ]
    costs = {}
    for over, under in RATIOS:
        cells = []
        for clock in (0, 1):
            ratios = [100 * (round_[over][clock] / round_[under][clock] - 1) for round_ in taken]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:+.2f}% ({low:+.2f}% to {high:+.2f}%)")
            costs[f"{over} / {under}, {('wall', 'cpu')[clock]}"] = [low, middle, high]
        lines.append(f"| {over} / {under} | {cells[0]} | {cells[1]} |")
    print("\n".join(lines))
    name = options.out / f"monitor_cpu_{date.today()}"
    name.with_suffix(".md").write_text("\n".join(lines) + "\n")
    result = {"command": " ".join(sys.argv), "about": about, "percent": costs, "seconds": taken, "floods": floods}
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
