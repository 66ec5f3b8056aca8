"""Precision storages: what they keep, what they round, and that nothing but an element's identity decides it.

Bits where bits are promised (rtol=0, atol=0): split weights, codes, layouts. Statistics for stochastic rounding: the
mean of 10,000 roundings within 3 standard errors. Every rule x storage against an oracle in float64 for one step from
the same stored state: fp32 arithmetic errs by at most 4 x 2^-23 x S (contract 2.3.1), and a store adds half of its
storage's distance of neighbours if it rounds to nearest, all of it if stochastically: 2^-24 (split: none beyond fp32),
2^-9 (bf16 to nearest), 2^-7 (bf16 stochastically), 2^-3 of the number (8 bits), and in signed blocks what is below the
smallest code, 2^-15.75 of the scale, may become 0; in unsigned ones, below 2^-31.8, the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distadam
from distadam import CommPolicy, ConfigError, PrecisionPolicy, ShardPolicy
from distadam.kernels import chunks, torch_fused
from distadam.policies import PrecisionPolicy as Policy
from distadam.precision import (
    BlockwiseMoment,
    Counters,
    Run,
    SplitWeights,
    StochasticWeights,
    blockwise,
    choose,
    counters,
    start_of,
)
from tests.ranks import run_ranks
from tests.reference_optimizers import CPU_KERNEL, ORACLES, Problem, make_group
from tests.staggered import counts_bytes
from tests.unsharded import BUCKET_MB, CLASSES, OPTIONS, backward, grads_of, make_params, poisoned, split_groups

CPU = torch.device("cpu")
STEP = torch.tensor(3.0)
SPECIAL = [0x7FFFFFFF, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F0000, 1, 0x8000, 0x007FFFFF, 0, 0x3F808000]


def empty(kind: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


def temporary(index: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype)


def signed(pattern: int) -> int:
    return pattern - 2**32 if pattern >= 2**31 else pattern


def from_bits(patterns: Sequence[int]) -> Tensor:
    """fp32 numbers of these bits and of the same with the sign bit, repeated to 256 elements."""
    both = [*patterns, *(pattern | 0x80000000 for pattern in patterns)]
    repeated = (both * 256)[:256]
    return torch.tensor([signed(pattern) for pattern in repeated], dtype=torch.int32).view(torch.float32)


# Split weights --------------------------------------------------------------------------------------------------------


def split_round_trip(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = SplitWeights(torch.zeros(value.numel(), dtype=torch.bfloat16), empty)
    weights.store(0, value.numel(), value.clone(), STEP, temporary)
    out = torch.empty(value.numel())
    weights.load(0, value.numel(), out, temporary)
    return weights.param_shard, weights.remainder, out


@pytest.mark.parametrize("tame", [True, False])
def test_split_gives_every_bit_back(tame: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    value = bits.view(torch.float32)
    keep = value.abs() < (1e18 if tame else math.inf)  # NaN too is dropped
    value = value[keep][: keep.sum() // 256 * 256]
    if not tame:
        value[:256] = torch.where(torch.isnan(from_bits(SPECIAL)), 1.0, from_bits(SPECIAL))
    param, _, out = split_round_trip(value)
    assert torch.equal(out.view(torch.int32), value.view(torch.int32))
    away = (value.view(torch.int32) + 0x8000 >> 16).to(torch.int16)
    assert torch.equal(param.view(torch.int16), away)


def test_split_keeps_nan_a_nan_and_stores_it_again_unchanged() -> None:
    value = from_bits([0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF])
    param, remainder, out = split_round_trip(value)
    assert torch.isnan(param).all()
    assert torch.isnan(out).all()
    again = split_round_trip(out)
    assert torch.equal(again[0].view(torch.int16), param.view(torch.int16))
    assert torch.equal(again[1], remainder)


def test_split_rounds_ties_away_and_the_master_to_even() -> None:
    tie = from_bits([0x3F808000])
    param, _, out = split_round_trip(tie)
    assert torch.equal(out, tie)
    assert int(param.view(torch.int16)[0]) == 0x3F81
    assert int(tie.bfloat16().view(torch.int16)[0]) == 0x3F80


@pytest.mark.parametrize("rule", ["adamw", "sgd", "rmsprop"])
def test_split_trains_like_a_master_that_is_stored_with_ties_away_for_200_steps(rule: str, monkeypatch: Any) -> None:
    """The same gradients in bf16 and fp32 moments; clipping, weight decay and late layers included."""

    def ties_away(self: Any, start: int, end: int, value: Tensor, *_: Any) -> None:
        self.param_shard[start:end].view(torch.int16).copy_((value.view(torch.int32) + 0x8000) >> 16)

    monkeypatch.setattr(distadam.precision.MasterWeights, "store", ties_away)
    monkeypatch.setenv("DISTADAM_KERNEL", "reference" if rule == "rmsprop" else "torch_fused")
    finals = []
    for master in ("fp32", "split"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 1)).bfloat16()
        options = {"weight_decay": 0.01} | ({"momentum": 0.9} if rule != "adamw" else {})
        optimizer = CLASSES[rule](
            model.parameters(),
            lr=1e-3,
            precision=PrecisionPolicy(master=master),
            **options,  # type: ignore[arg-type]
        )
        for _ in range(200):
            inputs = torch.randn(8, 9).bfloat16()
            model(inputs).float().square().mean().backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
        finals.append(([p.detach().clone() for p in model.parameters()], optimizer))
    for mine, other in zip(finals[0][0], finals[1][0], strict=True):
        assert torch.equal(mine, other)
    for flat, other_flat in zip(finals[0][1]._flats, finals[1][1]._flats, strict=True):
        out = torch.empty(flat.bucket.shard_numel)
        other_flat.weights.load(0, out.numel(), out, temporary)
        assert torch.equal(out, flat.weights.direct)
        assert not torch.equal(out, flat.param_shard.float()), "the low bits would not matter"


# Stochastic rounding --------------------------------------------------------------------------------------------------


def rounded(value: Tensor, step: float = 3.0, name: str = "w", seed: int = 0) -> Tensor:
    numel = value.numel()
    weights = StochasticWeights(
        torch.zeros(numel, dtype=torch.bfloat16), Counters(seed, [Run(0, numel, start_of(name))], 0, CPU)
    )
    weights.store(0, numel, value.clone(), torch.tensor(step), temporary)
    return weights.param_shard


@pytest.mark.parametrize("value", [1.001, -0.3337, 1e-30, 3e30, 1 + 2**-9])
@pytest.mark.parametrize("over", ["elements", "steps"])
def test_mean_of_10_000_stochastic_roundings_is_the_value(value: float, over: str) -> None:
    exact = float(torch.tensor(value))
    if over == "elements":
        found = rounded(torch.full((10_240,), value))[:10_000].double()
    else:
        found = torch.cat([rounded(torch.full((256,), value), step)[:20] for step in range(500)]).double()
    low, high = float(found.min()), float(found.max())
    assert low < exact < high
    probability = (exact - low) / (high - low)
    error = (high - low) * math.sqrt(probability * (1 - probability) / 10_000)
    assert abs(float(found.mean()) - exact) < 3 * error


def test_stochastic_rounding_keeps_nan_inf_and_finite_apart() -> None:
    value = from_bits(SPECIAL)
    for step in range(64):
        found = rounded(value, step)
        assert torch.equal(torch.isnan(found), torch.isnan(value))
        assert torch.equal(torch.isinf(found), torch.isinf(value))
        assert torch.equal(torch.signbit(found), torch.signbit(value))
    exact = value.bfloat16().float() == value
    assert torch.equal(found.float()[exact], value[exact])
    low_bits = {int(rounded(from_bits([1]), step).view(torch.int16)[0]) for step in range(64)}
    assert low_bits <= {0, 1}, "a denormal becomes one of its neighbours"


def test_random_bits_are_what_the_note_says() -> None:
    """Word by word in Python, over a segment's end; on the host by slices, elsewhere by blocks."""
    runs = [Run(0, 512, start_of("a") + 65_280), Run(512, 1024, start_of("b"))]
    made = Counters(7, runs, 5, CPU)
    found, by_blocks = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
    made.add_(found, 0, 1024, torch.tensor(11.0), 16)
    made._add_blocks_(by_blocks, 0, 1024, torch.tensor(11.0), 16)
    for k in [0, 1, 255, 256, 300, 511, 512, 1023]:
        element = runs[k // 512].first_id + k % 512
        key = 0
        for word in (7, 5, element >> 48, (element >> 16) % 2**32):
            key = counters.mix(((key ^ word) + 0x9E3779B9) % 2**32)
        x = ((element & 0xFFFF) + (counters.mix(((key ^ 11) + 0x9E3779B9) % 2**32) & 0xFFFF)) & 0xFFFF
        for shift, factor in ((7, 0x2993), (5, 0xE877), (9, 0x0235)):
            x = (x ^ (x >> shift)) * factor & 0xFFFF
        assert int(found[k]) == 16 * (x ^ (x >> 10))
    assert torch.equal(found, by_blocks)
    assert torch.equal(counters.permutation().sort().values, torch.arange(65_536, dtype=torch.int32))
    part = torch.zeros(256, dtype=torch.int32)
    made.add_(part, 256, 512, torch.tensor(11.0), 16)
    assert torch.equal(part, found[256:512])


def test_random_bits_differ_between_steps_seeds_names_and_streams() -> None:
    value = torch.full((4096,), 1.003)
    found = [rounded(value), rounded(value, 4.0), rounded(value, name="v"), rounded(value, seed=1)]
    for i, one in enumerate(found):
        for other in found[:i]:
            agree = float((one == other).float().mean())
            assert 0.3 < agree < 0.7, agree
    assert torch.equal(found[0], rounded(value))


# 8 bits ---------------------------------------------------------------------------------------------------------------


def moment(numel: int, levels: int) -> BlockwiseMoment:
    made = Counters(0, [Run(0, numel, start_of("w"))], 1, CPU)
    return BlockwiseMoment(numel, levels == blockwise.SIGNED_LEVELS, made, CPU, empty)


BOTH_MAPS = pytest.mark.parametrize("levels", [blockwise.SIGNED_LEVELS, blockwise.UNSIGNED_LEVELS])


@BOTH_MAPS
@pytest.mark.parametrize("exponent", [-90, -60, -1, 0, 5, 100, 127])
def test_all_256_codes_come_back(levels: int, exponent: int) -> None:
    made = moment(256, levels)
    made.codes.copy_(torch.arange(256))
    made.scales.fill_(2.0**exponent)
    value = made.read(0, 256)
    assert value.abs().max() == 2.0**exponent
    assert value.unique().numel() == (255 if levels == 127 else 256)  # 0 and -0
    for step in range(20):
        made.store(0, 256, value.clone(), torch.tensor(float(step)), temporary)
        assert torch.equal(made.codes, torch.arange(256, dtype=torch.uint8))
        assert torch.equal(made.scales, torch.full((1,), 2.0**exponent))
    made.write(0, 256, value)
    assert torch.equal(made.codes, torch.arange(256, dtype=torch.uint8))


@BOTH_MAPS
def test_codes_are_what_the_note_says(levels: int) -> None:
    value = torch.randn(256) * torch.logspace(-9, 2, 256)
    value = value if levels == blockwise.SIGNED_LEVELS else value.square()
    made = moment(256, levels)
    made.write(0, 256, value)
    y = [((min(b & 0x7FFFFFFF, 0x7FC00000) + 0x80000) >> 20) for b in value.view(torch.int32).tolist()]
    s = max((max(y) + 7) & ~7, 256)
    assert made.scales.view(torch.int32).tolist() == [s << 20]
    base = max(s - levels, 0)
    sign = [0x80 if levels == 127 and b < 0 else 0 for b in value.view(torch.int32).tolist()]
    assert made.codes.tolist() == [max(k - base, 0) | bit for k, bit in zip(y, sign, strict=True)]
    error = (made.read(0, 256) - value).abs()
    floor = made.scales[0] * (2.0**-15.7 if levels == 127 else 2.0**-31.8)
    assert (error <= value.abs() / 16 + floor).all()


@BOTH_MAPS
def test_zero_blocks_and_blocks_with_nan(levels: int) -> None:
    for odd in (math.nan, math.inf, -math.inf, 3e38, float(from_bits([0x7FFFFFFF])[0])):
        value = torch.ones(768)
        value[:256] = 0
        value[300] = odd
        made = moment(768, levels)
        made.store(0, 768, value, STEP, temporary)
        found = made.read(0, 768)
        assert not found[:256].any()
        assert torch.isnan(found[256:512]).all()
        assert torch.equal(found[512:], torch.ones(256))
    value = torch.full((256,), 1e-35)
    made = moment(256, levels)
    made.store(0, 256, value, STEP, temporary)
    assert (made.read(0, 256) >= 0).all()


def test_second_moment_beside_a_large_one_does_not_become_zero() -> None:
    made = moment(256, blockwise.UNSIGNED_LEVELS)
    value = torch.full((256,), 1e-12)
    value[0] = 1.0
    made.write(0, 256, value)
    assert made.read(0, 256)[1] > 0


@BOTH_MAPS
def test_8_bit_rounding_is_unbiased(levels: int) -> None:
    """An average that moves by a thousandth a step moves by as much in 8 bits; to nearest it would not move at all."""
    made = moment(10_240, levels)
    value = torch.full((10_240,), 1.06)
    value[::256] = 1.5
    made.store(0, 10_240, value.clone(), STEP, temporary)
    found = made.read(0, 10_240).double()
    assert float(found.mean()) == pytest.approx(float(value.double().mean()), abs=3 * 0.0625 / 100)
    made.write(0, 10_240, value)
    assert abs(float(made.read(0, 10_240).mean()) - float(value.mean())) > 0.01


# Layouts, worlds, groups ----------------------------------------------------------------------------------------------

STORAGES = [
    *product(["split", "stochastic", "none"], ["fp32", "8bit"]),
    ("fp32", "bf16"),
    ("split", "bf16"),
    ("fp32", "8bit"),
]


def _train(
    rank: int, num_ranks: int, storages: Sequence[tuple[str, str]], layouts: Sequence[tuple[int, str, str]]
) -> dict[tuple[str, str], list[list[Tensor]]]:
    """Train with every storage in every layout; return parameters, full states and masters' values."""
    results: dict[tuple[str, str], list[list[Tensor]]] = {}
    for number, (master, moments) in enumerate(storages):
        rule = ("adamw", "adam", "sgd")[number % 3]
        for stage, bucket, split in layouts:
            with poisoned():
                params = make_params(torch.bfloat16)
                groups = [{"params": [(f"p{i}", params[i]) for i in chosen]} for chosen in split_groups(params, split)]
                optimizer = CLASSES[rule](
                    groups,
                    **OPTIONS[rule][1],
                    precision=PrecisionPolicy(master=master, moments=moments, seed=5),  # type: ignore[arg-type]
                    comm=CommPolicy(bucket_mb=BUCKET_MB[bucket]),
                    shard=ShardPolicy(stage=stage),  # type: ignore[arg-type]
                )
                for step in range(3):
                    backward(params, grads_of(params, step, 0, 1))  # the same on every rank: so is the average
                    optimizer.step()
                full = optimizer.full_state_dict(to=None)
                names = {
                    name: number
                    for group in full["param_groups"]
                    for name, number in zip(group["param_names"], group["params"], strict=True)
                }
                tensors = [param.detach().clone() for param in params]
                for i in range(len(params)):
                    entry = full["state"].get(names[f"p{i}"], {})
                    tensors += [entry[name] for name in sorted(entry)]
            results.setdefault((master, moments), []).append(tensors)
    return results


LAYOUTS = [(1, "71 bytes", "alternating"), (2, "1 KB", "each"), (2, "25 MB", "one")]
WORLDS = ((1, LAYOUTS[:2]), (2, LAYOUTS[:1]), (3, LAYOUTS[1:2]), (4, LAYOUTS[::2]))


@pytest.mark.long
def test_every_storage_has_the_same_bits_in_every_layout() -> None:
    expected = {key: found[0] for key, found in _train(0, 1, STORAGES, LAYOUTS[2:]).items()}
    for num_ranks, layouts in WORLDS:
        for found in run_ranks(num_ranks, _train, num_ranks, STORAGES, layouts):
            for key, runs in found.items():
                for layout, tensors in zip(layouts, runs, strict=True):
                    assert len(tensors) == len(expected[key])
                    for index, (mine, other) in enumerate(zip(tensors, expected[key], strict=True)):
                        same = torch.equal(torch.nan_to_num(mine), torch.nan_to_num(other))
                        assert same, f"{key} on {num_ranks} ranks, {layout}: tensor {index}"


def test_layout_comparison_fails_when_identities_depend_on_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = _train(0, 1, [("stochastic", "8bit")], LAYOUTS[2:])["stochastic", "8bit"]
    monkeypatch.setattr("distadam.engine.flat_bucket.start_of", lambda name: 65_536 * len(name))
    (found,) = _train(0, 1, [("stochastic", "8bit")], LAYOUTS[2:])["stochastic", "8bit"]
    assert not all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_blocks_and_counters_are_never_cut() -> None:
    for master, moments in STORAGES:
        params = make_params(torch.bfloat16)
        policy = PrecisionPolicy(master=master, moments=moments)  # type: ignore[arg-type]
        layout = distadam.Adam(params, precision=policy, comm=CommPolicy(bucket_mb=1 / 1024)).layout
        align = 256 if moments == "8bit" or master == "stochastic" else 64
        for bucket in layout.buckets:
            assert bucket.shard_numel % align == 0
            assert all(slot.offset % align == 0 for slot in bucket.slots)


def _bytes(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    params = [(f"p{i}", param) for i, param in enumerate(make_params())]
    optimizer = distadam.AdamW(params, precision=PrecisionPolicy(moments="8bit"))
    for step in range(3):
        tensors = [param for _, param in params]
        backward(tensors, grads_of(tensors, step, 0, 1))
        optimizer.step()
    before = [{name: part.tensor.clone() for name, part in flat.stored().items()} for flat in optimizer._flats]
    full = optimizer.full_state_dict(to=None)
    optimizer.load_state_dict(full)
    after = [{name: part.tensor.clone() for name, part in flat.stored().items()} for flat in optimizer._flats]
    again = optimizer.full_state_dict(to=None)
    return {"before": before, "full": full["state"]}, {"before": after, "full": again["state"]}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_full_state_quantises_to_the_codes_it_came_from(num_ranks: int) -> None:
    """What was dequantised for a full state comes back byte by byte: moving between layouts changes nothing."""
    fulls = []
    for first, second in run_ranks(num_ranks, _bytes):
        for mine, other in zip(first["before"], second["before"], strict=True):
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[name], other[name]) for name in mine)
        fulls.append(second["full"])
    assert all(
        torch.equal(entry[name], fulls[0][key][name]) for full in fulls for key, entry in full.items() for name in entry
    )


# Rules x storages -----------------------------------------------------------------------------------------------------

ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "8bit": 2.0**-3}


@pytest.mark.parametrize("kernel", ["reference", "torch_fused"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("master", ["fp32", "split", "stochastic", "none"])
@pytest.mark.parametrize("rule", list(OPTIONS))
def test_every_rule_with_every_storage_against_float64(
    rule: str, master: str, moments: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch_fused" and rule == "rmsprop":
        return
    monkeypatch.setenv("DISTADAM_KERNEL", kernel)
    for options in OPTIONS[rule]:
        if options.get("centered") and moments != "fp32":
            continue
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(1000).bfloat16())
        policy = PrecisionPolicy(master=master, moments=moments)  # type: ignore[arg-type]
        optimizer = CLASSES[rule]([param], **{**options, "lr": 1e-2}, precision=policy)
        flat = optimizer._flats[0]
        for step in range(3):
            weight = _weight(flat)
            old = {name: m.read(0, 1024)[:1000].clone() for name, m in flat.states.items()}
            grad = torch.randn(1000).bfloat16()
            param.grad = grad.clone()
            optimizer.step()
            names = optimizer._rule.state_names(optimizer.param_groups[0])
            state = {name: old.get(name, torch.zeros(1000)) for name in names}
            problem = Problem(weight=weight, grad=grad.float(), state=state, count=step + 1)
            oracle = ORACLES[rule](make_group(rule, {**options, "lr": 1e-2}), problem)
            found = {"weight": _weight(flat)} | {name: flat.state(name).read(0, 1024)[:1000] for name in names}
            bounds = {name: ROUNDING[moments] for name in names}
            bounds["weight"] = {"fp32": 0.0, "split": 0.0, "stochastic": 2.0**-7, "none": 2.0**-8}[master]
            for name, tensor in found.items():
                exact, terms = (
                    torch.from_numpy(part.astype("float64")) for part in (oracle[name].value, oracle[name].scale)
                )
                scale = tensor.abs().max() * (2.0**-15.5 if moments == "8bit" and name != "weight" else 0)
                allowed = 4 * 2.0**-23 * terms + bounds[name] * exact.abs() + float(scale)
                worst = ((tensor.double() - exact).abs() - allowed).max()
                assert worst <= 0, f"{options}, step {step}: {name} is {float(worst)} beyond the bound"


def _weight(flat: Any) -> Tensor:
    out = torch.empty(flat.bucket.shard_numel)
    flat.weights.load(0, out.numel(), out, temporary)
    return out[:1000].clone()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("master", ["fp32", "split", "stochastic", "none"])
def test_found_inf_keeps_every_byte_and_chunks_change_none(
    master: str, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals = []
    for chunk in (512, 1 << 18):
        monkeypatch.setattr(torch_fused, "_CPU_CHUNK", chunk)
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(2000).bfloat16())
        policy = PrecisionPolicy(master=master, moments=moments)  # type: ignore[arg-type]
        optimizer = distadam.AdamW([param], lr=0.01, precision=policy)
        for step in range(4):
            param.grad = torch.randn(2000).bfloat16()
            before = _everything(optimizer)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
            same = all(torch.equal(a, b) for a, b in zip(before, _everything(optimizer), strict=True))
            assert same is (step == 2)
        finals.append(_everything(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def _everything(optimizer: Any) -> list[Tensor]:
    tensors = []
    for flat in optimizer._flats:
        for name in ("exp_avg", "exp_avg_sq"):
            flat.state(name)
        tensors += [flat.param_flat, flat.steps, *(part.tensor for part in flat.stored().values())]
    return [t.view(torch.int16).clone() if t.dtype == torch.bfloat16 else t.clone() for t in tensors]


def _nan_shows(rule: str, options: dict[str, Any], pattern: int) -> bool:
    """Whether one gradient of these bits makes its block NaN in the states and its element NaN in the weight."""
    param = nn.Parameter(torch.ones(512))
    optimizer = CLASSES[rule]([param], **{**options, "lr": 1e-2}, precision=PrecisionPolicy(moments="8bit"))
    grad = torch.ones(512)
    grad.view(torch.int32)[300] = signed(pattern)
    param.grad = grad
    optimizer.step()
    flat = optimizer._flats[0]
    names = optimizer._rule.state_names(optimizer.param_groups[0])
    states = [flat.state(name).read(0, 512) for name in names]
    shows = all(torch.isnan(state[256:]).all() and torch.isfinite(state[:256]).all() for state in states)
    return shows and torch.isnan(param).nonzero().tolist() == [[300]]


@pytest.mark.parametrize("kernel", ["reference", "torch_fused"])
@pytest.mark.parametrize("rule", list(OPTIONS))
def test_one_look_at_the_weights_finds_a_nan_in_every_state(
    rule: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a NaN with all bits set, the random bits that are added would make a small number."""
    if kernel == "torch_fused" and rule == "rmsprop":
        return
    monkeypatch.setenv("DISTADAM_KERNEL", kernel)
    every = [options for options in OPTIONS[rule] if not options.get("centered")]
    for options in every:
        assert all(_nan_shows(rule, options, pattern) for pattern in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)), options
    monkeypatch.setattr(chunks, "is_tame", lambda value: True)
    with_state = [options for options in every if rule != "sgd" or options.get("momentum")]
    assert not any(_nan_shows(rule, options, 0xFFFFFFFF) for options in with_state), "nobody would notice"


@pytest.mark.parametrize("rule", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("master", ["split", "stochastic"])
def test_padding_stays_out_of_scales_when_eps_is_zero(rule: str, master: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if rule == "rmsprop" else {}
    with poisoned():
        param = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
        policy = PrecisionPolicy(master=master, moments="8bit")  # type: ignore[arg-type]
        optimizer = CLASSES[rule]([param], eps=0.0, weight_decay=0.1, precision=policy, **options)
        for _ in range(3):
            param.grad = torch.ones(300, dtype=torch.bfloat16)
            optimizer.step()
    flat = optimizer._flats[0]
    for name in flat.states:
        assert torch.isfinite(flat.state(name).read(0, 512)).all(), name
    assert torch.isfinite(flat.param_flat).all()


# Choices --------------------------------------------------------------------------------------------------------------


@counts_bytes
def test_groups_choose_their_own_storages() -> None:
    embedding, rest = nn.Parameter(torch.ones(600)), nn.Parameter(torch.ones(600))
    groups = [{"params": [("embedding", embedding)], "moments": "fp32"}, {"params": [("rest", rest)]}]
    optimizer = distadam.AdamW(groups, precision=PrecisionPolicy(moments="8bit"))
    assert [row[1:5] for row in optimizer.kernel_report().rows] == [
        (1, CPU_KERNEL, "own", "8bit"),
        (0, CPU_KERNEL, "own", "fp32"),
    ]
    (embedding * rest).sum().backward()
    optimizer.step()
    assert optimizer.memory_report().nbytes["moments"] == 2 * 4 * 640 + 2 * (768 + 4 * 3)
    assert optimizer.state[embedding]["exp_avg"].dtype == torch.float32
    assert optimizer.state[rest]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[rest]["exp_avg_scale"].shape == (3,)
    full = optimizer.full_state_dict()
    assert full["state"][1]["exp_avg"].dtype == torch.float32
    other = torch.optim.AdamW([{"params": [embedding]}, {"params": [rest]}])
    other.load_state_dict(full)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["moments"] == "fp32"
    assert "moments" not in optimizer.param_groups[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrecisionPolicy(master="half"), "master"),  # type: ignore[arg-type]
        (lambda: PrecisionPolicy(moments="4bit"), "moments"),  # type: ignore[arg-type]
        (lambda: PrecisionPolicy(seed=-1), r"seed=.*\[0, 2\*\*32\)"),
        (lambda: PrecisionPolicy(seed=True), "seed"),
        (lambda: _build(torch.float16, master="split"), "'w'.*expected a bfloat16 parameter but got torch.float16"),
        (lambda: _build(torch.float16, master="stochastic"), "'w'.*bfloat16"),
        (lambda: _build(torch.float64, moments="8bit"), "'w'.*float64"),
        (lambda: _build(torch.float32, group={"moments": "9bit"}), "'w': its group has.*9bit"),
    ],
)
def test_storages_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def _build(dtype: torch.dtype, group: dict[str, Any] | None = None, **policy: Any) -> None:
    params = [("w", nn.Parameter(torch.ones(4, dtype=dtype)))]
    distadam.AdamW([{"params": params, **(group or {})}], precision=PrecisionPolicy(**policy))


def test_centered_rmsprop_is_refused_with_rounded_moments() -> None:
    with pytest.raises(ConfigError, match=r"param\.0.*centered RMSprop expected moments=\"fp32\""):
        distadam.RMSprop([nn.Parameter(torch.ones(4))], centered=True, precision=PrecisionPolicy(moments="8bit"))


def test_fp32_parameters_are_their_own_weights_whatever_the_master() -> None:
    for master in ("auto", "fp32", "split", "stochastic", "none"):
        assert choose(Policy(master=master), {}, torch.float32, "w").weights == "own"  # type: ignore[arg-type]


# Reloading ------------------------------------------------------------------------------------------------------------


def test_reload_keeps_the_low_bits_of_what_nobody_wrote() -> None:
    params = [(f"p{i}", nn.Parameter(torch.randn(300).bfloat16())) for i in range(2)]
    optimizer = distadam.AdamW(params, lr=1e-3, precision=PrecisionPolicy(master="split"))
    for _ in range(3):
        for _, param in params:
            param.grad = torch.randn(300).bfloat16()
        optimizer.step()
    flat = optimizer._flats[0]
    by_name = {flat.names[piece.slot]: flat.weights.remainder[piece.start : piece.end] for piece in flat.pieces}
    kept = by_name["p0"].clone()
    assert kept.any()
    with torch.no_grad():
        params[1][1].fill_(0.5)
    optimizer.reload_parameters()
    assert torch.equal(by_name["p0"], kept)
    assert not by_name["p1"].any()
    params[0][1].grad = torch.zeros(300).bfloat16()
    optimizer.step()


def test_local_state_resumes_bit_by_bit() -> None:
    finals = []
    for resume in (False, True):
        torch.manual_seed(0)
        params = [("w", nn.Parameter(torch.randn(700).bfloat16()))]
        policy = PrecisionPolicy(master="split", moments="8bit")
        optimizer = distadam.AdamW(params, lr=1e-2, precision=policy)
        for step in range(6):
            if resume and step == 3:
                saved = {key: value for key, value in optimizer.state_dict().items()}
                params = [("w", nn.Parameter(params[0][1].detach().clone()))]
                optimizer = distadam.AdamW(params, lr=1e-2, precision=policy)
                optimizer.load_state_dict(saved)
            params[0][1].grad = torch.randn(700).bfloat16()
            optimizer.step()
        finals.append(_everything(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))
