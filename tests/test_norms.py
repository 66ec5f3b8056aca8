"""Norms of averaged gradients: what clipping finds and does, `grad_norm`, `full_grad`, torch's own functions on p.grad.

Every rank draws all ranks' gradients, so the expected average, its float64 norm and the clipped gradient are local.

Tolerances, in ulps of the expected fp32 norm:
- 1 for norms that somebody asks for: squares (powers) are summed in float64 and the result is rounded once (0.5 ulp);
  2-norms are of the sum divided exactly, the expectation is of the rounded average, which moves it by 0.5 ulp at most.
- 4 for `grad_norm` without clipping: it takes fp32 norms of blocks of 64 elements. With 8 lanes each sum is 8 squares
  and 3 additions deep, 12 roundings of half an ulp, halved by the root, plus the two above (measured: 2 at most).
- float64: 1e-13 relative, more than the 1,000 summands times 2^-53.
Everything else, clipped gradients included, is bits (rtol=0, atol=0), as is `grad_norm` after clipping.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import distadam
from distadam import CommPolicy, ShardPolicy
from distadam.engine import norms
from tests.ranks import run_ranks
from tests.unsharded import average, backward, difference, make_params

ORDERS = (1.0, 2.0, 3.0, math.inf, 0.5)
NUM_RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 3])


def ulps(actual: Tensor, expected: float) -> float:
    """Return |actual - expected| in fp32 units in the last place of expected."""
    unit = 2.0 ** (math.floor(math.log2(expected)) - 23)
    return abs(float(actual) - expected) / unit


def norm64(grads: Sequence[Tensor | None], order: float) -> float:
    return float(torch.linalg.vector_norm(torch.cat([g.double().reshape(-1) for g in grads if g is not None]), order))


class Trained:
    """Parameters after one backward on every rank, and what their averages are.

    The first parameter has a gradient on the last rank only, the last parameter on none.
    """

    def __init__(self, rank: int, num_ranks: int, seed: int = 0, dtype: torch.dtype = torch.float32, **arguments: Any):
        self.rank, self.num_ranks = rank, num_ranks
        self.params = make_params(dtype)
        arguments.setdefault("comm", CommPolicy(bucket_mb=1 / 1024))
        self.optimizer = distadam.SGD(self.params, lr=1.0, **arguments)
        self.averages: list[Tensor | None] = []
        self.backward(seed)

    def backward(self, seed: int, scale: float = 1.0) -> None:
        by_rank = [self._grads(rank, seed) for rank in range(self.num_ranks)]
        backward(self.params, [None if g is None else g * scale for g in by_rank[self.rank]])
        self.averages = [average(grads) for grads in zip(*by_rank, strict=True)]

    def _grads(self, rank: int, seed: int) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        # Multiples of 2^-10 below 8: every sum over ranks is exact.
        grads: list[Tensor | None] = [
            (torch.randint(-8192, 8193, p.shape, generator=generator) / 1024).to(p.dtype) for p in self.params
        ]
        if rank < self.num_ranks - 1:
            grads[0] = None
        grads[-1] = None
        return grads

    def differs(self, what: str, factor: Tensor | float | Callable[[Tensor], Tensor] = 1.0) -> list[str]:
        """Compare `full_grad` of every parameter with its average times ``factor``. Collective."""
        found = []
        for index, param in enumerate(self.params):
            expected = self.averages[index]
            if expected is None:
                expected = torch.zeros_like(param)
            expected = factor(expected) if callable(factor) else expected * factor
            found += difference(f"{what}: parameter {index}", self.optimizer.full_grad(param), expected)
        return found


def _coefficient(max_norm: float, norm: Tensor) -> Tensor:
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


# clip_grad_norm_ of the optimizer -------------------------------------------------------------------------------------


def _clip(rank: int, num_ranks: int) -> list[str]:
    found = []
    for order in ORDERS:
        for max_norm in (0.25, torch.tensor(0.25), 1e9) if order == 2 else (0.25,):
            trained = Trained(rank, num_ranks, seed=int(10 * min(order, 9)))
            if isinstance(max_norm, Tensor):  # else the norm is of sums that nobody has divided yet
                found += trained.differs("before")
            norm = trained.optimizer.clip_grad_norm_(max_norm, norm_type=order)
            expected = norm64(trained.averages, order)
            where = f"order {order}, max_norm {max_norm}"
            if norm.shape != () or norm.dtype != torch.float32 or ulps(norm, expected) > 1:
                found.append(f"{where}: {norm} instead of {expected}")
            found += trained.differs(where, _coefficient(float(max_norm), norm))
            before = [param.detach().clone() for param in trained.params]
            trained.optimizer.step()
            for param, value, mean in zip(trained.params, before, trained.averages, strict=True):
                if mean is not None:
                    found += difference(where, param, value - mean * _coefficient(float(max_norm), norm))
            found += difference(f"{where}: grad_norm", _value(trained.optimizer.grad_norm), norm)
    return found


def _value(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@NUM_RANKS
def test_clip_grad_norm_finds_the_norm_and_scales_the_average(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _clip, num_ranks) == [[]] * num_ranks


def _clip_wide(rank: int, num_ranks: int) -> list[str]:
    found = []
    for order in ORDERS:
        trained = Trained(rank, num_ranks, dtype=torch.float64)
        norm = trained.optimizer.clip_grad_norm_(0.25, norm_type=order)
        expected = norm64(trained.averages, order)
        if norm.dtype != torch.float64 or abs(float(norm) - expected) > 1e-13 * expected:
            found.append(f"order {order}: {norm} instead of {expected}")
        found += trained.differs(f"order {order}", _coefficient(0.25, norm))
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_clip_grad_norm_is_float64_for_float64_parameters(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _clip_wide, num_ranks) == [[]] * num_ranks


def _same_clip(rank: int, num_ranks: int) -> list[Tensor]:
    """Norms of one and the same average, spread over ranks."""
    norms = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        params = make_params()
        optimizer = distadam.SGD(params, lr=1.0, comm=CommPolicy(bucket_mb=71 / 2**20))
        backward(params, [torch.randn(param.shape, generator=generator) for param in params])
        norms.append(optimizer.clip_grad_norm_(1.0))
    return norms


def test_norm_differs_by_an_ulp_at_most_between_world_sizes() -> None:
    expected = _same_clip(0, 1)
    for num_ranks in (2, 3):
        for found in run_ranks(num_ranks, _same_clip, num_ranks):
            assert all(ulps(norm, float(one)) <= 1 for norm, one in zip(found, expected, strict=True))


def _later_backward(rank: int, num_ranks: int) -> list[str]:
    """Clipping scales what is there; what a later backward adds is not scaled."""
    found = []
    for with_no_sync in (False, True):
        trained = Trained(rank, num_ranks)
        norm = trained.optimizer.clip_grad_norm_(0.5)
        clipped = [None if mean is None else mean * _coefficient(0.5, norm) for mean in trained.averages]
        if with_no_sync:
            with trained.optimizer.no_sync():
                trained.backward(1)
        else:
            trained.backward(1)
        for index, param in enumerate(trained.params[:-1]):
            expected = _value(clipped[index]) + _value(trained.averages[index])
            found += difference(f"no_sync {with_no_sync}", trained.optimizer.full_grad(param), expected)
        sums = [trained.optimizer.full_grad(param) for param in trained.params]
        second = trained.optimizer.clip_grad_norm_(1e9)
        if ulps(second, norm64(sums, 2)) > 1:
            found.append(f"{second} is not the norm of the sum")
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_clipping_leaves_later_backwards_alone(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _later_backward, num_ranks) == [[]] * num_ranks


# Non-finite values


def _nonfinite(rank: int, num_ranks: int, value: float, where: int) -> list[str]:
    """Let one rank's gradient of parameter ``where`` have one value that is not finite."""
    found = []
    for order in ORDERS:
        trained = Trained(rank, num_ranks)
        if rank == num_ranks - 1:
            spoilt = torch.zeros_like(trained.params[where])
            spoilt.view(-1)[-1] = value
            (trained.params[where] * spoilt).sum().backward()
        else:
            (trained.params[where] * 0).sum().backward()
        norm = trained.optimizer.clip_grad_norm_(1e9, norm_type=order)
        if math.isnan(value) != bool(norm.isnan()) or bool(norm.isfinite()):
            found.append(f"order {order}: {norm}")
        before = [param.detach().clone() for param in trained.params]
        try:
            trained.optimizer.clip_grad_norm_(1.0, norm_type=order, error_if_nonfinite=True)
            found.append(f"order {order}: no error")
        except distadam.NonFiniteError as error:
            text = (
                f"The total norm of order {order} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
            if text not in str(error):
                found.append(str(error))
        for param, kept in zip(trained.params, before, strict=True):
            found += difference("the error", param, kept)
        trained.optimizer.zero_grad()
        trained.backward(2)
        found += trained.differs("after the error")
    return found


@NUM_RANKS
@pytest.mark.parametrize(
    ("where", "value"),
    [
        pytest.param(1, math.nan, id="first-bucket-nan"),
        pytest.param(6, math.inf, id="last-bucket-inf"),
        pytest.param(1, math.inf, id="first-bucket-inf", marks=pytest.mark.long),
        pytest.param(6, math.nan, id="last-bucket-nan", marks=pytest.mark.long),
    ],
)
def test_norm_is_not_finite_on_every_rank_when_one_gradient_is_not(num_ranks: int, where: int, value: float) -> None:
    assert run_ranks(num_ranks, _nonfinite, num_ranks, value, where) == [[]] * num_ranks


# grad_norm ------------------------------------------------------------------------------------------------------------


def _grad_norm(rank: int, num_ranks: int) -> tuple[list[str], float]:
    found, worst = [], 0.0

    def check(what: str, trained: Trained, expected: float) -> None:
        nonlocal worst
        distance = ulps(_value(trained.optimizer.grad_norm), expected)
        worst = max(worst, distance)
        if distance > 4:
            found.append(f"{what}: {trained.optimizer.grad_norm} instead of {expected}")

    for seed in range(2):
        trained = Trained(rank, num_ranks, seed)
        if trained.optimizer.grad_norm is not None:
            found.append("grad_norm before a step")
        trained.optimizer.step()
        check("plain", trained, norm64(trained.averages, 2))

        trained.backward(seed + 50)
        trained.optimizer.clip_grad_norm_(1.0)
        trained.optimizer.zero_grad()
        trained.backward(seed + 60)
        trained.optimizer.step()
        check("clipped, then dropped", trained, norm64(trained.averages, 2))

        trained.backward(seed + 70)
        torch.nn.utils.clip_grad_norm_(trained.params, 1.0)
        trained.optimizer.step()
        check("torch's clipping", trained, 1.0)

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        trained.backward(seed + 80, scale=1024.0)
        scaler.step(trained.optimizer)
        check("loss scale", trained, norm64(trained.averages, 2))
        scaler.update()

        trained.backward(seed + 90, scale=1024.0)
        scaler.unscale_(trained.optimizer)
        scaler.step(trained.optimizer)
        check("unscaled", trained, norm64(trained.averages, 2))
    return found, worst


@NUM_RANKS
def test_grad_norm_is_the_norm_of_the_last_steps_gradient(num_ranks: int) -> None:
    for found, worst in run_ranks(num_ranks, _grad_norm, num_ranks):
        assert not found
        assert 0 < worst <= 4


# torch's functions on p.grad ------------------------------------------------------------------------------------------


def _torch_functions(rank: int, num_ranks: int) -> list[str]:
    found = []
    for order in ORDERS:
        for foreach in (None, False, True) if order == 2 else (None,):
            where = f"order {order}, foreach {foreach}"
            trained = Trained(rank, num_ranks, seed=3)
            expected = norm64(trained.averages, order)
            grads = [_value(param.grad) for param in trained.params]
            total = torch.nn.utils.get_total_norm(grads, norm_type=order, foreach=foreach)
            # torch rounds each parameter's norm to fp32 and takes the fp32 norm of those: 8 more roundings.
            if total.shape != () or ulps(total, expected) > 8:
                found.append(f"{where}: get_total_norm {total} instead of {expected}")
            norm = torch.nn.utils.clip_grad_norm_(trained.params, 0.25, norm_type=order, foreach=foreach)
            found += difference(f"{where}: clip_grad_norm_", norm, total)
            found += trained.differs(where, _coefficient(0.25, norm))
            torch.nn.utils.clip_grads_with_norm_(trained.params, 0.125, torch.tensor(0.25), foreach=foreach)
            first, second = _coefficient(0.25, norm), _coefficient(0.125, torch.tensor(0.25))
            found += trained.differs(where, lambda mean, a=first, b=second: mean * a * b)
    for foreach in (None, False, True):
        trained = Trained(rank, num_ranks, seed=4)
        torch.nn.utils.clip_grad_value_(trained.params, 0.5, foreach=foreach)
        found += trained.differs(f"clip_grad_value_, foreach {foreach}", lambda mean: mean.clamp(-0.5, 0.5))
    trained = Trained(rank, num_ranks, seed=5)
    for param, mean in zip(trained.params, trained.averages, strict=True):
        if param.numel() and mean is not None and ulps(_value(param.grad).norm(), norm64([mean], 2)) > 1:
            found.append(f"norm of one gradient: {_value(param.grad).norm()} instead of {norm64([mean], 2)}")
    part = trained.params[1:4]
    norm = torch.nn.utils.clip_grad_norm_(part, 0.25)
    if ulps(norm, norm64(trained.averages[1:4], 2)) > 8:
        found.append(f"norm of some parameters: {norm}")
    trained.averages[1:4] = [_value(mean) * _coefficient(0.25, norm) for mean in trained.averages[1:4]]
    found += trained.differs("clipping some parameters")
    return found


@NUM_RANKS
def test_torch_clipping_sees_and_scales_the_average(num_ranks: int) -> None:
    """At several ranks the first parameter has a gradient on one rank only, and the last one on none."""
    assert run_ranks(num_ranks, _torch_functions, num_ranks) == [[]] * num_ranks


def _torch_error(rank: int) -> list[str]:
    trained = Trained(rank, 2)
    (trained.params[1] * (math.inf if rank else 1.0)).sum().backward()
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped") as caught:
        torch.nn.utils.clip_grad_norm_(trained.params, 1.0, error_if_nonfinite=True)
    return [str(caught.value)]


def test_torch_clipping_raises_on_every_rank_when_one_gradient_is_not_finite() -> None:
    assert len(run_ranks(2, _torch_error)) == 2


def _scaled(rank: int, num_ranks: int) -> list[str]:
    """Norms follow what happens to the gradient: scaling in place, unscaling, zeroing, another backward."""
    found = []
    trained = Trained(rank, num_ranks)

    def check(what: str, expected: float) -> None:
        total = torch.nn.utils.get_total_norm([_value(param.grad) for param in trained.params])
        ours = trained.optimizer.clip_grad_norm_(math.inf)
        for norm, limit in ((total, 8), (ours, 2)):  # scaling rounds the gradient once more
            if expected == 0:
                found.extend([] if float(norm) == 0 else [f"{what}: {norm} instead of 0"])
            elif ulps(norm, expected) > limit:
                found.append(f"{what}: {norm} instead of {expected}")

    one = norm64(trained.averages, 2)
    check("plain", one)
    for param in trained.params:
        _value(param.grad).mul_(3.0)
    check("times 3", 3 * one)
    torch._foreach_div_([_value(param.grad) for param in trained.params], 6.0)
    check("over 6", one / 2)
    trained.optimizer.zero_grad(set_to_none=False)
    check("zeroed", 0.0)
    trained.backward(1)
    check("another backward", norm64(trained.averages, 2))
    trained.optimizer.zero_grad()
    with trained.optimizer.no_sync():
        trained.backward(2)
    check("no_sync", norm64(trained.averages, 2))
    trained.optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(torch.ones(()))
    trained.backward(3, scale=512.0)
    check("scaled", 512 * norm64(trained.averages, 2))
    scaler.unscale_(trained.optimizer)
    check("unscaled", norm64(trained.averages, 2))
    return found


@NUM_RANKS
def test_norms_follow_scaling_and_further_backwards(num_ranks: int) -> None:
    assert run_ranks(num_ranks, _scaled, num_ranks) == [[]] * num_ranks


# What it costs --------------------------------------------------------------------------------------------------------


def _count(rank: int, num_params: int) -> dict[str, dict[str, int]]:
    params = [nn.Parameter(torch.ones(64)) for _ in range(num_params)]
    # 8 buckets whatever the number of parameters: 256 bytes each is one parameter.
    optimizer = distadam.SGD(params, lr=0.1, comm=CommPolicy(bucket_mb=num_params // 8 * 256 / 2**20))
    calls = {}
    actions: dict[str, Callable[[], Any]] = {
        "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1.0),
        "torch foreach": lambda: torch.nn.utils.clip_grad_norm_(params, 1.0),
        "torch loop": lambda: torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=False),
        "get_total_norm twice": lambda: [
            torch.nn.utils.get_total_norm([_value(param.grad) for param in params]) for _ in range(2)
        ],
        "clip_grad_value_": lambda: torch.nn.utils.clip_grad_value_(params, 1.0),
    }
    for name, action in actions.items():
        torch.stack([param.sum() for param in params]).sum().backward()
        optimizer.comm_stats.clear()
        action()
        counted = dict(optimizer.comm_stats.calls)
        counted.pop("reduce_scatter", None)  # launched in backward where they could be
        calls[name] = counted
        optimizer.comm_stats.clear()
        optimizer.step()
        calls[f"step after {name}"] = dict(optimizer.comm_stats.calls)
    return calls


@pytest.mark.parametrize("num_params", [8, 64])
def test_clipping_costs_one_collective_for_all_parameters(num_params: int) -> None:
    once = {"agree": 1, "all_reduce": 1}
    for calls in run_ranks(2, _count, num_params):
        assert calls["clip_grad_norm_"] == once
        assert calls["torch foreach"] == once
        assert calls["torch loop"] == once
        assert calls["get_total_norm twice"] == once
        assert calls["clip_grad_value_"] == {"agree": 1}
        # The step's own norm is combined by an all-reduce, unless clipping has already found it.
        assert calls["step after clip_grad_norm_"] == {"agree": 1, "all_gather": 8}
        assert calls["step after torch foreach"] == {"agree": 1, "all_gather": 8, "all_reduce": 1}


# Hybrid sharding ------------------------------------------------------------------------------------------------------

_mesh: list[Any] = []


def _on_a_grid(rank: int) -> list[str]:
    """Replicas hold the same shards: each counts once."""
    if not _mesh:
        _mesh.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    found = []
    for order in ORDERS:
        trained = Trained(rank, 4, shard=ShardPolicy(mesh=_mesh[0]))
        expected = norm64(trained.averages, order)
        total = torch.nn.utils.get_total_norm([_value(param.grad) for param in trained.params], norm_type=order)
        norm = trained.optimizer.clip_grad_norm_(0.25, norm_type=order)
        if ulps(norm, expected) > 1 or ulps(total, expected) > 8:
            found.append(f"order {order}: {norm}, {total} instead of {expected}")
        found += trained.differs(f"order {order}", _coefficient(0.25, norm))
    trained = Trained(rank, 4, shard=ShardPolicy(mesh=_mesh[0]))
    trained.optimizer.step()
    if ulps(_value(trained.optimizer.grad_norm), norm64(trained.averages, 2)) > 4:
        found.append(f"grad_norm {trained.optimizer.grad_norm}")
    return found


def test_norms_count_each_replica_once() -> None:
    assert run_ranks(4, _on_a_grid) == [[]] * 4


def _unfrozen(rank: int, num_ranks: int, how: str) -> tuple[float, list[Tensor]]:
    """Clip in the step in which a parameter has just been made trainable."""
    frozen = nn.Parameter(torch.zeros(70), requires_grad=False)
    params = [nn.Parameter(torch.zeros(64)), frozen]
    optimizer = distadam.SGD(params, lr=1.0)
    frozen.requires_grad_(True)
    backward(params, [torch.full((64,), 1.0 + rank), torch.full((70,), 2.0 + rank)])
    norm = optimizer.clip_grad_norm_(0.5) if how == "optimizer" else torch.nn.utils.clip_grad_norm_(params, 0.5)
    optimizer.step()
    return float(norm), [param.detach().clone() for param in params]


@pytest.mark.parametrize("how", ["optimizer", "torch"])
@NUM_RANKS
def test_clipping_counts_parameters_that_were_just_unfrozen(num_ranks: int, how: str) -> None:
    mean = (num_ranks - 1) / 2
    expected = math.sqrt(64 * (1 + mean) ** 2 + 70 * (2 + mean) ** 2)
    for norm, (first, second) in run_ranks(num_ranks, _unfrozen, num_ranks, how):
        assert norm == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(first, torch.full((64,), -(1 + mean) * 0.5 / expected), rtol=1e-5, atol=0)
        torch.testing.assert_close(second, torch.full((70,), -(2 + mean) * 0.5 / expected), rtol=1e-5, atol=0)


def _drop(rank: int) -> list[float]:
    """Drop an optimizer whose norm is under way; return how long that slept."""
    slept: list[float] = []
    with mock.patch.object(norms.time, "sleep", slept.append):
        trained = Trained(rank, 2)
        trained.optimizer.step()
        del trained
        gc.collect()
    return [seconds for seconds in slept if seconds > 0.01]  # shorter ones poll


def test_dropping_an_optimizer_does_not_wait_for_the_end_of_the_process() -> None:
    assert run_ranks(2, _drop) == [[], []]


def test_process_ends_no_earlier_than_what_is_under_way() -> None:
    slept: list[float] = []
    with mock.patch.object(norms.time, "sleep", slept.append):
        lingering = norms._Lingering()
        lingering.begin()
        lingering.at_exit()
        lingering.begin()  # a finalizer that runs after it
    assert len(slept) == 2
    assert all(0.01 < seconds <= 0.05 for seconds in slept)
