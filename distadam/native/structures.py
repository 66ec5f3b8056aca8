"""The structures of library.c, field by field, and the numbers of its enumerations."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag

import torch

VERSION = 3
"""That of library.c."""

MAX_STATES = 3
MAX_MULTIPLIERS = 2
EIGHT_BIT = 3

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weights(IntEnum):
    """``enum weights``, by the names of storages."""

    OWN = 0
    MASTER = 1
    SPLIT = 2
    STOCHASTIC = 3
    ROUNDED = 4


class RuleNumber(IntEnum):
    """``enum rule``."""

    NONE = -1
    ADAM = 0
    SGD = 1
    RMSPROP = 2


class Flag(IntFlag):
    """``enum flag``."""

    MAXIMIZE = 1
    DECOUPLED = 2
    AMSGRAD = 4
    NESTEROV = 8
    FIRST = 16
    CENTERED = 32
    DECAYS = 64
    MOMENTUM = 128


def type_number(dtype: torch.dtype) -> int | None:
    """Return ``enum type`` of a dtype, or None where the library does not read it."""
    return _TYPES.get(dtype)


class Counters(ctypes.Structure):
    """``struct counters``."""

    _fields_ = (("keys", ctypes.c_void_p), ("lanes", ctypes.c_void_p))


class State(ctypes.Structure):
    """``struct state``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("counters", Counters),
        ("type", ctypes.c_int32),
        ("levels", ctypes.c_int32),
    )


class Update(ctypes.Structure):
    """``struct update``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sources", "param", "extra", "squares")),
        ("counters", Counters),
        ("states", State * MAX_STATES),
        ("origin", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_sources", "source_type", "weights", "param_type")),
        *((name, ctypes.c_int32) for name in ("rule", "flags", "num_states", "num_multipliers")),
        ("step", ctypes.c_uint32),
        *((name, ctypes.c_float) for name in ("num_ranks", "loss_scale")),
        ("multipliers", ctypes.c_float * MAX_MULTIPLIERS),
        *((name, ctypes.c_float) for name in ("lr", "decay", "eps", "beta1", "gain1", "beta2", "gain2", "correction")),
    )
