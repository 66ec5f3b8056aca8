"""``distadam report``: a run's records as one HTML page, or as numbers; one process, no process group."""

import json
from pathlib import Path
from typing import Annotated

import typer

from distadam.cli.errors import failing
from distadam.diagnostics.report_data import read_run, summary
from distadam.diagnostics.report_page import render

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Folder with rank-<r>.jsonl files.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default RUN/report.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of a page.")] = False,
) -> None:
    """Write RUN as one self-contained HTML page: loss, gradients, time, memory, checkpoints, incidents."""
    with failing(as_json):
        found = read_run(run)
        if as_json:
            typer.echo(json.dumps(summary(found)))
            return
        target = run / "report.html" if out is None else out
        target.write_text(render(found), encoding="utf-8")
        typer.echo(f"written: {target}")
