"""Coefficients such as 1 - beta**step, in double precision, wherever the step count lives.

torch computes them in Python doubles and rounds once, when they meet a tensor. On the host that is what happens here
too. On another device the step count may not be read (that would be a host sync), so the same arithmetic runs there,
on 0-D float64 buffers.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from distadam.rules.scratch import Scratch

Scalar: TypeAlias = float | Tensor
"""A Python float, or a 0-D float64 tensor on the device of the update."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading the tensor's value waits for nothing."""
    return tensor.device.type == "cpu"


class Scalars:
    """Double-precision arithmetic on hyper-parameters and step counts for one update.

    Each method takes the Python route when every operand is a Python float and the device route otherwise; device
    results live in buffers that the next `Scalars` on the same scratch overwrites.

    Args:
        scratch: Where the 0-D buffers come from.
        dtype: The compute dtype that `coefficient` rounds to.
        device: The device of the update.
    """

    def __init__(self, scratch: Scratch, dtype: torch.dtype, device: torch.device) -> None:
        self._scratch = scratch
        self._dtype = dtype
        self._device = device
        self._num_used = 0

    def read(self, value: Any) -> Scalar:
        """Take a hyper-parameter or a step count in.

        Args:
            value: A number or a 1-element tensor on any device.

        Returns:
            A float where the host has the value, else a 0-D float64 tensor.

        Syncs: never, unless a tensor lives on another device than the update.
        """
        if isinstance(value, Tensor) and not on_host(value):
            return self._buffer(torch.float64).copy_(value.reshape(()))
        return float(value)

    def sub(self, a: Scalar, b: Scalar) -> Scalar:
        """Return a - b."""
        if isinstance(a, float) and isinstance(b, float):
            return a - b
        return torch.sub(self._lift(a), self._lift(b), out=self._buffer(torch.float64))

    def mul(self, a: Scalar, b: Scalar) -> Scalar:
        """Return a * b."""
        if isinstance(a, float) and isinstance(b, float):
            return a * b
        return torch.mul(self._lift(a), self._lift(b), out=self._buffer(torch.float64))

    def div(self, a: Scalar, b: Scalar) -> Scalar:
        """Return a / b."""
        if isinstance(a, float) and isinstance(b, float):
            return a / b
        return torch.div(self._lift(a), self._lift(b), out=self._buffer(torch.float64))

    def pow(self, a: Scalar, b: Scalar) -> Scalar:
        """Return a ** b, a not negative."""
        if isinstance(a, float) and isinstance(b, float):
            return float(a**b)
        return torch.pow(self._lift(a), self._lift(b), out=self._buffer(torch.float64))

    def sqrt(self, a: Scalar) -> Scalar:
        """Return the square root of a, a not negative."""
        if isinstance(a, float):
            return float(a**0.5)
        return torch.sqrt(a, out=self._buffer(torch.float64))

    def neg(self, a: Scalar) -> Scalar:
        """Return -a."""
        if isinstance(a, float):
            return -a
        return torch.neg(a, out=self._buffer(torch.float64))

    def coefficient(self, a: Scalar) -> Scalar:
        """Round once to the compute dtype.

        Args:
            a: A result of the methods above.

        Returns:
            What an elementwise operation takes as its other operand: a float, which the operation itself rounds to
            the tensor's dtype, or a 0-D tensor of the compute dtype.
        """
        if isinstance(a, float):
            return a
        return self._buffer(self._dtype).copy_(a)

    def _lift(self, a: Scalar) -> Tensor:
        return self._buffer(torch.float64).fill_(a) if isinstance(a, float) else a

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        self._num_used += 1
        return self._scratch.scalar(self._num_used, dtype, self._device)
