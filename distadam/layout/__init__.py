"""What is where: pure integers and names, computed without torch, hashable and printable.

`ParamSpec` describes a parameter, `Slot` its place in a `Bucket`, `Layout` all buckets. See docs/design.md.
"""

from distadam.layout.buckets import Bucket, GroupRange, Piece, Slot
from distadam.layout.fingerprint import Fingerprint, first_difference
from distadam.layout.layout import Layout
from distadam.layout.params import ParamSpec
from distadam.layout.plan import Plan, plan

__all__ = [
    "Bucket",
    "Fingerprint",
    "GroupRange",
    "Layout",
    "ParamSpec",
    "Piece",
    "Plan",
    "Slot",
    "first_difference",
    "plan",
]
