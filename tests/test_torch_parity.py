"""One process without a group against torch.optim: bits, and everything a loop does with an optimizer.

Adam, AdamW and SGD on parameters of a multiple of 64 elements: the same bits as torch.optim's fused implementation over
50 steps (tolerance: none), for every option, bucket size and mixture of parameter groups. Sizes that are no multiple of
64, and RMSprop, which torch does not fuse: contract 2.3.1's bound of 4 eps S per element and step, S the sum of the
absolute terms, measured against an oracle in extended precision that starts each step from the optimizer's own state.
Schedulers, closures, hooks, groups: the same code runs on a torch optimizer beside ours and every result is compared
exactly.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

import distadam
from distadam import CommPolicy, ConfigError, UsageError
from tests.reference_optimizers import (
    CPU_KERNEL,
    FUSED_RULES,
    ORACLES,
    TORCH_OPTIMIZERS,
    Options,
    Problem,
    case_id,
    cases,
    same_bits,
    worst_error,
)

BOUND = 4.0
NUM_STEPS = 50
SIZES = (64, 64, 640, 128, 192, 1024)
ODD_SHAPES = ((1,), (7, 9), (), (65,), (0,), (3, 5, 7), (130,))
BUCKET_MBS = {"71 B": 71 / 2**20, "1 KB": 1 / 2**10, "25 MB": 25}
OURS: dict[str, Any] = {
    "adam": distadam.Adam,
    "adamw": distadam.AdamW,
    "sgd": distadam.SGD,
    "rmsprop": distadam.RMSprop,
}
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERY_RULE = pytest.mark.parametrize("name", list(OURS))
FUSED_CASES = pytest.mark.parametrize(("name", "options"), cases(FUSED_RULES), ids=case_id)
EVERY_CASE = pytest.mark.parametrize(("name", "options"), cases(), ids=case_id)

Params = list[nn.Parameter]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forced kernel; and no search of all live objects for DDP, which takes most of a small run's time."""
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)
    monkeypatch.setattr("distadam.engine.places.refuse_ddp", lambda names: None)


def make_params(shapes: Iterable[Any] = SIZES, dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def make_gradients(params: Params, seed: int) -> tuple[Tensor, ...]:
    """Draw normal numbers over three decades."""
    return _draw(tuple(param.shape for param in params), params[0].dtype, seed)


@functools.cache
def _draw(shapes: tuple[torch.Size, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        scale = 10 ** (3 * torch.rand(shape, generator=generator, dtype=dtype) - 2)
        return scale * torch.randn(shape, generator=generator, dtype=dtype)

    return tuple(draw(shape) for shape in shapes)


def backward(params: Params, grads: Iterable[Tensor]) -> Tensor:
    """Run a backward that gives each parameter exactly this gradient; return the loss."""
    loss = sum(((param * grad).sum() for param, grad in zip(params, grads, strict=True)), torch.zeros(()))
    loss.backward()
    return loss.detach()


def train(optimizer: torch.optim.Optimizer, params: Params, steps: Iterable[int]) -> None:
    for step in steps:
        backward(params, make_gradients(params, step))
        optimizer.step()
        optimizer.zero_grad()


def results(optimizer: torch.optim.Optimizer, params: Params) -> dict[str, Tensor]:
    """Return parameters and torch's full state, by name, 1-D."""
    if isinstance(optimizer, distadam.ShardedOptimizer):
        state = optimizer.full_state_dict()["state"]
    else:
        state = optimizer.state_dict()["state"]
    entries = {f"{key} {n}": value for n, entry in state.items() for key, value in entry.items() if value is not None}
    return {f"param {i}": p.detach().reshape(-1) for i, p in enumerate(params)} | {
        key: value.reshape(-1) for key, value in entries.items()
    }


def both(name: str, options: Options, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, Params]]:
    """Yield ours and torch's (fused where torch can), each with parameters and tensor hyper-parameters of its own."""
    implementation = {"fused": True} if name in FUSED_RULES else {}
    for make, more in ((OURS[name], {}), (TORCH_OPTIMIZERS[name], implementation)):
        params = make_params(dtype=dtype)
        yield make(params, **copy.deepcopy(options), **more), params


def same_after(
    name: str,
    options: Options,
    loop: Callable[[Any, Params], Any],
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Run ``loop`` on torch's and on ours; say whether what it returns, parameters and states agree in every bit."""
    (mine, my_results), (other, other_results) = [
        (loop(optimizer, params), results(optimizer, params)) for optimizer, params in both(name, options, dtype)
    ]
    return bool(mine == other) and same_bits(my_results, other_results)


# The same bits -------------------------------------------------------------------------------------------------------


def interleaved_groups(params: Params) -> list[dict[str, Any]]:
    """Groups that alternate, two of them with hyper-parameters of their own."""
    return [
        {"params": params[0::3], "weight_decay": 0.2},
        {"params": params[1::3], "lr": 1e-2, "maximize": True},
        {"params": params[2::3]},
    ]


@BOTH_DTYPES
@FUSED_CASES
def test_bits_equal_torch_fused_over_50_steps(name: str, options: Options, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    reference = TORCH_OPTIMIZERS[name](interleaved_groups(params), **options, fused=True)
    train(reference, params, range(NUM_STEPS))
    expected = results(reference, params)
    bucket_mbs = BUCKET_MBS if dtype == torch.float32 else {"1 KB": BUCKET_MBS["1 KB"]}
    num_buckets = []
    for bucket_mb in bucket_mbs.values():
        params = make_params(dtype=dtype)
        optimizer = OURS[name](interleaved_groups(params), **options, comm=CommPolicy(bucket_mb=bucket_mb))
        train(optimizer, params, range(NUM_STEPS))
        num_buckets.append(len(optimizer.layout.buckets))
        kernel = CPU_KERNEL if dtype == torch.float32 else "torch_fused"
        assert {row[2] for row in optimizer.kernel_report().rows} == {kernel}
        assert same_bits(results(optimizer, params), expected)
    assert num_buckets == ([6, 4, 1] if dtype == torch.float32 else [6])


def test_bits_comparison_sees_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(optimizer: Any, params: Params) -> None:
        train(optimizer, params, range(5))

    assert same_after("adamw", {}, loop)
    monkeypatch.setenv("DISTADAM_KERNEL", "reference")
    assert not same_after("adamw", {}, loop)


FIFTY_GROUPS: dict[str, Callable[[int], Options]] = {
    "adam": lambda i: {
        "lr": 1e-3 * (1 + i),
        "betas": (0.5 + i / 128, 0.9 + i / 1024),
        "eps": 1e-8 * (1 + i % 5),
        "weight_decay": 0.01 * (i % 3),
        "amsgrad": i % 2 == 1,
        "maximize": i % 5 == 4,
        "decoupled_weight_decay": i % 7 < 3,
    },
    "adamw": lambda i: {"lr": 1e-3 * (1 + i), "weight_decay": 0.1 * (i % 4), "amsgrad": i % 3 == 0},
    "sgd": lambda i: {
        "lr": 1e-3 * (1 + i),
        "momentum": 0.1 * (i % 4),
        "dampening": 0.2 * (i % 2),
        "weight_decay": 0.01 * (i % 3),
        "nesterov": i % 4 == 2,
        "maximize": i % 5 == 4,
    },
}


@pytest.mark.parametrize("bucket_mb", BUCKET_MBS.values(), ids=BUCKET_MBS.keys())
@pytest.mark.parametrize("name", FUSED_RULES)
def test_bits_equal_torch_with_fifty_interleaved_groups(name: str, bucket_mb: float) -> None:
    shapes = [64 * (1 + i % 3) for i in range(100)]
    outcomes = []
    for make, more in ((OURS[name], {"comm": CommPolicy(bucket_mb=bucket_mb)}), (TORCH_OPTIMIZERS[name], {})):
        params = make_params(shapes)
        groups: list[Any] = [{"params": params[i::50], **FIFTY_GROUPS[name](i)} for i in range(50)]
        if not more:
            groups = [group | {"fused": True} for group in groups]
        optimizer = make(groups, **more)
        train(optimizer, params, range(10))
        outcomes.append(results(optimizer, params))
    assert same_bits(*outcomes)


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=["0-D", "1-D"])
@pytest.mark.parametrize("name", FUSED_RULES)
def test_bits_equal_torch_with_tensor_lr_changed_in_place(name: str, lr: Tensor) -> None:
    def loop(optimizer: Any, params: Params) -> list[float]:
        (group,) = optimizer.param_groups
        tensor, seen = group["lr"], []
        for step in range(20):
            tensor.mul_(0.9)
            train(optimizer, params, [step])
            seen.append(float(group["lr"]))
        assert group["lr"] is tensor
        return seen

    assert same_after(name, {"lr": lr}, loop)


def test_bits_equal_torch_with_tensor_betas_and_weight_decay() -> None:
    def loop(optimizer: Any, params: Params) -> None:
        train(optimizer, params, range(10))

    betas = (torch.tensor(0.8), torch.tensor([0.95]))
    assert same_after("adam", {"betas": betas}, loop)
    assert same_after("sgd", {"weight_decay": torch.tensor(0.1)}, loop)


CHANGES: dict[str, list[Options]] = {
    "adam": [
        {"betas": (0.5, 0.6)},
        {"eps": 1e-3},
        {"maximize": True},
        {"weight_decay": 0.3},
        {"decoupled_weight_decay": True},
        {"lr": torch.tensor(0.02)},
        {"lr": 0.0},
        {"lr": 0.5},
    ],
    "adamw": [{"betas": (0.0, 0.6)}, {"weight_decay": 0.0}, {"maximize": True}, {"lr": 0.5}],
    "sgd": [
        {"momentum": 0.9},
        {"momentum": 0.0},
        {"momentum": 0.5, "dampening": 0.4},
        {"dampening": 0.0, "nesterov": True},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"lr": torch.tensor(0.02)},
    ],
}


@pytest.mark.parametrize("first", range(2))
@pytest.mark.parametrize("name", FUSED_RULES)
def test_bits_equal_torch_when_hyper_parameters_change_mid_run(name: str, first: int) -> None:
    def loop(optimizer: Any, params: Params) -> None:
        train(optimizer, params, range(3 * first))
        for number, change in enumerate(CHANGES[name]):
            optimizer.param_groups[0].update(copy.deepcopy(change))
            train(optimizer, params, range(3 * number, 3 * number + 3))

    assert same_after(name, {}, loop)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_momentum_that_comes_late_begins_with_the_gradient(dampening: float) -> None:
    """torch's first buffer is g, not (1 - dampening) g, whenever momentum comes, and it stays when momentum goes."""

    def loop(optimizer: Any, params: Params) -> None:
        (group,) = optimizer.param_groups
        for step in range(20):
            group["momentum"] = 0.9 if step // 4 in (1, 3) else 0.0
            train(optimizer, params, [step])

    assert same_after("sgd", {"dampening": dampening}, loop)


@pytest.mark.parametrize("name", FUSED_RULES)
def test_bits_equal_torch_when_parameters_have_gradients_in_some_steps_only(name: str) -> None:
    """Each parameter counts its own steps; ranges are cut and joined as step counts differ."""
    options: Options = {"momentum": 0.9, "dampening": 0.5} if name == "sgd" else {"weight_decay": 0.1}

    outcomes = []
    for make, more in ((OURS[name], {}), (TORCH_OPTIMIZERS[name], {"fused": True})):
        params = make_params([64] * 8)
        # A group for each in torch: its fused SGD refuses momentum buffers of which only some exist.
        optimizer = make([{"params": [param]} for param in params] if more else params, **options, **more)
        generator = torch.Generator().manual_seed(5)
        for step in range(30):
            used = (torch.rand(8, generator=generator) < 0.4).tolist() if step else [False] * 7 + [True]
            chosen = [param for param, flag in zip(params, used, strict=True) if flag]
            if chosen:
                backward(chosen, make_gradients(chosen, step))
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(results(optimizer, params))
    assert same_bits(*outcomes)
    if name != "sgd":
        assert len({float(value) for key, value in outcomes[0].items() if key.startswith("step")}) > 1


# The bound -----------------------------------------------------------------------------------------------------------


def problem_of(optimizer: Any, param: nn.Parameter, names: tuple[str, ...], count: int) -> Problem:
    entry = optimizer.state[param]
    grad = torch.empty(0)  # torch_step's; an oracle gets its own below
    weight = param.detach().reshape(-1).clone()
    state = {key: entry[key].clone() for key in names}
    return Problem(weight=weight, grad=grad, state=state, count=count)


def worst_of_a_run(name: str, options: Options, dtype: torch.dtype, num_steps: int = 4) -> float:
    """Return the largest |error| / (eps S) of any element in any step, each step from the state before it."""
    params = make_params(ODD_SHAPES, dtype)
    optimizer = OURS[name](params, **options, comm=CommPolicy(bucket_mb=1 / 2**10))
    group = optimizer.param_groups[0]
    names = tuple(key for key in optimizer.state[params[0]] if key != "step") if optimizer.state else ()
    worst = 0.0
    for step in range(num_steps):
        grads = make_gradients(params, step)
        exact = []
        for param, grad in zip(params, grads, strict=True):
            problem = problem_of(optimizer, param, names, step + 1)
            problem.grad = grad.reshape(-1)
            exact.append(ORACLES[name](group, problem))
        backward(params, grads)
        optimizer.step()
        for param, expected in zip(params, exact, strict=True):
            if param.numel():
                worst = max(worst, worst_error(problem_of(optimizer, param, names, step + 1), expected))
    return worst


def needs_extended_precision(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("this platform's long double is a double: no oracle for fp64")


@BOTH_DTYPES
@EVERY_CASE
def test_odd_sizes_are_within_the_contracts_bound(name: str, options: Options, dtype: torch.dtype) -> None:
    needs_extended_precision(dtype)
    assert worst_of_a_run(name, options, dtype) <= BOUND


@EVERY_RULE
def test_bound_sees_an_update_that_is_off_by_a_millionth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Options = {"lr": 0.5, "momentum": 0.9} if name in ("sgd", "rmsprop") else {"lr": 0.5}
    assert worst_of_a_run(name, options, torch.float32) <= BOUND
    key = "momentum" if "momentum" in options else "betas"
    oracle = ORACLES[name]

    def off(group: Any, problem: Problem) -> Any:
        value = group[key]
        wrong = value * (1 + 1e-6) if key == "momentum" else (value[0] * (1 + 1e-6), value[1])
        return oracle({**group, key: wrong}, problem)

    monkeypatch.setitem(ORACLES, name, off)
    assert worst_of_a_run(name, options, torch.float32) > BOUND


def test_rmsprop_stays_close_to_torch_over_50_steps() -> None:
    """No fused rule to equal: 50 steps of 4 eps S each, S at most about twice |w| here (|w| ~ 1, lr 1e-3)."""
    for options in ({}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}):
        finals = []
        for optimizer, params in both("rmsprop", {"lr": 1e-3, **options}):
            train(optimizer, params, range(NUM_STEPS))
            finals.append(torch.cat([param.detach() for param in params]))
        ours, theirs = finals
        assert float((ours - theirs).abs().max()) <= 50 * BOUND * 2**-23 * 2 * float(theirs.abs().max())


# Schedulers ----------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.StepLR(o, step_size=3)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=5),
}


def scheduled(make: Callable[[Any], Any]) -> Callable[[Any, Params], list[Any]]:
    """Return a loop that records what the scheduler did to the group."""

    def loop(optimizer: Any, params: Params) -> list[Any]:
        scheduler = make(optimizer)
        seen = []
        for step in range(20):
            train(optimizer, params, [step])
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            (group,) = optimizer.param_groups
            seen.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        assert len({lr for lr, _, _ in seen}) > 1
        return seen

    return loop


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor-lr"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_bits_equal_torch_under_a_scheduler(name: str, tensor_lr: bool, make: Callable[[Any], Any]) -> None:
    options: Options = {"lr": torch.tensor(0.05) if tensor_lr else 0.05}
    if name == "sgd":
        options["momentum"] = 0.9
    assert same_after(name, options, scheduled(make))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", SCHEDULERS["OneCycleLR"]),
        ("adam", SCHEDULERS["OneCycleLR"]),
        ("sgd", lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3)),
    ],
    ids=["sgd-OneCycleLR", "adam-OneCycleLR", "sgd-CyclicLR"],
)
def test_bits_equal_torch_when_a_scheduler_cycles_momentum(name: str, make: Callable[[Any], Any]) -> None:
    def loop(optimizer: Any, params: Params) -> list[Any]:
        seen = scheduled(make)(optimizer, params)
        assert len({(momentum, betas) for _, momentum, betas in seen}) > 1
        return seen

    assert same_after(name, {"momentum": 0.9} if name == "sgd" else {}, loop)


def test_scheduler_state_resumes_with_the_optimizers() -> None:
    def loop(optimizer: Any, params: Params) -> list[float]:
        make = SCHEDULERS["CosineAnnealingLR"]
        scheduler = make(optimizer)
        for step in range(4):
            train(optimizer, params, [step])
            scheduler.step()
        saved = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict()))
        values = [param.detach().clone() for param in params]
        lrs = []
        for _ in range(2):  # the second time from what was saved
            resumed = make(optimizer)
            resumed.load_state_dict(saved[0])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))  # torch's shares memory with what it loads
            with torch.no_grad():
                for param, value in zip(params, values, strict=True):
                    param.copy_(value)
            if isinstance(optimizer, distadam.ShardedOptimizer):
                optimizer.reload_parameters()
            for step in range(4, 8):
                train(optimizer, params, [step])
                resumed.step()
                lrs.append(optimizer.param_groups[0]["lr"])
        assert lrs[:4] == lrs[4:]
        return lrs

    assert same_after("adamw", {"lr": 0.05}, loop)


# Closures and hooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("name", FUSED_RULES)
def test_closure_is_called_once_with_gradients_on_and_its_loss_returned(name: str, no_grad: bool) -> None:
    def loop(optimizer: Any, params: Params) -> list[float]:
        calls, losses = [], []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum(((param**2).sum() for param in params), torch.zeros(()))
            loss.backward()
            return loss

        for _ in range(5):
            with torch.set_grad_enabled(not no_grad):
                losses.append(float(optimizer.step(closure).detach()))
                assert torch.is_grad_enabled() is not no_grad
        assert calls == [True] * 5
        optimizer.zero_grad()
        assert optimizer.step() is None
        return losses

    assert same_after(name, {}, loop)


def test_step_hooks_run_in_torchs_order() -> None:
    def loop(optimizer: Any, params: Params) -> list[Any]:
        seen: list[Any] = []

        def record(name: str) -> Callable[..., None]:
            def hook(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append((name, owner is optimizer, args[0] is optimizer, len(args), kwargs, params[0][0].item()))

            return hook

        handles = [
            optimizer.register_step_post_hook(record("post 1")),
            optimizer.register_step_pre_hook(record("pre 1")),
            optimizer.register_step_pre_hook(record("pre 2")),
            register_optimizer_step_pre_hook(record("global pre")),
            register_optimizer_step_post_hook(record("global post")),
        ]
        train(optimizer, params, [0])
        for handle in handles:
            handle.remove()
        train(optimizer, params, [1])
        assert [name for name, *_ in seen] == ["global pre", "pre 1", "pre 2", "post 1", "global post"]
        assert seen[2][-1] != seen[3][-1]  # a pre hook sees the old parameter, a post hook the new one
        return seen

    assert same_after("adamw", {}, loop)


def test_step_pre_hook_may_replace_the_arguments() -> None:
    def loop(optimizer: Any, params: Params) -> list[Any]:
        backward(params, make_gradients(params, 0))
        optimizer.register_step_pre_hook(lambda owner, args, kwargs: ((owner,), {"closure": lambda: 42}))
        answers = [optimizer.step()]
        optimizer.register_step_pre_hook(lambda owner, args, kwargs: 7)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
            optimizer.step()
        return answers

    assert same_after("adamw", {}, loop)


def test_state_dict_hooks_run_in_torchs_order_and_replace() -> None:
    def loop(optimizer: Any, params: Params) -> list[Any]:
        seen: list[Any] = []
        train(optimizer, params, range(2))
        optimizer.register_state_dict_pre_hook(lambda owner: seen.append(("pre", owner is optimizer)))
        optimizer.register_state_dict_pre_hook(lambda owner: seen.append("pre first"), prepend=True)
        optimizer.register_state_dict_post_hook(lambda owner, found: seen.append(("post", sorted(found["state"]))))
        optimizer.register_state_dict_post_hook(lambda owner, found: {"wrapped": found})
        optimizer.register_state_dict_post_hook(lambda owner, found: seen.append("post first"), prepend=True)
        optimizer.register_load_state_dict_pre_hook(lambda owner, found: seen.append(("load pre", sorted(found))))
        optimizer.register_load_state_dict_pre_hook(lambda owner, found: found["wrapped"])
        optimizer.register_load_state_dict_pre_hook(lambda owner, found: seen.append("load first"), prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda owner: seen.append(("loaded", owner is optimizer)))
        found = optimizer.state_dict()
        assert list(found) == ["wrapped"]
        assert {"state", "param_groups"} <= set(found["wrapped"])
        optimizer.load_state_dict(copy.deepcopy(found))
        assert seen == [
            "pre first",
            ("pre", True),
            "post first",
            ("post", list(range(len(SIZES)))),
            "load first",
            ("load pre", ["wrapped"]),
            ("loaded", True),
        ]
        for hooks in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            getattr(optimizer, f"_optimizer_{hooks}_hooks").clear()
        train(optimizer, params, range(2, 4))
        return seen

    assert same_after("adamw", {}, loop)


def test_state_dict_post_hook_sees_all_that_load_needs() -> None:
    (optimizer, params), _ = both("adamw", {})
    kept: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda owner, found: kept.append(copy.deepcopy(found)))
    train(optimizer, params, range(2))
    optimizer.state_dict()
    values = [param.detach().clone() for param in params]
    train(optimizer, params, [2])
    expected = results(optimizer, params)
    optimizer.load_state_dict(kept[0])
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    optimizer.reload_parameters()
    train(optimizer, params, [2])
    assert same_bits(results(optimizer, params), expected)


def test_state_dict_hooks_run_for_the_full_state_too() -> None:
    (optimizer, params), _ = both("adamw", {})
    train(optimizer, params, [0])
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda owner: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda owner, found: {"wrapped": found})
    full = optimizer.full_state_dict()
    assert seen == ["pre"]
    assert list(full) == ["wrapped"]
    assert sorted(full["wrapped"]) == ["param_groups", "state"]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_profiler_shows_torchs_names(name: str) -> None:
    (optimizer, params), _ = both(name, {})
    with torch.autograd.profiler.profile() as profiler:
        train(optimizer, params, [0])
    kind = type(optimizer).__name__
    keys = {event.key for event in profiler.key_averages()}
    assert {f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"} <= keys


# Groups and names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED_RULES)
def test_bits_equal_torch_when_groups_are_added_mid_run(name: str) -> None:
    def loop(optimizer: Any, params: Params) -> list[int]:
        fused = {} if isinstance(optimizer, distadam.ShardedOptimizer) else {"fused": True}
        added = make_params([64, 128, 256])
        params += added
        for number, param in enumerate(added):
            train(optimizer, params[: len(SIZES) + number], [number])
            group = {"params": param if number else [param], "lr": 0.01 * (number + 1), **fused}
            optimizer.add_param_group(group)
            assert optimizer.param_groups[-1] is group
            assert group["params"][0] is param
        train(optimizer, params, range(3, 8))
        return [len(group["params"]) for group in optimizer.param_groups]

    assert same_after(name, {}, loop)


def test_group_that_cannot_be_added_leaves_the_optimizer_as_it_was() -> None:
    (optimizer, params), _ = both("adamw", {})
    train(optimizer, params, [0])
    layout = optimizer.layout
    bad: dict[str, tuple[type[Exception], Any]] = {
        "must be a dict": (TypeError, [make_params([64])]),
        "more than one parameter group": (ValueError, {"params": [params[0]]}),
        "cannot add param group with names": (ValueError, {"params": [("w", make_params([64])[0])]}),
        "complex": (ConfigError, {"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]}),
    }
    for text, (error, group) in bad.items():
        with pytest.raises(error, match=text):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert optimizer.layout is layout
    train(optimizer, params, [1])
    (reference, expected), _ = both("adamw", {})
    train(reference, expected, [0, 1])
    assert same_bits(results(optimizer, params), results(reference, expected))


def test_param_groups_keep_their_identity() -> None:
    params = make_params()
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "lr": 0.5}]
    optimizer = distadam.AdamW(groups)
    kept = optimizer.param_groups
    train(optimizer, params, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(optimizer.full_state_dict())
    optimizer.add_param_group({"params": make_params([64])})
    assert optimizer.param_groups is kept
    assert all(mine is given for mine, given in zip(optimizer.param_groups, groups, strict=False))
    assert all(a is b for a, b in zip(groups[0]["params"], params[:3], strict=True))
    assert groups[1]["lr"] == 0.5


def test_parameters_keep_identity_values_shapes_and_strides() -> None:
    shapes = make_params([(4, 6, 5, 3), (8, 8), ()])
    before = [
        nn.Parameter(shapes[0].detach().contiguous(memory_format=torch.channels_last)),
        nn.Parameter(shapes[1].detach().t()),
        shapes[2],
    ]
    facts = [(param.detach().clone(), param.shape, param.stride()) for param in before]
    module = nn.ParameterList(before)
    distadam.SGD(module.parameters())
    for now, param, (value, shape, stride) in zip(module.parameters(), before, facts, strict=True):
        assert now is param
        assert (now.shape, now.stride()) == (shape, stride)
        assert torch.equal(now.detach(), value)
        assert now.is_leaf


def test_named_parameters_name_groups_layout_and_messages() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ours, theirs = distadam.AdamW(model.named_parameters()), torch.optim.AdamW(model.named_parameters())
    assert ours.param_groups[0]["param_names"] == theirs.param_groups[0]["param_names"]
    assert [spec.name for spec in ours.layout.params] == [name for name, _ in model.named_parameters()]
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(UsageError, match=r"'1\.weight'"):
        model[1].weight.grad + 1
    extra = nn.Linear(4, 4)
    ours.add_param_group({"params": extra.named_parameters(prefix="extra")})
    assert ours.param_groups[1]["param_names"] == ["extra.weight", "extra.bias"]


def test_unnamed_parameters_are_numbered_over_all_groups() -> None:
    params = make_params([64, 64, 64])
    optimizer = distadam.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.add_param_group({"params": make_params([64])})
    assert [spec.name for spec in optimizer.layout.params] == [f"param.{i}" for i in range(4)]
    assert all("param_names" not in group for group in optimizer.param_groups)


# zero_grad -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", FUSED_RULES)
def test_bits_equal_torch_with_zero_grad_both_ways(name: str, hint: Options) -> None:
    """A gradient of zeros steps (moments decay), none does not."""
    options: Options = {"momentum": 0.9} if name == "sgd" else {}
    outcomes = []
    for make, more in ((OURS[name], hint), (TORCH_OPTIMIZERS[name], {"fused": True})):
        params = make_params()
        optimizer = make(params, **options, **more)
        for step in range(8):
            backward(params, make_gradients(params, step))
            if step % 4 == 2:
                optimizer.zero_grad(set_to_none=False)
            elif step % 4 == 3:
                optimizer.zero_grad(set_to_none=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        outcomes.append(results(optimizer, params))
    assert same_bits(*outcomes)


def test_zero_grad_takes_accumulated_gradients_away() -> None:
    def loop(optimizer: Any, params: Params) -> None:
        for seed in range(4):
            for set_to_none in (True, False):
                backward(params, make_gradients(params, 100 + seed))
                optimizer.zero_grad(set_to_none=set_to_none)
            backward(params, make_gradients(params, seed))
            optimizer.step()

    # torch keeps p.grad after a step, so its loop accumulates unless it is cleared; zero_grad comes first here.
    assert same_after("adamw", {}, loop)


# What an optimizer is ------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_is_a_torch_optimizer_with_torchs_repr_and_defaults(name: str) -> None:
    (ours, _), (theirs, _) = both(name, {})
    theirs = TORCH_OPTIMIZERS[name](make_params())
    assert isinstance(ours, torch.optim.Optimizer)
    assert type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert isinstance(ours.param_groups, list)
    assert type(ours).step.hooked  # type: ignore[attr-defined]


def test_subclass_may_override_step() -> None:
    class Counting(distadam.AdamW):
        num_steps = 0

        def step(self, closure: Any = None) -> Any:
            self.num_steps += 1
            return super().step(closure)

    params = make_params()
    optimizer = Counting(params)
    train(optimizer, params, range(3))
    (reference, expected), _ = both("adamw", {})
    train(reference, expected, range(3))
    assert optimizer.num_steps == 3
    assert same_bits(results(optimizer, params), results(reference, expected))


def test_attributes_of_a_users_own_survive() -> None:
    (optimizer, params), _ = both("adamw", {})
    optimizer.param_groups[0]["name"] = "body"
    optimizer.state[params[0]]["mine"] = 3
    train(optimizer, params, [0])
    assert optimizer.state_dict()["param_groups"][0]["name"] == "body"
    assert optimizer.full_state_dict()["param_groups"][0]["name"] == "body"
    assert optimizer.state_dict()["state"][0]["mine"] == 3
    assert optimizer.state[params[0]]["mine"] == 3


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_copies_and_pickles_raise_usage_error(copier: Callable[[Any], Any]) -> None:
    (optimizer, _), _ = both("adamw", {})
    with pytest.raises(UsageError, match=r"cannot be copied or pickled.*state_dict"):
        copier(optimizer)
    model = nn.Linear(8, 8)
    model.optimizer = distadam.SGD(model.parameters())  # type: ignore[assignment]
    with pytest.raises(UsageError, match="cannot be copied or pickled"):
        copy.deepcopy(model)


def test_model_trained_by_the_optimizer_can_be_copied_and_pickled() -> None:
    model = nn.Linear(8, 8)
    optimizer = distadam.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
            assert all(param.grad is None for param in other.parameters())
        optimizer.step()
