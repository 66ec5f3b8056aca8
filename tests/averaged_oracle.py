"""The oracle of the multi-rank tests: torch.optim on one process, given the average of the ranks' gradients.

`AveragedOracle` is used where a distadam optimizer is, on every rank, on a twin of the model. It sums the ranks'
``p.grad`` (zeros where a rank has none, None where nobody has one), divides by the number of ranks and steps
``torch.optim.X(fused=True)`` on fp32 (fp64) copies of the parameters. The copies are padded to 64 elements, where
torch's fused CPU kernels give every element the same bits wherever it lies, so results compare with rtol=0, atol=0 as
long as every order of summing the gradients is exact: integers (`integer_loss`) or multiples of 2^-8 (`quantise`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distadam

TINY_MB = 71 / 2**20
# Where ranks differ in what they launch in backward, a rank waits for a buffer, in vain, before it makes another one.
impatient = mock.patch("distadam.engine.buffers.PATIENCE_S", 0.02)


def integers(param: Tensor, seed: int) -> Tensor:
    """Integers in [-8, 8] of a parameter's shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, param.shape, generator=generator).to(param.dtype)


def integer_loss(params: Iterable[Tensor], seed: int) -> Tensor:
    """A loss whose gradient is `integers`, other ones for each parameter, whatever the parameters' values are."""
    return sum((param * integers(param, seed * 1009 + index)).sum().double() for index, param in enumerate(params))  # type: ignore[return-value]


def quantise(model: nn.Module) -> nn.Module:
    """Round every gradient to a multiple of 2^-8, so that sums of gradients are exact in every order."""
    for param in model.parameters():
        if param.requires_grad:
            param.register_hook(lambda grad: torch.round(grad * 256) / 256)
    return model


def _padded(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    flat = torch.zeros(max(64, -(-tensor.numel() // 64) * 64), dtype=dtype)
    flat[: tensor.numel()] = tensor.detach().reshape(-1)
    return flat


def average(grads: Sequence[Tensor | None], params: Sequence[Tensor], group: Any = None) -> list[Tensor | None]:
    """Average gradients over the ranks of ``group``, zeros where a rank has none; None where nobody has one.

    One all-reduce in float64 for all: sums of float32 gradients that are exact stay exact. Divided in the dtype that
    the parameters compute in.
    """
    has = torch.tensor([float(grad is not None) for grad in grads], dtype=torch.float64)
    flats = [
        torch.zeros(param.numel(), dtype=torch.float64) if grad is None else grad.detach().reshape(-1).double()
        for grad, param in zip(grads, params, strict=True)
    ]
    num_ranks, total = 1, torch.cat([has, *flats])
    if dist.is_initialized():
        num_ranks = dist.get_world_size(group)
        dist.all_reduce(total, group=group)
    averages: list[Tensor | None] = []
    for ranks, value, param in zip(
        total[: len(has)].tolist(), total[len(has) :].split([flat.numel() for flat in flats]), params, strict=True
    ):
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        averages.append(None if ranks == 0 else value.view(param.shape).to(dtype) / num_ranks)
    return averages


class Averaged(torch.optim.AdamW):
    """torch.optim.AdamW on one rank, given the average of the ranks' gradients, for loops that take any optimizer."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        for param, value in zip(params, average([param.grad for param in params], params), strict=True):
            param.grad = value
        super().step()
        return loss

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


class AveragedOracle:
    """torch.optim's rule on the averaged gradient, with the loop's side of an optimizer.

    Args:
        make: builds a fused torch optimizer from a list of groups.
        params: the twin's parameters, in order.
        group: ranks to average over; None is the default group, or this process alone without one.
    """

    def __init__(
        self, make: Callable[[Any], torch.optim.Optimizer], params: Iterable[Tensor], group: Any = None
    ) -> None:
        self.params = list(params)
        self._group = group
        self._flats = [nn.Parameter(_padded(param)) for param in self.params]
        # A group for each: torch's fused SGD fails in a call where some buffers exist and some do not.
        self.inner = make([{"params": [flat]} for flat in self._flats])

    def average(self) -> list[Tensor | None]:
        """Averages by parameter, padded; None where no rank has a gradient. Collective."""
        averages = average([param.grad for param in self.params], self.params, self._group)
        return [None if value is None else _padded(value) for value in averages]

    def flats_with_grad(self, averages: Sequence[Tensor | None]) -> list[nn.Parameter]:
        """The inner optimizer's parameters that have an average, with it as their gradient: what clipping takes."""
        chosen = [(flat, average) for flat, average in zip(self._flats, averages, strict=True) if average is not None]
        for flat, average in chosen:
            flat.grad = average
        return [flat for flat, _ in chosen]

    def step(self, averages: Sequence[Tensor | None] | None = None) -> None:
        for flat, average in zip(self._flats, self.average() if averages is None else averages, strict=True):
            flat.grad = average
        self.inner.step()
        with torch.no_grad():
            for param, flat in zip(self.params, self._flats, strict=True):
                if flat.grad is not None:
                    param.copy_(flat[: param.numel()].view(param.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reload_parameters(self) -> None:
        """Take over the first rank's parameters; a master that still rounds to its parameter keeps its low bits."""
        with torch.no_grad():
            for param, flat in zip(self.params, self._flats, strict=True):
                value = param.detach().contiguous()
                if dist.is_initialized():
                    dist.broadcast(value, 0, group=self._group)
                param.copy_(value)
                kept = flat[: param.numel()].to(param.dtype) == value.reshape(-1)
                flat[: param.numel()] = torch.where(kept, flat[: param.numel()], value.reshape(-1).to(flat.dtype))

    def state(self) -> dict[int, dict[str, Tensor]]:
        """torch's state by parameter number, in the parameters' shapes."""
        result: dict[int, dict[str, Tensor]] = {}
        for number, (param, flat) in enumerate(zip(self.params, self._flats, strict=True)):
            entry = {key: value for key, value in self.inner.state.get(flat, {}).items() if value is not None}
            if entry:
                result[number] = {
                    key: value if value.dim() == 0 else value[: param.numel()].view(param.shape)
                    for key, value in entry.items()
                }
        return result


def assert_same_parameters(model: nn.Module, twin: nn.Module, where: str = "") -> None:
    """Compare parameters bit by bit."""
    for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            param.detach(),
            other.detach(),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{where} {name}: {text}",
        )


def assert_same_state(optimizer: distadam.ShardedOptimizer, oracle: AveragedOracle, where: str = "") -> None:
    """Compare torch's full state bit by bit. Collective."""
    full, expected = optimizer.full_state_dict(to=None)["state"], oracle.state()
    assert full.keys() == expected.keys(), where
    for number, entry in expected.items():
        assert full[number].keys() == entry.keys(), (where, number)
        for key, value in entry.items():
            torch.testing.assert_close(
                full[number][key],
                value,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda text, at=(number, key): f"{where} {at}: {text}",
            )
