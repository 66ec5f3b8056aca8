"""What ranks of several hosts send in a step, and what they train: ``python -m tests.cluster.hosts_of_two FOLDER``.

Each rank writes ``rank.N.json``: for every way of travelling the weights' sum of bits, what eth0 of its host sent, and
what the statistics of this rank claim. Gradients are small integers, so that sums are exact in every order.

On a busy machine TCP sends smaller packets, more acknowledgements, and again what a receiver is slow to acknowledge: up
to some percent more bytes. So headers are not counted, and neither is what was sent again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distadam
from distadam import CommPolicy
from tests.interface import num_sent_again, sent

WAYS = ("auto", "exchange", "native")
SHAPES = [(1023, 999), (7,), (257, 301), (1,)]
STEPS = 2
HEADERS_NBYTES = 14 + 20 + 32  # of Ethernet, IPv4, TCP with timestamps
SEGMENT_NBYTES = 1500 - 20 - 32


def sent_nbytes() -> int:
    """Return the data that eth0 of this host has sent, the last segment of each retransmission rounded up."""
    nbytes, num_packets = sent("eth0")
    return nbytes - HEADERS_NBYTES * num_packets - SEGMENT_NBYTES * num_sent_again()


def train(rank: int, reduce: Any) -> dict[str, Any]:
    """Train some steps; count the last one."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = distadam.AdamW(params, lr=0.1, comm=CommPolicy(reduce=reduce))
    before = 0
    for step in range(STEPS):
        if step == STEPS - 1:
            optimizer.comm_stats.clear()
            dist.barrier()
            before = sent_nbytes()
            dist.barrier()
        generator = torch.Generator().manual_seed(10 * step + rank)
        losses = [(param * torch.randint(-4, 5, param.shape, generator=generator)).sum() for param in params]
        torch.autograd.backward(losses)
        optimizer.step()
    dist.barrier()
    return {
        "sent": sent_nbytes() - before,
        "payload": sum(optimizer.comm_stats.payload_nbytes.values()),
        "bits": [int(param.detach().view(torch.int32).long().sum()) for param in params],
        "padded": sum(bucket.numel for bucket in optimizer.layout.buckets),
        "report": str(optimizer.kernel_report()),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {reduce: train(dist.get_rank(), reduce) for reduce in WAYS}
    Path(sys.argv[1], f"rank.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
