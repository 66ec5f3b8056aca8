"""`compare_with_torch`: torch.optim beside the sharded optimizer, on the same gradients, until they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from distadam.diagnostics.double import unchanged
from distadam.diagnostics.shards import access_of, row_major_index, spell
from distadam.diagnostics.sinks import finite
from distadam.engine.access import Access
from distadam.errors import CheckFailed, ConfigError
from distadam.optimizer import ShardedOptimizer

_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
_OURS = ("params", "param_names", "master", "moments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first number that differs.

    Attributes:
        step: counted from 1.
        what: "gradient" (reduced, against the average of the ranks' own) or "parameter" (after the step).
        parameter, index: which.
        ours, theirs: the numbers.
        rank: the rank that saw it.
    """

    step: int
    what: str
    parameter: str
    index: tuple[int, ...]
    ours: float
    theirs: float
    rank: int

    def __str__(self) -> str:
        other = "torch.optim has" if self.what == "parameter" else "the average of the ranks' own is"
        where = spell(self.parameter, self.index)
        what = f"step {self.step}, {self.what} {where} on rank {self.rank}"
        return f"{what}: {self.ours:.9g} where {other} {self.theirs:.9g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare_with_torch` found; the same on every rank.

    Attributes:
        num_steps: steps that were compared.
        difference: the first difference above the tolerance, or None.
        largest: the largest difference of each parameter that stayed within it, by name.
    """

    num_steps: int
    difference: Difference | None
    largest: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether nothing differed by more than the tolerance."""
        return self.difference is None

    def to_json(self) -> str:
        """Return plain values as JSON."""
        return json.dumps(finite(asdict(self) | {"ok": self.ok}), allow_nan=False)

    def __str__(self) -> str:
        if self.difference is not None:
            return str(self.difference)
        name, value = max(self.largest.items(), key=lambda pair: pair[1], default=("", 0.0))
        return f"{self.num_steps} steps as torch.optim; the largest difference is {value:.3g}, in {name}"


def compare_with_torch(
    optimizer: ShardedOptimizer,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int = 10,
    clip_norm: float | None = None,
    after_step: Callable[[int], object] | None = None,
    rtol: float = 1e-5,
    atol: float | None = None,
    raises: bool = True,
) -> Comparison:
    """Train for some steps beside torch.optim and stop at the first step, parameter and element that differ.

    Each step first compares the reduced gradient with the plain average of the ranks' own autograd gradients, then
    gives that reduced gradient to torch.optim's single-tensor loop on copies of the weights, and compares parameters.
    The optimizer has trained for these steps afterwards. It must be new: torch.optim starts without state.

    Args:
        optimizer: fp32 or fp64 parameters, or 16-bit ones with ``master`` "fp32" or "split", and fp32 moments.
        model: whose parameters ``loss`` reads.
        loss: ``loss(step)`` returns this rank's loss of a step, from 1; twice in a row the same.
        steps: how many at most.
        clip_norm: clip both to this norm.
        after_step: called after each step; a scheduler's ``step``, for one. torch.optim follows the groups' options.
        rtol: tolerance relative to the parameter; that of 16-bit ones is a unit in their last place at least.
        atol: absolute tolerance; 1e-3 of the group's learning rate unless given.
        raises: raise at a difference.

    Raises:
        CheckFailed: with ``raises``.
        ConfigError: a storage that torch.optim does not have; `check_updates` checks those.

    Collective: every rank, with the same arguments. Syncs: yes.
    """
    access = access_of(optimizer)
    for flat in access.flats:
        if flat.choice.weights not in ("own", "fp32", "split") or flat.choice.moments != "fp32":
            raise ConfigError(
                f"compare_with_torch expected storages that torch.optim has too but parameter {flat.names[0]!r} has "
                f"weights {flat.choice.weights!r} and moments {flat.choice.moments!r}; use check_updates."
            )
    optimizer.zero_grad()
    optimizer.flush()
    twin = _Twin(access)
    largest: dict[str, float] = {}
    for step in range(1, steps + 1):
        own = _own_gradients(model, loss, step, twin.params)
        with torch.enable_grad():
            loss(step).backward()  # type: ignore[no-untyped-call]
        reduced = {name: optimizer.full_grad(name) for name in twin.params}
        difference = _compare_gradients(access, step, reduced, own)
        if difference is None:
            if clip_norm is not None:
                optimizer.clip_grad_norm_(clip_norm)
            used = {name for name, copies in own.items() if any(copy is not None for copy in copies)}
            optimizer.step()
            optimizer.flush()
            twin.step({name: grad for name, grad in reduced.items() if name in used}, clip_norm)
            difference = twin.compare(step, rtol, atol, largest)
            difference = _first(access, difference)
        if difference is not None:
            optimizer.zero_grad()
            if raises:
                raise CheckFailed(f"compare_with_torch: {difference}")
            return Comparison(num_steps=step, difference=difference, largest=largest)
        if after_step is not None:
            after_step(step)
    return Comparison(num_steps=steps, difference=None, largest=largest)


class _Twin:
    """torch.optim over whole copies of the weights, in the compute dtype."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.params = {name: param for param, name in access.names.items() if param.requires_grad}
        wide = torch.float64
        self.copies = {
            name: param.detach().to(wide if param.dtype == wide else torch.float32).clone()
            for name, param in self.params.items()
        }
        groups = []
        for group in access.param_groups:
            names = [access.names[param] for param in group["params"] if param.requires_grad]
            options = {key: value for key, value in group.items() if key not in _OURS}
            groups.append(options | {"params": [self.copies[name] for name in names], "foreach": False, "fused": False})
        self._groups = [group for group in groups if group["params"]]
        self._sources = [
            group for group in access.param_groups if any(param.requires_grad for param in group["params"])
        ]
        self._optimizer = _CLASSES[access.rule.name](self._groups)

    def step(self, grads: Mapping[str, Tensor], clip_norm: float | None) -> None:
        for name, copy in self.copies.items():
            copy.grad = grads[name].to(copy.dtype).clone() if name in grads else None
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.copies.values()), clip_norm)
        for group, source in zip(self._optimizer.param_groups, self._sources, strict=True):
            kept = ("foreach", "fused", *_OURS)
            group.update({key: value for key, value in source.items() if key not in kept})
        self._optimizer.step()

    def compare(self, step: int, rtol: float, atol: float | None, largest: dict[str, float]) -> Difference | None:
        for source in self._sources:
            absolute = 1e-3 * abs(float(source["lr"])) if atol is None else atol
            for param in source["params"]:
                name = self._access.names[param]
                if name not in self.copies or not param.numel():
                    continue
                theirs, ours = self.copies[name].detach().double(), param.detach().double()
                eps = 2.0 * torch.finfo(param.dtype).eps if param.element_size() < 4 else 0.0
                apart = (ours - theirs).abs().nan_to_num(nan=torch.inf)
                apart = torch.where(ours.isnan() & theirs.isnan(), 0.0, apart)
                excess = apart - (absolute + max(rtol, eps) * theirs.abs().nan_to_num())
                if float(excess.max()) > 0:
                    position = int((excess > 0).flatten().nonzero()[0])
                    return _difference(step, "parameter", name, ours, theirs, position, self._rank)
                largest[name] = max(largest.get(name, 0.0), float(apart.max()))
        return None

    @property
    def _rank(self) -> int:
        return self._access.collectives.groups.rank


def _own_gradients(
    model: nn.Module, loss: Callable[[int], Tensor], step: int, params: Mapping[str, Tensor]
) -> dict[str, list[Tensor | None]]:
    with unchanged(model), torch.enable_grad():
        grads = torch.autograd.grad(loss(step), list(params.values()), allow_unused=True)
    return {name: [None if grad is None else grad.detach()] for name, grad in zip(params, grads, strict=True)}


def _compare_gradients(
    access: Access, step: int, reduced: Mapping[str, Tensor], own: dict[str, list[Tensor | None]]
) -> Difference | None:
    """Compare with the plain average; ``own`` holds every rank's gradients afterwards."""
    found = None
    for name, ours in reduced.items():
        local = own[name][0]
        copies = access.collectives.exchange(None if local is None else local.cpu(), f"gradient of {name!r}")
        own[name] = copies
        present = [copy.double() for copy in copies if copy is not None]
        if not present or not ours.numel() or found is not None:
            continue
        theirs = torch.stack(present).sum(0) / len(copies)
        size = torch.stack(present).abs().sum(0) / len(copies)
        value = ours.double().cpu()
        bound = 8 * len(copies) * torch.finfo(ours.dtype).eps * size.clamp_min(1e-6 * float(size.max()))
        wrong = ~((value - theirs).abs() <= bound) & ~(value.isnan() & theirs.isnan()) & (value != theirs)
        if bool(wrong.any()):
            position = int(wrong.flatten().nonzero()[0])
            found = _difference(step, "gradient", name, value, theirs, position, access.collectives.groups.rank)
    return _first(access, found)


def _first(access: Access, found: Difference | None) -> Difference | None:
    """Return what the first rank found, on every rank."""
    answers: list[Difference | None] = access.collectives.exchange(found, "compare_with_torch")
    return next((answer for answer in answers if answer is not None), None)


def _difference(step: int, what: str, name: str, ours: Tensor, theirs: Tensor, position: int, rank: int) -> Difference:
    return Difference(
        step=step,
        what=what,
        parameter=name,
        index=row_major_index(ours.shape, position),
        ours=float(ours.reshape(-1)[position]),
        theirs=float(theirs.reshape(-1)[position]),
        rank=rank,
    )
