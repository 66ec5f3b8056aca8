"""``distadam checkpoint``: look at, check, convert and prune checkpoints; one process, no process group."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from distadam import checkpoint as checkpoints
from distadam.cli.errors import failing
from distadam.errors import DistAdamError

__all__ = ["app"]

app = typer.Typer(name="checkpoint", help="Look at, check, convert and prune checkpoints.", no_args_is_help=True)

PathArgument = Annotated[str, typer.Argument(help="Checkpoint folder or URL.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
RenameOption = Annotated[Path | None, typer.Option(help="JSON file: an object from saved names to new ones.")]


@app.command()
def describe(path: PathArgument, as_json: JsonOption = False) -> None:
    """Say what PATH holds: parameters, storages, files. Reads the manifest only."""
    with failing(as_json):
        found = checkpoints.describe(path)
        typer.echo(found.to_json() if as_json else str(found))


@app.command()
def verify(path: PathArgument, as_json: JsonOption = False) -> None:
    """Read every byte of PATH and compare checksums; exit code 1 and every damaged file and tensor if one differs."""
    with failing(as_json):
        with _bar("verify", _nbytes(path)) as progress:
            found = [
                {"error": type(e).__name__, "message": str(e)} for e in checkpoints.problems(path, progress=progress)
            ]
        if as_json:
            typer.echo(json.dumps({"path": path, "good": not found, "problems": found}))
        else:
            for problem in found:
                typer.echo(f"{problem['error']}: {problem['message']}")
            typer.echo(f"{path}: {f'{len(found)} problems' if found else 'every byte is what was written'}")
        raise typer.Exit(1 if found else 0)


@app.command()
def convert(
    path: Annotated[str, typer.Argument(help="Checkpoint, or torch.optim's state dict (*.pt).")],
    to: Annotated[str, typer.Argument(help="*.pt: torch.optim's state dict; *.safetensors: weights; else a folder.")],
    weights: Annotated[str | None, typer.Option(help="With *.pt: the model's weights (*.safetensors or *.pt).")] = None,
    rule: Annotated[str | None, typer.Option(help="With *.pt: adam, adamw, sgd or rmsprop.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of data files of a folder.")] = 1,
    masters: Annotated[bool, typer.Option(help="With *.safetensors: fp32 masters, not 16-bit parameters.")] = False,
    rename: RenameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert between checkpoints, torch.optim's state dict and safetensors."""
    with failing(as_json):
        with _bar("convert", _nbytes(path) or _sizes(path, weights)) as progress:
            written = checkpoints.convert(
                path,
                to,
                weights=weights,
                rule=rule,
                ranks=ranks,
                masters=masters,
                rename=_mapping(rename),
                progress=progress,
            )
        typer.echo(json.dumps({"written": written}) if as_json else f"written: {written}")


@app.command()
def reshard(
    path: PathArgument,
    to: Annotated[str, typer.Argument(help="New folder.")],
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks to write for.")],
    rename: RenameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write PATH again in as many files as RANKS ranks would have written (loading does not need it)."""
    with failing(as_json):
        with _bar("reshard", _nbytes(path)) as progress:
            written = checkpoints.reshard(path, to, ranks=ranks, rename=_mapping(rename), progress=progress)
        typer.echo(json.dumps({"written": written}) if as_json else f"written: {written}")


@app.command()
def prune(
    directory: Annotated[str, typer.Argument(help="Folder that holds checkpoints.")],
    keep_last: Annotated[int, typer.Option(min=1, help="How many committed checkpoints stay.")],
    as_json: JsonOption = False,
) -> None:
    """Delete all but the newest committed checkpoints in DIRECTORY; what is not committed is left alone."""
    with failing(as_json):
        gone = checkpoints.prune(directory, keep_last)
        typer.echo(json.dumps({"deleted": gone}) if as_json else "\n".join(f"deleted: {path}" for path in gone))


def _nbytes(path: str) -> int:
    with contextlib.suppress(DistAdamError):
        return checkpoints.describe(path).nbytes
    return 0


def _sizes(*paths: str | None) -> int:
    return sum(Path(path).stat().st_size for path in paths if path is not None and Path(path).is_file())


def _mapping(rename: Path | None) -> dict[str, str] | None:
    return None if rename is None else {str(key): str(value) for key, value in json.loads(rename.read_text()).items()}


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on stderr where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda nbytes: progress.advance(task, nbytes)
