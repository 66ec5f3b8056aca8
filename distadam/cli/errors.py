"""How a command says that it failed."""

import contextlib
import json
from collections.abc import Iterator

import typer

from distadam.errors import DistAdamError


@contextlib.contextmanager
def failing(as_json: bool) -> Iterator[None]:
    """Turn errors into one line and exit code 1."""
    try:
        yield
    except (DistAdamError, OSError) as error:
        if as_json:
            typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
        else:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
