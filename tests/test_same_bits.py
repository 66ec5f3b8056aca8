"""Contract 2.3: an update's bits depend on the element's own gradient, state and step, on nothing else.

Covers, at 1, 2, 3, 4 and 8 ranks: every rule, stage, bucket size and group split against one process that is given the
averaged gradient (clauses 1, 2); the average as SUM and one division (3); fp32 accumulation of 16-bit gradients (4);
norms that differ by an ulp at most (5); fp32 masters that round to nearest even (6); padding that nobody sees (7).

Tolerances: none (rtol=0, atol=0) wherever bits are promised. Gradients are integers, so sums are exact in every order;
the reference divides their sum by the number of ranks, as the contract does. Reference: torch.optim(fused=True) on
parameters padded to 64 elements (`tests.unsharded`), and for RMSprop, which torch does not fuse, distadam in one
process without a group. Where torch's own kernel differs (odd tails, RMSprop) the contract's 4 x 2^-23 x S per element
and step holds against an oracle in extended precision. Norms: 1 ulp, as clause 5 says.

All memory that the optimizer allocates in the runs of several ranks is first filled with NaN (`poisoned`): what reads
padding, or an element that nobody wrote, shows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, PrecisionPolicy
from distadam.engine import stepper
from distadam.engine.flat_bucket import FlatBucket
from distadam.engine.reducer import Reducer
from distadam.engine.rounds import BucketGradient
from distadam.precision import MasterWeights, Temporary
from tests.ranks import run_ranks
from tests.reference_optimizers import ORACLES, Problem, make_group, worst_error
from tests.staggered import counts_bytes
from tests.unsharded import (
    BUCKET_MB,
    CLASSES,
    NUM_STEPS,
    OPTIONS,
    TORCH_CLASSES,
    Case,
    State,
    backward,
    by_param,
    difference,
    differences,
    expected_result,
    integers,
    make_params,
    poisoned,
    train,
)


def _every_layout(rule: str) -> list[Case]:
    """Every stage x bucket size x group split, the rule's option sets in turn."""
    layouts = [
        (stage, bucket, split) for stage in (1, 2) for bucket in BUCKET_MB for split in ("one", "alternating", "each")
    ]
    return [
        Case(rule=rule, variant=number % len(OPTIONS[rule]), stage=stage, bucket=bucket, split=split)
        for number, (stage, bucket, split) in enumerate(layouts)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rule", OPTIONS)
def test_training_has_the_bits_of_one_process_given_the_average(rule: str, num_ranks: int) -> None:
    cases = _every_layout(rule)
    # All layouts at one rank; fewer where a step costs more, but always every stage, bucket size, split and option set
    # (at 8 ranks over all rules together).
    eighth = cases[5 * list(OPTIONS).index(rule) :: 16]
    chosen = {1: cases, 2: cases[1::2], 3: cases[::3] + cases[2::8], 4: cases[::7], 8: eighth}[num_ranks]
    expected = {(rule, variant): expected_result(rule, variant, num_ranks) for variant in range(len(OPTIONS[rule]))}
    found = run_ranks(num_ranks, train, num_ranks, chosen, expected)
    assert not any(found), "\n".join(line for lines in found for line in lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_has_the_bits_of_one_process_for_other_dtypes(num_ranks: int, dtype: torch.dtype) -> None:
    """16-bit parameters have fp32 masters, rounded to nearest even; fp64 ones compute in fp64."""
    cases = [
        Case(rule=rule, variant=1, stage=stage, bucket=bucket, split="alternating", dtype=dtype)
        for rule, stage, bucket in (("adam", 1, "71 bytes"), ("adamw", 2, "1 KB"), ("sgd", 2, "71 bytes"))
    ]
    expected = {(rule, 1): expected_result(rule, 1, num_ranks, dtype) for rule in {case.rule for case in cases}}
    for values, state in expected.values():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(value.dtype == dtype for value in values)
        assert all(t.dtype == wide for entry in state.values() for key, t in entry.items() if key != "step")
    found = run_ranks(num_ranks, train, num_ranks, cases, expected)
    assert not any(found), "\n".join(line for lines in found for line in lines)


# One process against torch (clause 1) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "variant"), [(rule, variant) for rule in ("adam", "adamw", "sgd") for variant in range(3)]
)
def test_one_process_has_the_bits_of_torch_fused_over_50_steps(rule: str, variant: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(64,), (8, 24), (3, 64), (1024,)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    options = OPTIONS[rule][variant]
    optimizer = CLASSES[rule](ours, **options, comm=CommPolicy(bucket_mb=BUCKET_MB["1 KB"]))
    reference = TORCH_CLASSES[rule](theirs, **options, fused=True)  # type: ignore[call-arg]
    for _ in range(50):
        for mine, other in zip(ours, theirs, strict=True):
            grad = torch.randn(mine.shape, generator=generator)
            mine.grad, other.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    state = {i: {k: v for k, v in reference.state[p].items() if v is not None} for i, p in enumerate(theirs)}
    state = {number: entry for number, entry in state.items() if entry}
    found = differences("50 steps", ours, optimizer.full_state_dict()["state"], theirs, state)
    assert not found, found


@pytest.mark.parametrize("rule", OPTIONS)
def test_one_process_is_within_the_bound_for_every_shape(rule: str) -> None:
    """Odd tails and RMSprop: |error| <= 4 x 2^-23 x S per element and step, from the state before the step."""
    for variant, options in enumerate(OPTIONS[rule]):
        params = make_params()
        optimizer, order = Case(rule=rule, variant=variant).build(params)
        group = make_group(rule, options)
        for step in range(NUM_STEPS):
            before, state = [param.detach().clone().reshape(-1) for param in params], by_param(optimizer, order)
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randn(param.shape, generator=generator) for param in params]
            backward(params, grads)
            optimizer.step()
            after = by_param(optimizer, order)
            for index, param in enumerate(params):
                if not param.numel():
                    continue
                names = [name for name in after.get(index, {}) if name != "step"]
                old = {name: state.get(index, {}).get(name, torch.zeros_like(param)).reshape(-1) for name in names}
                problem = Problem(weight=before[index], grad=grads[index].reshape(-1), state=old, count=step + 1)
                new = {name: after[index][name].reshape(-1) for name in names}
                actual = Problem(weight=param.detach().reshape(-1), grad=problem.grad, state=new, count=step + 1)
                worst = worst_error(actual, ORACLES[rule](group, problem))
                assert worst <= 4, f"{options}, step {step}, parameter {index}: {worst:.2f} x 2^-23 x S"


# The average (clause 3) -----------------------------------------------------------------------------------------------

HOW_AVERAGED = ("step", "clip", "scale", "full_grad", "two rounds", "unscale")


def _averages(rank: int, num_ranks: int, dtype: torch.dtype, totals: Tensor) -> dict[str, list[Tensor]]:
    """Average gradients whose sums are ``totals`` by every way to the division; (buffer, parameter, full_grad) each."""
    mine = totals.div(num_ranks, rounding_mode="floor")
    grad = (totals - mine * (num_ranks - 1) if rank == 0 else mine).to(dtype)
    assert torch.equal(grad.double(), totals - mine * (num_ranks - 1) if rank == 0 else mine)
    results = {}
    for how in HOW_AVERAGED:
        param = nn.Parameter(torch.zeros(totals.shape, dtype=dtype))
        optimizer = distadam.SGD([param], lr=1.0, momentum=0.5)
        if how == "two rounds":
            (param * grad * 0).sum().backward()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        loss = (param * grad).sum()
        (scaler.scale(loss) if how == "unscale" else loss).backward()
        if how == "clip":
            optimizer.clip_grad_norm_(1e30)
        elif how == "scale":
            assert param.grad is not None
            param.grad.mul_(1.0)
        full = optimizer.full_grad(param) if how == "full_grad" else param.detach()
        scaler.step(optimizer) if how == "unscale" else optimizer.step()
        buffer = optimizer.full_state_dict(to=None)["state"][0]["momentum_buffer"]
        results[how] = [buffer, param.detach().clone(), full.clone()]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_average_is_the_sum_and_one_division(num_ranks: int, dtype: torch.dtype) -> None:
    largest = 192 if dtype == torch.bfloat16 else 3000  # 16-bit sums stay exact on the wire, by 4 too
    totals = torch.arange(1, largest + 1, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    quotient = totals.to(wide) / num_ranks
    if num_ranks == 3:
        reciprocal = totals.to(wide) * torch.tensor(1 / 3, dtype=wide)
        assert int((reciprocal != quotient).sum()) > largest / 5, "the reciprocal would pass"
    for results in run_ranks(num_ranks, _averages, num_ranks, dtype, totals):
        for how, (buffer, param, full) in results.items():
            assert not difference(f"{how}: momentum_buffer", buffer, quotient)
            assert not difference(f"{how}: parameter", param, -quotient.to(dtype))
            if how == "full_grad":
                assert not difference(f"{how}", full, quotient.to(dtype))


# Wire and accumulation dtypes (clause 4) ------------------------------------------------------------------------------


@counts_bytes
def _reduced(
    rank: int,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype | None,
    grads: Sequence[Sequence[float]],
    how: str,
    reduce: Any = "auto",
) -> tuple[Tensor, dict[str, int]]:
    """Return the averaged gradient of microbatches ``grads[rank]``, and the bytes of gradient memory."""
    param = nn.Parameter(torch.zeros(64, dtype=dtype))
    precision, comm = PrecisionPolicy(reduce_dtype=reduce_dtype), CommPolicy(reduce=reduce)
    optimizer = distadam.SGD([param], lr=1.0, momentum=0.5, precision=precision, comm=comm)
    mine = grads[rank]
    for number, value in enumerate(mine):
        loss = (param * torch.tensor(value, dtype=dtype)).sum()
        if how == "no_sync for all" or (how == "no_sync" and number < len(mine) - 1):
            with optimizer.no_sync():
                loss.backward()
        else:
            loss.backward()
    optimizer.step()
    nbytes = {kind: size for kind, size in optimizer.memory_report().nbytes.items() if kind.startswith("gradient")}
    return optimizer.full_state_dict(to=None)["state"][0]["momentum_buffer"][0], nbytes


@pytest.mark.parametrize("how", ["no_sync", "no_sync for all"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_16_bit_microbatches_accumulate_in_fp32(num_ranks: int, how: str) -> None:
    """In bf16 256 + 1 + 1 is 256; the sum, 258, fits bf16 again and travels in it."""
    assert float(torch.tensor(256, dtype=torch.bfloat16) + 1 + 1) == 256
    grads = [[256.0, 1.0, 1.0]] + [[0.0, 0.0, 0.0]] * (num_ranks - 1)
    expected = torch.tensor(258.0) / num_ranks
    for value, _ in run_ranks(num_ranks, _reduced, torch.bfloat16, None, grads, how):
        assert not difference(how, value, expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_16_bitbackwards_without_no_sync_add_in_fp32(num_ranks: int) -> None:
    """259 does not fit bf16: each backward is reduced by itself and added into the fp32 shard."""
    grads = [[256.0, 1.0, 1.0, 1.0]] + [[0.0] * 4] * (num_ranks - 1)
    for value, _ in run_ranks(num_ranks, _reduced, torch.bfloat16, None, grads, "backward"):
        assert not difference("259", value, torch.tensor(259.0) / num_ranks)


def test_reduce_dtype_is_what_travels() -> None:
    """bf16 on the wire rounds 257 to 256; fp32 on the wire keeps a sum that bf16 cannot hold, as sums of our own do."""
    for value, _ in run_ranks(2, _reduced, torch.float32, torch.bfloat16, [[257.0], [257.0]], "backward"):
        assert value.item() == 256.0
    for reduce, expected in (("native", 128.0), ("exchange", 128.5), ("shared", 128.5)):
        for value, _ in run_ranks(2, _reduced, torch.bfloat16, None, [[256.0], [1.0]], "backward", reduce):
            assert value.item() == expected
    for value, _ in run_ranks(2, _reduced, torch.bfloat16, torch.float32, [[256.0], [1.0]], "backward"):
        assert value.item() == 128.5
    for value, _ in run_ranks(2, _reduced, torch.float32, None, [[257.0], [0.0]], "no_sync"):
        assert value.item() == 128.5


def test_single_microbatch_stays_in_its_dtype() -> None:
    for _, nbytes in run_ranks(2, _reduced, torch.bfloat16, None, [[1.0], [1.0]], "backward"):
        numel = 128  # 64, padded to 64 on each of 2 ranks
        assert nbytes["gradient_accumulation"] == 0
        assert nbytes["gradient_buffers"] % (2 * numel) == 0
        assert nbytes["gradient_shards"] <= (2 + 4) * 64  # what arrives, and what the update reads


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_training_has_the_same_bits_with_bf16_on_the_wire(num_ranks: int) -> None:
    precision = PrecisionPolicy(reduce_dtype=torch.bfloat16)
    cases = [
        Case(rule=rule, variant=1, bucket=bucket, policies={"precision": precision})
        for rule, bucket in (("adam", "71 bytes"), ("adamw", "25 MB"), ("sgd", "1 KB"), ("rmsprop", "25 MB"))
    ]
    expected = {(rule, 1): expected_result(rule, 1, num_ranks) for rule in OPTIONS}
    found = run_ranks(num_ranks, train, num_ranks, cases, expected)
    assert not any(found), "\n".join(line for lines in found for line in lines)


# Masters (clause 6) ---------------------------------------------------------------------------------------------------


def _store(rank: int, dtype: torch.dtype, masters: Tensor) -> tuple[Tensor, Tensor]:
    """Give a parameter of ones these masters by one SGD step; return the parameter and the masters."""
    param = nn.Parameter(torch.ones(masters.shape, dtype=dtype))
    optimizer = distadam.SGD([param], lr=1.0, precision=PrecisionPolicy(reduce_dtype=torch.float32))
    with torch.no_grad():
        param.grad = (1 - masters).to(torch.float32).to(dtype)
        lossless = torch.equal(param.grad.float(), 1 - masters)
    assert lossless
    optimizer.step()
    found = [master for master in optimizer.state_dict()["distadam"]["masters"] if master is not None]
    return param.detach().clone(), torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_master_rounds_to_nearest_even(num_ranks: int, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps  # the distance between neighbours in [1, 2)
    quarters = torch.arange(-16, 17) * unit / 4
    masters = 1 + quarters
    expected = masters.to(dtype)
    # Above 1 a tie lies in the middle of each unit: down to the even neighbour, then up to it.
    assert expected[18] == 1
    assert expected[22] == 1 + 2 * unit
    assert not torch.equal(expected, (masters - masters % unit).to(dtype)), "truncation would pass"
    for param, found in run_ranks(num_ranks, _store, dtype, masters):
        assert not difference("parameter", param, expected)
        assert torch.isin(found, torch.cat([masters, torch.zeros(1)])).all()


def _creep(rank: int) -> float:
    """Take 256 steps of an eighth of bf16's distance at 1: without masters none of them would count."""
    param = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    optimizer = distadam.SGD([param], lr=2**-10)
    for _ in range(256):
        param.sum().neg().backward()
        optimizer.step()
    return float(param.detach()[69])


def test_master_keeps_what_the_parameter_cannot_hold() -> None:
    assert float(torch.tensor(1, dtype=torch.bfloat16) + 2**-10) == 1
    assert run_ranks(2, _creep) == [1.25, 1.25]


# Clipping (clauses 2, 5) ----------------------------------------------------------------------------------------------


def _clipped(rank: int, by_factor: bool) -> tuple[list[Tensor], State, list[Tensor]]:
    """Train with clipping on gradients whose average is the same at every number of ranks."""
    params = make_params()
    optimizer, order = Case(rule="adamw", variant=1, bucket="1 KB").build(params)
    norms = []
    for step in range(NUM_STEPS):
        grads = [integers(p.shape, p.dtype, step, i) for i, p in enumerate(params)]
        backward(params, grads)
        if by_factor:
            for param in params:
                assert param.grad is not None
                param.grad.mul_(torch.tensor(0.37))
        else:
            norms.append(optimizer.clip_grad_norm_(2.5))
        optimizer.step()
    return [param.detach().clone() for param in params], by_param(optimizer, order), norms


@pytest.mark.parametrize("by_factor", [False, True], ids=["clip", "factor"])
def test_clipped_update_has_the_same_bits_given_the_same_factor(by_factor: bool) -> None:
    """Every rank has the same integers, so averages are integers, their squares' sums exact and the factor the same."""
    values, state, norms = _clipped(0, by_factor)
    assert by_factor or all(float(norm) > 2.5 for norm in norms)
    for num_ranks in (1, 2, 3, 4):
        for params, found, found_norms in run_ranks(num_ranks, _clipped, by_factor):
            assert not differences(f"{num_ranks} ranks", params, found, values, state)
            for norm, expected in zip(found_norms, norms, strict=True):
                assert not difference("norm", norm, expected)


# Padding (clause 7) ---------------------------------------------------------------------------------------------------


def _numbers(flat: FlatBucket) -> dict[str, Tensor]:
    """What a shard stores, as numbers."""
    numbers = {name: moment.read(0, flat.bucket.shard_numel) for name, moment in flat.states.items()}
    return numbers | {name: part.tensor for name, part in flat.stored().items()}


def _train_without_eps(rank: int, num_ranks: int, rules: Sequence[str]) -> list[str]:
    """With eps=0 an update of padding is 0 / 0. No gradient is zero; one parameter never has one."""
    found: list[str] = []
    with poisoned():
        for rule in rules:
            for options in OPTIONS[rule]:
                for bucket in ("71 bytes", "25 MB"):
                    params = make_params()
                    optimizer = CLASSES[rule](
                        [{"params": params[::2]}, {"params": params[1::2], "lr": 0.2}],
                        **{**options, "eps": 0.0},
                        comm=CommPolicy(bucket_mb=BUCKET_MB[bucket]),
                    )
                    for step in range(2):
                        grads: list[Tensor | None] = [torch.full(p.shape, rank + step + 1.0) for p in params]
                        grads[6] = None
                        backward(params, grads)
                        optimizer.clip_grad_norm_(1e3) if step else None
                        optimizer.step()
                        norm = optimizer.grad_norm
                        if norm is None or not bool(torch.isfinite(norm)):
                            found.append(f"rank {rank}, {rule} {options} {bucket}: grad_norm is {norm}")
                    local: dict[str, Tensor] = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
                    for flat in optimizer._flats:
                        local |= {f"{name} of bucket {flat.bucket.index}": t for name, t in _numbers(flat).items()}
                        local[f"flat parameters of bucket {flat.bucket.index}"] = flat.param_flat
                    bad = [name for name, tensor in local.items() if not bool(torch.isfinite(tensor).all())]
                    if bad:
                        found.append(f"rank {rank}, {rule} {options} {bucket}: {bad}")
    return found


WITH_EPS = ("adam", "adamw", "rmsprop")


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_padding_stays_finite_when_eps_is_zero(num_ranks: int) -> None:
    found = run_ranks(num_ranks, _train_without_eps, num_ranks, WITH_EPS)
    assert not any(found), "\n".join(line for lines in found for line in lines)


# The checks can fail --------------------------------------------------------------------------------------------------


def _not_divided(self: BucketGradient) -> None:
    return None


def _truncated(self: MasterWeights, start: int, end: int, value: Tensor, step: Tensor, temporary: Temporary) -> None:
    self.param_shard[start:end].copy_(value.view(torch.int32).bitwise_and(-65536).view(torch.float32))


def _everywhere(self: Reducer, index: int) -> bytes:
    return b"\x01" * len(self.gradients[index].flat.params)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "sums are not divided": (BucketGradient, "scaling_divisor", property(_not_divided)),
    "gaps and padding are not zeroed": (torch, "_foreach_zero_", lambda views: None),
    "masters are truncated": (MasterWeights, "store", _truncated),
    "parameters without a gradient are updated": (Reducer, "bucket_has", _everywhere),
}


def _train_mutated(rank: int, num_ranks: int, mutation: str, cases: Sequence[Case], expected: Any) -> list[str]:
    owner, name, replacement = MUTATIONS[mutation]
    kernel = {"DISTADAM_KERNEL": "torch_fused"} if owner is MasterWeights else {}  # the compiled one stores by itself
    with mock.patch.object(owner, name, replacement), mock.patch.dict(os.environ, kernel):
        return train(rank, num_ranks, cases, expected)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_comparison_of_bits_fails_when(mutation: str) -> None:
    dtype = torch.bfloat16 if "master" in mutation else torch.float32
    cases = [Case(rule="adamw", variant=1, bucket=bucket, dtype=dtype) for bucket in ("25 MB", "71 bytes")]
    found = run_ranks(2, _train_mutated, 2, mutation, cases, {("adamw", 1): expected_result("adamw", 1, 2, dtype)})
    assert all(found), "every rank must see it"


def test_padding_check_fails_when_padding_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper, "_zero_padding", lambda flat: None)
    assert _train_without_eps(0, 1, ["adam"])
    # Kernels that go chunk by chunk look after padding themselves.
    ranges = stepper.GroupRanges
    monkeypatch.setattr(stepper, "GroupRanges", lambda **fields: ranges(**(fields | {"padding": []})))
    assert _train_without_eps(0, 1, ["rmsprop"])
