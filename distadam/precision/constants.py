"""0-D numbers for elementwise operations.

[Note: numbers are tensors]
    A call of a torch operation with a Python number takes 3.3 us, with a 0-D tensor 1.3 (256 elements, AMD EPYC): the
    number is wrapped in a tensor each time. Chunks are cut to stay in the cache, so calls are many.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def constant(value: int, dtype: torch.dtype) -> Tensor:
    """Return a number as a 0-D tensor on the CPU, which operations on any device take; nobody may write to it."""
    return torch.tensor(value, dtype=dtype, device="cpu")
