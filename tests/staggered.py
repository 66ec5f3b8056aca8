"""Buffers of every size begin inside their memory, as large ones do (Note [Stagger] in comm/shared.py).

Tests use small models; without this no test would see a view that counts from the beginning of a buffer's memory. What
counts bytes of memory has buffers as users have them: functions marked with `counts_bytes`, and modules that say
``COUNTS_BYTES = True``.
"""

import sys
from collections.abc import Callable
from typing import Any

from distadam.comm import shared

STAGGERED_ABOVE = shared._STAGGERED_ABOVE


def counts_bytes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test, or what it runs on ranks."""
    function.__dict__["COUNTS_BYTES"] = True
    return function


def stagger_for(function: Callable[..., Any]) -> None:
    """Let this process's buffers be staggered from the first byte on, unless ``function`` counts bytes."""
    marked = getattr(function, "COUNTS_BYTES", False) or getattr(
        sys.modules[function.__module__], "COUNTS_BYTES", False
    )
    shared._STAGGERED_ABOVE = STAGGERED_ABOVE if marked else 0
