"""state_dict, load_state_dict and full_state_dict: torch.optim's format, this rank's shards, and the way between them.

Nothing here has a tolerance. Round trips copy bits. Where training goes on after a load, every rank has the same
integer gradients and shapes are multiples of 64 elements, so the average over ranks is exact and torch.optim's fused
implementation gives the bits to expect. Cases run on 1, 2 and 3 ranks: one call of a worker runs many.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import distadam
from distadam import CheckpointError, CommPolicy, ConfigError, LayoutMismatch, ShardPolicy
from distadam.engine.flat_bucket import FlatBucket
from tests.ranks import run_ranks
from tests.reference_optimizers import FUSED_RULES, TORCH_OPTIMIZERS, Options, cases, options_id

OURS: dict[str, Any] = {
    "adam": distadam.Adam,
    "adamw": distadam.AdamW,
    "sgd": distadam.SGD,
    "rmsprop": distadam.RMSprop,
}
RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 3])
SEVERAL_RANKS = pytest.mark.parametrize("num_ranks", [2, 3])
SMALL = CommPolicy(bucket_mb=1 / 2**10)
SHAPES = ((64,), (8, 16), (4, 4, 4, 4), (320,), (2, 32))

Params = list[nn.Parameter]
Named = list[tuple[str, nn.Parameter]]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forced kernel; and no search of all live objects for DDP, which takes most of a small run's time."""
    monkeypatch.delenv("DISTADAM_KERNEL", raising=False)
    monkeypatch.setattr("distadam.engine.places.refuse_ddp", lambda names: None)


def make_params(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], steps: Iterable[int]) -> None:
    """Train on small integer gradients, other ones for each step and parameter."""
    params = list(params)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randint(-9, 10, param.shape, generator=generator).to(param.dtype) for param in params]
        sum(((param * grad).sum() for param, grad in zip(params, grads, strict=True)), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()


def differences(ours: Any, theirs: Any, where: str = "", *, memory: bool = True) -> list[str]:
    """Return in what two state dicts differ: types, keys, order of keys in entries, dtypes, shapes, strides, bits."""
    if type(ours) is not type(theirs):
        return [f"{where}: {type(ours).__name__} for {type(theirs).__name__}"]
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return [f"{where}: keys {list(ours)} for {list(theirs)}"]
        return [line for key in ours for line in differences(ours[key], theirs[key], f"{where}.{key}", memory=memory)]
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{where}: {len(ours)} for {len(theirs)}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]", memory=memory)]
    if isinstance(ours, Tensor):
        facts = [(t.dtype, t.shape, t.device, t.requires_grad, t.stride() if memory else ()) for t in (ours, theirs)]
        if facts[0] != facts[1]:
            return [f"{where}: {facts[0]} for {facts[1]}"]
        return [] if torch.equal(ours, theirs) else [f"{where}: values"]
    return [] if ours == theirs else [f"{where}: {ours!r} for {theirs!r}"]


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


def raised(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run in this process for one rank without a group, else on real ranks."""
    return [function(0, *args)] if num_ranks == 1 else run_ranks(num_ranks, function, *args)


def torch_twin(name: str, options: Options, params: Any) -> Any:
    return TORCH_OPTIMIZERS[name](params, **options, **({"fused": True} if name in FUSED_RULES else {}))


# Round trips ---------------------------------------------------------------------------------------------------------


def _round_trips(rank: int) -> list[str]:
    """torch -> distadam -> torch for every rule and option; what is not as it was."""
    wrong = []
    for name, options in cases():
        case = f"{name} {options_id(options)}"
        start = make_params()
        before = torch_twin(name, options, start)
        train(before, start, range(2))
        saved = before.state_dict()

        params = [nn.Parameter(value) for value in values(start)]
        sharded = OURS[name](params, **options, comm=SMALL)
        sharded.load_state_dict(copy.deepcopy(saved))
        full = sharded.full_state_dict(to=None)
        wrong += [f"{case}: loaded and back{line}" for line in differences(full, saved)]

        after_params = [nn.Parameter(value) for value in values(start)]
        after = torch_twin(name, options, after_params)
        after.load_state_dict(full)
        wrong += [f"{case}: in torch again{line}" for line in differences(after.state_dict(), saved)]

        if name in FUSED_RULES:  # there is no RMSprop in torch whose bits could be expected
            train(before, start, [2])
            train(sharded, params, [2])
            train(after, after_params, [2])
            if not (same(params, start) and same(after_params, start)):
                wrong.append(f"{case}: training after the load")
            full = sharded.full_state_dict(to=None)
            wrong += [f"{case}: trained{line}" for line in differences(full["state"], before.state_dict()["state"])]
    return wrong


@RANKS
def test_state_goes_from_torch_to_shards_and_back_with_the_same_bits(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _round_trips) == [[]] * num_ranks


def _moves_mid_run(rank: int) -> list[str]:
    """A run under torch.optim.AdamW moves by one call, and moves back by one."""
    wrong = []
    options: Options = {"lr": 0.05, "amsgrad": True}
    expected = make_params()
    unmoved = torch.optim.AdamW(expected, **options, fused=True)
    train(unmoved, expected, range(9))
    params = make_params()
    first = torch.optim.AdamW(params, **options, fused=True)
    train(first, params, range(3))
    second = distadam.AdamW(params, comm=SMALL)  # other hyper-parameters: they come with the state
    second.load_state_dict(first.state_dict())
    train(second, params, range(3, 6))
    third = torch.optim.AdamW([nn.Parameter(value) for value in values(params)])
    third.load_state_dict(second.full_state_dict(to=None))
    train(third, third.param_groups[0]["params"], range(6, 9))
    if not same(third.param_groups[0]["params"], expected):
        wrong.append("parameters")
    wrong += differences(third.state_dict(), unmoved.state_dict())
    return wrong


@RANKS
def test_a_run_moves_from_torch_and_back_by_one_call_each(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _moves_mid_run) == [[]] * num_ranks


def _resharded(rank: int, full: dict[str, Any], start: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    params = [nn.Parameter(value.clone()) for value in start]
    optimizer = distadam.AdamW(params, lr=0.05, comm=SMALL)
    optimizer.load_state_dict(full)
    train(optimizer, params, range(3, 6))
    return values(params), optimizer.full_state_dict(to=None)


def test_full_state_fits_every_number_of_ranks() -> None:
    params = make_params()
    optimizer = distadam.AdamW(params, lr=0.05)
    train(optimizer, params, range(3))
    full, start = copy.deepcopy(optimizer.full_state_dict()), values(params)
    train(optimizer, params, range(3, 6))
    for num_ranks in (2, 3):
        for end, final in run_ranks(num_ranks, _resharded, full, start):
            assert same(end, params)
            assert differences(final, optimizer.full_state_dict()) == []


@pytest.mark.parametrize("broken", ["steps", "slices"])
def test_round_trip_sees_lost_state(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "steps":
        monkeypatch.setattr("distadam.engine.state.step_of", lambda entry, rule: 1.0)
    else:
        flatten = FlatBucket.flatten
        monkeypatch.setattr(FlatBucket, "flatten", lambda self, value, slot: flatten(self, value, slot).flip(0))
    assert _moves_mid_run(0) != []


# The format ----------------------------------------------------------------------------------------------------------


def _awkward_params(dtype: torch.dtype) -> Named:
    """Odd sizes, strides of every kind, a scalar, nothing at all; some stay without gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    tensors = {
        "odd": draw(3, 7),
        "scalar": draw(),
        "empty": draw(0, 4),
        "channels_last": draw(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": draw(5, 6).t(),
        "gaps": draw(6, 8)[:, ::2],
        "unused": draw(64),
        "frozen": draw(9),
        "last": draw(130),
    }
    return [(key, nn.Parameter(tensor, requires_grad=key != "frozen")) for key, tensor in tensors.items()]


FORMATS: list[tuple[str, Options]] = [
    ("adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("adamw", {"lr": torch.tensor(0.1)}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5}),
    ("rmsprop", {}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
]


STEPPED = {0, 1, 2, 4, 5, 6, 7}  # numbers over the two groups: 3 is the unused parameter, 8 the frozen one


def _formats(rank: int) -> list[str]:
    """Everything of full_state_dict but the values of odd sizes, beside torch.optim's state_dict."""
    wrong = []
    for (name, options), dtype, named in itertools.product(FORMATS, (torch.float32, torch.float64), (True, False)):
        dicts = []
        for make in (OURS[name], TORCH_OPTIMIZERS[name]):
            pairs = _awkward_params(dtype)
            entries: list[Any] = pairs if named else [param for _, param in pairs]
            optimizer = make([{"params": entries[::2]}, {"params": entries[1::2], "lr": 0.25}], **options)
            train(optimizer, [param for key, param in pairs if key not in ("unused", "frozen")], range(2))
            ours = isinstance(optimizer, distadam.ShardedOptimizer)
            dicts.append(copy.deepcopy(optimizer.full_state_dict(to=None) if ours else optimizer.state_dict()))
            for entry in dicts[-1]["state"].values():
                for key, value in entry.items():
                    if key != "step":
                        value.fill_(1)  # keeps dtype, shape and strides
        case = f"{name} {options_id(options)} {dtype} {'named' if named else 'unnamed'}: "
        wrong += [case + line for line in differences(*dicts)]
        if set(dicts[0]["state"]) != (set() if (name, options) == ("sgd", {}) else STEPPED):
            wrong.append(f"{case}: state of {list(dicts[0]['state'])}")
    return wrong


@RANKS
def test_full_state_has_torchs_exact_format(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _formats) == [[]] * num_ranks


def test_full_state_counts_steps_in_the_default_dtype_as_torch() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        dicts = []
        for make in (distadam.AdamW, torch.optim.AdamW):
            params = make_params()
            optimizer = make(params)
            train(optimizer, params, range(2))
            ours = isinstance(optimizer, distadam.ShardedOptimizer)
            dicts.append(optimizer.full_state_dict() if ours else optimizer.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    steps = [[entry["step"] for entry in found["state"].values()] for found in dicts]
    assert differences(*steps) == []
    assert steps[0][0].dtype == torch.float64


@pytest.mark.parametrize("name", OURS)
def test_full_state_before_the_first_step_is_torchs(name: str) -> None:
    assert (
        differences(OURS[name](make_params()).full_state_dict(), TORCH_OPTIMIZERS[name](make_params()).state_dict())
        == []
    )


def test_format_comparison_sees_each_kind_of_difference() -> None:
    base = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 4)}}, "param_groups": [{"lr": 0.1}]}
    changes: list[Callable[[dict[Any, Any]], Any]] = [
        lambda d: d["state"][0].update(step=torch.tensor(2.0)),
        lambda d: d["state"][0].update(step=torch.tensor(1.0, dtype=torch.float64)),
        lambda d: d["state"][0].update(step=1.0),
        lambda d: d["state"][0].update(exp_avg=torch.ones(16)),
        lambda d: d["state"][0].update(exp_avg=torch.ones(4, 4).t()),
        lambda d: d["state"][0].update(exp_avg=torch.ones(4, 4, requires_grad=True)),
        lambda d: d["state"].update({"0": d["state"].pop(0)}),
        lambda d: d["state"].update({1: {}}),
        lambda d: d["param_groups"][0].update(lr=0.2),
        lambda d: d["param_groups"][0].update(lr=torch.tensor(0.1)),
        lambda d: d["param_groups"][0].update(extra=None),
        lambda d: d["param_groups"].append({}),
    ]
    assert differences(base, copy.deepcopy(base)) == []
    for change in changes:
        other = copy.deepcopy(base)
        change(other)
        assert differences(other, base) != [], change


# Where the full state goes -------------------------------------------------------------------------------------------


def _destinations(rank: int, num_ranks: int) -> None:
    params = make_params()
    optimizer = distadam.AdamW(params, comm=SMALL)
    train(optimizer, params, range(2))
    everywhere = optimizer.full_state_dict(to=None)
    assert list(everywhere["state"]) == list(range(len(SHAPES)))
    for to in range(num_ranks):
        found = optimizer.full_state_dict(to=to)
        assert found == {} if rank != to else differences(found, everywhere) == []
    assert (optimizer.full_state_dict() == {}) is (rank != 0)
    for to in (num_ranks, -1, "all"):
        kind, text = raised(lambda to=to: optimizer.full_state_dict(to=to))  # type: ignore[misc]
        assert kind == "ConfigError"
        assert f"expected a rank below {num_ranks} or None but got {to!r}" in text

    def fail(owner: Any) -> None:
        if rank == 0:
            raise ZeroDivisionError("in a hook")

    handle = optimizer.register_state_dict_pre_hook(fail)
    kind, text = raised(optimizer.full_state_dict)
    handle.remove()
    assert kind == ("RankMismatchError" if rank else "ZeroDivisionError")
    assert "in a hook" in text
    if num_ranks > 1:
        kind, text = raised(lambda: optimizer.full_state_dict(to=rank))
        assert kind == "RankMismatchError"
        assert "full_state_dict()" in text
        kind, text = raised(optimizer.step if rank else optimizer.full_state_dict)
        assert kind == "RankMismatchError"
        assert "rank 0 full_state_dict()" in text
        assert "rank 1 step()" in text
    train(optimizer, params, [2])  # as if nothing had happened
    twin = make_params()
    train(torch.optim.AdamW(twin, fused=True), twin, range(3))
    assert same(params, twin)


@RANKS
def test_full_state_goes_to_the_rank_that_was_asked_for(num_ranks: int) -> None:
    on_ranks(num_ranks, _destinations, num_ranks)


def _hybrid_destinations(rank: int) -> list[list[str]]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    params = make_params()
    optimizer = distadam.AdamW(params, comm=SMALL, shard=ShardPolicy(mesh=mesh))
    train(optimizer, params, range(2))
    return [sorted(optimizer.full_state_dict(to=to)) for to in (0, 1, 2, 3, None)]


def test_full_state_goes_to_any_rank_of_a_hybrid_grid() -> None:
    whole = ["param_groups", "state"]
    for rank, found in enumerate(run_ranks(4, _hybrid_destinations)):
        assert found == [whole if rank == to else [] for to in range(4)] + [whole]


def _between_backward_and_step(rank: int, num_ranks: int) -> None:
    """Rank 1 lacks a gradient, so backward has launched fewer reductions there than elsewhere."""
    params = make_params([(64,)] * 4)
    comm = CommPolicy(bucket_mb=71 / 2**20, timeout_s=20)
    optimizer = distadam.AdamW(params, comm=comm, shard=ShardPolicy(stage=1))
    train(optimizer, params, range(2))
    used = [param for index, param in enumerate(params) if not (rank == 1 and index == 2)]
    sum((param.sum() for param in used), torch.zeros(())).backward()
    before = optimizer.full_state_dict(to=None)
    assert [float(entry["step"]) for entry in before["state"].values()] == [2.0] * 4
    optimizer.step()
    twin = make_params([(64,)] * 4)
    reference = torch.optim.AdamW(twin, fused=True)
    train(reference, twin, range(2))
    assert differences(before["state"], reference.state_dict()["state"]) == []
    for index, param in enumerate(twin):
        param.grad = torch.full((64,), float(num_ranks - 1 if index == 2 else num_ranks)) / num_ranks
    reference.step()
    assert same(params, twin)


@SEVERAL_RANKS
def test_full_state_may_be_taken_between_backward_and_step(num_ranks: int) -> None:
    run_ranks(num_ranks, _between_backward_and_step, num_ranks, timeout_s=60)


def _with_uneven_inputs(rank: int, when: str) -> None:
    """Rank 0 runs out of data after 2 of 4 iterations; what the others call, it joins in."""
    params = make_params()
    optimizer = distadam.AdamW(params, comm=CommPolicy(bucket_mb=1 / 2**10, timeout_s=20))
    counts = []
    with Join([optimizer]):
        for _ in range(2 if rank == 0 else 4):
            sum((param.sum() for param in params), torch.zeros(())).backward()
            if when == "before the step":
                full = optimizer.full_state_dict(to=None)
            optimizer.step()
            if when == "after the step":
                full = optimizer.full_state_dict(to=None)
            counts.append({float(entry["step"]) for entry in full["state"].values()} or {0.0})
    after = when == "after the step"
    assert counts == [{float(step + after)} for step in range(2 if rank == 0 else 4)]
    everyones: list[Any] = [None, None]
    dist.all_gather_object(everyones, values(params))
    assert same(*everyones)


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_full_state_may_be_taken_while_a_rank_has_joined(when: str) -> None:
    run_ranks(2, _with_uneven_inputs, when, timeout_s=60)


# Local state ---------------------------------------------------------------------------------------------------------


def _saved_and_read(found: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _local_round_trips(rank: int) -> list[str]:
    """Local state of every rule, fp32 and bf16, resumes a run to the bits of the undisturbed one."""
    wrong = []
    for (name, options), dtype in itertools.product(FORMATS, (torch.float32, torch.bfloat16)):
        case = f"{name} {options_id(options)} {dtype}"
        params = make_params(dtype=dtype)
        first = OURS[name](params, **options, comm=SMALL)
        train(first, params, range(3))
        local, start = _saved_and_read(first.state_dict()), values(params)
        full = first.full_state_dict(to=None)
        train(first, params, range(3, 6))

        resumed = [nn.Parameter(value) for value in start]
        second = OURS[name](resumed, comm=SMALL)
        second.load_state_dict(local)
        wrong += [f"{case}: loaded{line}" for line in differences(second.state_dict(), local, memory=False)]
        train(second, resumed, range(3, 6))
        wrong += [f"{case}: resumed{line}" for line in differences(second.state_dict(), first.state_dict())]
        if not same(resumed, params):
            wrong.append(f"{case}: parameters")

        # What the masters are for: without their low bits, bf16 goes elsewhere.
        rounded = [nn.Parameter(value.clone()) for value in start]
        third = OURS[name](rounded, comm=SMALL)
        third.load_state_dict(full)
        train(third, rounded, range(3, 6))
        masters = [found.state_dict()["distadam"]["masters"] for found in (third, first)]
        if (differences(*masters) == []) is not (dtype == torch.float32):
            wrong.append(f"{case}: masters do not matter")
    return wrong


@RANKS
def test_local_state_resumes_with_the_same_bits(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _local_round_trips) == [[]] * num_ranks


def _refusals(rank: int, num_ranks: int) -> None:
    params = make_params()
    optimizer = distadam.AdamW(params, comm=SMALL)
    train(optimizer, params, range(2))
    mine = copy.deepcopy(optimizer.state_dict())
    everyones: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyones, mine)
    neighbours = everyones[(rank + 1) % num_ranks]

    kind, text = raised(lambda: optimizer.load_state_dict(neighbours))
    assert kind == "LayoutMismatch"
    assert f"expected the local state of rank {rank} but got that of rank {(rank + 1) % num_ranks}" in text
    assert "full_state_dict()" in text

    kind, text = raised(lambda: optimizer.load_state_dict(neighbours if rank == 1 else mine))
    assert kind == ("LayoutMismatch" if rank == 1 else "RankMismatchError")
    assert "expected the local state of rank 1" in text

    others = {
        "another bucket size": distadam.AdamW(make_params(), comm=CommPolicy(bucket_mb=1)),
        "another shape": distadam.AdamW(make_params([(64,), (16, 8), *SHAPES[2:]]), comm=SMALL),
        "other names": distadam.AdamW([(f"w{i}", param) for i, param in enumerate(make_params())], comm=SMALL),
        "another dtype": distadam.AdamW(make_params(dtype=torch.bfloat16), comm=SMALL),
    }
    for case, other in others.items():
        kind, text = raised(lambda other=other: optimizer.load_state_dict(other.state_dict()))  # type: ignore[misc]
        assert (case, kind) == (case, "LayoutMismatch")
        assert "another layout" in text

    assert differences(optimizer.state_dict(), mine, memory=False) == []
    optimizer.load_state_dict(mine)


@SEVERAL_RANKS
def test_local_state_is_refused_on_another_rank_or_layout(num_ranks: int) -> None:
    run_ranks(num_ranks, _refusals, num_ranks)


def _local_states(rank: int) -> dict[str, Any]:
    params = make_params()
    optimizer = distadam.AdamW(params, comm=SMALL)
    train(optimizer, params, range(2))
    return optimizer.state_dict()


def _load_all(rank: int, states: list[dict[str, Any]]) -> str:
    return raised(lambda: distadam.AdamW(make_params(), comm=SMALL).load_state_dict(states[rank]))[0]


def test_local_state_is_refused_by_another_number_of_ranks() -> None:
    states = {1: [_local_states(0)], 2: run_ranks(2, _local_states), 3: run_ranks(3, _local_states)}
    for source, target in itertools.permutations(states, 2):
        given = [states[source][rank % source] for rank in range(target)]
        kinds = on_ranks(target, _load_all, given)
        assert set(kinds) == {"LayoutMismatch"}, (source, target)
    for num_ranks, given in states.items():
        assert set(on_ranks(num_ranks, _load_all, given)) == {"nothing"}


def _says_nothing(rank: int) -> None:
    """state_dict() communicates nothing: one rank alone may call it."""
    params = make_params()
    optimizer = distadam.AdamW(params, comm=SMALL)
    train(optimizer, params, range(2))
    optimizer.comm_stats.clear()
    if rank == 0:
        optimizer.state_dict()
    assert optimizer.comm_stats.calls == {}
    optimizer.full_state_dict()
    assert optimizer.comm_stats.calls != {}


def test_state_dict_communicates_nothing() -> None:
    run_ranks(2, _says_nothing)


def test_local_state_is_live_and_deepcopies_are_not() -> None:
    """As with torch.optim: the dict shares memory with the optimizer, so loading it later changes nothing."""
    params = make_params(dtype=torch.bfloat16)
    optimizer = distadam.AdamW(params)
    train(optimizer, params, range(2))
    live, kept = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    frozen = copy.deepcopy(kept)
    train(optimizer, params, [2])
    assert differences(live, optimizer.state_dict()) == []
    assert differences(kept, frozen) == []
    assert differences(kept, live) != []
    now = copy.deepcopy(live)
    optimizer.load_state_dict(live)
    assert differences(optimizer.state_dict(), now, memory=False) == []


def test_what_was_loaded_is_neither_changed_nor_kept() -> None:
    """torch.optim's load shares memory with a state that needs no cast; ours copies."""
    for dtype in (torch.float32, torch.bfloat16):
        params = make_params(dtype=dtype)
        optimizer = distadam.AdamW(params, lr=torch.tensor(0.1))
        train(optimizer, params, range(2))
        for found in (copy.deepcopy(optimizer.state_dict()), optimizer.full_state_dict()):
            before = copy.deepcopy(found)
            optimizer.load_state_dict(found)
            train(optimizer, params, range(2, 4))
            optimizer.param_groups[0]["lr"].mul_(0.5)
            assert differences(found, before) == []


# Views ---------------------------------------------------------------------------------------------------------------

STATE_KEYS: list[tuple[str, Options, list[str]]] = [
    ("adam", {}, ["step", "exp_avg", "exp_avg_sq"]),
    ("adamw", {"amsgrad": True}, ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    ("sgd", {"momentum": 0.9}, ["momentum_buffer"]),
    ("rmsprop", {"momentum": 0.9, "centered": True}, ["step", "square_avg", "momentum_buffer", "grad_avg"]),
]


def _views(rank: int, num_ranks: int) -> None:
    for name, options, keys in STATE_KEYS:
        params = make_params([(64,), (8, 16), (3, 7), (), (0,), (320,)])
        optimizer = OURS[name](params, **options, comm=SMALL)
        train(optimizer, params, range(2))
        full = optimizer.full_state_dict(to=None)["state"]
        sizes = []
        for number, param in enumerate(params):
            entry = optimizer.state[param]
            assert list(entry) == keys
            for key, view in entry.items():
                assert (view.dtype, view.is_contiguous()) == (torch.float32, True)
                if key == "step":
                    assert torch.equal(view, full[number]["step"])
                    continue
                assert view.dim() == 1
                sizes.append(view.numel())
                parts: list[Any] = [view]
                if num_ranks > 1:
                    parts = [None] * num_ranks
                    dist.all_gather_object(parts, view.clone())
                assert torch.equal(torch.cat(parts), full[number][key].reshape(-1))
        assert 0 in sizes
        assert all(0 <= size <= 320 for size in sizes)
    plain = distadam.SGD(make_params(), comm=SMALL)
    train(plain, plain.param_groups[0]["params"], [0])
    assert all(not entry for entry in plain.state.values())


@RANKS
def test_state_holds_one_dimensional_views_of_this_ranks_shard(num_ranks: int) -> None:
    on_ranks(num_ranks, _views, num_ranks)


def _write_to_state(optimizer: Any, params: Params) -> None:
    for entry in (optimizer.state[param] for param in params):
        for key, value in entry.items():
            if key != "step":
                value.mul_(2)
    if "step" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["step"].fill_(50.0)  # one of several in its bucket
        optimizer.state[params[3]]["step"].zero_()


def _writes(rank: int) -> list[str]:
    wrong = []
    for name, options, _ in STATE_KEYS[:3]:
        finals = []
        for make, more in ((OURS[name], {}), (TORCH_OPTIMIZERS[name], {"fused": True})):
            params = make_params()
            optimizer = make(params, **options, **more)
            train(optimizer, params, range(2))
            _write_to_state(optimizer, params)
            train(optimizer, params, range(2, 5))
            finals.append(params)
        if not same(*finals):
            wrong.append(name)
    return wrong


@RANKS
def test_writing_to_the_state_changes_the_training_as_in_torch(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _writes) == [[]] * num_ranks


# What a load brings along --------------------------------------------------------------------------------------------


def _switched_on(rank: int) -> list[str]:
    """Options come with the state, and with them states that the optimizer had not had."""
    wrong = []
    switches: list[tuple[str, Options, Options]] = [
        ("adam", {}, {"amsgrad": True, "maximize": True}),
        ("adam", {"amsgrad": True}, {}),
        ("adamw", {}, {"amsgrad": True, "lr": torch.tensor(0.05)}),
        ("sgd", {}, {"momentum": 0.9, "dampening": 0.5}),
        ("sgd", {"momentum": 0.9}, {}),
        ("rmsprop", {}, {"centered": True, "momentum": 0.5}),
        ("rmsprop", {"centered": True}, {}),
    ]
    for name, own, loaded in switches:
        expected = make_params()
        source = torch_twin(name, loaded, expected)
        train(source, expected, range(2))
        params = [nn.Parameter(value) for value in values(expected)]
        optimizer = OURS[name](params, **own, comm=SMALL)
        train(optimizer, params, [7])  # has a state of its own, which goes
        with torch.no_grad():
            for param, value in zip(params, expected, strict=True):
                param.copy_(value)
        optimizer.reload_parameters()
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        case = f"{name} {own} loads {loaded}"
        wrong += [case + line for line in differences(optimizer.full_state_dict(to=None), source.state_dict())]
        keys = {key for entry in source.state_dict()["state"].values() for key in entry}
        if {key for entry in optimizer.state.values() for key in entry} != keys:
            wrong.append(f"{case}: views")
        if name in FUSED_RULES:
            train(source, expected, range(2, 4))
            train(optimizer, params, range(2, 4))
            if not same(params, expected):
                wrong.append(f"{case}: training")
    return wrong


@RANKS
def test_loaded_state_switches_options_on_and_off(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _switched_on) == [[]] * num_ranks


def _frozen(rank: int) -> list[str]:
    """State of parameters that are frozen when it is loaded is kept, saved, and used once they are trained again."""
    wrong = []
    for name, options in (("adamw", {"amsgrad": True}), ("sgd", {"momentum": 0.9, "dampening": 0.5})):
        expected = make_params()
        reference = TORCH_OPTIMIZERS[name]([{"params": [param]} for param in expected], **options, fused=True)
        train(reference, expected[:4], range(3))  # the last one has never been trained
        saved = reference.state_dict()

        params = [nn.Parameter(value) for value in values(expected)]
        params[1].requires_grad_(False)
        expected[1].requires_grad_(False)
        optimizer = OURS[name]([{"params": [param]} for param in params], comm=SMALL)
        optimizer.load_state_dict(copy.deepcopy(saved))
        wrong += [f"{name} loaded{line}" for line in differences(optimizer.full_state_dict(to=None), saved)]
        trained = [0, 2, 3, 4]
        for run, of in ((reference, expected), (optimizer, params)):
            train(run, [of[i] for i in trained], range(3, 5))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for run, of in ((reference, expected), (optimizer, params)):
            of[1].requires_grad_(True)
            train(run, of, range(5, 8))
        full = optimizer.full_state_dict(to=None)
        wrong += [f"{name} trained{line}" for line in differences(full["state"], reference.state_dict()["state"])]
        if not same(params, expected):
            wrong.append(f"{name}: parameters")
    return wrong


@RANKS
def test_state_of_frozen_parameters_is_kept_until_they_are_trained(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _frozen) == [[]] * num_ranks


def test_state_of_another_dtype_is_cast_as_in_torch() -> None:
    params = make_params(dtype=torch.bfloat16)
    source = torch.optim.AdamW(params)
    train(source, params, range(2))
    for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        optimizer = distadam.AdamW(make_params(dtype=dtype))
        optimizer.load_state_dict(source.state_dict())
        for number, entry in optimizer.full_state_dict()["state"].items():
            saved = source.state_dict()["state"][number]
            assert entry["exp_avg"].dtype == state_dtype
            assert torch.equal(entry["exp_avg"], saved["exp_avg"].to(state_dtype))
            assert entry["step"] == 2.0


@pytest.mark.parametrize("as_saved", [float, int, lambda step: step.reshape(1), lambda step: step.double()])
def test_steps_load_in_every_form_that_torch_has_saved(as_saved: Callable[[Any], Any]) -> None:
    params = make_params()
    source = torch.optim.AdamW(params)
    train(source, params, range(2))
    saved = copy.deepcopy(source.state_dict())
    for entry in saved["state"].values():
        entry["step"] = as_saved(entry["step"])
    optimizer = distadam.AdamW(make_params())
    optimizer.load_state_dict(saved)
    assert differences(optimizer.full_state_dict()["state"], source.state_dict()["state"]) == []


def test_parameters_are_numbered_by_the_saved_groups_as_in_torch() -> None:
    params = make_params()
    source = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    train(source, params, range(2))
    saved = copy.deepcopy(source.state_dict())
    numbers = {0: 40, 1: 7, 2: 3, 3: 99, 4: 0}
    saved["state"] = {numbers[number]: entry for number, entry in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [numbers[number] for number in group["params"]]
    fresh = make_params()
    optimizer = distadam.AdamW([{"params": fresh[:2]}, {"params": fresh[2:]}])
    optimizer.load_state_dict(saved)
    assert differences(optimizer.full_state_dict(), source.state_dict()) == []


FLAGS: dict[str, list[str]] = {
    "adam": [
        "amsgrad",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
    ],
    "adamw": ["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"],
    "sgd": ["nesterov", "maximize", "foreach", "differentiable"],
    "rmsprop": ["centered", "foreach", "maximize", "differentiable", "capturable"],
}


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, flags in FLAGS.items() for flag in flags])
def test_flags_that_old_states_lack_are_filled_in_as_in_torch(name: str, flag: str) -> None:
    saved = TORCH_OPTIMIZERS[name](make_params()).state_dict()
    del saved["param_groups"][0][flag]
    true: Options = {} if flag in ("differentiable", "foreach", "fused") or name == "adamw" else {flag: True}
    if flag == "nesterov":
        true["momentum"] = 0.9
    groups = []
    for make in (OURS[name], TORCH_OPTIMIZERS[name]):
        optimizer = make(make_params(), **(true if flag != "decoupled_weight_decay" or name == "adam" else {}))
        optimizer.load_state_dict(copy.deepcopy(saved))
        groups.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
    assert groups[0] == groups[1]


def test_adamw_stays_adamw_when_it_loads_adams_state_as_in_torch() -> None:
    params = make_params()
    source = torch.optim.Adam(params, weight_decay=0.1, fused=True)
    train(source, params, range(2))
    finals = []
    for make, more in ((distadam.AdamW, {}), (torch.optim.AdamW, {"fused": True})):
        copies = [nn.Parameter(value) for value in values(params)]
        optimizer = make(copies, **more)
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
        train(optimizer, copies, range(2, 4))
        finals.append(copies)
    assert same(*finals)


def test_param_names_load_as_in_torch() -> None:
    def build(package: Any, prefix: str | None) -> Any:
        params = make_params()
        return package.AdamW(params if prefix is None else [(f"{prefix}{i}", p) for i, p in enumerate(params)])

    for own, saved in (("a", "b"), ("a", None), (None, "b")):
        names = []
        for package in (distadam, torch.optim):
            optimizer = build(package, own)
            optimizer.load_state_dict(build(torch.optim, saved).state_dict())
            names.append(optimizer.param_groups[0].get("param_names"))
        assert names[0] == names[1]


# Errors --------------------------------------------------------------------------------------------------------------


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved.pop(key) and saved


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], Any]:
    def edited(saved: dict[str, Any]) -> Any:
        change(saved)
        return saved

    return edited


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "not a dict": (lambda saved: 5, "TypeError", "not iterable"),
    "no groups": (_without("param_groups"), "KeyError", "param_groups"),
    "no state": (_without("state"), "KeyError", "state"),
    "another number of groups": (
        _edit(lambda saved: saved["param_groups"].append(saved["param_groups"][0])),
        "ValueError",
        "loaded state dict has a different number of parameter groups",
    ),
    "another number of parameters": (
        _edit(lambda saved: saved["param_groups"][0]["params"].pop()),
        "ValueError",
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    ),
    "another optimizer": (
        lambda saved: TORCH_OPTIMIZERS["sgd"](make_params(), momentum=0.9).state_dict(),
        "CheckpointError",
        "expected 'betas'",
    ),
    "differentiable": (
        _edit(lambda saved: saved["param_groups"][0].update(differentiable=True)),
        "ConfigError",
        "differentiable=False",
    ),
    "another shape": (
        _edit(lambda saved: saved["state"][1].update(exp_avg=torch.zeros(16, 8))),
        "CheckpointError",
        "parameter 'param.1': expected exp_avg of shape (8, 16) but got (16, 8)",
    ),
    "one element": (
        _edit(lambda saved: saved["state"][1].update(exp_avg_sq=torch.zeros(1))),
        "CheckpointError",
        "parameter 'param.1': expected exp_avg_sq of shape (8, 16) but got (1,)",
    ),
    "a missing moment": (
        _edit(lambda saved: saved["state"][2].pop("exp_avg_sq")),
        "CheckpointError",
        "parameter 'param.2': expected exp_avg_sq",
    ),
    "no tensor": (
        _edit(lambda saved: saved["state"][2].update(exp_avg=[0.0])),
        "CheckpointError",
        "parameter 'param.2': expected exp_avg",
    ),
    "a missing step": (
        _edit(lambda saved: saved["state"][0].pop("step")),
        "CheckpointError",
        "parameter 'param.0': expected a number of steps but got None",
    ),
    "amsgrad without its state": (
        _edit(lambda saved: saved["param_groups"][0].update(amsgrad=True)),
        "CheckpointError",
        "expected max_exp_avg_sq",
    ),
    "local without its mark": (
        lambda saved: {key: value for key, value in _local_states_of_2d().items() if key != "distadam"},
        "CheckpointError",
        "A local state_dict() of distadam carries a 'distadam' entry; was it dropped?",
    ),
}


def _local_states_of_2d() -> dict[str, Any]:
    params = make_params()
    saved = torch.optim.AdamW(params).state_dict()
    saved["state"] = {1: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(64), "exp_avg_sq": torch.zeros(64)}}
    return saved | {"distadam": {}}


def _load_errors(rank: int, num_ranks: int, bad_rank: int | None) -> list[str]:
    """Load each bad state on one rank (None: on all); return what did not end in its name everywhere."""
    wrong = []
    params = make_params()
    optimizer = distadam.AdamW(params, lr=0.05, comm=SMALL)
    train(optimizer, params, range(2))
    good, before = optimizer.full_state_dict(to=None), copy.deepcopy(optimizer.state_dict())
    for case, (make, kind, text) in BAD_STATES.items():
        bad = bad_rank is None or rank == bad_rank
        found, message = raised(
            lambda bad=bad, make=make: optimizer.load_state_dict(make(copy.deepcopy(good)) if bad else good)  # type: ignore[misc]
        )
        if found != (kind if bad else "RankMismatchError") or text not in message:
            wrong.append(f"{case}: {found}: {message}")
        if not bad and f"rank {bad_rank} failed in load_state_dict()" not in message:
            wrong.append(f"{case}: {message}")

    def fail(owner: Any, saved: Any) -> None:
        if bad_rank is None or rank == bad_rank:
            raise ZeroDivisionError("in a hook")

    handle = optimizer.register_load_state_dict_pre_hook(fail)
    found, message = raised(lambda: optimizer.load_state_dict(good))
    handle.remove()
    if (
        found != ("ZeroDivisionError" if bad_rank is None or rank == bad_rank else "RankMismatchError")
        or "in a hook" not in message
    ):
        wrong.append(f"a hook: {found}: {message}")
    wrong += [f"changed{line}" for line in differences(optimizer.state_dict(), before, memory=False)]
    train(optimizer, params, [2])
    twin = make_params()
    train(torch.optim.AdamW(twin, lr=0.05, fused=True), twin, range(3))
    return wrong if same(params, twin) else [*wrong, "training"]


@RANKS
def test_load_errors_raise_as_themselves_and_leave_everything_as_it_was(num_ranks: int) -> None:
    assert on_ranks(num_ranks, _load_errors, num_ranks, None) == [[]] * num_ranks


@SEVERAL_RANKS
def test_load_error_on_one_rank_is_a_mismatch_on_the_others(num_ranks: int) -> None:
    for bad_rank in (0, num_ranks - 1):
        assert run_ranks(num_ranks, _load_errors, num_ranks, bad_rank) == [[]] * num_ranks


def _load_different_things(rank: int) -> None:
    params = make_params()
    optimizer = distadam.AdamW(params, comm=SMALL)
    train(optimizer, params, range(2))
    full, local = optimizer.full_state_dict(to=None), copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(full)
    other["param_groups"][0]["lr"] = 0.5
    for mine, text in ((other if rank else full, "param_groups"), (local if rank else full, "kind of state")):
        kind, message = raised(lambda mine=mine: optimizer.load_state_dict(mine))  # type: ignore[misc]
        assert kind == "RankMismatchError"
        assert text in message
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert differences(optimizer.state_dict(), local, memory=False) == []


def test_ranks_that_load_different_things_raise_rank_mismatch() -> None:
    run_ranks(2, _load_different_things)


def test_errors_are_checkpoint_errors() -> None:
    assert issubclass(LayoutMismatch, CheckpointError)
    with pytest.raises(ConfigError):
        distadam.AdamW(make_params()).full_state_dict(to=1)
