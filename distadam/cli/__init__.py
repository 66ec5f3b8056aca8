"""The command line: one file per command, put together here.

The commands are a face on the package: they may import it, nothing in it imports them.
"""

from typing import Annotated

import typer

from distadam import __version__
from distadam.cli.bench import bench
from distadam.cli.checkpoint import app as checkpoint
from distadam.cli.doctor import doctor
from distadam.cli.launch import launch
from distadam.cli.report import report

__all__ = ["app", "main"]

app = typer.Typer(
    name="distadam",
    help="Train with optimizer state sharded over data-parallel processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distadam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train with optimizer state sharded over data-parallel processes."""


# Everything behind the script belongs to the script, options included.
app.command(context_settings={"allow_interspersed_args": False})(launch)
app.command()(doctor)
app.add_typer(bench)
app.add_typer(checkpoint)
app.command()(report)


def main() -> None:
    """Run the ``distadam`` command line; ends the process with the command's exit code."""
    app()
