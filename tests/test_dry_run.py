"""The CUDA path without CUDA: model, optimizer, backward and step on the meta device with the fake process group.

On meta every operation that would bring a device value to the host raises: a step that runs has no host sync; and any
world size can be played. Meta does not refuse mixed devices by itself, so `MixedDevices` does: 0-dim CPU scalars
aside, an operation whose tensors lie on two devices is an error, and so is a copy across devices except inside
``Streams.upload`` (pinned memory on CUDA). Each of these checks is shown to fail on code that breaks it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distadam
from distadam.comm import Streams
from distadam.engine.stepper import Stepper

META = torch.device("meta")


class MixedDevices(TorchDispatchMode):
    """Rejects operations that mix devices; counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.uploading = False
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in tensors if not (tensor.dim() == 0 and tensor.device.type == "cpu")}
        if len(devices) > 1 and not self.uploading:
            raise RuntimeError(f"{func} mixes devices {devices}")
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_world(num_ranks: int) -> Iterator[MixedDevices]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=num_ranks)
    mode = MixedDevices()
    original = Streams.upload

    def upload(self: Streams, values: Any, out: torch.Tensor) -> torch.Tensor:
        mode.uploading = True
        try:
            return original(self, values, out)
        finally:
            mode.uploading = False

    try:
        with mock.patch.object(Streams, "upload", upload), mode:
            yield mode
    finally:
        dist.destroy_process_group()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 70), nn.Linear(70, 8)).to(META)


KINDS = {
    "adam": (distadam.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adamw": (distadam.AdamW, {}),
    "sgd": (distadam.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "sgd_fused": (distadam.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (distadam.RMSprop, {"centered": True, "momentum": 0.9}),
}


def train(kind: str, num_ranks: int, dtype: torch.dtype, steps: int = 3, **policies: Any) -> Counter[str]:
    with fake_world(num_ranks) as mode:
        model = make_model().to(dtype)
        build, options = KINDS[kind]
        optimizer = build(model.named_parameters(), lr=0.1, **options, **policies)
        for step in range(steps):
            model(torch.empty(4, 96, device=META, dtype=dtype)).sum().backward()
            if step == 1:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        assert optimizer.layout.num_shards == num_ranks
        return mode.operations


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.long), 3, 4096])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16])
def test_step_never_syncs_at_any_world_size(kind: str, num_ranks: int, dtype: torch.dtype) -> None:
    assert train(kind, num_ranks, dtype, comm=distadam.CommPolicy(bucket_mb=0.03))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
def test_step_never_syncs_in_any_stage_or_overlap(stage: int, overlap: bool) -> None:
    comm = distadam.CommPolicy(bucket_mb=0.03, overlap_reduce=overlap, overlap_gather=overlap)
    assert train("adamw", 8, torch.bfloat16, comm=comm, shard=distadam.ShardPolicy(stage=stage))


def test_step_never_syncs_with_gaps_accumulation_and_loss_scaling() -> None:
    with fake_world(4):
        model = make_model()
        optimizer = distadam.AdamW(model.named_parameters(), comm=distadam.CommPolicy(bucket_mb=0.03))
        for step in range(4):
            batch = torch.empty(4, 96, device=META)
            with optimizer.no_sync():
                model(batch).sum().backward()
            model[0](batch).sum().backward()  # later layers have a gradient from the first microbatch only
            if step == 2:
                optimizer.zero_grad()
                model[0](batch).sum().backward()  # and now none at all
            optimizer.found_inf = torch.zeros((), device=META)
            optimizer.grad_scale = torch.ones((), device=META)
            optimizer.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_loops_on_stand_ins_never_sync() -> None:
    with fake_world(4):
        model = make_model()
        optimizer = distadam.AdamW(model.named_parameters())
        model(torch.empty(4, 96, device=META)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model[0].weight.grad.mul_(0.5)
        optimizer.step()


def test_large_world_holds_its_shard_only() -> None:
    with fake_world(4096):
        model = nn.Linear(8192, 8192, bias=False).to(META)
        optimizer = distadam.AdamW(model.named_parameters())
        report = optimizer.memory_report()
    assert report.nbytes["moments"] == 2 * 4 * 8192 * 8192 // 4096


def test_dry_run_sees_a_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stepper._count_steps

    def syncing(self: Stepper, flat: Any, has: bytes, found_inf: Any) -> None:
        original(self, flat, has, found_inf)
        float(flat.steps[0])

    monkeypatch.setattr(Stepper, "_count_steps", syncing)
    with pytest.raises(RuntimeError, match="meta"):
        train("adamw", 2, torch.float32)


def test_dry_run_sees_mixed_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stepper._count_steps

    def mixing(self: Stepper, flat: Any, has: bytes, found_inf: Any) -> None:
        original(self, flat, has, found_inf)
        flat.steps.add_(torch.zeros(len(has)))

    monkeypatch.setattr(Stepper, "_count_steps", mixing)
    with pytest.raises(RuntimeError, match="mixes devices"):
        train("adamw", 2, torch.float32)
