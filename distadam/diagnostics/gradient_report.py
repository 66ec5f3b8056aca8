"""What `check_gradients` found, by parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distadam.diagnostics.shards import spell
from distadam.layout.layout import format_table


@dataclass(slots=True, kw_only=True)
class GradientRow:
    """One parameter.

    Attributes:
        parameter: its name.
        num_elements: how many elements were compared with the average of the ranks' own gradients.
        average_error: the largest error against that average, relative to the mean of their magnitudes.
        average_index: the element that has it.
        difference_error: the largest error against central differences, relative to the larger of the number itself
            and the root mean square of the parameter's gradient.
        difference_index: the element that has it.
        ranks: ranks that have a gradient of this parameter.
        findings: what is wrong, in words.
        remarks: what is not wrong but worth knowing.
    """

    parameter: str
    num_elements: int = 0
    average_error: float = 0.0
    average_index: tuple[int, ...] | None = None
    difference_error: float = 0.0
    difference_index: tuple[int, ...] | None = None
    ranks: tuple[int, ...] = ()
    findings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """What `check_gradients` found; the same on every rank.

    Attributes:
        rows: by parameter.
        findings: what is wrong with more than one parameter.
        remarks: what is worth knowing of more than one.
    """

    rows: tuple[GradientRow, ...]
    findings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is wrong, one line each."""
        return [*self.findings, *(finding for row in self.rows for finding in row.findings)]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        remarks = [*self.remarks, *(remark for row in self.rows for remark in row.remarks)]
        rows = [asdict(row) for row in self.rows]
        return {"ok": self.ok, "problems": self.problems, "remarks": remarks, "parameters": rows}

    def to_json(self) -> str:
        """Return ``as_dict()`` as JSON."""
        from distadam.diagnostics.sinks import finite

        return json.dumps(finite(self.as_dict()), allow_nan=False)

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [("parameter", "compared", "error", "where", "error of slope", "where", "")]
        for row in self.rows:
            rows.append(
                (
                    row.parameter,
                    f"{row.num_elements:,}",
                    f"{row.average_error:.2g}",
                    "" if row.average_index is None else spell("", row.average_index),
                    f"{row.difference_error:.2g}",
                    "" if row.difference_index is None else spell("", row.difference_index),
                    "WRONG" if row.findings else "",
                )
            )
        remarks = [*self.remarks, *(remark for row in self.rows for remark in row.remarks)]
        return "\n".join([format_table(rows, left=(0, 3, 5, 6)), *self.problems, *remarks])
