"""Optimizers whose buckets Triton updates: the same bits as with the reference kernel, and no host sync on meta.

The reference takes the square root that Triton has (`ieee_sqrt` of test_triton.py), so bits are compared, tolerance
none; gradients are compared as they reach the kernel, which Triton reads in the dtype of the wire.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distadam
from distadam.errors import ConfigError, UsageError
from distadam.kernels import select
from distadam.rules import RULES
from tests.reference_optimizers import CPU_KERNEL, make_group
from tests.test_dry_run import KINDS, train

pytest.importorskip("triton", reason="triton is not installed (pip install 'distadam[triton]')")

from tests.test_triton import DEVICE, ieee_sqrt, quiet_numpy  # noqa: F401

pytestmark = [pytest.mark.usefixtures("ieee_sqrt"), pytest.mark.long]


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 30), nn.Tanh(), nn.Linear(30, 5)).to(DEVICE, dtype)


def run(kernel: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Train with gaps, clipping, loss scaling, a skipped step and a changed option; return what came out."""
    monkeypatch.setenv("DISTADAM_KERNEL", kernel)
    model = make_model(dtype)
    decay = [param for param in model.parameters() if param.dim() == 2]
    rest = [param for param in model.parameters() if param.dim() == 1]
    build, defaults = KINDS[kind]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.02}]
    optimizer = build(groups, lr=0.01, comm=distadam.CommPolicy(bucket_mb=0.015), **{**defaults, **options})
    generator, norms = torch.Generator().manual_seed(1), []
    for step in range(6):
        batch = torch.randn(8, 33, generator=generator).to(DEVICE, dtype)
        (model[:3](batch).sum() if step == 3 else model(batch).square().sum()).backward()
        if step == 2:
            norms.append(float(optimizer.clip_grad_norm_(0.5)))
        optimizer.grad_scale = torch.tensor(4.0, device=DEVICE) if step == 1 else None
        optimizer.found_inf = torch.tensor(float(step == 4), device=DEVICE) if step >= 4 else None
        if step == 5:
            optimizer.param_groups[1]["lr"] = 0.5
            optimizer.param_groups[0]["maximize"] = True
        optimizer.step()
    report = {row["kernel"] for row in optimizer.kernel_report().as_dict()}
    assert report == {kernel}
    assert optimizer.grad_norm is not None
    norms.append(float(optimizer.grad_norm))
    result = {"norms": torch.tensor(norms)} | {name: param.detach().clone() for name, param in model.named_parameters()}
    for index, state in optimizer.full_state_dict()["state"].items():
        result |= {f"{index}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return result


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("adamw", torch.bfloat16), ("sgd", torch.float16)],
    ids=str,
)
def test_optimizer_has_the_references_bits(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("reference", kind, dtype, monkeypatch)
    actual = run("triton", kind, dtype, monkeypatch)
    assert actual.keys() == expected.keys()
    norms = expected.pop("norms")
    assert torch.allclose(actual.pop("norms"), norms, rtol=2e-7, atol=0)  # float32 blocks here, float64 there
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


STORAGES = [
    distadam.PrecisionPolicy(master="split", moments="bf16"),
    distadam.PrecisionPolicy(master="split", moments="8bit"),
    distadam.PrecisionPolicy(master="stochastic", moments="8bit", seed=5),
]


@pytest.mark.long
@pytest.mark.parametrize("precision", STORAGES, ids=lambda policy: f"{policy.master}-{policy.moments}")
def test_storages_have_the_references_bits(
    precision: distadam.PrecisionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("reference", "adamw", torch.bfloat16, monkeypatch, precision=precision)
    actual = run("triton", "adamw", torch.bfloat16, monkeypatch, precision=precision)
    del expected["norms"], actual["norms"]
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("precision", STORAGES, ids=lambda policy: f"{policy.master}-{policy.moments}")
def test_step_with_storages_never_syncs(precision: distadam.PrecisionPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTADAM_KERNEL", "triton")
    operations = train("adamw", 8, torch.bfloat16, comm=distadam.CommPolicy(bucket_mb=0.03), precision=precision)
    assert operations["distadam.update.default"] > 0
    assert operations["distadam.sum_of_squares.default"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_step_never_syncs(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTADAM_KERNEL", "triton")
    operations = train(kind, 8, dtype, comm=distadam.CommPolicy(bucket_mb=0.03))
    assert operations["distadam.update.default"] > 0


@pytest.mark.parametrize("num_layers", [2, 12])
def test_launches_grow_with_buckets_and_never_with_parameters(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTADAM_KERNEL", "triton")
    model = nn.Sequential(*[nn.Linear(32, 32, device="meta") for _ in range(num_layers)])
    groups = [{"params": [param], "lr": 0.1 / (i + 1)} for i, param in enumerate(model.parameters())]
    optimizer = distadam.AdamW(groups)
    counts: Counter[str] = Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        model(torch.empty(4, 32, device="meta")).sum().backward()
        counts.clear()
        with Count():
            optimizer.step()
    assert len(optimizer.layout.buckets) == 1
    assert counts["distadam.update.default"] == 1


def test_operators_tell_torch_what_they_write() -> None:
    """opcheck runs each and compares what changed with the schema, and the checks on fake tensors."""
    from distadam.kernels.triton_norm import num_programs

    partials = torch.empty(2 * num_programs(128), dtype=torch.float64, device=DEVICE)
    total, count = torch.empty((), dtype=torch.float64, device=DEVICE), torch.empty((), device=DEVICE)
    torch.library.opcheck(
        torch.ops.distadam.sum_of_squares.default, (torch.ones(128, device=DEVICE), partials, total, count)
    )
    floats = [torch.full((1024,), 0.5, device=DEVICE) for _ in range(4)]
    chunks, rows = torch.tensor([[0, 16, 0]], dtype=torch.int32), torch.tensor([[0, 0]], dtype=torch.int32)
    hyper = torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.1, 0, 0, 0]], dtype=torch.float64)
    tables = [table.to(DEVICE) for table in (chunks, rows, hyper, torch.ones(1), torch.zeros(1, 8))]
    states, options = floats[2:], ("adam", "own", "fp32", [True, False, False])
    arguments = (floats[0], floats[1], None, states, [], [], *tables, None, None, None, None, None, *options)
    torch.library.opcheck(torch.ops.distadam.update.default, arguments)


def test_operator_refuses_what_the_kernel_could_not_bear() -> None:
    floats = [torch.empty(1024, device="meta") for _ in range(4)]
    shapes = [((1, 3), torch.int32), ((1, 2), torch.int32), ((1, 8), torch.float64), ((1,), torch.float32)]
    tables = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    tables.append(torch.empty((1, 8), device="meta"))
    options = ("adam", "own", "fp32", [True, False, False])
    rest: tuple[Any, ...] = ([], [], *tables, None, None, None, None, None, *options)
    update = torch.ops.distadam.update.default
    update(floats[0], floats[1], None, floats[2:], *rest)
    with pytest.raises(UsageError, match="expected states"):
        update(floats[0], floats[1], None, floats[2:3], *rest)
    with pytest.raises(UsageError, match=r"expected param 1-D, contiguous, 1024 of torch\.float32"):
        update(floats[0], floats[1].bfloat16(), None, floats[2:], *rest)
    with pytest.raises(UsageError, match="expected grad"):
        update(floats[0].double(), floats[1], None, floats[2:], *rest)
    with pytest.raises(UsageError, match="expected exp_avg_sq"):
        update(floats[0], floats[1], None, [floats[2], floats[3][::2]], *rest)


def test_select_says_why_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)
    group = make_group("adamw", {})
    assert select(RULES["adamw"], group, torch.float32, "cuda").name == "triton"
    choice = select(RULES["adamw"], group, torch.float64, "cuda")
    assert choice.name == "torch_fused"
    assert "not triton: Triton's kernels compute in float32" in str(choice)
    choice = select(RULES["adamw"], {**group, "eps": 0.0}, torch.float32, "cuda")
    assert choice.name == "torch_fused"
    assert "not triton: with eps=0" in str(choice)
    assert select(RULES["adamw"], group, torch.float32, "cpu").name == CPU_KERNEL
    monkeypatch.setenv("DISTADAM_KERNEL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="on the CPU Triton has its interpreter only"):
        select(RULES["adamw"], group, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("_is_installed", r"pip install 'distadam\[triton\]'"),
        ("_has_compiler", "C compiler"),
    ],
)
def test_what_triton_lacks_degrades_with_one_warning(monkeypatch: pytest.MonkeyPatch, lacks: str, words: str) -> None:
    from distadam.kernels import triton_select

    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)
    monkeypatch.setattr(triton_select, "_is_installed", lambda: True)
    monkeypatch.setattr(triton_select, lacks, lambda: False)
    triton_select._warn.cache_clear()
    group = make_group("adamw", {})
    with pytest.warns(UserWarning, match=words) as caught:
        choices = [select(RULES["adamw"], group, torch.float32, "cuda") for _ in range(2)]
    assert len(caught) == 1
    assert {choice.name for choice in choices} == {"torch_fused"}
    assert re.search(f"not triton: .*{words}", str(choices[0]))


def test_compilers_are_those_that_triton_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = pytest.importorskip("triton.runtime.build")
    from distadam.kernels import triton_select

    monkeypatch.delenv("CC", raising=False)
    for names in ((), ("gcc",), ("clang",)):
        folder = tmp_path / "-".join(("bin", *names))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        triton_select._has_compiler.cache_clear()
        assert triton_select._has_compiler() == bool(names)
        if not names:
            with pytest.raises(RuntimeError, match="Failed to find C compiler"):
                build._find_compiler("c")
    triton_select._has_compiler.cache_clear()
