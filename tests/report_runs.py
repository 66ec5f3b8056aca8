"""Runs that never were, for tests of the report and for its picture in the docs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

BEGAN = 1_790_000_000.0


def write_run(
    folder: Path,
    *,
    num_steps: int,
    num_layers: int,
    num_ranks: int = 2,
    every: int = 10,
    spike: int | None = None,
    broken: int | None = None,
) -> None:
    """Write the records of a run; the loss jumps at step ``spike`` and is NaN at step ``broken``."""
    draw = random.Random(5)
    names = ["embedding.weight", *(f"blocks.{i // 4}.{_part(i)}.weight" for i in range(num_layers - 2)), "norm.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        records: list[dict[str, Any]] = []
        about = {"rank": rank, "ranks": num_ranks, "optimizer": "AdamW", "parameters": names}
        records.append({"kind": "run", "time": BEGAN, **about})
        for step in range(1, num_steps + 1):
            records.append(_step(step, rank, num_steps, draw, spike, broken))
            if rank == 0 and step % every == 0:
                records.append(_parameters(step, names, num_steps, draw, spike, every))
            if rank == 0 and step % max(1, num_steps // 5) == 0:
                path = f"checkpoints/step-{step:09d}"
                saved = {"step": step, "path": path, "seconds": 1.4 + draw.random(), "bytes": 412 * 2**20}
                records.append({"kind": "checkpoint", "time": BEGAN + 0.18 * step, **saved})
        if broken is not None and rank == num_ranks - 1:
            what = "non-finite gradient"
            detail = f"{names[3]}: element 1187 is NaN on rank {rank} only"
            incident = {"step": broken, "rank": rank, "what": what, "detail": detail}
            records.append({"kind": "incident", "time": BEGAN + 0.18 * broken, **incident})
        lines = "\n".join(json.dumps(record) for record in records)
        (folder / f"rank-{rank}.jsonl").write_text(lines + "\n")


def _part(index: int) -> str:
    return ("qkv", "attention_out", "mlp_in", "mlp_out")[index % 4]


def _step(
    step: int, rank: int, num_steps: int, draw: random.Random, spike: int | None, broken: int | None
) -> dict[str, Any]:
    share = step / num_steps
    loss: Any = 1.35 + 4.1 * math.exp(-9 * share) + draw.gauss(0, 0.05)
    norm = 0.35 + 2.2 * math.exp(-6 * share) + abs(draw.gauss(0, 0.12))
    if step == spike:
        loss, norm = 7.75, 61.0
    if step == broken:
        loss = "nan"
    rate = min(1.0, 20 * share) * (0.1 + 0.45 * (1 + math.cos(math.pi * share))) * 4e-3
    slow = 1.0 + 0.06 * rank
    parts = {"forward": 0.041, "backward": 0.079 * slow, "reduce": 0.012 / slow, "update": 0.014, "gather": 0.009}
    parts = {kind: seconds * draw.uniform(0.95, 1.05) for kind, seconds in parts.items()}
    step_s = sum(parts.values()) + 0.006 + (0.11 if step % 997 == 0 else 0)
    memory = {"parameters": 180 * 2**20, "masters": 90 * 2**20, "moments": 180 * 2**20, "gradient_buffers": 50 * 2**20}
    return {
        "kind": "step",
        "time": BEGAN + 0.18 * step,
        "step": step,
        "rank": rank,
        "lr": [rate, rate],
        "grad_norm": norm,
        "step_s": step_s,
        "parts": parts,
        **({"loss": loss, "tokens_per_s": 16384 / step_s} if rank == 0 else {}),
        **({"memory": memory | {"total": sum(memory.values())}} if step % 100 == 0 or step == 1 else {}),
    }


def _parameters(
    step: int, names: list[str], num_steps: int, draw: random.Random, spike: int | None, every: int
) -> dict[str, Any]:
    share = step / num_steps
    hit = spike is not None and abs(step - spike) < every
    values = {}
    for index, name in enumerate(names):
        depth = index / len(names)
        norm = 10 ** (-1.6 + 0.9 * math.sin(5 * depth) - 0.8 * share + draw.gauss(0, 0.08))
        ratio = 10 ** (-2.6 - 0.5 * math.cos(7 * depth) - 0.7 * share + draw.gauss(0, 0.06))
        if hit and 0.4 < depth < 0.6:
            norm *= 60
        values[name] = {"grad_norm": norm, "grad_max": norm / 3, "update_ratio": ratio, "effective_lr": ratio / 3}
    return {"kind": "parameters", "time": BEGAN + 0.18 * step, "step": step, "parameters": values}
