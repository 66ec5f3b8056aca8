"""From raw results of `peers.py` to a table (Markdown) and a picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from contenders import CONTENDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the table says of one contender; times in ms, sizes in bytes, by round where there is a list."""

    label: str
    allocator: str
    step: list[float]
    ratio: list[float]
    outside: list[float]
    wire: list[float]
    pss: float
    pss_above_start: float
    rss: float
    loss: float
    deviation: float | None


def step_ms(ranks: list[dict[str, Any]], what: str = "step_s") -> float:
    """Return the median step of a round; a step takes as long as on the slowest rank."""
    return 1e3 * median(max(times) for times in zip(*(rank[what] for rank in ranks), strict=True))


def baseline(rounds: list[dict[str, Any]]) -> str | None:
    """Return what ratios refer to: DDP without allocator settings, if it ran."""
    return next((key for key in ("ddp/plain", "ddp/set") if key in rounds[0]), None)


def rows(section: dict[str, Any]) -> list[Row]:
    """Return the rows of a section, contenders in their own order, each without the allocator settings first."""
    rounds = section["rounds"]
    base = baseline(rounds)
    found = []
    for name in CONTENDERS:
        for allocator in ("plain", "set"):
            key = f"{name}/{allocator}"
            here = [results for results in rounds if key in results]
            if not here:
                continue
            if name == "compute":
                found.append(_row(here, key, base, "compute alone", allocator, "backward_s"))
                found.append(_row(here, key, base, "compute + local AdamW(fused)", allocator))
            else:
                found.append(_row(here, key, base, CONTENDERS[name].label, allocator))
    return found


def _row(
    rounds: list[dict[str, Any]], key: str, base: str | None, label: str, allocator: str, what: str = "step_s"
) -> Row:
    step = [step_ms(results[key], what) for results in rounds]
    alone = [_compute_ms(results, allocator) for results in rounds]
    first = rounds[0][key]
    deviations = [rank["deviation"] for rank in first if rank.get("deviation") is not None]
    return Row(
        label=label,
        allocator=allocator,
        step=step,
        ratio=[ms / step_ms(results[base]) for ms, results in zip(step, rounds, strict=True) if base in results],
        outside=[ms - less for ms, less in zip(step, alone, strict=True) if less is not None],
        wire=[results[key][0]["wire_nbytes"] for results in rounds],
        pss=max(rank["peak_pss"] for rank in first),
        pss_above_start=max(rank["peak_pss"] - rank["pss_before"] for rank in first),
        rss=max(rank["peak_rss"] for rank in first),
        loss=sum(rank["loss"] for rank in first) / len(first),
        deviation=deviations[0] if deviations else None,
    )


def _compute_ms(results: dict[str, Any], allocator: str) -> float | None:
    key = next((key for key in (f"compute/{allocator}", "compute/set", "compute/plain") if key in results), None)
    return None if key is None else step_ms(results[key], "backward_s")


HEAD = (
    "| contender | MALLOC_* | step, ms (min to max) | of DDP + fused (min to max) | outside compute, ms |"
    " loopback, MB | peak PSS, MB | above start | peak RSS | loss | deviation |"
)


def table(section: dict[str, Any]) -> str:
    """Return the section as Markdown."""
    lines = [HEAD, "|---|---|" + "---:|" * 9]
    for row in rows(section):
        ratio = f"{median(row.ratio):.2f} ({min(row.ratio):.2f} to {max(row.ratio):.2f})" if row.ratio else "-"
        outside = f"{median(row.outside):.0f}" if row.outside else "-"
        deviation = "-" if row.deviation is None else f"{row.deviation:.1e}"
        lines.append(
            f"| {row.label} | {row.allocator} | {median(row.step):.0f} ({min(row.step):.0f} to {max(row.step):.0f}) |"
            f" {ratio} | {outside} | {median(row.wire) / 1e6:.1f} | {row.pss / 1e6:.0f} |"
            f" {row.pss_above_start / 1e6:.0f} | {row.rss / 1e6:.0f} | {row.loss:.4f} | {deviation} |"
        )
    for key, reason in section["failed"].items():
        name, allocator = key.split("/")
        short = reason.replace("|", "/")
        lines.append(f"| {CONTENDERS[name].label} | {allocator} | did not run: {short} |" + " |" * 8)
    return "\n".join(lines)


def markdown(run: dict[str, Any], picture: str) -> str:
    """Return the whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    settings = run["settings"]
    parts = [
        "# distadam and its peers",
        f"`{run['command']}` at {run['commit']}, {run['date']}, {run['seconds'] / 60:.1f} minutes.\n"
        f"{run['machine']}, Linux {run['kernel']}; {versions}. Network: {run['network']}.",
        f"fp32, AdamW, one thread per rank. {settings['rounds']} rounds; in each every contender trains"
        f" {settings['steps']} timed steps behind {settings['warm_up']} others. A step is as long as on its slowest"
        " rank. Shown are the median, minimum and maximum over rounds of a round's median; ratios are taken within a"
        " round. *Outside*"
        " *compute* is what a step takes beyond forward and backward alone on one process per rank in the same round."
        " *Loopback* counts bytes of a step on the interface, all ranks together; memory that ranks share is not on it."
        f" Memory is the highest of {settings['memory_steps']} further steps, since allocators need about ten to come"
        " to rest; PSS counts a page that n processes share as 1/n of a page; *above start* leaves out the interpreter"
        " and what was imported. The loss is that of the last timed step; *deviation* is |w - r| / |r - initial|"
        " against parameters r that one process computed on whole batches.",
    ]
    for section in run["sections"]:
        numel = next(iter(section["rounds"][0].values()))[0]["numel"]
        title = f"## {section['model'].upper()} {numel / 1e6:.1f} M, {section['ranks']} ranks"
        parts += [title, f"Reference loss {section['reference_loss']:.4f}.", table(section)]
    return "\n\n".join([*parts, f"![step times]({picture})"]) + "\n"


def draw(run: dict[str, Any], path: Path) -> None:
    """Draw a bar per row: forward and backward alone, and what comes on top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sections = run["sections"]
    height = max(len(rows(section)) for section in sections)
    columns = min(2, len(sections))
    lines = -(-len(sections) // columns)
    shape = {"figsize": (8 * columns, lines * (1.2 + 0.3 * height)), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(lines, columns, **shape)
    for axis in axes.flat[len(sections) :]:
        axis.set_visible(False)
    for axis, section in zip(axes.flat, sections, strict=False):
        found = rows(section)[::-1]
        places = range(len(found))
        steps = [median(row.step) for row in found]
        alone = [median(row.step) - median(row.outside) if row.outside else 0.0 for row in found]
        colors = ["tab:green" if "distadam" in row.label else "tab:blue" for row in found]
        axis.barh(places, steps, color=colors, label="the rest of the step")
        axis.barh(places, alone, color="0.75", label="forward and backward alone")
        errors = [
            [median(row.step) - min(row.step) for row in found],
            [max(row.step) - median(row.step) for row in found],
        ]
        axis.errorbar(steps, places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8)
        marks = {"set": "  MALLOC_* set", "plain": ""}
        axis.set_yticks(places, [f"{row.label}{marks[row.allocator]}" for row in found])
        axis.set(title=f"{section['model'].upper()}, {section['ranks']} ranks", xlabel="ms a step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(run: dict[str, Any], folder: Path, name: str) -> None:
    """Write raw JSON, table and picture; print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=1, default=str) + "\n")
    draw(run, folder / f"{name}.png")
    text = markdown(run, f"{name}.png")
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\n{folder / name}.json, .md, .png")
