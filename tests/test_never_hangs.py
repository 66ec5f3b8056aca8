"""Never a hang, never silence: what ranks do differently ends in a named error on every rank, quickly.

Every optimizer here has a timeout of a few seconds. A case that would hang therefore ends in a CommError, which is the
wrong name and turns the test red; where CommError is the right name, its time is checked: the timeout plus a margin for
a loaded machine. After errors that leave every rank alive training goes on, and its result is compared with that of an
undisturbed run: gradients are small integers, so bits are equal (rtol=0, atol=0).
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from tests.ranks import Pool, RanksFailed, run_ranks

HANG_S = 5.0
COMM = distadam.CommPolicy(timeout_s=HANG_S)
QUICK_S = 4.0


def outcome(call: Callable[[], object]) -> tuple[str, str, float]:
    """Return the name and text of what ``call`` raised ("nothing" if it did not) and the seconds it took."""
    begin = time.perf_counter()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - begin
    return "nothing", "", time.perf_counter() - begin


def parameter(*shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value, dtype=dtype))


# Building -------------------------------------------------------------------------------------------------------------


def _adamw(params: Any, **options: Any) -> distadam.AdamW:
    return distadam.AdamW(params, **{"lr": 0.1, "comm": COMM, **options})


def _two(second: nn.Parameter | None = None, name: str = "b") -> list[tuple[str, nn.Parameter]]:
    return [("a", parameter(3, 4)), (name, parameter(5) if second is None else second)]


def _channels_last(yes: bool) -> nn.Parameter:
    weight = torch.ones(2, 3, 4, 4)
    return nn.Parameter(weight.to(memory_format=torch.channels_last) if yes else weight)


def _frozen(yes: bool) -> nn.Parameter:
    return nn.Parameter(torch.ones(5), requires_grad=not yes)


def _replicated() -> distadam.ShardPolicy:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return distadam.ShardPolicy(shard_group=alone, replicate_group=dist.group.WORLD)


MISMATCHES: dict[str, tuple[Callable[[bool], object], tuple[str, ...]]] = {
    # what one rank does differently: build it, and what the message must say
    "name": (lambda odd: _adamw(_two(name="c" if odd else "b")), ("'b'", "'c'")),
    "shape": (lambda odd: _adamw(_two(parameter(6 if odd else 5))), ("'b'", "(5,)", "(6,)")),
    "same number of elements": (lambda odd: _adamw(_two(parameter(*((1, 5) if odd else (5,))))), ("'b'", "(1, 5)")),
    "dtype": (
        lambda odd: _adamw(_two(parameter(5, dtype=torch.bfloat16 if odd else torch.float32))),
        ("'b'", "float32", "bfloat16"),
    ),
    "strides": (lambda odd: _adamw([("w", _channels_last(odd))]), ("'w'", "strides", "(48, 16, 4, 1)")),
    "requires_grad": (lambda odd: _adamw(_two(_frozen(odd))), ("'b'", "requires_grad")),
    "number of parameters": (
        lambda odd: _adamw(_two() + ([("extra", parameter(2))] if odd else [])),
        ("number of parameters", "2", "3"),
    ),
    "number of groups": (
        lambda odd: _adamw([{"params": [parameter(2)]}, *([{"params": [parameter(2)]}] if odd else [])]),
        ("number of parameter groups", "1", "2"),
    ),
    "order of parameters": (lambda odd: _adamw(_two()[:: -1 if odd else 1]), ("'a'", "'b'")),
    "lr": (lambda odd: _adamw(_two(), lr=0.2 if odd else 0.1), ("group 0: lr", "0.1", "0.2")),
    "tensor lr": (lambda odd: _adamw(_two(), lr=torch.tensor(0.5 if odd else 0.25)), ("lr", "0.25", "0.5")),
    "betas": (lambda odd: _adamw(_two(), betas=(0.9, 0.99 if odd else 0.9)), ("betas", "0.99")),
    "weight decay of a group": (
        lambda odd: _adamw([{"params": [parameter(2)]}, {"params": [parameter(2)], "weight_decay": float(odd)}]),
        ("group 1: weight_decay",),
    ),
    "a key of the user's": (lambda odd: _adamw([{"params": [parameter(2)], "tag": str(odd)}]), ("tag", "'True'")),
    "rule": (lambda odd: (distadam.Adam if odd else distadam.AdamW)(_two(), comm=COMM), ("optimizer", "AdamW")),
    "amsgrad": (lambda odd: _adamw(_two(), amsgrad=odd), ("amsgrad", "True", "False")),
    "momentum": (lambda odd: distadam.SGD(_two(), momentum=0.9 * odd, comm=COMM), ("momentum", "0.9")),
    "stage": (
        lambda odd: _adamw(_two(), shard=distadam.ShardPolicy(stage=1 if odd else 2)),
        ("ShardPolicy.stage", "1", "2"),
    ),
    "bucket size": (
        lambda odd: _adamw(_two(), comm=distadam.CommPolicy(timeout_s=HANG_S, bucket_mb=1 + odd)),
        ("CommPolicy", "bucket_mb=2"),
    ),
    "overlap": (
        lambda odd: _adamw(_two(), comm=distadam.CommPolicy(timeout_s=HANG_S, overlap_gather=odd)),
        ("CommPolicy", "overlap_gather=True"),
    ),
    "timeout": (
        lambda odd: _adamw(_two(), comm=distadam.CommPolicy(timeout_s=HANG_S + odd)),
        ("CommPolicy", "timeout_s=6.0"),
    ),
    "reduce dtype": (
        lambda odd: _adamw(_two(), precision=distadam.PrecisionPolicy(reduce_dtype=torch.float16 if odd else None)),
        ("PrecisionPolicy", "float16"),
    ),
}


def _raise(error: Exception) -> Iterator[nn.Parameter]:
    yield parameter(2)
    raise error


def _adamw_with_a_duplicate() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns
        return _adamw([p := parameter(2), p])


def _overlapping() -> list[nn.Parameter]:
    base = torch.ones(8)
    return [nn.Parameter(base[:5]), nn.Parameter(base[4:])]


def _non_leaf() -> list[Tensor]:
    result = parameter(4) * 2
    result.retain_grad()
    return [result]


FAILURES: dict[str, tuple[Callable[[], object], str, str]] = {
    # what one rank alone gets wrong: build it, the error there, and words of its message
    "lr": (lambda: _adamw(_two(), lr=-1.0), "ConfigError", "Invalid learning rate: -1.0"),
    "beta": (lambda: _adamw(_two(), betas=(1.5, 0.9)), "ConfigError", "Invalid beta parameter at index 0: 1.5"),
    "nesterov": (lambda: distadam.SGD(_two(), nesterov=True, comm=COMM), "ConfigError", "Nesterov"),
    "no parameters": (lambda: _adamw([]), "ValueError", "empty parameter list"),
    "a tensor": (lambda: _adamw(torch.ones(3)), "TypeError", "iterable"),
    "no tensor": (lambda: _adamw([3]), "TypeError", "can only optimize Tensors"),
    "half named": (lambda: _adamw([*_two(), parameter(2)]), "ValueError", "with/without names"),
    "twice": (lambda: _adamw([{"params": (p := [parameter(2)])}, {"params": p}]), "ValueError", "more than one"),
    "twice in a group": (lambda: _adamw_with_a_duplicate(), "ConfigError", "twice"),
    "an iterator that fails": (lambda: _adamw(_raise(KeyError("disk"))), "KeyError", "disk"),
    "complex": (lambda: _adamw(_two(parameter(2, dtype=torch.complex64))), "ConfigError", "complex"),
    "sparse": (lambda: _adamw(_two(nn.Parameter(torch.eye(3).to_sparse()))), "ConfigError", "sparse"),
    "float8": (lambda: _adamw(_two(nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)))), "ConfigError", "float8"),
    "non-leaf": (lambda: _adamw(_non_leaf()), "ConfigError", "leaf"),
    "not a leaf": (lambda: _adamw([parameter(4) * 2]), "ValueError", "non-leaf"),
    "one memory": (lambda: _adamw([p := parameter(4), nn.Parameter(p.detach())]), "ConfigError", "same memory"),
    "overlapping memory": (lambda: _adamw(_overlapping()), "ConfigError", "same memory"),
    "DTensor": (lambda: _adamw(_two(_dtensor())), "ConfigError", "DTensor"),
    "differentiable": (lambda: _adamw(_two(), differentiable=True), "ConfigError", "differentiable"),
    "a policy of another type": (lambda: _adamw(_two(), shard=2), "ConfigError", "ShardPolicy"),
    "another policy of another type": (lambda: _adamw(_two(), comm=None), "ConfigError", "CommPolicy"),
}


def _dtensor() -> nn.Parameter:
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate

    mesh = DeviceMesh("cpu", [dist.get_rank()], _init_backend=False, _rank=dist.get_rank())
    return nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()], run_check=False))


def _build_differently(rank: int, odd_rank: int) -> dict[str, tuple[str, str, float]]:
    return {what: outcome(functools.partial(build, rank == odd_rank)) for what, (build, _) in MISMATCHES.items()}


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 1), (2, 0), (3, 1), (3, 2)])
def test_building_differently_is_named_on_every_rank(num_ranks: int, odd_rank: int) -> None:
    results = run_ranks(num_ranks, _build_differently, odd_rank)
    for what in results[0]:
        for name, message, seconds in (result[what] for result in results):
            assert name == "RankMismatchError", (what, name, message)
            assert f"rank {odd_rank or 1} differs from rank 0" in message
            for words in MISMATCHES[what][1]:
                assert words in message, (what, message)
            assert seconds < QUICK_S


def _build_over_other_groups(rank: int, odd_rank: int) -> tuple[str, str, float]:
    return outcome(lambda: _adamw(_two(), shard=_replicated() if rank == odd_rank else distadam.ShardPolicy()))


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 0), (3, 1)])
def test_building_over_other_groups_is_named_on_every_rank(num_ranks: int, odd_rank: int) -> None:
    for name, message, seconds in run_ranks(num_ranks, _build_over_other_groups, odd_rank):
        assert name == "ConfigError", (name, message)
        assert "shard_group and replicate_group" in message
        assert "DeviceMesh" in message
        assert seconds < QUICK_S


def _build_with_objects_in_groups(rank: int) -> list[tuple[str, str, float]]:
    padding = [object() for _ in range(rank)]  # so that addresses differ between ranks
    groups = [
        {"params": [parameter(2)], "schedule": lambda step: step, "owner": nn.Linear(1, 1)},
        {"params": [parameter(2)], "options": {"scale": 0.5, "owner": object()}},
    ]
    del padding
    separate = [nn.Parameter(columns) for columns in torch.ones(6, 4).chunk(2, dim=1)]  # one memory, nothing shared
    return [outcome(lambda: _adamw(groups)), outcome(lambda: _adamw(separate))]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_building_does_not_take_likes_for_differences(num_ranks: int) -> None:
    for results in run_ranks(num_ranks, _build_with_objects_in_groups):
        assert [(name, message) for name, message, _ in results] == [("nothing", "")] * 2


def _build_wrongly(rank: int, odd_rank: int) -> dict[str, tuple[str, str, float]]:
    return {
        what: outcome(build if rank == odd_rank else lambda: _adamw(_two())) for what, (build, _, _) in FAILURES.items()
    }


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 0), (3, 1)])
def test_building_wrongly_on_one_rank_is_itself_there_and_a_mismatch_elsewhere(num_ranks: int, odd_rank: int) -> None:
    results = run_ranks(num_ranks, _build_wrongly, odd_rank)
    for what, (_, expected, words) in FAILURES.items():
        for rank, (name, message, seconds) in enumerate(result[what] for result in results):
            if rank == odd_rank:
                assert name == expected, (what, name, message)
            else:
                assert name == "RankMismatchError", (what, name, message)
                assert f"rank {odd_rank} failed in building the optimizer: {expected}" in message
            assert words in message, (what, message)
            assert seconds < QUICK_S


# Growing, loading -----------------------------------------------------------------------------------------------------


class Training:
    """A model of two parameters whose gradients are small integers, and its optimizer."""

    def __init__(self, rank: int, **options: Any) -> None:
        self.rank = rank
        self.params = [nn.Parameter(torch.arange(70.0)), nn.Parameter(torch.arange(5.0))]
        options = {"lr": 0.5, "comm": distadam.CommPolicy(timeout_s=HANG_S, bucket_mb=256 / 2**20)} | options
        self.optimizer = distadam.AdamW([("a", self.params[0]), ("b", self.params[1])], **options)

    def backward(self, step: int, params: list[nn.Parameter] | None = None) -> None:
        chosen = self.params if params is None else params
        sum(param.sum() * float(self.rank + step + i) for i, param in enumerate(chosen)).backward()  # type: ignore[union-attr]

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def result(self) -> list[Tensor]:
        """Parameters and moments."""
        state = self.optimizer.full_state_dict(to=None)["state"]
        tensors = [param.detach().clone() for param in self.params]
        return tensors + [entry[name] for entry in state.values() for name in ("exp_avg", "exp_avg_sq", "step")]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def _undisturbed(rank: int, num_steps: int) -> list[Tensor]:
    training = Training(rank)
    for step in range(num_steps):
        training.step(step)
    return training.result()


GROUPS: dict[str, tuple[Callable[[bool], dict[str, Any]], str | None, str]] = {
    # what is wrong with the group: build it, the error on the odd rank (None: a mismatch), words of the message
    "shape": (lambda odd: {"params": [("c", parameter(2 + odd))]}, None, "(3,)"),
    "name": (lambda odd: {"params": [("d" if odd else "c", parameter(2))]}, None, "'d'"),
    "lr": (lambda odd: {"params": [("c", parameter(2))], "lr": 1.0 + odd}, None, "group 1: lr"),
    "number": (lambda odd: {"params": [(str(i), parameter(2)) for i in range(1 + odd)]}, None, "number of parameters"),
    "complex": (
        lambda odd: {"params": [("c", parameter(2, dtype=torch.complex64 if odd else torch.float32))]},
        "ConfigError",
        "complex",
    ),
    "no tensor": (lambda odd: {"params": [("c", 3 if odd else parameter(2))]}, "TypeError", "Tensors"),
    "unnamed": (lambda odd: {"params": [parameter(2) if odd else ("c", parameter(2))]}, "ValueError", "names"),
    "no group": (lambda odd: [1] if odd else {"params": [("c", parameter(2))]}, "TypeError", "dict"),  # type: ignore[return-value,dict-item]
    "shared": (lambda odd: {"params": [("c", _aliased(odd))]}, "ConfigError", "same memory"),
}

_kept: list[nn.Parameter] = []


def _aliased(yes: bool) -> nn.Parameter:
    return nn.Parameter(_kept[0].detach()[3:]) if yes else parameter(2)


def _add_wrong_groups(rank: int, odd_rank: int) -> tuple[dict[str, tuple[str, str, float]], bool]:
    training = Training(rank)
    _kept[:] = training.params
    training.step(0)
    training.backward(1)
    results = {}
    for what, (group, _, _) in GROUPS.items():
        results[what] = outcome(lambda group=group: training.optimizer.add_param_group(group(rank == odd_rank)))
        assert len(training.optimizer.param_groups) == 1
    training.optimizer.step()
    training.step(2)
    return results, same(training.result(), _undisturbed(rank, 3))


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 1), (3, 0)])
def test_add_param_group_that_differs_is_named_on_every_rank_and_leaves_nothing(num_ranks: int, odd_rank: int) -> None:
    results = run_ranks(num_ranks, _add_wrong_groups, odd_rank)
    for what, (_, expected, words) in GROUPS.items():
        for rank, (name, message, seconds) in enumerate(result[0][what] for result in results):
            assert name == (expected if expected and rank == odd_rank else "RankMismatchError"), (what, name, message)
            assert words in message, (what, message)
            if rank != odd_rank:
                assert "add_param_group()" in message
                assert f"rank {odd_rank or 1}" in message or f"rank {odd_rank}" in message
            assert seconds < QUICK_S
    assert all(undisturbed for _, undisturbed in results)


def _change(saved: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    change(saved)
    return saved


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str | None, str]] = {
    # what is wrong with the state: change it, the error on the odd rank (None: a mismatch), words of the message
    "another lr": (lambda saved: saved["param_groups"][0].update(lr=7.0), None, "param_groups"),
    "no groups": (lambda saved: saved["param_groups"].clear(), "ValueError", "different number of parameter groups"),
    "fewer parameters": (
        lambda saved: saved["param_groups"][0]["params"].pop(),
        "ValueError",
        "doesn't match the size",
    ),
    "nothing": (lambda saved: saved.clear(), "KeyError", "param_groups"),
    "another shape": (
        lambda saved: saved["state"][0].update(exp_avg=torch.zeros(3)),
        "CheckpointError",
        "expected exp_avg of shape (70,)",
    ),
}

LOCAL_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str | None, str]] = {
    "another rank's": (lambda saved: saved["distadam"].update(rank=17), "LayoutMismatch", "rank 17"),
    "another layout": (lambda saved: saved["distadam"].update(layout="{}"), "LayoutMismatch", "another layout"),
    "another format": (lambda saved: saved["distadam"].update(format=99), "LayoutMismatch", "99"),
}


def _load_wrong_states(rank: int, odd_rank: int) -> tuple[dict[str, tuple[str, str, float]], bool]:
    training = Training(rank)
    training.step(0)
    results = {}
    for what, (change, _, _) in STATES.items():
        saved = training.optimizer.full_state_dict(to=None)
        if rank == odd_rank:
            change(saved)
        results[what] = outcome(lambda saved=saved: training.optimizer.load_state_dict(saved))
    for what, (change, _, _) in LOCAL_STATES.items():
        saved = training.optimizer.state_dict()
        if rank == odd_rank:
            change(saved)
        results[what] = outcome(lambda saved=saved: training.optimizer.load_state_dict(saved))
    local, full = training.optimizer.state_dict(), training.optimizer.full_state_dict(to=None)
    mixed = local if rank == odd_rank else full
    results["local and full"] = outcome(lambda: training.optimizer.load_state_dict(mixed))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    handle = training.optimizer.register_load_state_dict_pre_hook(fail) if rank == odd_rank else None
    results["a hook that fails"] = outcome(lambda: training.optimizer.load_state_dict(full))
    if handle is not None:
        handle.remove()
    for step in (1, 2):
        training.step(step)
    return results, same(training.result(), _undisturbed(rank, 3))


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 0), (3, 2)])
def test_load_state_dict_that_differs_is_named_on_every_rank_and_changes_nothing(num_ranks: int, odd_rank: int) -> None:
    cases = STATES | LOCAL_STATES
    cases |= {"local and full": (lambda saved: None, None, "kind of state")}
    cases |= {"a hook that fails": (lambda saved: None, "OSError", "disk full")}
    results = run_ranks(num_ranks, _load_wrong_states, odd_rank)
    assert set(results[0][0]) == set(cases)
    for what, (_, expected, words) in cases.items():
        for rank, (name, message, seconds) in enumerate(result[0][what] for result in results):
            assert name == (expected if expected and rank == odd_rank else "RankMismatchError"), (what, name, message)
            assert words in message, (what, message)
            if rank != odd_rank or expected is None:
                assert "load_state_dict()" in message
                assert f"rank {odd_rank}" in message
            assert seconds < QUICK_S
    assert all(undisturbed for _, undisturbed in results)


# Calling different things ---------------------------------------------------------------------------------------------


def _saved(training: Training) -> dict[str, Any]:
    return training.optimizer.state_dict()


CALLS: dict[str, tuple[Callable[[Training], object], str]] = {
    # what a rank calls after a backward, and how messages name it
    "step": (lambda training: training.optimizer.step(), "step()"),
    "clip": (lambda training: training.optimizer.clip_grad_norm_(1.0), "clip_grad_norm_()"),
    "full_grad": (lambda training: training.optimizer.full_grad("a"), "full_grad()"),
    "norm": (lambda training: training.params[0].grad.norm(), "a norm of p.grad"),  # type: ignore[union-attr]
    "torch's clip": (lambda training: nn.utils.clip_grad_norm_(training.params, 1.0), "a norm of p.grad"),
    "scale": (lambda training: training.params[0].grad.mul_(2.0), "an in-place operation on p.grad"),  # type: ignore[union-attr]
    "clip by value": (lambda training: nn.utils.clip_grad_value_(training.params, 1.0), "an in-place operation"),
    "check": (lambda training: _unscale(training), "GradScaler's check of p.grad"),
    "full_state_dict": (lambda training: training.optimizer.full_state_dict(), "full_state_dict()"),
    "reload": (lambda training: training.optimizer.reload_parameters(), "reload_parameters()"),
    "add group": (
        lambda training: training.optimizer.add_param_group({"params": [("c", parameter(2))]}),
        "add_param_group()",
    ),
    "load": (lambda training: training.optimizer.load_state_dict(_saved(training)), "load_state_dict()"),
}


def _unscale(training: Training) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(training.optimizer)


def _call_different_things(
    rank: int, odd_rank: int, only_first: tuple[str, ...]
) -> tuple[dict[str, tuple[str, str, float]], list[str]]:
    undisturbed = _undisturbed(rank, 2)
    results, disturbed = {}, []
    names = list(CALLS)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if first not in only_first or CALLS[first][1][:20] == CALLS[second][1][:20]:
                continue
            training = Training(rank)
            training.step(0)
            training.backward(1)
            call = CALLS[second if rank == odd_rank else first][0]
            results[f"{first} / {second}"] = outcome(lambda call=call, training=training: call(training))
            training.optimizer.step()
            if not same(training.result(), undisturbed):
                disturbed.append(f"{first} / {second}")
    return results, disturbed


@pytest.mark.parametrize(
    ("num_ranks", "odd_rank", "only_first"),
    [(2, 1, tuple(CALLS)), (3, 0, ("step", "full_state_dict"))],
    ids=["2 ranks", "3 ranks"],
)
def test_calling_different_things_is_named_on_every_rank_and_loses_nothing(
    num_ranks: int, odd_rank: int, only_first: tuple[str, ...]
) -> None:
    results = run_ranks(num_ranks, _call_different_things, odd_rank, only_first)
    for result, disturbed in results:
        for what, (name, message, seconds) in result.items():
            assert name == "RankMismatchError", (what, name, message)
            for called in what.split(" / "):
                assert CALLS[called][1] in message, (what, message)
            assert all(f"rank {rank} " in message for rank in range(num_ranks))
            assert seconds < QUICK_S
        assert disturbed == []


ARGUMENTS: dict[str, Callable[[Training, bool], object]] = {
    "max_norm": lambda training, odd: training.optimizer.clip_grad_norm_(2.0 if odd else 1.0),
    "norm_type": lambda training, odd: training.optimizer.clip_grad_norm_(1.0, 3.0 if odd else 2.0),
    "infinite norm_type": lambda training, odd: training.optimizer.clip_grad_norm_(1.0, float("inf") if odd else 2.0),
    "order of a norm": lambda training, odd: training.params[0].grad.norm(1 if odd else 2),  # type: ignore[union-attr]
    "order in torch's clip": lambda training, odd: nn.utils.clip_grad_norm_(training.params, 1.0, 1.0 if odd else 2.0),
    "parameter of full_grad": lambda training, odd: training.optimizer.full_grad("b" if odd else "a"),
    "rank of full_state_dict": lambda training, odd: training.optimizer.full_state_dict(to=None if odd else 0),
}


def _call_with_different_arguments(rank: int, odd_rank: int) -> tuple[dict[str, tuple[str, str, float]], list[str]]:
    undisturbed = _undisturbed(rank, 2)
    results, disturbed = {}, []
    for what, call in ARGUMENTS.items():
        training = Training(rank)
        training.step(0)
        training.backward(1)
        results[what] = outcome(lambda call=call, training=training: call(training, rank == odd_rank))
        training.optimizer.step()
        if not same(training.result(), undisturbed):
            disturbed.append(what)
    return results, disturbed


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 0), (3, 1)])
def test_calling_with_different_arguments_is_named_on_every_rank(num_ranks: int, odd_rank: int) -> None:
    for result, disturbed in run_ranks(num_ranks, _call_with_different_arguments, odd_rank):
        for what, (name, message, seconds) in result.items():
            assert name == "RankMismatchError", (what, name, message)
            assert all(f"rank {rank} " in message for rank in range(num_ranks))
            assert seconds < QUICK_S
        assert disturbed == []


# Misuse that training survives ----------------------------------------------------------------------------------------


def _write_in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.mul_(2.0)


def _replace_data(param: nn.Parameter) -> None:
    param.data = param.data * 2.0


WRITES = {"in place": _write_in_place, "p.data": _replace_data}
READERS = ("step", "clip", "full_grad")


def _write_on_one_rank(rank: int, odd_rank: int) -> tuple[dict[str, tuple[str, str, float]], list[str]]:
    results, wrong = {}, []
    for how, write in WRITES.items():
        reference = Training(rank)
        reference.step(0)
        if odd_rank == 0:  # reloading takes the first rank's parameters
            write(reference.params[1])
            reference.optimizer.reload_parameters()
        reference.step(1)
        for call in READERS:
            training = Training(rank)
            training.step(0)
            training.backward(1)
            if rank == odd_rank:
                write(training.params[1])
            for attempt in (1, 2):  # the error comes again until the parameters have been reloaded
                results[f"{how}, {call}, {attempt}"] = outcome(lambda c=call, t=training: CALLS[c][0](t))
            training.optimizer.reload_parameters()
            training.optimizer.step()
            if not same(training.result(), reference.result()):
                wrong.append(f"{how}, {call}")
    return results, wrong


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 0), (2, 1), (3, 1)])
def test_parameter_written_on_one_rank_is_named_and_reloading_goes_on_with_the_right_bits(
    num_ranks: int, odd_rank: int
) -> None:
    for rank, (result, wrong) in enumerate(run_ranks(num_ranks, _write_on_one_rank, odd_rank)):
        assert len(result) == 2 * len(WRITES) * len(READERS)
        for what, (name, message, seconds) in result.items():
            assert name == ("UsageError" if rank == odd_rank else "RankMismatchError"), (what, name, message)
            assert "'b'" in message, (what, message)
            assert "reload_parameters()" in message
            if rank != odd_rank:
                assert f"rank {odd_rank} failed while this rank called" in message
            assert seconds < QUICK_S
        assert wrong == []


def _reload_another_dtype(rank: int, odd_rank: int) -> tuple[list[tuple[str, str, float]], bool]:
    training = Training(rank)
    training.step(0)
    param = training.params[1]
    if rank == odd_rank:
        param.data = param.data.double()
    results = [outcome(training.optimizer.step), outcome(training.optimizer.reload_parameters)]
    if rank == odd_rank:
        param.data = param.data.float()
    training.optimizer.reload_parameters()
    training.step(1)
    return results, same(training.result(), _undisturbed(rank, 2))


def test_parameter_of_another_dtype_is_named_until_it_is_put_back() -> None:
    answers = run_ranks(2, _reload_another_dtype, 1)
    assert [[name for name, _, _ in results] for results, _ in answers] == [
        ["RankMismatchError", "RankMismatchError"],
        ["UsageError", "ConfigError"],
    ]
    for results, right in answers:
        assert "reload_parameters()" in results[0][1]
        assert "'b'" in results[1][1]
        assert "float64" in results[1][1]
        assert right


def _discard_on_one_rank(rank: int, odd_rank: int) -> tuple[dict[str, tuple[str, str, float]], list[str]]:
    results, wrong = {}, []
    undisturbed = _undisturbed(rank, 2)
    for what in ("zero_grad", "p.grad = None"):
        training = Training(rank)
        training.step(0)
        training.backward(7)
        if rank == odd_rank:
            if what == "zero_grad":
                training.optimizer.zero_grad()
            else:
                training.params[0].grad = None
        results[what] = outcome(training.optimizer.step)
        training.optimizer.zero_grad()
        training.step(1)
        if not same(training.result(), undisturbed):
            wrong.append(what)
    return results, wrong


@pytest.mark.parametrize(("num_ranks", "odd_rank"), [(2, 1), (3, 0)])
def test_gradient_discarded_on_one_rank_is_named_everywhere_and_zero_grad_cures_it(
    num_ranks: int, odd_rank: int
) -> None:
    for result, wrong in run_ranks(num_ranks, _discard_on_one_rank, odd_rank):
        for what, (name, message, seconds) in result.items():
            assert name == "UsageError", (what, name, message)
            assert "zero_grad()" in message
            assert "'a'" in message or "'b'" in message
            assert seconds < QUICK_S
        assert wrong == []


def _sparse_gradients(rank: int, odd_rank: int) -> tuple[tuple[str, str, float], tuple[str, str, float], bool]:
    embedding = nn.Embedding(10, 3, sparse=True)
    sparse = _adamw(embedding.named_parameters())
    backward = outcome(lambda: embedding(torch.tensor([1, 2])).sum().backward())
    del sparse
    training = Training(rank)
    training.step(0)
    training.backward(5)
    if rank == odd_rank:
        training.params[1].grad = torch.ones(5).to_sparse()
    by_hand = outcome(training.optimizer.step)
    training.optimizer.zero_grad()
    training.step(1)
    return backward, by_hand, same(training.result(), _undisturbed(rank, 2))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sparse_gradient_is_named(num_ranks: int) -> None:
    for rank, (backward, by_hand, right) in enumerate(run_ranks(num_ranks, _sparse_gradients, 1)):
        assert backward[0] == "ConfigError"
        assert "'weight'" in backward[1]
        assert "sparse" in backward[1]
        assert by_hand[0] == ("ConfigError" if rank == 1 else "RankMismatchError")
        assert "'b'" in by_hand[1]
        assert right


def _join_and_call(rank: int) -> dict[str, tuple[str, str, float]]:
    results = {}
    for what in ("reload", "add group", "load"):
        training = Training(rank)

        def iterate(what: str = what, training: Training = training) -> None:
            from torch.distributed.algorithms.join import Join

            with Join([training.optimizer]):
                for step in range(1 + (rank == 0)):
                    training.step(step)
                    if step == 1:
                        CALLS[what][0](training)

        results[what] = outcome(iterate)
    return results


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_call_that_needs_every_rank_is_refused_everywhere_when_some_have_joined(num_ranks: int) -> None:
    for result in run_ranks(num_ranks, _join_and_call):
        for what, (name, message, seconds) in result.items():
            assert name == "UsageError", (what, name, message)
            assert CALLS[what][1] in message
            assert "Join" in message
            assert seconds < QUICK_S


def _backwards_with_gaps(rank: int, num_ranks: int) -> list[float]:
    params = [parameter(64, value=0.0) for _ in range(3)]
    optimizer = distadam.SGD(params, lr=1.0, comm=distadam.CommPolicy(timeout_s=HANG_S, bucket_mb=256 / 2**20))
    for step in range(3):  # the first step teaches that there are two rounds
        for _ in range(2):
            gap = step == 2 and rank == 1
            sum(param.sum() * num_ranks for i, param in enumerate(params) if not (gap and i == 1)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [param[0].item() for param in params]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_backwards_with_a_gap_on_one_rank_are_averaged(num_ranks: int) -> None:
    full = 3.0 * 2 * num_ranks
    assert run_ranks(num_ranks, _backwards_with_gaps, num_ranks) == [[-full, -full + 2.0, -full]] * num_ranks


# Ranks that are gone --------------------------------------------------------------------------------------------------

TIMEOUT_S = 1.5
_training: Training | None = None


def _begin(rank: int) -> None:
    global _training
    _training = Training(rank, comm=distadam.CommPolicy(timeout_s=TIMEOUT_S, bucket_mb=256 / 2**20))
    _training.step(0)


class Survivor(AssertionError):
    """Carries what a survivor saw out of a call in which another rank died."""


def _lose_a_rank(rank: int, victim: int, how: str, when: str) -> None:
    training = _training
    assert training is not None

    def maybe(now: str) -> None:
        if rank != victim or when != now:
            return
        if how == "exits":
            try:
                raise ValueError("loss is not finite")
            except ValueError:
                os._exit(1)
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])

    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # between the hooks of the two parameters
            maybe("in backward")
            return grad

    def iterate() -> None:
        maybe("before backward")
        first, second = training.params
        (Raising.apply(first) + second.sum()).sum().backward()
        maybe("after backward")
        training.optimizer.step()
        training.step(1)

    name, message, seconds = outcome(iterate)
    raise Survivor(f"{name}|{seconds}|{message}")


def lose_a_rank(num_ranks: int, victim: int, how: str, when: str) -> dict[int, tuple[str, float, str]]:
    pool = Pool(num_ranks)
    pool.run(_begin)
    # What is stopped never answers: it is killed well after the survivors must have noticed.
    timer = threading.Timer(TIMEOUT_S + 2.5, pool.processes[victim].kill)
    timer.start()
    try:
        with pytest.raises(RanksFailed) as failed:
            pool.run(_lose_a_rank, victim, how, when, timeout_s=30.0)
    finally:
        timer.cancel()
        pool.close()
    seen = {}
    for rank, (name, text) in failed.value.errors.items():
        if rank != victim:
            assert name == "Survivor", text
            kind, seconds, message = text.split("|", 2)
            seen[rank] = (kind, float(seconds), message)
    assert len(seen) == num_ranks - 1
    return seen


@pytest.mark.parametrize(
    ("num_ranks", "how", "when"),
    [
        (2, "killed", "before backward"),
        (3, "killed", "in backward"),
        (2, "killed", "after backward"),
        (3, "exits", "in backward"),
        (2, "stopped", "before backward"),
        (3, "stopped", "after backward"),
    ],
)
def test_losing_a_rank_is_a_comm_error_on_the_others_within_the_timeout(num_ranks: int, how: str, when: str) -> None:
    for rank, (name, seconds, message) in lose_a_rank(num_ranks, num_ranks - 1, how, when).items():
        assert name == "CommError", message
        assert f"on rank {rank} of {num_ranks}" in message
        assert any(f"{operation} of " in message for operation in ("reduce_scatter", "agree", "all_gather")), message
        assert "bucket " in message or "the agreement before step()" in message
        assert seconds < TIMEOUT_S + 2.0


def _step_once_more(rank: int) -> tuple[str, str, float]:
    _begin(rank)
    assert _training is not None
    training = _training
    return outcome(lambda: training.step(1)) if rank == 0 else ("nothing", "", 0.0)


def _build_alone(rank: int, others_before: bool) -> tuple[str, str, float]:
    if others_before:
        _begin(rank)
    return outcome(lambda: _begin(rank)) if rank == 0 else ("nothing", "", 0.0)


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (_step_once_more, (), "rank 0 of 2"),
        (_build_alone, (False,), "process groups for the optimizer could not be made on rank 0"),
        (_build_alone, (True,), "process groups for the optimizer could not be made on rank 0"),
    ],
    ids=["one more step", "the first optimizer", "another optimizer"],
)
def test_doing_alone_what_all_ranks_must_do_is_a_comm_error_within_the_timeout(
    function: Callable[..., Any], args: tuple[bool, ...], words: str
) -> None:
    pool = Pool(2)  # whose groups are useless afterwards
    try:
        name, message, seconds = pool.run(function, *args, timeout_s=30.0)[0]
    finally:
        pool.close()
    assert name == "CommError", message
    assert words in message
    assert seconds < TIMEOUT_S + 2.0
