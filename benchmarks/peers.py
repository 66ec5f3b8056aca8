"""Train the same models with distadam and with its peers, side by side, and write who took how long for what.

    make bench                                                                    everything; minutes
    python benchmarks/peers.py --models mlp --contenders ddp,distadam --rounds 3 --ranks 2 --allocator set     seconds

A round runs every contender once, each as processes of its own that start, train the same batches from the same
parameters and end; the next round starts one contender further on. Compared are ratios to DDP within a round, so that
a machine that slows down for a minute slows both. "DDP, again" is the same contender a second time: the noise.
"""

import argparse
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS
from peers_report import write_report

HERE = Path(__file__).parent
ALLOCATOR = {  # what `distadam launch` sets on CPU
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
MOST_DEVIATION = 0.05
NO_NETWORK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender under one allocator setting."""

    name: str
    allocator: str

    @property
    def key(self) -> str:
        return f"{self.name}/{self.allocator}"


class Server:
    """The process that forks ranks with one environment; in a network namespace of its own where that is allowed."""

    def __init__(self, allocator: str, isolate: bool) -> None:
        self.environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
        self.environment |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        self.environment["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"  # ninja, for DeepSpeed
        if allocator == "set":
            self.environment |= ALLOCATOR
        self.prefix = NO_NETWORK if isolate else []
        command = [*self.prefix, sys.executable, str(HERE / "peers_rank.py"), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=self.environment, text=True, start_new_session=True, **pipes)

    def run(self, job: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        """Run the job's ranks; return their results.

        Raises:
            RuntimeError: a rank failed (with the end of its output), or time ran out.
        """
        if job["contender"].endswith("mpi4py"):
            self._run_under_mpi(job, timeout_s)
        else:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                self.close()
                raise RuntimeError(f"no answer within {timeout_s:.0f} s")
            failed = json.loads(self._process.stdout.readline() or '{"failed": 0}')["failed"]
            if failed is not None:
                raise RuntimeError(_last_line(Path(f"{job['out']}.{failed}.log")))
        return [json.loads(Path(f"{job['out']}.{rank}.json").read_text()) for rank in range(job["ranks"])]

    def _run_under_mpi(self, job: dict[str, Any], timeout_s: float) -> None:
        launcher = shutil.which("mpiexec", path=self.environment["PATH"])
        if launcher is None:
            raise RuntimeError("no mpiexec")
        path = Path(f"{job['out']}.job")
        path.write_text(json.dumps(job))
        command = [*self.prefix, launcher, "-n", str(job["ranks"]), sys.executable, str(HERE / "peers_rank.py")]
        done = subprocess.run(
            [*command, "--job", str(path)], env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        if done.returncode:
            raise RuntimeError(f"mpiexec: exit code {done.returncode}: {done.stderr.strip()[-300:]}")

    def close(self) -> None:
        """End the server; a rank that still runs goes with its group."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
        self._process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()] if log.exists() else []
    return lines[-1][-300:] if lines else "died without a word"


def can_isolate() -> bool:
    """Return whether network namespaces may be made: then no other traffic is counted."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    return subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode == 0


def why_not(name: str) -> str:
    """Return why a contender cannot run here, or nothing."""
    import importlib.util

    import distadam
    from distadam.policies import ShardPolicy

    if name == "distadam-mpi4py" and not hasattr(distadam, "register_mpi_backend"):
        return "this distadam has no register_mpi_backend"
    if name == "distadam-share-parameters" and "share_parameters" not in ShardPolicy.__dataclass_fields__:
        return "this distadam has no ShardPolicy(share_parameters=...)"
    package = {"oss": "fairscale", "deepspeed1": "deepspeed", "deepspeed2": "deepspeed", "distadam-mpi4py": "mpi4py"}
    if name in package and importlib.util.find_spec(package[name]) is None:
        return f"{package[name]} is not installed in this environment"
    return ""


def entries(options: argparse.Namespace, num_ranks: int) -> list[Entry]:
    """Return what a round runs, in order; variants, and most rows without allocator settings, at the first ranks only.

    The noise row and what ratios refer to are wanted once: without the settings, where there are both.
    """
    found = []
    first = num_ranks == options.ranks[0]
    for name in options.contenders:
        contender = CONTENDERS[name]
        if not (first or contender.everywhere):
            continue
        if options.allocator == "set" or (options.allocator == "both" and name != "ddp-again"):
            found.append(Entry(name=name, allocator="set"))
        plain = contender.plain and (first or name in ("ddp", "ddp-again"))
        if options.allocator == "plain" or (options.allocator == "both" and plain):
            found.append(Entry(name=name, allocator="plain"))
    return found


def measure(options: argparse.Namespace, servers: dict[str, Server], folder: Path) -> list[dict[str, Any]]:
    """Return a section per model and number of ranks: the results of every entry in every round."""
    sections = []
    for model in options.models:
        reference = folder / f"{model}.pt"
        common = {"model": model, "warm_up": options.warm_up, "steps": options.steps, "extra": options.memory_steps}
        job = {**common, "contender": "compute", "ranks": 1, "save": str(reference), "out": str(folder / "reference")}
        [expected] = next(iter(servers.values())).run(job, options.timeout_s)
        for num_ranks in options.ranks:
            section: dict[str, Any] = {"model": model, "ranks": num_ranks, "reference_loss": expected["loss"]}
            section |= {"failed": {}, "rounds": []}
            sections.append(section)
            plan = [entry for entry in entries(options, num_ranks)]
            for number in range(options.rounds):
                results: dict[str, Any] = {}
                shift = number * len(plan) // options.rounds
                for entry in plan[shift:] + plan[:shift]:
                    if entry.key in section["failed"]:
                        continue
                    out = folder / f"{model}.{num_ranks}.{entry.name}.{entry.allocator}.{number}"
                    job = {**common, "contender": entry.name, "ranks": num_ranks, "out": str(out)}
                    job |= {"pin": options.pin and num_ranks <= len(os.sched_getaffinity(0)), "store": f"{out}.store"}
                    job |= {"reference": str(reference) if number == 0 else "", "port": 29500}
                    job |= {"extra": common["extra"] if number == 0 else 0}
                    print(f"\r{model}, {num_ranks} ranks, {entry.key:40}", end="", file=sys.stderr, flush=True)
                    try:
                        reason = why_not(entry.name)
                        if reason:
                            raise RuntimeError(reason)
                        found = servers[entry.allocator].run(job, options.timeout_s)
                        _check(found)
                        results[entry.key] = found
                    except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
                        section["failed"][entry.key] = str(error)
                section["rounds"].append(results)
                _say(section, number, options.rounds, results)
    return sections


def _check(ranks: list[dict[str, Any]]) -> None:
    """Refuse the times of a contender that trained something else.

    Raises:
        RuntimeError: it ended further from the reference than rounding takes it.
    """
    deviation = ranks[0].get("deviation")
    if deviation is not None and not deviation < MOST_DEVIATION:
        raise RuntimeError(f"wrong parameters: deviation {deviation:.1e} of the way that they moved")


def _say(section: dict[str, Any], number: int, rounds: int, results: dict[str, Any]) -> None:
    took = {
        key: sorted(max(times) for times in zip(*(rank["step_s"] for rank in ranks), strict=True))
        for key, ranks in results.items()
    }
    text = "  ".join(f"{key} {1e3 * times[len(times) // 2]:.0f}" for key, times in took.items())
    head = f"{section['model']}, {section['ranks']} ranks, round {number + 1} of {rounds} (ms)"
    print(f"\r{head}: {text}", flush=True)
    if number == 0:
        for key, reason in section["failed"].items():
            print(f"  {key} does not run: {reason}", flush=True)


def about(options: argparse.Namespace, isolated: bool) -> dict[str, Any]:
    """Return command, versions, machine."""
    import importlib.metadata

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("distadam", "deepspeed", "fairscale", "mpi4py"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed" if package != "distadam" else "this checkout"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    machine = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"
    return {
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "commit": git.stdout.strip(),
        "versions": versions,
        "machine": machine,
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "network": "loopback of a namespace of its own" if isolated else "the host's loopback, other traffic included",
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default="mlp,gpt", type=lambda text: text.split(","))
    add("--contenders", default=list(CONTENDERS), type=lambda text: text.split(","), help=", ".join(CONTENDERS))
    add("--ranks", default=[2, 4], type=lambda text: [int(part) for part in text.split(",")], help="default: 2,4")
    add("--rounds", default=5, type=int)
    add("--warm-up", default=2, type=int, help="steps before the clock starts, each time")
    add("--steps", default=3, type=int, help="timed steps of a contender in a round")
    add(
        "--memory-steps",
        default=12,
        type=int,
        help="steps of the first round, behind the timed ones, that memory is taken of",
    )
    add("--allocator", choices=["set", "plain", "both"], default="both", help="the MALLOC_* settings of the launcher")
    add("--pin", action=argparse.BooleanOptionalAction, default=True, help="rank r on core r where there are enough")
    add("--timeout-s", default=300.0, type=float, help="of a contender in a round")
    add("--out", default=HERE / "results", type=Path)
    add("--name", default=f"peers_{len(os.sched_getaffinity(0))}core-cpu_{time.strftime('%Y-%m-%d')}")
    options = parser.parse_args()
    for name in options.contenders:
        if name not in CONTENDERS:
            parser.error(f"expected contenders of {', '.join(CONTENDERS)} but got {name!r}")
    return options


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended too
    began = time.monotonic()
    isolated = can_isolate()
    allocators = ["set", "plain"] if options.allocator == "both" else [options.allocator]
    servers = {allocator: Server(allocator, isolated) for allocator in allocators}
    try:
        with tempfile.TemporaryDirectory() as folder:
            sections = measure(options, servers, Path(folder))
    finally:
        for server in servers.values():
            server.close()
    run = {**about(options, isolated), "seconds": time.monotonic() - began, "sections": sections}
    write_report(run, options.out, options.name)


if __name__ == "__main__":
    main()
