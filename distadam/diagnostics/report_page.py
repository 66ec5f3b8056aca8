"""The page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from distadam.diagnostics.report_charts import (
    NOTHING,
    Line,
    Mark,
    line_chart,
    nbytes,
    parameter_map,
    seconds,
    short,
    stacked_bars,
)
from distadam.diagnostics.report_data import Record, Run, number, read_run, thin

__all__ = ["read_run", "render"]

_NUM_RANK_LINES = 4
_NUM_RANK_ROWS = 32


def render(run: Run) -> str:
    """Return the page."""
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = f"{run.about.get('optimizer') or 'Run'}: {run.folder.resolve().name}"
    sections = [_training(run), _layers(run), _time(run), _memory(run), _checkpoints(run), _incidents(run)]
    lines = f" {run.num_unreadable} lines could not be read." if run.num_unreadable else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>"
        f'<header class="head"><h1>{escape(title)}</h1><p>{escape(_subtitle(run))}</p>{_figures(run)}</header>'
        f"<main>{''.join(sections)}"
        "<p class=note>Point at a chart, or reach it with Tab and use the arrow keys, to read its values. A pale band "
        "spans the smallest and largest value of the steps that share a point; the line is their mean.</p></main>"
        f'<footer class="head">Written by distadam report.{lines}</footer>'
        f"<script>\n{script}</script></body></html>\n"
    )


def _subtitle(run: Run) -> str:
    about = run.about
    parts = [
        f"{about.get('ranks', len(run.ranks))} ranks" if run.ranks != [0] or about.get("ranks", 1) != 1 else "1 rank"
    ]
    names = about.get("parameters") or run.parameters.rows
    if names:
        parts.append(f"{len(names):,} parameters")
    times = [
        number(record["time"]) for records in run.steps.values() for record in records.values() if "time" in record
    ]
    begin = number(about["time"]) if "time" in about else min(times, default=math.nan)
    if math.isfinite(begin):
        parts.append(f"began {datetime.fromtimestamp(begin, timezone.utc):%Y-%m-%d %H:%M} UTC")
        if times and max(times) > begin:
            parts.append(f"took {seconds(max(times) - begin)}")
    return " · ".join(parts)


def _figures(run: Run) -> str:
    told = sorted({step for records in run.steps.values() for step in records})
    loss = run.over_ranks("loss")
    finite = [value for _, value in loss if math.isfinite(value)]
    step_s = [value for rank in run.ranks for _, value in run.points("step_s", rank)]
    speed = [value for _, value in run.over_ranks("tokens_per_s")]
    memory = max((sum(run.peak_memory(rank).values()) for rank in run.ranks), default=0)
    figures = [("steps", f"{told[-1]:,}" if told else "0", "", False)]
    if loss:
        lowest = f"lowest {short(min(finite))}" if finite else ""
        figures.append(("last loss", short(loss[-1][1]), lowest, not math.isfinite(loss[-1][1])))
    if step_s:
        figures.append(("step time", seconds(median(step_s)), f"longest {seconds(max(step_s))}", False))
    if speed:
        figures.append(("tokens per second", f"{median(speed):,.0f}", "median", False))
    if memory:
        figures.append(("most memory", nbytes(memory), "of one rank, in the optimizer", False))
    figures.append(("incidents", str(len(run.incidents)), "", bool(run.incidents)))
    cells = [
        f"<div{' class=bad' if bad else ''}><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note, bad in figures
    ]
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _section(heading: str, text: str, *charts: str) -> str:
    body = "".join(charts)
    return f"<section><h2>{heading}</h2><p>{text}</p>{body}</section>" if body else ""


def _training(run: Run) -> str:
    marks = [Mark(step=int(record["step"]), kind="save") for record in run.checkpoints if "step" in record]
    marks += [Mark(step=int(record["step"]), kind="bad") for record in run.incidents if "step" in record]
    charts = []
    drawn: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("loss", "Loss", {"height": 260, "log": True}),
        ("grad_norm", "Gradient norm", {"log": True}),
        ("lr", "Learning rate", {"height": 130, "zero": True}),
        ("loss_scale", "Loss scale", {"height": 130, "log": True}),
    )
    for name, title, options in drawn:
        points = run.over_ranks(name)
        if points and not (name == "loss_scale" and len({value for _, value in points}) == 1):
            lines = [Line(name=title, bins=thin(points))]
            if name == "lr":
                lines = _rates(run)
            charts.append(line_chart(name, title, lines, marks=marks, **options))
    legend = " Triangles are checkpoints." if run.checkpoints else ""
    legend += " Dashed lines are incidents and values that are not finite." if _any_bad(run) else ""
    return _section("Training", f"What the run learned, step by step.{legend}", *charts)


def _any_bad(run: Run) -> bool:
    return bool(run.incidents) or any(not math.isfinite(value) for _, value in run.over_ranks("loss"))


def _rates(run: Run) -> list[Line]:
    """Return a line for each rate that differs from those of earlier groups."""
    records = run.steps[run.ranks[0]]
    by_group: list[list[tuple[int, float]]] = []
    for step, record in sorted(records.items()):
        rates = record.get("lr")
        for group, rate in enumerate(rates if isinstance(rates, list) else [] if rates is None else [rates]):
            if group == len(by_group):
                by_group.append([])
            by_group[group].append((step, number(rate)))
    distinct = [points for index, points in enumerate(by_group) if points not in by_group[:index]][:6]
    named = len(distinct) > 1
    return [
        Line(name=f"group {by_group.index(points)}" if named else "rate", bins=thin(points), color=index)
        for index, points in enumerate(distinct)
    ]


def _layers(run: Run) -> str:
    found = run.parameters
    text = (
        "Each row is a parameter, in the order of the model; each cell shows the largest value of its steps, on a "
        "logarithmic scale."
    )
    if not found.columns:
        return ""
    return _section(
        "Parameters",
        text,
        parameter_map("map-grad", "Gradient norm by parameter", "", found, "grad_norm"),
        parameter_map(
            "map-update", "Update ratio by parameter", "norm of the update / norm of the weights", found, "update_ratio"
        ),
    )


def _chosen(run: Run, key: str) -> list[tuple[str, int]]:
    """Return all ranks if they are few, else the slowest, the median and the fastest."""
    means = {rank: sum(v for _, v in points) / len(points) for rank in run.ranks if (points := run.points(key, rank))}
    order = sorted(means, key=lambda rank: -means[rank])
    if len(order) <= _NUM_RANK_LINES:
        return [(f"rank {rank}", rank) for rank in sorted(order)]
    picked = (("slowest", order[0]), ("median", order[len(order) // 2]), ("fastest", order[-1]))
    return [(f"{word}: rank {rank}", rank) for word, rank in picked]


def _time(run: Run) -> str:
    lines = [
        Line(name=name, bins=thin(run.points("step_s", rank)), color=index)
        for index, (name, rank) in enumerate(_chosen(run, "step_s"))
    ]
    charts = [line_chart("time", "Step time", lines, show=seconds, zero=True)] if lines else []
    rows = [(f"rank {rank}", parts) for rank in run.ranks if (parts := run.parts(rank))]
    rows = sorted(rows, key=lambda row: -sum(row[1].values()))[:_NUM_RANK_ROWS] if len(rows) > _NUM_RANK_ROWS else rows
    if rows:
        charts.append(stacked_bars("Where a step's time goes, by rank", rows, seconds))
    speed = run.over_ranks("tokens_per_s")
    if speed:
        one = [Line(name="tokens per second", bins=thin(speed))]
        charts.append(line_chart("speed", "Speed", one, unit="tokens per second, all ranks", zero=True, height=130))
    text = "Reduce, gather and agree are time spent waiting; elsewhere is what no span covers."
    return _section("Time", text, *charts)


def _memory(run: Run) -> str:
    rows: list[tuple[str, dict[str, float]]] = [
        (f"rank {rank}", {kind.replace("_", " "): float(n) for kind, n in memory.items()})
        for rank in run.ranks
        if (memory := run.peak_memory(rank))
    ]
    chart = stacked_bars("Memory in the optimizer, by kind", rows[:_NUM_RANK_ROWS], nbytes) if rows else ""
    return _section("Memory", "The most bytes of each kind that a rank has had.", chart)


def _table(caption: str, header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in header)
    kinds = [kind for _, kind in header]
    cells = [
        "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return (
        f'<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _checkpoints(run: Run) -> str:
    def row(record: Record) -> list[str]:
        took, size = record.get("seconds"), record.get("bytes")
        speed = f"{nbytes(number(size) / number(took))}/s" if took and size else NOTHING
        return [
            _step(record),
            str(record.get("path", "")),
            seconds(number(took)) if took is not None else NOTHING,
            nbytes(number(size)) if size is not None else NOTHING,
            speed,
        ]

    header = [("step", "n"), ("path", "long"), ("time", "n"), ("size", "n"), ("speed", "n")]
    table = _table("Checkpoints", header, [row(record) for record in run.checkpoints]) if run.checkpoints else ""
    return _section("Checkpoints", f"{len(run.checkpoints)} were saved.", table)


def _incidents(run: Run) -> str:
    def row(record: Record) -> list[str]:
        when = (
            f"{datetime.fromtimestamp(number(record['time']), timezone.utc):%H:%M:%S}" if "time" in record else NOTHING
        )
        return [
            _step(record),
            str(record.get("rank", NOTHING)),
            when,
            str(record.get("what", "")),
            _words(record.get("detail")),
        ]

    header = [("step", "n"), ("rank", "n"), ("time (UTC)", "n"), ("what", ""), ("detail", "long")]
    table = _table("Incidents", header, [row(record) for record in run.incidents]) if run.incidents else ""
    return _section("Incidents", "What went wrong, in order of time.", table)


def _step(record: Record) -> str:
    return f"{int(record['step']):,}" if record.get("step") is not None else NOTHING


def _words(detail: Any) -> str:
    if isinstance(detail, dict):
        return ", ".join(f"{key} {value}" for key, value in detail.items())
    return "" if detail is None else str(detail)
