"""16-bit training. Run: python examples/03_mixed_precision.py, or on more ranks with distadam launch.

bf16: the optimizer keeps what the parameters cannot hold: fp32 masters, or the 16 bits more that make one (split), or
nothing (stochastic rounding); moments are fp32, bf16 or 8-bit, by group if wanted. fp16: autocast and a GradScaler; a
gradient that overflows on one rank makes every rank skip. The model learns the next value of a sum of three sine waves.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam


def waves(count: int, device: torch.device, length: int = 24) -> tuple[Tensor, Tensor]:
    """Return ``count`` pieces of the signal, (count, length), and the value after each, (count, 1)."""
    time = torch.rand(count, 1, device=device) * 100 + torch.arange(length + 1, device=device) * 0.25
    signal = (time.sin() + (2.3 * time).sin() + (3.7 * time).sin()) / 3
    return signal[:, :-1], signal[:, -1:]


def bytes_per_parameter(optimizer: distadam.AdamW, model: nn.Module) -> float:
    kept = optimizer.memory_report().nbytes  # on this rank, padding included
    return (kept["parameters"] + kept["masters"] + kept["moments"]) / sum(param.numel() for param in model.parameters())


def train_bf16(model: nn.Sequential, device: torch.device, **storages: str) -> tuple[list[float], float]:
    """Return losses and bytes with bf16 parameters stored like that; the last layer has fp32 moments all the same."""
    model = model.bfloat16()
    groups = [{"params": model[:-1].parameters()}, {"params": model[-1].parameters(), "moments": "fp32"}]
    optimizer = distadam.AdamW(groups, lr=2e-3, precision=distadam.PrecisionPolicy(**storages))
    losses = []
    for _ in range(150):
        inputs, targets = waves(128, device)
        loss = nn.functional.mse_loss(model(inputs.bfloat16()).float(), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, bytes_per_parameter(optimizer, model)


def train_fp16(model: nn.Sequential, device: torch.device) -> tuple[list[float], float]:
    """Return losses and bytes of fp16 autocast with a gradient scaler: the recipe of torch's own documentation."""
    optimizer = distadam.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler(device.type)
    losses = []
    for _ in range(150):
        inputs, targets = waves(128, device)
        with torch.autocast(device.type, dtype=torch.float16):
            loss = nn.functional.mse_loss(model(inputs).float(), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, bytes_per_parameter(optimizer, model)


def main() -> None:
    group = distadam.init_process_group()
    runs = {"fp16 autocast, GradScaler": train_fp16}
    for master, moments in (("fp32", "fp32"), ("split", "fp32"), ("split", "8bit"), ("stochastic", "8bit")):
        runs[f"bf16, {master}, {moments} moments"] = partial(train_bf16, master=master, moments=moments)
    for name, train in runs.items():
        torch.manual_seed(group.rank)
        model = nn.Sequential(nn.Linear(24, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1))
        losses, size = train(model.to(group.device), group.device)
        if group.rank == 0:
            print(f"{name:31} {size:5.2f} bytes/parameter  loss {losses[0]:.4f} -> {sum(losses[-20:]) / 20:.1e}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
