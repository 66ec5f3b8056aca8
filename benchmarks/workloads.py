"""The two models that every contender trains, and their batches: the same for all, on any number of ranks."""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]
from train_gpt import GPT  # noqa: E402

LR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, its data and the modules that FSDP wraps one by one."""

    name: str
    model: nn.Module
    wrapped: list[nn.Module]
    batches: list[tuple[Tensor, Tensor]]

    @staticmethod
    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward through ``model``, which may be a wrapper, so that its hooks run."""
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def build(name: str, num_steps: int, rank: int, num_ranks: int) -> Workload:
    """Return workload "mlp" or "gpt" with this rank's part of ``num_steps`` global batches."""
    torch.manual_seed(0)
    return _mlp(num_steps, rank, num_ranks) if name == "mlp" else _gpt(num_steps, rank, num_ranks)


def _mlp(num_steps: int, rank: int, num_ranks: int) -> Workload:
    """25.1 M parameters; 64 examples a step over all ranks."""
    width = 2048
    layers: list[nn.Module] = [nn.Linear(1024, width), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(width, width), nn.ReLU()]
    layers.append(nn.Linear(width, 1000))
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num_steps):
        inputs, targets = torch.randn(64, 1024, generator=generator), torch.randint(1000, (64,), generator=generator)
        batches.append((inputs[rank::num_ranks].clone(), targets[rank::num_ranks].clone()))
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return Workload(name="mlp", model=nn.Sequential(*layers), wrapped=linears, batches=batches)


def _gpt(num_steps: int, rank: int, num_ranks: int) -> Workload:
    """30.3 M parameters, the model of examples/train_gpt.py; 4 examples of 40 bytes a step over all ranks."""
    length = 40
    model = GPT(layers=9, heads=8, width=528, seq_len=length)
    text = torch.frombuffer(bytearray(Path(inspect.__file__).read_bytes()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num_steps):
        starts = torch.randint(len(text) - length - 1, (4,), generator=generator)[rank::num_ranks]
        window = text[starts[:, None] + torch.arange(length + 1)].long()
        batches.append((window[:, :-1].contiguous(), window[:, 1:].contiguous()))
    return Workload(name="gpt", model=model, wrapped=list(model.blocks), batches=batches)
