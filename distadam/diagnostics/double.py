"""Evaluate a loss in float64, whatever the model's dtypes and its casts, with some parameters replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Widens every floating tensor that an operation takes, and every dtype that it is asked for, to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(item: Any) -> Any:
            if isinstance(item, Tensor) and item.dtype in _NARROW:
                return item.to(torch.float64)
            return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item

        return func(*tree_map(widen, tuple(args)), **tree_map(widen, dict(kwargs or {})))


def _double() -> AbstractContextManager[Any]:
    mode: AbstractContextManager[Any] = _InDouble()  # type: ignore[no-untyped-call]
    return mode


@contextmanager
def replaced(model: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let the model's modules hold other tensors in place of these parameters and buffers while the context is open."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, held in table.items():
                if held is not None and held in values:
                    kept.append((table, name, held))
    try:
        for table, name, held in kept:
            table[name] = values[held]
        yield
    finally:
        for table, name, held in kept:
            table[name] = held


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put buffers (BatchNorm's statistics) and the state of random numbers back at the end."""
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    devices = sorted({param.device.index or 0 for param in model.parameters() if param.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers.items():
                    buffer.copy_(before)


class DoubleLoss:
    """A loss in float64 as a function of a model's parameters.

    Args:
        model: the module whose parameters the loss reads; they and its buffers are copied to float64.
        loss: returns the loss of this rank; called again and again, so it must read the same batch every time.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self._model, self._loss = model, loss
        self.values: dict[Tensor, Tensor] = {
            param: param.detach().double() for param in model.parameters() if param.is_floating_point()
        }

    def __call__(self) -> float:
        """Return the loss at ``values``."""
        buffers = {
            buffer: buffer.double() if buffer.is_floating_point() else buffer.clone()
            for buffer in self._model.buffers()
        }
        with unchanged(self._model), replaced(self._model, self.values | buffers), torch.no_grad(), _double():
            return float(self._loss())

    def slope(self, param: Tensor, index: tuple[int, ...], step: float = 1e-5) -> float:
        """Return the central difference along one element."""
        value = self.values[param]
        middle = float(value[index])
        width = step * max(1.0, abs(middle))
        value[index] = middle + width
        above = self()
        value[index] = middle - width
        below = self()
        value[index] = middle
        return (above - below) / (2 * width)
