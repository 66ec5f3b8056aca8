"""Buffers of every size begin inside their memory, as large ones do (Note [Stagger] in comm/shared.py).

Tests use small models; without this no test would see a view that counts from the beginning of a buffer's memory. A
module of tests that count bytes of memory says ``COUNTS_BYTES = True`` and has buffers as users have them.
"""

import sys

from distadam.comm import shared

STAGGERED_ABOVE = shared._STAGGERED_ABOVE


def stagger_for(module: str) -> None:
    """Let this process's buffers be staggered from the first byte on, unless the tests of ``module`` count bytes."""
    counts_bytes = getattr(sys.modules[module], "COUNTS_BYTES", False)
    shared._STAGGERED_ABOVE = STAGGERED_ABOVE if counts_bytes else 0
