"""Written on N ranks, read on M, bits compared with a run that never stopped at M. Everything is exact.

The fast suite deals rules and storages to the pairs N x M so that every one of them occurs; ``-m slow`` runs all.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distadam
from distadam import CommPolicy, LayoutMismatch, PrecisionPolicy, ShardPolicy, checkpoint
from tests.checkpoint_runs import (
    CASES,
    Model,
    build,
    digest,
    never_stopped,
    resume_grid,
    resume_many,
    train,
    write,
    write_many,
)
from tests.ranks import run_ranks

SIZES = (1, 2, 3, 4, 8)
STEPS = 3
LAST = STEPS + 20
PAIRS = list(itertools.product(SIZES, SIZES))


@functools.cache
def _reference(case: tuple[str, str]) -> str:
    """Digest of a run in one process that never stopped: the bits of every other number of ranks, too."""
    return never_stopped(0, [case], LAST)[0]


@pytest.mark.long
@pytest.mark.parametrize("read", SIZES)
def test_every_number_of_ranks_reads_what_every_other_wrote(read: int, tmp_path: Path) -> None:
    for number, (written, reader) in enumerate(PAIRS):
        if reader == read:
            cases = CASES[number :: len(PAIRS)]  # dealt to the pairs: every case occurs
            place = str(tmp_path / str(written))
            run_ranks(written, write_many, place, cases, STEPS, number % 2 == 0)
            for resumed in run_ranks(read, resume_many, place, cases, STEPS, LAST):
                assert resumed == [_reference(case) for case in cases], f"{written} -> {read}"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every rule and storage, written by every number of ranks; every other one asynchronously."""
    folder = tmp_path_factory.mktemp("grid")
    for number, written in enumerate(SIZES):
        run_ranks(written, write_many, str(folder / str(written)), CASES, STEPS, number % 2 == 0, timeout_s=900)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("read", SIZES)
def test_full_grid(read: int, grid: Path) -> None:
    for digests in run_ranks(read, resume_grid, str(grid), SIZES, CASES, STEPS, LAST, timeout_s=1500):
        assert digests.keys() == set(CASES)
        for case, (whole, *resumed) in digests.items():
            assert resumed == [whole] * len(SIZES), f"{case}: {SIZES} -> {read}"
            assert whole == _reference(case)


def _sharded(rank: int, path: str, loads: bool, mesh: tuple[int, int] | None) -> str:
    """Load and go on, or train and save: on a mesh of (replicas, shards), or with one copy of the parameters."""
    shard = ShardPolicy(share_parameters=True)
    if mesh is not None:
        shard = ShardPolicy(mesh=torch.distributed.init_device_mesh("cpu", mesh))
    model, optimizer = build("adamw", "bf16 fp32 master", shard=shard)
    if loads:
        checkpoint.load(path, model, optimizer)
        train(model, optimizer, STEPS, STEPS + 5)
    else:
        train(model, optimizer, 0, STEPS)
        checkpoint.save(path, model, optimizer)
    return digest(model, optimizer)


def _resume(rank: int, path: str, rule: str, storage: str, last: int) -> str:
    model, optimizer = build(rule, storage, 1)
    checkpoint.load(path, model, optimizer)
    train(model, optimizer, STEPS, last)
    return digest(model, optimizer)


def test_hybrid_groups_read_and_write_what_plain_ones_do(tmp_path: Path) -> None:
    plain, hybrid = str(tmp_path / "plain"), str(tmp_path / "hybrid")
    run_ranks(3, write, plain, "adamw", "bf16 fp32 master", 0, STEPS, False)
    run_ranks(4, _sharded, hybrid, False, (2, 2))
    assert (
        len({*run_ranks(4, _sharded, plain, True, (2, 2)), _resume(0, hybrid, "adamw", "bf16 fp32 master", STEPS + 5)})
        == 1
    )
    sizes = checkpoint.describe(hybrid).files
    big = sorted(sizes.values())[-2:]
    assert sum(big) > 5 * (sum(sizes.values()) - sum(big))  # the second replica wrote its extra only


def test_shared_parameters_read_and_write_what_others_do(tmp_path: Path) -> None:
    plain, shared = str(tmp_path / "plain"), str(tmp_path / "shared")
    run_ranks(3, write, plain, "adamw", "bf16 fp32 master", 0, STEPS, False)
    run_ranks(2, _sharded, shared, False, None)
    assert (
        len({*run_ranks(2, _sharded, plain, True, None), _resume(0, shared, "adamw", "bf16 fp32 master", STEPS + 5)})
        == 1
    )


def test_other_dtypes_take_the_master_and_not_the_rounded_parameter(tmp_path: Path) -> None:
    write(0, str(tmp_path / "a"), "adamw", "bf16 fp32 master", 0, STEPS, False)
    model, optimizer = build("adamw", "bf16 fp32 master")
    checkpoint.load(tmp_path / "a", model, optimizer)
    masters = {
        name: flat.slot_part(flat.weights.stored()["master"], slot).clone()
        for flat in optimizer.checkpoint_access().flats
        for slot, name in enumerate(flat.names)
    }
    wide, wide_optimizer = build("adamw", "fp32")
    checkpoint.load(tmp_path / "a", wide, wide_optimizer)
    for name, param in wide.named_parameters():
        if param.requires_grad:
            lying = param.detach().as_strided((param.numel(),), (1,))
            assert torch.equal(lying, masters[name])
            assert not torch.equal(lying, lying.bfloat16().float()) or name in ("scale",)
    checkpoint.save(tmp_path / "b", wide, wide_optimizer)
    back, back_optimizer = build("adamw", "bf16 fp32 master")
    checkpoint.load(tmp_path / "b", back, back_optimizer)
    assert digest(back, back_optimizer) == digest(model, optimizer)


def test_other_strides_are_put_in_order(tmp_path: Path) -> None:
    write(0, str(tmp_path), "adamw", "fp32", 0, STEPS, False)
    first, first_optimizer = build("adamw", "fp32")
    checkpoint.load(tmp_path, first, first_optimizer)
    model = Model(torch.float32)
    model.conv.data = model.conv.data.contiguous()
    named = list(model.named_parameters())
    optimizer = distadam.AdamW([{"params": named[:2]}, {"params": named[2:]}])
    checkpoint.load(tmp_path, model, optimizer)
    assert model.conv.is_contiguous()
    theirs, ours = first_optimizer.full_state_dict()["state"], optimizer.full_state_dict()["state"]
    for number, entry in theirs.items():
        for key, value in entry.items():
            assert torch.equal(value, ours[number][key])
    assert torch.equal(model.conv, first.conv)


def test_renamed_and_unnamed_parameters_find_their_state(tmp_path: Path) -> None:
    old = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = distadam.AdamW(old.parameters())  # unnamed: names are the model's
    for param in old.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    checkpoint.save(tmp_path, old, optimizer)
    new = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(4, 3)})
    fresh = distadam.AdamW(new.parameters())
    with pytest.raises(LayoutMismatch, match=r"expected parameter or buffer 'b.bias'.*rename="):
        checkpoint.load(tmp_path, new, fresh)
    mapping = {"0.weight": "a.weight", "0.bias": "a.bias", "1.weight": "b.weight", "1.bias": "b.bias"}
    checkpoint.load(tmp_path, new, fresh, rename=mapping)
    for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(fresh.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])
    checkpoint.load(tmp_path, new, fresh, rename=lambda name: name.replace("0.", "a.").replace("1.", "b."))


def test_frozen_and_unfrozen_parameters_keep_their_state(tmp_path: Path) -> None:
    write(0, str(tmp_path / "a"), "adamw", "fp32", 0, STEPS, False)
    model, optimizer = build("adamw", "fp32")
    checkpoint.load(tmp_path / "a", model, optimizer)
    exp_avg = optimizer.full_state_dict()["state"][0]["exp_avg"]
    frozen = Model(torch.float32)
    frozen.embedding.requires_grad_(False)
    named = list(frozen.named_parameters())
    other = distadam.AdamW([{"params": named[:2], "lr": 5e-3}, {"params": named[2:]}], lr=1e-2)
    checkpoint.load(tmp_path / "a", frozen, other)
    assert torch.equal(other.state[frozen.embedding]["exp_avg"], exp_avg)
    checkpoint.save(tmp_path / "b", frozen, other)
    again, again_optimizer = build("adamw", "fp32")
    checkpoint.load(tmp_path / "b", again, again_optimizer)
    assert digest(again, again_optimizer) == digest(model, optimizer)


def test_other_shapes_groups_and_rules_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    optimizer = distadam.SGD(model.named_parameters(), momentum=0.9)
    model.weight.grad = torch.ones(4, 6)
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer)
    for other, groups, expected in (
        (nn.Linear(6, 5), None, r"'bias': expected shape \(5,\) but got \(4,\)"),
        (nn.Linear(6, 4, bias=False), None, "the checkpoint's parameter 'bias' is not in the optimizer|different"),
        (nn.Linear(6, 4), "adam", "expected 'betas'|expected state 'exp_avg'"),
    ):
        before = [param.clone() for param in other.parameters()]
        make = distadam.AdamW if groups == "adam" else distadam.SGD
        with pytest.raises((LayoutMismatch, distadam.CheckpointError, ValueError), match=expected):
            checkpoint.load(tmp_path, other, make(other.named_parameters(), lr=0.5))
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    split = nn.Linear(6, 4)
    groups_of = [{"params": [("weight", split.weight)]}, {"params": [("bias", split.bias)]}]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        checkpoint.load(tmp_path, split, distadam.SGD(groups_of, momentum=0.9))


def test_policies_and_precision_differ_between_writer_and_reader(tmp_path: Path) -> None:
    write(0, str(tmp_path), "adamw", "fp32", 0, STEPS, False)
    digests = set()
    for policies in (
        {"shard": ShardPolicy(stage=1), "comm": CommPolicy(bucket_mb=1e-4)},
        {"shard": ShardPolicy(), "precision": PrecisionPolicy(master="fp32")},
    ):
        model = Model(torch.float32)
        named = list(model.named_parameters())
        optimizer = distadam.AdamW([{"params": named[:2]}, {"params": named[2:]}], **policies)
        checkpoint.load(tmp_path, model, optimizer)
        digests.add(digest(model, optimizer))
    assert len(digests) == 1


def _weights(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return each parameter's full-precision weight, one process."""
    values = {}
    for flat in optimizer.checkpoint_access().flats:
        whole = torch.empty(flat.bucket.numel)
        flat.weights.load(0, flat.bucket.numel, whole, lambda _, numel, dtype: torch.empty(numel, dtype=dtype))
        values |= {name: flat.unflatten(whole, slot) for slot, name in enumerate(flat.names)}
    return values


@pytest.mark.long
@pytest.mark.parametrize("first", ["split 8bit", "bf16 fp32 master"])
@pytest.mark.parametrize("second", ["bf16 fp32 master", "split", "fp32"])
def test_storages_change_without_losing_a_bit_of_the_weights(first: str, second: str, tmp_path: Path) -> None:
    write(0, str(tmp_path / "a"), "adamw", first, 0, STEPS, False)
    model, optimizer = build("adamw", first)
    checkpoint.load(tmp_path / "a", model, optimizer)
    other, other_optimizer = build("adamw", second)
    checkpoint.load(tmp_path / "a", other, other_optimizer)
    theirs, ours = _weights(optimizer), _weights(other_optimizer)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    states = [each.full_state_dict()["state"] for each in (optimizer, other_optimizer)]
    for number, entry in states[0].items():  # 8-bit moments are decoded exactly into fp32
        assert all(torch.equal(value, states[1][number][key]) for key, value in entry.items())
    checkpoint.save(tmp_path / "b", other, other_optimizer)
    back, back_optimizer = build("adamw", first)
    checkpoint.load(tmp_path / "b", back, back_optimizer)
    again = _weights(back_optimizer)
    assert all(torch.equal(theirs[name], again[name]) for name in theirs)
