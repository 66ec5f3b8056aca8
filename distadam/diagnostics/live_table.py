"""The last watched step as a table on the terminal, redrawn in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLUMNS = {
    "grad_norm": "gradient norm",
    "grad_max": "largest",
    "grad_zeros": "zeros",
    "grad_nonfinite": "not finite",
    "update_ratio": "update / weight",
    "effective_lr": "effective lr",
}


class LiveTable:
    """Shows parameters, those with the largest update / weight first, loss and norm above; incidents below.

    Where there is no terminal nothing is redrawn; the last table is printed once, at the end.

    Args:
        console: rich's; standard output by default.
        rows: how many parameters to show.
    """

    def __init__(self, console: Console | None = None, rows: int = 24) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console() if console is None else console
        self._rows = rows
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._step: dict[str, Any] = {}
        self._parameters: dict[str, Any] = {}
        self._incidents: list[str] = []
        self._started = False

    def write(self, record: dict[str, Any]) -> None:
        """Take a record in; redraw when it is one of parameters or an incident."""
        kind = record["kind"]
        if kind == "step":
            self._step = dict(record)
        elif kind == "parameters":
            self._parameters = dict(record)
        elif kind == "incident":
            self._incidents = [*self._incidents, f"step {record['step']}: {record['detail']}"][-5:]
        if kind in ("parameters", "incident") and self._console.is_terminal:
            if not self._started:
                self._live.start()
                self._started = True
            self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave the last table where it is."""
        if self._started:
            self._live.stop()
        elif self._parameters:
            self._console.print(self._table())

    def _table(self) -> Table:
        from rich.table import Table

        shown = [f"step {self._parameters.get('step', self._step.get('step', '?'))}"]
        for name in ("loss", "grad_norm", "step_s", "tokens_per_s"):
            if name in self._step:
                shown.append(f"{name} {_spell(self._step[name])}")
        caption = "\n".join(self._incidents) or None
        table = Table(title="  ".join(shown), title_justify="left", caption=caption, caption_style="red")
        table.add_column("parameter", no_wrap=True)
        for title in _COLUMNS.values():
            table.add_column(title, justify="right")
        parameters = self._parameters.get("parameters", {})
        order = sorted(parameters, key=lambda name: -_key(parameters[name].get("update_ratio", 0.0)))
        for name in order[: self._rows]:
            values = parameters[name]
            style = "red" if values.get("grad_nonfinite") else None
            table.add_row(name, *(_spell(values.get(column, 0.0)) for column in _COLUMNS), style=style)
        if len(order) > self._rows:
            table.add_row(f"... and {len(order) - self._rows} more")
        return table


def _key(value: float) -> float:
    return value if value == value else float("inf")


def _spell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
