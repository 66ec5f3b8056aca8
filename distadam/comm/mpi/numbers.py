"""How tensors look to MPI, and sums of what MPI has no type for.

Note [Sixteen bits]: MPI knows neither float16 nor bfloat16. A reduction of these sends each rank its part of every
other rank's tensor as it is (16 bits on the wire), combines them in float32, sums in the order of a fixed binary tree
by rank, and rounds once. So all ranks get the same bits, whatever the MPI library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distadam.comm.tree import TreeSum
from distadam.errors import ConfigError

SIXTEEN_BITS = (torch.float16, torch.bfloat16)

_INTEGERS = {
    torch.uint8: "UINT8_T",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint16: "UINT16_T",
    torch.uint32: "UINT32_T",
    torch.uint64: "UINT64_T",
}
_NUMBERS = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.bool: "UINT8_T", **_INTEGERS}
_CARRIERS = {1: "BYTE", 2: "UINT16_T", 4: "UINT32_T", 8: "UINT64_T", 16: "C_DOUBLE_COMPLEX"}

_ANY = {"SUM": "SUM", "PRODUCT": "PROD", "MIN": "MIN", "MAX": "MAX"}
_BITWISE = {"BAND": "BAND", "BOR": "BOR", "BXOR": "BXOR"}
_LOGICAL = {"SUM": "MAX", "PRODUCT": "MIN", "MIN": "MIN", "MAX": "MAX", **_BITWISE}  # of bytes that are 0 or 1

_IN_FLOAT32: dict[str, Callable[..., Tensor]] = {"PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum}


def memory(mpi: Any, flat: Tensor) -> Any:
    """Return the memory of a contiguous tensor as mpi4py takes it; it does not keep the tensor alive."""
    return mpi.buffer.fromaddress(flat.data_ptr(), flat.nbytes)


def carried(mpi: Any, flat: Tensor, counts: Sequence[int] | None = None) -> list[Any]:
    """Return mpi4py's description of a contiguous tensor that is moved and not computed with."""
    datatype = getattr(mpi, _CARRIERS[flat.element_size()])
    return [memory(mpi, flat), flat.numel() if counts is None else list(counts), datatype]


def number_type(mpi: Any, dtype: torch.dtype) -> Any:
    """Return MPI's type of a dtype that MPI computes with."""
    return getattr(mpi, _NUMBERS[dtype])


class Reduction:
    """What a reduction does with values of one dtype.

    Args:
        op: torch's operation: SUM, AVG, PRODUCT, MIN, MAX, of integers and bool BAND, BOR, BXOR too.
        dtype: of the tensors.
        num_ranks: whose tensors are combined.

    Raises:
        ConfigError: this operation is not defined for this dtype.
    """

    def __init__(self, op: Any, dtype: torch.dtype, num_ranks: int) -> None:
        name = next((known for known in dist.ReduceOp.RedOpType.__members__ if op == getattr(dist.ReduceOp, known)), "")
        self._averages = name == "AVG"
        self._name = "SUM" if self._averages else name
        self._num_ranks = num_ranks
        self.in_float32 = dtype in SIXTEEN_BITS
        if dtype is torch.bool:
            table = _LOGICAL
        elif dtype in _INTEGERS:
            table = _ANY | _BITWISE
        elif dtype in _NUMBERS or self.in_float32:
            table = _ANY
        else:
            table = {}
        if self._name not in table or (self._averages and not dtype.is_floating_point):
            raise ConfigError(f"the mpi4py backend has no reduction {name or op} of {dtype}.")
        self.mpi_name = table[self._name]

    def finish(self, total: Tensor) -> Tensor:
        """Divide in place what is averaged."""
        return total.div_(self._num_ranks) if self._averages else total

    def combine(self, tree: TreeSum, leaves: Sequence[Tensor]) -> Tensor:
        """Return the result of 16-bit ``leaves`` (by rank) in float32; see Note [Sixteen bits]."""
        if self._name == "SUM":
            total = torch.empty(leaves[0].numel(), dtype=torch.float32)
            tree.add(total, leaves)
        else:
            total = leaves[0].float()
            for leaf in leaves[1:]:
                total = _IN_FLOAT32[self._name](total, leaf.float())
        return self.finish(total)
