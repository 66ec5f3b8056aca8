"""What only a CUDA device can show: bits, CUDA-graph capture, host syncs, allocated memory.

Parity: Triton against the reference kernel on the same device (the same operations, IEEE roots on both: the same bits),
and against torch.optim's fused optimizers within the contract's bound of two implementations, 8 eps S, taken for
AdamW as a relative tolerance of 1e-5 after a few steps. One process, no process group.

DISTADAM_GPU_TESTS_ON_CPU=1 runs what needs no CUDA on the CPU, in Triton's interpreter: a test of these tests. Bits of
the reference's square root then differ ([Note: square roots on the CPU]), so that comparison allows what torch's does.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import distadam

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
ON_CPU = not HAS_CUDA and os.environ.get("DISTADAM_GPU_TESTS_ON_CPU") == "1"
REASON = "needs a CUDA device; torch.cuda.is_available() is False"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA and not ON_CPU, reason=REASON)]
CUDA_ONLY = pytest.mark.skipif(not HAS_CUDA, reason=REASON)

KINDS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (distadam.Adam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "adamw": (distadam.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (distadam.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": (distadam.RMSprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
}
PRECISIONS = [
    distadam.PrecisionPolicy(),
    distadam.PrecisionPolicy(master="split", moments="bf16"),
    distadam.PrecisionPolicy(master="split", moments="8bit"),
    distadam.PrecisionPolicy(master="stochastic", moments="8bit"),
]


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Raise on every operation that makes the host wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_model(dtype: torch.dtype = torch.float32, width: int = 256 if HAS_CUDA else 32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width + 3), nn.GELU(), nn.LayerNorm(width + 3), nn.Linear(width + 3, width)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def gradients(model: nn.Module, step: int) -> None:
    """The same gradients for every optimizer, whatever its weights have become."""
    generator = torch.Generator(DEVICE).manual_seed(step)
    loss = model[0].weight.new_zeros(())
    for param in model.parameters():
        loss = loss + (param * torch.randn(param.shape, generator=generator, device=DEVICE).to(param.dtype)).sum()
    loss.backward()


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        gradients(model, step)
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, other in zip(actual, expected, strict=True):
        if HAS_CUDA:
            assert torch.equal(mine, other)
        else:
            torch.testing.assert_close(mine, other, rtol=1e-5 if mine.dtype == torch.float32 else 0.05, atol=1e-2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_triton_has_the_references_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, _, options = KINDS[kind]
    results = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("DISTADAM_KERNEL", kernel)
        model = make_model()
        results.append(train(build(model.named_parameters(), lr=1e-2, **options), model))
    same(*results)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda policy: f"{policy.master}-{policy.moments}")
def test_storages_have_the_references_bits(
    precision: distadam.PrecisionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("DISTADAM_KERNEL", kernel)
        model = make_model(torch.bfloat16)
        optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2, precision=precision)
        results.append(train(optimizer, model))
    same(*results)


@pytest.mark.parametrize("kind", list(KINDS))
def test_triton_agrees_with_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, theirs, options = KINDS[kind]
    if not HAS_CUDA:
        monkeypatch.setenv("DISTADAM_KERNEL", "triton")
    model, other = make_model(), make_model()
    fused = {} if kind == "rmsprop" else {"fused": True}
    ours = train(build(model.named_parameters(), lr=1e-2, **options), model)
    for mine, expected in zip(ours, train(theirs(other.parameters(), lr=1e-2, **options, **fused), other), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@CUDA_ONLY
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.usefixtures("no_sync")
def test_step_never_syncs(kind: str) -> None:
    build, _, options = KINDS[kind]
    model = make_model()
    optimizer = build(model.named_parameters(), lr=1e-2, **options)
    train(optimizer, model, steps=2)  # tables and scratch are made
    scale, found = torch.tensor(2.0, device=DEVICE), torch.zeros((), device=DEVICE)
    gradients(model, 9)
    torch.cuda.set_sync_debug_mode("error")
    optimizer.clip_grad_norm_(1.0)
    optimizer.grad_scale, optimizer.found_inf = scale, found
    optimizer.step()


@CUDA_ONLY
@pytest.mark.usefixtures("no_sync")
def test_changed_lr_is_uploaded_without_a_sync() -> None:
    model = make_model()
    optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2)
    train(optimizer, model, steps=2)
    gradients(model, 9)
    torch.cuda.set_sync_debug_mode("error")
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


@CUDA_ONLY
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda policy: f"{policy.master}-{policy.moments}")
def test_cuda_graph_replays_forward_backward_and_step_under_a_schedule(precision: distadam.PrecisionPolicy) -> None:
    """Captured once with a tensor lr; replays with another lr are the eager steps, bit for bit."""
    batch = torch.randn(16, 256, device=DEVICE, dtype=torch.bfloat16)
    eager, captured = make_model(torch.bfloat16), make_model(torch.bfloat16)
    rates = [torch.tensor(1e-2, device=DEVICE) for _ in range(2)]
    models = (eager, captured)
    optimizers = [
        distadam.AdamW(model.named_parameters(), lr=lr, precision=precision)
        for model, lr in zip(models, rates, strict=True)
    ]

    def iterate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(batch).float().square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iterate(captured, optimizers[1])
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        iterate(eager, optimizers[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate(captured, optimizers[1])
    for lr in (1e-2, 3e-3, 1e-3):
        for rate in rates:
            rate.fill_(lr)
        iterate(eager, optimizers[0])
        graph.replay()
    for mine, expected in zip(captured.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine, expected)


@CUDA_ONLY
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda policy: f"{policy.master}-{policy.moments}")
def test_memory_report_is_what_the_allocator_holds(precision: distadam.PrecisionPolicy) -> None:
    """Beside the model the optimizer owns everything on the device; the allocator rounds blocks up to 512 bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = make_model(torch.bfloat16, width=2048)
    optimizer = distadam.AdamW(model.named_parameters(), precision=precision)
    train(optimizer, model, steps=2)
    optimizer.zero_grad()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    assert optimizer.memory_report().total == pytest.approx(held, rel=0.01)


def test_copies_of_the_model_do_not_share_kernels_state() -> None:
    """Two optimizers on one device keep tables of their own."""
    first = make_model()
    second = copy.deepcopy(first)
    one, two = (distadam.AdamW(model.named_parameters(), lr=lr) for model, lr in ((first, 1e-2), (second, 0.0)))
    start = [param.detach().clone() for param in second.parameters()]
    for step in range(2):
        for model, optimizer in ((first, one), (second, two)):
            optimizer.zero_grad()
            gradients(model, step)
            optimizer.step()
    decayed = [torch.equal(a, b) for a, b in zip(second.parameters(), start, strict=True)]
    assert all(decayed)
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), start, strict=True))
