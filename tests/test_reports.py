"""Reports: memory, kernels and traffic say what is there, to the byte.

Live storages are found through the garbage collector's list of objects, without a word from the optimizer; traffic is
also counted by the process groups themselves. Everything compared is an integer: there are no tolerances.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import init_device_mesh

import distadam
from distadam import native
from distadam.engine.ledger import Ledger
from distadam.layout import plan
from tests.ranks import run_ranks

COUNTS_BYTES = True  # see tests/staggered.py

BUCKET = distadam.CommPolicy(bucket_mb=4096 / 2**20, timeout_s=20.0)

Make = Callable[..., Any]
RULES: dict[str, Make] = {
    "adamw": distadam.AdamW,
    "amsgrad": lambda params, **options: distadam.Adam(params, amsgrad=True, **options),
    "sgd": distadam.SGD,
    "momentum": lambda params, **options: distadam.SGD(params, momentum=0.9, **options),
    "rmsprop": distadam.RMSprop,
    "centered": lambda params, **options: distadam.RMSprop(params, momentum=0.9, centered=True, **options),
}
NUM_STATES = {"adamw": 2, "amsgrad": 3, "sgd": 0, "momentum": 1, "rmsprop": 1, "centered": 3}


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor in this process uses, by its address; whoever keeps the answer keeps the storages."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not issubclass(
            type(thing), FakeTensor
        ):  # of other tests in this process
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a stand-in for a gradient has no memory
                found[storage.data_ptr()] = storage
    found.pop(0, None)
    return found


def freeze() -> dict[int, torch.UntypedStorage]:
    """Return the storages that live now, and have later looks pass over everything that lives now: they take 1 ms."""
    gc.unfreeze()
    storages = live_storages()
    gc.freeze()
    return storages


class Witness:
    """Compares memory_report() with the storages that have come since it was made."""

    def __init__(self, num_looks: int = 20) -> None:
        self._num_looks = num_looks
        Spy.seen, Spy.call = [], lambda seen: None
        self._before = freeze()
        self.wrong: list[str] = []
        self.num_checks = 0

    def check(self, when: str, optimizer: Any, *others: Tensor) -> None:
        """Note where the report is wrong; ``others`` belong to the test or the model.

        gloo's threads hold on to a small tensor for an instant after its collective was waited for, hence the retries:
        what is not reported stays wrong however often one looks.
        """
        memory = optimizer._collectives.memory
        theirs = [] if memory is None else memory.mapped  # peers' memory, which they report
        known = self._before.keys() | {other.untyped_storage().data_ptr() for other in (*others, *theirs)}
        self.num_checks += 1
        for _ in range(self._num_looks):
            live = sum(storage.nbytes() for address, storage in live_storages().items() if address not in known)
            report = optimizer.memory_report()
            if report.total == live == sum(report.nbytes.values()):
                return
            time.sleep(0.02)
        self.wrong.append(f"{when}: report {report.total}, live {live}")


class Spy(torch.autograd.Function):
    """Calls something in the middle of backward."""

    call: Callable[[list[Tensor]], None]
    seen: list[Tensor]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Spy.seen += [x, x.clone()]
        return Spy.seen[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Spy.seen.append(grad)
        Spy.call(Spy.seen)
        return grad


class Model(nn.Module):
    """Four layers and a frozen parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(4))
        self.frozen = nn.Parameter(torch.ones(17), requires_grad=False)
        self.to(dtype)

    def forward(self, x: Tensor, num_layers: int = 4, spy: bool = False) -> Tensor:
        for layer in self.layers[:num_layers]:
            x = layer(x)
            if spy:
                x = Spy.apply(x)
        return x.float().sum()


def _watch_a_run(
    rank: int, rule: str, dtype: torch.dtype, stage: int, options: dict[str, Any]
) -> tuple[list[str], int]:
    torch.set_num_threads(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    x = torch.ones(2, 30, dtype=dtype)
    witness = Witness()
    model = Model(dtype)
    optimizer = RULES[rule](model.named_parameters(), shard=distadam.ShardPolicy(stage=stage), comm=BUCKET, **options)

    def check(when: str, *others: Tensor) -> None:
        witness.check(when, optimizer, model.frozen, *others)

    def found_inf() -> list[Tensor]:
        per_device = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return [*per_device.values(), scaler._scale]  # type: ignore[list-item]

    check("built")
    for _ in range(2):
        Spy.seen, Spy.call = [], lambda seen: check("in backward", *seen)
        Spy.seen += [model(x, spy=True), torch.ones(())]
        Spy.seen[-2].backward(Spy.seen[-1])
        Spy.seen = []
        check("after backward")
        model(x, num_layers=2).backward()
        check("after a backward of some parameters")
        optimizer.step()
        check("after step")
    with optimizer.no_sync():
        model(x).backward()
        check("after backward under no_sync")
        model(x, num_layers=1).backward()
        check("after another backward under no_sync")
    model(x).backward()
    check("after the backward that reduces")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    check("after torch's clipping")
    optimizer.step()
    check("after step of clipped gradients")
    model(x).backward()
    norm = optimizer.clip_grad_norm_(1.0)
    check("after clipping, the norm is held")
    del norm
    check("after clipping")
    optimizer.step()
    assert optimizer.grad_norm is not None
    check("after reading grad_norm")
    model(x).backward()
    optimizer.zero_grad()
    check("after zero_grad")
    model(x, num_layers=1).backward()
    check("after a backward that left a bucket unfinished")
    optimizer.step()
    check("after step of some parameters")
    for gradient in (1.0, float("inf")):
        scaler.scale(model(x) * gradient).backward()
        scaler.unscale_(optimizer)
        check("after unscale_", *found_inf())
        scaler.step(optimizer)
        check("after scaler.step", *found_inf())
        scaler.update()
    optimizer.full_grad("layers.0.weight")
    check("after full_grad", scaler._scale)  # type: ignore[arg-type]
    saved = optimizer.full_state_dict()
    optimizer.load_state_dict(optimizer.full_state_dict(to=None))
    del saved
    check("after loading", scaler._scale)  # type: ignore[arg-type]
    optimizer.add_param_group({"params": [("added", nn.Parameter(torch.ones(40, dtype=dtype)))]})
    check("after add_param_group", scaler._scale)  # type: ignore[arg-type]
    model(x).backward()
    optimizer.step()
    check("after step with another group", scaler._scale)  # type: ignore[arg-type]
    optimizer.reload_parameters()
    check("after reload_parameters", scaler._scale)  # type: ignore[arg-type]
    return witness.wrong, witness.num_checks


FLAVOURS = [(rule, torch.float32, 2) for rule in RULES if rule not in ("adamw", "centered")] + [
    ("adamw", torch.float32, 1),
    ("adamw", torch.float32, 2),
    ("adamw", torch.bfloat16, 1),
    ("adamw", torch.bfloat16, 2),
    ("centered", torch.bfloat16, 2),
    ("centered", torch.float64, 1),
]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("rule", "dtype", "stage"), FLAVOURS, ids=str)
def test_memory_report_is_the_sum_of_live_storages_at_every_moment(
    rule: str, dtype: torch.dtype, stage: int, num_ranks: int
) -> None:
    for wrong, num_checks in run_ranks(num_ranks, _watch_a_run, rule, dtype, stage, {}):
        assert wrong == []
        assert num_checks > 20


@pytest.mark.parametrize(
    "options",
    [
        {"precision": distadam.PrecisionPolicy(reduce_dtype=torch.float32)},
        {"shard": distadam.ShardPolicy(stage=1), "precision": distadam.PrecisionPolicy(reduce_dtype=torch.float16)},
    ],
    ids=["wide", "narrow"],
)
def test_memory_report_is_right_when_gradients_travel_in_another_dtype(options: dict[str, Any]) -> None:
    options = dict(options)
    stage = options.pop("shard", distadam.ShardPolicy()).stage
    for wrong, _ in run_ranks(2, _watch_a_run, "adamw", torch.bfloat16, stage, options):
        assert wrong == []


def test_witness_notices_memory_that_nobody_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(num_looks=1)
    optimizer = distadam.AdamW([nn.Parameter(torch.ones(100))])
    witness.check("as it is", optimizer)
    assert witness.wrong == []
    optimizer.forgotten = torch.ones(3)
    witness.check("a forgotten tensor", optimizer)
    del optimizer.forgotten
    monkeypatch.setattr(Ledger, "zeros", lambda self, kind, numel, dtype, device: torch.zeros(numel, dtype=dtype))
    witness = Witness(num_looks=1)
    witness.check("an allocation past the ledger", distadam.AdamW([nn.Parameter(torch.ones(100))]))
    assert len(witness.wrong) == 1


def test_memory_report_prints_and_is_json() -> None:
    optimizer = distadam.AdamW([nn.Parameter(torch.ones(1000))])
    report = optimizer.memory_report()
    assert report.nbytes["moments"] == 2 * 4 * 1024
    assert report.nbytes["parameters"] == 4 * 1024
    assert report.optimizer_state == report.nbytes["moments"] + report.nbytes["masters"] + report.nbytes["steps"]
    lines = str(report).splitlines()
    assert lines[0].split() == ["kind", "bytes", "MiB"]
    assert lines[-1].split()[:2] == ["total", f"{report.total:,}"]
    assert json.loads(report.to_json()) == report.as_dict() == report.nbytes | {"total": report.total}


def _gradient_bytes(rank: int, stage: int) -> tuple[dict[str, int], int, int]:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(12)))
    optimizer = distadam.AdamW(model.parameters(), shard=distadam.ShardPolicy(stage=stage), comm=BUCKET)
    for _ in range(3):
        model(torch.ones(2, 30)).sum().backward()
        optimizer.step()
    sizes = [bucket.nbytes for bucket in optimizer.layout.buckets]
    return optimizer.memory_report().nbytes, sum(sizes), max(sizes)


def _one_large_bucket(rank: int, first: bool) -> tuple[int, list[int]]:
    layers = [nn.Linear(30, 30) for _ in range(6)]
    layers.insert(0 if first else 6, nn.Linear(30, 900) if not first else nn.Linear(900, 30))
    model = nn.Sequential(*layers)
    optimizer = distadam.AdamW(model.parameters(), comm=BUCKET)
    for _ in range(4):
        model(torch.ones(2, 900 if first else 30)).sum().backward()
        optimizer.step()
    sizes = sorted(bucket.nbytes for bucket in optimizer.layout.buckets)
    return optimizer.memory_report().nbytes["gradient_buffers"], sizes


@pytest.mark.parametrize("first", [False, True], ids=["reduced first", "reduced last"])
def test_pool_takes_the_largest_bucket_once(first: bool) -> None:
    """An embedding is one large bucket: the other buffer does not become as large, whichever is asked for first."""
    for nbytes, sizes in run_ranks(2, _one_large_bucket, first):
        assert sizes[-1] > 5 * sizes[-2]
        assert nbytes == sizes[-1] + sizes[-2]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_stage_2_keeps_fewer_gradient_bytes_than_stage_1(num_ranks: int) -> None:
    answers = [run_ranks(num_ranks, _gradient_bytes, stage) for stage in (1, 2)]
    for stage_1, stage_2 in zip(*answers, strict=True):
        nbytes, all_buckets, _ = stage_1
        assert nbytes["gradient_buffers"] == all_buckets
        nbytes, all_buckets, largest = stage_2
        assert 0 < nbytes["gradient_buffers"] <= 2 * largest < all_buckets / 4
        assert {kind: nbytes[kind] for kind in ("moments", "parameters", "gradient_shards")} == {
            kind: stage_1[0][kind] for kind in ("moments", "parameters", "gradient_shards")
        }


def _state_bytes(rank: int, rule: str, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    model = nn.Linear(100, 100).to(dtype)
    optimizer = RULES[rule](model.parameters())
    return optimizer.memory_report().nbytes, sum(bucket.numel for bucket in optimizer.layout.buckets)


@pytest.mark.parametrize("rule", RULES)
def test_state_is_divided_by_the_number_of_ranks(rule: str) -> None:
    for num_ranks in (1, 2, 3):
        for dtype in (torch.float32, torch.bfloat16):
            for nbytes, numel in run_ranks(num_ranks, _state_bytes, rule, dtype):
                assert nbytes["moments"] == NUM_STATES[rule] * 4 * numel // num_ranks
                assert nbytes["masters"] == (4 * numel // num_ranks if dtype == torch.bfloat16 else 0)
                assert nbytes["parameters"] == numel * dtype.itemsize


# Dropping -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _drop(rank: int, when: str) -> tuple[bool, int, int, list[int]]:
    distadam.SGD([nn.Parameter(torch.ones(1))])  # torch's first optimizer imports Dynamo, whose import keeps its frames
    x = torch.ones(2, 30)
    before = freeze()
    model = Model(torch.float32)
    optimizer = distadam.AdamW(model.named_parameters(), comm=BUCKET)
    model(x).backward()
    optimizer.step()
    if when == "after backward":
        model(x).backward()
    elif when == "prefetching":
        optimizer.prefetch(model)
        model(x).backward()
        optimizer.step()
    elif when == "clipped":
        model(x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with without_garbage_collection():
        reference = weakref.ref(optimizer)
        parts = [weakref.ref(part) for part in (optimizer._reducer, optimizer._ledger, optimizer._stepper)]
        del optimizer
        gone = reference() is None and all(part() is None for part in parts)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known = before.keys() | mine
    for _ in range(50):  # a reduction that backward has launched keeps its buffers until it is done
        left = sum(storage.nbytes() for address, storage in live_storages().items() if address not in known)
        if left == 0:
            break
        time.sleep(0.02)
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    model.zero_grad()
    model(x).backward()  # plain gradients again
    plain = sum(type(p.grad) is Tensor for p in model.parameters())
    return gone, left, plain, hooks


@pytest.mark.parametrize("when", ["after step", "after backward", "clipped", "prefetching"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_dropping_an_optimizer_frees_everything_at_once(num_ranks: int, when: str) -> None:
    for gone, left, plain, hooks in run_ranks(num_ranks, _drop, when):
        assert gone
        assert left == 0
        assert plain == 8
        assert hooks == [0] * 9


def test_gradient_whose_optimizer_is_gone_is_named() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = distadam.SGD([("weight", weight)])
    weight.sum().backward()
    del optimizer
    with pytest.raises(distadam.UsageError, match=r"'weight'.*optimizer is gone.*p\.grad = None"):
        nn.utils.clip_grad_norm_([weight], 1.0)
    weight.grad = None
    weight.sum().backward()
    assert type(weight.grad) is Tensor


FUSED = "torch fuses adamw on cpu; not compiled: DISTADAM_NATIVE=0"

# Kernels --------------------------------------------------------------------------------------------------------------


def test_kernel_report_says_which_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "DISTADAM_NATIVE=0"))
    params = [nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10, dtype=torch.bfloat16))]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 0.0}]
    report = distadam.AdamW(groups).kernel_report()
    assert report.rows == (
        (0, 1, "torch_fused", "fp32 master", "fp32", FUSED),
        (1, 0, "torch_fused", "own", "fp32", FUSED),
    )
    assert report.as_dict()[1] == {
        "bucket": 1,
        "group": 0,
        "kernel": "torch_fused",
        "weights": "own",
        "moments": "fp32",
        "reason": FUSED,
        "reduce": "none",
        "reason_of_reduce": "one rank",
        "turn": 1,
        "reason_of_turn": "as they are reduced: nothing is prefetched",
    }
    json.dumps(report.as_dict())
    assert str(report).splitlines() == [
        "bucket  group  kernel       weights      moments  reason",
        "     0      1  torch_fused  fp32 master  fp32     torch fuses adamw on cpu; not compiled: DISTADAM_NATIVE=0",
        "     1      0  torch_fused  own          fp32     torch fuses adamw on cpu; not compiled: DISTADAM_NATIVE=0",
        "order of updates and gathers: 0 1 (as they are reduced: nothing is prefetched)",
        "reduce: none (one rank)",
    ]


def test_kernel_report_has_a_row_for_each_bucket_and_group() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(300)) for _ in range(4)]} for _ in range(2)]
    optimizer = distadam.RMSprop(groups, comm=BUCKET)
    expected = [(bucket.index, span.group) for bucket in optimizer.layout.buckets for span in bucket.ranges]
    assert len(expected) == 4
    rows = optimizer.kernel_report().rows
    assert [row[:2] for row in rows] == expected
    kernel = "reference" if native.obstacle() else "compiled"
    assert {row[2:5] for row in rows} == {(kernel, "own", "fp32")}


def test_kernel_report_says_what_the_environment_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = distadam.AdamW([nn.Parameter(torch.ones(10))])
    monkeypatch.setenv("DISTADAM_KERNEL", "reference")
    assert optimizer.kernel_report().rows == ((0, 0, "reference", "own", "fp32", "DISTADAM_KERNEL=reference"),)


def _transports(rank: int, reduce: str) -> list[object]:
    optimizer = distadam.AdamW([nn.Parameter(torch.ones(10))], comm=distadam.CommPolicy(reduce=reduce))
    return [optimizer.kernel_report().as_dict()[0][key] for key in ("reduce", "reason_of_reduce")]


def test_kernel_report_says_how_bytes_travel_and_why() -> None:
    one_host = "the ranks of the shard group are processes of one host"
    assert run_ranks(2, _transports, "auto")[0] == ["shared", one_host]
    for reduce in ("native", "exchange", "shared"):
        assert run_ranks(2, _transports, reduce)[0] == [reduce, f'CommPolicy(reduce="{reduce}")']


# Traffic --------------------------------------------------------------------------------------------------------------


def _snapshot(optimizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    stats = optimizer.comm_stats
    result = dict(stats.calls), dict(stats.payload_nbytes)
    stats.clear()
    return result


def _sequence_numbers(optimizer: Any) -> list[int]:
    groups = optimizer._collectives.groups
    leased = (groups.shard, groups.shard_control, groups.replicate, groups.replicate_control)
    cpu = torch.device("cpu")
    return [0 if group is None else group._get_backend(cpu)._get_sequence_number_for_group() for group in leased]


def _count_traffic(
    rank: int, rule: str, dtype: torch.dtype, options: dict[str, Any], reduce: str = "native"
) -> dict[str, Any]:
    if options.get("shard") == "grid":
        options = options | {"shard": distadam.ShardPolicy(mesh=init_device_mesh("cpu", (2, 2)))}
    model, x = Model(dtype), torch.ones(2, 30, dtype=dtype)
    comm = dataclasses.replace(BUCKET, reduce=reduce)
    optimizer = RULES[rule](model.named_parameters(), comm=comm, **options)
    counted = {"building": _snapshot(optimizer)}
    for _ in range(2):
        model(x).backward()
        optimizer.step()
    optimizer.flush()
    _snapshot(optimizer)
    before = _sequence_numbers(optimizer)
    model(x).backward()
    optimizer.step()
    counted["step"] = _snapshot(optimizer)
    counted["groups"] = [after - start for start, after in zip(before, _sequence_numbers(optimizer), strict=True)]
    with optimizer.no_sync():
        model(x).backward()
        model(x).backward()
    counted["no_sync"] = _snapshot(optimizer)
    model(x).backward()
    optimizer.step()
    counted["step after no_sync"] = _snapshot(optimizer)
    model(x).backward()
    model(x).backward()
    optimizer.step()
    counted["two backwards"] = _snapshot(optimizer)
    model(x).backward()
    model(x).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    counted["clipped"] = _snapshot(optimizer)
    counted["layout"] = optimizer.layout
    return counted


def share(nbytes: int, num_ranks: int) -> int:
    return nbytes * (num_ranks - 1) // num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_traffic_of_a_step_is_the_layouts_plan(rule: str, num_ranks: int) -> None:
    dtype = torch.bfloat16 if rule == "amsgrad" else torch.float32
    for counted in run_ranks(num_ranks, _count_traffic, rule, dtype, {}):
        layout = counted["layout"]
        sizes = [bucket.nbytes for bucket in layout.buckets]
        assert len(sizes) >= 2
        calls, nbytes = counted["step"]
        assert calls == {"reduce_scatter": len(sizes), "all_gather": len(sizes), "agree": 1, "all_reduce": 1}
        travelling = sum(share(size, num_ranks) for size in sizes)
        assert nbytes["reduce_scatter"] == nbytes["all_gather"] == travelling
        assert nbytes["all_reduce"] == share(2 * 8, num_ranks)  # the norm: one float64
        assert nbytes["agree"] < 2 * (64 + 3 * len(layout.params) + len(sizes))
        planned = plan(layout.params, num_shards=num_ranks, bucket_mb=BUCKET.bucket_mb)
        assert abs(planned.sent_per_step - 2 * travelling) <= 2 * len(sizes)  # each bucket's share is rounded down
        # What the process groups have counted: data, then agreements.
        assert counted["groups"] == [2 * len(sizes) + 1, 1, 0, 0]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_traffic_of_other_steps_is_what_they_need(num_ranks: int) -> None:
    for counted in run_ranks(num_ranks, _count_traffic, "adamw", torch.float32, {}):
        num_buckets = len(counted["layout"].buckets)
        assert counted["building"][0] == {"broadcast": num_buckets + 1}  # and the frozen parameter
        assert counted["no_sync"] == ({}, {})
        once = {"reduce_scatter": num_buckets, "all_gather": num_buckets, "agree": 1, "all_reduce": 1}
        assert counted["step after no_sync"][0] == once
        assert counted["two backwards"][0] == once | {"reduce_scatter": 2 * num_buckets}
        clipped = once | {"reduce_scatter": 2 * num_buckets, "agree": 2}  # the norm is clipping's: still one
        assert counted["clipped"][0] == clipped


def test_traffic_of_a_wider_reduction_is_wider() -> None:
    options = {"precision": distadam.PrecisionPolicy(reduce_dtype=torch.float32)}
    for counted in run_ranks(2, _count_traffic, "adamw", torch.bfloat16, options):
        sizes = [bucket.nbytes for bucket in counted["layout"].buckets]
        _, nbytes = counted["step"]
        assert nbytes["all_gather"] == sum(share(size, 2) for size in sizes)
        assert nbytes["reduce_scatter"] == sum(share(2 * size, 2) for size in sizes)


def test_traffic_of_a_grid_reduces_shards_over_replicas() -> None:
    for counted in run_ranks(4, _count_traffic, "adamw", torch.float32, {"shard": "grid"}):
        layout = counted["layout"]
        assert layout.num_shards == 2
        sizes = [bucket.nbytes for bucket in layout.buckets]
        calls, nbytes = counted["step"]
        assert calls == {
            "reduce_scatter": len(sizes),
            "all_gather": len(sizes),
            "agree": 2,  # over each axis
            "all_reduce": len(sizes) + 1,
        }
        assert nbytes["all_reduce"] == sum(share(2 * size // 2, 2) for size in sizes) + share(2 * 8, 2)
        assert counted["groups"] == [2 * len(sizes) + 1, 1, len(sizes), 1]


def test_traffic_of_one_process_is_none() -> None:
    counted = _count_traffic(0, "adamw", torch.float32, {})
    for when in ("building", "step", "no_sync", "two backwards", "clipped"):
        assert counted[when] == ({}, {})
