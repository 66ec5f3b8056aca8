"""A rolling hash of what all ranks must have in common, step by step.

Note [Desync]: ranks whose hyper-parameters, order of reductions or parameters differ go on without an error and train
something that nobody meant. So each step adds to a hash what must be the same everywhere: the step's number, sizes of
buckets, the order in which the last step's reductions were launched and that of the gathers, every group's
hyper-parameters and, where `distadam.diagnostics.check_ranks` asks for it, a checksum of the parameters. The hash
travels with the agreement that each communicating call begins with (8 bytes and their complement: Note [Agreement]), so
it costs no collective; where it differs no rank takes the step, and all raise what differs and since when.
Hyper-parameters that lie on a device are not looked at: that would wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from torch import Tensor

from distadam.engine.order import GatherOrder
from distadam.errors import RankMismatchError, UsageError
from distadam.layout import Bucket

DIGEST_NBYTES = 8

_HISTORY = 32
_PLAIN = (float, int, bool, type(None), str)
PARAMETERS = "parameters"


@dataclass(frozen=True, slots=True)
class Link:
    """One step in the hash: ``parts`` are (what, value) pairs, and none where this rank had joined."""

    step: int
    digest: bytes
    parts: tuple[tuple[str, Any], ...]


class Witness(Protocol):
    """Looks at parameters; `distadam.diagnostics.check_ranks` is one."""

    def look(self, step: int) -> object:
        """Return what must be the same on every rank before this step; None where it is not due."""

    def explain(self) -> str:
        """Say what differs. Collective: every rank."""


class Chain:
    """The hash of one optimizer.

    Args:
        param_groups: torch's groups.
        names: of the hyper-parameters in each group.
        gathers: in which order buckets are gathered.
    """

    def __init__(self, param_groups: Sequence[Mapping[str, Any]], names: Sequence[str], gathers: GatherOrder) -> None:
        self.step = 0
        self.digest = bytes(DIGEST_NBYTES)
        self.order: list[int] = []  # buckets of this step's reductions, as they were launched
        self.witness: Witness | None = None
        self._param_groups = param_groups
        self._names = names
        self._gathers = gathers
        self._sizes: list[str] = []
        self._last_order: tuple[int, ...] = ()
        self._links: deque[Link] = deque(maxlen=_HISTORY)

    def add_bucket(self, bucket: Bucket) -> None:
        """Take a new bucket's size along from now on."""
        self._sizes.append(f"{bucket.dtype} x {bucket.numel}")

    def attend(self, witness: Witness) -> Callable[[], None]:
        """Ask ``witness`` before each step from now on; return what ends that."""
        if self.witness is not None:
            raise UsageError("expected one check_ranks on an optimizer but got a second one; close the first.")
        self.witness = witness

        def leave() -> None:
            if self.witness is witness:
                self.witness = None

        return leave

    def next(self) -> Link:
        """Return the link of the step that is about to be taken."""
        step = self.step + 1
        parts: list[tuple[str, Any]] = [
            ("number of steps", step),
            ("sizes of buckets", tuple(self._sizes)),
            (f"order of reductions in step {self.step}", self._last_order),
            ("order of gathers", self._gathers.buckets),
        ]
        for index, group in enumerate(self._param_groups):
            values = [group.get(name) for name in self._names]
            values = [value if type(value) in _PLAIN else _plain(value) for value in values]
            parts.append((f"group {index}", tuple(zip(self._names, values, strict=True))))
        if self.witness is not None and (seen := self.witness.look(step)) is not None:
            parts.append((PARAMETERS, seen))
        return Link(step, blake2b(self.digest + repr(parts).encode(), digest_size=DIGEST_NBYTES).digest(), tuple(parts))

    def take(self, link: Link) -> None:
        """The step is agreed on: it is part of the hash."""
        self.step, self.digest = link.step, link.digest
        self._links.append(link)

    def follow(self, digest: bytes) -> None:
        """Take over the hash of ranks that have data: this one has joined and knows no hyper-parameters of theirs."""
        self.take(Link(self.step + 1, digest, ()))

    def end_step(self) -> None:
        """The step's reductions, if there are any, are all launched."""
        if self.order:
            self._last_order = tuple(self.order)
            self.order.clear()

    def mismatch(self, link: Link | None, exchange: Callable[[Any, str], list[Any]]) -> RankMismatchError:
        """Return the error that names what differs, and since which step.

        Collective: every rank, once their hashes differ.
        """
        mine = [*self._links, *([] if link is None else [link])]
        chains: list[list[Link]] = exchange(mine, "comparing ranks step by step")
        step, differing = _first_difference(chains)
        told = []
        for what, values in differing:
            shown = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in _by_value(values))
            told.append(f"{what}: expected the same on every rank but got {shown}")
        parameters = [chain[-1].parts[-1][0] == PARAMETERS for chain in chains if chain and chain[-1].parts]
        if not told and self.witness is not None and len(parameters) == len(chains) and all(parameters):
            told.append(self.witness.explain())
        if not told:
            told.append(
                "their records do not reach back to where it began; call diagnostics.check_parameters(optimizer)"
            )
        return RankMismatchError(
            f"ranks differ since step {step}: {'. '.join(told)}. No rank has taken step {self.step + 1}; give every "
            "rank the same hyper-parameters and calls, or load a checkpoint."
        )


def _first_difference(chains: Sequence[Sequence[Link]]) -> tuple[int, list[tuple[str, list[str]]]]:
    """Return the first step whose links differ, and what differs in it: name, and each rank's value in words."""
    by_step = [{link.step: link for link in chain} for chain in chains]
    common = sorted(set(by_step[0]).intersection(*by_step[1:]))
    step = next((step for step in common if len({links[step].digest for links in by_step}) > 1), 0)
    if not step:
        return min((link.step for chain in chains for link in chain), default=0), []
    parts = [dict(_flat(links[step].parts)) for links in by_step]
    told = [(rank, known) for rank, known in enumerate(parts) if known]
    differing = []
    for what in dict.fromkeys(name for _, known in told for name in known):
        values = [repr(known.get(what, "nothing")) if known else "nothing" for known in parts]
        if what != PARAMETERS and len({values[rank] for rank, _ in told}) > 1:
            differing.append((what, values))
    return step, differing


def _flat(parts: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for what, value in parts:
        if what.startswith("group "):
            found += [(f"{what}: {name}", item) for name, item in value]
        else:
            found.append((what, value))
    return found


def _by_value(values: Sequence[str]) -> list[tuple[str, list[int]]]:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else f"tensor on {value.device.type}"
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if isinstance(value, _PLAIN) else type(value).__qualname__  # whose repr may hold an address
