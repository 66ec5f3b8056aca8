"""Loops written for torch.optim, with ``torch.optim`` swapped for ``distadam`` and nothing else.

Every reduce-scatter, all-gather and all-reduce of the optimizer starts late: on a thread of its own, after a random
sleep that differs from rank to rank (`delayed`). What a loop may look at (losses, parameters, averages of parameters,
``state_dict()``, evaluation) must be what the same loop records with `Averaged` torch.optim on every rank. With
``optimizer.prefetch(model)`` too, for loops that read parameters where prefetch promises them.

rtol = atol = 0: gradients are rounded to multiples of 2^-8, so sums over ranks are exact in every order, and all
parameters have a multiple of 64 elements. Clipping is part of some loops with a limit that is never reached: its factor
is 1. The last tests drop the waits and must see wrong results: the proof that the delays bite.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam
from distadam.comm import Collectives, Pending, Streams
from tests.averaged_oracle import TINY_MB, Averaged, AveragedOracle, assert_same_parameters, integer_loss, quantise
from tests.ranks import run_ranks

RANKS = (2, 3)
KINDS = ("reduce_scatter", "all_gather", "sum_shards")


class LatePending(Pending):
    """A collective that may not have begun."""

    def __init__(self, future: Future[Pending], wait: bool) -> None:
        super().__init__(None)
        self._future = future
        self._waits = wait

    @property
    def reading(self) -> Pending:
        return LateReading(self._future, self._waits)

    def wait(self) -> None:
        if self._waits:
            self._launched().wait()

    def ready(self, within_s: float) -> bool:
        if within_s and not self._future.done():
            time.sleep(within_s)
        return self._future.done() and self._launched().ready(within_s)

    def _launched(self) -> Pending:
        return self._future.result()


class LateReading(LatePending):
    """Its part after which the input may be overwritten."""

    def _launched(self) -> Pending:
        return self._future.result().reading


@contextlib.contextmanager
def delayed(rank: int, most_s: float, dropped: tuple[str, ...] = ()) -> Iterator[None]:
    """Start every collective up to ``most_s`` late, in the order of their launches; waits of ``dropped`` do nothing."""
    sleeps = random.Random(rank)

    def late(kind: str, launch: Callable[..., Pending]) -> Callable[..., Pending]:
        def run(*args: Any) -> Pending:
            time.sleep(sleeps.choice([0.0, 0.3, 1.0]) * most_s * sleeps.random())
            return launch(*args)

        return lambda *args: LatePending(threads.submit(run, *args), kind not in dropped)

    with ThreadPoolExecutor(1) as threads, contextlib.ExitStack() as patches:
        for kind in KINDS:
            patches.enter_context(mock.patch.object(Collectives, kind, late(kind, getattr(Collectives, kind))))
        yield


class Net(nn.Module):
    """Two owners of one tied weight, one of them at each end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
        self.scale = nn.Linear(32, 64)
        self.back = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight
        quantise(self)

    def forward(self, tokens: Tensor, short: bool = False) -> Tensor:
        hidden = self.embed(tokens)
        if short:
            return hidden
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.head(self.back(torch.relu(self.scale(hidden))))


def _tokens(rank: int, step: int) -> Tensor:
    return torch.randint(0, 16, (6,), generator=torch.Generator().manual_seed(100 * step + rank))


def _loss(model: nn.Module, rank: int, step: int) -> Tensor:
    tokens = _tokens(rank, step)
    return nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1), reduction="sum")


Loop = Callable[[Any, nn.Module, int], Iterator[Tensor]]


def _plain(optim: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for step in range(5):
        optimizer.zero_grad()
        loss = _loss(model, rank, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        scheduler.step()
        yield loss.detach()
        with torch.no_grad():
            yield _loss(model, rank, 77)


def _reading(optim: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    """Parameters are read between steps in every way: averaged, summed, copied, saved."""
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    averages = [param.detach().clone() for param in model.parameters()]
    for step in range(4):
        _loss(model, rank, step).backward()
        optimizer.step()
        with torch.no_grad():
            for average, param in zip(averages, model.parameters(), strict=True):
                average.lerp_(param, 0.25)
            yield torch.stack([param.norm() for param in model.parameters()])
        yield from (value.clone() for value in model.state_dict().values())
        yield from (param.detach() for param in deepcopy(model).parameters())
        optimizer.zero_grad()
    yield from averages


def _accumulating(optim: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    for step in range(8):
        _loss(model, rank, step).backward()
        if step % 3 == 2:
            optimizer.step()
            model.zero_grad()
            yield from (param.detach().clone() for param in model.parameters())
    optimizer.zero_grad()


def _skipping(optim: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    """Batches are thrown away after backward; a group is added in the middle."""
    *first, last = model.parameters()
    optimizer = optim.AdamW(first, lr=0.02)
    for step in range(6):
        last.requires_grad_(step > 2)
        if step == 3:
            optimizer.add_param_group({"params": [last], "lr": 0.1})
        _loss(model, rank, step).backward()
        if step in (1, 4):
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
        yield from (param.detach().clone() for param in model.parameters())


def _closures(optim: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model, rank, step)
            loss.backward()
            return loss

        yield optimizer.step(closure).detach()
        yield from (param.detach().clone() for param in model.parameters())


def _scaled(optim: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1)
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(model, rank, step)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # nothing is inf here, and a power of two commutes with the average
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield from (param.detach().clone() for param in model.parameters())
        yield torch.tensor(scaler.get_scale())


LOOPS: dict[str, Loop] = {
    "plain": _plain,
    "reading": _reading,
    "accumulating": _accumulating,
    "skipping": _skipping,
    "closures": _closures,
    "scaled": _scaled,
}


def _swapped(bucket_mb: Any) -> Any:
    """``distadam``, with buckets small enough that there are several."""
    comm = distadam.CommPolicy(bucket_mb=bucket_mb)
    return SimpleNamespace(AdamW=lambda params, **options: distadam.AdamW(params, **options, comm=comm))


def _run(
    rank: int, loop: str, most_s: float = 0.004, dropped: tuple[str, ...] = (), bucket_mb: float = TINY_MB
) -> tuple[list[Tensor], list[Tensor]]:
    expected = list(LOOPS[loop](SimpleNamespace(AdamW=Averaged), Net(), rank))
    with delayed(rank, most_s, dropped):
        got = [value.clone() for value in LOOPS[loop](_swapped(bucket_mb), Net(), rank)]
        dist.barrier()
    return got, expected


def _compare(results: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    for rank, (got, expected) in enumerate(results):
        for position, (value, other) in enumerate(zip(got, expected, strict=True)):
            torch.testing.assert_close(value, other, rtol=0, atol=0, msg=lambda m, w=(rank, position): f"{w}: {m}")


@pytest.mark.parametrize("bucket_mb", [TINY_MB, 9000 / 2**20])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_unmodified_loop_has_the_right_bits_when_collectives_are_late(
    num_ranks: int, loop: str, bucket_mb: float
) -> None:
    _compare(run_ranks(num_ranks, _run, loop, 0.004, (), bucket_mb))


# With prefetch -------------------------------------------------------------------------------------------------------


def _prefetched_forwards(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    for step in range(5):
        loss = _loss(model, rank, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()
    with torch.no_grad():
        yield model(_tokens(rank, 7))


def _prefetched_state_dict(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    for step in range(4):
        _loss(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield from (value.clone() for value in model.state_dict().values())


def _prefetched_eval(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    for step in range(4):
        model.train()
        _loss(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model.eval() is model
        assert not any(module.training for module in model.modules())
        yield from (param.detach().clone() for param in model.parameters())


def _prefetched_flush(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    for step in range(4):
        _loss(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(optimizer, distadam.ShardedOptimizer):
            optimizer.flush()
        yield from (param.detach().clone() for param in model.parameters())


def _prefetched_forward_then_read(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    """After the root's forward everything may be read, what the forward did not use included."""
    for step in range(4):
        _loss(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        model(_tokens(rank, 7), short=True)
        yield from (param.detach().clone() for param in model.parameters())


def _prefetched_steps_without_forward(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    """Two steps on end, by hand-set gradients: the second update must not overtake the first gather."""
    for step in range(6):
        for param in model.parameters():
            param.grad = torch.full_like(param, float(rank + step))
        optimizer.step()
    yield from (value.clone() for value in model.state_dict().values())


def _prefetched_load(optimizer: Any, model: nn.Module, rank: int) -> Iterator[Tensor]:
    """``load_state_dict`` right after a step, while gathers are on their way; masters follow without a call."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(5):
        _loss(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            model.load_state_dict({name: value * 0.5 for name, value in kept.items()})
        yield from (value.clone() for value in model.state_dict().values())


PREFETCHED: dict[str, Callable[[Any, nn.Module, int], Iterator[Tensor]]] = {
    "forwards": _prefetched_forwards,
    "state_dict": _prefetched_state_dict,
    "eval": _prefetched_eval,
    "flush": _prefetched_flush,
    "forward, then read": _prefetched_forward_then_read,
    "steps without forward": _prefetched_steps_without_forward,
    "load_state_dict": _prefetched_load,
}


def _run_prefetched(
    rank: int, loop: str, most_s: float = 0.004, dropped: tuple[str, ...] = (), bucket_mb: float = TINY_MB
) -> tuple[list[Tensor], list[Tensor]]:
    twin = Net()
    expected = list(PREFETCHED[loop](Averaged(twin.parameters(), lr=0.02), twin, rank))
    with delayed(rank, most_s, dropped):
        model = Net()
        optimizer = distadam.AdamW(
            model.named_parameters(), lr=0.02, comm=distadam.CommPolicy(bucket_mb=bucket_mb, overlap_gather=True)
        )
        optimizer.prefetch(model)
        got = [value.clone() for value in PREFETCHED[loop](optimizer, model, rank)]
        optimizer.flush()
        dist.barrier()
    return got, expected


@pytest.mark.parametrize("bucket_mb", [TINY_MB, 9000 / 2**20])
@pytest.mark.parametrize("loop", PREFETCHED)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_prefetched_loop_has_the_right_bits_when_collectives_are_late(
    num_ranks: int, loop: str, bucket_mb: float
) -> None:
    _compare(run_ranks(num_ranks, _run_prefetched, loop, 0.004, (), bucket_mb))


class ReadsElsewhere(nn.Module):
    """Parameters that are read without calling their owner, and ones that a hook of the owner reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(16, 64)
        self.attention = nn.MultiheadAttention(64, 2, bias=False)  # reads out_proj.weight itself
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64, bias=False))
        self.first = nn.Linear(64, 64, bias=False)
        self.hooked = nn.Linear(64, 64, bias=False)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0] + module.weight.sum(),))
        self.head = nn.Linear(64, 16, bias=False)
        quantise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = torch.tanh(nn.functional.linear(self.normed(hidden), self.first.weight))
        return self.head(self.hooked(hidden))


def _read_elsewhere(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    def steps(model: nn.Module, optimizer: Any) -> Iterator[Tensor]:
        for step in range(4):
            _loss(model, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                yield model(_tokens(rank, 7)).clone()
        yield from (value.clone() for value in model.state_dict().values())

    twin = ReadsElsewhere()
    expected = list(steps(twin, Averaged(twin.parameters(), lr=0.02)))
    with delayed(rank, 0.02):
        model = ReadsElsewhere()
        optimizer = distadam.AdamW(model.named_parameters(), lr=0.02, comm=distadam.CommPolicy(bucket_mb=TINY_MB))
        optimizer.prefetch(model)
        got = list(steps(model, optimizer))
        dist.barrier()
    return got, expected


@pytest.mark.parametrize("num_ranks", RANKS)
def test_prefetch_waits_for_parameters_that_other_modules_read(num_ranks: int) -> None:
    _compare(run_ranks(num_ranks, _read_elsewhere))


def _read_without_hooks(rank: int) -> None:
    """The root's forward is not called, so nobody waits for what is read directly; unless the user does."""
    model = Net()
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.02)
    optimizer.prefetch(model)
    for flush in (True, False):
        _loss(model, rank, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        if flush:
            optimizer.flush()
        loss = nn.functional.linear(torch.ones(1, 32), model.scale.weight).sum()
        if flush:
            loss.backward()
            continue
        with pytest.raises(distadam.UsageError, match=r"parameter 'scale.weight' was used while its gather was under"):
            loss.backward()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradient_of_a_parameter_that_nobody_waited_for_raises(num_ranks: int) -> None:
    run_ranks(num_ranks, _read_without_hooks)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copy_of_a_prefetching_model_is_an_ordinary_one(copy: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    optimizer = distadam.AdamW(model.named_parameters(), lr=0.02)
    optimizer.prefetch(model)
    _loss(model, 0, 0).backward()
    optimizer.step()
    twin = copy(model)
    assert twin.eval() is twin
    assert not twin.training
    assert model.training
    with mock.patch.object(distadam.ShardedOptimizer, "flush", side_effect=AssertionError), torch.no_grad():
        assert torch.equal(twin(_tokens(0, 7)), twin.eval()(_tokens(0, 7)))
    assert model.eval() is model


def _masters(rank: int) -> None:
    """bf16: after ``load_state_dict`` a master that no longer rounds to its parameter would undo the load."""
    model, twin = (nn.Linear(64, 4, bias=False).bfloat16() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    oracle = AveragedOracle(lambda flats: torch.optim.SGD(flats, lr=0.01, fused=True), twin.parameters())
    loaded = {"weight": torch.randn(4, 64).bfloat16()}
    with delayed(rank, 0.004):
        optimizer = distadam.SGD(model.named_parameters(), lr=0.01)
        optimizer.prefetch(model)
        for step in range(4):
            for some, stepper in ((model, optimizer), (twin, oracle)):
                integer_loss(some.parameters(), 10 * step + rank).backward()
                stepper.step()
                stepper.zero_grad()
                if step == 1:
                    some.load_state_dict(loaded)
                    if some is twin:
                        oracle.reload_parameters()
            assert_same_parameters(model.eval(), twin, f"step {step}")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_load_state_dict_reloads_masters_when_prefetched(num_ranks: int) -> None:
    run_ranks(num_ranks, _masters)


# The proof that the delays bite --------------------------------------------------------------------------------------


def _wrong(results: list[tuple[list[Tensor], list[Tensor]]]) -> bool:
    with pytest.raises(AssertionError):
        _compare(results)
    return True


@pytest.mark.parametrize("dropped", ["reduce_scatter", "all_gather"])
def test_loop_has_wrong_bits_when_a_wait_is_dropped(dropped: str) -> None:
    assert _wrong(run_ranks(2, _run, "plain", 0.03, (dropped,)))


def _no_wait_in_step(rank: int) -> str:
    with mock.patch.object(distadam.ShardedOptimizer, "wait_buckets", return_value=None):
        try:
            _run(rank, "reading", 0.03)
        except distadam.UsageError as error:
            return str(error)
    return "nothing was raised"


def test_loop_is_stopped_when_step_does_not_wait() -> None:
    """The first loss after such a step has read old parameters: its backward says so."""
    for message in run_ranks(2, _no_wait_in_step):
        assert "was used while its gather was under way" in message


def _no_wait_in(rank: int, method: str, loop: str) -> tuple[list[Tensor], list[Tensor]]:
    with mock.patch.object(distadam.ShardedOptimizer, method, return_value=None):
        return _run_prefetched(rank, loop, 0.03)


@pytest.mark.parametrize(
    ("method", "loop"),
    [("flush", "state_dict"), ("flush", "eval"), ("flush", "forward, then read")],
)
def test_prefetched_loop_has_wrong_bits_when_a_hook_does_nothing(method: str, loop: str) -> None:
    assert _wrong(run_ranks(2, _no_wait_in, method, loop))


def test_waiting_for_the_buffer_of_a_chain_starts_nothing() -> None:
    """Two-stage reductions (hybrid sharding, CPU): ranks reuse buffers in different orders, which must not show."""
    started: list[str] = []

    def start(name: str) -> Pending:
        started.append(name)
        return Pending(None, name)

    chain = Streams().launch_chain(torch.device("cpu"), lambda: start("first"), lambda: start("second"))
    chain.reading.wait()
    assert started == ["first"]
    chain.wait()
    chain.wait()
    chain.reading.wait()
    assert started == ["first", "second"]
