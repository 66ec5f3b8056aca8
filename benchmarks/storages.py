"""Train the GPT of examples/train_gpt.py with every storage: bytes per parameter, and validation loss over seeds.

    python benchmarks/storages.py [--seeds 5] [--steps 300] [--out benchmarks/results]

Seeds choose initial weights and batches, the same ones for every storage, so that differences between storages are
taken seed by seed: their spread is much smaller than that of the losses. bfloat16 parameters are widened in the forward
pass, which few CPUs compute in 16 bits at any speed; their gradients are bfloat16 again. Two runs at a time, one thread
each. Writes JSON, a Markdown table and a picture; begun again, it trains only what the JSON of that day lacks.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_gpt

MODEL = {"layers": 2, "heads": 4, "width": 64, "seq_len": 64}


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    widened = {name: param.float() for name, param in model.named_parameters()}
    widened |= {name: buffer.float() for name, buffer in model.named_buffers()}
    logits = torch.func.functional_call(model, widened, (inputs,))
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def run(job: tuple[str, int, int]) -> dict[str, Any]:
    precision, seed, steps = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    options = SimpleNamespace(optimizer="adamw", lr=None, reference=False, precision=precision)
    texts = train_gpt.load_corpus()
    batches = train_gpt.Batches(
        train=texts[0],
        validation=texts[1],
        batch_size=16,
        seq_len=MODEL["seq_len"],
        seed=seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
    )
    model = train_gpt.GPT(**MODEL).to(train_gpt.precision_of(precision)[0])
    optimizer = train_gpt.build_optimizer(options, model)
    schedule = train_gpt.build_schedule(optimizer, steps)
    for step in range(1, steps + 1):
        loss_of(model, *batches.training(step)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        losses = [loss_of(model, *batch).item() for batch in batches.validating(24)]
    numel = sum(param.numel() for param in model.parameters())
    nbytes = optimizer.memory_report().nbytes
    kept = {kind: nbytes[kind] / numel for kind in ("parameters", "masters", "moments")}
    return {"precision": precision, "seed": seed, "loss": sum(losses) / len(losses), "bytes": kept}


def table(results: list[dict[str, Any]], about: str) -> str:
    """Return the Markdown table; a storage is compared with fp32 moments beside the same weights, and with fp32."""
    losses: dict[str, dict[int, float]] = {}
    for result in results:
        losses.setdefault(result["precision"], {})[result["seed"]] = result["loss"]
    nbytes = {result["precision"]: result["bytes"] for result in results}
    rows = [
        "| storage | bytes per parameter: weight + master + moments | validation loss, mean (min - max) | against fp32 "
        "| against fp32 moments, same weights |",
        "|---|---|---|---|---|",
    ]
    for name, values in losses.items():
        kept = nbytes[name]
        split = " + ".join(f"{value:.2f}" for value in kept.values())
        mean = statistics.mean(values.values())
        spread = f"{mean:.4f} ({min(values.values()):.4f} - {max(values.values()):.4f})"
        weights = name.partition("+")[0]
        cells = [
            compare(values, losses[other]) if other != name and other in losses else "" for other in ("fp32", weights)
        ]
        rows.append(f"| {name} | {sum(kept.values()):.2f}: {split} | {spread} | {cells[0]} | {cells[1]} |")
    return about + "\n\n" + "\n".join(rows) + "\n"


def compare(values: dict[int, float], others: dict[int, float]) -> str:
    """Return the mean relative difference over seeds and its standard error, in percent."""
    differences = [100 * (values[seed] / others[seed] - 1) for seed in values]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{statistics.mean(differences):+.2f}% ± {error:.2f}"


def plot(results: list[dict[str, Any]], target: Path) -> None:
    """Draw every seed's loss against the bytes of its storage, and the mean with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for number, name in enumerate(dict.fromkeys(result["precision"] for result in results)):
        mine = [result for result in results if result["precision"] == name]
        losses = [result["loss"] for result in mine]
        axes.errorbar(
            number, statistics.mean(losses), yerr=statistics.stdev(losses), fmt="o", capsize=4, color="tab:blue"
        )
        axes.plot([number] * len(losses), losses, ".", color="tab:gray", markersize=4, zorder=0)
        nbytes = sum(mine[0]["bytes"].values())
        axes.annotate(f"{nbytes:.1f} B", (number, max(losses)), (0, 6), textcoords="offset points", ha="center", size=8)
    names = list(dict.fromkeys(result["precision"] for result in results))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("validation loss, nats per byte")
    axes.set_title("Storages: mean and standard deviation over seeds; bytes per parameter above", size=10)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--precisions", nargs="*", default=train_gpt.PRECISIONS, choices=train_gpt.PRECISIONS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    # Seed by seed, so that a run that is stopped early has compared every storage.
    results = finished(options)
    done = {(result["precision"], result["seed"]) for result in results}
    jobs = [
        (name, seed, options.steps)
        for seed in range(options.seeds)
        for name in options.precisions
        if (name, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for result in pool.imap_unordered(run, jobs):
            results.append(result)
            number = len(results) - len(done)
            print(f"{number}/{len(jobs)} {result['precision']} seed {result['seed']}: {result['loss']:.4f}", flush=True)
            write(options, results)


def stem_of(options: argparse.Namespace) -> Path:
    """Return where results go, without a suffix."""
    folder: Path = options.out
    return folder / f"storages_cpu_{date.today():%Y-%m-%d}"


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs that an earlier call with the same steps has finished today."""
    source = stem_of(options).with_suffix(".json")
    before = json.loads(source.read_text()) if source.exists() else {}
    return before["runs"] if before.get("steps") == options.steps else []


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write every run as JSON, and the table and the picture of the seeds that all storages have been trained with."""
    options.out.mkdir(parents=True, exist_ok=True)
    stem = stem_of(options)
    counts = Counter(result["seed"] for result in results)
    complete = [seed for seed, count in counts.items() if count == len(options.precisions)]
    num_seeds = len(complete)
    stem.with_suffix(".json").write_text(json.dumps({"steps": options.steps, "runs": results}, indent=1) + "\n")
    if num_seeds < 2:
        return
    results = [result for result in results if result["seed"] in complete]
    results = sorted(results, key=lambda result: (options.precisions.index(result["precision"]), result["seed"]))
    about = (
        f"GPT of {MODEL} on 16 x {MODEL['seq_len']} bytes a step, {options.steps} steps of AdamW, betas (0.9, 0.98), "
        f"{num_seeds} seeds; torch {torch.__version__}, CPU, one process. Differences are taken seed by seed: mean ± "
        "standard error."
    )
    stem.with_suffix(".md").write_text(table(results, about))
    plot(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
