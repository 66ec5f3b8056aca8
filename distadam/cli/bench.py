"""``distadam bench``: how fast this machine sends, updates and steps, and whether that has changed."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from distadam.cli.bench_results import Result, Run, compare_table, read_run, results_table
from distadam.cli.launch import launch_here

__all__ = ["bench"]

bench = typer.Typer(name="bench", help="Measure this machine.", no_args_is_help=True)

_Nproc = Annotated[str, typer.Option(help="Processes; auto: one per accelerator, else per core.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Timed repeats of each measurement.")]
_Json = Annotated[Path | None, typer.Option("--json", help="Write the results here.")]


@bench.command()
def comm(
    nproc: _Nproc = "auto",
    sizes: Annotated[str, typer.Option(help="MiB of float32, comma separated.")] = "1,4,16,64",
    repeats: _Repeats = 7,
    json_path: _Json = None,
    compare_with: Annotated[Path | None, typer.Option("--compare", help="Show these results too.")] = None,
) -> None:
    """Reduce-scatter and all-gather by size and transport, through distadam's own collectives."""
    _run("comm", nproc, _numbers(sizes), repeats, json_path, compare_with)


@bench.command()
def step(
    nproc: _Nproc = "auto",
    sizes: Annotated[str, typer.Option(help="Million parameters, comma separated.")] = "25",
    repeats: _Repeats = 7,
    json_path: _Json = None,
    compare_with: Annotated[Path | None, typer.Option("--compare", help="Show these results too.")] = None,
) -> None:
    """A whole AdamW step of a stack of linear layers, its forward and backward alone, and the update alone."""
    _run("step", nproc, _numbers(sizes), repeats, json_path, compare_with)


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(help="What --json wrote.")],
    after: Annotated[Path, typer.Argument(help="What --json wrote later.")],
) -> None:
    """Show two files beside each other; a difference is noise while the times of the two overlap."""
    Console().print(compare_table(read_run(before), read_run(after)))


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0:
        raise typer.BadParameter(f"expected positive numbers with commas between, got {text!r}", param_hint="--sizes")
    return numbers


def _run(kind: str, nproc: str, sizes: list[float], repeats: int, target: Path | None, other: Path | None) -> None:
    before = read_run(other) if other is not None else None
    with tempfile.TemporaryDirectory(prefix="distadam-bench-") as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        total = len(sizes) * (6 if kind == "comm" else 3)
        with _Watch(results, total):
            code = launch_here(nproc, "distadam.cli.bench_rank", [kind, json.dumps(sizes), str(repeats), folder])
        if code:
            raise typer.Exit(code)
        found = [Result(**json.loads(line)) for line in results.read_text().splitlines()]
    run = Run.of(" ".join(["distadam", *sys.argv[1:]]), found)
    Console().print(results_table(run))
    if target is not None:
        run.write(target)
    if before is not None:
        Console().print(compare_table(before, run))


class _Watch:
    """A progress bar that counts the lines of a file, while the main thread waits for the ranks."""

    def __init__(self, path: Path, total: int) -> None:
        self._path, self._total, self._over = path, total, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("measuring", total=self._total)
            while not self._over.wait(0.1):
                progress.update(task, completed=len(self._path.read_text().splitlines()))
