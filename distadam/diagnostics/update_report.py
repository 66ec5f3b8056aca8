"""What `check_updates` found, by parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distadam.diagnostics.agreement import Disagreement
from distadam.diagnostics.shards import spell
from distadam.layout.layout import format_table


@dataclass(slots=True, kw_only=True)
class UpdateRow:
    """One parameter.

    Attributes:
        parameter: its name.
        num_elements: how many elements were checked, over all ranks and steps.
        worst: the largest error in units of the bound of contract 2.3.1; what is above 1 is wrong.
        what: "weight" or the state that has it.
        index: its element.
        rank: whose shard it lies in.
        expected, actual: the number from the formula, and what is stored.
        bits_lost: of the weight, by storing it: of the 24 (53) bits that the update computes in.
        state_bits_lost: the same, of the state that loses most.
        should_move, frozen: elements whose weight the formula changes; those of them that stayed what they were.
        findings: what else is wrong, in words.
    """

    parameter: str
    num_elements: int = 0
    worst: float = 0.0
    what: str = ""
    index: tuple[int, ...] | None = None
    rank: int = 0
    expected: float = 0.0
    actual: float = 0.0
    bits_lost: float = 0.0
    state_bits_lost: float = 0.0
    should_move: int = 0
    frozen: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.worst <= 1 and not self.findings

    def merge(self, other: UpdateRow) -> None:
        """Take in what another rank or step found of the same parameter."""
        if other.worst > self.worst or not self.what:
            for name in ("worst", "what", "index", "rank", "expected", "actual"):
                setattr(self, name, getattr(other, name))
        self.num_elements += other.num_elements
        self.should_move += other.should_move
        self.frozen += other.frozen
        self.bits_lost = max(self.bits_lost, other.bits_lost)
        self.state_bits_lost = max(self.state_bits_lost, other.state_bits_lost)
        self.findings += [finding for finding in other.findings if finding not in self.findings]

    def __str__(self) -> str:
        if self.findings:
            return "; ".join(self.findings)
        where = spell(self.parameter, self.index)
        what = "" if self.what == "weight" else f"{self.what} of "
        return (
            f"{what}{where} on rank {self.rank}: expected {self.expected:.9g} by the formula but got "
            f"{self.actual:.9g}: {self.worst:.3g} x the bound"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What `check_updates` found; the same on every rank.

    Attributes:
        rows: by parameter, in the optimizer's order.
        disagreements: parameters that differ between ranks, before the step and after it.
        num_steps: how many steps were checked.
    """

    rows: tuple[UpdateRow, ...]
    disagreements: tuple[Disagreement, ...]
    num_steps: int

    @property
    def ok(self) -> bool:
        """Whether every update was right and all ranks hold the same parameters."""
        return not self.disagreements and all(row.ok for row in self.rows)

    @property
    def worst(self) -> UpdateRow | None:
        """The parameter with the largest error."""
        return max(self.rows, key=lambda row: row.worst, default=None)

    @property
    def problems(self) -> list[str]:
        """What is wrong, one line each, the worst first."""
        wrong = sorted((row for row in self.rows if not row.ok), key=lambda row: -row.worst)
        return [*map(str, self.disagreements), *map(str, wrong)]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON but for numbers that are not finite."""
        return {
            "ok": self.ok,
            "steps": self.num_steps,
            "problems": self.problems,
            "parameters": [asdict(row) | {"ok": row.ok} for row in self.rows],
            "disagreements": [disagreement.as_dict() for disagreement in self.disagreements],
        }

    def to_json(self) -> str:
        """Return ``as_dict()`` as JSON."""
        from distadam.diagnostics.sinks import finite

        return json.dumps(finite(self.as_dict()), allow_nan=False)

    def __str__(self) -> str:
        header = ("parameter", "checked", "error / bound", "where", "bits lost", "state", "should move", "frozen", "")
        rows: list[Sequence[str]] = [header]
        for row in self.rows:
            where = "" if row.index is None else f"{row.what}[{', '.join(map(str, row.index))}] rank {row.rank}"
            rows.append(
                (
                    row.parameter,
                    f"{row.num_elements:,}",
                    f"{row.worst:.3g}",
                    where,
                    f"{row.bits_lost:.1f}",
                    f"{row.state_bits_lost:.1f}",
                    f"{row.should_move:,}",
                    f"{row.frozen:,}",
                    "" if row.ok else "WRONG",
                )
            )
        return "\n".join([format_table(rows, left=(0, 3, 8)), *self.problems])
