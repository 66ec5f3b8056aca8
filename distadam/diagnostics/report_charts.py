"""Charts as HTML: shapes in SVG that stretches, words as text that does not; every chart has its numbers as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from distadam.diagnostics.report_data import Bin, ParameterMap
from distadam.diagnostics.report_png import BROKEN, MISSING, NUM_SHADES, both

NOTHING = "\u2013"
"""What a table says where nothing was recorded."""

_TABLE_ROWS = 40
_CODES_PER_DECADE = 1000  # a step of 0.2%: three digits; report.js turns codes into numbers
_BROKEN = "not finite"
_LABEL_PX = 15

Show = Callable[[float], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart: its name, its bins, the number of its colour."""

    name: str
    bins: Sequence[Bin]
    color: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at a step: a checkpoint ("save") or an incident ("bad")."""

    step: int
    kind: str


# Numbers in words ----------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """Return a number with four significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    """Return a duration with its unit."""
    if not math.isfinite(value):
        return "not finite"
    if value >= 120:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min" if value >= 3600 else f"{value / 60:.1f} min"
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {unit}"


def nbytes(value: float) -> str:
    """Return an amount of memory with its unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}" if abs(value) < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B"


def steps_of(first: int, last: int) -> str:
    """Return steps in words."""
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


# Scales --------------------------------------------------------------------------------------------------------------


class Scale:
    """Places values between 0 (low) and 1 (high), on a linear or a logarithmic axis, and chooses its labels."""

    def __init__(self, low: float, high: float, *, log: bool = False, zero: bool = False) -> None:
        self.log = log and low > 0
        if self.log:
            self.low, self.high = math.log10(low), math.log10(high)
        else:
            self.low, self.high = (min(0.0, low) if zero else low), high
        if self.high <= self.low:
            room = 0.5 if self.log else abs(self.high) * 0.05 or 0.5
            self.low, self.high = self.low - room, self.high + room
        room = 0.06 * (self.high - self.low)
        self.low = self.low if zero and not self.log and low >= 0 else self.low - room
        self.high += room

    def place(self, value: float) -> float:
        """Return where a finite value lies."""
        value = math.log10(max(value, 1e-300)) if self.log else value
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self) -> list[float]:
        """Return round values inside, four or so."""
        if self.log and self.high - self.low >= 1:
            every = max(1, round((self.high - self.low) / 4))
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            found = [10.0**power for power in powers if power % every == 0]
            if len(found) >= 2:
                return found
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        width = unit * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor * unit - rough))
        first = math.ceil(low / width)
        return [width * number for number in range(first, math.floor(high / width + 1e-9) + 1)]


def step_ticks(first: int, last: int, count: int = 6) -> list[int]:
    """Return the first step, round ones inside, and the last, far enough apart for their labels."""
    rough = max(1.0, (last - first) / count)
    unit = 10 ** math.floor(math.log10(rough))
    width = max(1, min((unit, 2 * unit, 5 * unit, 10 * unit), key=lambda candidate: abs(candidate - rough)))
    room = 0.09 * (last - first)
    inside = [step for step in range(first // width * width, last, width) if first + room < step < last - room]
    return [first, *inside, last] if last > first else [first]


# Lines ---------------------------------------------------------------------------------------------------------------


def line_chart(
    identity: str,
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    show: Show = short,
    log: bool = False,
    zero: bool = False,
    height: int = 200,
    marks: Sequence[Mark] = (),
) -> str:
    """Return lines over steps. A pale band goes from the smallest to the largest value of each bin, a line is its mean.

    Args:
        identity: unique in the page.
        title: what is drawn.
        lines: at least one with a finite value, else the chart is a sentence.
        unit: of the values, unless ``show`` writes it.
        show: writes a value.
        log: use a logarithmic axis if all values are positive and they span more than one power of ten.
        zero: begin the axis at 0.
        height: of the plot, px.
        marks: of checkpoints and incidents.
    """
    finite = [b for line in lines for b in line.bins if math.isfinite(b.low)]
    if not finite:
        return f'<div class="card"><h3>{escape(title)}</h3><p>No finite value was recorded.</p></div>'
    low, high = min(b.low for b in finite), max(b.high for b in finite)
    scale = Scale(low, high, log=log and low > 0 and high > 10 * low, zero=zero)
    first = min(b.first for line in lines for b in line.bins)
    last = max(b.last for line in lines for b in line.bins)
    across = _across(first, last)
    longest = max(lines, key=lambda line: len(line.bins)).bins
    shapes = [f'<path class="grid" d="M0 {_up(scale, tick)}H1000"/>' for tick in scale.ticks()] + [
        _shapes(line, across, scale) for line in lines
    ]
    where = [_middle(b) for b in longest]
    data = {
        "x": [steps_of(b.first, b.last) for b in longest],
        "at": [round(across(step), 5) for step in where],
        "series": [{"name": line.name, "text": _texts(line, longest, show)} for line in lines],
    }
    area = (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        + "".join(_mark(mark, across) for mark in marks if first <= mark.step <= last)
        + _broken(lines, across)
    )
    labels = "".join(
        f'<span style="top:{100 - 100 * scale.place(tick):.2f}%">{escape(show(tick))}</span>' for tick in scale.ticks()
    )
    note = f"{unit}, logarithmic axis" if scale.log and unit else "logarithmic axis" if scale.log else unit
    key = _key(lines) if len(lines) > 1 else ""
    return _figure(
        identity, title, note, key, area, labels, first, last, data, _line_table(title, lines, show), height=height
    )


def _across(first: int, last: int) -> Callable[[float], float]:
    span = max(1, last - first)
    return lambda step: (step - first) / span


def _middle(one: Bin) -> float:
    return (one.first + one.last) / 2


def _up(scale: Scale, value: float) -> str:
    return f"{1000 - 1000 * scale.place(value):.1f}"


def _shapes(line: Line, across: Callable[[float], float], scale: Scale) -> str:
    """Return the band and the line, in runs between values that are not finite."""
    runs: list[list[Bin]] = [[]]
    for one in line.bins:
        if math.isfinite(one.low):
            runs[-1].append(one)
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in runs:
        if not run:
            continue
        xs = [f"{1000 * across(_middle(one)):.1f}" for one in run]
        if any(one.high > one.low for one in run):
            there = [f"{x} {_up(scale, one.high)}" for x, one in zip(xs, run, strict=True)]
            back = [f"{x} {_up(scale, one.low)}" for x, one in zip(xs, run, strict=True)][::-1]
            parts.append(f'<path class="band" d="M{"L".join(there + back)}Z"/>')
        points = [f"{x} {_up(scale, one.mean)}" for x, one in zip(xs, run, strict=True)]
        points = points if len(points) > 1 else [points[0], f"{float(xs[0]) + 2:.1f} {_up(scale, run[0].mean)}"]
        parts.append(f'<path class="line" d="M{"L".join(points)}"/>')
    return f'<g style="--c:var(--c{line.color % 7})">{"".join(parts)}</g>'


def _texts(line: Line, along: Sequence[Bin], show: Show) -> list[str | None]:
    """Return what to say of a line at each bin of the longest one."""
    by_first = {one.first: one for one in line.bins}
    texts: list[str | None] = []
    for place in along:
        one = by_first.get(place.first)
        if one is None:
            texts.append(None)
        elif not math.isfinite(one.low):
            texts.append("not finite")
        else:
            spread = f" ({show(one.low)} to {show(one.high)})" if one.high > one.low else ""
            texts.append(show(one.mean) + spread + (f", {one.nonfinite} not finite" if one.nonfinite else ""))
    return texts


def _mark(mark: Mark, across: Callable[[float], float]) -> str:
    return f'<i class="mark {mark.kind}" style="left:{100 * across(mark.step):.2f}%"></i>'


def _broken(lines: Sequence[Line], across: Callable[[float], float]) -> str:
    steps = {_middle(one) for line in lines for one in line.bins if one.nonfinite}
    return "".join(f'<i class="mark bad" style="left:{100 * across(step):.2f}%"></i>' for step in sorted(steps))


def _key(lines: Sequence[Line]) -> str:
    return key([(line.name, f"var(--c{line.color % 7})") for line in lines])


def key(entries: Sequence[tuple[str, str]], extra: str = "") -> str:
    """Return a legend of (name, colour)."""
    items = "".join(f'<li><i style="--c:{color}"></i>{escape(name)}</li>' for name, color in entries)
    return f'<ul class="key">{items}{extra}</ul>'


def _line_table(title: str, lines: Sequence[Line], show: Show) -> str:
    """Return at most `_TABLE_ROWS` rows of a chart's numbers: each the extremes of its steps."""
    header = "".join(
        f'<th class="n" scope="col">{escape(f"{line.name}, {what}" if len(lines) > 1 else what)}</th>'
        for line in lines
        for what in ("mean", "smallest", "largest")
    )
    longest = max((line.bins for line in lines), key=len)
    every = max(1, -(-len(longest) // _TABLE_ROWS))
    by_first = [{one.first: one for one in line.bins} for line in lines]
    rows = []
    for start in range(0, len(longest), every):
        group = longest[start : start + every]
        cells = "".join(_cells([known[b.first] for b in group if b.first in known], show) for known in by_first)
        rows.append(f'<tr><th scope="row">{steps_of(group[0].first, group[-1].last)}</th>{cells}</tr>')
    head = f'<tr><th scope="col">steps</th>{header}</tr>'
    return f"<table><caption>{escape(title)}</caption><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _cells(group: Sequence[Bin], show: Show) -> str:
    finite = [one for one in group if math.isfinite(one.low)]
    if not finite:
        texts = ["not finite" if group else "nothing"] * 3
    else:
        mean = sum(one.mean for one in finite) / len(finite)
        texts = [show(value) for value in (mean, min(b.low for b in finite), max(b.high for b in finite))]
    return "".join(f'<td class="n">{escape(text)}</td>' for text in texts)


def _figure(
    identity: str,
    title: str,
    note: str,
    legend: str,
    area: str,
    labels: str,
    first: int,
    last: int,
    data: Mapping[str, object],
    table: str,
    *,
    height: int,
    gutter: int = 66,
    names: bool = False,
) -> str:
    """Return the frame that all charts with a step axis have: heading, plot, axes, slider, table."""
    across = _across(first, last)
    ticks = step_ticks(first, last)
    along = "".join(
        f'<span{" class=end" if len(ticks) > 1 and step == last else ""} style="left:{100 * across(step):.2f}%">'
        f"{'step ' if step == first else ''}{step:,}</span>"
        for step in ticks
    )
    columns = data["x"]
    assert isinstance(columns, list)
    how = ", arrow up and down for the parameter" if names else ""
    slider = (
        f'<input type="range" min="0" max="{max(0, len(columns) - 1)}" value="{max(0, len(columns) - 1)}" step="1"'
        f' aria-label="{escape(title)}: arrow keys move along the steps{how}" aria-valuetext="{escape(columns[-1])}">'
    )
    cross = '<i class="cross"></i>' + ('<i class="cross-row"></i>' if names else "")
    # "<" cannot end the script element early; the rest of JSON is harmless there.
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    unit = f'<span class="unit">{escape(note)}</span>' if note else ""
    return (
        f'<figure class="card" data-id="{identity}" style="margin:0 0 16px">'
        f"<figcaption><h3>{escape(title)}</h3>{unit}{legend}<output></output></figcaption>"
        f'<div class="plot" style="--height:{height}px;--gutter:{gutter}px">'
        f'<div class="y{" names" if names else ""}">{labels}</div><div class="area">{area}{cross}{slider}</div>'
        f'<div class="x">{along}</div></div>'
        f"<details><summary>{escape(title)} as a table</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}, table">{table}</div></details>'
        f'<script type="application/json" id="{identity}">{payload}</script></figure>'
    )


# Maps ----------------------------------------------------------------------------------------------------------------


def parameter_map(identity: str, title: str, unit: str, found: ParameterMap, metric: str) -> str:
    """Return one metric over steps and parameters as colours; a cell shows the largest value of its steps."""
    columns, names = found.high[metric], list(found.rows)
    ordered = sorted(value for column in columns for value in column if 0.0 < value < math.inf)
    if not ordered:
        return ""
    # One tiny value must not take all shades.
    low, high = math.log10(ordered[len(ordered) // 100]), math.log10(ordered[-1])
    codes = [_codes(column, len(names)) for column in columns]
    offset, scale = -_CODES_PER_DECADE * low, (NUM_SHADES - 1) / (_CODES_PER_DECADE * max(high - low, 1e-9))

    def shade(code: int | str | None) -> int:
        if type(code) is int:
            return max(0, min(NUM_SHADES - 1, round((code + offset) * scale)))
        return MISSING if code is None else BROKEN if code == _BROKEN else 0

    shades = {code: shade(code) for code in {code for column in codes for code in column}}
    table = list(zip(*codes, strict=True))  # by parameter
    light, dark = both([bytes([shades[code] for code in row]) for row in table])
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(title)}: {len(names)} parameters over steps"></picture>'
    )
    first, last = found.columns[0][0], found.columns[-1][1]
    height = min(520, max(120, _LABEL_PX * len(names)))
    data = {
        "x": [steps_of(*column) for column in found.columns],
        # Cells are equally wide, and columns are equally many records: the middle of a cell is its place.
        "at": [round((index + 0.5) / len(columns), 5) for index in range(len(columns))],
        "rows": names,
        "codes": table,
    }
    return _figure(
        identity,
        title,
        unit,
        _ramp(low, high, any(_BROKEN in row for row in table)),
        picture,
        _row_labels(names, height),
        first,
        last,
        data,
        _map_table(title, found, metric),
        height=height,
        gutter=190,
        names=True,
    )


def _codes(column: Sequence[float], num_rows: int) -> list[int | str | None]:
    """Return what the page keeps of a column: thousandths of a decade, words for what has no logarithm, or nothing."""
    log10, each = math.log10, _CODES_PER_DECADE
    codes: list[int | str | None] = [
        round(each * log10(value)) if 0.0 < value < math.inf else _word(value) for value in column
    ]
    return codes + [None] * (num_rows - len(codes))


def _word(value: float) -> str | None:
    return None if math.isnan(value) else "0" if value <= 0 else _BROKEN


def _row_labels(names: Sequence[str], height: int) -> str:
    every = max(1, math.ceil(len(names) * _LABEL_PX / height))
    rows = range(0, len(names), every)
    return "".join(
        f'<span style="top:{100 * (row + 0.5) / len(names):.2f}%">{escape(names[row])}</span>' for row in rows
    )


def _ramp(low: float, high: float, broken: bool) -> str:
    light, dark = both([bytes(range(NUM_SHADES))])
    bar = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt=""></picture>'
    ends = f"{short(10**low)}{bar}{short(10**high)}"
    extra = key([("not finite", "var(--alarm)")]) if broken else ""
    return f'<span class="ramp">{ends}</span>{extra}'


def _map_table(title: str, found: ParameterMap, metric: str) -> str:
    rows, last = [], found.last(metric)
    for name, (value, step) in found.worst(metric).items():
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td class="n">{escape(short(value))}</td>'
            f'<td class="n">{step:,}</td><td class="n">{escape(short(last[name]))}</td></tr>'
        )
    head = "".join(
        f'<th scope="col"{"" if what == "parameter" else " class=n"}>{what}</th>'
        for what in ("parameter", "largest", "at step", "last")
    )
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


# Stacked bars --------------------------------------------------------------------------------------------------------


def stacked_bars(title: str, rows: Sequence[tuple[str, Mapping[str, float]]], show: Show) -> str:
    """Return a table with one bar for each row, divided by part; the longest bar fills its cell."""
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    kinds.sort(key=lambda kind: kind == "elsewhere")
    colors = {kind: f"var(--c{index % 7})" for index, kind in enumerate(kinds)} | {"elsewhere": "var(--rest)"}
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    body = []
    for name, parts in rows:
        bars = "".join(
            f'<i style="--c:{colors[kind]};width:{100 * parts[kind] / longest:.3f}%"></i>'
            for kind in kinds
            if parts.get(kind)
        )
        cells = "".join(f'<td class="n">{escape(show(parts[k])) if k in parts else NOTHING}</td>' for k in kinds)
        total = escape(show(sum(parts.values())))
        body.append(
            f'<tr><th scope="row">{escape(name)}</th><td class="bar"><div class="stack" aria-hidden="true">{bars}</div>'
            f'</td><td class="n">{total}</td>{cells}</tr>'
        )
    head = "".join(f'<th class="n" scope="col">{escape(kind)}</th>' for kind in ("total", *kinds))
    return (
        f'<div class="card"><figcaption><h3>{escape(title)}</h3>'
        f"{key([(kind, colors[kind]) for kind in kinds])}</figcaption>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><table><thead><tr>'
        f'<th scope="col">rank</th><th scope="col">share</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        "</div></div>"
    )
