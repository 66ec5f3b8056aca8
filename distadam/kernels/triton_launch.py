"""What the Triton kernels' callers share: a launch as data, and operators that also run on the meta device.

[Note: operators]
    Each kernel's caller is an operator of the `distadam` library with an implementation for CUDA (and for the CPU,
    which only Triton's interpreter can serve) and a check for the meta device. So a dry run on meta goes through the
    code of the CUDA path, up to the launches, and torch knows which arguments are written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the current stream."""
        if self.grid:
            self.kernel[(self.grid,)](**self.arguments, **self.options)


def describe(tensor: Tensor) -> str:
    """Return what errors say about a tensor."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"


def define(schema: str, check: Callable[..., None], launches: Callable[..., list[Launch]]) -> Any:
    """Register an operator; see [Note: operators].

    Args:
        schema: torch's, with the operator's name.
        check: Raises where the arguments do not fit.
        launches: What to launch for the arguments.

    Returns:
        The operator.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any, **kwargs: Any) -> None:
        device = args[0].device
        # Triton launches on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for launch in launches(*args, **kwargs):
                launch.run()

    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"distadam::{name}", check, lib=_LIBRARY)
    return getattr(torch.ops.distadam, name).default


_LIBRARY = torch.library.Library("distadam", "DEF")  # type: ignore[no-untyped-call]
