"""The public surface: signatures, names, policies, and what contradictory arguments raise.

Signatures are compared with the installed torch's by `inspect.signature`; messages with the very exception that the
installed torch raises for the same arguments. Nothing here has a tolerance: trained bits are compared exactly.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import nn

import distadam
from distadam import CommPolicy, ConfigError, OffloadPolicy, PrecisionPolicy, ShardPolicy
from tests.ranks import run_ranks

NAMES = ("Adam", "AdamW", "SGD", "RMSprop")
POLICIES = {"shard": ShardPolicy, "precision": PrecisionPolicy, "comm": CommPolicy, "offload": OffloadPolicy}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", NAMES)
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.__name__)


@pytest.fixture(autouse=True)
def no_search_for_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at all live objects takes most of a small run's time."""
    monkeypatch.setattr("distadam.engine.places.refuse_ddp", lambda names: None)


def parameter(numel: int = 64) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, numel))


# Signatures ----------------------------------------------------------------------------------------------------------


def signature_lines(optimizer: Any) -> list[tuple[str, Any, Any]]:
    """Return (name, kind, default) of every argument but the policies, in order."""
    parameters = inspect.signature(optimizer).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name not in POLICIES]


@EVERY_OPTIMIZER
def test_signature_is_torchs(name: str) -> None:
    assert signature_lines(getattr(distadam, name)) == signature_lines(getattr(torch.optim, name))


def test_signature_comparison_sees_names_order_kinds_and_defaults() -> None:
    def base(params: Any, lr: float = 1e-3, *, fused: Any = None) -> None: ...
    def renamed(params: Any, rate: float = 1e-3, *, fused: Any = None) -> None: ...
    def reordered(lr: float = 1e-3, params: Any = (), *, fused: Any = None) -> None: ...
    def positional(params: Any, lr: float = 1e-3, fused: Any = None) -> None: ...
    def other_default(params: Any, lr: float = 1e-2, *, fused: Any = None) -> None: ...

    for other in (renamed, reordered, positional, other_default):
        assert signature_lines(other) != signature_lines(base)


@EVERY_OPTIMIZER
def test_policies_come_last_by_keyword_only_and_default_to_themselves(name: str) -> None:
    last = list(inspect.signature(getattr(distadam, name)).parameters.values())[-len(POLICIES) :]
    assert [(p.name, p.kind, p.default) for p in last] == [
        (argument, inspect.Parameter.KEYWORD_ONLY, policy()) for argument, policy in POLICIES.items()
    ]


POSITIONAL: dict[str, tuple[Any, ...]] = {
    "Adam": (0.01, (0.8, 0.9), 1e-7, 0.1, True),
    "AdamW": (0.01, (0.8, 0.9), 1e-7, 0.1, True),
    "SGD": (0.01, 0.9, 0.0, 0.1, True),
    "RMSprop": (0.01, 0.9, 1e-7, 0.1, 0.5, True, False, None, True, False),
}


@EVERY_OPTIMIZER
def test_positional_arguments_land_where_torch_puts_them(name: str) -> None:
    arguments = POSITIONAL[name]
    ours = getattr(distadam, name)([parameter()], *arguments)
    theirs = getattr(torch.optim, name)([parameter()], *arguments)
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])


def test_all_is_the_whole_surface() -> None:
    assert distadam.__all__ == [
        "SGD",
        "Adam",
        "AdamW",
        "CheckpointError",
        "CommError",
        "CommPolicy",
        "ConfigError",
        "CorruptShard",
        "DistAdamError",
        "IncompleteCheckpoint",
        "Layout",
        "LayoutMismatch",
        "MissingDependency",
        "NonFiniteError",
        "OffloadPolicy",
        "ParamSpec",
        "Plan",
        "PrecisionPolicy",
        "RMSprop",
        "RankMismatchError",
        "RunInfo",
        "ShardPolicy",
        "ShardedOptimizer",
        "UsageError",
        "broadcast_buffers",
        "init_process_group",
        "plan",
        "register_mpi_backend",
    ]
    public = {key for key, value in vars(distadam).items() if not key.startswith("_") and not inspect.ismodule(value)}
    assert public == set(distadam.__all__)


ERROR_BASES = {
    "ConfigError": ValueError,
    "UsageError": RuntimeError,
    "RankMismatchError": RuntimeError,
    "CommError": RuntimeError,
    "NonFiniteError": RuntimeError,
    "CheckpointError": RuntimeError,
    "IncompleteCheckpoint": distadam.CheckpointError,
    "CorruptShard": distadam.CheckpointError,
    "LayoutMismatch": distadam.CheckpointError,
    "MissingDependency": ImportError,
}


def test_errors_form_the_documented_tree() -> None:
    errors = {
        name
        for name in distadam.__all__
        if inspect.isclass(getattr(distadam, name)) and issubclass(getattr(distadam, name), Exception)
    }
    assert errors == {*ERROR_BASES, "DistAdamError"}
    for name, base in ERROR_BASES.items():
        assert issubclass(getattr(distadam, name), base)
        assert issubclass(getattr(distadam, name), distadam.DistAdamError)


# Contradictions ------------------------------------------------------------------------------------------------------

_ADAM: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, torch.tensor(0.99))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.99))},
    {"weight_decay": -0.1},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
]
CONTRADICTIONS: dict[str, list[dict[str, Any]]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "SGD": [
        {"lr": -1.0},
        {"lr": torch.tensor([0.1, 0.2])},
        {"momentum": -0.5},
        {"weight_decay": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    "RMSprop": [
        {"lr": -1.0},
        {"lr": torch.tensor([0.1, 0.2])},
        {"eps": -1e-8},
        {"momentum": -0.5},
        {"weight_decay": -0.1},
        {"alpha": -0.1},
    ],
}


def raised_by(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("expected an exception but got none")


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in NAMES for options in CONTRADICTIONS[name]], ids=str
)
def test_contradiction_raises_torchs_type_and_text_then_ours(name: str, options: dict[str, Any]) -> None:
    theirs = raised_by(lambda: getattr(torch.optim, name)([parameter()], **options))
    ours = raised_by(lambda: getattr(distadam, name)([parameter()], **options))
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, distadam.DistAdamError)
    text = str(theirs).rstrip(".")
    assert str(ours).startswith(f"{text}. ")
    assert f"distadam.{name}" in str(ours)[len(text) :]


@pytest.mark.parametrize("options", [{"lr": "fast"}, {"speed": 1}], ids=str)
@EVERY_OPTIMIZER
def test_arguments_of_a_wrong_type_raise_type_error_as_torch(name: str, options: dict[str, Any]) -> None:
    for package in (torch.optim, distadam):
        with pytest.raises(TypeError):
            getattr(package, name)([parameter()], **options)


def _shared() -> list[dict[str, Any]]:
    shared = parameter()
    return [{"params": [shared]}, {"params": [shared]}]


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "one tensor": parameter,
    "nothing": list,
    "a set": lambda: [{"params": {parameter()}}],
    "not a tensor": lambda: [1.0],
    "not a leaf": lambda: [parameter() * 2],
    "one in two groups": _shared,
    "some names": lambda: [("weight", parameter()), parameter()],
    "names in some groups": lambda: [{"params": [parameter()]}, {"params": [("weight", parameter())]}],
}


@pytest.mark.parametrize("make", BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
@EVERY_OPTIMIZER
def test_bad_params_raise_as_torch(name: str, make: Callable[[], Any]) -> None:
    theirs = raised_by(lambda: getattr(torch.optim, name)(make()))
    ours = raised_by(lambda: getattr(distadam, name)(make()))
    assert isinstance(ours, type(theirs))
    assert str(theirs) in str(ours)


@EVERY_OPTIMIZER
def test_parameter_twice_in_a_group_warns_as_torch_then_raises(name: str) -> None:
    twice = parameter()
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        getattr(torch.optim, name)([twice, twice])
    with (
        pytest.warns(UserWarning, match="a parameter group with duplicate parameters"),
        pytest.raises(ConfigError, match=r"'w' is in parameter group 0 twice"),
    ):
        getattr(distadam, name)([("v", parameter()), ("w", twice), ("w", twice)])


@EVERY_OPTIMIZER
def test_differentiable_raises_config_error_wherever_it_is_said(name: str) -> None:
    make = getattr(distadam, name)
    with pytest.raises(ConfigError, match=f"distadam.{name} expected differentiable=False.*torch.optim.{name}"):
        make([parameter()], differentiable=True)
    with pytest.raises(ConfigError, match="group 0: expected differentiable=False"):
        make([{"params": [parameter()], "differentiable": True}])
    optimizer = make([parameter()])
    with pytest.raises(ConfigError, match="group 1: expected differentiable=False"):
        optimizer.add_param_group({"params": [parameter()], "differentiable": True})
    assert len(optimizer.param_groups) == 1
    loaded = getattr(torch.optim, name)([parameter()], differentiable=True).state_dict()
    with pytest.raises(ConfigError, match="group 0 of the state_dict: expected differentiable=False"):
        optimizer.load_state_dict(loaded)
    assert optimizer.param_groups[0]["differentiable"] is False


@EVERY_OPTIMIZER
def test_foreach_and_fused_are_hints(name: str) -> None:
    results = []
    hints: list[dict[str, bool]] = [{}, {"foreach": True}, {"foreach": False}]
    if name != "RMSprop":  # torch's has no fused
        hints += [{"fused": True}, {"fused": False}]
    for options in hints:
        weight = parameter()
        optimizer = getattr(distadam, name)([weight], **options)
        for step in range(3):
            (weight * (step + 1)).sum().backward()
            optimizer.step()
        assert all(optimizer.param_groups[0][key] is value for key, value in options.items())
        results.append(weight.detach().clone())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_is_accepted_on_the_cpu(name: str) -> None:
    weight = parameter()
    optimizer = getattr(distadam, name)([weight], capturable=True)
    before = weight.detach().clone()
    weight.sum().backward()
    optimizer.step()
    assert not torch.equal(weight.detach(), before)


# Policies ------------------------------------------------------------------------------------------------------------


def _id(value: Any) -> str:
    return getattr(value, "__name__", repr(value))


INVALID: list[tuple[type, str, Any]] = [
    *[(ShardPolicy, "stage", value) for value in (0, 3, "2", None, True, 2.0)],
    *[(ShardPolicy, "mesh", value) for value in (5, "mesh", torch.zeros(2))],
    (ShardPolicy, "replicate_group", b"group"),
    *[(PrecisionPolicy, "master", value) for value in ("bf16", None, torch.float32)],
    *[(PrecisionPolicy, "moments", value) for value in ("fp16", "8-bit", None, torch.bfloat16)],
    *[
        (PrecisionPolicy, "reduce_dtype", value)
        for value in (torch.int8, torch.complex64, torch.float8_e4m3fn, "fp32", "torch.float32", 16)
    ],
    *[(CommPolicy, "bucket_mb", value) for value in (0, -1.0, float("nan"), float("inf"), "25", None, True)],
    *[(CommPolicy, field, value) for field in ("overlap_reduce", "overlap_gather") for value in (1, None, "yes")],
    *[(CommPolicy, "reduce", value) for value in ("symmetric", "Shared", None)],
    *[(CommPolicy, "timeout_s", value) for value in (0, -1, float("nan"), float("inf"), "30", True)],
    *[(OffloadPolicy, "state", value) for value in ("host", "cpu", None)],
]


@pytest.mark.parametrize(("policy", "field", "value"), INVALID, ids=_id)
def test_policy_refuses_a_value_where_it_is_written(policy: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{policy.__name__}\({field}=\.\.\.\) expected .* but got "):
        policy(**{field: value})


def test_shard_policy_refuses_mesh_beside_groups() -> None:
    with pytest.raises(ConfigError, match="either mesh= or shard_group=/replicate_group= but got both"):
        ShardPolicy(mesh=object(), shard_group=object())  # type: ignore[arg-type]


@EVERY_POLICY
def test_policy_is_frozen_keyword_only_and_a_value(policy: Any) -> None:
    made = policy()
    assert made == policy()
    assert hash(made) == hash(policy())
    field = dataclasses.fields(policy)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field.name, field.default)
    with pytest.raises(TypeError, match="positional argument"):
        policy(field.default)
    with pytest.raises(TypeError):
        policy(no_such_field=1)
    with pytest.raises(ConfigError):  # replace() is construction too
        dataclasses.replace(made, **{next(name for kind, name, _ in INVALID if kind is policy): -7})


def offered_values() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value that a policy's annotations offer, one at a time, as (argument, fields)."""
    numbers = {"bucket_mb": [71 / 2**20, 1], "timeout_s": [30.0], "seed": [1]}
    reduce_dtypes = [None, torch.float32, torch.float64]
    for argument, policy in POLICIES.items():
        hints = typing.get_type_hints(policy, localns={"ProcessGroup": Any, "DeviceMesh": Any, "torch": torch})
        for field in dataclasses.fields(policy):
            values: list[Any] = list(numbers.get(field.name, [])) + (
                reduce_dtypes if field.name == "reduce_dtype" else []
            )
            for hint in (hints[field.name], *typing.get_args(hints[field.name])):
                if typing.get_origin(hint) is Literal:
                    values += typing.get_args(hint)
                elif hint is bool:
                    values += [True, False]
            yield from ((argument, {field.name: value}) for value in values)


def _train_with(policies: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(n)) for n in (64, 100, 1)]
    optimizer = distadam.AdamW(weights, lr=0.1, **policies)
    for step in range(3):
        sum((weight * float(step + i)).sum() for i, weight in enumerate(weights)).backward()
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def _train_with_each(rank: int) -> list[str]:
    """Return what did not train to the defaults' bits; moments that are rounded cannot (tests/test_storages.py)."""
    expected = _train_with({})
    wrong = []
    for argument, fields in offered_values():
        if fields.get("moments") in ("bf16", "8bit"):
            continue
        result = _train_with({argument: POLICIES[argument](**fields)})
        if not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
            wrong.append(f"{argument}={fields}")
    return wrong


def test_every_value_that_a_policy_offers_trains_to_the_same_bits() -> None:
    offered = {f"{argument}.{field}" for argument, fields in offered_values() for field in fields}
    groups = {"shard.shard_group", "shard.replicate_group", "shard.mesh"}  # objects; tests of hybrid sharding
    fields = {f"{argument}.{f.name}" for argument, policy in POLICIES.items() for f in dataclasses.fields(policy)}
    assert offered == fields - groups
    assert _train_with_each(0) == []
    assert run_ranks(2, _train_with_each) == [[], []]


@pytest.mark.parametrize(("argument", "value"), [*itertools.product(POLICIES, [None, "default", 2])], ids=str)
def test_policy_of_another_type_raises_config_error(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"expected a {POLICIES[argument].__name__} but got {value!r}"):
        distadam.AdamW([parameter()], **{argument: value})


def test_policies_do_not_fit_each_others_arguments() -> None:
    for argument, policy in itertools.product(POLICIES, POLICIES.values()):
        if POLICIES[argument] is not policy:
            with pytest.raises(ConfigError):
                distadam.AdamW([parameter()], **{argument: policy()})


def _build_with_a_wrong_argument(rank: int, argument: str, value: Any) -> tuple[str, str]:
    error = raised_by(lambda: distadam.AdamW([("w", parameter())], **({argument: value} if rank == 1 else {})))
    return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("shard", None), ("comm", 3), ("lr", -1.0), ("differentiable", True), ("params", None)],
    ids=str,
)
def test_argument_error_on_one_rank_is_an_error_on_all(argument: str, value: Any) -> None:
    if argument == "params":
        pairs = run_ranks(2, _build_from_no_params)
    else:
        pairs = run_ranks(2, _build_with_a_wrong_argument, argument, value)
    (other, other_text), (own, own_text) = pairs
    assert own in ("ConfigError", "ValueError")
    assert other == "RankMismatchError"
    assert "rank 1" in other_text
    assert own_text in other_text


def _build_from_no_params(rank: int) -> tuple[str, str]:
    error = raised_by(lambda: distadam.AdamW([("w", parameter())] if rank == 0 else []))
    return type(error).__name__, str(error)


def test_shard_group_of_another_type_raises_config_error_without_a_process_group() -> None:
    with pytest.raises(ConfigError, match=r"ShardPolicy\(shard_group=\.\.\.\) expected a group that holds rank 0"):
        distadam.AdamW([parameter()], shard=ShardPolicy(shard_group=5))  # type: ignore[arg-type]
