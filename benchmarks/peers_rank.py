"""One rank of one contender; and a server that forks such ranks from a process that has torch imported.

``python peers_rank.py --serve`` reads jobs (JSON) from stdin, forks the ranks of each and answers with their results: a
start by fork costs a tenth of a second instead of three, and all ranks have the environment that the server was started
with, which is what glibc's allocator settings need. ``python peers_rank.py --job FILE`` is one rank under mpiexec.
"""

import contextlib
import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import CONTENDERS, Trainer
from workloads import Workload, build

import distadam


def memory_nbytes(field: str) -> int:
    """Return "Pss" or "Rss" of this process now, or "VmHWM": the highest Rss so far."""
    path = "/proc/self/status" if field == "VmHWM" else "/proc/self/smaps_rollup"
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in {path}")


def loopback_nbytes() -> int:
    """Return the bytes that the loopback interface of this network namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("expected an interface lo in /proc/net/dev")


class PeakPss:
    """The highest proportional set size while the block runs, by a thread that looks every few milliseconds."""

    def __enter__(self) -> "PeakPss":
        self.nbytes, self._running = memory_nbytes("Pss"), True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while self._running:
            self.nbytes = max(self.nbytes, memory_nbytes("Pss"))
            time.sleep(0.004)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()


def run_rank(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train the job's steps; return times in seconds and sizes in bytes."""
    contender, num_ranks = CONTENDERS[job["contender"]], job["ranks"]
    began = time.monotonic()
    torch.set_num_threads(1)
    if job["pin"]:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    _join(contender.backend, job, rank)
    before = memory_nbytes("Pss")
    joined = time.monotonic()
    num_steps = job["warm_up"] + job["steps"] + job["extra"]
    work = build(job["model"], num_steps, rank, num_ranks)
    numel = sum(param.numel() for param in work.model.parameters())
    trainer = contender.build(work)
    steps = iter(work.batches)
    built = time.monotonic()
    for _ in range(job["warm_up"]):
        _step(work, trainer, next(steps))
    result = _timed(work, trainer, [next(steps) for _ in range(job["steps"])])
    result |= {"numel": numel, "pss_before": before}
    if job["extra"]:
        with PeakPss() as peak:
            for batch in steps:
                _step(work, trainer, batch)
        result |= {"peak_pss": peak.nbytes, "peak_rss": memory_nbytes("VmHWM")}
    if job["reference"] and contender.backend:
        result["deviation"] = _deviation(trainer.parameters(), job, rank)
    result["phases_s"] = [joined - began, built - joined, time.monotonic() - built, began, time.monotonic()]
    _meet()  # a rank that left early would break what its peers still do
    return result


def _join(backend: str, job: dict[str, Any], rank: int) -> None:
    if not backend:
        return
    if backend == "mpi4py":
        distadam.register_mpi_backend()
        dist.init_process_group("mpi4py")
        return
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    dist.init_process_group(backend, init_method=f"file://{job['store']}", rank=rank, world_size=job["ranks"])


def _step(work: Workload, trainer: Trainer, batch: Any) -> tuple[float, float, float]:
    """Return the loss, and seconds until the end of backward and of the step."""
    began = time.perf_counter()
    loss = work.loss(trainer.forward, *batch)
    trainer.backward(loss)
    middle = time.perf_counter()
    trainer.update()
    return loss.item(), middle - began, time.perf_counter() - began


def _timed(work: Workload, trainer: Trainer, batches: list[Any]) -> dict[str, Any]:
    stats = getattr(trainer.optimizer, "comm_stats", None)
    if stats is not None:
        stats.clear()
    _meet()
    wire = loopback_nbytes()
    steps = [_step(work, trainer, batch) for batch in batches]
    _meet()
    wire = loopback_nbytes() - wire
    payload = dict(stats.payload_nbytes) if stats is not None else {}
    losses, backward, whole = zip(*steps, strict=True)
    return {
        "loss": losses[-1],
        "backward_s": list(backward),
        "step_s": list(whole),
        "wire_nbytes": wire / len(batches),
        "payload_nbytes": {name: nbytes / len(batches) for name, nbytes in payload.items()},
    }


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def _deviation(params: list[torch.Tensor], job: dict[str, Any], rank: int) -> float | None:
    """Return ||w - reference|| / ||reference - initial||: how far from what one process computes on whole batches."""
    if rank:
        return None
    reference = torch.load(job["reference"], mmap=True)
    initial = build(job["model"], 0, 0, 1).model.parameters()
    apart, moved = 0.0, 0.0
    for param, expected, start in zip(params, reference, initial, strict=True):
        apart += (param - expected).double().square().sum().item()
        moved += (expected - start).double().square().sum().item()
    return (apart / moved) ** 0.5


def write_reference(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train on whole batches in one process with torch.optim.AdamW; save the parameters, return the losses."""
    work = build(job["model"], job["warm_up"] + job["steps"] + job["extra"], 0, 1)
    trainer = CONTENDERS["compute"].build(work)
    losses = [_step(work, trainer, batch)[0] for batch in work.batches]
    torch.save([param.detach() for param in work.model.parameters()], job["save"])
    return {"loss": losses[job["warm_up"] + job["steps"] - 1]}


def _serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        children = {_fork(job, rank): rank for rank in range(job["ranks"])}
        failed = None
        while children:
            pid, status = os.wait()
            rank = children.pop(pid)
            if status and failed is None:
                failed = rank
                for other in children:  # its peers would wait for it
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, 9)
        sys.stdout.write(json.dumps({"failed": failed}) + "\n")
        sys.stdout.flush()


def _fork(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(f"{job['out']}.{rank}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        warnings.simplefilter("ignore")
        _run_and_write(job, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_and_write(job: dict[str, Any], rank: int) -> None:
    result = (write_reference if job.get("save") else run_rank)(job, rank)
    Path(f"{job['out']}.{rank}.json").write_text(json.dumps(result))


def main() -> None:
    if sys.argv[1] == "--serve":
        import torch._dynamo
        import torch.distributed.fsdp
        import torch.distributed.optim  # noqa: F401

        # Else a rank's first full collection writes to every object that it shares with this server, and has copies of
        # their pages from then on: 30 MB for whoever's allocations happen to bring one about.
        gc.collect()
        gc.freeze()
        _serve()
        return
    rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    _run_and_write(json.loads(Path(sys.argv[2]).read_text()), rank)


if __name__ == "__main__":
    main()
