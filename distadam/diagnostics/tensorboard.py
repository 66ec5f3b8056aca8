"""Records as TensorBoard scalars."""

from __future__ import annotations

import importlib
import os
from typing import Any

from distadam.diagnostics.sinks import missing, scalars


class TensorBoardSink:
    """Writes numbers of steps and parameters as scalars, incidents as text.

    Tags are ``step/<name>[/<label>]`` and ``<name>/<parameter>``, so that one name's curves of all parameters stand
    together. Ranks write to directories of their own: TensorBoard shows them as runs.

    Args:
        run: directory for the event files.
        rank: whose; its files are in ``run/rank-<r>``.

    Raises:
        MissingDependency: without the tensorboard package.
    """

    def __init__(self, run: str | os.PathLike[str], rank: int = 0) -> None:
        try:
            writers: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise missing("tensorboard", "tensorboard") from error
        self._writer = writers.SummaryWriter(os.path.join(os.fspath(run), f"rank-{rank}"))

    def write(self, record: dict[str, Any]) -> None:
        """Write the record's numbers at its step."""
        step, when = record.get("step", 0), record.get("time")
        for (name, label), value in scalars(record).items():
            if record["kind"] == "parameters":
                tag = f"{name}/{label}"
            else:
                tag = f"step/{name}/{label}" if label else f"step/{name}"
            self._writer.add_scalar(tag, value, step, when)
        if record["kind"] == "incident":
            text = f"{record['what']}: {record['detail']}"
            self._writer.add_text("incidents", text, step, when)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
