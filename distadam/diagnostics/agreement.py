"""Do all ranks have the same parameters, bit for bit; if not, which parameter, which element, which rank?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distadam.diagnostics.shards import access_of, row_major_index, spell
from distadam.engine.access import Access
from distadam.errors import CheckFailed
from distadam.optimizer import ShardedOptimizer

_CHUNK = 1 << 16
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)
_MOST = 8
_known_factors: dict[torch.device, Tensor] = {}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One parameter that is not the same on all ranks.

    Attributes:
        parameter: its name.
        index: the first element that differs.
        values: that element on each rank.
        suspects: the ranks that are most likely wrong: the minority; of two, the one that does not own the element.
        owner: the rank whose shard the element lies in; None of a frozen parameter.
        num_elements: how many elements differ between some ranks.
        num_bits: how many bits of the element differ.
        stale: ranks whose parameter is still the one from before the step.
    """

    parameter: str
    index: tuple[int, ...]
    values: tuple[float, ...]
    suspects: tuple[int, ...]
    owner: int | None
    num_elements: int
    num_bits: int
    stale: tuple[int, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(f"rank {rank} {value!r}" for rank, value in enumerate(self.values))
        ranks = " and ".join(f"rank {rank}" for rank in self.suspects)
        if self.stale:
            why = f"; {ranks} still has what was there before the step: its gather is stale or did not happen"
        elif self.num_elements == 1 and self.num_bits == 1:
            why = f"; one bit of one element is flipped, on {ranks} most likely"
        else:
            why = f"; {self.num_elements:,} elements differ, {ranks} is wrong most likely"
        owner = "" if self.owner is None else f" (in the shard of rank {self.owner})"
        return f"{spell(self.parameter, self.index)}: expected the same bits on every rank but got {shown}{owner}{why}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "parameter": self.parameter,
            "index": list(self.index),
            "values": [repr(value) for value in self.values],
            "suspects": list(self.suspects),
            "owner": self.owner,
            "elements": self.num_elements,
            "bits": self.num_bits,
            "stale": list(self.stale),
        }


def check_parameters(optimizer: ShardedOptimizer, *, raises: bool = True) -> list[Disagreement]:
    """Compare every parameter over all ranks, bit for bit, frozen ones included.

    Args:
        optimizer: whose parameters.
        raises: raise if something differs; False returns it.

    Returns:
        The parameters that differ, at most 8 of them, the same list on every rank.

    Raises:
        CheckFailed: with ``raises``.

    Collective: every rank; sums of 8 bytes a parameter, and whole parameters only where sums differ. Syncs: yes.
    """
    access = access_of(optimizer)
    optimizer.flush()
    found = compare_ranks(access, checksums(access))
    if found and raises:
        raise CheckFailed("\n".join(map(str, found)))
    return found


def checksums(access: Access) -> dict[str, int]:
    """Return a sum over each parameter's bits that any single flipped bit changes.

    Communicates nothing. Syncs: once a device.
    """
    on_devices: dict[torch.device, dict[str, Tensor]] = {}
    for param, name in access.names.items():
        on_devices.setdefault(param.device, {})[name] = _checksum(_bits(param))
    found: dict[str, int] = {}
    for sums in on_devices.values():
        found |= dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    return {name: found[name] for name in access.names.values()}


def compare_ranks(
    access: Access, sums: Mapping[str, int], before: Mapping[str, int] | None = None
) -> list[Disagreement]:
    """Compare what `checksums` returned on every rank, and look closer where it differs.

    Args:
        access: of the optimizer.
        sums: of the parameters now.
        before: of the parameters before the step, to know a stale one by.

    Collective: every rank, at the same point.
    """
    if access.collectives.groups.num_ranks == 1:
        return []
    answers = access.collectives.exchange((dict(sums), before), "comparing parameters")
    params = {name: param for param, name in access.names.items()}
    differing = [name for name in sums if len({answer[0].get(name) for answer in answers}) > 1]
    found = []
    for name in differing[:_MOST]:
        copies = access.collectives.exchange(params[name].detach().cpu(), f"comparing parameter {name!r}")
        stale = tuple(
            rank for rank, (now, old) in enumerate(answers) if old is not None and now.get(name) == old.get(name)
        )
        found.append(_look(access, name, params[name], copies, stale if len(stale) < len(answers) else ()))
    return found


def _look(access: Access, name: str, param: Tensor, copies: list[Tensor], stale: tuple[int, ...]) -> Disagreement:
    bits = torch.stack([_bits(copy).long() for copy in copies])
    differs = (bits != bits[0]).any(0)
    position = int(differs.nonzero()[0])
    index = row_major_index(param.shape, position)
    here = bits[:, position].tolist()
    owner = _owner(access, param, index)
    (common, times), *_ = Counter(here).most_common()
    if 2 * times <= len(here) and owner is not None:
        common = here[owner]
    suspects = stale or tuple(rank for rank, value in enumerate(here) if value != common)
    mask = (1 << (8 * param.element_size())) - 1
    num_bits = max(((value ^ common) & mask).bit_count() for value in here)
    return Disagreement(
        parameter=name,
        index=index,
        values=tuple(float(copy.reshape(-1)[position]) for copy in copies),
        suspects=suspects,
        owner=owner,
        num_elements=int(differs.sum()),
        num_bits=num_bits,
        stale=stale,
    )


def _owner(access: Access, param: Tensor, index: tuple[int, ...]) -> int | None:
    for flat in access.flats:
        for slot, other in enumerate(flat.params):
            if other is param:
                strides = flat.views[slot][1]
                offset = sum(place * stride for place, stride in zip(index, strides, strict=True))
                return (flat.bucket.slots[slot].offset + offset) // flat.bucket.shard_numel
    return None


def _bits(param: Tensor) -> Tensor:
    return param.detach().contiguous().view(-1).view(_INTEGERS[param.element_size()])


def _checksum(bits: Tensor) -> Tensor:
    factors = _factors(min(_CHUNK, bits.numel()), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, part in enumerate(torch.split(bits, _CHUNK)):
        # Odd factors: no bit of a difference is lost.
        total += (part * factors[: part.numel()]).sum() * (2 * number + 1)
    return total


def _factors(numel: int, device: torch.device) -> Tensor:
    known = _known_factors.get(device)
    if known is None or known.numel() < numel:
        known = torch.arange(numel, device=device).mul_(_MIX).bitwise_or_(1)
        _known_factors[device] = known
    return known
