"""``distadam doctor``: what will go wrong on this machine, before it does."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distadam.cli.launch import launch_here
from distadam.comm.launchers import Found, find
from distadam.doctor import Finding, Question, examine
from distadam.doctor.network import Endpoint
from distadam.doctor.rank import gather_findings, let_rank_0_report, meet
from distadam.doctor.rank import self_test as run_self_test

__all__ = ["doctor"]

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "error": ("ERROR", "bold red")}


def doctor(
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this host, also of the self-test.")] = 2,
    endpoint: Annotated[str, typer.Option(help="host:port where hosts meet; default MASTER_ADDR:MASTER_PORT.")] = "",
    node_rank: Annotated[int | None, typer.Option(min=0, help="This host's number; 0 listens at --endpoint.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Directory that checkpoints will go to.")] = None,
    mpi: Annotated[bool, typer.Option("--mpi", help="MPI will start the ranks: its absence is an error.")] = False,
    self_test: Annotated[bool, typer.Option(help="Run collectives and a sharded step on --nproc ranks.")] = True,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for the self-test's collectives.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON, for programs.")] = False,
) -> None:
    """Look for what stops, slows or falsifies training here; say each finding with its cure.

    Started by torchrun, mpiexec or srun, all ranks take the self-test together and rank 0 reports for every host:
    mpiexec -n 16 python -m distadam doctor. A rank that fails says so, too. The exit code is 1 if there is an error.
    """
    job = _find_job()
    place = _endpoint(endpoint, job)
    question = Question(
        num_local=int(os.environ.get("LOCAL_WORLD_SIZE", nproc)),
        endpoint=place,
        is_first=None if node_rank is None else node_rank == 0,
        checkpoints=checkpoints,
        mpi=mpi,
    )
    if job is not None:
        findings = _in_job(job, question, seconds, self_test)
    else:
        findings = examine(question)
        if self_test:
            findings += _self_test(findings, question, seconds)
    if findings is not None:
        _report(findings, as_json)
        raise typer.Exit(any(finding.level == "error" for finding in findings))


def _find_job() -> Found | None:
    """Return the job that this process is a rank of; None where it would train alone."""
    found = find(os.environ)
    return found if found is not None and (found.kind == "torchrun" or found.world_size > 1) else None


def _endpoint(text: str, job: Found | None) -> Endpoint | None:
    if not text and job is None and "MASTER_ADDR" in os.environ:  # in a job, a store may listen there already
        text = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    try:
        return Endpoint.parse(text) if text else None
    except ValueError as problem:
        raise typer.BadParameter(str(problem), param_hint="--endpoint") from problem


def _self_test(before: list[Finding], question: Question, seconds: float) -> list[Finding]:
    """Start ranks on this host and return what they found."""
    broken = [f for f in before if f.level == "error" and f.check.split(".")[0] in ("versions", "devices", "kernels")]
    broken += [f for f in before if f.level == "error" and f.check in ("network.gloo", "network.nccl")]
    if broken:
        text = f"left out: {', '.join(finding.check for finding in broken)} would make it fail"
        return [Finding(check="self_test", level="warning", text=text, cure="cure the errors, then run it again")]
    with tempfile.TemporaryDirectory(prefix="distadam-doctor-") as folder:
        arguments = [folder, str(seconds), *([str(question.checkpoints)] if question.checkpoints else [])]
        code = launch_here(str(question.num_local), "distadam.doctor.rank", arguments)
        found = Path(folder) / "findings.json"
        if code == 0 and found.exists():
            return [Finding(**entry) for entry in json.loads(found.read_text())]
        reasons = sorted(path.read_text() for path in Path(folder).glob("failed-*"))
    text = f"the self-test failed (exit code {code}): {reasons[0] if reasons else 'a rank ended without a word'}"
    cure = "the traceback above names the rank; cure the other findings first"
    return [Finding(check="self_test", level="error", text=text, cure=cure)]


def _in_job(job: Found, question: Question, seconds: float, self_test: bool) -> list[Finding] | None:
    """Examine each host once and test all ranks together; return the findings on rank 0, None elsewhere.

    What stops the ranks from meeting is a finding as well: rank 0 reports it beside those of its own host, any other
    rank says it in a line and stays until rank 0 has reported.
    """
    began = time.monotonic()
    own: list[Finding] | None = None
    try:
        seats = meet()
        local = [rank for rank, seat in enumerate(seats) if seat.host == seats[job.rank].host]
        num_cores = len({cpu for rank in local for cpu in seats[rank].cpus})
        here = replace(question, num_local=len(local), num_cores=num_cores)
        own = examine(here) if local[0] == job.rank else []
        together = run_self_test(seconds if self_test else 0.0, question.checkpoints, began)
        return gather_findings(own, together)
    except Exception as problem:
        text = f"rank {job.rank} of {job.world_size} ({socket.gethostname()}): {type(problem).__name__}: {problem}"
        if job.rank != 0:
            print(f"distadam doctor: {text}", file=sys.stderr, flush=True)
            let_rank_0_report()
            raise typer.Exit(1) from problem
        place = f"{os.environ.get('MASTER_ADDR', 'none')}:{os.environ.get('MASTER_PORT', 'none')}"
        cure = f"cure the errors above first; all hosts must reach MASTER_ADDR:MASTER_PORT (here {place})"
        failed = Finding(check="self_test", level="error", text=text, cure=cure)
        return [*(examine(question) if own is None else own), failed]


def _report(findings: list[Finding], as_json: bool) -> None:
    worst = max((finding.level for finding in findings), key=["ok", "warning", "error"].index)
    if as_json:
        content: dict[str, Any] = {"level": worst, "findings": [finding.as_dict() for finding in findings]}
        print(json.dumps(content, indent=1), flush=True)  # before MPI may end the job
        return
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark, style = _MARKS[finding.level]
        table.add_row(f"[{style}]{mark}[/]", finding.check, escape(finding.text))
        if finding.cure:
            table.add_row("", "", f"[bold]cure:[/] {escape(finding.cure)}")
    console.print(table)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    console.print(f"distadam doctor: {counts['error']} errors, {counts['warning']} warnings")
