"""Train between two hosts on a slow link, and compare the step with what the link allows at least.

    python benchmarks/two_hosts.py [--gbit 1] [--model mlp] [--steps 8] [--out benchmarks/results]     as root

The hosts are network namespaces, the link is shaped by ``tc tbf``; one rank and one thread on each, fp32, AdamW,
``reduce="exchange"``, ``prefetch(model)``. What a step needs at least is

    max(compute, wire) + first + last

wire: the bytes that a rank must send, (N - 1) / N of the gradients and of the parameters, over the link's nominal rate
(what a plain socket reaches both ways in the same run is told beside it); compute: a step without communication; first:
until the first bucket's gradient is ready, nothing can be sent; last: what the last bucket's update takes, which no
transfer can hide. A step is the loop's time over its steps, the last gather included: a gather runs into the next step.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from workloads import LR, build  # noqa: E402

import distadam  # noqa: E402
from distadam import diagnostics  # noqa: E402

MIB = 2**20


def sent_nbytes() -> int:
    """Return what eth0 of this host has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    raise RuntimeError("expected an interface eth0")


def socket_rate(rank: int, folder: Path, nbytes: int = 24 * MIB) -> float:
    """Return bytes a second that each rank sends through a plain socket while it receives as many."""
    meeting = folder / "rate"
    if rank == 0:
        with socket.create_server(("10.77.0.1", 29500)) as server:
            meeting.touch()
            peer, _ = server.accept()
    else:
        while not meeting.exists():
            time.sleep(0.01)
        peer = socket.create_connection(("10.77.0.1", 29500))
    code = "import os, sys; [os.write(int(sys.argv[1]), bytes(1 << 16)) for _ in range(int(sys.argv[2]))]"
    with peer:
        began = time.perf_counter()
        command = [sys.executable, "-c", code, str(peer.fileno()), str(nbytes >> 16)]
        sender = subprocess.Popen(command, pass_fds=[peer.fileno()])
        left = nbytes
        while left:
            left -= len(peer.recv(min(left, 1 << 20)))
        sender.wait()
        return nbytes / (time.perf_counter() - began)


def train(rank: int, model: str, num_steps: int, communicate: bool) -> dict[str, Any]:
    work = build(model, num_steps + 3, rank, 2)
    shard = {} if communicate else {"shard": distadam.ShardPolicy(shard_group=ALONE[rank])}
    optimizer = distadam.AdamW(
        work.model.named_parameters(),
        lr=LR,
        comm=distadam.CommPolicy(reduce="exchange" if communicate else "auto"),
        **shard,
    )
    optimizer.prefetch(work.model)
    times, firsts = [], []
    sent, loop_began = 0, 0.0
    first_grad = [0.0]
    for param in work.model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: first_grad.append(time.perf_counter()))
    with diagnostics.timeline(optimizer, ranges=False) as spans:
        for number, batch in enumerate(work.batches):
            if number == 3:
                optimizer.flush()
                dist.barrier()
                optimizer.comm_stats.clear()
                sent, loop_began = sent_nbytes(), time.perf_counter()
            first_grad.clear()
            began = time.perf_counter()
            work.loss(work.model, *batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= 3:
                times.append(time.perf_counter() - began)
                firsts.append(first_grad[0] - began)
        optimizer.flush()
        mean = (time.perf_counter() - loop_began) / num_steps
        sent = (sent_nbytes() - sent) / num_steps
        payload = sum(optimizer.comm_stats.payload_nbytes.values()) / num_steps
        overlap, parts = spans.overlap, spans.parts
    return {
        "step_s": times,
        "mean_s": mean,
        "first_s": statistics.median(firsts),
        "sent_nbytes": sent,
        "payload_nbytes": payload,
        "overlap": overlap,
        "parts": parts,
        "update_s": parts.get("update", 0.0) / max(1, len(optimizer.layout.buckets)),
        "num_buckets": len(optimizer.layout.buckets),
        "numel": sum(param.numel() for param in work.model.parameters()),
    }


ALONE: list[Any] = []


def run_rank(rank: int, folder: Path, model: str, num_steps: int) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    rate = socket_rate(rank, folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ALONE.extend(dist.new_group([peer]) for peer in range(2))
    results = {"rate": rate, "alone": train(rank, model, num_steps, communicate=False)}
    dist.barrier()
    results["together"] = train(rank, model, num_steps, communicate=True)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbit", type=float, default=1.0)
    parser.add_argument("--model", default="mlp", choices=["mlp", "gpt"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.folder, options.model, options.steps)
        return
    from peers import ALLOCATOR

    from tests.cluster.netns import Hosts, missing

    if missing():
        raise SystemExit(f"two_hosts.py: {missing()}")
    with Hosts(2) as hosts, TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            hosts.slow(rank, "tbf", "rate", f"{options.gbit}gbit", "burst", "256kb", "latency", "20ms")
            command = [*sys.argv, "--rank", str(rank), "--folder", folder]
            settings = {**ALLOCATOR, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
            ranks.append(hosts.start(rank, sys.executable, *command, **settings))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    report(options, found)


def report(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    together = [rank["together"] for rank in found]
    numel, num_buckets = together[0]["numel"], together[0]["num_buckets"]
    rate, compute = min(rank["rate"] for rank in found), max(rank["alone"]["mean_s"] for rank in found)
    wire = numel * 4 * 8 / (options.gbit * 1e9)  # half of the gradients and half of the parameters, 4 bytes each
    first, last = max(rank["alone"]["first_s"] for rank in found), max(rank["update_s"] for rank in together)
    bound = max(compute, wire) + first + last
    step = max(rank["mean_s"] for rank in together)
    rows = [
        ("link, as a plain socket reaches it", f"{rate * 8 / 1e9:.2f} Gbit/s of {options.gbit:g}"),
        ("compute: a step without communication", f"{1e3 * compute:.0f} ms"),
        ("wire: payload at the nominal rate", f"{1e3 * wire:.0f} ms"),
        ("first bucket's gradient is ready after", f"{1e3 * first:.0f} ms"),
        ("update of a bucket", f"{1e3 * last:.0f} ms"),
        ("at least", f"{1e3 * bound:.0f} ms"),
        (
            "step, mean (single ones)",
            f"{1e3 * step:.0f} ms ({min(min(rank['step_s']) for rank in together) * 1e3:.0f} to"
            f" {max(max(rank['step_s']) for rank in together) * 1e3:.0f})",
        ),
        ("step / at least", f"{step / bound:.2f}"),
        ("sent by a rank: eth0 / payload", f"{together[0]['sent_nbytes'] / together[0]['payload_nbytes']:.3f}"),
        ("communication hidden (upper bound)", f"{min(rank['overlap'] for rank in together):.0%}"),
    ]
    head = (
        f"{options.model}, {numel / 1e6:.1f} M parameters in {num_buckets} buckets, two hosts, {options.steps} steps;"
        f" torch {torch.__version__}, {platform.processor() or platform.machine()}."
    )
    text = "\n".join([head, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])
    print(text)
    if options.out is not None:
        stem = options.out / f"two_hosts_{options.model}_{date.today():%Y-%m-%d}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"about": head, "ranks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
