"""16-bit training. Run: python examples/03_mixed_precision.py, or on more ranks with distadam launch.

bf16: the optimizer keeps what the parameters cannot hold, each rank its share: fp32 masters, or the 16 bits more that
make one (split), or nothing (stochastic rounding). Moments are fp32, bf16 or 8-bit; groups may choose for themselves.
fp16: the parameters are fp32, autocast computes in fp16, and a GradScaler keeps small gradients from becoming zero; a
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


def build_model(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1)).to(device)


def nbytes(optimizer: distadam.AdamW, model: nn.Module) -> float:
    """Return the bytes per parameter of weights, masters and moments on this rank, padding included."""
    kept = optimizer.memory_report().nbytes
    numel = sum(param.numel() for param in model.parameters())
    return (kept["parameters"] + kept["masters"] + kept["moments"]) / numel


def train_bf16(device: torch.device, steps: int, **storages: str) -> tuple[list[float], float]:
    """Return losses and bytes with bf16 parameters stored like that; the last layer has fp32 moments all the same."""
    model = build_model(device).bfloat16()
    groups = [{"params": model[:-1].parameters()}, {"params": model[-1].parameters(), "moments": "fp32"}]
    optimizer = distadam.AdamW(groups, lr=2e-3, precision=distadam.PrecisionPolicy(**storages))
    losses = []
    for _ in range(steps):
        inputs, targets = waves(128, device)
        loss = nn.functional.mse_loss(model(inputs.bfloat16()).float(), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, nbytes(optimizer, model)


def train_fp16(device: torch.device, steps: int) -> tuple[list[float], float]:
    """Return losses and bytes of fp16 autocast with a gradient scaler: the recipe of torch's own documentation."""
    model = build_model(device)
    optimizer = distadam.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler(device.type)
    losses = []
    for _ in range(steps):
        inputs, targets = waves(128, device)
        with torch.autocast(device.type, dtype=torch.float16):
            loss = nn.functional.mse_loss(model(inputs).float(), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, nbytes(optimizer, model)


def main() -> None:
    group = distadam.init_process_group()
    runs = {"fp16 autocast, GradScaler": train_fp16}
    for storages in ("fp32 fp32", "split fp32", "split bf16", "split 8bit", "stochastic 8bit"):
        master, moments = storages.split()
        runs[f"bf16, {master}, {moments} moments"] = partial(train_bf16, master=master, moments=moments)
    for name, train in runs.items():
        torch.manual_seed(group.rank)
        losses, size = train(group.device, steps=150)
        if group.rank == 0:
            print(f"{name:31} {size:5.2f} bytes/parameter  loss {losses[0]:.4f} -> {sum(losses[-20:]) / 20:.1e}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
