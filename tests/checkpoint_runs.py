"""Training that checkpoint tests interrupt: every rule and storage, and gradients that sum exactly in every order.

Gradients are small integers, twelve draws a step that are dealt to the ranks: whatever the number of ranks, their mean
is the same number in the same bits, and so is the state after any number of steps.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, PrecisionPolicy, ShardPolicy, checkpoint

DRAWS = 24

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (distadam.AdamW, {"lr": 1e-2}),
    "adam amsgrad": (distadam.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "sgd momentum": (distadam.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "sgd": (distadam.SGD, {"lr": 1e-2}),
    "rmsprop": (distadam.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    "rmsprop centered": (distadam.RMSprop, {"lr": 1e-3, "centered": True, "momentum": 0.5}),
}

STORAGES: dict[str, tuple[torch.dtype, PrecisionPolicy]] = {
    "fp32": (torch.float32, PrecisionPolicy()),
    "fp64": (torch.float64, PrecisionPolicy()),
    "bf16 fp32 master": (torch.bfloat16, PrecisionPolicy()),
    "split": (torch.bfloat16, PrecisionPolicy(master="split")),
    "stochastic": (torch.bfloat16, PrecisionPolicy(master="stochastic", moments="bf16", seed=3)),
    "none": (torch.bfloat16, PrecisionPolicy(master="none", moments="8bit")),
    "fp16 fp32 master": (torch.float16, PrecisionPolicy()),
    "bf16 moments": (torch.float32, PrecisionPolicy(moments="bf16")),
    "8bit": (torch.float32, PrecisionPolicy(moments="8bit")),
    "split 8bit": (torch.bfloat16, PrecisionPolicy(master="split", moments="8bit")),
}

CASES = [
    (rule, storage)
    for rule in RULES
    for storage, (_, precision) in STORAGES.items()
    if rule != "rmsprop centered" or precision.moments == "fp32"  # the others are refused
]

LAYOUTS = [
    {"shard": ShardPolicy(stage=1), "comm": CommPolicy(bucket_mb=0.002)},
    {"shard": ShardPolicy(stage=2), "comm": CommPolicy(bucket_mb=25)},
]


class Model(nn.Module):
    """Sizes that no number of ranks divides, a scalar, a channels-last weight, a frozen parameter and buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.embedding = make(37, 19)
        self.scale = make()
        self.conv = make(4, 3, 5, 5)
        self.conv.data = self.conv.data.contiguous(memory_format=torch.channels_last)
        self.layers = nn.ParameterList([make(300), make(1, 513), make(7)])
        self.frozen = make(11).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6, dtype=dtype, affine=False)


def build(rule: str, storage: str, layout: int = 0, **policies: Any) -> tuple[Model, Any]:
    dtype, precision = STORAGES[storage]
    make, options = RULES[rule]
    model = Model(dtype)
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 5e-3}, {"params": named[2:]}]
    return model, make(groups, **options, precision=precision, **(LAYOUTS[layout] | policies))


def train(model: Model, optimizer: Any, first: int, last: int) -> None:
    """Do steps first, ..., last - 1; what a step does depends on its number alone, not on the number of ranks."""
    groups = optimizer.checkpoint_access().collectives.groups
    share = DRAWS // groups.num_ranks
    mine = slice(groups.rank * share, (groups.rank + 1) * share)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(model.parameters()):
            draws = torch.randint(-4, 5, (DRAWS, *param.shape), generator=generator)
            if param.requires_grad and (number + step) % 5:
                # averaged over ranks: sum over draws / 8, a number of few bits in every dtype
                total = draws[mine].sum(0) * groups.num_ranks
                param.grad = (total / 8).to(param.dtype).as_strided(param.shape, param.stride()).copy_(total / 8)
        optimizer.step()
        optimizer.zero_grad()
        model.norm.running_mean.add_(step)


def digest(model: Model, optimizer: Any) -> str:
    """Hash every bit of the model and of the whole state, masters included. Collective."""
    access = optimizer.checkpoint_access()
    values: list[Tensor] = [tensor.detach() for tensor in model.state_dict().values()]
    for entry in optimizer.full_state_dict(to=None)["state"].values():
        values += entry.values()
    stored: dict[str, Tensor] = {}  # in an order that buckets do not change
    for flat in access.flats:
        for key, part in flat.stored().items():
            whole = torch.empty(flat.bucket.numel // part.block, dtype=part.tensor.dtype)
            raw, own = (tensor.view(torch.uint8) for tensor in (whole, part.tensor))  # gloo has no int16
            access.collectives.all_gather(raw, own, key).wait()
            for slot, name in zip(flat.bucket.slots, flat.names, strict=True):
                first, last = slot.offset // part.block, -(-slot.end // part.block)
                stored[f"{name} {key}"] = whole[first:last]
    values += [stored[name] for name in sorted(stored)]
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write(rank: int, path: str, rule: str, storage: str, layout: int, steps: int, asynchronous: bool) -> None:
    model, optimizer = build(rule, storage, layout)
    train(model, optimizer, 0, steps)
    handle = checkpoint.save(path, model, optimizer, extra={"rank": rank}, asynchronous=asynchronous)
    train(model, optimizer, steps, steps + 1)  # what is written is a copy, or written already
    handle.wait()


def write_many(rank: int, folder: str, cases: list[tuple[str, str]], steps: int, asynchronous: bool) -> None:
    for number, (rule, storage) in enumerate(cases):
        write(rank, f"{folder}/{rule}-{storage}", rule, storage, number % 2, steps, asynchronous)


def resume_many(rank: int, folder: str, cases: list[tuple[str, str]], steps: int, last: int) -> list[str]:
    """Return digests of runs that resume in other buckets, with the model in disorder before."""
    return [
        resume(folder, rule, storage, (number + 1) % 2, steps, last) for number, (rule, storage) in enumerate(cases)
    ]


def resume(folder: str, rule: str, storage: str, layout: int, steps: int, last: int) -> str:
    model, optimizer = build(rule, storage, layout)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)  # nothing may survive of what was there
    optimizer.reload_parameters()
    checkpoint.load(f"{folder}/{rule}-{storage}", model, optimizer)
    train(model, optimizer, steps, last)
    return digest(model, optimizer)


def resume_grid(
    rank: int, folder: str, writers: tuple[int, ...], cases: list[tuple[str, str]], steps: int, last: int
) -> dict[tuple[str, str], list[str]]:
    """Return by case the digest of a run that never stopped, then of one resumed from each writer's checkpoint."""
    digests = {}
    for number, (rule, storage) in enumerate(cases):
        whole = never_stopped(rank, [(rule, storage)], last)
        layout = (number + 1) % 2
        resumed = [resume(f"{folder}/{writer}", rule, storage, layout, steps, last) for writer in writers]
        digests[rule, storage] = whole + resumed
    return digests


def never_stopped(rank: int, cases: list[tuple[str, str]], last: int) -> list[str]:
    """Return digests of runs without a checkpoint."""
    digests = []
    for rule, storage in cases:
        model, optimizer = build(rule, storage)
        train(model, optimizer, 0, last)
        digests.append(digest(model, optimizer))
    return digests
