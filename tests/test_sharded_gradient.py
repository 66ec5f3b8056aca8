"""`ShardedGradient`: what ``p.grad`` is after a backward, and what loops may do with it, at 1, 2 and 3 ranks.

Covered: where one stands (every trainable parameter, every rank), shape, dtype, device, no memory, ``repr``; each
supported operation against the same operation of torch on the averaged gradient; each other operation raises
`UsageError`, naming the parameter and ``full_grad``; what ``step()`` and ``zero_grad`` leave behind.

Gradients are small integers and are compared bit by bit (rtol = atol = 0) through ``full_grad``. Norms are accumulated
in fp64 here and in fp32 by torch: 4 ulps. The clip coefficient inherits that: 8 ulps for what it scales.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ShardPolicy, UsageError
from tests.averaged_oracle import TINY_MB, impatient, integers
from tests.ranks import run_ranks

RANKS = (1, 2, 3)
ULP = 2**-23


def _params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"matrix": (6, 5), "vector": (70,), "scalar": (), "empty": (0, 3), "unused": (4,), "partly": (9,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def _collect(rank: int, params: dict[str, nn.Parameter], seed: int = 0) -> dict[str, Tensor]:
    """Backward of integer gradients; returns their averages. ``unused`` has one nowhere, ``partly`` on rank 0 only."""
    names = [name for name in params if name != "unused" and (rank == 0 or name != "partly")]
    sum(
        (params[name] * integers(params[name], 1000 * seed + 10 * number + rank)).sum()
        for number, name in enumerate(names)
    ).backward()
    averages = {}
    num_ranks = dist.get_world_size()
    for number, name in enumerate(name for name in params if name != "unused"):
        users = range(num_ranks) if name != "partly" else [0]
        total = sum(integers(params[name], 1000 * seed + 10 * number + user) for user in users)
        averages[name] = total / num_ranks
    averages["unused"] = torch.zeros(4)
    return averages


def _optimizer(params: dict[str, nn.Parameter], bucket_mb: Any = TINY_MB, stage: int = 2) -> distadam.SGD:
    comm, shard = CommPolicy(bucket_mb=bucket_mb), ShardPolicy(stage=stage)
    return distadam.SGD(params.items(), lr=1.0, comm=comm, shard=shard)


def _compare(optimizer: distadam.SGD, expected: dict[str, Tensor], rtol: float = 0.0, what: str = "") -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            optimizer.full_grad(name),
            value,
            rtol=rtol,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{what} {n}: {m}",
        )


# What it is ----------------------------------------------------------------------------------------------------------


def _presence(rank: int) -> None:
    params = _params()
    params["frozen"] = nn.Parameter(torch.zeros(3), requires_grad=False)
    params["brain"] = nn.Parameter(torch.randn(4, 2).bfloat16())
    params["wide"] = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
    params["transposed"] = nn.Parameter(torch.randn(4, 8).t())
    optimizer = _optimizer(params)
    assert all(param.grad is None for param in params.values())
    with optimizer.no_sync() if rank == 0 else torch.enable_grad():
        sum(params[name].sum().double() for name in ("matrix", "brain", "wide", "transposed")).backward()
    for name, param in params.items():
        grad = param.grad
        if name == "frozen":
            assert grad is None
            continue
        assert type(grad).__name__ == "ShardedGradient"
        assert (grad.shape, grad.dtype, grad.device, grad.layout) == (
            param.shape,
            param.dtype,
            param.device,
            param.layout,
        )
        assert grad.is_sparse is False
        assert grad.requires_grad is False
        assert grad.stride() == param.stride()
        assert repr(grad) == f"ShardedGradient({name!r}, shape={tuple(param.shape)}, dtype={param.dtype}, device=cpu)"
        assert name in f"{grad}"
        with pytest.raises(RuntimeError, match="Attempted to access the data pointer on an invalid python storage"):
            (grad if param.numel() else params["matrix"].grad).untyped_storage().data_ptr()
    optimizer.step()
    assert all(param.grad is None for param in params.values())


@pytest.mark.parametrize("num_ranks", RANKS)
def test_stand_in_is_in_place_of_every_trainable_gradient(num_ranks: int) -> None:
    run_ranks(num_ranks, _presence)


def test_stand_in_owns_no_memory() -> None:
    """Two parameters whose gradients could not exist: an expanded view of one element has no bytes to speak of."""
    script = (
        "import resource, torch, distadam; p = torch.nn.Parameter(torch.zeros(1)); o = distadam.SGD([p], lr=1.0)\n"
        "from distadam.engine.gradients import ShardedGradient\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); huge = torch.zeros(1).expand(1 << 40)\n"
        "g = ShardedGradient(huge, o._operations, 0, 'huge'); print(g.numel())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"{1 << 40}\n", done.stderr


def test_copy_of_a_model_has_no_gradients_yet() -> None:
    model = nn.Linear(3, 2)
    optimizer = distadam.SGD(model.named_parameters(), lr=1.0)
    model(torch.ones(1, 3)).sum().backward()
    twin = copy.deepcopy(model)
    assert all(param.grad is None for param in twin.parameters())
    torch.testing.assert_close(twin.weight, model.weight, rtol=0, atol=0)
    optimizer.step()
    assert not torch.equal(twin.weight, model.weight)


# What it can do ------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def _grads(params: dict[str, Any]) -> list[Any]:
    return [param.grad for param in params.values()]


def _value_(method: str, *args: Any, **kwargs: Any) -> Change:
    def change(params: dict[str, Any]) -> None:
        for name in ("matrix", "scalar", "empty", "unused", "partly"):
            grad = params[name].grad
            assert getattr(grad, method)(*args, **kwargs) is grad

    return change


def _augmented(params: dict[str, Any]) -> None:
    params["matrix"].grad *= 3
    params["vector"].grad /= 3
    params["partly"].grad.mul_(torch.tensor(0.3))
    params["scalar"].grad.div_(torch.tensor(7.0))
    params["matrix"].grad.data.mul_(5)
    params["matrix"].grad.detach().mul_(2)


CHANGES: dict[str, Change] = {
    "mul_": _value_("mul_", 0.3),
    "mul_ tensor": _value_("mul_", torch.tensor(0.3)),
    "div_": _value_("div_", 3),
    "div_ tensor": _value_("div_", torch.tensor(3.0)),
    "clamp_": _value_("clamp_", -2, 1.5),
    "clamp_ keywords": _value_("clamp_", max=2),
    "clamp_min_": _value_("clamp_min_", -1),
    "clamp_max_": _value_("clamp_max_", 1),
    "nan_to_num_": _value_("nan_to_num_", 1.0, 2.0, -2.0),
    "zero_": _value_("zero_"),
    "augmented, data, detach": _augmented,
    "foreach mul": lambda params: torch._foreach_mul_(_grads(params), 0.3),
    "foreach mul tensor": lambda params: torch._foreach_mul_(_grads(params), torch.tensor(0.3)),
    "foreach mul list": lambda params: torch._foreach_mul_(_grads(params), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    "foreach mul some": lambda params: torch._foreach_mul_(_grads(params)[:2], 0.3),
    "foreach div": lambda params: torch._foreach_div_(_grads(params), 3),
    "foreach clamp": lambda params: (
        torch._foreach_clamp_min_(_grads(params), -1),
        torch._foreach_clamp_max_(_grads(params), 1),
    ),
    "foreach zero": lambda params: torch._foreach_zero_(_grads(params)),
    "clip_grad_value_": lambda params: torch.nn.utils.clip_grad_value_(params.values(), 1.5),
    "clip_grad_value_ foreach": lambda params: torch.nn.utils.clip_grad_value_(params.values(), 1.5, foreach=True),
}


@impatient
def _change(rank: int, name: str) -> None:
    """The same change of the stand-ins, and of ordinary tensors that hold the average; then once more on top."""
    for bucket_mb, stage in ((TINY_MB, 2), ("auto", 1)):
        params = _params()
        optimizer = _optimizer(params, bucket_mb, stage)
        plain = {key: nn.Parameter(param.detach().clone()) for key, param in params.items()}
        expected = _collect(rank, params)
        for key, value in expected.items():
            plain[key].grad = value
        for _ in range(2):
            CHANGES[name](params)
            CHANGES[name](plain)
            assert all(type(param.grad).__name__ == "ShardedGradient" for param in params.values())
        _compare(optimizer, {key: param.grad for key, param in plain.items()}, what=name)
        before = {key: param.detach().clone() for key, param in params.items()}
        optimizer.step()
        for key, param in params.items():
            moved = before[key] if key == "unused" else before[key] - plain[key].grad
            torch.testing.assert_close(param.detach(), moved, rtol=0, atol=0)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_in_place_operation_changes_the_averaged_gradient(num_ranks: int, name: str) -> None:
    run_ranks(num_ranks, _change, name)


@impatient
def _norms(rank: int) -> None:
    orders = (2.0, 1.0, 0.0, 3.5, float("inf"), -float("inf"))
    for bucket_mb, stage in ((TINY_MB, 2), ("auto", 1)):
        params = _params()
        optimizer = _optimizer(params, bucket_mb, stage)
        expected = _collect(rank, params)
        for key, param in params.items():
            for order in orders:
                if key == "empty" and (order < 0 or order == float("inf")):
                    continue  # torch refuses
                want = torch.linalg.vector_norm(expected[key], order)
                close = {"rtol": 4 * ULP, "atol": 0}
                torch.testing.assert_close(torch.linalg.vector_norm(param.grad, order), want, **close)
                torch.testing.assert_close(param.grad.norm(order), want, **close)
            wide = torch.linalg.vector_norm(param.grad, dtype=torch.float64)
            torch.testing.assert_close(wide, expected[key].double().norm(), rtol=1e-15, atol=0)
        torch.testing.assert_close(params["matrix"].grad.norm(), expected["matrix"].norm(), rtol=4 * ULP, atol=0)
        for foreach in (None, False, True):
            for order in (2.0, 1.0, float("inf")):
                want = torch.nn.utils.get_total_norm([grad for grad in expected.values() if grad.numel()], order)
                got = torch.nn.utils.get_total_norm(_grads(params), order, foreach=foreach)
                torch.testing.assert_close(got, want, rtol=4 * ULP, atol=0)
        optimizer.comm_stats.clear()
        torch.nn.utils.get_total_norm(_grads(params), 2.0, foreach=False)
        assert sum(optimizer.comm_stats.calls.values()) == 0  # kept from above
        _collect(rank, params, seed=1)
        optimizer.comm_stats.clear()
        torch.nn.utils.get_total_norm(_grads(params), 2.0, foreach=False)
        calls = optimizer.comm_stats.calls
        assert calls.get("agree", 0) == calls.get("all_reduce", 0) == (dist.get_world_size() > 1)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_norms_are_global_and_cost_one_collective(num_ranks: int) -> None:
    run_ranks(num_ranks, _norms)


@impatient
def _clip(rank: int, foreach: bool | None, own: bool) -> None:
    for order in (2.0, 1.0, float("inf")):
        params = _params()
        if order == float("inf"):
            del params["empty"]  # torch refuses
        optimizer = _optimizer(params, 400 / 2**20)
        expected = _collect(rank, params)
        if own:
            norm = optimizer.clip_grad_norm_(1.0, order, foreach=foreach)
        else:
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0, order, foreach=foreach)
        plain = [nn.Parameter(torch.zeros_like(value)) for value in expected.values()]
        for param, value in zip(plain, expected.values(), strict=True):
            param.grad = value
        want = torch.nn.utils.clip_grad_norm_(plain, 1.0, order)
        torch.testing.assert_close(norm, want, rtol=4 * ULP, atol=0)
        assert want > 1
        _compare(optimizer, dict(zip(expected, (param.grad for param in plain), strict=True)), rtol=8 * ULP)
        second = torch.nn.utils.get_total_norm(_grads(params), order)
        torch.testing.assert_close(second, torch.tensor(1.0), rtol=16 * ULP, atol=1e-6)  # torch divides by norm + 1e-6
        if own and order == 2.0:
            optimizer.step()
            torch.testing.assert_close(optimizer.grad_norm, want, rtol=4 * ULP, atol=0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_clipping_equals_torch_on_the_average(num_ranks: int, foreach: bool | None, own: bool) -> None:
    run_ranks(num_ranks, _clip, foreach, own)


@impatient
def _scaled_then_accumulated(rank: int) -> None:
    """What was scaled stays scaled; what the next backward adds is not; clamping sees the sum."""
    for bucket_mb, stage in ((TINY_MB, 2), ("auto", 1)):
        params = _params()
        optimizer = _optimizer(params, bucket_mb, stage)
        expected = _collect(rank, params)
        params["matrix"].grad.mul_(0.5)
        torch._foreach_div_([params["vector"].grad, params["partly"].grad], 4)
        expected["matrix"] *= 0.5
        expected["vector"] /= 4
        expected["partly"] /= 4
        for key, value in _collect(rank, params, seed=1).items():
            expected[key] = expected[key] + value
        params["vector"].grad.clamp_(-3, 3)
        expected["vector"].clamp_(-3, 3)
        with optimizer.no_sync():
            more = _collect(rank, params, seed=2)
        for key, value in more.items():
            expected[key] = expected[key] + value
        _compare(optimizer, expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_backward_after_scaling_adds_to_the_scaled_gradient(num_ranks: int) -> None:
    """One and two ranks: the averages are then multiples of 1/2, and sums of scaled ones exact."""
    run_ranks(num_ranks, _scaled_then_accumulated)


@impatient
def _zeroed(rank: int) -> None:
    """`zero_grad(set_to_none=False)`: gradients of zero count as gradients, absent ones stay absent, as in torch."""
    for bucket_mb, stage in ((TINY_MB, 2), ("auto", 1)):
        params = _params()
        comm, shard = CommPolicy(bucket_mb=bucket_mb), ShardPolicy(stage=stage)
        optimizer = distadam.AdamW(params.items(), lr=0.1, weight_decay=0.5, comm=comm, shard=shard)
        _collect(rank, params)
        optimizer.zero_grad(set_to_none=False)
        assert all(type(param.grad).__name__ == "ShardedGradient" for param in params.values())
        _compare(optimizer, {key: torch.zeros_like(param) for key, param in params.items()})
        before = {key: param.detach().clone() for key, param in params.items()}
        optimizer.step()
        for key, param in params.items():
            decayed = before[key] if key == "unused" else before[key] * (1 - 0.1 * 0.5)
            torch.testing.assert_close(param.detach(), decayed, rtol=2 * ULP, atol=0)
        state = optimizer.full_state_dict(to=None)["state"]
        assert sorted(state) == [0, 1, 2, 3, 5]
        assert all(entry["step"] == 1 and not entry["exp_avg"].any() for entry in state.values())
        optimizer.zero_grad(set_to_none=False)  # nothing to make zero: step() has taken everything
        assert all(param.grad is None for param in params.values())
        before = {key: param.detach().clone() for key, param in params.items()}
        optimizer.step()
        for key, param in params.items():
            torch.testing.assert_close(param.detach(), before[key], rtol=0, atol=0)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zero_grad_without_none_leaves_gradients_of_zero(num_ranks: int) -> None:
    run_ranks(num_ranks, _zeroed)


# What it refuses -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Any], Any]] = {
    "add": lambda grad: grad + 1,
    "add_ number": lambda grad: grad.add_(1),
    "add_ itself": lambda grad: grad.add_(grad),
    "sub_": lambda grad: grad.sub_(torch.ones(6, 5)),
    "mul": lambda grad: grad * 2,
    "mul_ matrix": lambda grad: grad.mul_(torch.ones(6, 5)),
    "div_ matrix": lambda grad: grad.div_(torch.ones(6, 5)),
    "clamp_ matrix": lambda grad: grad.clamp_(min=torch.ones(6, 5)),
    "clone": lambda grad: grad.clone(),
    "copy_": lambda grad: grad.copy_(torch.ones(6, 5)),
    "copy out": lambda grad: torch.zeros(6, 5).copy_(grad),
    "sum": lambda grad: grad.sum(),
    "mean": lambda grad: grad.mean(),
    "max": lambda grad: grad.max(),
    "isnan": lambda grad: torch.isnan(grad),
    "isfinite": lambda grad: torch.isfinite(grad),
    "index": lambda grad: grad[0],
    "view": lambda grad: grad.view(-1),
    "t": lambda grad: grad.t(),
    "tolist": lambda grad: grad.tolist(),
    "numpy": lambda grad: grad.numpy(),
    "to": lambda grad: grad.to(torch.float64),
    "cpu float": lambda grad: grad.double(),
    "norm by rows": lambda grad: grad.norm(dim=1),
    "equal": lambda grad: torch.equal(grad, torch.ones(6, 5)),
    "stack": lambda grad: torch.stack([grad, grad]),
    "cat": lambda grad: torch.cat([grad.detach(), grad.detach()]),
    "foreach add": lambda grad: torch._foreach_add_([grad], 1),
    "foreach add list": lambda grad: torch._foreach_add_([torch.ones(6, 5)], [grad]),
    "pickle": pickle.dumps,
    "share_memory_": lambda grad: grad.share_memory_(),
    "out": lambda grad: torch.add(torch.ones(6, 5), 1, out=grad),
}


def _refused(rank: int) -> dict[str, str]:
    params = _params()
    optimizer = _optimizer(params)
    expected = _collect(rank, params)
    missing = {}
    for name, call in REFUSED.items():
        try:
            call(params["matrix"].grad)
            missing[name] = "nothing was raised"
        except UsageError as error:
            advice = "full_grad('matrix')" in str(error) or "expected" in str(error)  # of a supported operation
            if "parameter 'matrix'" not in str(error) or not advice:
                missing[name] = str(error)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    _compare(optimizer, expected)
    return missing


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_other_operations_raise_and_name_the_parameter_and_full_grad(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _refused) == [{}] * num_ranks


@impatient
def _full_grad(rank: int) -> None:
    params = _params()
    optimizer = _optimizer(params)
    expected = _collect(rank, params)
    got = optimizer.full_grad(params["matrix"])
    assert type(got) is Tensor
    torch.testing.assert_close(got, expected["matrix"], rtol=0, atol=0)
    got.zero_()  # a copy
    _compare(optimizer, expected)
    with pytest.raises(UsageError, match="full_grad expected a trainable parameter of this optimizer"):
        optimizer.full_grad("nobody")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_full_grad_is_an_ordinary_copy(num_ranks: int) -> None:
    run_ranks(num_ranks, _full_grad)
