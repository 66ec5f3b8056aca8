"""The compiled part: one C file, called through ctypes; to lack it costs speed only.

Note [Compiled where packages are built]: wheels carry the library, so installing one needs no compiler. Where a package
is built from source without a compiler, the build goes on without it; where it cannot be loaded, or DISTADAM_NATIVE is
"0", everything runs on torch's operations, to the same bits. `obstacle` says why it is not used.

Calls release Python's lock. They take memory by address: callers check that it is contiguous and lies on the CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from distadam.native.structures import VERSION, Update, type_number

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Update",
    "addresses",
    "copy",
    "copy_all",
    "obstacle",
    "sum_ranks",
    "type_number",
    "update",
]

ENVIRONMENT_VARIABLE = "DISTADAM_NATIVE"

_COPY_NBYTES = 256 << 10
"""Copies of fewer bytes are left to torch: they fit in a cache, and calls are not free."""


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or why there is none; asked once a process."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return None, f"{ENVIRONMENT_VARIABLE}=0"
    files = sorted(Path(__file__).parent.glob("library*.so"))
    if not files:
        return None, "this installation was built without a C compiler; a wheel of distadam has the compiled part"
    try:
        library = ctypes.CDLL(str(files[0]))
        pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        for name, arguments in (
            ("distadam_update", (ctypes.POINTER(Update), int64, int64)),
            ("distadam_sum", (pointer, int32, int32, pointer, int64)),
            ("distadam_copy", (pointer, pointer, int64)),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        version = library.distadam_version()
    except (OSError, AttributeError) as error:
        return None, f"the compiled part cannot be loaded ({error}); reinstall distadam"
    if version != VERSION * 65536 + ctypes.sizeof(Update):
        return None, "the compiled part is another version's; reinstall distadam (pip install --force-reinstall)"
    return library, None


def obstacle() -> str | None:
    """Say why the compiled part is not used, or None where it is."""
    return _load()[1]


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of tensors as a C array; neither keeps their memory."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def update(work: Update, start: int, end: int) -> None:
    """Update elements [start, end) of a shard; see ``struct update`` in library.c.

    Args:
        work: Storages and numbers; what its addresses point to must be kept by the caller.
        start: First element, a multiple of 64 (of 256 where there are blocks or random bits).
        end: First element after, likewise.
    """
    library = _load()[0]
    assert library is not None, "callers ask for the obstacle first"
    library.distadam_update(ctypes.byref(work), start, end)


def sum_ranks(out: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Write the sum of every rank's ``leaves`` to ``out`` in the order of `comm.tree`; False if it cannot.

    Args:
        out: float32, shape (n,), contiguous; may be one of the leaves.
        leaves: By rank: float32, bfloat16 or float16, all the same, each of shape (n,), contiguous.
    """
    library, kind = _load()[0], type_number(leaves[0].dtype)
    if library is None or kind is None or out.dtype != torch.float32:
        return False
    library.distadam_sum(addresses(leaves), len(leaves), kind, out.data_ptr(), out.numel())
    return True


def copy(out: Tensor, source: Tensor) -> None:
    """Copy between tensors of one shape; long copies go past the cache, which keeps what is computed with."""
    library = _load()[0]
    if library is None or not _is_long_copy(out, source):
        out.copy_(source)
    else:
        library.distadam_copy(out.data_ptr(), source.data_ptr(), out.nbytes)


def copy_all(outs: list[Tensor], sources: list[Tensor]) -> None:
    """Copy between lists of tensors as `copy` does."""
    if _load()[0] is None:
        torch._foreach_copy_(outs, sources)
        return
    short: tuple[list[Tensor], list[Tensor]] = ([], [])
    for out, source in zip(outs, sources, strict=True):
        if _is_long_copy(out, source):
            copy(out, source)
        else:
            short[0].append(out)
            short[1].append(source)
    if short[0]:
        torch._foreach_copy_(*short)


def _is_long_copy(out: Tensor, source: Tensor) -> bool:
    return (
        out.nbytes >= _COPY_NBYTES
        and out.dtype == source.dtype
        and out.device.type == source.device.type == "cpu"
        and out.is_contiguous()
        and source.is_contiguous()
    )
