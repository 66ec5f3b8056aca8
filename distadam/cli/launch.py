"""``distadam launch``: torch's own launcher, with readable output and settings that suit CPU ranks."""

import contextlib
import functools
import logging
import os
import platform
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distadam.cli.cores import divide, find_cores, spell
from distadam.cli.failures import print_failures, sort_failures
from distadam.cli.rank_output import PREFIX_TEMPLATE, RankLines
from distadam.cli.wait_page import show_waits
from distadam.comm import phase
from distadam.doctor.system import allowed_cpus
from distadam.engine import dumps

__all__ = ["cpu_environment", "launch", "launch_here", "share_cores"]

# Note [One store a round]: torchrun's agents share one store with all the groups that they ever start. What ranks of a
# group that is gone wrote there (their addresses) is still there when the next group meets, which then connects to the
# dead: https://github.com/pytorch/pytorch/issues/135712. With this variable every group has a store of its own.
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

# Note [Allocator settings]: glibc gives freed blocks above its mmap threshold back to the kernel, so the gradients that
# backward allocates afresh each step cost a page fault for every 4 KB, each step. These keep freed memory in the
# process.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

# Note [Pinning]: ranks that are kept to whole cores of their own, one socket's side by side, keep their caches and the
# memory that they touched first. The worker does it before the script starts, since threads and processes inherit it
# from the thread that starts them. By itself the launcher does it only where each rank gets two cores or more: on one
# core the threads that communicate would share it with the one that computes (docs/log.md has the figures).
_PIN = "Keep each rank to cores of its own."
_MOST_RANKS = 8


def launch(
    script: Annotated[str, typer.Argument(help="Script to run on every rank (with -m: module).")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments; a -- before them is dropped.")] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as for python -m.")] = False,
    nproc: Annotated[str, typer.Option(help="Processes here; auto: one per accelerator, else per core.")] = "auto",
    nnodes: Annotated[int, typer.Option(min=1, help="Hosts; run this command once on each.")] = 1,
    node_rank: Annotated[int | None, typer.Option(min=0, help="This host's number; left out, the hosts agree.")] = None,
    rdzv_endpoint: Annotated[str, typer.Option(help="host:port of the first host, the same on all hosts.")] = "",
    max_restarts: Annotated[int, typer.Option(min=0, help="Start all ranks again after a failure, this often.")] = 0,
    pin: Annotated[bool | None, typer.Option(help=_PIN, show_default="on CPU with 2 or more each")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep every rank's output and traceback here.")] = None,
) -> None:
    """Start SCRIPT on every rank and show each line of output behind its rank.

    When ranks fail, the traceback of the first that failed comes first, and its exit code is the command's. When a
    collective of the optimizer failed, one page says where every rank stood: which buckets were reduced, which waited,
    which parameters never got a gradient (LOG_DIR/waits.txt too, from each rank's waits.RANK.json).
    On CPU, OMP_NUM_THREADS and glibc's MALLOC_* variables are set where they are not set already, and ranks are kept to
    cores of their own.
    """
    console = Console(stderr=True)
    if not module and not Path(script).is_file():
        raise typer.BadParameter(f"expected a file, got {script!r} (a module? add -m)", param_hint="SCRIPT")
    if nnodes > 1 and not rdzv_endpoint:
        raise typer.BadParameter("expected host:port of the first host with --nnodes > 1", param_hint="--rdzv-endpoint")
    script_args = args[1:] if args and args[0] == "--" else args or []
    num_local = _count_processes(nproc)
    cores = share_cores(num_local, pin, find_cores(allowed_cpus()))
    _announce(console, num_local, nnodes, cores)
    with _log_folder(log_dir) as folder:
        config = _config(num_local, nnodes, node_rank, rdzv_endpoint, max_restarts, folder)
        command = _command(cores, [*(["-m"] if module else []), script, *script_args])
        code = _run(console, config, command, Path(folder))
    if code and log_dir is not None:
        console.print(f"distadam launch: logs in {log_dir}", highlight=False)
    raise typer.Exit(code)


def launch_here(nproc: str, module: str, args: list[str]) -> int:
    """Run ``python -m module args`` on ``nproc`` ranks of this host, set up as by `launch`; return the exit code."""
    console = Console(stderr=True)
    num_local = _count_processes(nproc)
    cores = share_cores(num_local, None, find_cores(allowed_cpus()))
    _announce(console, num_local, 1, cores)
    with _log_folder(None) as folder:
        config = _config(num_local, 1, None, "", 0, folder)
        return _run(console, config, _command(cores, ["-m", module, *args]), Path(folder))


def cpu_environment(num_local: int, num_cores: int) -> dict[str, str]:
    """Return the variables that suit ``num_local`` CPU ranks on one host and are not set already."""
    wanted = {"OMP_NUM_THREADS": str(max(1, num_cores // num_local))}
    if platform.libc_ver()[0] == "glibc":
        wanted |= _ALLOCATOR  # Note [Allocator settings]
    return {name: value for name, value in wanted.items() if name not in os.environ}


def share_cores(num_local: int, pin: bool | None, cores: list[list[int]]) -> list[list[int]]:
    """Return each local rank's CPUs; nothing where ranks are not kept to any. Note [Pinning].

    Args:
        num_local: ranks of this host.
        pin: what the user asks for; None: what suits.
        cores: that ranks may use, from `find_cores`.
    """
    if pin is False:
        return []
    refusal = ""
    if torch.accelerator.is_available():
        refusal = "ranks on CPU: one that drives an accelerator should be near it, which is not looked at here"
    elif not hasattr(os, "sched_setaffinity"):
        refusal = f"Linux: {platform.system()} has no way to keep a process to cores"
    elif num_local > len(cores):
        refusal = f"at least one core for each rank but got {num_local} ranks on {len(cores)} cores; use --no-pin"
    if refusal and pin:
        raise typer.BadParameter(f"expected {refusal}", param_hint="--pin")
    if refusal or (pin is None and (num_local == 1 or len(cores) < 2 * num_local)):
        return []
    return divide(cores, num_local)


def _count_processes(nproc: str) -> int:
    if nproc == "auto":
        return torch.accelerator.device_count() if torch.accelerator.is_available() else len(allowed_cpus())
    if not nproc.isdecimal() or int(nproc) < 1:
        raise typer.BadParameter(f"expected a positive number or auto, got {nproc!r}", param_hint="--nproc")
    return int(nproc)


def _announce(console: Console, num_local: int, nnodes: int, cores: list[list[int]]) -> None:
    """Set the environment that the ranks inherit; say so in one line, and which CPUs each rank is kept to."""
    added = {} if torch.accelerator.is_available() else cpu_environment(num_local, len(allowed_cpus()))
    os.environ.update(added)
    what = f"{num_local} process{'es' if num_local > 1 else ''}" + (f" on each of {nnodes} hosts" if nnodes > 1 else "")
    settings = " ".join(f"{name}={value}" for name, value in added.items())
    text = f"distadam launch: {what}" + (f"; set {settings}" if settings else "") + _spell_cores(cores)
    console.print(text, style="dim", highlight=False, soft_wrap=True)


def _spell_cores(cores: list[list[int]]) -> str:
    if not cores:
        return ""
    parts = [f"rank {rank} {spell(cpus)}" for rank, cpus in enumerate(cores)]
    return "; kept to CPUs: " + " | ".join(parts if len(parts) <= _MOST_RANKS else [*parts[:2], "...", parts[-1]])


def _command(cores: list[list[int]], script: list[str]) -> list[str]:
    """Return the interpreter's arguments on each rank."""
    listed = ":".join(",".join(map(str, cpus)) for cpus in cores)
    return ["-u", str(Path(__file__).with_name("worker.py")), *(["--cores", listed] if listed else []), *script]


@contextlib.contextmanager
def _log_folder(log_dir: Path | None) -> Iterator[str]:
    """Yield the folder for the ranks' logs: the user's, or one that goes away."""
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        yield str(log_dir)
        return
    with tempfile.TemporaryDirectory(prefix="distadam-launch-") as folder:
        yield folder


def _config(
    num_local: int, nnodes: int, node_rank: int | None, endpoint: str, max_restarts: int, folder: str
) -> LaunchConfig:
    is_local = nnodes == 1 and not endpoint
    is_static = node_rank is not None and not is_local
    return LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=num_local,
        run_id=str(uuid.uuid4()) if is_local else "distadam",
        rdzv_backend="static" if is_static else "c10d",
        rdzv_endpoint="127.0.0.1:0" if is_local else endpoint,
        rdzv_configs={"rank": node_rank} if is_static else {},
        local_addr="127.0.0.1" if is_local else None,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        log_line_prefix_template=PREFIX_TEMPLATE,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL, tee=Std.ALL),
    )


def _run(console: Console, config: LaunchConfig, command: list[str], folder: Path) -> int:
    """Run the ranks to their end; return the exit code for this process.

    Args:
        console: for failures.
        config: torchelastic's.
        command: of a rank.
        folder: of logs; ranks note there what they do, and where they stood when a collective failed.
    """
    _quiet_torchelastic()
    for stale in (*folder.glob("phase.*"), *folder.glob("waits.*")):
        stale.unlink()
    os.environ[phase.VARIABLE] = str(folder)
    os.environ[dumps.VARIABLE] = str(folder)  # the ranks inherit it: Note [Dumps]
    if config.max_restarts:
        os.environ.setdefault(_OWN_STORE, "1")  # Note [One store a round]
    output, errors = RankLines(sys.stdout), RankLines(sys.stderr)
    escaped = [part.replace("$", "$$") for part in command]  # torchelastic fills in ${...} in arguments
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            elastic_launch(config, sys.executable)(*escaped)
    except ChildFailedError as error:
        _finish(output, errors)
        failures = sort_failures(error.failures)
        print_failures(console, failures, functools.partial(phase.read, folder))
        show_waits(console, folder)
        return failures[0].exit_code
    except (SignalException, KeyboardInterrupt) as error:
        _finish(output, errors)
        number = int(error.sigval) if isinstance(error, SignalException) else 2
        console.print(f"distadam launch: stopped by signal {number}, all processes ended", highlight=False)
        return 128 + number
    _finish(output, errors)
    return 0


def _finish(*streams: RankLines) -> None:
    for stream in streams:
        stream.finish()


def _quiet_torchelastic() -> None:
    """Keep torchelastic's own account of a failure off the screen: ours says the same in fewer lines."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
