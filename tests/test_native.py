"""The compiled kernel: the bits of torch's fused operations and of `reference`, for every rule, storage and dtype.

Everything here is bits, NaN's payload aside. The sum over ranks is that of `TreeSum`'s torch spelling.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import distadam
from distadam import PrecisionPolicy, native
from distadam.comm.tree import TreeSum
from distadam.kernels import GradScaling, GroupRanges, ShardUpdate, make_kernel, select
from distadam.kernels.compiled import disagreement
from distadam.native.structures import Update
from distadam.precision import Run, choose, make_moment, make_weights, start_of
from distadam.rules import RULES
from tests.ranks import run_ranks
from tests.reference_optimizers import FUSED_RULES, Options, case_id, cases, make_group

NUMEL = 256 * 21
RUNS = (Run(0, 256 * 11, start_of("a") + 256), Run(256 * 11, NUMEL, start_of("b") + 65_536 - 512))
STORAGES = [
    ("float32", "auto", "fp32"),
    ("float32", "auto", "bf16"),
    ("float32", "auto", "8bit"),
    *[
        ("bfloat16", master, moments)
        for master in ("fp32", "split", "stochastic", "none")
        for moments in ("fp32", "8bit")
    ],
    ("bfloat16", "split", "bf16"),
    ("float16", "fp32", "bf16"),
    ("float16", "none", "fp32"),
]
OPTIONS: dict[str, Options] = {
    "adam": {"weight_decay": 0.01, "amsgrad": True},
    "adamw": {"maximize": True},
    "sgd": {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.1},
    "rmsprop": {"momentum": 0.9},
}
OBSTACLE = native.obstacle()
NEEDS_IT = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 3.0e38, -3.0e38, 2.0**-126)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)


def allocate(kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(numel, dtype=dtype)


class Shard:
    """Two parameters of a shard and everything that an update writes."""

    def __init__(self, rule: str, options: Options, dtype: str, master: str, moments: str, special: bool) -> None:
        self.rule, self.group = RULES[rule], make_group(rule, options)
        choice = choose(PrecisionPolicy(master=master, moments=moments), {}, getattr(torch, dtype), "w")  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        param = torch.randn(NUMEL, generator=generator)
        if special:
            param[7 * 64 : 7 * 64 + len(SPECIAL)] = torch.tensor(SPECIAL)
        self.param = param.to(getattr(torch, dtype))
        self.weights = make_weights(choice, self.param, RUNS, 7, allocate)
        names = self.rule.state_names(self.group)
        self.states = {name: make_moment(choice, name, self.param, RUNS, 7, allocate) for name in names}
        self.steps = torch.zeros(2)

    def step(self, kernel: str, sources: list[Tensor], **scaling: Any) -> None:
        self.steps += torch.tensor([1.0, 2.0])
        ranges = GroupRanges(
            group=self.group,
            spans=[(run.start, run.end) for run in RUNS],
            steps=list(self.steps),
            slots=[0, 1],
            first=[bool(self.steps[0] == 1), False],
        )
        update = ShardUpdate(
            weights=self.weights,
            states=self.states,
            sources=sources,
            compute_dtype=torch.float32,
            steps=self.steps,
            ranges=[ranges],
        )
        make_kernel(kernel, lambda *arguments: torch.empty(arguments[0], dtype=arguments[1])).update(
            self.rule, update, GradScaling(**scaling)
        )

    def memory(self) -> dict[str, Tensor]:
        tensors = {"param": self.param}
        for name, storage in {"weights": self.weights, **self.states}.items():
            tensors |= {f"{name}{suffix}": part.tensor for suffix, part in storage.stored().items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_bits(actual: Tensor, expected: Tensor, what: object) -> None:
    if expected.is_floating_point():
        different = (actual != expected) & ~(actual.isnan() & expected.isnan())
        different |= (actual == 0) & (actual.signbit() != expected.signbit())
    else:
        different = actual != expected
    assert not different.any(), (what, different.nonzero()[:5].tolist(), actual[different][:5], expected[different][:5])


def gradients(step: int, dtype: torch.dtype, special: bool) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    grad = torch.randn(NUMEL, generator=generator) * torch.exp(3 * torch.randn(NUMEL, generator=generator))
    if special:
        grad[20 * 64 + step : 20 * 64 + step + len(SPECIAL)] = torch.tensor(SPECIAL)
    return grad.to(dtype)


def test_the_compiled_part_is_there_where_a_compiler_is() -> None:
    """A build that failed must not go unnoticed: without the library the rest of this file is skipped."""
    if OBSTACLE and (shutil.which("cc") is None or os.environ.get("DISTADAM_NATIVE") == "0"):
        pytest.skip(OBSTACLE)
    assert OBSTACLE is None
    assert disagreement() is None


@NEEDS_IT
@pytest.mark.parametrize(("rule", "options"), cases(), ids=case_id)
def test_every_option_has_the_bits_of_torchs_operations(rule: str, options: Options) -> None:
    check(rule, options, "float32", "auto", "fp32")


@NEEDS_IT
@pytest.mark.parametrize(("dtype", "master", "moments"), STORAGES)
@pytest.mark.parametrize("rule", RULES)
def test_every_storage_has_the_bits_of_torchs_operations(rule: str, dtype: str, master: str, moments: str) -> None:
    check(rule, OPTIONS[rule], dtype, master, moments)


def check(rule: str, options: Options, dtype: str, master: str, moments: str) -> None:
    other = "torch_fused" if rule in FUSED_RULES else "reference"
    for special, wire in ((False, torch.float32), (True, torch.float32 if dtype == "float32" else torch.bfloat16)):
        ours, theirs = (Shard(rule, options, dtype, master, moments, special) for _ in range(2))
        for step in range(4):
            grad = gradients(step, wire, special)
            ours.step("compiled", [grad.clone()])
            theirs.step(other, [grad.float()])
            expected = theirs.memory()
            nan = {name for name, tensor in expected.items() if name.endswith("_scale") and tensor.isnan().any()}
            for name, actual in ours.memory().items():
                if f"{name}_scale" in nan:  # codes of a block that is not finite mean nothing
                    kept = ~expected[f"{name}_scale"].isnan().repeat_interleave(256)
                    assert_same_bits(actual[kept], expected[name][kept], (name, step, special))
                else:
                    assert_same_bits(actual, expected[name], (name, step, special))


@NEEDS_IT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_leaves", [1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 1000])
def test_sums_over_ranks_have_the_bits_of_the_tree(num_leaves: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    leaves = [gradients(rank, dtype, False)[: 64 * 13] for rank in range(num_leaves)]
    total = torch.empty(64 * 13)
    assert native.sum_ranks(total, leaves)
    monkeypatch.setattr(native, "_load", lambda: (None, "absent"))
    expected = torch.empty(64 * 13)
    TreeSum(num_leaves).add(expected, leaves)
    assert_same_bits(total, expected, num_leaves)


@NEEDS_IT
def test_a_sum_may_overwrite_one_of_its_leaves() -> None:
    leaves = [gradients(rank, torch.float32, False) for rank in range(3)]
    expected = torch.empty(NUMEL)
    native.sum_ranks(expected, leaves)
    native.sum_ranks(leaves[1], leaves)
    assert_same_bits(leaves[1], expected, "in place")


@NEEDS_IT
@pytest.mark.parametrize("num_leaves", [2, 3, 4, 8])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_an_update_adds_up_what_ranks_bring(num_leaves: int, wire: torch.dtype) -> None:
    leaves = [gradients(rank, wire, False) for rank in range(num_leaves)]
    before = [leaf.clone() for leaf in leaves]
    total = torch.empty(NUMEL)
    native.sum_ranks(total, leaves)
    scaling = {"num_ranks": torch.tensor(float(num_leaves))}
    ours, theirs = (Shard("adamw", {}, "bfloat16", "split", "8bit", False) for _ in range(2))
    squares = torch.zeros((), dtype=torch.float64)
    ours.step("compiled", leaves, squares=squares, **scaling)
    theirs.step("torch_fused", [total.clone()], **scaling)
    for name, actual in ours.memory().items():
        assert_same_bits(actual, theirs.memory()[name], name)
    assert all(torch.equal(*pair) for pair in zip(leaves, before, strict=True)), "peers' memory was written"
    assert float(squares) == pytest.approx(float((total.double() ** 2).sum()), rel=1e-7)


@NEEDS_IT
@pytest.mark.parametrize(
    "factors", [("num_ranks",), ("loss_scale",), ("multipliers",), ("num_ranks", "multipliers", "loss_scale")]
)
def test_gradients_are_scaled_by_the_same_roundings(factors: tuple[str, ...]) -> None:
    values = {
        "num_ranks": torch.tensor(3.0),
        "multipliers": [torch.tensor(0.3), torch.tensor(1.7)],
        "loss_scale": torch.tensor(1025.0),
    }
    scaling = {name: values[name] for name in factors}
    ours, theirs = (Shard("sgd", {"momentum": 0.9}, "float32", "auto", "fp32", False) for _ in range(2))
    for step in range(3):
        grad = gradients(step, torch.float32, False)
        ours.step("compiled", [grad.clone()], **scaling)
        theirs.step("torch_fused", [grad], **scaling)
    for name, actual in ours.memory().items():
        assert_same_bits(actual, theirs.memory()[name], name)


@NEEDS_IT
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("factors", [(), ("multipliers",), ("multipliers", "loss_scale")], ids=str)
@pytest.mark.parametrize("divisor", [None, 3, 4])
@pytest.mark.parametrize("num_leaves", [1, 2, 3, 4])
def test_adam_adds_up_and_scales_by_the_same_roundings(
    num_leaves: int, divisor: int | None, factors: tuple[str, ...], options: Options
) -> None:
    values = {"multipliers": [torch.tensor(0.3), torch.tensor(1.7)], "loss_scale": torch.tensor(1025.0)}
    scaling = {name: values[name] for name in factors}
    if divisor is not None:  # with uneven inputs another number than adds up
        scaling["num_ranks"] = torch.tensor(float(divisor))
    special = not factors  # whose squares are not a number
    ours, theirs = (Shard("adam", options, "float32", "auto", "fp32", False) for _ in range(2))
    squares, expected, total = torch.zeros((), dtype=torch.float64), 0.0, torch.empty(NUMEL)
    for step in range(3):
        leaves = [gradients(10 * step + rank, torch.float32, special) for rank in range(num_leaves)]
        native.sum_ranks(total, leaves)
        ours.step("compiled", leaves, squares=squares, **scaling)
        expected += float((total.double() ** 2).sum())
        theirs.step("torch_fused", [total.clone()], **scaling)
    for name, actual in ours.memory().items():
        assert_same_bits(actual, theirs.memory()[name], name)
    assert float(squares) == pytest.approx(expected, rel=1e-7, nan_ok=True)


@NEEDS_IT
def test_where_the_step_is_skipped_only_the_norm_is_taken() -> None:
    shard = Shard("adamw", {}, "bfloat16", "stochastic", "8bit", False)
    grad = gradients(0, torch.float32, False)
    shard.step("compiled", [grad])
    before, squares = shard.memory(), torch.full((), 5.0, dtype=torch.float64)
    shard.step("compiled", [grad], found_inf=torch.ones(1), squares=squares)
    for name, actual in shard.memory().items():
        assert_same_bits(actual, before[name], name)
    assert float(squares) == pytest.approx(5.0 + float((grad.double() ** 2).sum()), rel=1e-7)


@NEEDS_IT
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(700_001).bfloat16())
        policy = PrecisionPolicy(master="stochastic", moments="8bit")
        optimizer = distadam.AdamW([param], lr=0.1, precision=policy)
        for _ in range(2):
            param.grad = torch.randn(700_001).bfloat16()
            optimizer.step()
        found.append((param.detach().clone(), optimizer.grad_norm, str(optimizer.kernel_report())))
    assert "compiled" in found[0][2]
    assert_same_bits(found[0][0], found[1][0], "threads")
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), rel=2.0**-23)


def test_copies_are_complete_wherever_they_begin() -> None:
    source = torch.arange(400_000, dtype=torch.float32)
    for begin, end in product((0, 1, 5, 16), (100_000, 100_001, 399_999)):
        out = torch.full((400_000,), -1.0)
        native.copy(out[begin:end], source[begin:end])
        assert torch.equal(out[begin:end], source[begin:end])
        assert bool((out[:begin] == -1).all() and (out[end:] == -1).all())
    out = torch.zeros(800, 500)
    native.copy_all([out.t(), out[0]], [source.view(500, 800), source[:500]])
    assert torch.equal(out.t()[:, 1:], source.view(500, 800)[:, 1:])
    assert torch.equal(out[0], source[:500])


# Where it is not used -------------------------------------------------------------------------------------------------


def choice(rule: str = "adamw", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return select(RULES[rule], make_group(rule, options), dtype, "cpu")


@NEEDS_IT
def test_it_is_chosen_on_the_cpu_and_says_why_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {choice(rule).name for rule in RULES} == {"compiled"}
    assert choice(dtype=torch.float64).name == "torch_fused"
    assert "computes in float32, not torch.float64" in str(choice(dtype=torch.float64))
    assert "eps = 0" in str(choice(eps=0.0))
    monkeypatch.setenv("DISTADAM_NATIVE", "0")
    unused = native._load.__wrapped__()
    monkeypatch.setattr(native, "_load", lambda: unused)
    assert str(choice()) == "torch fuses adamw on cpu; not compiled: DISTADAM_NATIVE=0"
    monkeypatch.setenv("DISTADAM_KERNEL", "compiled")
    with pytest.raises(distadam.ConfigError, match="DISTADAM_NATIVE=0"):
        choice()


@NEEDS_IT
def test_a_torch_that_rounds_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch._fused_adamw_

    def other(params: list[Tensor], *arguments: Any, **options: Any) -> None:
        original(params, *arguments, **options)
        params[0][17] = torch.nextafter(params[0][17], torch.tensor(math.inf))

    monkeypatch.setattr(torch, "_fused_adamw_", other)
    disagreement.cache_clear()
    try:
        assert str(choice()).endswith("not compiled: torch's fused adamw rounds weights differently on this processor")
    finally:
        disagreement.cache_clear()


@pytest.mark.parametrize("fault", ["absent", "not a library", pytest.param("another version", marks=NEEDS_IT)])
def test_a_library_that_cannot_be_used_is_not(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTADAM_NATIVE", raising=False)
    expected = {
        "absent": "without a C compiler",
        "not a library": "cannot be loaded",
        "another version": "another version",
    }
    if fault == "not a library":
        (tmp_path / "library.so").write_text("nothing")
    if fault == "another version":
        monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    else:
        monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    unused = native._load.__wrapped__()
    monkeypatch.setattr(native, "_load", lambda: unused)
    assert expected[fault] in str(native.obstacle())
    assert "not compiled: " in str(choice())
    param = nn.Parameter(torch.ones(200_000))
    param.grad = torch.ones_like(param)
    distadam.AdamW([param]).step()
    assert float(param.detach()[0]) < 1


def _train(rank: int, disabled: bool) -> tuple[list[Tensor], Tensor | None, str]:
    with mock.patch.object(native, "_load", (lambda: (None, "DISTADAM_NATIVE=0")) if disabled else native._load):
        return _train_on(rank)


def _train_on(rank: int) -> tuple[list[Tensor], Tensor | None, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 700), nn.GELU(), nn.Linear(700, 300)).bfloat16()
    precision = PrecisionPolicy(master="split", moments="8bit")
    optimizer = distadam.AdamW(model.parameters(), lr=1e-2, precision=precision)
    for step in range(4):
        torch.manual_seed(10 * step + rank)
        model(torch.randn(8, 300).bfloat16()).square().mean().backward()
        if step == 2:
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()], optimizer.grad_norm, str(optimizer.kernel_report())


@NEEDS_IT
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_has_the_same_bits_without_it(num_ranks: int) -> None:
    """Ranks that share memory are read by the kernel itself; without it their sum is made first."""
    for with_it, without in zip(run_ranks(num_ranks, _train, False), run_ranks(num_ranks, _train, True), strict=True):
        assert "compiled" in with_it[2]
        assert "not compiled: DISTADAM_NATIVE=0" in without[2]
        for ours, theirs in zip(with_it[0], without[0], strict=True):
            assert_same_bits(ours, theirs, "training")
        assert float(with_it[1]) == pytest.approx(float(without[1]), rel=2.0**-22)


@NEEDS_IT
def test_an_update_refuses_what_the_library_cannot_read() -> None:
    shard = Shard("adamw", {}, "float32", "auto", "fp32", False)
    with pytest.raises(distadam.UsageError, match=r"compiled: expected a float32.*float64"):
        shard.step("compiled", [torch.zeros(NUMEL, dtype=torch.float64)])
    with pytest.raises(distadam.UsageError, match="3"):
        shard.step("compiled", [torch.zeros(NUMEL)], multipliers=[torch.ones(())] * 3)


@NEEDS_IT
def test_structures_agree_with_the_library() -> None:
    assert native._load()[0].distadam_version() == native.VERSION * 65536 + ctypes.sizeof(Update)


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["cc", "/bin/false"])
def test_packages_are_built_with_and_without_a_compiler(compiler: str, tmp_path: Path) -> None:
    root = Path(distadam.__file__).parents[1]
    source = tmp_path / "source"
    shutil.copytree(root / "distadam", source / "distadam", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    built = subprocess.run(command, env={**os.environ, "CC": compiler}, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("distadam-*-cp310-abi3-*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == (["distadam/native/library.abi3.so"] if compiler == "cc" else [])
