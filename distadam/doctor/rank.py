"""The self-test that every rank runs: ``python -m distadam.doctor.rank FOLDER SECONDS [CHECKPOINTS]``.

Collectives of integers whose sums are known, one sharded step beside torch.optim's, clocks, versions, and whether all
ranks see the same checkpoint directory. Rank 0 writes what was found to ``FOLDER/findings.json``.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import distadam
from distadam.comm import Collectives, Groups, Streams
from distadam.doctor.finding import Finding, error, ok
from distadam.doctor.system import allowed_cpus, compare_clocks
from distadam.doctor.versions import Facts, compare_facts

MEETING_TIMEOUT_S = 30.0
_NUMEL = 1 << 20
_WIDTH = 128


class _Owner:
    """Holds the lease of process groups, as an optimizer would."""

    def collectives(self, reduce: str) -> Collectives:
        groups = Groups.resolve(distadam.ShardPolicy(), MEETING_TIMEOUT_S, self)
        return Collectives(groups, Streams(), MEETING_TIMEOUT_S, reduce)


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's host and the CPUs that it may run on there: a launcher may have kept it to some."""

    host: str
    cpus: tuple[int, ...]


def meet() -> list[Seat]:
    """Join the job; return every rank's seat.

    Collective: every rank.
    """
    distadam.init_process_group(timeout_s=MEETING_TIMEOUT_S)
    owner = _Owner()
    own = Seat(socket.gethostname(), tuple(allowed_cpus()))
    seats: list[Seat] = owner.collectives("native").exchange(own, "doctor")
    return seats


def let_rank_0_report() -> None:
    """Stay for as long as rank 0 may wait for this rank, and for its report: most launchers end all with the first."""
    time.sleep(MEETING_TIMEOUT_S + 10)


def main() -> None:
    """Run the self-test and write what it found; an exception goes to a file of this rank's too."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    checkpoints = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    began = time.monotonic()
    rank = "unknown"
    try:
        info = distadam.init_process_group(timeout_s=MEETING_TIMEOUT_S)
        rank = str(info.rank)
        findings = self_test(seconds, checkpoints, began)
    except Exception as problem:
        (folder / f"failed-{rank}-{secrets.token_hex(4)}.txt").write_text(f"{type(problem).__name__}: {problem}")
        raise
    if info.rank == 0:
        (folder / "findings.json").write_text(json.dumps([finding.as_dict() for finding in findings]))


def self_test(seconds: float, checkpoints: Path | None, began: float) -> list[Finding]:
    """Return what the ranks found together; the same on all.

    Args:
        seconds: for the collectives, together.
        checkpoints: a directory that all should see.
        began: by the monotonic clock, before the ranks met.

    Collective: every rank.
    """
    info = distadam.init_process_group(timeout_s=MEETING_TIMEOUT_S)
    text = f"{info.world_size} ranks met in {time.monotonic() - began:.1f} s: backend {info.backend}, {info.launcher}"
    findings = [ok("self_test.meeting", text, ranks=info.world_size)]
    owner = _Owner()
    collectives = owner.collectives("auto")
    facts: list[Facts] = collectives.exchange(Facts.here(), "doctor")
    findings += compare_facts(facts)
    findings += _clocks(collectives, [fact.host for fact in facts])
    findings += _collectives(collectives, info.device, seconds)
    findings += _step(info, collectives)
    if checkpoints is not None:
        findings += _same_directory(collectives, checkpoints, info.rank)
    collectives.exchange(None, "doctor")  # peers are done with this rank's memory
    return findings


def gather_findings(own: list[Finding], together: list[Finding]) -> list[Finding] | None:
    """Return all hosts' findings, each with its host's name, then the common ones, on rank 0; None elsewhere.

    Collective: every rank.
    """
    info = distadam.init_process_group()
    owner = _Owner()
    collectives = owner.collectives("native")
    mine = (socket.gethostname(), [finding.as_dict() for finding in own])
    answers = collectives.exchange(mine, "doctor")
    if info.rank != 0:
        return None
    several = len({host for host, _ in answers}) > 1
    gathered = []
    for host, found in answers:
        for entry in found:
            text = f"{host}: {entry['text']}" if several else entry["text"]
            gathered.append(Finding(**{**entry, "text": text}))
    return gathered + together


def _clocks(collectives: Collectives, hosts: list[str]) -> list[Finding]:
    """Read all clocks in the shortest of a few moments."""
    best: tuple[float, list[float]] = (float("inf"), [0.0])
    for _ in range(5):
        collectives.exchange(None, "doctor")
        began = time.monotonic()
        times = collectives.exchange(time.time(), "doctor")
        best = min(best, (time.monotonic() - began, [float(value - times[0]) for value in times]))
    answers: list[tuple[float, list[float]]] = collectives.exchange(best, "doctor")
    doubt_s, skews_s = answers[0]
    return compare_clocks(skews_s, doubt_s, hosts)


def _collectives(collectives: Collectives, device: torch.device, seconds: float) -> list[Finding]:
    """Reduce-scatter and all-gather integers, until the time is over; every element is checked."""
    rank, num_ranks = collectives.groups.shard_rank, collectives.groups.num_shards
    numel = _NUMEL // num_ranks // 64 * 64
    full = collectives.empty("gradient_buffers", numel * num_ranks, torch.float32, device)
    sums = torch.zeros(numel, device=device)
    counting = torch.arange(numel * num_ranks, device=device).remainder(1024).float()
    times: dict[str, list[float]] = {"reduce-scatter": [], "all-gather": []}
    wrong = ""
    ends = time.monotonic() + seconds
    going = True
    while going:
        full.copy_(counting).mul_(rank + 1)
        collectives.exchange(None, "doctor")
        began = time.perf_counter()
        collectives.reduce_scatter(sums, full, "doctor").wait()
        times["reduce-scatter"].append(_since(began, sums))
        expected = counting * (num_ranks * (num_ranks + 1) / 2)
        if not torch.equal(sums, expected[rank * numel : (rank + 1) * numel]):
            wrong = wrong or f"a reduce-scatter gave rank {rank} wrong sums"
        collectives.exchange(None, "doctor")
        shard = full[rank * numel : (rank + 1) * numel].copy_(sums)
        began = time.perf_counter()
        collectives.all_gather(full, shard, "doctor").wait()
        times["all-gather"].append(_since(began, full))
        if not torch.equal(full, expected):
            wrong = wrong or f"an all-gather gave rank {rank} wrong values"
        answers = collectives.exchange((time.monotonic() < ends and not wrong, wrong), "doctor")
        going = all(more for more, _ in answers)
        wrong = next((text for _, text in answers if text), "")
    collectives.release(full)
    how, why = collectives.transport(device)
    if wrong:
        cure = "memory, a driver or the network corrupts data: try another host, and CommPolicy(reduce='native')"
        return [error("self_test.collectives", f"{wrong} ({how})", cure)]
    parts = []
    for name, taken in times.items():
        best = min(taken[1:] or taken)
        sent = 4 * numel * (num_ranks - 1) / best / 1e9
        parts.append(f"{name} {1e3 * best:.2f} ms" + (f" ({sent:.1f} GB/s)" if num_ranks > 1 else ""))
    text = f"4 MiB by {how} ({why}): {', '.join(parts)}, {len(times['all-gather'])} times, all right"
    return [ok("self_test.collectives", text, transport=how, best_ms={k: 1e3 * min(v) for k, v in times.items()})]


def _since(began: float, result: Tensor) -> float:
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - began


def _step(info: distadam.RunInfo, collectives: Collectives) -> list[Finding]:
    """Take two sharded steps of AdamW, and the same with torch.optim on the average that this rank can compute."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, 8)).to(info.device)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        output: Tensor = model(torch.randn(16, _WIDTH, generator=generator).to(info.device))
        return output.square().mean()

    random = torch.get_rng_state()
    ours, theirs = build(), build()
    torch.set_rng_state(random)
    # Beside a large eps the gradient's size shows: a sum that was not divided gives another step.
    optimizer = distadam.AdamW(ours.named_parameters(), lr=1e-2, eps=1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=1e-2)
    began = time.perf_counter()
    for step in range(2):
        torch.autograd.backward(loss(ours, info.rank, step))
        optimizer.step()
        for rank in range(info.world_size):
            torch.autograd.backward(loss(theirs, rank, step) / info.world_size)
        reference.step()
        reference.zero_grad()
    seconds = time.perf_counter() - began
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    worst, name = max((float((mine - other).abs().max().detach()), name) for (name, mine), other in pairs)
    answers: list[tuple[float, str]] = collectives.exchange((worst, name), "doctor")
    worst, name = max(answers)
    if not worst < 1e-5:
        cure = "run the self-test with DISTADAM_KERNEL=reference; report it with kernel_report()"
        text = f"a sharded step differs from torch.optim.AdamW's by {worst:.2g} in {name!r}"
        return [error("self_test.step", text, cure, worst=worst)]
    kernel = str(optimizer.kernel_report()).splitlines()[-1].strip()
    text = f"two sharded steps of AdamW are torch.optim's within {worst:.1g}, {1e3 * seconds:.0f} ms; {kernel}"
    return [ok("self_test.step", text, worst=worst)]


def _same_directory(collectives: Collectives, directory: Path, rank: int) -> list[Finding]:
    """Let rank 0 leave a file and see which ranks find it."""
    name, problem = f".distadam-doctor-{secrets.token_hex(8)}", ""
    name = collectives.exchange(name, "doctor")[0]
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    if rank == 0:
        try:
            (place / name).touch()
        except OSError as refused:
            problem = str(refused)
    problem = collectives.exchange(problem, "doctor")[0]
    if problem:
        return []  # `storage` says so
    sees = collectives.exchange((place / name).exists(), "doctor")
    if rank == 0:
        (place / name).unlink()
    blind = [number for number, found in enumerate(sees) if not found]
    if blind:
        text = f"rank {', '.join(map(str, blind))} does not see what rank 0 writes to {directory}"
        cure = "put checkpoints on a file system that all hosts mount at the same path"
        return [error("checkpoints.shared", text, cure, ranks=blind)]
    return [ok("checkpoints.shared", f"all ranks see {directory}")]


if __name__ == "__main__":
    main()
