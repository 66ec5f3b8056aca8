"""Checkpoints without a world size: sharded, reshardable, asynchronous, crash-safe.

See ``docs/checkpoint-format.md``.
"""

from distadam.checkpoint import elastic
from distadam.checkpoint.background import Save, flush
from distadam.checkpoint.convert import convert, reshard
from distadam.checkpoint.extra import RandomState
from distadam.checkpoint.loading import load
from distadam.checkpoint.prune import latest, prune
from distadam.checkpoint.report import Description, describe, problems, verify
from distadam.checkpoint.saving import save

__all__ = [
    "Description",
    "RandomState",
    "Save",
    "convert",
    "describe",
    "elastic",
    "flush",
    "latest",
    "load",
    "problems",
    "prune",
    "reshard",
    "save",
    "verify",
]
