"""Train a byte-level GPT on the Python standard library's own source, with the optimizer's state sharded over ranks.

    python examples/train_gpt.py                                # one process
    torchrun --nproc-per-node 2 examples/train_gpt.py           # two, gradients averaged and state split by distadam
    distadam launch --nproc 2 examples/train_gpt.py             # the same, with readable output
    python examples/train_gpt.py --reference --out runs/ref     # torch.optim in one process, on the same batches
    distadam launch --nproc 4 examples/train_gpt.py --resume runs/ck   # go on from the newest checkpoint, save there
    python examples/train_gpt.py --precision split+8bit         # bf16 parameters with 16 more bits, 8-bit moments
    python examples/train_gpt.py --watch-every 10 && distadam report runs/train_gpt   # what happened, as one page
    python examples/train_gpt.py --metrics 9100                 # http://127.0.0.1:9100/healthz and /metrics

Every rank takes its part of the same global batch, so any number of ranks sees together what one process sees. The only
lines that know about ranks are the ones that pick a rank's examples and the ones that average what is printed.
"""

import argparse
import json
import math
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import distadam

VOCAB = 256
PROMPT = b"\nclass Reader:\n    def "
DEFAULT_LR = {"adamw": 4e-3, "adam": 4e-3, "sgd": 0.1, "rmsprop": 1e-3}
# fp32 numbers that torch.optim keeps for each parameter.
MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 1}

# fp32 parameters, or bf16 ones with a master weight, a remainder, stochastic rounding, nothing; then moments.
PRECISIONS = [
    *("fp32", "fp32+bf16", "fp32+8bit", "master", "master+8bit", "split", "split+bf16", "split+8bit"),
    *("stochastic", "stochastic+8bit", "none", "none+8bit"),
]


# ---- data ------------------------------------------------------------------------------------------------------------


def source_files() -> list[Path]:
    """Return the standard library's .py files: no installed packages, no tests, no tables of numbers."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1]))


def load_corpus() -> tuple[Tensor, Tensor]:
    """Return training and validation bytes; one file in twenty, by its name, is for validation."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in source_files():
        parts[zlib.crc32(path.name.encode()) % 20 == 0].append(path.read_bytes())
    train, validation = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, validation


@dataclass(frozen=True, kw_only=True)
class Batches:
    """This rank's part of each global batch: examples rank, rank + world_size, ..."""

    train: Tensor
    validation: Tensor
    batch_size: int
    seq_len: int
    seed: int
    rank: int
    world_size: int
    device: torch.device

    def training(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (batch_size / world_size, seq_len); the step alone decides which."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - self.seq_len, (self.batch_size,), generator=generator)
        return self._cut(self.train, starts)

    def validating(self, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same evenly spaced examples every time."""
        last = len(self.validation) - self.seq_len - 1
        for starts in torch.linspace(0, last, num_batches * self.batch_size).long().split(self.batch_size):
            yield self._cut(self.validation, starts)

    def _cut(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        own = starts[self.rank :: self.world_size]
        window = text[own[:, None] + torch.arange(self.seq_len + 1)].long().to(self.device)
        return window[:, :-1], window[:, 1:]


# ---- model -----------------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Turn each pair of features by an angle that grows with the position."""

    def __init__(self, head_width: int, seq_len: int) -> None:
        super().__init__()
        rates = 1_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(seq_len), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised input and added to the stream."""

    def __init__(self, width: int, heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (self.rotary(F.rms_norm(part, part.shape[-1:])) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; the output layer is the embedding."""

    def __init__(self, layers: int, heads: int, width: int, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.embedding = nn.Embedding(VOCAB, width)
        rotary = Rotary(width // heads, seq_len)
        self.blocks = nn.ModuleList(Block(width, heads, rotary) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.apply(partial(self._init, residual_scale=(2 * layers) ** -0.5))

    @staticmethod
    def _init(module: nn.Module, residual_scale: float) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, Block):  # after its children: a deep sum of branches starts no larger than a short one
            for out in (module.attention_out, module.mlp_out):
                out.weight.data.mul_(residual_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def sample(self, prompt: bytes, num_bytes: int, temperature: float, seed: int) -> str:
        """Continue ``prompt`` byte by byte."""
        device = self.embedding.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        tokens = torch.tensor([list(prompt)], device=device)
        for _ in range(num_bytes):
            logits = self(tokens[:, -self.seq_len :])[:, -1] / temperature
            tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
        return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


# ---- optimizer -------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave gains, and the embedding, alone."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if id(p) not in decayed], "weight_decay": 0.0},
    ]


def precision_of(name: str) -> tuple[torch.dtype, distadam.PrecisionPolicy]:
    """Return the parameters' dtype and the policy that ``--precision`` stands for."""
    weights, _, moments = name.partition("+")
    master = {"fp32": "auto", "master": "fp32"}.get(weights, weights)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    return dtype, distadam.PrecisionPolicy(master=master, moments=moments or "fp32")


def build_optimizer(options: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return the chosen optimizer: distadam's, or with ``--reference`` torch's, with the same arguments."""
    source: Any = torch.optim if options.reference else distadam
    groups = parameter_groups(model, weight_decay=0.1 if options.optimizer == "adamw" else 0.0)
    lr = options.lr or DEFAULT_LR[options.optimizer]
    stored = {} if options.reference else {"precision": precision_of(options.precision)[1]}
    if options.optimizer == "adamw":
        return source.AdamW(groups, lr=lr, betas=(0.9, 0.98), **stored)
    if options.optimizer == "adam":
        return source.Adam(groups, lr=lr, betas=(0.9, 0.98), **stored)
    if options.optimizer == "sgd":
        return source.SGD(groups, lr=lr, momentum=0.9, nesterov=True, **stored)
    return source.RMSprop(groups, lr=lr, alpha=0.95, **stored)


def build_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up over the first twentieth of the run, then follow half a cosine down to a tenth."""
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clipper(options: argparse.Namespace, model: nn.Module, optimizer: Any) -> Callable[[float], Tensor]:
    """Return what clips the gradients: torch's function, or the optimizer's own, which knows all ranks' norms."""
    if options.reference:
        return partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()))
    return optimizer.clip_grad_norm_


# ---- what is said and written ----------------------------------------------------------------------------------------


def average(value: Tensor) -> float:
    """Return the mean of ``value`` over ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


@dataclass
class Log:
    """Progress on the screen and the curve in a file; silent except on rank 0."""

    folder: Path
    steps: int
    enabled: bool
    resume: bool = False
    console: Console = field(init=False)
    progress: Progress = field(init=False)
    task: TaskID = field(init=False)
    validation: float = math.nan
    _printed_s: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.console = Console(quiet=not self.enabled, highlight=False)
        columns = (
            BarColumn(14),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("val {task.fields[val]} bits"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s ETA"),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(*columns, console=self.console, transient=False, disable=not self.enabled)
        self.task = self.progress.add_task("train", total=self.steps, loss=math.nan, val="-", speed=0.0)
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                (self.folder / "curve.jsonl").write_text("")
        if self.console.is_terminal:
            self.progress.start()

    def record(self, step: int, **values: float) -> None:
        """Append a point to the curve and move the bar; where there is no terminal, print it now and then."""
        if not self.enabled:
            return
        self.validation = values.get("val_bits_per_byte", self.validation)
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        val = "-" if math.isnan(self.validation) else f"{self.validation:.3f}"
        self.progress.update(self.task, completed=step, loss=values["loss"], val=val, speed=values["tokens_per_s"])
        last = step == self.steps
        if not self.console.is_terminal and (last or time.monotonic() - self._printed_s > 4):
            self._printed_s = time.monotonic()
            self.console.print(self.progress)
        if last:
            self.progress.stop()


def torch_bytes(options: argparse.Namespace, model: nn.Module) -> dict[str, int]:
    """Return what torch.optim and its gradients hold on every rank, whatever the number of ranks."""
    numel, count = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    return {"parameters": 4 * numel, "moments": 4 * numel * MOMENTS[options.optimizer], "steps": 4 * count}


def memory_table(options: argparse.Namespace, model: nn.Module, optimizer: Any) -> tuple[Table, dict[str, Any]]:
    """Return bytes by kind on every rank beside torch's, as a table and as numbers. Collective."""
    theirs = torch_bytes(options, model)
    own = theirs if options.reference else optimizer.memory_report().as_dict()
    ranks = [own]
    if dist.is_initialized():
        ranks = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, own)
    for held in (theirs, *ranks):
        held["optimizer state"] = sum(held.get(kind, 0) for kind in ("masters", "moments", "steps"))
    table = Table(title="optimizer bytes", title_justify="left")
    table.add_column("kind")
    for rank in range(len(ranks)):
        table.add_column("torch.optim" if options.reference else f"rank {rank}", justify="right")
    if not options.reference:
        table.add_column("torch.optim, every rank", justify="right", style="dim")
    for kind in ranks[0]:
        if not any(held[kind] for held in ranks):
            continue
        last = [] if options.reference else [f"{theirs[kind]:,}" if kind in theirs else ""]
        table.add_row(kind, *(f"{held[kind]:,}" for held in ranks), *last)
    return table, {"ranks": ranks, "torch_optim": theirs}


def plot_curves(folders: list[Path], target: Path) -> str:
    """Draw the runs' losses into one picture; return what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "no picture of the curves: matplotlib is missing (pip install distadam[plot])"
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, folder in enumerate(folders):
        label = json.loads((folder / "run.json").read_text())["label"]
        points = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        evaluated = [point for point in points if "val_bits_per_byte" in point]
        # The first run lies broad under the others, so that curves on top of each other can both be seen.
        width, alpha = (5.0, 0.4) if index == 0 < len(folders) - 1 else (1.3, 1.0)
        for axes, kept, key in ((left, points, "loss"), (right, evaluated, "val_bits_per_byte")):
            steps, values = [point["step"] for point in kept], [point[key] for point in kept]
            axes.plot(steps, values, label=label, linewidth=width, alpha=alpha)
    for axes, title in ((left, "training loss (nats per byte)"), (right, "validation (bits per byte)")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return f"curves: {target}"


class Records:
    """What `distadam report OUT` reads, on every rank: each step, where its time went, and now and then each parameter.

    Without ``--watch-every`` nothing is watched and nothing written.
    """

    def __init__(self, options: argparse.Namespace, optimizer: Any, rank: int) -> None:
        self.watcher = self.timeline = None
        if options.watch_every:
            from distadam import diagnostics

            sink = diagnostics.JsonlSink(options.out, rank)
            self.watcher = diagnostics.watch(optimizer, every=options.watch_every, sinks=[sink])
            self.timeline = diagnostics.timeline(optimizer, sink=sink, first_step=self.watcher.step + 1)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.watcher is not None:
            self.timeline.close()
            self.watcher.close(wait=error is None)

    def forward(self) -> AbstractContextManager[None]:
        return nullcontext() if self.timeline is None else self.timeline.region("forward")

    def log(self, **values: Any) -> None:
        if self.watcher is not None:
            self.watcher.log(**values)

    def saved(self, step: int, save: Any, seconds: float) -> None:
        if self.watcher is not None:
            self.watcher.write("checkpoint", path=save.path, seconds=seconds, bytes=save.nbytes)


# ---- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: GPT, batches: Batches, num_batches: int) -> float:
    """Return the mean validation loss over ranks, in bits per byte."""
    model.eval()
    losses = [model.loss(*batch) for batch in batches.validating(num_batches)]
    model.train()
    return average(torch.stack(losses).mean()) / math.log(2)


def steps_to_do(
    options: argparse.Namespace, model: GPT, optimizer: Any, schedule: Any, records: Records
) -> Iterator[int]:
    """Yield 1, 2, ...; with ``--resume`` from where the newest checkpoint stopped, whatever wrote it, and save."""
    if options.resume is None:
        yield from range(1, options.steps + 1)
        return
    from distadam.checkpoint import RandomState, elastic

    extra = {"schedule": schedule, "random": RandomState(optimizer)}
    when = {"num_steps": options.steps, "every": options.save_every, "on_save": records.saved}
    loop = elastic.run(options.resume, model, optimizer, extra=extra, **when)
    yield from (done + 1 for done in loop)


def monitoring(options: argparse.Namespace, optimizer: Any, local_rank: int) -> Any:
    """Return the monitor that ``--metrics`` asks for, one port for each rank of a host, or None."""
    if options.metrics is None:
        return nullcontext()
    host, _, port = options.metrics.rpartition(":")
    return distadam.diagnostics.monitor(
        optimizer,
        host=host or "127.0.0.1",
        port=int(port) + local_rank,
        checkpoints=options.resume,
        times=not options.watch_every,  # its timeline is the one that an optimizer can have
    )


def train(
    options: argparse.Namespace, model: GPT, optimizer: Any, batches: Batches, log: Log, records: Records, monitor: Any
) -> None:
    """The loop; nothing in it depends on the number of ranks."""
    schedule = build_schedule(optimizer, options.steps)
    clip = clipper(options, model, optimizer)
    window, began = [], time.monotonic()
    for step in steps_to_do(options, model, optimizer, schedule, records):
        with records.forward():
            loss = model.loss(*batches.training(step))
        loss.backward()
        clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        window.append(loss.detach())
        records.log(loss=loss.detach())
        if monitor is not None:
            monitor.log(loss=loss, tokens=options.batch_size * options.seq_len // batches.world_size)
        last = step == options.steps
        if step % options.log_every and not last:
            continue
        values = {"loss": average(torch.stack(window).mean()), "lr": schedule.get_last_lr()[0]}
        values["tokens_per_s"] = len(window) * options.batch_size * options.seq_len / (time.monotonic() - began)
        if log.enabled:
            records.log(tokens_per_s=values["tokens_per_s"])
        if step % options.eval_every == 0 or last:
            values["val_bits_per_byte"] = validate(model, batches, options.eval_batches)
        log.record(step, **values)
        window, began = [], time.monotonic()


def finish(options: argparse.Namespace, model: GPT, optimizer: Any, log: Log, label: str, seconds: float) -> None:
    """Say how it went: bytes, curves and a piece of text."""
    table, numbers = memory_table(options, model, optimizer)
    if not log.enabled:
        return
    log.console.print(table)
    log.console.print(f"{label}: {log.validation:.4f} bits per byte on validation files, {seconds:.0f} s")
    sample = model.sample(PROMPT, options.sample_bytes, temperature=0.7, seed=options.seed)
    log.console.print("--- a sample " + "-" * 40 + sample, markup=False, soft_wrap=True)
    log.console.print("-" * 53)
    settings = {name: str(value) for name, value in vars(options).items()}
    scores = {"val_bits_per_byte": log.validation, "seconds": seconds}
    run = {"label": label, **scores, "bytes": numbers, "settings": settings}
    (options.out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    (options.out / "sample.txt").write_text(sample + "\n")
    said = plot_curves([*options.plot_with, options.out], options.out / "curve.png")
    log.console.print(said, soft_wrap=True, markup=False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level GPT on the standard library's source.")
    add = parser.add_argument
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=8, help="examples in a step, over all ranks")
    add("--seq-len", type=int, default=128, help="bytes in an example")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128)
    add("--optimizer", choices=sorted(DEFAULT_LR), default="adamw")
    add("--lr", type=float, default=None, help=f"default by optimizer: {DEFAULT_LR}")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=10)
    add("--eval-every", type=int, default=100)
    add("--eval-batches", type=int, default=24)
    add("--sample-bytes", type=int, default=600)
    add("--out", type=Path, default=Path("runs/train_gpt"), help="folder for the curve, the picture and the sample")
    add("--plot-with", type=Path, nargs="*", default=[], help="folders of earlier runs to draw beside this one")
    add("--resume", type=Path, default=None, help="folder of checkpoints: go on from the newest there, and save there")
    add("--save-every", type=int, default=100, help="steps between checkpoints, with --resume")
    add("--watch-every", type=int, default=0, help="record steps, and so often parameters, for `distadam report OUT`")
    add("--precision", choices=PRECISIONS, default="fp32", help="parameters and master weights, + moments")
    add(
        "--metrics",
        metavar="[HOST:]PORT",
        help="health and metrics of local rank r at PORT + r, on loopback unless told",
    )
    add("--reference", action="store_true", help="torch.optim in one process")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    group = distadam.init_process_group()
    if options.reference and group.world_size > 1:
        raise SystemExit(f"--reference runs in one process, not in {group.world_size}")
    if options.reference and options.resume:
        raise SystemExit("--resume needs distadam, not --reference")
    if options.reference and options.watch_every:
        raise SystemExit("--watch-every needs distadam, not --reference")
    if options.reference and options.metrics:
        raise SystemExit("--metrics needs distadam, not --reference")
    if options.reference and options.precision != "fp32":
        raise SystemExit(f"--reference trains in fp32, not with --precision {options.precision}")
    if options.batch_size % group.world_size:
        raise SystemExit(f"--batch-size {options.batch_size} does not divide over {group.world_size} ranks")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")

    log = Log(folder=options.out, steps=options.steps, enabled=group.rank == 0, resume=options.resume is not None)
    texts = load_corpus()
    place = {"rank": group.rank, "world_size": group.world_size, "device": group.device}
    sizes = {"batch_size": options.batch_size, "seq_len": options.seq_len, "seed": options.seed}
    batches = Batches(train=texts[0], validation=texts[1], **sizes, **place)
    model = GPT(options.layers, options.heads, options.width, options.seq_len)
    model = model.to(group.device, precision_of(options.precision)[0])
    if group.rank == 0 and options.resume is None:
        for old in options.out.glob("rank-*.jsonl"):  # of an earlier run, perhaps of more ranks
            old.unlink()
    optimizer = build_optimizer(options, model)  # ranks meet here

    source = "torch.optim" if options.reference else "distadam"
    label = f"{source} {options.optimizer}, {group.world_size} process{'es' * (group.world_size > 1)}"
    numel = sum(p.numel() for p in model.parameters())
    log.console.print(f"{group}", soft_wrap=True)
    log.console.print(f"{label}; {numel / 1e6:.2f} M parameters, {len(texts[0]) / 1e6:.1f} MB of text to learn from")
    began = time.monotonic()
    recording = Records(options, optimizer, group.rank)
    with recording as records, monitoring(options, optimizer, group.local_rank) as monitor:
        train(options, model, optimizer, batches, log, records, monitor)
    finish(options, model, optimizer, log, label, time.monotonic() - began)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
